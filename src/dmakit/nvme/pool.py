"""Descriptor pools: small blocks of coherent memory for PRP lists and SGL segments.

A pool has blocks of one size: 256 bytes (32 PRP entries or 16 SGL descriptors) or one 4 KiB page. It grows by one
coherent page and never gives pages back before it is destroyed, like the kernel's ``dma_pool``. The device
reaches a block at its DMA address; the CPU writes its words, the same bytes as 64-bit words. Blocks are
naturally aligned, so a block never crosses a controller page.

A block is a number: where it is, whether it is out, and which one follows it in the list of a request stands in
arrays, so that a batch takes and returns blocks without the GIL and without a Python object a block. A ``Block`` is a
view of one, for those who write to it by hand. Only a new page needs Python.

Blocks are not cleared when they are handed out: whoever takes one writes the entries it announces.

Models ``mm/dmapool.c`` as ``drivers/nvme/host/pci.c`` uses it (``descriptor_pools``, ``NVME_SMALL_POOL_SIZE``).
"""

from __future__ import annotations

from array import array
from typing import NamedTuple, Protocol

import cython

from dmakit.errors import DmakitError, ExhaustedError, MisuseError
from dmakit.iova.arguments import words as as_words

if not cython.compiled:
    from dmakit.consts import EINVAL, L_DESCRIPTOR_PAGES, PAGE_SIZE
    from dmakit.failpoint import FailPoint
    from dmakit.ledger import Ledger

SMALL_BYTES = 256
LARGE_BYTES = 4096
_END = -1
_IDLE = -2


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


class Block(NamedTuple):
    """A view of one block of a pool: its number there, DMA address, words, size in bytes."""

    number: int
    addr: int
    words: memoryview[int]
    size: int


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
        self.error: DmakitError | None = None
        self._forget()

    def _forget(self) -> None:
        """No pages, no blocks."""
        self.pages: list[CoherentPage] = []
        self.views: list[memoryview[int]] = []
        self.count = 0
        self.used = 0
        self.idle_count = 0
        self.addrs = memoryview(array("Q"))
        self.places = memoryview(array("Q"))
        self.following = memoryview(array("q"))
        self.idle = memoryview(array("q"))

    # Internals ----------------------------------------------------------------------------------------------

    def _alloc(self) -> cython.Py_ssize_t:
        """The number of a block, the end of a chain of its own; −1 without memory (``_lacking`` says why)."""
        block: cython.Py_ssize_t
        self.refused = self.fail._hit()
        if self.refused or (self.idle_count == 0 and self._grow() != 0):
            return -1
        self.idle_count -= 1
        block = self.idle[self.idle_count]
        self.following[block] = _END
        self.used += 1
        self.ledger.counts[L_DESCRIPTOR_PAGES] += 1
        return block

    def _grow(self) -> cython.int:
        """``grow``; −1, with the exception kept, when there is no page."""
        try:
            self.grow()
        except DmakitError as error:
            self.error = error
            return -1
        return 0

    def _lacking(self) -> DmakitError:
        """Why the last ``_alloc`` gave no block."""
        if self.refused or self.error is None:
            return ExhaustedError(f"descriptor pool of {self.size}-byte blocks: no memory")
        return self.error

    def _held(self, block: cython.Py_ssize_t) -> cython.bint:
        """Whether there is such a block, and it is out."""
        return 0 <= block < self.count and self.following[block] != _IDLE

    def _free(self, block: cython.Py_ssize_t) -> cython.int:
        """Take a block back; −EINVAL when it is not out."""
        if not self._held(block):
            return -EINVAL
        self.following[block] = _IDLE
        self.used -= 1
        self.idle[self.idle_count] = block
        self.idle_count += 1
        return 0

    def _free_chain(self, block: cython.Py_ssize_t) -> cython.int:
        """Take ``block`` and all that follow it back; −EINVAL when one of them is not out."""
        after: cython.Py_ssize_t
        while block != _END:
            if not self._held(block):
                return -EINVAL
            after = self.following[block]
            self._free(block)
            block = after
        return 0

    def _view(self, block: cython.Py_ssize_t) -> memoryview[int]:
        """The words of a block."""
        per_page: cython.Py_ssize_t = PAGE_SIZE // self.size
        step: cython.Py_ssize_t = self.size >> 3
        at: cython.Py_ssize_t = block % per_page * step
        return self.views[block // per_page][at : at + step]

    # Public -------------------------------------------------------------------------------------------------

    def grow(self) -> None:
        """Add one page of blocks; the lowest block is handed out first."""
        page = self.source.page()
        words = as_words("words", page.words, writable=True)
        if len(words) < PAGE_SIZE >> 3:
            raise MisuseError(f"words: a page has {PAGE_SIZE >> 3}, not {len(words)}")
        fresh = PAGE_SIZE // self.size
        first = self.count
        self.pages.append(page)
        self.views.append(words)
        if first + fresh > len(self.addrs):
            room = max(fresh, len(self.addrs))
            self.addrs = _longer("Q", self.addrs, room)
            self.places = _longer("Q", self.places, room)
            self.following = _longer("q", self.following, room)
            self.idle = _longer("q", self.idle, room)
        for at in range(fresh):
            self.addrs[first + at] = page.addr + at * self.size
            self.places[first + at] = _place_of(words) + at * self.size
            self.following[first + at] = _IDLE
            self.idle[self.idle_count + at] = first + fresh - 1 - at
        self.count += fresh
        self.idle_count += fresh

    @property
    def blocks(self) -> list[Block]:
        """All blocks, whether they are out or not."""
        return [self.block(number) for number in range(self.count)]

    def block(self, number: int) -> Block:
        """A view of a block."""
        if not 0 <= number < self.count:
            raise MisuseError(f"block {number}: this pool has {self.count}")
        return Block(number, self.addrs[number], self._view(number), self.size)

    def chain(self, number: int) -> list[Block]:
        """The list that begins with a block that is out."""
        found: list[Block] = []
        while not found or number != _END:
            if not 0 <= number < self.count or not self._held(number):
                raise MisuseError(f"block {number}: is not out")
            found.append(self.block(number))
            number = self.following[number]
        return found

    def alloc(self) -> Block:
        """A block; ExhaustedError when no memory is left."""
        number = int(self._alloc())
        if number < 0:
            raise self._lacking()
        return self.block(number)

    def release(self, block: Block) -> None:
        """Give a block back; MisuseError when it is free already."""
        if not isinstance(block, Block) or not isinstance(block.number, int):
            raise MisuseError(f"descriptor pool: {block!r} is no block")
        if not 0 <= block.number < self.count or self.addrs[block.number] != block.addr or self._free(block.number):
            raise MisuseError(f"descriptor pool: block at {block.addr:#x} is freed twice")

    def destroy(self, lost: bool = False) -> None:
        """Give every page back; MisuseError while blocks are out, unless they are ``lost``: who held them was
        interrupted, and no device reads them any more."""
        if self.used and not lost:
            raise MisuseError(f"descriptor pool: destroyed with {self.used} blocks of {self.size} bytes in use")
        pages = self.pages
        self._forget()
        for page in pages:
            page.free()


def _longer(code: str, numbers: memoryview[int], room: int) -> memoryview[int]:
    """An array with room for more numbers at its end."""
    return memoryview(array(code, bytes(numbers) + bytes(8 * room)))


def _place_of(words: memoryview[int]) -> int:
    """Where words are in this process's memory; compiled code writes there."""
    if cython.compiled:
        first: cython.ulonglong[::1] = words
        return cython.cast(cython.ulonglong, cython.address(first[0]))
    return 0


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
