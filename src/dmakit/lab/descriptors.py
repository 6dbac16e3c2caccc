"""Descriptors for the ranges of any strategy: PRPs or an SGL, by the NVMe driver's rules (``nvme.listed.describe``).

The device's half is ``nvme.fetch``: it reads list blocks by translated DMA and finds the data ranges there.
"""

from __future__ import annotations

import cython

from dmakit.errors import MisuseError
from dmakit.nvme.mapping import RequestMapper

if not cython.compiled:
    from dmakit.consts import EIO, ENOMEM, L_DESCRIPTORS, PAGE_MASK_LOW, PSDT_PRP, PSDT_SGL_METABUF
    from dmakit.lab.flight import Flight
    from dmakit.nvme.lists import ListWriter


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
