"""The page-table algorithm, once for every format: map, unmap, look up. Tables are real bytes in memory.

Vocabulary. *Level* 1 is the table of 4 KiB leaves, the root is level ``levels``. A *slot* is one entry, named by its
word index in physical memory (``words[slot]``); it *spans* ``1 << level_shift(level)`` bytes. A *run* is a row of
leaves of one size inside one table: the unit in which entries are checked, written, cleared and counted.

Rules (``drivers/iommu/generic_pt/iommu_pt.h``, ``pt_iter.h``; observed on Linux 7.2):

* **Leaf size**: the largest supported size that divides iova and phys and fits what is left. A run of it ends where
  iova and phys, if they are congruent, reach a boundary of the next larger size; then the size is chosen again.
* **Map** refuses a present leaf (EADDRINUSE); what was written before it stays, ``gather.mapped`` says how much, and
  the caller undoes it. A large leaf over a table without a single leaf below replaces it: the tables join the
  gather's freelist and the slot's span its range, and the caller must invalidate at once.
* **Unmap** stops at the first hole. Beginning inside a large leaf removes nothing; ending inside one removes the
  whole leaf and reports more than was asked. A table is unlinked only when the range covers all it spans.
* A map that fails for want of memory leaves the tables that it had already linked: empty, owned, used by the next.

Invariants: a slot holds 0, a leaf, or a table that is linked exactly once; ``table_pages`` counts the linked tables
and the root; no table is given back here, except by ``destroy``.

With a walker that is not coherent every written entry is flushed from the CPU cache: counted by the ledger in whole
64-byte lines, a new table as a whole page; the flushed bit in the entry that points to it remembers that it was done.
"""

from __future__ import annotations

from typing import NamedTuple, SupportsIndex

import cython

from dmakit.errors import ExhaustedError
from dmakit.iova.arguments import within

if cython.compiled:
    from cython.cimports.dmakit.consts import (
        EADDRINUSE,
        EINVAL,
        ENOMEM,
        ENXIO,
        EOVERFLOW,
        ERANGE,
        L_PTE_CLEAR_1,
        L_PTE_SET_1,
        L_TABLE_FLUSH_BYTES,
        PAGE_SHIFT,
        PAGE_SIZE,
        PROT_READ,
        PROT_WRITE,
        PT_ENTRIES,
        PT_INDEX_BITS,
    )
    from cython.cimports.dmakit.iommu.formats.base import PtFormat
    from cython.cimports.dmakit.iommu.gather import ALL_ONES, Gather
    from cython.cimports.dmakit.iommu.tables import TablePages
else:
    from dmakit.consts import (
        EADDRINUSE,
        EINVAL,
        ENOMEM,
        ENXIO,
        EOVERFLOW,
        ERANGE,
        L_PTE_CLEAR_1,
        L_PTE_SET_1,
        L_TABLE_FLUSH_BYTES,
        PAGE_SHIFT,
        PAGE_SIZE,
        PROT_READ,
        PROT_WRITE,
        PT_ENTRIES,
        PT_INDEX_BITS,
    )
    from dmakit.iommu.formats.base import PtFormat
    from dmakit.iommu.gather import ALL_ONES, Gather
    from dmakit.iommu.tables import TablePages

_LINE_WORDS = 8  # words of one cache line of the CPU
_LEVEL_BITS = 3  # the low bits of what _leaf returns


class Leaf(NamedTuple):
    """One leaf as reports show it: addresses and size in bytes, ``level`` 1 to 3, ``entry`` the raw 64 bits."""

    iova: int
    phys: int
    size: int
    level: int
    entry: int


def level_shift(level: cython.int) -> cython.int:
    """log2 of the bytes that one entry of a table of ``level`` spans."""
    return PAGE_SHIFT + PT_INDEX_BITS * (level - 1)


@cython.cclass
class PageTable:
    """One tree of ``levels`` levels in format ``fmt``; the root is allocated here (ExhaustedError)."""

    def __init__(self, fmt: PtFormat, tables: TablePages, *, levels: int, coherent_walker: bool = True) -> None:
        self.aperture_last = fmt.aperture_last(levels)
        self.fmt = fmt
        self.tables = tables
        self.memory = tables.memory
        self.ledger = tables.ledger
        self.levels = levels
        self.coherent_walker = coherent_walker
        self.near_span = ALL_ONES
        self.near_slot = 0
        self.root = tables._new()
        if self.root == 0:
            raise ExhaustedError(f"no page for the root table of {fmt.name}")
        self.table_pages = 1
        self._flush_lines(self.root >> 3, PT_ENTRIES)

    def destroy(self) -> None:
        """Free every table, the root included; nothing may walk them any more. A second call does nothing."""
        if self.root == 0:
            return
        gather = Gather()
        self._defer_tree(self.root, self.levels, gather)
        self.tables._free_list(gather.freelist)
        self.root = 0

    def map(
        self, iova: SupportsIndex, phys: SupportsIndex, size: SupportsIndex, prot: SupportsIndex, gather: Gather
    ) -> int:
        """``_map`` for callers that are not compiled: 0 or -errno; sizes and addresses in bytes."""
        place, size = within("iova", iova, 0, ALL_ONES), within("size", size, 0, ALL_ONES)
        phys, prot = within("phys", phys, 0, ALL_ONES), within("prot", prot, 0, 63)
        return int(self._map(place, phys, size, prot, gather))

    def unmap(self, iova: SupportsIndex, size: SupportsIndex, gather: Gather) -> int:
        """``_unmap`` for callers that are not compiled: the bytes removed."""
        return int(self._unmap(within("iova", iova, 0, ALL_ONES), within("size", size, 0, ALL_ONES), gather))

    def iova_to_phys(self, iova: SupportsIndex) -> int:
        """The physical address that ``iova`` translates to, or 0."""
        return int(self._iova_to_phys(within("iova", iova, 0, ALL_ONES)))

    def leaves(self, iova: int = 0, size: int | None = None) -> list[Leaf]:
        """The leaves that hold a byte of [iova, iova + size), ascending (the whole aperture when ``size`` is None)."""
        last = int(self.aperture_last) if size is None else min(iova + size - 1, int(self.aperture_last))
        found: list[Leaf] = []
        if self.root != 0 and iova <= last:
            self._collect(self.root, self.levels, 0, iova, last, found)
        return found

    def _collect(self, table: int, level: int, base: int, first: int, last: int, found: list[Leaf]) -> None:
        shift = int(level_shift(level))
        for slot in range(max(0, (first - base) >> shift), min(PT_ENTRIES - 1, (last - base) >> shift) + 1):
            entry = self.memory.words[(table >> 3) + slot]
            start = base + (slot << shift)
            if not entry & self.fmt.present_bits:
                continue
            target = entry & self.fmt.address_mask
            if self.fmt._is_leaf(entry, level):
                found.append(Leaf(start, int(target), 1 << shift, level, int(entry)))
            else:
                self._collect(int(target), level - 1, start, first, last, found)

    # look up -------------------------------------------------------------------------------------------------------

    def _leaf(self, iova: cython.ulonglong) -> cython.ulonglong:
        """``slot << 3 | level`` of the leaf that translates ``iova``, or 0."""
        if iova > self.aperture_last or self.root == 0:
            return 0
        table: cython.ulonglong = self.root
        level: cython.int = self.levels
        while True:
            slot: cython.ulonglong = (table >> 3) + ((iova >> level_shift(level)) & (PT_ENTRIES - 1))
            entry: cython.ulonglong = self.memory.words[slot]
            if entry & self.fmt.present_bits == 0:
                return 0
            if self.fmt._is_leaf(entry, level):
                return (slot << _LEVEL_BITS) | level
            table = entry & self.fmt.address_mask
            level -= 1

    def _iova_to_phys(self, iova: cython.ulonglong) -> cython.ulonglong:
        """The physical address that ``iova`` translates to, or 0."""
        found: cython.ulonglong = self._leaf(iova)
        if found == 0:
            return 0
        span: cython.ulonglong = 1
        span <<= level_shift(found & ((1 << _LEVEL_BITS) - 1))
        return (self.memory.words[found >> _LEVEL_BITS] & self.fmt.address_mask) | (iova & (span - 1))

    def _leaf_across(self, iova: cython.ulonglong) -> cython.bint:
        """Whether ``iova`` lies inside a leaf but not at its start (an unmap that begins or ends here cuts it)."""
        found: cython.ulonglong = self._leaf(iova)
        span: cython.ulonglong = 1
        span <<= level_shift(found & ((1 << _LEVEL_BITS) - 1))
        return found != 0 and iova & (span - 1) != 0

    # map -----------------------------------------------------------------------------------------------------------

    def _map(
        self,
        iova: cython.ulonglong,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        prot: cython.int,
        gather: Gather,
    ) -> cython.int:
        """Map [iova, iova + size) to phys; 0 or -errno, and in ``gather.mapped`` the bytes that were mapped."""
        gather.mapped = 0
        if self._is_near(iova | (phys & (PAGE_SIZE - 1)), size):
            error: cython.int = self._map_near(iova, phys, size, prot, gather)
            if error <= 0:
                return error
        error = self._check(iova, phys, size, prot)
        if error != 0:
            return error
        return self._map_runs(iova, phys, size, prot, gather)

    def _is_near(self, iova: cython.ulonglong, size: cython.ulonglong) -> cython.bint:
        """Whether [iova, iova + size) is whole 4 KiB pages, less than 2 MiB, all in the table that was used last."""
        return (
            iova >> (PAGE_SHIFT + PT_INDEX_BITS) == self.near_span
            and (iova | size) & (PAGE_SIZE - 1) == 0
            and size != 0
            and size < PT_ENTRIES << PAGE_SHIFT
            and (iova & ((PT_ENTRIES << PAGE_SHIFT) - 1)) + size <= PT_ENTRIES << PAGE_SHIFT
        )

    def _map_near(
        self,
        iova: cython.ulonglong,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        prot: cython.int,
        gather: Gather,
    ) -> cython.int:
        """``_map`` of a range that is near: one run, no walk; 1 when an argument breaks a rule of ``_check``."""
        if prot & (PROT_READ | PROT_WRITE) == 0 or (phys | (phys + (size - 1))) >> self.fmt.output_bits != 0:
            return 1
        at: cython.ulonglong = self.near_slot + ((iova >> PAGE_SHIFT) & (PT_ENTRIES - 1))
        count: cython.ulonglong = size >> PAGE_SHIFT
        put: cython.ulonglong = self._put(at, count, iova, phys, 1, self.fmt._leaf_bits(prot), gather)
        gather.mapped = put << PAGE_SHIFT
        return 0 if put == count else -EADDRINUSE

    def _map_runs(
        self,
        iova: cython.ulonglong,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        prot: cython.int,
        gather: Gather,
    ) -> cython.int:
        """``_map`` of checked arguments: leaf size by leaf size, table by table."""
        error: cython.int
        bits: cython.ulonglong = self.fmt._leaf_bits(prot)
        while gather.mapped < size:
            done: cython.ulonglong = gather.mapped
            level: cython.int = self._best_level((iova + done) | (phys + done), size - done)
            if level == 0:
                return -ENXIO
            end: cython.ulonglong = done + self._run_bytes(iova + done, phys + done, size - done, level)
            while done < end:
                at: cython.ulonglong = self._slot(iova + done, level)
                if at < PT_ENTRIES:
                    error = at
                    return -error
                count: cython.ulonglong = PT_ENTRIES - (at & (PT_ENTRIES - 1))
                if count > (end - done) >> level_shift(level):
                    count = (end - done) >> level_shift(level)
                put: cython.ulonglong = self._put(at, count, iova + done, phys + done, level, bits, gather)
                done += put << level_shift(level)
                gather.mapped = done
                if put < count:
                    return -EADDRINUSE
        return 0

    def _check(
        self, iova: cython.ulonglong, phys: cython.ulonglong, size: cython.ulonglong, prot: cython.int
    ) -> cython.int:
        """The argument rules, in the kernel's order: 0 or -errno (-EINVAL also once the table is destroyed)."""
        if prot & (PROT_READ | PROT_WRITE) == 0 or self.root == 0:
            return -EINVAL
        if phys >> self.fmt.output_bits != 0:
            return -ERANGE
        if size == 0:
            return -EINVAL
        if size - 1 > ALL_ONES - iova:
            return -EOVERFLOW
        if self._best_level(iova | phys, size) == 0:
            return -ENXIO
        if iova + (size - 1) > self.aperture_last or (phys + (size - 1)) >> self.fmt.output_bits != 0:
            return -ERANGE
        return 0

    def _best_level(self, congruence: cython.ulonglong, size: cython.ulonglong) -> cython.int:
        """Level of the largest supported leaf that divides ``congruence`` (iova | phys) and fits ``size``; 0 = none."""
        level: cython.int = self.levels
        while level > 0:
            span: cython.ulonglong = 1
            span <<= level_shift(level)
            if self.fmt.page_sizes & span != 0 and size >= span and congruence & (span - 1) == 0:
                return level
            level -= 1
        return 0

    def _run_bytes(
        self, iova: cython.ulonglong, phys: cython.ulonglong, size: cython.ulonglong, level: cython.int
    ) -> cython.ulonglong:
        """How far leaves of ``level`` go: to the next larger size's boundary if iova and phys meet there, else on."""
        span: cython.ulonglong = 1
        larger: cython.int = level + 1
        while larger <= self.levels:
            span = 1
            span <<= level_shift(larger)
            if self.fmt.page_sizes & span != 0:
                break
            larger += 1
        whole: cython.ulonglong = (size >> level_shift(level)) << level_shift(level)
        if larger > self.levels or (iova ^ phys) & (span - 1) != 0:
            return whole
        boundary: cython.ulonglong = span - (iova & (span - 1))
        return boundary if boundary < whole else whole

    def _slot(self, iova: cython.ulonglong, level: cython.int) -> cython.ulonglong:
        """The slot of ``iova`` in its table of ``level``, making the tables above; or, below 512, a positive errno."""
        table: cython.ulonglong = self.root
        at_level: cython.int = self.levels
        while True:
            slot: cython.ulonglong = (table >> 3) + ((iova >> level_shift(at_level)) & (PT_ENTRIES - 1))
            if at_level == level:
                if level == 1:
                    self.near_span = iova >> (PAGE_SHIFT + PT_INDEX_BITS)
                    self.near_slot = table >> 3
                return slot
            entry: cython.ulonglong = self.memory.words[slot]
            if entry & self.fmt.present_bits == 0:
                table = self.tables._new()
                if table == 0:
                    return ENOMEM
                entry = table | self.fmt.table_bits
                if not self.coherent_walker:
                    self._flush_lines(table >> 3, PT_ENTRIES)
                    self._flush_lines(slot, 1)
                    entry |= self.fmt.flushed_bit
                self.memory.words[slot] = entry
                self.table_pages += 1
                self.ledger.counts[L_PTE_SET_1 + at_level - 1] += 1
            elif self.fmt._is_leaf(entry, at_level):
                return EADDRINUSE
            else:
                table = entry & self.fmt.address_mask
            at_level -= 1

    def _put(
        self,
        at: cython.ulonglong,
        count: cython.ulonglong,
        iova: cython.ulonglong,
        phys: cython.ulonglong,
        level: cython.int,
        bits: cython.ulonglong,
        gather: Gather,
    ) -> cython.ulonglong:
        """Write up to ``count`` leaves from slot ``at``; fewer when a leaf is in the way. Empty tables make room."""
        free: cython.ulonglong = 0
        if count > 1 and self.memory._union(at, count) & self.fmt.present_bits == 0:
            free = count
        while free < count:
            entry: cython.ulonglong = self.memory.words[at + free]
            if entry & self.fmt.present_bits != 0:
                below: cython.ulonglong = entry & self.fmt.address_mask
                if self.fmt._is_leaf(entry, level) or not self._is_empty(below, level - 1):
                    break
                span: cython.ulonglong = 1
                span <<= level_shift(level)
                self._clear_leaves(at + free, 1, level)
                self._defer_tree(below, level - 1, gather)
                gather._add_range(iova + free * span, span)
            free += 1
        if free != 0:
            self.fmt._fill(self.memory, at, free, phys, level, bits)
            self._flush_lines(at, free)
            self.ledger.counts[L_PTE_SET_1 + level - 1] += free
        return free

    def _is_empty(self, table: cython.ulonglong, level: cython.int) -> cython.bint:
        """Whether no leaf stands in the tree below ``table``."""
        at: cython.ulonglong = table >> 3
        end: cython.ulonglong = at + PT_ENTRIES
        while at < end:
            entry: cython.ulonglong = self.memory.words[at]
            if entry & self.fmt.present_bits != 0 and (
                self.fmt._is_leaf(entry, level) or not self._is_empty(entry & self.fmt.address_mask, level - 1)
            ):
                return False
            at += 1
        return True

    def _defer_tree(self, table: cython.ulonglong, level: cython.int, gather: Gather) -> cython.void:
        """Put ``table`` and every table below it on the gather's freelist; their bytes stay."""
        at: cython.ulonglong = table >> 3
        end: cython.ulonglong = at + PT_ENTRIES if level > 1 else at
        while at < end:
            entry: cython.ulonglong = self.memory.words[at]
            if entry & self.fmt.present_bits != 0 and not self.fmt._is_leaf(entry, level):
                self._defer_tree(entry & self.fmt.address_mask, level - 1, gather)
            at += 1
        self.tables._defer(table, gather)
        self.table_pages -= 1
        self.near_span = ALL_ONES

    # unmap ---------------------------------------------------------------------------------------------------------

    def _unmap(self, iova: cython.ulonglong, size: cython.ulonglong, gather: Gather) -> cython.ulonglong:
        """Remove the leaves of [iova, iova + size) up to the first hole; the bytes removed (see the rules above)."""
        if size == 0 or size - 1 > ALL_ONES - iova or iova + (size - 1) > self.aperture_last or self.root == 0:
            return 0
        removed: cython.ulonglong = 0
        at: cython.ulonglong = self.near_slot + ((iova >> PAGE_SHIFT) & (PT_ENTRIES - 1))
        if not self._is_near(iova, size):
            removed = self._unmap_in(self.root, self.levels, iova, iova + (size - 1), gather)
        elif self.memory.words[at] & self.fmt.present_bits != 0:
            removed = self._clear_leaves(at, size >> PAGE_SHIFT, 1) << PAGE_SHIFT
        gather._add_range(iova, removed)
        return removed

    def _unmap_in(
        self,
        table: cython.ulonglong,
        level: cython.int,
        iova: cython.ulonglong,
        last: cython.ulonglong,
        gather: Gather,
    ) -> cython.ulonglong:
        """Unmap [iova, last] inside one table; less than asked means: stop."""
        removed: cython.ulonglong = 0
        span: cython.ulonglong = 1
        span <<= level_shift(level)
        if level == 1:
            self.near_span = iova >> (PAGE_SHIFT + PT_INDEX_BITS)
            self.near_slot = table >> 3
        while iova <= last:
            at: cython.ulonglong = (table >> 3) + ((iova >> level_shift(level)) & (PT_ENTRIES - 1))
            entry: cython.ulonglong = self.memory.words[at]
            if entry & self.fmt.present_bits == 0:
                break
            if self.fmt._is_leaf(entry, level):
                if iova & (span - 1) != 0:
                    break
                done: cython.ulonglong = self._clear_leaves(at, ((last - iova) >> level_shift(level)) + 1, level)
                removed += done * span
                iova += done * span
                continue
            end: cython.ulonglong = min(last, iova | (span - 1))
            below: cython.ulonglong = entry & self.fmt.address_mask
            part: cython.ulonglong = self._unmap_in(below, level - 1, iova, end, gather)
            removed += part
            if part < end - iova + 1:
                break
            if iova & (span - 1) == 0 and end == iova | (span - 1):
                self._clear_leaves(at, 1, level)
                self.tables._defer(below, gather)
                self.table_pages -= 1
                self.near_span = ALL_ONES
            iova = end + 1
        return removed

    def _clear_leaves(self, at: cython.ulonglong, count: cython.ulonglong, level: cython.int) -> cython.ulonglong:
        """Clear the slot ``at`` and the leaves that follow it, ``count`` at most; how many were cleared."""
        done: cython.ulonglong = 1
        common: cython.ulonglong = self.memory._common(at, count) if count > 1 else 0
        if common & self.fmt.present_bits != 0 and self.fmt._is_leaf(common, level):
            done = count
            self.memory._zero(at << 3, count << 3)
        self.memory.words[at] = 0
        while done < count:
            entry: cython.ulonglong = self.memory.words[at + done]
            if entry & self.fmt.present_bits == 0 or not self.fmt._is_leaf(entry, level):
                break
            self.memory.words[at + done] = 0
            done += 1
        self._flush_lines(at, done)
        self.ledger.counts[L_PTE_CLEAR_1 + level - 1] += done
        return done

    def _flush_lines(self, at: cython.ulonglong, count: cython.ulonglong) -> cython.void:
        """Count the cache lines of ``count`` slots as flushed, when the walker does not snoop the CPU."""
        if not self.coherent_walker:
            lines: cython.ulonglong = (at + count - 1) // _LINE_WORDS - at // _LINE_WORDS + 1
            self.ledger.counts[L_TABLE_FLUSH_BYTES] += lines * _LINE_WORDS * 8
