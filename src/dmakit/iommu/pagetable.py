"""The page-table algorithm, once for every format: map, unmap, look up. Tables are real bytes in memory.

Vocabulary and invariants of the tree: ``iommu.tree``. A *run* is a row of leaves of one size inside one table: the unit
in which entries are checked, written, cleared and counted.

Rules (``drivers/iommu/generic_pt/iommu_pt.h``, ``pt_iter.h``; observed on Linux 7.2):

* **Leaf size**: the largest supported size that divides iova and phys and fits what is left. A run of it ends where
  iova and phys, if they are congruent, reach a boundary of the next larger size; then the size is chosen again.
* **Map** refuses a present leaf (EADDRINUSE); what was written before it stays, ``gather.mapped`` says how much, and
  the caller undoes it. A large leaf over a table without a single leaf below replaces it: the tables join the
  gather's freelist and the slot's span its range, and the caller must invalidate at once.
* **Unmap** stops at the first hole. Beginning inside a large leaf removes nothing; ending inside one removes the
  whole leaf and reports more than was asked. A table is unlinked only when the range covers all it spans.
* A map that fails for want of memory leaves the tables that it had already linked: empty, owned, used by the next.
"""

from __future__ import annotations

from typing import SupportsIndex

import cython

from dmakit.iova.arguments import within

if not cython.compiled:
    from dmakit.consts import (
        EADDRINUSE,
        EINVAL,
        ENOMEM,
        ENXIO,
        EOVERFLOW,
        ERANGE,
        L_PTE_CLEAR_1,
        L_PTE_SET_1,
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
    from dmakit.iommu.tree import TableTree, level_shift


@cython.final
@cython.cclass
class PageTable(TableTree):
    """A tree of tables that maps; arguments as ``TableTree``'s."""

    def __init__(self, fmt: PtFormat, tables: TablePages, *, levels: int, coherent_walker: bool = True) -> None:
        TableTree.__init__(self, fmt, tables, levels=levels, coherent_walker=coherent_walker)
        self.top_leaf = max(level for level in (1, 2, 3) if fmt.page_sizes >> level_shift(level) & 1)

    def map(
        self, iova: SupportsIndex, phys: SupportsIndex, size: SupportsIndex, prot: SupportsIndex, gather: Gather
    ) -> int:
        """``_map`` for callers that are not compiled: 0 or -errno; sizes and addresses in bytes."""
        place, size = within("iova", iova, 0, ALL_ONES), within("size", size, 0, ALL_ONES)
        phys, prot = within("phys", phys, 0, ALL_ONES), within("prot", prot, 0, 63)
        self.ledger._alone()
        return int(self._map(place, phys, size, prot, gather))

    def unmap(self, iova: SupportsIndex, size: SupportsIndex, gather: Gather) -> int:
        """``_unmap`` for callers that are not compiled: the bytes removed."""
        place, size = within("iova", iova, 0, ALL_ONES), within("size", size, 0, ALL_ONES)
        self.ledger._alone()
        return int(self._unmap(place, size, gather))

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
            shift: cython.int = level_shift(level)
            end: cython.ulonglong = done + self._run_bytes(iova + done, phys + done, size - done, level)
            while done < end:
                at: cython.ulonglong = self._slot(iova + done, level if level > 1 else 2)
                if at < PT_ENTRIES:
                    error = at
                    return -error
                count: cython.ulonglong = PT_ENTRIES - (((iova + done) >> shift) & (PT_ENTRIES - 1))
                if count > (end - done) >> shift:
                    count = (end - done) >> shift
                if level > 1:
                    put: cython.longlong = self._put(at, count, iova + done, phys + done, level, bits, gather)
                else:
                    put = self._put_pages(at, count, iova + done, phys + done, bits, gather)
                if put < 0:
                    return put
                gather.mapped = done = done + (put << shift)
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
        if (iova | phys) & (PAGE_SIZE - 1) != 0 or size < PAGE_SIZE:
            return -ENXIO
        if iova + (size - 1) > self.aperture_last or (phys + (size - 1)) >> self.fmt.output_bits != 0:
            return -ERANGE
        return 0

    def _best_level(self, congruence: cython.ulonglong, size: cython.ulonglong) -> cython.int:
        """Level of the largest supported leaf that divides ``congruence`` (iova | phys) and fits ``size``; 0 = none."""
        level: cython.int = self.top_leaf
        span: cython.ulonglong = 1
        span <<= level_shift(level)
        while level > 0:
            if self.fmt.page_sizes & span != 0 and size >= span and congruence & (span - 1) == 0:
                return level
            level -= 1
            span >>= PT_INDEX_BITS
        return 0

    def _run_bytes(
        self, iova: cython.ulonglong, phys: cython.ulonglong, size: cython.ulonglong, level: cython.int
    ) -> cython.ulonglong:
        """How far leaves of ``level`` go: to the next larger size's boundary if iova and phys meet there, else on."""
        whole: cython.ulonglong = (size >> level_shift(level)) << level_shift(level)
        if level == self.top_leaf:
            return whole
        larger: cython.int = level + 1
        span: cython.ulonglong = 1
        span <<= level_shift(larger)
        while self.fmt.page_sizes & span == 0:
            larger += 1
            span <<= PT_INDEX_BITS
        if (iova ^ phys) & (span - 1) != 0:
            return whole
        boundary: cython.ulonglong = span - (iova & (span - 1))
        return boundary if boundary < whole else whole

    def _put_pages(
        self,
        above: cython.ulonglong,
        count: cython.ulonglong,
        iova: cython.ulonglong,
        phys: cython.ulonglong,
        bits: cython.ulonglong,
        gather: Gather,
    ) -> cython.longlong:
        """``_put`` of 4 KiB leaves into the table that slot ``above`` points to; a new one where none is, or -errno.

        A new table is written once: the leaves, and zeros around them.
        """
        index: cython.ulonglong = (iova >> PAGE_SHIFT) & (PT_ENTRIES - 1)
        entry: cython.ulonglong = self.memory.words[above]
        if entry & self.fmt.present_bits != 0:
            if self.fmt._is_leaf(entry, 2):
                return -EADDRINUSE
            self._come_near(iova, entry & self.fmt.address_mask)
            return self._put(self.near_slot + index, count, iova, phys, 1, bits, gather)
        table: cython.ulonglong = self.tables._new_around(index << 3, count << 3)
        if table == 0:
            return -ENOMEM
        self._come_near(iova, table)
        self._write(self.near_slot + index, count, phys, 1, bits)
        self._link(above, table, 2)
        return count

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
        old: cython.ulonglong = self.memory.words[at] if count == 1 else self.memory._union(at, count)
        if old & self.fmt.present_bits != 0:
            count = self._make_room(at, count, iova, level, gather)
            if count == 0:
                return 0
        self._write(at, count, phys, level, bits)
        return count

    def _make_room(
        self, at: cython.ulonglong, count: cython.ulonglong, iova: cython.ulonglong, level: cython.int, gather: Gather
    ) -> cython.ulonglong:
        """How many slots from ``at`` on, at most ``count``, have room for leaves; tables without one are taken out."""
        free: cython.ulonglong = 0
        span: cython.ulonglong = 1
        span <<= level_shift(level)
        while free < count:
            entry: cython.ulonglong = self.memory.words[at + free]
            if entry & self.fmt.present_bits != 0:
                below: cython.ulonglong = entry & self.fmt.address_mask
                if self.fmt._is_leaf(entry, level) or not self._is_empty(below, level - 1):
                    break
                self._clear_leaves(at + free, 1, level)
                self._defer_tree(below, level - 1, gather)
                gather._add_range(iova + free * span, span)
            free += 1
        return free

    def _write(
        self,
        at: cython.ulonglong,
        count: cython.ulonglong,
        phys: cython.ulonglong,
        level: cython.int,
        bits: cython.ulonglong,
    ) -> cython.void:
        """Write ``count`` leaves from slot ``at``, whatever is there."""
        self.fmt._fill(self.memory, at, count, phys, level, bits)
        if not self.coherent_walker:
            self._flush_lines(at, count)
        self.ledger.counts[L_PTE_SET_1 + level - 1] += count

    def _come_near(self, iova: cython.ulonglong, table: cython.ulonglong) -> cython.void:
        """Remember the table of 4 KiB leaves of ``iova``: it was used last."""
        self.near_span = iova >> (PAGE_SHIFT + PT_INDEX_BITS)
        self.near_slot = table >> 3

    # unmap ---------------------------------------------------------------------------------------------------------

    def _unmap(self, iova: cython.ulonglong, size: cython.ulonglong, gather: Gather) -> cython.ulonglong:
        """Remove the leaves of [iova, iova + size) up to the first hole; the bytes removed (see the rules above)."""
        removed: cython.ulonglong = 0
        if self._is_near(iova, size):
            at: cython.ulonglong = self.near_slot + ((iova >> PAGE_SHIFT) & (PT_ENTRIES - 1))
            if self.memory.words[at] & self.fmt.present_bits != 0:
                removed = self._clear_leaves(at, size >> PAGE_SHIFT, 1) << PAGE_SHIFT
        elif self._is_inside(iova, size):
            removed = self._unmap_in(self.root, self.levels, iova, iova + (size - 1), gather)
        gather._add_range(iova, removed)
        return removed

    def _is_inside(self, iova: cython.ulonglong, size: cython.ulonglong) -> cython.bint:
        """Whether [iova, iova + size) is a range that the table, not yet destroyed, can translate."""
        return size != 0 and size - 1 <= ALL_ONES - iova and iova + (size - 1) <= self.aperture_last and self.root != 0

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
            self._come_near(iova, table)
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
                self._forget_near()
            iova = end + 1
        return removed

    def _clear_leaves(self, at: cython.ulonglong, count: cython.ulonglong, level: cython.int) -> cython.ulonglong:
        """Clear the slot ``at`` and the leaves that follow it, ``count`` at most; how many were cleared."""
        done: cython.ulonglong = 1
        if count > 1:
            done = self._leaves_from(at, count, level)
            self.memory._zero(at << 3, done << 3)
        else:
            self.memory.words[at] = 0
        if not self.coherent_walker:
            self._flush_lines(at, done)
        self.ledger.counts[L_PTE_CLEAR_1 + level - 1] += done
        return done

    def _leaves_from(self, at: cython.ulonglong, count: cython.ulonglong, level: cython.int) -> cython.ulonglong:
        """How many leaves stand from slot ``at`` on, ``count`` at most; the first is taken for one."""
        common: cython.ulonglong = self.memory._common(at, count)
        if common & self.fmt.present_bits != 0 and self.fmt._is_leaf(common, level):
            return count
        found: cython.ulonglong = 1
        while found < count:
            entry: cython.ulonglong = self.memory.words[at + found]
            if entry & self.fmt.present_bits == 0 or not self.fmt._is_leaf(entry, level):
                break
            found += 1
        return found
