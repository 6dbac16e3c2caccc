"""Obvious models of the allocator, written from its rules alone: lists in place of trees, objects in place of indices.

``LinuxModel`` predicts every address of Linux 7.2, ``HighestFitModel`` every address of policy ``augmented``.
"""

from __future__ import annotations

from bisect import bisect_left

ALL_ONES = (1 << 64) - 1
MAGAZINE = 127
ORDERS = 6


class Node:
    """One allocated range, both ends inclusive."""

    def __init__(self, lo: int, hi: int) -> None:
        self.lo, self.hi = lo, hi


class LinuxModel:
    """Same calls as ``IovaDomain``; pfn 0 = failed. ``paths`` counts how each allocation was served."""

    def __init__(self, start: int, cpus: int, first_above_32bit: int = 1 << 20) -> None:
        self.start, self.cpus, self.edge = start, cpus, first_above_32bit
        self.anchor = Node(ALL_ONES, ALL_ONES)
        self.nodes = [self.anchor]
        self.cached = self.cached32 = self.anchor
        self.max32 = first_above_32bit
        self.loaded = [[[] for _ in range(ORDERS)] for _ in range(cpus)]
        self.prev = [[[] for _ in range(ORDERS)] for _ in range(cpus)]
        self.depot: list[list[list[int]]] = [[] for _ in range(ORDERS)]
        self.online = set(range(cpus))
        self.paths = {"magazine": 0, "depot": 0, "tree": 0, "failed": 0}

    # The tree ------------------------------------------------------------------------------------------------

    def position(self, node: Node) -> int:
        return bisect_left(self.nodes, node.lo, key=lambda other: other.lo)

    def lowest_free(self, at: int) -> int:
        """First pfn above the node that precedes position ``at``."""
        return self.nodes[at - 1].hi + 1 if at else 0

    def holder(self, pfn: int) -> Node | None:
        at = bisect_left(self.nodes, pfn, key=lambda node: node.hi)
        return self.nodes[at] if self.nodes[at].lo <= pfn else None

    def insert(self, pfn: int, size: int) -> Node:
        node = Node(pfn, pfn + size - 1)
        self.nodes.insert(self.position(node), node)
        return node

    def scan(self, at: int, limit: int, low: int, size: int) -> int:
        align = 1 << (size - 1).bit_length()
        for i in range(at, -1, -1):
            room = min(limit, self.nodes[i].lo)
            pfn = (room - size) // align * align
            if pfn < low:
                return 0
            if pfn >= self.lowest_free(i):
                return pfn
        return 0

    def search(self, size: int, limit: int) -> int:
        """``limit`` is exclusive here."""
        low_space = limit <= self.edge
        if low_space and size >= self.max32:
            return 0
        cached = self.cached32 if low_space else self.cached
        pfn = self.scan(self.position(cached), limit, self.start, size)
        if not pfn and cached.hi < limit:
            top = len(self.nodes) - 1
            if low_space:
                top = min(bisect_left(self.nodes, limit, key=lambda node: node.lo), top)
            pfn = self.scan(top, limit, cached.hi + 1, size)
        if not pfn:
            self.max32 = size
            return 0
        node = self.insert(pfn, size)
        if node.hi < self.edge:
            self.cached32 = node
        else:
            self.cached = node
        return pfn

    def remove(self, node: Node) -> None:
        at = self.nodes.index(node)
        above = self.nodes[at + 1]
        if node is self.cached32 or (node.hi < self.edge and node.lo >= self.cached32.lo):
            self.cached32 = above
        if node.lo < self.edge:
            self.max32 = self.edge
        if node.lo >= self.cached.lo:
            self.cached = above
        del self.nodes[at]

    def free(self, pfn: int) -> None:
        node = self.holder(pfn)
        if node is not None:
            self.remove(node)

    def reserve(self, lo: int, hi: int) -> None:
        for node in list(self.nodes):
            if node.lo <= hi and node.hi >= lo:
                node.lo = min(node.lo, lo)
                if node.hi >= hi:
                    return
                lo = node.hi + 1
        self.insert(lo, hi - lo + 1)

    # The caches ----------------------------------------------------------------------------------------------

    def get(self, cpu: int, order: int, highest: int) -> int:
        path = "magazine"
        if not self.loaded[cpu][order]:
            if self.prev[cpu][order]:
                mine, other = self.loaded[cpu], self.prev[cpu]
                mine[order], other[order] = other[order], mine[order]
            elif self.depot[order]:
                self.loaded[cpu][order] = self.depot[order].pop()
                path = "depot"
            else:
                return 0
        magazine = self.loaded[cpu][order]
        for at in range(len(magazine) - 1, -1, -1):
            if magazine[at] <= highest:
                pfn, magazine[at] = magazine[at], magazine[-1]
                magazine.pop()
                self.paths[path] += 1
                return pfn
        return 0

    def alloc_fast(self, cpu: int, size: int, limit: int, flush: bool) -> int:
        if size < 32:
            size = 1 << (size - 1).bit_length()
        if size <= 32:
            pfn = self.get(cpu, size.bit_length() - 1, limit + 1 - size)
            if pfn:
                return pfn
        pfn = self.search(size, limit + 1)
        if not pfn and flush:
            self.flush()
            pfn = self.search(size, limit + 1)
        self.paths["tree" if pfn else "failed"] += 1
        return pfn

    def free_fast(self, cpu: int, pfn: int, size: int) -> None:
        order = (size - 1).bit_length()
        if order >= ORDERS:
            self.free(pfn)
            return
        loaded, prev = self.loaded[cpu], self.prev[cpu]
        if len(loaded[order]) == MAGAZINE:
            if len(prev[order]) == MAGAZINE:
                self.depot[order].append(loaded[order])
                loaded[order] = []
            else:
                loaded[order], prev[order] = prev[order], loaded[order]
        loaded[order].append(pfn)

    def drain(self, magazine: list[int]) -> None:
        for pfn in magazine:
            self.free(pfn)
        magazine.clear()

    def drain_cpu(self, cpu: int) -> None:
        for order in range(ORDERS):
            self.drain(self.loaded[cpu][order])
            self.drain(self.prev[cpu][order])

    def flush(self) -> None:
        for cpu in sorted(self.online):
            self.drain_cpu(cpu)
        for depot in self.depot:
            while depot:
                self.drain(depot.pop())

    def depot_work(self, order: int) -> bool:
        if len(self.depot[order]) <= len(self.online):
            return False
        self.drain(self.depot[order].pop())
        return True

    def ranges(self) -> list[tuple[int, int]]:
        return [(node.lo, node.hi) for node in self.nodes[:-1]]


class HighestFitModel(LinuxModel):
    """Policy ``augmented``: of all places that fit, the highest; no cached node, no negative cache."""

    def search(self, size: int, limit: int) -> int:
        align = 1 << (size - 1).bit_length()
        for at in range(len(self.nodes) - 1, -1, -1):
            pfn = (min(limit, self.nodes[at].lo) - size) // align * align
            if pfn >= max(self.lowest_free(at), self.start):
                self.insert(pfn, size)
                return pfn
        return 0

    def remove(self, node: Node) -> None:
        self.nodes.remove(node)
