"""Magazines: small stacks of free IOVA ranges of one size, in flat arrays.

A *magazine* holds up to 127 pfns (with its header word 1 KiB, as in the kernel; Bonwick and Adams, "Magazines and
Vmem", USENIX 2001). It is an index; 0 is no magazine. ``link`` chains magazines: those of a depot, and the unused
ones. A range in a magazine stays allocated in the tree.

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
        self.pfns = zeroed("Q", self.capacity * IOVA_MAG_STRIDE)
        self.size = zeroed("i", self.capacity)
        self.link = zeroed("i", self.capacity)
        self.allocated = 0
        self.unused = 0
        self._chain_unused(1)

    def content(self, magazine: SupportsIndex) -> list[int]:
        """The pfns of a magazine, the top of the stack last."""
        magazine = within("magazine", magazine, 0, self.capacity - 1)
        start = magazine * IOVA_MAG_STRIDE
        return [self.pfns[start + i] for i in range(self.size[magazine])]

    def _become(self, other: MagazinePool) -> None:
        """Hold what ``other`` holds, magazine for magazine; nothing is shared."""
        items = self.capacity = other.capacity
        self.pfns = widened("Q", other.pfns, items * IOVA_MAG_STRIDE)
        self.size, self.link = widened("i", other.size, items), widened("i", other.link, items)
        self.allocated, self.unused = other.allocated, other.unused

    def _fingerprint(self, magazine: cython.int) -> cython.ulonglong:
        """64 bits of a magazine's pfns, in order; for comparisons in this process."""
        start: cython.Py_ssize_t = magazine * IOVA_MAG_STRIDE
        end: cython.Py_ssize_t = start + self.size[magazine]
        if cython.compiled:
            at: cython.Py_ssize_t
            value: cython.ulonglong = self.size[magazine]
            for at in range(start, end):
                value = mix(value, self.pfns[at])
            return value
        else:  # noqa: RET505 (one call instead of one a word)
            return hash(bytes(self.pfns[start:end])) & 0xFFFF_FFFF_FFFF_FFFF

    def _discard(self, magazine: int, pfn: int) -> bool:
        """Take ``pfn`` out of a magazine, wherever it is, keeping the order of the others; false when not there."""
        content = self.content(magazine)
        if pfn not in content:
            return False
        content.remove(pfn)
        self.size[magazine] = 0
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
            pfns = widened("Q", self.pfns, wanted * IOVA_MAG_STRIDE)
            size = widened("i", self.size, wanted)
            link = widened("i", self.link, wanted)
        except MemoryError:
            return False
        self.pfns, self.size, self.link, self.capacity = pfns, size, link, wanted
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
        self.size[magazine] = 0
        self.allocated += 1
        return magazine

    def _release(self, magazine: cython.int) -> cython.void:
        """Give the memory of a magazine back; its pfns are forgotten."""
        self.size[magazine] = 0
        self.link[magazine] = self.unused
        self.unused = magazine
        self.allocated -= 1

    def _push(self, magazine: cython.int, pfn: cython.ulonglong) -> cython.void:
        """Put ``pfn`` on top of a magazine that is not full."""
        self.pfns[magazine * IOVA_MAG_STRIDE + self.size[magazine]] = pfn
        self.size[magazine] += 1

    def _pop(self, magazine: cython.int, highest: cython.ulonglong) -> cython.ulonglong:
        """Take the topmost pfn that is at most ``highest``, or 0 when there is none."""
        base: cython.int = magazine * IOVA_MAG_STRIDE
        last: cython.int = base + self.size[magazine] - 1
        at: cython.int = last
        pfn: cython.ulonglong
        while at >= base:
            pfn = self.pfns[at]
            if pfn <= highest:
                self.pfns[at] = self.pfns[last]
                self.size[magazine] -= 1
                return pfn
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
        base: cython.Py_ssize_t = magazine * IOVA_MAG_STRIDE
        at: cython.Py_ssize_t = base + self.size[magazine]
        i: cython.Py_ssize_t = first
        stack: cython.p_ulonglong = cython.address(self.pfns[0]) if cython.compiled else self.pfns
        while i < end and at > base and stack[at - 1] <= highest:
            at -= 1
            pfns[i] = stack[at]
            i += 1
        self.size[magazine] = at - base
        return i - first

    def _push_run(
        self, magazine: cython.int, pfns: cython.p_ulonglong, first: cython.Py_ssize_t, end: cython.Py_ssize_t
    ) -> cython.Py_ssize_t:
        """Push ``pfns[first:end]`` until the magazine is full: how many."""
        at: cython.Py_ssize_t = magazine * IOVA_MAG_STRIDE + self.size[magazine]
        count: cython.Py_ssize_t = IOVA_MAG_SIZE - self.size[magazine]
        i: cython.Py_ssize_t
        stack: cython.p_ulonglong = cython.address(self.pfns[0]) if cython.compiled else self.pfns
        if count > end - first:
            count = end - first
        for i in range(count):
            stack[at + i] = pfns[first + i]
        self.size[magazine] += count
        return count
