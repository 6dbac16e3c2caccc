"""A device's own TLB (PCIe ATS): translations that the device asked for and keeps.

The device sends a translation request, gets an address and permissions, and afterwards marks its accesses
*translated*: the IOMMU passes them without looking. So an unmap must also invalidate here, and Linux words one
device-TLB request for every such device of the domain, after the IOTLB request and under the same wait. A forgotten
one leaves the device on the old page although the IOTLB is clean.

A translation request that may not be answered is no fault record (VT-d specification, 4.1.3): the answer carries no
permission, and the device does not send its access.
"""

from __future__ import annotations

import cython

from dmakit.errors import MisuseError

if not cython.compiled:
    from dmakit.consts import TR_DIRTY, TR_LEVEL_MASK, TR_LEVEL_SHIFT, TR_READ, TR_WRITE
    from dmakit.iommu.iotlb import Iotlb


@cython.final
@cython.cclass
class DeviceTlb:
    """The TLB of requester ``source`` (bus << 8 | devfn); up to ``queue_depth`` (1 to 32) outstanding invalidations."""

    def __init__(
        self, source: int, *, entries: int = 64, ways: int = 4, policy: str = "lru", queue_depth: int = 32
    ) -> None:
        if not 0 <= source <= 0xFFFF:
            raise MisuseError(f"source={source:#x}: a requester id has 16 bits")
        if not 1 <= queue_depth <= 32:
            raise MisuseError(f"queue_depth={queue_depth}: must be 1 to 32")
        self.source = source
        self.queue_depth = queue_depth
        self.did = 0
        self.invalidations = 0
        self.cache = Iotlb(entries, ways, policy)

    def _lookup(self, iova: cython.ulonglong, write: cython.bint) -> cython.ulonglong:
        """The translation word for an access, or 0: then the device must ask the IOMMU."""
        word: cython.ulonglong = self.cache._lookup(0, iova)
        need: cython.ulonglong = TR_WRITE | TR_DIRTY if write else TR_READ
        if word & need == need:
            return word
        if word != 0:
            self.cache._drop(self.cache.hit)
        return 0

    def _fill(self, iova: cython.ulonglong, word: cython.ulonglong) -> cython.void:
        """Keep the answer to a translation request."""
        level: cython.int = (word & TR_LEVEL_MASK) >> TR_LEVEL_SHIFT
        self.cache._insert(0, level, iova >> (3 + 9 * level), word)

    def _invalidate(self, iova: cython.ulonglong, mask: cython.int) -> cython.void:
        """Execute one invalidation of 2^mask pages (consts.WHOLE_MASK: everything)."""
        self.invalidations += 1
        self.cache._drop_range(0, iova, mask)
