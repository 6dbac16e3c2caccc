"""Reading and clearing the bits that hardware sets in leaves: dirty (D) and accessed (A).

One scan walks the leaves of a range. A leaf whose bit is set is recorded in the caller's bitmap, every page of it that
lies in the range, because a bit says no more than "somewhere in this leaf"; a 2 MiB leaf dirties 512 pages of 4 KiB.
Bits are OR-ed in, never cleared: several sources may share one bitmap. Bit ``i`` stands for the page
[origin + i * page_size, …), little-endian in words of 64 bits; a bitmap page that is larger than a leaf is dirty when
any leaf in it is. Unless told otherwise (``DIRTY_NO_CLEAR``) the leaf's bit is cleared and the leaf joins the gather: a
cached translation does not set the bit again, so without the flush that follows, later writes would go unseen.

Models ``read_and_clear_dirty`` of ``drivers/iommu/generic_pt/iommu_pt.h`` and ``iommu_dirty_bitmap``.
"""

from __future__ import annotations

from operator import index
from typing import SupportsIndex

import cython

from dmakit.errors import MisuseError, UnsupportedError
from dmakit.iova.arguments import words
from dmakit.iova.arrays import zeroed

if not cython.compiled:
    from dmakit.consts import DIRTY_NO_CLEAR, L_PTE_SET_1, PAGE_SIZE, PT_ENTRIES
    from dmakit.iommu.bitmap import set_range
    from dmakit.iommu.gather import Gather
    from dmakit.iommu.pagetable import PageTable
    from dmakit.iommu.tree import level_shift


def _checked_scan(
    iova: SupportsIndex, size: SupportsIndex, bitmap: object, page_size: SupportsIndex, flags: SupportsIndex, top: int
) -> tuple[int, int, memoryview[int] | None, int, int]:
    """The arguments of a scan as exact integers and 64-bit words; MisuseError names the broken rule.

    [iova, iova + size) must end at or below ``top`` (inclusive) and be whole pages of ``page_size`` (a power of two
    from 4096), with a bit for each of them in ``bitmap`` (uint64 array; None stays None); the only flag is
    ``DIRTY_NO_CLEAR``.
    """
    start, length, page, bits = index(iova), index(size), index(page_size), index(flags)
    if page < PAGE_SIZE or page & (page - 1):
        raise MisuseError(f"page_size={page}: must be a power of two from {PAGE_SIZE}")
    if start < 0 or length <= 0 or start % page or length % page:
        raise MisuseError(f"iova={start:#x}, size={length:#x}: must be multiples of page_size={page:#x}, size above 0")
    if start + length - 1 > top:
        raise MisuseError(f"[{start:#x}, {start + length:#x}): ends above the aperture {top:#x}", 34)
    marks = None if bitmap is None else words("bitmap", bitmap, writable=True)
    if marks is not None and len(marks) * 64 < length // page:
        raise MisuseError(f"bitmap of {len(marks) * 64} bits: {length // page} pages need as many bits")
    if bits & ~DIRTY_NO_CLEAR:
        raise MisuseError(f"flags={bits:#x}: the only flag is {DIRTY_NO_CLEAR:#x} (no clear)")
    return start, length, marks, page, bits


@cython.cclass
class LeafBitScan:
    """One scan of [iova, iova + size); ``found`` counts the leaves whose bit was set.

    ``bitmap``: uint64 array of at least ``size / page_size`` bits, None to record nothing. ``page_size``: a power of
    two from 4096 that divides iova and size. ``accessed`` scans A instead of D. MisuseError names the broken rule.
    """

    def __init__(
        self,
        table: PageTable,
        iova: SupportsIndex,
        size: SupportsIndex,
        bitmap: object | None,
        gather: Gather,
        *,
        page_size: SupportsIndex = PAGE_SIZE,
        flags: SupportsIndex = 0,
        accessed: bool = False,
    ) -> None:
        bit = table.fmt.accessed_bit if accessed else table.fmt.dirty_bit
        if bit == 0:
            raise UnsupportedError(f"{table.fmt.name} leaves have no {'accessed' if accessed else 'dirty'} bit")
        start, length, marks, page, bits = _checked_scan(iova, size, bitmap, page_size, flags, int(table.aperture_last))
        self.table = table
        self.gather = gather
        self.bitmap = zeroed("Q", 0) if marks is None else marks
        self.record = marks is not None
        self.bit = bit
        self.origin = start
        self.last = start + length - 1
        self.page_shift = page.bit_length() - 1
        self.clear = not bits & DIRTY_NO_CLEAR
        self.found = 0

    def run(self) -> int:
        """Scan; the number of leaves whose bit was set. Compiled, it runs without the GIL."""
        with self.table.ledger.turn, cython.nogil:
            self._run()
        return int(self.found)

    def _run(self) -> cython.longlong:
        """``run`` without the interpreter."""
        if self.table.root != 0:
            self._scan(self.table.root, self.table.levels, self.origin, self.last)
        return self.found

    def _scan(
        self, node: cython.ulonglong, level: cython.int, iova: cython.ulonglong, last: cython.ulonglong
    ) -> cython.void:
        """Scan [iova, last] inside one table."""
        span: cython.ulonglong = 1
        span <<= level_shift(level)
        while iova <= last:
            at: cython.ulonglong = (node >> 3) + ((iova >> level_shift(level)) & (PT_ENTRIES - 1))
            entry: cython.ulonglong = self.table.memory.words[at]
            end: cython.ulonglong = min(last, iova | (span - 1))
            if entry & self.table.fmt.present_bits == 0:
                pass
            elif not self.table.fmt._is_leaf(entry, level):
                self._scan(entry & self.table.fmt.address_mask, level - 1, iova, end)
            elif entry & self.bit != 0:
                self.found += 1
                if self.record:
                    self._record(iova, end)
                if self.clear:
                    self.table.memory.words[at] = entry ^ self.bit
                    self.table._flush_lines(at, 1)
                    self.table.ledger.counts[L_PTE_SET_1 + level - 1] += 1
                    self.gather._add_range(iova & ~(span - 1), span)
            iova = end + 1

    def _record(self, first: cython.ulonglong, last: cython.ulonglong) -> cython.void:
        """Set the bits of the pages that hold [first, last]."""
        set_range(self.bitmap, (first - self.origin) >> self.page_shift, (last - self.origin) >> self.page_shift)
