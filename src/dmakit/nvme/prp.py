"""PRP lists: writing them as Linux does, reading them as a controller does.

A *PRP entry* (physical region page) is a 64-bit address that describes memory up to the end of its controller
page (4 KiB). PRP1 may point anywhere into a page; every other entry has page offset 0. A command has two
entries: when the data needs a third, PRP2 becomes the address of a *list*; when a list of 512 entries is not
enough, its last entry becomes the address of the next list page.

``PrpWriter`` is fed the mapped ranges of a request one after the other, while they are mapped (one pass):
``begin(total)``, ``feed(addr, length)`` …, then ``prp1``, ``prp2`` and ``blocks`` (list pages, in chain order) are
ready. A list that needs at most 32 entries lives in a 256-byte block. When the 513th entry comes, the 512th
moves to a new page and its slot becomes the link.

``PrpWalker`` does no memory access of its own: ``begin(prp1, prp2, size)``, then as long as ``list_entries`` is not
0 the caller reads that many words at ``list_addr`` and hands them to ``list_words``. ``ranges`` (neighbouring pages
joined) or an error ``status`` come out.

Models ``drivers/nvme/host/pci.c`` (``nvme_pci_setup_data_prp``) and "Physical Region Page Entry and List" of the
NVM Express Base Specification.
"""

from __future__ import annotations

import errno
from array import array

import cython

from dmakit.errors import MisuseError
from dmakit.iova.arguments import pairs
from dmakit.nvme.spec import Status

if not cython.compiled:
    from dmakit.consts import EIO, ENOMEM, PAGE_MASK_LOW, PAGE_SIZE
    from dmakit.nvme.lists import ListWriter
    from dmakit.nvme.pool import DescriptorPool

_PER_SMALL = 32
_MAX_TOTAL = (1 << 32) - 1
_BAD_OFFSET = int(Status.PRP_OFFSET_INVALID)


def entries_needed(addr: int, size: int) -> int:
    """PRP entries that ``size`` bytes at DMA address ``addr`` take, PRP1 included."""
    return ((addr & 4095) + size + 4095) >> 12


def _run(words: memoryview[int], count: cython.Py_ssize_t, addr: cython.ulonglong) -> cython.void:
    """``count`` entries: the pages from ``addr`` upwards."""
    i: cython.Py_ssize_t = 0
    while i < count:
        words[i] = addr
        addr += PAGE_SIZE
        i += 1


@cython.final
@cython.cclass
class PrpWriter(ListWriter):
    """Writes the PRPs of one request at a time into blocks of the two pools."""

    kind = "PRP"

    def __init__(self, small: DescriptorPool, large: DescriptorPool) -> None:
        ListWriter.__init__(self, small, large)
        self._begin(0)

    def _begin(self, total: cython.ulonglong) -> cython.void:
        """Start a request of ``total`` bytes; forgets the blocks of the one before (they belong to its owner)."""
        self._restart()
        self.prp1 = 0
        self.prp2 = 0
        self.left = total
        self.entries = 0
        self.slot = 0
        self.stage = 0

    def _feed(self, addr: cython.ulonglong, length: cython.ulonglong) -> cython.int:
        """Append a mapped range; 0, or -EIO when the ranges do not meet on pages or exceed the total, or -ENOMEM when a
        list page cannot be had (``chain`` then holds what was taken before)."""
        take: cython.ulonglong
        failed: cython.int
        while length > 0:
            if self.stage == 2 and addr & PAGE_MASK_LOW == 0:
                take = self._pages(addr, length if length < self.left else self.left)
                addr += take
                length -= take
                if length == 0:
                    break
            take = PAGE_SIZE - (addr & PAGE_MASK_LOW)
            if take > self.left:
                take = self.left
            if take == 0 or length < take or (self.stage != 0 and addr & PAGE_MASK_LOW != 0):
                return -EIO
            if self.stage == 0:
                self.prp1 = addr
                self.stage = 1
            elif self.stage == 1 and self.left <= PAGE_SIZE:
                self.prp2 = addr
            else:
                failed = 0
                if self.stage == 1:
                    failed = self._open()
                elif self.slot == 512:
                    failed = self._chain()
                if failed != 0:
                    return failed
                self.words[self.slot] = addr
                self.slot += 1
            self.entries += 1
            addr += take
            length -= take
            self.left -= take
        return 0

    def _pages(self, addr: cython.ulonglong, length: cython.ulonglong) -> cython.ulonglong:
        """Write the whole pages of a range into what is free of the list block; returns their bytes."""
        count: cython.Py_ssize_t = length >> 12
        if count > 512 - self.slot:
            count = 512 - self.slot
        if count <= 0:
            return 0
        if cython.compiled:
            _run(self.words + self.slot, count, addr)
        else:
            _run(self.words[self.slot :], count, addr)
        self.slot += count
        self.entries += count
        length = count
        length <<= 12
        self.left -= length
        return length

    def _open(self) -> cython.int:
        """Take the first list block; small when everything that is left fits in it."""
        failed: cython.int = self._first((self.left + PAGE_MASK_LOW) >> 12 > _PER_SMALL)
        if failed == 0:
            self.prp2 = self.addr
            self.stage = 2
        return failed

    def _chain(self) -> cython.int:
        """Take another list page: the last entry moves there, the link takes its place."""
        before: cython.Py_ssize_t = self.tail
        moved: cython.ulonglong = self.words[511]
        failed: cython.int = self._further()
        if failed == 0:
            self._link(before, self.addr)
            self.words[0] = moved
            self.slot = 1
        return failed

    def _link(self, block: cython.Py_ssize_t, addr: cython.ulonglong) -> cython.void:
        """Point a full list page to the next."""
        if cython.compiled:
            cython.cast("unsigned long long*", self.large.places[block])[511] = addr
        else:
            self.large._view(block)[511] = addr

    def _build(
        self, addrs: memoryview[int], lengths: memoryview[int], first: cython.Py_ssize_t, end: cython.Py_ssize_t
    ) -> cython.int:
        at: cython.Py_ssize_t = first
        total: cython.ulonglong = 0
        failed: cython.int = 0
        while at < end:
            total += lengths[at]
            if addrs[at] >> 63 != 0 or lengths[at] == 0 or lengths[at] > _MAX_TOTAL or total > _MAX_TOTAL:
                failed = -EIO
                break
            at += 1
        self._begin(total)
        if failed != 0 or total == 0:
            return -EIO
        at = first
        while at < end and failed == 0:
            self.at = at
            failed = self._feed(addrs[at], lengths[at])
            at += 1
        return failed

    def _word(self, high: cython.bint) -> cython.ulonglong:
        return self.prp2 if high else self.prp1

    def _kept(self) -> tuple[int, ...]:
        return self.prp1, self.prp2, self.left, self.entries, self.slot, self.stage, self.chain, self.tail

    def _restore(self, kept: tuple[int, ...]) -> None:
        self.prp1, self.prp2, self.left, self.entries, self.slot, self.stage, self.chain, self.tail = kept
        self._reopened()

    def _refused(self, at: int) -> MisuseError:
        return MisuseError(
            f"PRP: request {at}: its bounds are wrong, or its ranges do not meet on 4096-byte pages below 2^63",
            errno.EIO,
        )

    def begin(self, total: int) -> None:
        """Start a request of ``total`` bytes."""
        if total <= 0 or total >= 1 << 32:
            raise MisuseError(f"PRP: total={total}: must lie in [1, 2^32)")
        self._begin(total)

    def feed(self, addr: int, length: int) -> None:
        """Append the mapped range [addr, addr+length).

        A range that is refused leaves the request as it was. After an ExhaustedError begin anew: ``chain`` is what to
        ``drop``.
        """
        _checked(addr, length)
        self._writing()
        begins = self.stage == 0 or addr & PAGE_MASK_LOW == 0
        ends = length == self.left or (addr + length) & PAGE_MASK_LOW == 0
        if length > self.left or not begins or not ends:
            raise _discontinuous(addr, length)
        failed = int(self._feed(addr, length))
        if failed == -ENOMEM:
            raise self._lacking()
        if failed != 0:
            raise _discontinuous(addr, length)

    def build(self, ranges: list[tuple[int, int]]) -> tuple[int, int, int]:
        """(PRP1, PRP2, chain of list blocks) for the ranges, (address, bytes) pairs, of one request.

        MisuseError (EIO where ranges do not meet on pages), ExhaustedError without memory for a list; the blocks are
        then given back, and the writer is as it was.
        """
        given = pairs("ranges", ranges)
        total = sum(length for _, length in given)
        if total <= 0 or total >= 1 << 32:
            raise MisuseError(f"PRP: total={total}: must lie in [1, 2^32)")
        for addr, length in given:
            _checked(addr, length)
        before = self._kept()
        addrs, lengths = (memoryview(array("Q", column)) for column in zip(*given, strict=True))
        failed = int(self._build(addrs, lengths, 0, len(given)))
        if failed != 0:
            error = self._lacking() if failed == -ENOMEM else _discontinuous(*given[self.at])
            self._drop(self.chain)
            self._restore(before)
            raise error
        return self.prp1, self.prp2, self.chain


def _checked(addr: int, length: int) -> None:
    """MisuseError for what is no range."""
    if not 0 <= addr < 1 << 63 or length <= 0 or length >= 1 << 32:
        raise MisuseError(f"PRP: range (addr={addr:#x}, length={length}): addr must lie in [0, 2^63), length above 0")


def _discontinuous(addr: int, length: int) -> MisuseError:
    """A range that the request cannot go on with."""
    return MisuseError(
        f"PRP: range (addr={addr:#x}, length={length}) does not continue the request: ranges must meet on 4096-byte "
        f"pages and stay within the total",
        errno.EIO,
    )


@cython.final
@cython.cclass
class PrpWalker:
    """Reads the PRPs of one command; see the head of the module for the dialogue."""

    def __init__(self) -> None:
        self.addr = memoryview(array("Q", bytes(8 * 64)))
        self.length = memoryview(array("Q", bytes(8 * 64)))
        self.room = 64
        self._begin(0, 0, 0)

    def _begin(self, prp1: cython.ulonglong, prp2: cython.ulonglong, size: cython.ulonglong) -> cython.int:
        """Take the command's entries for ``size`` bytes."""
        self.count = 0
        self.left = size
        self.list_addr = 0
        self.list_entries = 0
        self.status = 0
        if size == 0:
            return 0
        if prp1 & 3 != 0:
            self.status = _BAD_OFFSET
            return 0
        self._entry(prp1)
        if self.left == 0:
            return 0
        if self.left <= PAGE_SIZE:
            if prp2 & PAGE_MASK_LOW != 0:
                self.status = _BAD_OFFSET
            else:
                self._entry(prp2)
        elif prp2 & 7 != 0:
            self.status = _BAD_OFFSET
        else:
            self._want(prp2)
        return 0

    def _entry(self, addr: cython.ulonglong) -> cython.int:
        """Memory from ``addr`` to the end of its page, or of the data."""
        take: cython.ulonglong = PAGE_SIZE - (addr & PAGE_MASK_LOW)
        if take > self.left:
            take = self.left
        if self.count > 0 and addr != 0 and self.addr[self.count - 1] + self.length[self.count - 1] == addr:
            self.length[self.count - 1] += take
        else:
            if self.count == self.room:
                self._grow()
            self.addr[self.count] = addr
            self.length[self.count] = take
            self.count += 1
        self.left -= take
        return 0

    def _want(self, addr: cython.ulonglong) -> cython.void:
        """Ask for the entries of the list at ``addr``: all that are needed, or all up to the end of its page."""
        needed: cython.ulonglong = (self.left + PAGE_MASK_LOW) >> 12
        room: cython.ulonglong = (PAGE_SIZE - (addr & PAGE_MASK_LOW)) >> 3
        self.list_addr = addr
        self.list_entries = needed if needed < room else room

    def _list(self, words: memoryview[int]) -> cython.int:
        """Take the entries asked for."""
        at: cython.int = 0
        entries: cython.int = self.list_entries
        self.list_entries = 0
        while at < entries:
            if words[at] & PAGE_MASK_LOW != 0:
                self.status = _BAD_OFFSET
                return 0
            if at == entries - 1 and self.left > PAGE_SIZE:
                self._want(words[at])
                return 0
            self._entry(words[at])
            at += 1
        return 0

    def _grow(self) -> cython.int:
        """Double the arrays."""
        self.addr = memoryview(array("Q", bytes(self.addr) + bytes(8 * self.room)))
        self.length = memoryview(array("Q", bytes(self.length) + bytes(8 * self.room)))
        self.room *= 2
        return 0

    def begin(self, prp1: int, prp2: int, size: int) -> None:
        """Start reading a command's PRPs that describe ``size`` bytes."""
        if size < 0 or not 0 <= prp1 < 1 << 64 or not 0 <= prp2 < 1 << 64:
            raise MisuseError(
                f"PRP: prp1={prp1:#x}, prp2={prp2:#x}, size={size}: entries have 64 bits, size is not negative"
            )
        self._begin(prp1, prp2, size)

    def list_words(self, payload: bytes) -> None:
        """The ``list_entries`` words that were read at ``list_addr``."""
        if len(payload) != 8 * self.list_entries or not self.list_entries:
            raise MisuseError(f"PRP list: {len(payload)} bytes given, {8 * self.list_entries} asked for")
        self._list(memoryview(array("Q", payload)))

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(address, length) pairs; neighbouring pages are joined."""
        return [(self.addr[i], self.length[i]) for i in range(self.count)]
