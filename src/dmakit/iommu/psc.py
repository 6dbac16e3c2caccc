"""The paging-structure cache: table entries above the leaves, so that a walk need not start at the root.

An entry of level L (2 to 5) remembers where the table of level L − 1 lies for the span of one level-L entry, and the
permissions gathered down to there. A walk starts at the deepest entry that covers its address.

It makes two mistakes of system software visible. A table page that is freed and used again before the invalidation is
still walked: whatever bytes it now holds are taken for table entries. And a request with the *invalidation hint* (IH
= 1: "no table was freed") keeps these entries, so a hint given wrongly leaves them stale.

Vocabulary: VT-d specification, 6.2.4 (PASID-structure and paging-structure caches), 6.5.2.3 (IH).
"""

from __future__ import annotations

import cython

if not cython.compiled:
    from dmakit.consts import TR_LEVEL_SHIFT
    from dmakit.iommu.caches import SetCache


@cython.final
@cython.cclass
class PagingStructureCache(SetCache):
    """Word: address of the next table | its level << TR_LEVEL_SHIFT | permissions so far (TR_READ, TR_WRITE)."""

    def __init__(self, entries: int = 64, ways: int = 4, policy: str = "lru") -> None:
        SetCache.__init__(self, entries, ways, policy)

    def _deepest(self, did: cython.int, iova: cython.ulonglong, levels: cython.int) -> cython.ulonglong:
        """The word of the entry nearest the leaf that covers ``iova`` in a table of ``levels`` levels, or 0."""
        level: cython.int
        way: cython.Py_ssize_t
        for level in range(2, levels + 1):
            if self.live[level] != 0:
                way = self._find(did, level, iova >> (3 + 9 * level))
                if way >= 0:
                    return self.values[way]
        return 0

    def _remember(
        self,
        did: cython.int,
        level: cython.int,
        iova: cython.ulonglong,
        table: cython.ulonglong,
        permissions: cython.ulonglong,
    ) -> cython.void:
        """Keep what the level-``level`` entry of ``iova`` said: the table below it and the permissions so far."""
        below: cython.ulonglong = level - 1
        self._insert(did, level, iova >> (3 + 9 * level), table | (below << TR_LEVEL_SHIFT) | permissions)
