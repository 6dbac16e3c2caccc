"""The gather: what one unmap (or map) leaves behind for the invalidation that must follow it.

Models ``struct iommu_iotlb_gather``.

Vocabulary: ``start`` and ``end`` are the lowest and the highest *byte* touched (``end`` is inclusive); an empty
gather has ``start`` all ones and ``end`` 0. ``freelist`` is the first of the table pages that were unlinked
and may be freed only after the invalidation: a chain through ``PhysicalMemory.page_link``, 0 when empty.
``queued`` says that a flush queue will invalidate the whole domain later: then no range is collected, but the
freelist still is.

Invariant: nobody frees a page of ``freelist`` before the invalidation that covers the gather has completed.
Hardware may walk such a page until then, so its bytes stay as they were.
"""

from __future__ import annotations

import cython

ALL_ONES = (1 << 64) - 1


@cython.cclass
class Gather:
    """One pending invalidation. ``pgsize`` is kept 0 by range formats; ``mapped`` is what a map reached (bytes)."""

    def __init__(self, queued: bool = False) -> None:
        self.pgsize = 0
        self._init()
        self.queued = queued

    def add_range(self, iova: int, size: int) -> None:
        """Widen the range to hold [iova, iova + size), for callers that are not compiled."""
        self._add_range(iova, size)

    @property
    def is_empty(self) -> bool:
        """Whether there is no range to invalidate."""
        return bool(self._is_empty())

    def _init(self) -> cython.void:
        """Empty it for the next operation (``queued`` goes back to False; the freelist must have been taken)."""
        self.start = ALL_ONES
        self.end = 0
        self.freelist = 0
        self.mapped = 0
        self.queued = False

    def _add_range(self, iova: cython.ulonglong, size: cython.ulonglong) -> cython.void:
        """Widen the range to hold [iova, iova + size); nothing when queued or when ``size`` is 0."""
        if self.queued or size == 0:
            return
        last: cython.ulonglong = iova + (size - 1)
        if iova < self.start:
            self.start = iova
        if last > self.end:
            self.end = last

    def _is_empty(self) -> cython.bint:
        """Whether there is no range to invalidate."""
        return self.start >= self.end
