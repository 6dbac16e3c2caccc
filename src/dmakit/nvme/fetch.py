"""A controller's half of data pointers: from what commands say to ranges of memory, lists read through a port.

``DescriptorReader`` has a device's port and both walkers (``nvme.prp``, ``nvme.sgl``). Lists are memory of the host:
they are fetched as any other access of the device, so translated, counted and blocked like one. A list that is blocked
ends the command with Data Transfer Error; ``fault`` is then the error of the access. A form or a size that no command
has (more than 2^32 bytes) is an Invalid Field.

``read`` is for one command. ``read_batch`` is for many, in columns: without a Python object a command, and without the
GIL where the port is one of ours (``iommu.port``); another kind of port, anything with ``read``, is asked with it.
"""

from __future__ import annotations

from array import array
from typing import Protocol

import cython

from dmakit.errors import FaultError, MisuseError
from dmakit.iova.arguments import apart, within, words
from dmakit.nvme.spec import Status

if not cython.compiled:
    from dmakit.consts import EIO, PSDT_PRP, PSDT_SGL_METASEG
    from dmakit.iommu.port import Port
    from dmakit.nvme.prp import PrpWalker
    from dmakit.nvme.sgl import SglWalker
    from dmakit.turn import Turn

_TRANSFER_ERROR = int(Status.DATA_TRANSFER_ERROR)
_INVALID_FIELD = int(Status.INVALID_FIELD)
_BUFFER = 512
_MOST_BYTES = 1 << 32
_ALL_ONES = (1 << 64) - 1


class Source(Protocol):
    """Where lists are read."""

    def read(self, iova: int, size: int) -> bytes:
        """``size`` bytes; FaultError when the access is blocked."""


@cython.final
@cython.cclass
class DescriptorReader:
    """Reads data pointers. ``dword``, ``bit_bucket``, ``longer``: what the controller announces (``SglWalker``)."""

    def __init__(self, port: Source, *, dword: bool = False, bit_bucket: bool = False, longer: bool = False) -> None:
        self.port = port
        self.own = port if isinstance(port, Port) else None
        self.turn = Turn() if self.own is None else self.own.turn
        self.prp = PrpWalker()
        self.sgl = SglWalker(dword=dword, bit_bucket=bit_bucket, longer=longer)
        self.words = memoryview(array("Q", bytes(8 * _BUFFER)))
        self.by_prp = True
        self.fault: FaultError | None = None
        self.refused = False
        self._clear(0)

    def _clear(self, room: int) -> None:
        """Empty columns with room for so many ranges."""
        self.addrs = memoryview(array("Q", bytes(8 * room)))
        self.lengths = memoryview(array("Q", bytes(8 * room)))
        self.room = room
        self.used = 0

    # Internals ----------------------------------------------------------------------------------------------

    def _read(
        self,
        form: cython.ulonglong,
        low: cython.ulonglong,
        high: cython.ulonglong,
        size: cython.ulonglong,
        to_host: cython.bint,
        metadata: cython.bint,
    ) -> cython.int:
        """Status of one command's pointer (0 = its ranges are in the walker of its form)."""
        self.by_prp = form == PSDT_PRP
        self.refused = False
        if form > PSDT_SGL_METASEG or size > _MOST_BYTES:
            return _INVALID_FIELD
        return self._read_prps(low, high, size) if self.by_prp else self._read_sgl(low, high, size, to_host, metadata)

    def _read_prps(self, prp1: cython.ulonglong, prp2: cython.ulonglong, size: cython.ulonglong) -> cython.int:
        self.prp._begin(prp1, prp2, size)
        while self.prp.list_entries != 0 and self.prp.status == 0:
            if self._fetch(self.prp.list_addr, self.prp.list_entries) != 0:
                return _TRANSFER_ERROR
            self.prp._list(self.words)
        return self.prp.status

    def _read_sgl(
        self,
        low: cython.ulonglong,
        high: cython.ulonglong,
        size: cython.ulonglong,
        to_host: cython.bint,
        metadata: cython.bint,
    ) -> cython.int:
        addr: cython.ulonglong
        left: cython.ulonglong
        take: cython.Py_ssize_t
        self.sgl._begin(low, high, size, to_host, metadata)
        while self.sgl.segment_bytes != 0 and self.sgl.status == 0:
            addr = self.sgl.segment_addr
            left = self.sgl.segment_bytes >> 4
            self.sgl._enter()
            while left > 0 and self.sgl.status == 0:
                take = _BUFFER >> 1 if left > _BUFFER >> 1 else left
                if self._fetch(addr, 2 * take) != 0:
                    return _TRANSFER_ERROR
                left -= take
                addr += 16 * take
                self.sgl._part(self.words, take, left == 0)
        return self.sgl.status

    def _fetch(self, addr: cython.ulonglong, count: cython.Py_ssize_t) -> cython.int:
        """``count`` words of a list at ``addr`` into ``words``; −EIO when the access is blocked."""
        size: cython.ulonglong = count << 3
        failed: cython.int
        if size - 1 > _ALL_ONES - addr:  # beyond the last address
            return -EIO
        if self.own is None:
            return self._ask(addr, size)
        if cython.compiled:
            failed = self.own._take(addr, cython.cast("unsigned char*", cython.address(self.words[0])), size)
        else:
            failed = self.own._take(addr, self.words.cast("B"), size)
        self.refused = failed != 0
        return failed

    def _ask(self, addr: cython.ulonglong, size: cython.ulonglong) -> cython.int:
        """``_fetch`` by a port that is not ours."""
        try:
            payload = self.port.read(addr, size)
        except FaultError as error:
            self.fault = error
            return -EIO
        if len(payload) != size:
            raise MisuseError(f"port: read gave {len(payload)} bytes, {size} were asked for")
        for at, word in enumerate(memoryview(array("Q", payload))):
            self.words[at] = word
        return 0

    def _add(self) -> cython.int:
        """Append the ranges of the command just read to the columns."""
        count: cython.Py_ssize_t = self.prp.count if self.by_prp else self.sgl.count
        at: cython.Py_ssize_t = 0
        while self.used + count > self.room:
            self._widen()
        while at < count:
            self.addrs[self.used] = self.prp.addr[at] if self.by_prp else self.sgl.addr[at]
            self.lengths[self.used] = self.prp.length[at] if self.by_prp else self.sgl.length[at]
            self.used += 1
            at += 1
        return 0

    def _widen(self) -> cython.int:
        """Double the columns."""
        more = bytes(8 * max(64, self.room))
        self.addrs = memoryview(array("Q", bytes(self.addrs) + more))
        self.lengths = memoryview(array("Q", bytes(self.lengths) + more))
        self.room += len(more) >> 3
        return 0

    def _run(
        self,
        forms: memoryview[int],
        pointers: memoryview[int],
        sizes: memoryview[int],
        bounds: memoryview[int],
        statuses: memoryview[int],
        count: cython.Py_ssize_t,
        to_host: cython.bint,
    ) -> cython.int:
        """Read ``count`` pointers into the columns."""
        i: cython.Py_ssize_t = 0
        status: cython.int
        with cython.nogil:
            bounds[0] = 0
            while i < count:
                status = self._read(forms[i], pointers[2 * i], pointers[2 * i + 1], sizes[i], to_host, False)
                if status == 0:
                    self._add()
                statuses[i] = status
                bounds[i + 1] = self.used
                i += 1
        return 0

    # Public -------------------------------------------------------------------------------------------------

    def read(self, form: int, low: int, high: int, size: int, *, to_host: bool, metadata: bool = False) -> int:
        """Status of a command's data pointer of form ``consts.PSDT_*`` for ``size`` bytes; 0: ``ranges`` has them."""
        for name, word in (("form", form), ("low", low), ("high", high), ("size", size)):
            within(name, word, 0, (1 << 64) - 1)
        self.fault = None
        status = int(self._read(form, low, high, size, to_host, metadata))
        if self.refused and self.own is not None:
            self.fault = self.own._refusal(self.own.stopped, False)
        return status

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(address, length) pairs of the command read last; a range at ``sgl.BIT_BUCKET`` is to be discarded."""
        return list(self.prp.ranges if self.by_prp else self.sgl.ranges)

    def read_batch(
        self, forms: object, pointers: object, sizes: object, bounds: object, statuses: object, *, to_host: bool
    ) -> tuple[memoryview[int], memoryview[int]]:
        """The data pointers of many commands: (addresses, lengths) of all ranges, in arrays of their own.

        Buffers of 64-bit words, an item a command: ``forms`` (``consts.PSDT_*``), ``pointers`` (two words each),
        ``sizes`` in bytes. The ranges of command i are those from ``bounds[i]`` to ``bounds[i+1]`` − 1; ``statuses[i]``
        is its status, and with one that is not 0 it has no ranges. What is written must not overlap another array.
        """
        kinds, places, totals = words("forms", forms), words("pointers", pointers), words("sizes", sizes)
        edges, found = words("bounds", bounds, writable=True), words("statuses", statuses, writable=True)
        count = len(kinds)
        for name, there, needed in (
            ("pointers", places, 2 * count),
            ("sizes", totals, count),
            ("bounds", edges, count + 1),
            ("statuses", found, count),
        ):
            if len(there) < needed:
                raise MisuseError(f"{name}: has {len(there)} words, at least {needed} are needed")
        apart("bounds", edges, forms=kinds, pointers=places, sizes=totals, statuses=found)
        apart("statuses", found, forms=kinds, pointers=places, sizes=totals)
        with self.turn:
            self.fault = None
            self._clear(count)
            self._run(kinds, places, totals, edges, found, count, to_host)
            addrs, lengths, used = memoryview(self.addrs), memoryview(self.lengths), self.used
            self._clear(0)
        return addrs[:used], lengths[:used]
