"""Descriptors of the lab's device: written by the driver's code, fetched by the device through its own port.

``DescriptorWriter`` turns the device ranges of any strategy into PRPs or an SGL by the NVMe driver's own rules (those
of ``nvme.listed.describe``). ``DescriptorReader`` is the device's half: it reads list blocks by translated DMA and
finds the data ranges there.
"""

from __future__ import annotations

from array import array

import cython

from dmakit.errors import FaultError, MisuseError
from dmakit.lab.flight import words
from dmakit.nvme.mapping import RequestMapper

if not cython.compiled:
    from dmakit.consts import EIO, ENOMEM, L_DESCRIPTORS, PAGE_MASK_LOW, PSDT_PRP, PSDT_SGL_METABUF
    from dmakit.dma.device import Device
    from dmakit.lab.flight import Flight
    from dmakit.nvme.lists import ListWriter
    from dmakit.nvme.prp import PrpWalker
    from dmakit.nvme.sgl import SglWalker


@cython.cclass
class DescriptorWriter:
    """Writes descriptors for ranges that are mapped already."""

    def __init__(self, mapper: RequestMapper) -> None:
        self.ledger = mapper.ledger
        self.prp = mapper.prp
        self.sgl = mapper.sgl
        self.sgl_supported = mapper.sgl_supported
        self.sgl_threshold = mapper.sgl_threshold

    def _write(self, f: Flight) -> cython.int:
        """PRPs or an SGL; ExhaustedError without a block, MisuseError when they cannot say it: nothing is kept."""
        large: cython.bint = self.sgl_threshold != 0 and f.size >= self.sgl_threshold * f.count
        listed: cython.bint = self.sgl_supported and (large or not self._meet(f))
        writer: ListWriter = self.sgl if listed else self.prp
        failed: cython.int
        if not self._reachable(f):
            raise MisuseError(f"descriptors of {f.pairs()}: addresses must lie in [0, 2^63)")
        failed = writer._build(f.addr, f.length, 0, f.count)
        if failed != 0:
            writer._drop(writer.chain)
            if failed == -ENOMEM:
                raise writer._lacking()
            raise MisuseError(f"{writer.kind}: cannot describe {f.pairs()}", EIO)
        f.psdt = PSDT_SGL_METABUF if listed else PSDT_PRP
        f.low = writer._word(False)
        f.high = writer._word(True)
        f.chain = writer.chain
        self.ledger.counts[L_DESCRIPTORS] += f.count if listed else self.prp.entries
        return 0

    def _meet(self, f: Flight) -> cython.bint:
        """Whether PRPs can describe the ranges: they meet on controller pages."""
        i: cython.Py_ssize_t
        for i in range(1, f.count):  # noqa: SIM110 - no objects here
            if (f.addr[i] | (f.addr[i - 1] + f.length[i - 1])) & PAGE_MASK_LOW:
                return False
        return True

    def _reachable(self, f: Flight) -> cython.bint:
        """Whether every address is one that a device may be told."""
        i: cython.Py_ssize_t
        for i in range(f.count):  # noqa: SIM110
            if f.addr[i] >> 63:
                return False
        return True

    def _drop(self, f: Flight) -> cython.int:
        """Give list blocks back."""
        return self.prp._drop(f.chain)


@cython.cclass
class DescriptorReader:
    """Finds the data ranges of a command: ``addr``, ``length`` and ``count`` after ``_fetch``."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.port = device.port
        self.prp = PrpWalker()
        self.sgl = SglWalker()
        self.words = words([0] * 512)
        self.addr = self.words
        self.length = self.words
        self.count = 0

    def _fetch(self, f: Flight) -> cython.int:
        """Read what the command says; FaultError when the IOMMU blocks a list or the device refuses what it says."""
        status: cython.int = self._fetch_prp(f) if f.psdt == PSDT_PRP else self._fetch_sgl(f)
        if status != 0:
            raise FaultError(f"the device refuses the descriptors of a {f.size}-byte request: status {status:#x}")
        return 0

    def _fetch_prp(self, f: Flight) -> cython.int:
        prp: PrpWalker = self.prp
        prp._begin(f.low, f.high, f.size)
        while prp.list_entries != 0 and prp.status == 0:
            self._read(prp.list_addr, prp.list_entries)
            prp._list(self.words)
        self.addr, self.length, self.count = prp.addr, prp.length, prp.count
        return prp.status

    def _fetch_sgl(self, f: Flight) -> cython.int:
        sgl: SglWalker = self.sgl
        sgl._begin(f.low, f.high, f.size, f.reads, False)
        while sgl.segment_bytes != 0 and sgl.status == 0:
            self._read(sgl.segment_addr, sgl.segment_bytes >> 3)
            sgl._segment(self.words, sgl.segment_bytes >> 4)
        self.addr, self.length, self.count = sgl.addr, sgl.length, sgl.count
        return sgl.status

    def _read(self, addr: cython.ulonglong, count: cython.Py_ssize_t) -> cython.int:
        """``count`` words of a list into ``words``, by translated DMA."""
        if count > len(self.words):
            self.words = words([0] * count)
        if self.device.checker is not None:
            payload: bytes = self.device.dma_read(int(addr), int(8 * count))
            self.words = memoryview(array("Q", payload))
        elif cython.compiled:
            self.port._load(addr, cython.cast("unsigned char*", cython.address(self.words[0])), 8 * count)
        else:
            self.port._load(addr, self.words.cast("B"), 8 * count)
        return 0
