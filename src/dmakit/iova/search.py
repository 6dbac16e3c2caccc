"""Where in the tree a new IOVA range goes: the policies of an IOVA domain.

Contract of every policy. Given ``size`` (granules) and ``limit`` (the first pfn that may not be used), ``_place``
names a free range that starts at a multiple of ``size`` rounded up to a power of two, at or above ``start_pfn``, and
ends below ``limit``; it works from the top of the space down, and answers 0 only when it found none. Who calls
holds the tree's lock.

``LinuxSearch`` answers address for address like Linux 7.2. It walks the threads downward from a *cached node*, the
last one it inserted (one such node for ranges below 4 GiB, one for the rest), so it is "next fit downward" and
does not look at free space above that node until the walk below has failed; then a second pass walks from
``limit`` down to the cached node. A removal at or above a cached node moves that node up to the successor of the
removed one. ``max32_alloc_size`` is a negative cache: the smallest size known to fail below 4 GiB, forgotten with the
first removal there. Both passes together see every gap below ``limit``; the negative cache alone makes the search
fail although something would fit: what failed below a small limit is refused below 4 GiB too.

``AugmentedSearch`` takes the highest range that fits, in O(log n), from an augmented tree (``tree.IovaTree``). It fails
only when no gap fits.

Models ``__alloc_and_insert_iova_range``, ``__cached_rbnode_insert_update``, ``__cached_rbnode_delete_update``,
``iova_find_limit`` and ``reserve_iova`` in ``drivers/iommu/iova.c``.
"""

from __future__ import annotations

import cython

from dmakit.errors import ExhaustedError

if not cython.compiled:
    from dmakit.consts import IOVA_ANCHOR, IOVA_NIL
    from dmakit.iova.bits import ceil_log2, largest_fit, mix
    from dmakit.iova.tree import IovaTree


@cython.cclass
class IovaSearch:
    """What the policies share: the tree, the limits of the space, insertion, removal and reservation."""

    def __init__(self, start_pfn: int, dma_32bit_pfn: int, augmented: bool) -> None:
        self.tree = IovaTree(start_pfn, augmented=augmented)
        self.start_pfn = start_pfn
        self.dma_32bit_pfn = dma_32bit_pfn
        self.max32_alloc_size = dma_32bit_pfn
        self.above = IOVA_ANCHOR

    def _become(self, other: IovaSearch) -> None:
        """Hold what ``other`` holds (of the same policy); nothing is shared."""
        self.tree._become(other.tree)
        self.max32_alloc_size = other.max32_alloc_size
        self.above = other.above

    def fingerprint(self) -> int:
        """64 bits of everything that later searches depend on."""
        return mix(self.tree.fingerprint(), self.max32_alloc_size)

    def _adopt(self, lo: int, hi: int) -> list[int]:
        """Insert [lo, hi] as if it had been allocated; ranges in the way are removed and their first pfns returned."""
        dropped = []
        node: cython.int = self.tree._first_ending_at(lo)
        while node != IOVA_ANCHOR and self.tree.lo[node] <= hi:
            dropped.append(self.tree.lo[node])
            self._remove(node)
            node = self.tree._first_ending_at(lo)
        node = self.tree._insert_before(node, lo, hi)
        if node == IOVA_NIL:
            raise ExhaustedError("no memory for a node of the IOVA tree")
        self._inserted(node)
        return dropped

    def _place(self, size: cython.ulonglong, limit: cython.ulonglong) -> cython.ulonglong:
        """First pfn for ``size`` granules below ``limit``, and in ``above`` the node after it; 0 when none."""
        return 0

    def _inserted(self, node: cython.int) -> cython.void:
        """Called after ``node`` was allocated."""
        return

    def _removing(self, node: cython.int) -> cython.void:
        """Called before ``node`` is removed."""
        return

    def _alloc(self, size: cython.ulonglong, limit: cython.ulonglong) -> cython.ulonglong:
        """Allocate ``size`` granules below ``limit`` (exclusive): the first pfn, or 0."""
        one: cython.ulonglong = 1
        if size == 0 or size > one << 62:
            return 0
        pfn: cython.ulonglong = self._place(size, limit)
        if pfn == 0:
            return 0
        node: cython.int = self.tree._insert_before(self.above, pfn, pfn + size - 1)
        if node == IOVA_NIL:
            return 0
        self._inserted(node)
        return pfn

    def hints(self) -> tuple[int, int, int]:
        """Where a search starts: first pfns of the cached and the cached 32-bit node (0: none), max32_alloc_size."""
        return 0, 0, int(self.max32_alloc_size)

    def _set_hints(self, hints: tuple[int, int, int]) -> None:
        """Put the ``hints`` of an earlier moment back, for a replay that takes back what came after it."""
        self.max32_alloc_size = hints[2]

    def _remove(self, node: cython.int) -> cython.void:
        """Free the whole range of ``node``."""
        self._removing(node)
        self.tree._remove(node)

    def _cover(self, lo: cython.ulonglong, hi: cython.ulonglong) -> cython.ulonglong:
        """Extend the nodes that overlap [lo, hi] downward over it, whatever they are.

        Returns the first pfn that is still uncovered: the caller inserts [it, hi] before node ``above``. When
        nothing is left to insert the answer is above ``hi``.
        """
        low: cython.ulonglong = lo
        node: cython.int = self.tree._first_ending_at(low)
        while node != IOVA_ANCHOR and self.tree.lo[node] <= hi:
            if low < self.tree.lo[node]:
                self.tree._extend_down(node, low)
            low = self.tree.hi[node] + 1
            node = self.tree.next[node]
        self.above = node
        return low


@cython.cclass
class LinuxSearch(IovaSearch):
    """The kernel's search, address for address. ``cached_node`` and ``cached32_node`` are node indices."""

    def __init__(self, start_pfn: int, dma_32bit_pfn: int) -> None:
        IovaSearch.__init__(self, start_pfn, dma_32bit_pfn, False)
        self.cached_node = IOVA_ANCHOR
        self.cached32_node = IOVA_ANCHOR

    def hints(self) -> tuple[int, int, int]:
        """See ``IovaSearch.hints``."""
        lo = self.tree.lo
        return int(lo[self.cached_node]), int(lo[self.cached32_node]), int(self.max32_alloc_size)

    def _set_hints(self, hints: tuple[int, int, int]) -> None:
        """See ``IovaSearch.set_hints``; a node that is gone leaves the search to start from the top."""
        node: cython.int = self.tree._find(hints[0])
        self.cached_node = node if node > IOVA_ANCHOR else IOVA_ANCHOR
        node = self.tree._find(hints[1])
        self.cached32_node = node if node > IOVA_ANCHOR else IOVA_ANCHOR
        self.max32_alloc_size = hints[2]

    def _become(self, other: IovaSearch) -> None:
        """Hold what ``other``, also a LinuxSearch, holds."""
        IovaSearch._become(self, other)
        linux: LinuxSearch = other  # type: ignore[assignment]
        self.cached_node = linux.cached_node
        self.cached32_node = linux.cached32_node

    def fingerprint(self) -> int:
        """As of every search, and the places where the next walks begin."""
        value = mix(IovaSearch.fingerprint(self), self.tree.lo[self.cached_node])
        return mix(value, self.tree.lo[self.cached32_node])

    def _place(self, size: cython.ulonglong, limit: cython.ulonglong) -> cython.ulonglong:
        """Two passes: below the cached node, then from ``limit`` down to it."""
        if limit <= self.dma_32bit_pfn and size >= self.max32_alloc_size:
            return 0
        order: cython.int = ceil_log2(size)
        cached: cython.int = self.cached32_node if limit <= self.dma_32bit_pfn else self.cached_node
        retry_pfn: cython.ulonglong = self.tree.hi[cached]
        pfn: cython.ulonglong = self._walk(cached, limit, self.start_pfn, size, order)
        if pfn == 0 and retry_pfn < limit:
            pfn = self._walk(self._find_limit(limit), limit, retry_pfn + 1, size, order)
        if pfn == 0:
            self.max32_alloc_size = size
        return pfn

    def _walk(
        self,
        start: cython.int,
        limit: cython.ulonglong,
        low: cython.ulonglong,
        size: cython.ulonglong,
        order: cython.int,
    ) -> cython.ulonglong:
        """One pass down the threads from the gap below ``start``: the first pfn >= ``low`` that fits, or 0."""
        high: cython.ulonglong = limit
        pfn: cython.ulonglong
        node: cython.int = start
        below: cython.int
        while True:
            self.tree.visited += 1
            if self.tree.lo[node] < high:
                high = self.tree.lo[node]
            if high < size:
                return 0
            pfn = ((high - size) >> order) << order
            if pfn < low:
                return 0
            below = self.tree.prev[node]
            if below == IOVA_NIL or pfn > self.tree.hi[below]:
                self.above = node
                return pfn
            node = below

    def _find_limit(self, limit: cython.ulonglong) -> cython.int:
        """The node from which a walk sees all free space below ``limit``."""
        if limit > self.dma_32bit_pfn:
            return IOVA_ANCHOR
        return self.tree._first_starting_at(limit)

    def _inserted(self, node: cython.int) -> cython.void:
        """The next search begins here."""
        if self.tree.hi[node] < self.dma_32bit_pfn:
            self.cached32_node = node
        else:
            self.cached_node = node

    def _removing(self, node: cython.int) -> cython.void:
        """A cached node moves up to where space becomes free."""
        lo: cython.ulonglong = self.tree.lo[node]
        above: cython.int = self.tree.next[node]
        cached32: cython.int = self.cached32_node
        if node == cached32 or (self.tree.hi[node] < self.dma_32bit_pfn and lo >= self.tree.lo[cached32]):
            self.cached32_node = above
        if lo < self.dma_32bit_pfn:
            self.max32_alloc_size = self.dma_32bit_pfn
        if lo >= self.tree.lo[self.cached_node]:
            self.cached_node = above


@cython.cclass
class AugmentedSearch(IovaSearch):
    """The highest range that fits, found in O(log n) by gap size."""

    def __init__(self, start_pfn: int, dma_32bit_pfn: int) -> None:
        IovaSearch.__init__(self, start_pfn, dma_32bit_pfn, True)

    def _place(self, size: cython.ulonglong, limit: cython.ulonglong) -> cython.ulonglong:
        """The gap that ``limit`` cuts is looked at by itself; all gaps below it are whole."""
        order: cython.int = ceil_log2(size)
        end: cython.ulonglong = limit
        node: cython.int = self.tree._first_starting_at(limit)
        if largest_fit(self.tree._gap_start(node), limit) < size:
            node = self.tree._highest_fit_below(node, size)
            if node == IOVA_NIL:
                return 0
            end = self.tree.lo[node]
        self.above = node
        return ((end - size) >> order) << order
