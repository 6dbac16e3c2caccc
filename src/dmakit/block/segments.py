"""Segments of memory: the gap between neighbours, what may be merged, and the iterator over merged segments.

Vocabulary. A *bvec* is one piece of a request as it was added: a physical address and a length. A *segment* is
what the device sees: neighbouring bvecs that are physically contiguous are one segment, as long as it stays
below ``max_size`` and does not cross a ``boundary`` (a mask); a bvec that breaks these limits becomes several.

The *gap* between two neighbours is the OR of the misalignments where they meet: the offset in its page at which
the second starts, and at which the first ends. Zero bits below an IOMMU granule mean that the IOMMU can make
the two contiguous. Linux keeps only the lowest set bit of all gaps of a request, as its number from 1
(``ffs``; 0 = no gap at all): ``phys_gap_bit``. As a mask it stands for that bit and every higher one.

Models ``block/blk-merge.c`` (``bvec_seg_gap``, ``get_max_segment_size``), ``block/blk.h``
(``biovec_phys_mergeable``), ``include/linux/blk-mq.h`` (``req_phys_gap_mask``) and ``block/blk-mq-dma.c``
(``blk_map_iter_next``).
"""

from __future__ import annotations

from array import array

import cython

if not cython.compiled:
    from dmakit.consts import PAGE_MASK_LOW


def gap_between(phys: cython.ulonglong, length: cython.ulonglong, following: cython.ulonglong) -> cython.ulonglong:
    """Misalignment bits where the bvec (phys, length) meets a bvec that starts at ``following``."""
    return (following & PAGE_MASK_LOW) | ((phys & PAGE_MASK_LOW) + length)


def lowest_bit(bits: cython.ulonglong) -> cython.int:
    """Number of the lowest set bit, counted from 1; 0 when no bit is set (C's ``ffs``)."""
    number: cython.int = 1
    if bits == 0:
        return 0
    while bits & 1 == 0:
        bits >>= 1
        number += 1
    return number


def smaller_bit(first: cython.int, second: cython.int) -> cython.int:
    """The smaller of two bit numbers, where 0 means none (``min_not_zero``)."""
    if first == 0 or (second != 0 and second < first):
        return second
    return first


def segment_room(
    phys: cython.ulonglong, length: cython.ulonglong, max_size: cython.ulonglong, boundary: cython.ulonglong
) -> cython.ulonglong:
    """How many of ``length`` bytes from ``phys`` fit in one segment."""
    room: cython.ulonglong = boundary - (boundary & phys)
    if max_size - 1 < room:
        room = max_size - 1
    room += 1
    return length if length < room else room


def mergeable(
    phys: cython.ulonglong,
    length: cython.ulonglong,
    following: cython.ulonglong,
    more: cython.ulonglong,
    boundary: cython.ulonglong,
) -> cython.bint:
    """Whether ``more`` bytes at ``following`` continue (phys, length) without crossing the boundary."""
    if phys + length != following:
        return False
    return (phys | boundary) == ((following + more - 1) | boundary)


@cython.cclass
class SegmentIter:
    """Walks bvecs (two parallel arrays, ``count`` used) and yields merged segments in ``paddr`` and ``size``.

    ``visited`` counts the bvecs looked at, for the passes a mapping strategy makes.
    """

    def __init__(self) -> None:
        self.phys = memoryview(array("Q", (0,)))
        self.length = self.phys
        self.count = 0
        self.index = 0
        self.done = 0
        self.max_size = 1
        self.boundary = 0
        self.paddr = 0
        self.size = 0
        self.visited = 0

    def _begin(
        self,
        phys: memoryview[int],
        length: memoryview[int],
        count: cython.Py_ssize_t,
        max_size: cython.ulonglong,
        boundary: cython.ulonglong,
    ) -> cython.void:
        """Start over on these arrays."""
        self.phys = phys
        self.length = length
        self.count = count
        self.index = 0
        self.done = 0
        self.max_size = max_size
        self.boundary = boundary

    def _aim(self, first: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.void:
        """Start over with the bvecs ``first`` to ``end`` − 1 of the same arrays."""
        self.index = first
        self.count = end
        self.done = 0

    def _next(self) -> cython.bint:
        """Step to the next segment; False at the end."""
        paddr: cython.ulonglong
        size: cython.ulonglong
        more: cython.ulonglong
        at: cython.Py_ssize_t = self.index
        if at >= self.count:
            return False
        paddr = self.phys[at] + self.done
        size = segment_room(paddr, self.length[at] - self.done, self.max_size, self.boundary)
        self.done += size
        self.visited += 1
        if self.done == self.length[at]:
            at += 1
            self.done = 0
            while at < self.count:
                more = self.length[at]
                if size + more > self.max_size or not mergeable(paddr, size, self.phys[at], more, self.boundary):
                    break
                size += more
                at += 1
                self.visited += 1
            self.index = at
        self.paddr = paddr
        self.size = size
        return True
