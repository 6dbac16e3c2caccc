"""Mapping a request for an NVMe controller: which path, PRP or SGL, and how it is undone.

For the data of one request, in this order:

1. exactly one physical segment of ordinary memory that two PRPs, or one SGL descriptor, can describe: one
   ``dma_map_phys``, no iterator, no window (path ``map_phys``). This is what keeps small I/O cheap.
2. otherwise the block DMA iterator decides (``block.dma_iter``): ``two-step``, ``bus`` or ``per-segment``; its ranges
   are written as they come, so the request is walked once.
3. the ranges become an SGL when that is *forced* (gaps inside a controller page, a user command, several integrity
   segments), or *supported* and the average range is at least ``sgl_threshold`` bytes; else a PRP list.

Whatever fails, everything this request mapped or allocated is undone before ``map`` returns its status. (Linux
before mid-2026 forgot the first range when the list block of an SGL could not be had; that is not reproduced.)

Models ``drivers/nvme/host/pci.c``: ``nvme_map_data``, ``nvme_pci_setup_data_simple``, ``nvme_pci_use_sgls``,
``nvme_unmap_data``. Metadata is in ``nvme.metadata``.
"""

from __future__ import annotations

import cython

from dmakit.block.device import MappingDevice, PeerMemory
from dmakit.block.dma_iter import GAP_RULE, gap_rule
from dmakit.block.limits import NVME_MAX_SEGS
from dmakit.block.status import BlkStatus
from dmakit.dma.report import map_error
from dmakit.errors import DmakitError, ExhaustedError, MisuseError
from dmakit.ledger import MOST_CPUS
from dmakit.nvme import metadata
from dmakit.reasons import Reason

if not cython.compiled:
    from dmakit.block.dma_iter import BlkDmaIter, typed_device, undo
    from dmakit.block.request import Request
    from dmakit.consts import (
        ATTR_MMIO,
        ENOMEM,
        IOD_DATA_MAPPED,
        IOD_META_MAPPED,
        IOD_SINGLE_SEGMENT,
        L_BOOKKEEPING_BYTES,
        L_DESCRIPTORS,
        L_PASSES,
        P2P_MAP_BUS_ADDR,
        P2P_MAP_NONE,
        P2P_MAP_THRU_HOST_BRIDGE,
        PAGE_MASK_LOW,
        PAGE_SIZE,
        PATH_BUS,
        PATH_FAILED,
        PATH_MAP_PHYS,
        PATH_NO_DATA,
        PATH_PER_SEGMENT,
        PATH_TWO_STEP,
        PSDT_PRP,
        PSDT_SGL_METABUF,
        SGL_FORCED,
        SGL_SUPPORTED,
        SGL_UNSUPPORTED,
    )
    from dmakit.dma.device import Device
    from dmakit.ledger import Ledger
    from dmakit.nvme.iod import Iod
    from dmakit.nvme.pool import DescriptorPool
    from dmakit.nvme.prp import PrpWriter
    from dmakit.nvme.sgl import SglWriter

SGL_THRESHOLD = 32 << 10

_MAX_SEGMENTS = NVME_MAX_SEGS
_RESOURCE = int(BlkStatus.RESOURCE)
_IOERR = int(BlkStatus.IOERR)
_NO_DATA = int(Reason.NO_DATA)
_SINGLE_SEGMENT = int(Reason.SINGLE_SEGMENT)
_TOO_LONG_FOR_PRP = int(Reason.SINGLE_SEGMENT_TOO_LONG_FOR_PRP)
_MALFORMED = int(Reason.MALFORMED_SEGMENTS)
_DESCRIPTORS_EXHAUSTED = int(Reason.DESCRIPTORS_EXHAUSTED)


@cython.cclass
class RequestMapper:
    """Maps and unmaps requests of one controller on one device.

    ``sgl_supported`` and ``meta_sgl_supported``: from the controller's SGLS; ``sgl_threshold``: bytes, 0 = never by
    size; ``rule``: ``gap`` or ``virt-boundary`` (see ``block.dma_iter``); ``peer``: who knows peer memory.
    """

    def __init__(
        self,
        device: MappingDevice,
        small: DescriptorPool,
        large: DescriptorPool,
        *,
        ledger: Ledger,
        sgl_supported: bool,
        meta_sgl_supported: bool = False,
        sgl_threshold: int = SGL_THRESHOLD,
        rule: str = GAP_RULE,
        peer: PeerMemory | None = None,
    ) -> None:
        if not 0 <= sgl_threshold < 1 << 32:
            raise MisuseError(f"sgl_threshold={sgl_threshold}: must lie in [0, 2^32)")
        self.device = device
        self.small = small
        self.large = large
        self.ledger = ledger
        self.sgl_supported = sgl_supported
        self.meta_sgl_supported = meta_sgl_supported
        self.sgl_threshold = sgl_threshold
        self.rule = rule
        self.by_gap = gap_rule(rule)
        self.peer = peer
        self.walk = BlkDmaIter()
        self.prp = PrpWriter(small, large)
        self.sgl = SglWriter(small, large)

    # Public -------------------------------------------------------------------------------------------------

    def map(self, request: Request, *, admin: bool = False) -> Iod:
        """Map a request's data and metadata; ``iod.status`` tells how it went, and on failure nothing is mapped."""
        iod = Iod(request)
        self._map_into(iod, request, request.cpu, admin)
        return iod

    def unmap(self, iod: Iod, *, cpu: int | None = None) -> None:
        """Undo ``map`` when the command has completed; ``cpu`` is the one that completes (default: that mapped)."""
        if cpu is not None and (cpu < 0 or cpu >= MOST_CPUS):
            raise MisuseError(f"cpu={cpu}: must be 0 to {MOST_CPUS - 1}")
        self._unmap(iod, iod.cpu if cpu is None else cpu)

    def _map_into(self, iod: Iod, request: Request, cpu: cython.int, admin: cython.bint) -> cython.int:
        """``map`` with an Iod of the caller's, which starts over, on behalf of ``cpu``; returns the status.

        MisuseError, with nothing done, for more segments than an NVMe queue takes.
        """
        iod._reset(request, cpu)
        if request.data.segments > _MAX_SEGMENTS:
            raise MisuseError(
                f"request of {request.data.segments} segments: an NVMe queue takes at most {NVME_MAX_SEGS}"
            )
        if request.data.count == 0:
            iod.path = PATH_NO_DATA
            iod.reason = _NO_DATA
        elif self._map_data(iod, request, admin) != 0:
            return iod.status
        if request.integrity.count != 0 and metadata.map_metadata(self, iod, request) != 0:
            self._unmap_data(iod, cpu)
            iod.entries = 0
            return iod.status
        self.ledger.counts[L_DESCRIPTORS] += iod.entries + iod.meta_entries
        self.ledger.counts[L_BOOKKEEPING_BYTES] += iod._bookkeeping()
        return 0

    def _unmap(self, iod: Iod, cpu: cython.int) -> cython.int:
        """Undo ``_map_into`` on behalf of ``cpu``; returns 0."""
        if iod.flags & IOD_META_MAPPED:
            metadata.unmap_metadata(self, iod, cpu)
        return self._unmap_data(iod, cpu)

    def use_sgls(self, request: Request, *, admin: bool = False) -> int:
        """SGL_UNSUPPORTED, SGL_SUPPORTED or SGL_FORCED for this request (``nvme_pci_use_sgls``)."""
        return self._use_sgls(request, admin)

    # Data ---------------------------------------------------------------------------------------------------

    def _use_sgls(self, request: Request, admin: cython.bint) -> cython.int:
        if admin or not self.sgl_supported:
            return SGL_UNSUPPORTED
        if (
            (request.data.gap_bit != 0 and request.data.gap_bit <= 12)
            or request.user_command
            or request.integrity.segments > 1
        ):
            return SGL_FORCED
        return SGL_SUPPORTED

    def _map_data(self, iod: Iod, request: Request, admin: cython.bint) -> cython.int:
        """Map the data and write its descriptors; returns the status."""
        walk: BlkDmaIter = self.walk
        choice: cython.int = self._use_sgls(request, admin)
        ranges: cython.ulonglong
        status: cython.int
        self.ledger.counts[L_PASSES] += 1
        if request.data.segments == 1:
            status = self._map_simple(iod, request, choice)
            if status >= 0:
                return status
        if not walk._start(request.data, self.device, request.direction, self.by_gap, self.peer, iod.cpu):
            iod.status = walk.status
            return self._fail(iod, walk.error, walk.reason)
        iod.state = walk.state
        iod.map_type = walk.map_type
        if walk.state is not None:
            iod.path = PATH_TWO_STEP
        else:
            iod.path = PATH_BUS if walk.map_type == P2P_MAP_BUS_ADDR else PATH_PER_SEGMENT
        iod.reason = walk.reason
        if request.data.segments == 1 and walk.map_type == P2P_MAP_NONE:
            iod.reason = _TOO_LONG_FOR_PRP
        iod.flags |= IOD_DATA_MAPPED
        ranges = 1 if walk.state is not None else request.data.segments
        if choice == SGL_FORCED or (
            choice == SGL_SUPPORTED
            and self.sgl_threshold > 0
            and (request.data.size + ranges - 1) // ranges >= self.sgl_threshold
        ):
            return self._write_sgl(iod, request)
        return self._write_prps(iod, request)

    def _map_simple(self, iod: Iod, request: Request, choice: cython.int) -> cython.int:
        """One segment without the iterator; returns the status, or -1 when it must go the general way."""
        phys: cython.ulonglong = request.data.phys[0]
        length: cython.ulonglong = request.data.length[0]
        offset: cython.ulonglong = phys & PAGE_MASK_LOW
        addr: cython.ulonglong
        own: Device | None = typed_device(self.device, iod.cpu)
        two_prps: cython.bint = offset + length <= 2 * PAGE_SIZE
        if choice == SGL_UNSUPPORTED and not two_prps:
            return -1
        if self.peer is not None:
            self.peer.reset()
            if self.peer.map_type(phys) != P2P_MAP_NONE:
                return -1
        try:
            if own is not None:
                addr = own._map_phys(phys, length, request.direction, 0, iod.cpu)
                if addr == 0:
                    raise map_error(own, int(phys), int(length), 0)
            else:
                addr = self.device.map_phys(phys, length, request.direction, 0, cpu=iod.cpu)
        except DmakitError as error:
            iod.status = _RESOURCE
            return self._fail(iod, error, 0)
        iod.path = PATH_MAP_PHYS
        iod.reason = _SINGLE_SEGMENT
        iod.flags |= IOD_SINGLE_SEGMENT | IOD_DATA_MAPPED
        iod.total = length
        iod.low = addr
        iod.entries = 1
        if choice == SGL_FORCED or not two_prps:
            iod.psdt = PSDT_SGL_METABUF
            iod.high = length
        elif offset + length > PAGE_SIZE:
            iod.high = addr + PAGE_SIZE - offset
            iod.entries = 2
        return 0

    def _write_prps(self, iod: Iod, request: Request) -> cython.int:
        """Feed every range to the PRP writer, mapping as it goes."""
        walk: BlkDmaIter = self.walk
        prp: PrpWriter = self.prp
        failed: cython.int = 0
        lacking: object = None
        prp._begin(request.data.size)
        iod.psdt = PSDT_PRP
        while True:
            iod.total += walk.len
            failed = self._save(iod)
            if failed != 0:
                lacking = ExhaustedError("no memory for the vectors of a request that is mapped segment by segment")
                break
            failed = prp._feed(walk.addr, walk.len)
            if failed != 0:
                lacking = prp._lacking() if failed == -ENOMEM else None
                break
            if not walk._next():
                iod.status = walk.status
                break
        iod.chain = prp.chain
        iod.low = prp.prp1
        iod.high = prp.prp2
        iod.entries = prp.entries
        if failed != 0:
            self._failed(iod, lacking)
        return self._end(iod)

    def _save(self, iod: Iod) -> cython.int:
        """Keep a range that must be unmapped by itself and that PRPs cannot give back; -ENOMEM without memory."""
        own: Device | None = self.walk.own
        if iod.state is not None or iod.map_type == P2P_MAP_BUS_ADDR:
            return 0
        if not (self.device.need_unmap() if own is None else own._need_unmap()):
            return 0
        iod._keep(self.walk.addr, self.walk.len)
        return -ENOMEM if iod.kept_count == 1 and self.small.fail._hit() else 0

    def _write_sgl(self, iod: Iod, request: Request) -> cython.int:
        """Feed every range to the SGL writer, mapping as it goes."""
        walk: BlkDmaIter = self.walk
        sgl: SglWriter = self.sgl
        failed: cython.int = sgl._begin(request.data.segments, walk.state is not None)
        iod.psdt = PSDT_SGL_METABUF
        if failed != 0:
            iod.total = walk.len
            iod.low = walk.addr
            iod.high = walk.len
            iod.entries = 1
            self._failed(iod, sgl._lacking())
            return self._end(iod)
        iod.chain = sgl.chain
        while True:
            if sgl._feed(walk.addr, walk.len) != 0:
                iod._keep(walk.addr, walk.len)
                self._failed(iod, None)
                break
            iod.total += walk.len
            if not walk._next():
                iod.status = walk.status
                break
        sgl._finish()
        iod.low = sgl.low
        iod.high = sgl.high
        iod.entries = sgl.entries
        return self._end(iod)

    def _failed(self, iod: Iod, lacking: object) -> cython.int:
        """Note that descriptors could not be written: the memory that was lacking, or None for malformed segments."""
        iod.status = _IOERR if lacking is None else _RESOURCE
        iod.error = lacking
        return 0

    def _end(self, iod: Iod) -> cython.int:
        """After writing descriptors: undo everything when that failed."""
        error: object = iod.error
        reason: cython.int = _MALFORMED
        if iod.status == 0:
            return 0
        if error is not None:
            reason = _DESCRIPTORS_EXHAUSTED
        elif self.walk.error is not None:
            error = self.walk.error
            reason = 0
        self._unmap_data(iod, iod.cpu)
        return self._fail(iod, error, reason)

    def _fail(self, iod: Iod, error: object, reason: cython.int) -> cython.int:
        """Record a failure: the mapping's own reason where the device names one. Returns the status."""
        why: cython.int
        iod.error = error
        iod.path = PATH_FAILED
        iod.reason = reason
        if error is not None and reason != _DESCRIPTORS_EXHAUSTED:
            why = self.device.why
            if why != 0:
                iod.reason = why
        iod.entries = 0
        return iod.status

    # Undo ---------------------------------------------------------------------------------------------------

    def _unmap_data(self, iod: Iod, cpu: cython.int) -> cython.int:
        """Undo the data mapping and give the list blocks back; harmless when nothing is mapped."""
        own: Device | None = typed_device(self.device, cpu)
        attrs: cython.int = ATTR_MMIO if iod.map_type == P2P_MAP_THRU_HOST_BRIDGE else 0
        if not iod.flags & IOD_DATA_MAPPED:
            return 0
        if iod.flags & IOD_SINGLE_SEGMENT:
            self._unmap_one(own, iod.low, iod.total, iod.direction, 0, cpu)
        elif not undo(own, self.device, iod.state, iod.total, iod.direction, iod.map_type, cpu):
            self._unmap_listed(own, iod, attrs, cpu)
        iod.state = None
        iod.flags &= ~(IOD_DATA_MAPPED | IOD_SINGLE_SEGMENT)
        self.prp._drop(iod.chain)
        iod.chain = 0
        return 0

    def _unmap_listed(self, own: Device | None, iod: Iod, attrs: cython.int, cpu: cython.int) -> cython.int:
        """Unmap range by range: from the kept vectors, and from what an SGL says."""
        at: cython.Py_ssize_t = 0
        if iod.psdt != PSDT_PRP and iod.chain != 0 and not self.sgl._look(iod.chain, iod.entries):
            raise MisuseError(f"chain={iod.chain}, entries={iod.entries}: no list block that holds so many")
        while at < iod.kept_count:
            self._unmap_one(own, iod.kept[2 * at], iod.kept[2 * at + 1], iod.direction, attrs, cpu)
            at += 1
        iod.kept_count = 0
        if iod.psdt == PSDT_PRP:
            return 0
        if iod.chain == 0:
            self._unmap_one(own, iod.low, iod.high, iod.direction, attrs, cpu)
            return 0
        at = 0
        while at < iod.entries:
            self._unmap_one(own, self.sgl.words[2 * at], self.sgl.words[2 * at + 1], iod.direction, attrs, cpu)
            at += 1
        return 0

    def _unmap_one(
        self,
        own: Device | None,
        addr: cython.ulonglong,
        length: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.int:
        """``unmap_phys``, without a Python call where the device is one of ours."""
        if own is None:
            self.device.unmap_phys(addr, length, direction, attrs, cpu=cpu)
        elif own._unmap_phys(addr, length, direction, attrs, cpu) != 0:
            raise MisuseError(f"unmap_phys: nothing is mapped at {int(addr):#x}", rule="not-mapped")
        return 0
