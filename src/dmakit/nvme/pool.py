"""Descriptor pools: small blocks of coherent memory for PRP lists and SGL segments.

A pool has blocks of one size: 256 bytes (32 PRP entries or 16 SGL descriptors) or one 4 KiB page. It grows by one
coherent page and never gives pages back before it is destroyed, like the kernel's ``dma_pool``. The device
reaches a block at ``addr``, its DMA address; the CPU writes ``words``, the same bytes as 64-bit words. Blocks are
naturally aligned, so a block never crosses a controller page.

Blocks are not cleared when they are handed out: whoever takes one writes the entries it announces.

Models ``mm/dmapool.c`` as ``drivers/nvme/host/pci.c`` uses it (``descriptor_pools``, ``NVME_SMALL_POOL_SIZE``).
"""

from __future__ import annotations

from array import array
from typing import Protocol

import cython

from dmakit.errors import ExhaustedError, MisuseError
from dmakit.iova.arguments import words as as_words

if not cython.compiled:
    from dmakit.consts import L_DESCRIPTOR_PAGES, PAGE_SIZE
    from dmakit.failpoint import FailPoint
    from dmakit.ledger import Ledger

SMALL_BYTES = 256
LARGE_BYTES = 4096


def words_of(name: str, values: memoryview[int], least: int = 0) -> memoryview[int]:
    """``values`` as 64-bit words; MisuseError when it is no flat buffer of them or has fewer than ``least``."""
    try:
        view = memoryview(values)
    except TypeError:
        raise MisuseError(f"{name}: must be a buffer of 64-bit unsigned words, not {type(values).__name__}") from None
    if view.ndim != 1 or view.itemsize != 8 or view.format not in ("Q", "L") or not view.contiguous:
        raise MisuseError(f"{name}: must be a flat buffer of 64-bit unsigned words")
    if len(view) < least:
        raise MisuseError(f"{name}: has {len(view)} words, at least {least} are needed")
    return view


class CoherentPage(Protocol):
    """One page of coherent memory."""

    @property
    def addr(self) -> int:
        """Its DMA address (page-aligned)."""

    @property
    def words(self) -> memoryview[int]:
        """Its 512 words as the CPU sees them."""

    def free(self) -> None:
        """Give the page back."""


class CoherentSource(Protocol):
    """Where pages come from: a device's coherent allocator."""

    def page(self) -> CoherentPage:
        """A new page; ExhaustedError when there is none."""


@cython.cclass
class Block:
    """One block of a pool: DMA address, words, size in bytes; ``free`` while it is in the pool."""

    def __init__(self, addr: int, words: memoryview[int], size: int) -> None:
        self.addr = addr
        self.words = as_words("words", words, writable=True)
        self.size = size
        self.free = True


@cython.cclass
class DescriptorPool:
    """Blocks of ``size`` bytes carved out of coherent pages; ``used`` counts the blocks that are out."""

    def __init__(self, source: CoherentSource, size: int, *, ledger: Ledger, fail: FailPoint) -> None:
        if size < 16 or size > PAGE_SIZE or size & (size - 1):
            raise MisuseError(f"size={size}: must be a power of two from 16 to {PAGE_SIZE}")
        self.source = source
        self.size = size
        self.ledger = ledger
        self.fail = fail
        self.pages: list[CoherentPage] = []
        self.blocks: list[Block] = []
        self.idle: list[Block] = []
        self.used = 0

    def _alloc(self) -> Block:
        """A block, or ExhaustedError."""
        block: Block
        if self.fail._hit():
            raise ExhaustedError(f"descriptor pool of {self.size}-byte blocks: no memory")
        if not self.idle:
            self.grow()
        block = self.idle.pop()
        block.free = False
        self.used += 1
        self.ledger.counts[L_DESCRIPTOR_PAGES] += 1
        return block

    def _free(self, block: Block) -> cython.int:
        """Take a block back."""
        if block.free:
            raise MisuseError(f"descriptor pool: block at {block.addr:#x} is freed twice")
        block.free = True
        self.used -= 1
        self.idle.append(block)
        return 0

    def grow(self) -> None:
        """Add one page of blocks; the lowest block is handed out first."""
        page = self.source.page()
        self.pages.append(page)
        step = self.size >> 3
        fresh = [
            Block(page.addr + at * 8, page.words[at : at + step], self.size) for at in range(0, PAGE_SIZE >> 3, step)
        ]
        self.blocks.extend(fresh)
        self.idle.extend(reversed(fresh))

    def alloc(self) -> Block:
        """A block; ExhaustedError when no memory is left."""
        return self._alloc()

    def release(self, block: Block) -> None:
        """Give a block back; MisuseError when it is free already."""
        self._free(block)

    def destroy(self, lost: bool = False) -> None:
        """Give every page back; MisuseError while blocks are out, unless they are ``lost``: who held them was
        interrupted, and no device reads them any more."""
        if self.used and not lost:
            raise MisuseError(f"descriptor pool: destroyed with {self.used} blocks of {self.size} bytes in use")
        for page in self.pages:
            page.free()
        self.pages.clear()
        self.blocks.clear()
        self.idle.clear()
        self.used = 0


class PlainPage:
    """A page outside any machine, for building lists without a device."""

    def __init__(self, addr: int) -> None:
        self.addr = addr
        self.words = memoryview(array("Q", bytes(PAGE_SIZE)))

    def free(self) -> None:
        """Nothing to give back."""


class PlainSource:
    """Pages at consecutive addresses from ``start``, up to ``limit`` pages."""

    def __init__(self, start: int = 1 << 32, limit: int = 1 << 20) -> None:
        self.next = start
        self.left = limit

    def page(self) -> PlainPage:
        """The next page; ExhaustedError after ``limit`` pages."""
        if self.left <= 0:
            raise ExhaustedError("no more descriptor pages")
        self.left -= 1
        page = PlainPage(self.next)
        self.next += PAGE_SIZE
        return page
