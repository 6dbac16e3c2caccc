"""A tree of page tables: bytes in memory that are descended, linked, looked up and given up. What leaves go where is
``iommu.pagetable``'s.

Vocabulary. *Level* 1 is the table of 4 KiB leaves, the root is level ``levels``. A *slot* is one entry, named by its
word index in physical memory (``words[slot]``); it *spans* ``1 << level_shift(level)`` bytes.

Invariants: a slot holds 0, a leaf, or a table that is linked exactly once; ``table_pages`` counts the linked tables
and the root; a table is complete before a slot points to it; no table is given back here, except by ``destroy``.

The tables of level 1 and 2 that were used last are remembered (``near_*``, ``upper_*``: the span as a number, all ones
for none, and the table's first slot), so that what goes on where it stopped does not descend again. Whoever takes a
table out of the tree forgets both.

With a walker that is not coherent every written entry is flushed from the CPU cache: counted by the ledger in whole
64-byte lines, a new table as a whole page; the flushed bit in the entry that points to it remembers that it was done.

Models ``drivers/iommu/generic_pt/pt_iter.h``.
"""

from __future__ import annotations

from typing import NamedTuple, SupportsIndex

import cython

from dmakit.errors import ExhaustedError
from dmakit.iova.arguments import within

if not cython.compiled:
    from dmakit.consts import (
        EADDRINUSE,
        ENOMEM,
        L_PTE_SET_1,
        L_TABLE_FLUSH_BYTES,
        PAGE_SHIFT,
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
class TableTree:
    """A tree of ``levels`` levels in format ``fmt``; the root is allocated here (ExhaustedError)."""

    def __init__(self, fmt: PtFormat, tables: TablePages, *, levels: int, coherent_walker: bool = True) -> None:
        self.aperture_last = fmt.aperture_last(levels)
        self.fmt = fmt
        self.tables = tables
        self.memory = tables.memory
        self.ledger = tables.ledger
        self.levels = levels
        self.coherent_walker = coherent_walker
        self.near_span = self.upper_span = ALL_ONES
        self.near_slot = self.upper_slot = 0
        self.root = tables._new()
        if self.root == 0:
            raise ExhaustedError(f"no page for the root table of {fmt.name}")
        self.table_pages = 1
        self._flush_lines(self.root >> 3, PT_ENTRIES)

    def destroy(self) -> None:
        """Free every table, the root included; nothing may walk them any more. A second call does nothing."""
        gather = Gather()
        self.ledger._alone()
        if self.root == 0:
            return
        self._defer_tree(self.root, self.levels, gather)
        self.tables._free_list(gather.freelist)
        self.root = 0

    def iova_to_phys(self, iova: SupportsIndex) -> int:
        """The physical address that ``iova`` translates to, or 0."""
        place = within("iova", iova, 0, ALL_ONES)
        self.ledger._alone()
        return int(self._iova_to_phys(place))

    def leaves(self, iova: int = 0, size: int | None = None) -> list[Leaf]:
        """The leaves that hold a byte of [iova, iova + size), ascending (the whole aperture when ``size`` is None)."""
        last = int(self.aperture_last) if size is None else min(iova + size - 1, int(self.aperture_last))
        found: list[Leaf] = []
        self.ledger._alone()
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

    # tables ----------------------------------------------------------------------------------------------------------

    def _slot(self, iova: cython.ulonglong, level: cython.int) -> cython.ulonglong:
        """The slot of ``iova`` in its table of ``level``, 2 or more, making what tables are missing; or, below 512, a
        positive errno."""
        table: cython.ulonglong = self.root
        at_level: cython.int = self.levels
        if level == 2 and iova >> (PAGE_SHIFT + 2 * PT_INDEX_BITS) == self.upper_span:
            return self.upper_slot + ((iova >> (PAGE_SHIFT + PT_INDEX_BITS)) & (PT_ENTRIES - 1))
        while True:
            slot: cython.ulonglong = (table >> 3) + ((iova >> level_shift(at_level)) & (PT_ENTRIES - 1))
            if at_level == level:
                if level == 2:
                    self.upper_span = iova >> (PAGE_SHIFT + 2 * PT_INDEX_BITS)
                    self.upper_slot = table >> 3
                return slot
            entry: cython.ulonglong = self.memory.words[slot]
            if entry & self.fmt.present_bits == 0:
                table = self.tables._new()
                if table == 0:
                    return ENOMEM
                self._link(slot, table, at_level)
            elif self.fmt._is_leaf(entry, at_level):
                return EADDRINUSE
            else:
                table = entry & self.fmt.address_mask
            at_level -= 1

    def _link(self, slot: cython.ulonglong, table: cython.ulonglong, level: cython.int) -> cython.void:
        """Let a slot of a table of ``level`` point to a new table, which is complete."""
        entry: cython.ulonglong = table | self.fmt.table_bits
        if not self.coherent_walker:
            self._flush_lines(table >> 3, PT_ENTRIES)
            self._flush_lines(slot, 1)
            entry |= self.fmt.flushed_bit
        self.memory.words[slot] = entry
        self.table_pages += 1
        self.ledger.counts[L_PTE_SET_1 + level - 1] += 1

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
        self._forget_near()

    def _forget_near(self) -> cython.void:
        """Remember no table: one of them may be gone."""
        self.near_span = self.upper_span = ALL_ONES

    def _flush_lines(self, at: cython.ulonglong, count: cython.ulonglong) -> cython.void:
        """Count the cache lines of ``count`` slots as flushed, when the walker does not snoop the CPU."""
        if not self.coherent_walker:
            lines: cython.ulonglong = (at + count - 1) // _LINE_WORDS - at // _LINE_WORDS + 1
            self.ledger.counts[L_TABLE_FLUSH_BYTES] += lines * _LINE_WORDS * 8
