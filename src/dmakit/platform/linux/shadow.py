"""What is mapped in a domain of the host, kept by us: the host's kernel cannot be asked.

A *mapping* is what one call of the host's kernel made: [iova, iova + size) to [phys, phys + size). It goes as a whole
or not at all (type1 and iommufd alike), so this map answers, before the kernel is asked, the three questions that
matter: what is behind an IOVA, what would a new mapping overlap, and would an unmap cut a mapping.

A balanced tree over pages of IOVA (``iova.tree``) and one word of ``phys`` a node: each question is O(log n), and an
unmap of a run of n mappings O(n + log n).

Invariant: exactly the mappings that the kernel was told and did not refuse. One that it refused to take away stays,
so its IOVA is not used again while a device may reach it.
"""

from __future__ import annotations

from array import array

import cython

if not cython.compiled:
    from dmakit.consts import IOVA_ANCHOR, IOVA_NIL, PAGE_MASK_LOW, PAGE_SHIFT
    from dmakit.iova.tree import IovaTree


@cython.cclass
class ShadowMap:
    """Mappings in order of IOVA; addresses and sizes in bytes, multiples of the page. ``pages`` counts what is held."""

    def __init__(self) -> None:
        self.tree = IovaTree()
        self.phys: memoryview[int] = memoryview(array("Q", bytes(8 * self.tree.capacity)))
        self.pages = 0

    @property
    def count(self) -> int:
        """How many mappings there are."""
        return int(self.tree.count)

    def mappings(self) -> list[tuple[int, int, int]]:
        """Every (iova, phys, size), ascending."""
        found = []
        node = self.tree._first_ending_at(0)
        while node != IOVA_ANCHOR:
            first, last = int(self.tree.lo[node]), int(self.tree.hi[node])
            found.append(((first - 1) << PAGE_SHIFT, int(self.phys[node]), (last - first + 1) << PAGE_SHIFT))
            node = self.tree.next[node]
        return found

    def _at(self, iova: cython.ulonglong) -> cython.ulonglong:
        """What ``iova`` leads to, 0 when nothing is mapped there."""
        page: cython.ulonglong = (iova >> PAGE_SHIFT) + 1
        node: cython.int = self.tree._find(page)
        if node == IOVA_NIL:
            return 0
        return self.phys[node] + ((page - self.tree.lo[node]) << PAGE_SHIFT) + (iova & PAGE_MASK_LOW)

    def _overlap(self, iova: cython.ulonglong, size: cython.ulonglong) -> cython.ulonglong:
        """The first IOVA of [iova, iova + size) that is taken; iova + size when none is."""
        first: cython.ulonglong = (iova >> PAGE_SHIFT) + 1
        node: cython.int = self.tree._first_ending_at(first)
        start: cython.ulonglong
        if node == IOVA_ANCHOR or self.tree.lo[node] > first + ((size - 1) >> PAGE_SHIFT):
            return iova + size
        start = (self.tree.lo[node] - 1) << PAGE_SHIFT
        return start if start > iova else iova

    def _cuts(self, iova: cython.ulonglong) -> cython.bint:
        """Whether a mapping begins before ``iova`` and ends after it."""
        page: cython.ulonglong = (iova >> PAGE_SHIFT) + 1
        node: cython.int = self.tree._find(page)
        return node != IOVA_NIL and self.tree.lo[node] < page

    def _run(self, iova: cython.ulonglong, size: cython.ulonglong) -> cython.ulonglong:
        """Bytes of whole mappings, one behind the other, from ``iova`` up to the first hole, cut, or ``size``."""
        at: cython.ulonglong = (iova >> PAGE_SHIFT) + 1
        end: cython.ulonglong = at + (size >> PAGE_SHIFT)
        node: cython.int = self.tree._first_ending_at(at)
        while node != IOVA_ANCHOR and self.tree.lo[node] == at and self.tree.hi[node] < end:
            at = self.tree.hi[node] + 1
            node = self.tree.next[node]
        return ((at - 1) << PAGE_SHIFT) - iova

    def _insert(self, iova: cython.ulonglong, phys: cython.ulonglong, size: cython.ulonglong) -> cython.bint:
        """Note a mapping where none is; false without memory."""
        first: cython.ulonglong = (iova >> PAGE_SHIFT) + 1
        last: cython.ulonglong = first + ((size - 1) >> PAGE_SHIFT)
        above: cython.int = self.tree._first_ending_at(first)
        node: cython.int = self.tree._insert_before(above, first, last)
        if node == IOVA_NIL:
            return False
        if node >= len(self.phys) and not self._grow():
            self.tree._remove(node)
            return False
        self.phys[node] = phys
        self.pages += last - first + 1
        return True

    def _remove(self, iova: cython.ulonglong, size: cython.ulonglong) -> cython.void:
        """Forget the mappings of [iova, iova + size), which cuts none."""
        first: cython.ulonglong = (iova >> PAGE_SHIFT) + 1
        last: cython.ulonglong = first + ((size - 1) >> PAGE_SHIFT)
        node: cython.int = self.tree._first_ending_at(first)
        following: cython.int
        while node != IOVA_ANCHOR and self.tree.lo[node] <= last:
            following = self.tree.next[node]
            self.pages -= self.tree.hi[node] - self.tree.lo[node] + 1
            self.tree._remove(node)
            node = following

    def _grow(self) -> cython.bint:
        """As many words as the tree has nodes; false when the host has no memory for that."""
        try:
            wider = array("Q", bytes(8 * int(self.tree.capacity)))
        except MemoryError:
            return False
        words = memoryview(wider)
        words[: len(self.phys)] = self.phys
        self.phys = words
        return True
