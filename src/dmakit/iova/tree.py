"""The allocated ranges of an IOVA domain: a balanced tree in flat arrays.

A *node* is an index into the arrays; it stands for the allocated range [lo, hi] (pfns, both inclusive). Node 0
(``IOVA_NIL``) is no node; node 1 (``IOVA_ANCHOR``) is the kernel's anchor, lo = hi = all ones, the last node in
order for ever, so every other node has a successor. ``prev`` and ``next`` thread the nodes in order of address:
the allocator walks the threads, and the tree only answers "which node holds this pfn" and "which is the first
node from here". Nodes that were given back are chained through ``next``; from ``fresh`` on none was ever used.

*Storage*: each field is a column, so that the linux policy's walk along ``prev`` past lo and hi of a hundred thousand
nodes touches 20 bytes a node (records of one cache line make that walk 3 to 13 times slower). A node takes 40 bytes,
56 in an augmented tree. The columns double, from a million nodes on they grow by half, one after the other: what is
held twice meanwhile are two columns.

The shape is that of an AVL tree, not the kernel's red-black tree: no answer depends on the shape, and with
threads an insertion needs no descent (the new node hangs below its successor or its predecessor), so one routine,
``_retrace``, restores every invariant after both insertion and removal.

*Gap*: the free pfns right below a node, from ``start`` or from the end of its predecessor. An augmented tree keeps
in ``fit`` the largest naturally aligned size that fits into each node's gap (``bits.largest_fit``) and in ``best``
its maximum over the subtree.

Invariants: ranges are disjoint and ascend along ``next``; heights of siblings differ by at most 1; the words of
node 0 are all zero; ``count`` is the number of nodes without the anchor.

Models the rbtree of ``struct iova_domain`` (``include/linux/iova.h``, ``drivers/iommu/iova.c``).
"""

from __future__ import annotations

import cython

from dmakit.errors import MisuseError
from dmakit.iova.arguments import within
from dmakit.iova.arrays import widened, zeroed

if not cython.compiled:
    from dmakit.consts import IOVA_ANCHOR, IOVA_NIL
    from dmakit.iova.bits import largest_fit, mix

_ALL_ONES = (1 << 64) - 1
_LARGE = 1 << 20
_MOST = 1 << 22  # nodes that there is room for at first


@cython.cclass
class IovaTree:
    """Allocated pfn ranges above ``start``, at first only the anchor. ``augmented``: also keep gap sizes."""

    def __init__(self, start: int = 1, *, augmented: bool = False, capacity: int = 64) -> None:
        if not 0 < start < 1 << 62:
            raise MisuseError(f"start={start}: must be from 1 to 2**62 - 1 (pfn 0 is never given out)")
        self.augmented = augmented
        self.start = start
        self.lo = self.hi = self.fit = self.best = zeroed("Q", 1)
        self.left = self.right = self.parent = self.height = self.prev = self.next = zeroed("i", 1)
        self._hold(max(within("capacity", capacity, 0, _MOST), 4), self)
        self.unused = IOVA_NIL
        self.fresh = IOVA_ANCHOR + 1
        self.lo[IOVA_ANCHOR] = self.hi[IOVA_ANCHOR] = _ALL_ONES
        self.root = IOVA_ANCHOR
        self.count = 0
        self.visited = 0
        self._refit(IOVA_ANCHOR)
        self._pull(IOVA_ANCHOR)

    def nodes(self) -> list[tuple[int, int]]:
        """All ranges (lo, hi) in ascending order, the anchor left out."""
        found, node = [], self.prev[IOVA_ANCHOR]
        while node != IOVA_NIL:
            found.append((self.lo[node], self.hi[node]))
            node = self.prev[node]
        return found[::-1]

    def find(self, pfn: int) -> tuple[int, int] | None:
        """The range that holds ``pfn``, or None."""
        node = self._find(pfn) if 0 <= pfn < _ALL_ONES else IOVA_NIL
        return (self.lo[node], self.hi[node]) if node != IOVA_NIL else None

    def _become(self, other: IovaTree) -> None:
        """Hold what ``other`` holds, node for node; nothing is shared."""
        self._hold(other.capacity, other)
        self.fresh = other.fresh
        self.root, self.unused, self.count, self.visited = other.root, other.unused, other.count, other.visited

    def fingerprint(self) -> int:
        """64 bits of the ranges, in order: equal for equal ranges, whatever the nodes' indices."""
        value: cython.ulonglong = 0
        node: cython.int = self.prev[IOVA_ANCHOR]
        while node != IOVA_NIL:
            value = mix(mix(value, self.lo[node]), self.hi[node])
            node = self.prev[node]
        return value

    # Storage -------------------------------------------------------------------------------------------------

    def _hold(self, items: int, other: IovaTree) -> None:
        """Room for ``items`` nodes, of which the first are those of ``other``."""
        gaps = items if self.augmented else 1
        self.lo, self.hi = widened("Q", other.lo, items), widened("Q", other.hi, items)
        self.fit, self.best = widened("Q", other.fit, gaps), widened("Q", other.best, gaps)
        self.left, self.right = widened("i", other.left, items), widened("i", other.right, items)
        self.parent, self.height = widened("i", other.parent, items), widened("i", other.height, items)
        self.prev, self.next = widened("i", other.prev, items), widened("i", other.next, items)
        self.capacity = items

    def _grow(self) -> cython.bint:
        """Make the columns longer; false when the host has no memory for that (some are longer then, which is fine)."""
        try:
            self._hold(self.capacity * 2 if self.capacity < _LARGE else self.capacity + self.capacity // 2, self)
        except MemoryError:
            return False
        return True

    def _take(self) -> cython.int:
        """An unused node without links, or NIL."""
        node: cython.int = self.unused
        if node != IOVA_NIL:
            self.unused = self.next[node]
        else:
            if self.fresh == self.capacity and not self._grow():
                return IOVA_NIL
            node = self.fresh
            self.fresh += 1
        self.left[node] = self.right[node] = self.parent[node] = self.height[node] = IOVA_NIL
        self.count += 1
        return node

    # Change ----------------------------------------------------------------------------------------------------

    def _insert_before(self, above: cython.int, lo: cython.ulonglong, hi: cython.ulonglong) -> cython.int:
        """Insert [lo, hi], which lies in the gap below node ``above``; the new node, or NIL without memory."""
        node: cython.int = self._take()
        if node == IOVA_NIL:
            return IOVA_NIL
        below: cython.int = self.prev[above]
        self.lo[node] = lo
        self.hi[node] = hi
        self.next[node] = above
        self.prev[node] = below
        self.prev[above] = node
        if below != IOVA_NIL:
            self.next[below] = node
        if self.left[above] == IOVA_NIL:
            self.left[above] = node
            self.parent[node] = above
        else:
            self.right[below] = node
            self.parent[node] = below
        self._refit(node)
        self._refit(above)
        self._pull(node)
        self._retrace(self.parent[node])
        return node

    def _remove(self, node: cython.int) -> cython.void:
        """Take ``node`` (not the anchor) out of the tree and give its storage back."""
        above: cython.int = self.next[node]
        below: cython.int = self.prev[node]
        self.prev[above] = below
        if below != IOVA_NIL:
            self.next[below] = above
        self._refit(above)
        self._unlink(node)
        self.next[node] = self.unused
        self.unused = node
        self.count -= 1

    def _extend_down(self, node: cython.int, lo: cython.ulonglong) -> cython.void:
        """Let the range of ``node`` begin at ``lo``, inside the gap below it."""
        self.lo[node] = lo
        if self.augmented:
            self._refit(node)
            self._retrace(node)

    # Look up -----------------------------------------------------------------------------------------------------

    def _find(self, pfn: cython.ulonglong) -> cython.int:
        """The node whose range holds ``pfn``, or NIL."""
        node: cython.int = self.root
        while node != IOVA_NIL:
            if pfn < self.lo[node]:
                node = self.left[node]
            elif pfn > self.hi[node]:
                node = self.right[node]
            else:
                return node
        return IOVA_NIL

    def _first_ending_at(self, pfn: cython.ulonglong) -> cython.int:
        """The lowest node with hi >= ``pfn``; the anchor at the latest."""
        found: cython.int = IOVA_ANCHOR
        node: cython.int = self.root
        while node != IOVA_NIL:
            if self.hi[node] >= pfn:
                found = node
                node = self.left[node]
            else:
                node = self.right[node]
        return found

    def _first_starting_at(self, pfn: cython.ulonglong) -> cython.int:
        """The lowest node with lo >= ``pfn``; the anchor at the latest."""
        found: cython.int = IOVA_ANCHOR
        node: cython.int = self.root
        while node != IOVA_NIL:
            self.visited += 1
            if self.lo[node] >= pfn:
                found = node
                node = self.left[node]
            else:
                node = self.right[node]
        return found

    def _gap_start(self, node: cython.int) -> cython.ulonglong:
        """First pfn of the gap below ``node``."""
        below: cython.int = self.prev[node]
        if below == IOVA_NIL or self.hi[below] < self.start:
            return self.start
        return self.hi[below] + 1

    def _highest_fit_below(self, node: cython.int, size: cython.ulonglong) -> cython.int:
        """The last node before ``node`` in order whose gap takes ``size`` granules, or NIL (augmented trees)."""
        at: cython.int = node
        up: cython.int
        if self.best[self.left[at]] >= size:
            return self._descend(self.left[at], size)
        while self.parent[at] != IOVA_NIL:
            up = self.parent[at]
            self.visited += 1
            if self.right[up] == at:
                if self.fit[up] >= size:
                    return up
                if self.best[self.left[up]] >= size:
                    return self._descend(self.left[up], size)
            at = up
        return IOVA_NIL

    def _descend(self, node: cython.int, size: cython.ulonglong) -> cython.int:
        """The last node of the subtree ``node`` whose gap takes ``size``; its ``best`` says that there is one."""
        at: cython.int = node
        while True:
            self.visited += 1
            if self.best[self.right[at]] >= size:
                at = self.right[at]
            elif self.fit[at] >= size:
                return at
            else:
                at = self.left[at]

    # Shape -----------------------------------------------------------------------------------------------------------

    def _unlink(self, node: cython.int) -> cython.void:
        """Take ``node`` out of the shape (threads are done) and restore balance and gap sizes."""
        start: cython.int
        heir: cython.int
        if self.left[node] != IOVA_NIL and self.right[node] != IOVA_NIL:
            heir = self.next[node]  # the leftmost node of the right subtree: it has no left child
            start = heir
            if self.parent[heir] != node:
                start = self.parent[heir]
                self._replace(heir, self.right[heir])
                self.right[heir] = self.right[node]
                self.parent[self.right[heir]] = heir
            self.left[heir] = self.left[node]
            self.parent[self.left[heir]] = heir
            self.height[heir] = self.height[node]
        else:
            start = self.parent[node]
            heir = self.left[node] + self.right[node]  # at most one of them; balance makes it a leaf
            if heir != IOVA_NIL:
                self._pull(heir)  # the successor may be this leaf, and its gap has grown
        self._replace(node, heir)
        self._retrace(start)

    def _replace(self, old: cython.int, new: cython.int) -> cython.void:
        """Hang ``new`` (or NIL) where ``old`` hangs."""
        up: cython.int = self.parent[old]
        if up == IOVA_NIL:
            self.root = new
        elif self.left[up] == old:
            self.left[up] = new
        else:
            self.right[up] = new
        if new != IOVA_NIL:
            self.parent[new] = up

    def _refit(self, node: cython.int) -> cython.void:
        """Compute the gap size below ``node`` anew (augmented trees)."""
        if self.augmented:
            end: cython.ulonglong = self.lo[node]
            if node == IOVA_ANCHOR:
                end = 1
                end <<= 62
            self.fit[node] = largest_fit(self._gap_start(node), end)

    def _pull(self, node: cython.int) -> cython.void:
        """Compute what ``node`` knows about its subtree from its children."""
        left: cython.int = self.left[node]
        right: cython.int = self.right[node]
        self.height[node] = 1 + (self.height[left] if self.height[left] > self.height[right] else self.height[right])
        if self.augmented:
            best: cython.ulonglong = self.fit[node]
            if self.best[left] > best:
                best = self.best[left]
            if self.best[right] > best:
                best = self.best[right]
            self.best[node] = best

    def _rotate_left(self, node: cython.int) -> cython.int:
        """The right child of ``node`` rises into its place; returns it."""
        rising: cython.int = self.right[node]
        inner: cython.int = self.left[rising]
        self.right[node] = inner
        if inner != IOVA_NIL:
            self.parent[inner] = node
        self._replace(node, rising)
        self.left[rising] = node
        self.parent[node] = rising
        self._pull(node)
        self._pull(rising)
        return rising

    def _rotate_right(self, node: cython.int) -> cython.int:
        """The left child of ``node`` rises into its place; returns it."""
        rising: cython.int = self.left[node]
        inner: cython.int = self.right[rising]
        self.left[node] = inner
        if inner != IOVA_NIL:
            self.parent[inner] = node
        self._replace(node, rising)
        self.right[rising] = node
        self.parent[node] = rising
        self._pull(node)
        self._pull(rising)
        return rising

    def _rebalance(self, node: cython.int) -> cython.int:
        """Rotate when the children's heights differ by 2; returns the root of this subtree."""
        left: cython.int = self.left[node]
        right: cython.int = self.right[node]
        if self.height[left] > self.height[right] + 1:
            if self.height[self.left[left]] < self.height[self.right[left]]:
                self._rotate_left(left)
            return self._rotate_right(node)
        if self.height[right] > self.height[left] + 1:
            if self.height[self.right[right]] < self.height[self.left[right]]:
                self._rotate_right(right)
            return self._rotate_left(node)
        return node

    def _retrace(self, node: cython.int) -> cython.void:
        """Restore heights, balance and ``best`` from ``node`` upwards.

        Without gap sizes it stops where a height has not changed; with them it goes to the root, because the
        changed gap may belong to any ancestor.
        """
        at: cython.int = node
        before: cython.int
        while at != IOVA_NIL:
            before = self.height[at]
            self._pull(at)
            at = self._rebalance(at)
            if not self.augmented and self.height[at] == before:
                return
            at = self.parent[at]
