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

if cython.compiled:
    from cython.cimports.dmakit.consts import DIRTY_NO_CLEAR, L_PTE_SET_1, PAGE_SIZE, PT_ENTRIES
    from cython.cimports.dmakit.iommu.bitmap import set_range
    from cython.cimports.dmakit.iommu.gather import Gather
    from cython.cimports.dmakit.iommu.pagetable import PageTable, level_shift
else:
    from dmakit.consts import DIRTY_NO_CLEAR, L_PTE_SET_1, PAGE_SIZE, PT_ENTRIES
    from dmakit.iommu.bitmap import set_range
    from dmakit.iommu.gather import Gather
    from dmakit.iommu.pagetable import PageTable, level_shift


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
        iova, size, page_size, flags = index(iova), index(size), index(page_size), index(flags)
        if page_size < PAGE_SIZE or page_size & (page_size - 1):
            raise MisuseError(f"page_size={page_size}: must be a power of two from {PAGE_SIZE}")
        if iova < 0 or size <= 0 or iova % page_size or size % page_size:
            raise MisuseError(
                f"iova={iova:#x}, size={size:#x}: must be multiples of page_size={page_size:#x}, size above 0"
            )
        if iova + size - 1 > table.aperture_last:
            raise MisuseError(f"[{iova:#x}, {iova + size:#x}): ends above the aperture {table.aperture_last:#x}", 34)
        marks = zeroed("Q", 0) if bitmap is None else words("bitmap", bitmap, writable=True)
        if bitmap is not None and len(marks) * 64 < size // page_size:
            raise MisuseError(f"bitmap of {len(marks) * 64} bits: {size // page_size} pages need as many bits")
        if flags & ~DIRTY_NO_CLEAR:
            raise MisuseError(f"flags={flags:#x}: the only flag is {DIRTY_NO_CLEAR:#x} (no clear)")
        self.table = table
        self.gather = gather
        self.bitmap = marks
        self.record = bitmap is not None
        self.bit = bit
        self.origin = iova
        self.last = iova + size - 1
        self.page_shift = page_size.bit_length() - 1
        self.clear = not flags & DIRTY_NO_CLEAR
        self.found = 0

    def run(self) -> int:
        """Scan; the number of leaves whose bit was set."""
        return int(self._run())

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
