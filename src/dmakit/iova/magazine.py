"""Magazines: small stacks of free IOVA ranges of one size, in flat arrays.

A *magazine* holds up to 127 pfns (with its header word 1 KiB, as in the kernel; Bonwick and Adams, "Magazines and
Vmem", USENIX 2001). It is an index; 0 is no magazine. Its storage is 128 words: how many pfns there are, then the
pfns; but for the line where two magazines meet, what a CPU writes in its own lies in lines that no other writes.
``link`` chains magazines: those of a depot, and the unused ones. A range in a magazine stays allocated in the tree.

Popping obeys the caller's limit: the topmost pfn that is low enough is taken, and the last one fills its place.

Models ``struct iova_magazine`` and ``iova_magazine_*`` in ``drivers/iommu/iova.c``.
"""

from __future__ import annotations

from typing import SupportsIndex

import cython

from dmakit.iova.arguments import within
from dmakit.iova.arrays import widened, zeroed

if not cython.compiled:
    from dmakit.consts import IOVA_MAG_SIZE, IOVA_MAG_STRIDE
    from dmakit.failpoint import FailPoint
    from dmakit.iova.bits import mix

_MOST = 1 << 20  # magazines at first: 12 for each of 65536 CPUs fit


@cython.cclass
class MagazinePool:
    """The magazines of one domain. ``fail`` is asked before each allocation."""

    def __init__(self, fail: FailPoint, capacity: SupportsIndex = 16) -> None:
        self.fail = fail
        self.capacity = max(within("capacity", capacity, 0, _MOST), 2)
        self.words = zeroed("Q", self.capacity * IOVA_MAG_STRIDE)
        self.link = zeroed("i", self.capacity)
        self.allocated = 0
        self.unused = 0
        self._chain_unused(1)

    def content(self, magazine: SupportsIndex) -> list[int]:
        """The pfns of a magazine, the top of the stack last."""
        header = within("magazine", magazine, 0, self.capacity - 1) * IOVA_MAG_STRIDE
        return [self.words[header + 1 + i] for i in range(self.words[header])]

    def _size(self, magazine: cython.int) -> cython.int:
        """How many pfns a magazine holds."""
        return self.words[magazine * IOVA_MAG_STRIDE]

    def _become(self, other: MagazinePool) -> None:
        """Hold what ``other`` holds, magazine for magazine; nothing is shared."""
        items = self.capacity = other.capacity
        self.words = widened("Q", other.words, items * IOVA_MAG_STRIDE)
        self.link = widened("i", other.link, items)
        self.allocated, self.unused = other.allocated, other.unused

    def _fingerprint(self, magazine: cython.int) -> cython.ulonglong:
        """64 bits of a magazine's pfns, in order; for comparisons in this process."""
        start: cython.Py_ssize_t = magazine * IOVA_MAG_STRIDE + 1
        end: cython.Py_ssize_t = start + self._size(magazine)
        if cython.compiled:
            at: cython.Py_ssize_t
            value: cython.ulonglong = self._size(magazine)
            for at in range(start, end):
                value = mix(value, self.words[at])
            return value
        else:  # noqa: RET505 (one call instead of one a word)
            return hash(bytes(self.words[start:end])) & 0xFFFF_FFFF_FFFF_FFFF

    def _discard(self, magazine: int, pfn: int) -> bool:
        """Take ``pfn`` out of a magazine, wherever it is, keeping the order of the others; false when not there."""
        content = self.content(magazine)
        if pfn not in content:
            return False
        content.remove(pfn)
        self._clear(magazine)
        for kept in content:
            self._push(magazine, kept)
        return True

    def _chain_unused(self, first: int) -> None:
        for magazine in range(self.capacity - 1, first - 1, -1):
            self.link[magazine] = self.unused
            self.unused = magazine

    def _grow(self) -> cython.bint:
        """Double the storage; false when the host has no memory for that."""
        first, wanted = self.capacity, self.capacity * 2
        try:
            storage = widened("Q", self.words, wanted * IOVA_MAG_STRIDE)
            link = widened("i", self.link, wanted)
        except MemoryError:
            return False
        self.words, self.link, self.capacity = storage, link, wanted
        self._chain_unused(first)
        return True

    def _new(self) -> cython.int:
        """An empty magazine, or 0 without memory."""
        if self.fail._hit():
            return 0
        if self.unused == 0 and not self._grow():
            return 0
        magazine: cython.int = self.unused
        self.unused = self.link[magazine]
        self._clear(magazine)
        self.allocated += 1
        return magazine

    def _release(self, magazine: cython.int) -> cython.void:
        """Give the memory of a magazine back; its pfns are forgotten."""
        self._clear(magazine)
        self.link[magazine] = self.unused
        self.unused = magazine
        self.allocated -= 1

    def _clear(self, magazine: cython.int) -> cython.void:
        """Forget the pfns of a magazine."""
        self.words[magazine * IOVA_MAG_STRIDE] = 0

    def _push(self, magazine: cython.int, pfn: cython.ulonglong) -> cython.void:
        """Put ``pfn`` on top of a magazine that is not full."""
        header: cython.Py_ssize_t = magazine * IOVA_MAG_STRIDE
        self.words[header] += 1
        self.words[header + self._size(magazine)] = pfn

    def _pop(self, magazine: cython.int, highest: cython.ulonglong) -> cython.ulonglong:
        """Take the topmost pfn that is at most ``highest``, or 0 when there is none."""
        header: cython.Py_ssize_t = magazine * IOVA_MAG_STRIDE
        at: cython.Py_ssize_t = self._look(magazine, highest)
        if at == 0:
            return 0
        pfn: cython.ulonglong = self.words[at]
        self.words[at] = self.words[header + self._size(magazine)]
        self.words[header] -= 1
        return pfn

    def _look(self, magazine: cython.int, highest: cython.ulonglong) -> cython.Py_ssize_t:
        """Where in ``words`` the topmost pfn lies that is at most ``highest``, or 0 when there is none."""
        header: cython.Py_ssize_t = magazine * IOVA_MAG_STRIDE
        at: cython.Py_ssize_t = header + self._size(magazine)
        while at > header:
            if self.words[at] <= highest:
                return at
            at -= 1
        return 0

    def _pop_run(
        self,
        magazine: cython.int,
        highest: cython.ulonglong,
        pfns: cython.p_ulonglong,
        first: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
    ) -> cython.Py_ssize_t:
        """Pop from the top into ``pfns[first:end]`` until one is above ``highest`` or none is left: how many."""
        header: cython.Py_ssize_t = magazine * IOVA_MAG_STRIDE
        at: cython.Py_ssize_t = header + self._size(magazine)
        i: cython.Py_ssize_t = first
        stack: cython.p_ulonglong = cython.address(self.words[0]) if cython.compiled else self.words
        while i < end and at > header and stack[at] <= highest:
            pfns[i] = stack[at]
            at -= 1
            i += 1
        stack[header] = at - header
        return i - first

    def _push_run(
        self, magazine: cython.int, pfns: cython.p_ulonglong, first: cython.Py_ssize_t, end: cython.Py_ssize_t
    ) -> cython.Py_ssize_t:
        """Push ``pfns[first:end]`` until the magazine is full: how many."""
        header: cython.Py_ssize_t = magazine * IOVA_MAG_STRIDE
        size: cython.Py_ssize_t = self._size(magazine)
        count: cython.Py_ssize_t = IOVA_MAG_SIZE - size
        top: cython.Py_ssize_t = header + 1 + size
        i: cython.Py_ssize_t
        stack: cython.p_ulonglong = cython.address(self.words[0]) if cython.compiled else self.words
        if count > end - first:
            count = end - first
        for i in range(count):
            stack[top + i] = pfns[first + i]
        stack[header] = size + count
        return count
