"""The bytes of a request: the application fills or reads its buffer, the device moves the data by translated DMA.

The device finds its ranges in the descriptors (``nvme.fetch``) and reads or writes there through its own port,
page by page; so a wrong address, a missing mapping or a stale translation shows in the bytes. Every byte is compared:
equal memory by one ``memcmp``, bytes that differ are counted one by one.

Memory is reached directly when the CPU has no cache model in front of it and nobody watches the device; else through
the scalar calls (``CpuCache``, ``Device.dma_read`` with its checker).
"""

from __future__ import annotations

from typing import Any

import cython

from dmakit.errors import FaultError
from dmakit.lab.pattern import Pattern

if cython.compiled:
    from cython.cimports.libc.string import memcmp, memcpy
else:
    from dmakit.consts import PSDT_PRP
    from dmakit.dma.device import Device
    from dmakit.lab.flight import Columns, Flight
    from dmakit.nvme.fetch import DescriptorReader


def count_wrong(
    expected: cython.p_const_uchar, found: cython.p_const_uchar, size: cython.ulonglong
) -> cython.ulonglong:
    """How many of ``size`` bytes differ (interpreted: of two memoryviews)."""
    wrong: cython.ulonglong = 0
    i: cython.ulonglong
    if cython.compiled:
        if memcmp(expected, found, size) == 0:
            return 0
    elif bytes(expected[:size]) == bytes(found[:size]):
        return 0
    for i in range(size):
        wrong += expected[i] != found[i]
    return wrong


def _put(into: memoryview[int], at: cython.ulonglong, payload: bytes) -> cython.int:
    """Bytes of a scalar call to byte ``at`` of a buffer."""
    if cython.compiled:
        source: cython.const[cython.uchar][::1] = payload
        memcpy(cython.address(into[at]), cython.address(source[0]), len(source))
    else:
        into[at : at + len(payload)] = payload
    return 0


class Watched:
    """A device's reads of lists, under the eyes of its checker."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def read(self, iova: int, size: int) -> bytes:
        """``Device.dma_read``."""
        payload: bytes = self.device.dma_read(iova, size)
        return payload


@cython.cclass
class DataPath:
    """Moves and checks the bytes of flights; ``cache``: the CPU's, on a machine whose devices do not snoop."""

    def __init__(self, device: Device, cache: Any, columns: Columns, pattern: Pattern) -> None:
        self.device = device
        self.port = device.port
        self.cache = cache
        self.memory = device.memory
        self.columns = columns
        self.reader = DescriptorReader(device.port if device.checker is None else Watched(device))
        self.pattern = pattern.bytes
        self.stride = pattern.stride
        self.window = pattern.window
        self.found = memoryview(bytearray(pattern.largest + 1))
        self.before = memoryview(bytearray(pattern.largest + 1))
        for phys, length in zip(columns.segments.addr, columns.segments.length, strict=True):
            self.memory.region_at(phys, length)

    def _start(self, f: Flight) -> cython.ulonglong:
        """Where the payload of a request is in the pattern."""
        return f.number * self.stride % self.window

    def _fill(self, f: Flight) -> cython.int:
        """The application writes the payload into its buffer."""
        at: cython.ulonglong = self._start(f)
        i: cython.Py_ssize_t
        for i in range(f.count):
            if self.cache is not None:
                self.cache.write(int(f.phys[i]), self.pattern[at : at + f.length[i]])
            elif cython.compiled:
                memcpy(cython.address(self.memory.data[f.phys[i]]), cython.address(self.pattern[at]), f.length[i])
            else:
                self.memory.view[f.phys[i] : f.phys[i] + f.length[i]] = self.pattern[at : at + f.length[i]]
            at += f.length[i]
        return 0

    def _holds(self, f: Flight, into: memoryview[int]) -> cython.int:
        """The application reads its buffer."""
        at: cython.ulonglong = 0
        i: cython.Py_ssize_t
        layout: cython.Py_ssize_t = f.layout
        phys: cython.ulonglong
        length: cython.ulonglong
        for i in range(self.columns.segments.bounds[layout], self.columns.segments.bounds[layout + 1]):
            phys, length = self.columns.segments.addr[i], self.columns.segments.length[i]
            if self.cache is not None:
                _put(into, at, self.cache.read(int(phys), int(length)))
            elif cython.compiled:
                memcpy(cython.address(into[at]), cython.address(self.memory.data[phys]), length)
            else:
                into[at : at + length] = self.memory.view[phys : phys + length]
            at += length
        return 0

    def _carry(self, f: Flight) -> cython.longlong:
        """The device carries the request out; returns the wrong bytes that it read. FaultError when it is blocked.

        A write's payload is what was filled in, or what its buffer holds now when somebody shares that.
        """
        at: cython.ulonglong = 0
        start: cython.ulonglong = self._start(f)
        i: cython.Py_ssize_t
        addr: cython.ulonglong
        length: cython.ulonglong
        status: cython.int
        reader: DescriptorReader = self.reader
        if f.shared and not f.reads:
            self._holds(f, self.before)
        status = reader._read(f.psdt, f.low, f.high, f.size, f.reads, False)
        if status != 0:
            raise FaultError(f"the device refuses the descriptors of a {f.size}-byte request: status {status:#x}")
        prp: cython.bint = f.psdt == PSDT_PRP
        for i in range(reader.prp.count if prp else reader.sgl.count):
            addr = reader.prp.addr[i] if prp else reader.sgl.addr[i]
            length = reader.prp.length[i] if prp else reader.sgl.length[i]
            if f.reads:
                self._deliver(addr, start + at, length)
            else:
                self._collect(addr, at, length)
            at += length
        if f.reads:
            return 0
        if f.shared:
            return self._differ(self.before, 0, f.size)
        return self._differ(self.pattern, start, f.size)

    def _arrived(self, f: Flight) -> cython.longlong:
        """How many bytes of a read are not in its buffer as they must be."""
        self._holds(f, self.found)
        return self._differ(self.pattern, self._start(f), f.size)

    def _differ(self, expected: memoryview[int], at: cython.ulonglong, size: cython.ulonglong) -> cython.longlong:
        """How many of the first ``size`` bytes of ``found`` are not as expected from ``at`` on."""
        if cython.compiled:
            return count_wrong(cython.address(expected[at]), cython.address(self.found[0]), size)
        return count_wrong(expected[at:], self.found, size)

    def _deliver(self, addr: cython.ulonglong, at: cython.ulonglong, length: cython.ulonglong) -> cython.int:
        """The device writes ``length`` bytes of the pattern from ``at`` on."""
        if self.device.checker is not None:
            self.device.dma_write(int(addr), self.pattern[at : at + length])
        elif cython.compiled:
            self.port._store(addr, cython.address(self.pattern[at]), length)
        else:
            self.port._store(addr, self.pattern[at : at + length], length)
        return 0

    def _collect(self, addr: cython.ulonglong, at: cython.ulonglong, length: cython.ulonglong) -> cython.int:
        """The device reads ``length`` bytes to byte ``at`` of ``found``."""
        if self.device.checker is not None:
            _put(self.found, at, self.device.dma_read(int(addr), int(length)))
        elif cython.compiled:
            self.port._load(addr, cython.address(self.found[at]), length)
        else:
            self.port._load(addr, self.found[at : at + length], length)
        return 0
