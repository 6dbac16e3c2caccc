"""Buffers: lists of physical ranges that one request reads or writes, as bio_vecs or scatterlists describe them.

A Buffer is a sequence of bytes laid over ``ranges`` = [(phys, size), …] in order; neighbouring ranges need not be
neighbours in memory. ``allocate`` makes one from pages: how many ranges come out follows from the fragmentation of
the page allocator, as on a real machine. CPU accesses go through ``PhysicalMemory`` (or, on a machine with
non-coherent devices, through the cache model that stands before it).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Protocol

from dmakit.consts import PAGE_MAX_ORDER, PAGE_SIZE
from dmakit.errors import ExhaustedError, MisuseError
from dmakit.memory.pages import PageAllocator
from dmakit.memory.physical import PhysicalMemory


class CpuView(Protocol):
    """What reads and writes memory for the CPU: PhysicalMemory, or CpuCache in front of it."""

    def read(self, phys: int, size: int, /) -> bytes: ...

    def write(self, phys: int, payload: bytes | bytearray | memoryview, /) -> None: ...


class Buffer:
    """``size`` bytes over ``ranges`` of ``memory``; offsets count from the first byte of the first range."""

    def __init__(
        self, memory: PhysicalMemory, ranges: Sequence[tuple[int, int]], *, cpu: CpuView | None = None
    ) -> None:
        for phys, size in ranges:
            if phys < 0 or size <= 0:
                raise MisuseError(f"range ({phys:#x}, {size}): needs an address of 0 or more and a size above 0")
        self.memory = memory
        self.cpu: CpuView = memory if cpu is None else cpu
        self.ranges = list(ranges)
        self._starts = [0]
        for _, size in ranges:
            self._starts.append(self._starts[-1] + size)
        self.size = self._starts.pop()
        self._blocks: list[tuple[PageAllocator, int, int]] = []

    def slices(self, offset: int = 0, n: int | None = None) -> list[tuple[int, int]]:
        """The (phys, size) pieces that hold ``n`` bytes from ``offset`` (to the end when None)."""
        length = self.size - offset if n is None else n
        if offset < 0 or length < 0 or offset + length > self.size:
            raise MisuseError(f"[{offset}, {offset + length}) is not inside a buffer of {self.size} bytes")
        pieces: list[tuple[int, int]] = []
        at = bisect.bisect_right(self._starts, offset) - 1
        while length > 0:
            phys, size = self.ranges[at]
            inside = offset - self._starts[at]
            take = min(size - inside, length)
            pieces.append((phys + inside, take))
            offset, length, at = offset + take, length - take, at + 1
        return pieces

    def read(self, offset: int = 0, n: int | None = None) -> bytes:
        """``n`` bytes from ``offset`` as the CPU sees them."""
        return b"".join(self.cpu.read(phys, size) for phys, size in self.slices(offset, n))

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``offset`` by the CPU."""
        source = memoryview(data).cast("B")
        at = 0
        for phys, size in self.slices(offset, len(source)):
            self.cpu.write(phys, source[at : at + size])
            at += size

    def fill(self, byte: int) -> None:
        """Set every byte."""
        for phys, size in self.ranges:
            self.cpu.write(phys, bytes((byte,)) * size)

    def release(self) -> None:
        """Give the pages back to their allocator (of a buffer made by ``allocate``); a second call does nothing."""
        while self._blocks:
            pages, phys, order = self._blocks.pop()
            pages.free(phys, order)

    def _own(self, pages: PageAllocator, phys: int, order: int) -> None:
        self._blocks.append((pages, phys, order))


def allocate(
    pages: PageAllocator, size: int, *, offset: int = 0, order: int | None = None, cpu: CpuView | None = None
) -> Buffer:
    """A buffer of ``size`` bytes that begins ``offset`` bytes into its first page.

    ``order``: the size of the blocks that it is built from (9 = 2 MiB huge pages); None = single pages. Blocks that
    turn out to be neighbours are one range. Raises ExhaustedError when memory runs out (nothing stays allocated).
    """
    if size <= 0 or offset < 0:
        raise MisuseError(f"size={size}, offset={offset}: needs a size above 0 and an offset of 0 or more")
    block_order = 0 if order is None else order
    if not 0 <= block_order <= PAGE_MAX_ORDER:
        raise MisuseError(f"order={order}: must be 0 to {PAGE_MAX_ORDER}")
    block = PAGE_SIZE << block_order
    if offset >= block:
        raise MisuseError(f"offset={offset}: must lie inside the first block of {block} bytes")
    blocks: list[int] = []
    try:
        for _ in range(-(-(offset + size) // block)):
            blocks.append(pages.alloc_after(blocks[-1] + block, block_order) if blocks else pages.alloc(block_order))
    except ExhaustedError:
        for phys in blocks:
            pages.free(phys, block_order)
        raise
    ranges: list[tuple[int, int]] = []
    skip, left = offset, size
    for phys in blocks:
        take = min(block - skip, left)
        if ranges and sum(ranges[-1]) == phys:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + take)
        else:
            ranges.append((phys + skip, take))
        skip, left = 0, left - take
    buffer = Buffer(pages.memory, ranges, cpu=cpu)
    for phys in blocks:
        buffer._own(pages, phys, block_order)
    return buffer
