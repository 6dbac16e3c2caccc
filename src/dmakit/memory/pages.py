"""Page and folio allocation for a software machine, with a seeded degree of fragmentation.

A binary buddy allocator over one range of RAM (one NUMA node). A *block* of order ``k`` is ``1 << k`` page frames,
naturally aligned in physical memory; a folio is an allocated block of order 1 or more. ``fragmentation`` says how
often the next block is taken apart from the one before: 0.0 = as a freshly booted machine, runs come out
contiguous and ascending; 1.0 = no two blocks handed out one after the other are neighbours (as long as free
memory permits); in between, runs of geometric length. Scattered blocks come from a small moving window, so that
fragmenting 4 KiB pages does not use up every free 2 MiB block of the machine. Same seed, same addresses.

State: one byte a frame (``state``: 0 = inside a block, order + 1 = first frame of a free block, 0x80 | order =
first frame of an allocated one), lazily committed like memory itself, and the doubly linked free lists, which
live in ``PhysicalMemory.page_link`` of the free pages (a free page belongs to the allocator; an allocated page's
link belongs to its owner). Free blocks are always merged with their free buddies. Models ``mm/page_alloc.c``.
"""

from __future__ import annotations

import mmap
from array import array
from operator import index
from typing import SupportsIndex

import cython

from dmakit.errors import ExhaustedError, MisuseError

if not cython.compiled:
    from dmakit.consts import PAGE_MAX_ORDER, PAGE_SHIFT, PAGE_SIZE
    from dmakit.failpoint import FailPoint
    from dmakit.memory.physical import PhysicalMemory

_WINDOW = 4096  # frames among which scattered blocks are sought before the window moves on
_PROBES = 8
_ALLOCATED = 0x80
_LINK_BITS = 32  # a link word: next block + 1 in the low half, previous block + 1 in the high half
_LINK_MASK = 0xFFFFFFFF
_WORD = (1 << 64) - 1


def _checked_order(order: SupportsIndex) -> int:
    number = index(order)
    if not 0 <= number <= PAGE_MAX_ORDER:
        raise MisuseError(f"order={number}: must be 0 to {PAGE_MAX_ORDER}")
    return number


@cython.cclass
class PageAllocator:
    """Hands out the pages of [start, start + size); page 0 of the machine is never handed out.

    ``fail`` is the machine's fail point; an armed use makes the allocation answer as if memory had run out.
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        start: SupportsIndex,
        size: SupportsIndex,
        *,
        node: int = 0,
        seed: int = 0,
        fragmentation: float = 0.0,
        fail: FailPoint | None = None,
    ) -> None:
        start, size = index(start), index(size)
        if start < 0 or size <= 0 or start % PAGE_SIZE or size % PAGE_SIZE or start + size > memory.span:
            raise MisuseError(f"[{start:#x}, {start + size:#x}): must be whole pages inside {memory.span:#x} bytes")
        if not 0.0 <= fragmentation <= 1.0:
            raise MisuseError(f"fragmentation={fragmentation}: must be between 0.0 and 1.0")
        if start == 0:
            start, size = PAGE_SIZE, size - PAGE_SIZE
        self.memory = memory
        self.fail = FailPoint() if fail is None else fail
        self.start, self.size, self.node = start, size, node
        self.first, self.frames = start >> PAGE_SHIFT, size >> PAGE_SHIFT
        self.fragmentation = fragmentation
        self.threshold = int(fragmentation * (1 << 32))
        self.rng = ((seed + 1) * 0x9E3779B97F4A7C15) & _WORD or 1
        self.window = self.last_start = self.last_end = 0
        self.free_pages_count = self.frames
        self.allocated_pages = 0
        self.heads = memoryview(array("Q", bytes(8 * (PAGE_MAX_ORDER + 1))))
        self.state = memoryview(mmap.mmap(-1, max(PAGE_SIZE, int(self.frames)))).cast("B")
        self._seed_lists()

    def _seed_lists(self) -> None:
        """Cut the range into the largest aligned blocks, lowest first on each list."""
        blocks: list[tuple[int, int]] = []
        at = 0
        while at < self.frames:
            order = PAGE_MAX_ORDER
            while (self.first + at) & ((1 << order) - 1) or at + (1 << order) > self.frames:
                order -= 1
            blocks.append((at, order))
            at += 1 << order
        for block, order in reversed(blocks):
            self._push(block, order)

    # public ------------------------------------------------------------------------------------------------------

    def alloc(self, order: SupportsIndex = 0) -> int:
        """Physical address of a free block of ``1 << order`` pages, naturally aligned; its bytes are not cleared.

        Raises ExhaustedError when no block of that order is free, MisuseError when ``order`` is not 0 to 18.
        """
        order = _checked_order(order)
        phys = self._alloc(order)
        if phys == 0:
            raise ExhaustedError(f"no free block of order {order} ({PAGE_SIZE << order} bytes) on node {self.node}")
        return int(phys)

    def alloc_after(self, phys: SupportsIndex, order: SupportsIndex = 0) -> int:
        """As ``alloc``, preferring (at fragmentation 0) the block that begins at ``phys``: to grow one buffer."""
        order = _checked_order(order)
        found = self._alloc_after(min(max(index(phys), 0), _WORD), order)
        if found == 0:
            raise ExhaustedError(f"no free block of order {order} ({PAGE_SIZE << order} bytes) on node {self.node}")
        return int(found)

    def take(self, phys: SupportsIndex, order: SupportsIndex = 0) -> None:
        """Allocate exactly the block at ``phys``; MisuseError when it is not free (or not a block)."""
        phys, order = index(phys), index(order)
        if not self._owns(phys, order):
            raise MisuseError(f"phys={phys:#x}, order={order}: is not an aligned block of node {self.node}")
        if self._at((phys - self.start) >> PAGE_SHIFT, order) == 0:
            raise MisuseError(f"phys={phys:#x}, order={order}: is not free")

    def free(self, phys: SupportsIndex, order: SupportsIndex = 0) -> None:
        """Give back a block exactly as it was allocated; MisuseError for anything else (double free, other order)."""
        phys, order = index(phys), index(order)
        if not self.holds(phys, order):
            raise MisuseError(f"phys={phys:#x}, order={order}: no such block is allocated on node {self.node}")
        self._free(phys, order)

    def holds(self, phys: SupportsIndex, order: SupportsIndex = 0) -> bool:
        """Whether exactly this block is allocated here."""
        phys, order = index(phys), index(order)
        return self._owns(phys, order) and self.state[(phys - self.start) >> PAGE_SHIFT] == _ALLOCATED | order

    def _owns(self, phys: int, order: int) -> bool:
        if not 0 <= order <= PAGE_MAX_ORDER or phys % (PAGE_SIZE << order):
            return False
        return self.start <= phys and phys + (PAGE_SIZE << order) <= self.start + self.size

    # internals: frames are numbered from the start of the range ----------------------------------------------------

    def _alloc(self, order: cython.int) -> cython.ulonglong:
        """Address of a free block, or 0."""
        if self.fail._hit():
            return 0
        if self.threshold != 0:
            if self._random() & _LINK_MASK < self.threshold:
                return self._scattered(order)
            if self.last_end != 0:
                found: cython.ulonglong = self._at(self.last_end, order)
                if found != 0:
                    return found
        return self._from_lists(order)

    def _alloc_after(self, phys: cython.ulonglong, order: cython.int) -> cython.ulonglong:
        """As ``_alloc``; at fragmentation 0 the block at ``phys`` first."""
        if self.threshold != 0 or phys <= self.start or phys >= self.start + self.size:
            return self._alloc(order)
        if self.fail._hit():
            return 0
        found: cython.ulonglong = self._at((phys - self.start) >> PAGE_SHIFT, order)
        if found != 0:
            return found
        return self._from_lists(order)

    def _free(self, phys: cython.ulonglong, order: cython.int) -> cython.void:
        """Give back a block, merging it with its free buddies."""
        block: cython.ulonglong = (phys - self.start) >> PAGE_SHIFT
        pages: cython.ulonglong = 1
        pages <<= order
        self.state[block] = 0
        self.free_pages_count += pages
        self.allocated_pages -= pages
        while order < PAGE_MAX_ORDER:
            pfn: cython.ulonglong = self.first + block
            buddy: cython.ulonglong = pfn ^ pages
            if buddy < self.first or buddy - self.first + pages > self.frames:
                break
            buddy -= self.first
            if self.state[buddy] != order + 1:
                break
            self._unlink(buddy, order)
            if buddy < block:
                block = buddy
            order += 1
            pages <<= 1
        self._push(block, order)

    def _random(self) -> cython.ulonglong:
        """The next 64 bits of a xorshift generator."""
        x: cython.ulonglong = self.rng
        x ^= (x << 13) & _WORD
        x ^= x >> 7
        x ^= (x << 17) & _WORD
        self.rng = x
        return x >> 16

    def _push(self, block: cython.ulonglong, order: cython.int) -> cython.void:
        """Put a free block first on its list."""
        head: cython.ulonglong = self.heads[order]
        self.memory.page_link[self.first + block] = head
        if head != 0:
            at: cython.ulonglong = self.first + head - 1
            self.memory.page_link[at] = (self.memory.page_link[at] & _LINK_MASK) | ((block + 1) << _LINK_BITS)
        self.heads[order] = block + 1
        self.state[block] = order + 1

    def _unlink(self, block: cython.ulonglong, order: cython.int) -> cython.void:
        """Take a free block off its list."""
        word: cython.ulonglong = self.memory.page_link[self.first + block]
        following: cython.ulonglong = word & _LINK_MASK
        previous: cython.ulonglong = word >> _LINK_BITS
        at: cython.ulonglong = 0
        if previous != 0:
            at = self.first + previous - 1
            self.memory.page_link[at] = (self.memory.page_link[at] >> _LINK_BITS << _LINK_BITS) | following
        else:
            self.heads[order] = following
        if following != 0:
            at = self.first + following - 1
            self.memory.page_link[at] = (self.memory.page_link[at] & _LINK_MASK) | (previous << _LINK_BITS)
        self.state[block] = 0

    def _free_order_at(self, frame: cython.ulonglong, order: cython.int) -> cython.int:
        """Order of the free block that holds the aligned block of ``order`` at ``frame``, or -1."""
        held: cython.int = order
        while held <= PAGE_MAX_ORDER:
            pfn: cython.ulonglong = ((self.first + frame) >> held) << held
            if pfn < self.first:
                return -1
            if self.state[pfn - self.first] == held + 1:
                return held
            held += 1
        return -1

    def _take(self, frame: cython.ulonglong, order: cython.int, held: cython.int) -> cython.ulonglong:
        """Cut the block of ``order`` at ``frame`` out of the free block of order ``held`` around it; its address."""
        pages: cython.ulonglong = 1
        block: cython.ulonglong = (((self.first + frame) >> held) << held) - self.first
        self._unlink(block, held)
        while held > order:
            held -= 1
            half: cython.ulonglong = block + (pages << held)
            if frame < half:
                self._push(half, held)
            else:
                self._push(block, held)
                block = half
        pages <<= order
        self.state[block] = _ALLOCATED | order
        self.free_pages_count -= pages
        self.allocated_pages += pages
        self.last_start = block
        self.last_end = block + pages
        return (self.first + block) << PAGE_SHIFT

    def _from_lists(self, order: cython.int) -> cython.ulonglong:
        """The first part of the smallest free block that is large enough, or 0."""
        held: cython.int = order
        while held <= PAGE_MAX_ORDER:
            if self.heads[held] != 0:
                return self._take(self.heads[held] - 1, order, held)
            held += 1
        return 0

    def _at(self, frame: cython.ulonglong, order: cython.int) -> cython.ulonglong:
        """The block of ``order`` that begins at ``frame``, if it is aligned and free; else 0."""
        pages: cython.ulonglong = 1
        pages <<= order
        if frame + pages > self.frames or (self.first + frame) & (pages - 1):
            return 0
        held: cython.int = self._free_order_at(frame, order)
        return 0 if held < 0 else self._take(frame, order, held)

    def _neighbour(self, frame: cython.ulonglong, order: cython.int) -> cython.bint:
        """Whether a block of ``order`` at ``frame`` touches the block handed out last."""
        pages: cython.ulonglong = 1
        pages <<= order
        return frame <= self.last_end and self.last_start <= frame + pages

    def _scattered(self, order: cython.int) -> cython.ulonglong:
        """A free block away from the last one: by probing the window, else by searching the lists, else any."""
        pages: cython.ulonglong = 1
        pages <<= order
        span: cython.ulonglong = pages * _WINDOW if order == 0 else pages * 64
        probe: cython.int = 0
        while probe < _PROBES:
            base: cython.ulonglong = self.window if self.window < self.frames else 0
            width: cython.ulonglong = min(span, self.frames - base)
            pfn: cython.ulonglong = ((self.first + base + self._random() % width) >> order) << order
            if pfn >= self.first and pfn - self.first + pages <= self.frames:
                frame: cython.ulonglong = pfn - self.first
                if not self._neighbour(frame, order):
                    held: cython.int = self._free_order_at(frame, order)
                    if held >= 0:
                        return self._take(frame, order, held)
            probe += 1
        self.window = self.window + span if self.window + span < self.frames else 0
        return self._apart(order)

    def _apart(self, order: cython.int) -> cython.ulonglong:
        """A free block that does not touch the last one, if the first few blocks of the lists hold one; else any."""
        pages: cython.ulonglong = 1
        pages <<= order
        held: cython.int = order
        while held <= PAGE_MAX_ORDER:
            entry: cython.ulonglong = self.heads[held]
            tries: cython.int = 0
            while entry != 0 and tries < 4:
                frame: cython.ulonglong = entry - 1
                end: cython.ulonglong = frame + (pages << (held - order))
                while frame < end and frame - (entry - 1) < 4 * pages:
                    if not self._neighbour(frame, order):
                        return self._take(frame, order, held)
                    frame += pages
                entry = self.memory.page_link[self.first + entry - 1] & _LINK_MASK
                tries += 1
            held += 1
        return self._from_lists(order)
