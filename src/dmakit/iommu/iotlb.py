"""The IOTLB: what the IOMMU remembers of whole translations, until it is told to forget.

An entry holds a *translation word* (``consts.TR_*``): output address, permissions gathered on the walk, the level of
the leaf, and whether the table's dirty bit is known to be set. Pages of 4 KiB, 2 MiB and 1 GiB share one array
(``caches.SetCache``), tagged with the domain id; a look-up asks for the smallest page first.

An entry outlives the table entry that it was made from. A device that uses an unmapped IOVA still reaches the old
page until an invalidation covers it: this is what lazy mode risks, and what ``tests/iommu_unit`` measures.

*Not-present entries* exist only in caching mode (a virtual IOMMU): the word has TR_ABSENT and no permission.
"""

from __future__ import annotations

import cython

if not cython.compiled:
    from dmakit.iommu.caches import SetCache


@cython.final
@cython.cclass
class Iotlb(SetCache):
    """Translations of any page size. ``hit``: the way that answered the last successful look-up."""

    def __init__(self, entries: int = 512, ways: int = 8, policy: str = "lru") -> None:
        SetCache.__init__(self, entries, ways, policy)
        self.hit = -1

    def _lookup(self, did: cython.int, iova: cython.ulonglong) -> cython.ulonglong:
        """The translation word that covers ``iova``, or 0."""
        level: cython.int
        way: cython.Py_ssize_t
        for level in range(1, 4):
            if self.live[level] != 0:
                way = self._find(did, level, iova >> (3 + 9 * level))
                if way >= 0:
                    self.hit = way
                    return self.values[way]
        return 0
