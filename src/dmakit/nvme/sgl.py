"""SGLs: writing them as Linux does, reading them as a controller does.

A *descriptor* has 16 bytes: address, 32-bit length, and in its last byte type and sub type. A *data block*
describes memory; a *bit bucket* discards data that a read would deliver; a *segment* or *last segment*
descriptor points to a list of further descriptors. The command itself carries one descriptor.

``SglWriter``: one range goes inline as a data block; otherwise the command carries a last-segment descriptor for
one list, of at most 16 descriptors in a 256-byte block and at most 256 in a page. Linux never chains further.

``SglWalker`` does no memory access of its own: ``begin`` with the command's descriptor, then as long as
``segment_bytes`` is not 0 the caller reads that many bytes at ``segment_addr`` and hands them to ``segment``.
``ranges`` or an error ``status`` come out. A range at ``BIT_BUCKET`` is data to discard.

Models ``drivers/nvme/host/pci.c`` (``nvme_pci_setup_data_sgl``) and "Scatter Gather List" of the NVM Express Base
Specification, with its error statuses.
"""

from __future__ import annotations

import errno
from array import array

import cython

from dmakit.errors import MisuseError
from dmakit.iova.arguments import pairs
from dmakit.nvme.spec import Status

if not cython.compiled:
    from dmakit.consts import EINVAL, EIO
    from dmakit.nvme.lists import ListWriter
    from dmakit.nvme.pool import DescriptorPool

BIT_BUCKET = (1 << 64) - 1
MAX_ENTRIES = 256
MAX_DESCRIPTORS = 1 << 16  # a chain longer than this is refused: it may be a loop

_PER_SMALL = 16
_MAX_DESCRIPTORS = MAX_DESCRIPTORS
_BUCKET = (1 << 64) - 1
_LAST_SEGMENT = 3 << 60
_MAX_ENTRIES = MAX_ENTRIES
_LENGTH_MASK = (1 << 32) - 1
_BAD_SEGMENT = int(Status.INVALID_SGL_SEGMENT)
_BAD_NUMBER = int(Status.INVALID_NUMBER_OF_SGL_DESCRIPTORS)
_BAD_TYPE = int(Status.SGL_DESCRIPTOR_TYPE_INVALID)
_BAD_GRAIN = int(Status.SGL_DATA_BLOCK_GRANULARITY_INVALID)
_BAD_DATA_LENGTH = int(Status.DATA_SGL_LENGTH_INVALID)
_BAD_META_LENGTH = int(Status.METADATA_SGL_LENGTH_INVALID)


@cython.final
@cython.cclass
class SglWriter(ListWriter):
    """Writes the SGL of one request at a time; ``low`` and ``high`` are the command's descriptor as two words."""

    kind = "SGL"

    def __init__(self, small: DescriptorPool, large: DescriptorPool) -> None:
        ListWriter.__init__(self, small, large)
        self.low = 0
        self.high = 0
        self.entries = 0
        self.room = 0

    def _begin(self, entries: cython.int, coalesced: cython.bint) -> cython.int:
        """Start a request of at most ``entries`` ranges (``coalesced``: they became one).

        -ENOMEM when a list cannot be had, and then there is no request; -EINVAL for more ranges than a list holds.
        """
        failed: cython.int = 0
        self._restart()
        self.room = 0
        self.entries = 0
        self.low = 0
        self.high = 0
        if entries > _MAX_ENTRIES:
            return -EINVAL
        if entries > 1 and not coalesced:
            failed = self._first(entries > _PER_SMALL)
        if failed == 0:
            self.room = 1 if coalesced else entries
        return failed

    def _feed(self, addr: cython.ulonglong, length: cython.ulonglong) -> cython.int:
        """Append a mapped range; 0, or -EIO when there are more ranges than announced."""
        if self.entries == self.room:
            return -EIO
        if self.room == 1:
            self.low = addr
            self.high = length
        else:
            self.words[2 * self.entries] = addr
            self.words[2 * self.entries + 1] = length
        self.entries += 1
        return 0

    def _finish(self) -> cython.void:
        """Point the command at the list, when there is one."""
        if self.room > 1:
            self.low = self.addr
            self.high = _LAST_SEGMENT | (16 * self.entries)

    def _look(self, chain: cython.ulonglong, entries: cython.int) -> cython.bint:
        """Find the list of a request that was written before: ``words``; False when it does not hold ``entries``."""
        block: cython.Py_ssize_t = (chain >> 1) - 1
        large: cython.bint = chain & 1 != 0
        if chain == 0 or entries < 0 or entries > (_MAX_ENTRIES if large else _PER_SMALL):
            return False
        if not (self.large._held(block) if large else self.small._held(block)):
            return False
        self._at(block, large)
        return True

    def _build(
        self, addrs: memoryview[int], lengths: memoryview[int], first: cython.Py_ssize_t, end: cython.Py_ssize_t
    ) -> cython.int:
        at: cython.Py_ssize_t = first
        failed: cython.int
        while at < end:
            if addrs[at] >> 63 != 0 or lengths[at] == 0 or lengths[at] > _LENGTH_MASK:
                self._begin(0, True)
                return -EIO
            at += 1
        if end - first < 1 or end - first > _MAX_ENTRIES:
            self._begin(0, True)
            return -EIO
        failed = self._begin(end - first, False)
        at = first
        while at < end and failed == 0:
            failed = self._feed(addrs[at], lengths[at])
            at += 1
        self._finish()
        return failed

    def _word(self, high: cython.bint) -> cython.ulonglong:
        return self.high if high else self.low

    def _kept(self) -> tuple[int, ...]:
        return self.low, self.high, self.entries, self.room, self.chain, self.tail

    def _restore(self, kept: tuple[int, ...]) -> None:
        self.low, self.high, self.entries, self.room, self.chain, self.tail = kept
        self._reopened()

    def _refused(self, at: int) -> MisuseError:
        return MisuseError(
            f"SGL: request {at}: it must have 1 to {MAX_ENTRIES} ranges of 1 to 2^32 - 1 bytes below 2^63", errno.EIO
        )

    def begin(self, entries: int, coalesced: bool = False) -> None:
        """Start a request that has up to ``entries`` ranges; ExhaustedError, the writer as it was, without memory."""
        _counted(entries)
        before = self._kept()
        if self._begin(entries, coalesced) != 0:
            self._restore(before)
            raise self._lacking()

    def feed(self, addr: int, length: int) -> None:
        """Append the mapped range [addr, addr+length)."""
        _checked(addr, length)
        self._writing()
        if self._feed(addr, length):
            raise MisuseError(f"SGL: more ranges than the {self.room} announced", errno.EIO)

    def build(self, ranges: list[tuple[int, int]]) -> tuple[int, int, int]:
        """(low word, high word, chain of list blocks) for the ranges, (address, bytes) pairs, of one request.

        MisuseError for a range or a number of ranges that an SGL cannot hold, ExhaustedError without memory for a
        list; the blocks are then given back, and the writer is as it was.
        """
        given = pairs("ranges", ranges)
        _counted(len(given))
        for addr, length in given:
            _checked(addr, length)
        before = self._kept()
        addrs, lengths = (memoryview(array("Q", column)) for column in zip(*given, strict=True))
        if self._build(addrs, lengths, 0, len(given)) != 0:
            self._restore(before)
            raise self._lacking()
        return self.low, self.high, self.chain


def _counted(entries: int) -> None:
    """MisuseError for a number of ranges that one list does not hold."""
    if not 1 <= entries <= MAX_ENTRIES:
        raise MisuseError(f"SGL: entries={entries}: must lie in [1, {MAX_ENTRIES}]")


def _checked(addr: int, length: int) -> None:
    """MisuseError for what is no range."""
    if not 0 <= addr < 1 << 63 or not 0 < length < 1 << 32:
        raise MisuseError(f"SGL: range (addr={addr:#x}, length={length}): addr in [0, 2^63), length in [1, 2^32)")


@cython.final
@cython.cclass
class SglWalker:
    """Reads the SGL of one command. ``dword``: blocks must be multiples of 4; ``bit_bucket`` and ``longer`` (an SGL
    that describes more than the data) as the controller announces them in SGLS."""

    def __init__(self, *, dword: bool = False, bit_bucket: bool = False, longer: bool = False) -> None:
        self.dword = dword
        self.bit_bucket = bit_bucket
        self.longer = longer
        self.addr = memoryview(array("Q", bytes(8 * 64)))
        self.length = memoryview(array("Q", bytes(8 * 64)))
        self.space = 64
        self._begin(0, 0, 0, True, False)

    def _begin(
        self,
        low: cython.ulonglong,
        high: cython.ulonglong,
        size: cython.ulonglong,
        to_host: cython.bint,
        metadata: cython.bint,
    ) -> cython.int:
        """Take the command's descriptor for ``size`` bytes."""
        self.count = 0
        self.left = size
        self.segment_addr = 0
        self.segment_bytes = 0
        self.descriptors = 0
        self.last = False
        self.discard = to_host
        self.short_status = _BAD_META_LENGTH if metadata else _BAD_DATA_LENGTH
        self.status = 0
        if size == 0:
            return 0
        self.status = self._descriptor(low, high, True)
        self._close()
        return 0

    def _descriptor(self, low: cython.ulonglong, high: cython.ulonglong, final: cython.bint) -> cython.int:
        """One descriptor; ``final``: it is the last one of its segment. Returns a status."""
        kind: cython.ulonglong = high >> 56
        length: cython.ulonglong = high & _LENGTH_MASK
        self.descriptors += 1
        if self.descriptors > _MAX_DESCRIPTORS:
            return _BAD_NUMBER
        if kind & 15 != 0:
            return _BAD_TYPE
        kind >>= 4
        if kind == 0:
            return self._data(low, length, False)
        if kind == 1:
            return self._data(low, length, True) if self.bit_bucket else _BAD_TYPE
        if kind > 3:
            return _BAD_TYPE
        if not final:
            return _BAD_NUMBER
        return self._point(low, length, kind == 3)

    def _point(self, addr: cython.ulonglong, length: cython.ulonglong, last: cython.bint) -> cython.int:
        """A (last) segment descriptor: ask for the segment."""
        if self.last or length == 0 or length & 15 != 0 or addr & 7 != 0:
            return _BAD_SEGMENT
        self.last = last
        self.segment_addr = addr
        self.segment_bytes = length
        return 0

    def _data(self, addr: cython.ulonglong, length: cython.ulonglong, bucket: cython.bint) -> cython.int:
        """A data block or a bit bucket of ``length`` bytes (0 is allowed and describes nothing)."""
        if self.dword and (length & 3 != 0 or (addr & 3 != 0 and not bucket)):
            return _BAD_GRAIN
        if bucket and not self.discard:
            return 0
        if length > self.left:
            if not self.longer:
                return self.short_status
            length = self.left
        if length > 0:
            self._append(_BUCKET if bucket else addr, length)
            self.left -= length
        return 0

    def _append(self, addr: cython.ulonglong, length: cython.ulonglong) -> cython.int:
        """Add a range."""
        if self.count == self.space:
            self._grow()
        self.addr[self.count] = addr
        self.length[self.count] = length
        self.count += 1
        return 0

    def _grow(self) -> cython.int:
        """Double the arrays."""
        self.addr = memoryview(array("Q", bytes(self.addr) + bytes(8 * self.space)))
        self.length = memoryview(array("Q", bytes(self.length) + bytes(8 * self.space)))
        self.space *= 2
        return 0

    def _enter(self) -> cython.void:
        """Begin with the segment asked for: its descriptors come in one ``_part`` or several."""
        self.was_last = self.last
        self.segment_bytes = 0

    def _part(self, words: memoryview[int], count: cython.Py_ssize_t, final: cython.bint) -> cython.int:
        """Take ``count`` descriptors; ``final``: with them the segment ends. Returns the status."""
        at: cython.Py_ssize_t = 0
        while at < count:
            self.status = self._descriptor(words[2 * at], words[2 * at + 1], final and at == count - 1)
            if self.status != 0:
                self.segment_bytes = 0
                return self.status
            at += 1
        if final:
            if not self.was_last and self.segment_bytes == 0:
                self.status = _BAD_SEGMENT
            self._close()
        return self.status

    def _close(self) -> cython.void:
        """At the end of the chain the data must be described in full; after an error nothing more is read."""
        if self.status != 0:
            self.segment_bytes = 0
        elif self.segment_bytes == 0 and self.left > 0:
            self.status = self.short_status

    def begin(self, low: int, high: int, size: int, *, to_host: bool, metadata: bool = False) -> None:
        """Start reading: the command's descriptor as two 64-bit words, for ``size`` bytes."""
        if size < 0 or not 0 <= low < 1 << 64 or not 0 <= high < 1 << 64:
            raise MisuseError(
                f"SGL: low={low:#x}, high={high:#x}, size={size}: words have 64 bits, size is not negative"
            )
        self._begin(low, high, size, to_host, metadata)

    def segment(self, payload: bytes) -> None:
        """The ``segment_bytes`` bytes that were read at ``segment_addr``."""
        if len(payload) != self.segment_bytes or not payload:
            raise MisuseError(f"SGL segment: {len(payload)} bytes given, {self.segment_bytes} asked for")
        self._enter()
        self._part(memoryview(array("Q", payload)), len(payload) >> 4, True)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(address, length) pairs; a range at ``BIT_BUCKET`` is to be discarded."""
        return [(self.addr[i], self.length[i]) for i in range(self.count)]
