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
from dmakit.dma.report import cut_error, map_error
from dmakit.errors import DmakitError, ExhaustedError, MisuseError
from dmakit.ledger import MOST_CPUS
from dmakit.nvme import metadata
from dmakit.reasons import Reason

if not cython.compiled:
    from dmakit.block.dma_iter import BlkDmaIter, typed_device, undo
    from dmakit.block.request import Payload, Request
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
    from dmakit.dma.window import SIZE_BITS
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
        self.own: Device | None = None
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
        elif self._map_payload(iod, request.data, self._use_sgls(request, admin)) != 0:
            return iod.status
        if request.integrity.count != 0 and metadata.map_metadata(self, iod, request) != 0:
            self._unmap_payload(iod, cpu)
            iod.entries = 0
            return iod.status
        self.ledger.counts[L_DESCRIPTORS] += iod.entries + iod.meta_entries
        self.ledger.counts[L_BOOKKEEPING_BYTES] += iod._bookkeeping()
        return 0

    def _unmap(self, iod: Iod, cpu: cython.int) -> cython.int:
        """Undo ``_map_into`` on behalf of ``cpu``; returns 0."""
        if iod.flags & IOD_META_MAPPED:
            metadata.unmap_metadata(self, iod, cpu)
        return self._unmap_payload(iod, cpu)

    def use_sgls(self, request: Request, *, admin: bool = False) -> int:
        """SGL_UNSUPPORTED, SGL_SUPPORTED or SGL_FORCED for this request (``nvme_pci_use_sgls``)."""
        return self._use_sgls(request, admin)

    # Data ---------------------------------------------------------------------------------------------------

    def _use_sgls(self, request: Request, admin: cython.bint) -> cython.int:
        forced: cython.bint = request.user_command or request.integrity.segments > 1
        return self._choice(request.data, forced, admin)

    def _choice(self, payload: Payload, forced: cython.bint, admin: cython.bint) -> cython.int:
        """``use_sgls``; ``forced``: by more than the data's gaps."""
        if admin or not self.sgl_supported:
            return SGL_UNSUPPORTED
        if (payload.gap_bit != 0 and payload.gap_bit <= 12) or forced:
            return SGL_FORCED
        return SGL_SUPPORTED

    def _map_payload(self, iod: Iod, payload: Payload, choice: cython.int) -> cython.int:
        """Map the data and write its descriptors; returns the status. What touches Python objects is done here."""
        self.walk._prepare(payload, self.device, self.peer, iod.cpu)
        self.own = self.walk.own
        if self._map_data(iod, payload, choice) == 0:
            iod.state = self.walk.state
        return iod.status

    def _map_data(self, iod: Iod, payload: Payload, choice: cython.int) -> cython.int:
        """``_map_payload`` after its preparation: needs no Python on a device of ours, unless something fails."""
        ranges: cython.ulonglong = payload.segments
        status: cython.int
        self.ledger.counts[L_PASSES] += 1
        if payload.segments == 1:
            status = self._map_simple(iod, payload, choice)
            if status >= 0:
                return status
        if not self.walk._begin(payload, iod.direction, self.by_gap):
            return self._not_started(iod)
        iod.map_type = self.walk.map_type
        if self.walk.windowed:
            iod.path = PATH_TWO_STEP
            ranges = 1
            if self.walk.plain:
                iod.window_addr = self.walk.spare.addr
                iod.window_size = self.walk.spare.size_word
        else:
            iod.path = PATH_BUS if self.walk.map_type == P2P_MAP_BUS_ADDR else PATH_PER_SEGMENT
        iod.reason = self.walk.reason
        if payload.segments == 1 and self.walk.map_type == P2P_MAP_NONE:
            iod.reason = _TOO_LONG_FOR_PRP
        iod.flags |= IOD_DATA_MAPPED
        if choice == SGL_FORCED or (
            choice == SGL_SUPPORTED
            and self.sgl_threshold > 0
            and (payload.size + ranges - 1) // ranges >= self.sgl_threshold
        ):
            return self._write_sgl(iod, payload)
        return self._write_prps(iod, payload)

    def _map_simple(self, iod: Iod, payload: Payload, choice: cython.int) -> cython.int:
        """One segment without the iterator; returns the status, or -1 when it must go the general way."""
        phys: cython.ulonglong = payload.phys[payload.first]
        length: cython.ulonglong = payload.length[payload.first]
        offset: cython.ulonglong = phys & PAGE_MASK_LOW
        addr: cython.ulonglong
        two_prps: cython.bint = offset + length <= 2 * PAGE_SIZE
        if (choice == SGL_UNSUPPORTED and not two_prps) or (self.peer is not None and self._of_a_peer(phys)):
            return -1
        if self.own is not None:
            addr = self.own._map_phys(phys, length, iod.direction, 0, iod.cpu)
            if addr == 0:
                return self._map_refused(iod, phys, length)
        else:
            addr = self._map_by_python(iod, phys, length)
            if iod.status != 0:
                return iod.status
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

    def _write_prps(self, iod: Iod, payload: Payload) -> cython.int:
        """Feed every range to the PRP writer, mapping as it goes."""
        failed: cython.int = 0
        unkept: cython.int = 0
        self.prp._begin(payload.size)
        iod.psdt = PSDT_PRP
        while True:
            iod.total += self.walk.len
            unkept = self._save(iod)
            failed = unkept if unkept != 0 else self.prp._feed(self.walk.addr, self.walk.len)
            if failed != 0 or not self.walk._next():
                break
        iod.chain = self.prp.chain
        iod.low = self.prp.prp1
        iod.high = self.prp.prp2
        iod.entries = self.prp.entries
        if failed != 0 or self.walk.status != 0:
            return self._give_up(iod, failed, unkept != 0)
        return 0

    def _save(self, iod: Iod) -> cython.int:
        """Keep a range that must be unmapped by itself and that PRPs cannot give back; -ENOMEM without memory."""
        if self.walk.windowed or iod.map_type == P2P_MAP_BUS_ADDR:
            return 0
        if not (self._asked_to_unmap() if self.own is None else self.own._need_unmap()):
            return 0
        iod._keep(self.walk.addr, self.walk.len)
        return -ENOMEM if iod.kept_count == 1 and self.small.fail._hit() else 0

    def _write_sgl(self, iod: Iod, payload: Payload) -> cython.int:
        """Feed every range to the SGL writer, mapping as it goes."""
        failed: cython.int = self.sgl._begin(payload.segments, self.walk.windowed)
        iod.psdt = PSDT_SGL_METABUF
        if failed != 0:
            iod.total = self.walk.len
            iod.low = self.walk.addr
            iod.high = self.walk.len
            iod.entries = 1
            return self._give_up(iod, failed, False)
        iod.chain = self.sgl.chain
        while True:
            failed = self.sgl._feed(self.walk.addr, self.walk.len)
            if failed != 0:
                iod._keep(self.walk.addr, self.walk.len)
                break
            iod.total += self.walk.len
            if not self.walk._next():
                break
        self.sgl._finish()
        iod.low = self.sgl.low
        iod.high = self.sgl.high
        iod.entries = self.sgl.entries
        if failed != 0 or self.walk.status != 0:
            return self._give_up(iod, failed, False)
        return 0

    # Devices that are not ours ------------------------------------------------------------------------------

    def _of_a_peer(self, phys: cython.ulonglong) -> cython.bint:
        """Whether a single segment is a peer's memory."""
        peer = self.peer
        assert peer is not None
        peer.reset()
        return peer.map_type(phys) != P2P_MAP_NONE

    def _map_by_python(self, iod: Iod, phys: cython.ulonglong, length: cython.ulonglong) -> cython.ulonglong:
        """``map_phys``; a failure is noted in the iod."""
        try:
            return self.device.map_phys(phys, length, iod.direction, 0, cpu=iod.cpu)
        except DmakitError as error:
            iod.status = _RESOURCE
            self._fail(iod, error, 0)
        return 0

    def _asked_to_unmap(self) -> cython.bint:
        """``need_unmap``."""
        return self.device.need_unmap()

    # Failure ------------------------------------------------------------------------------------------------

    def _map_refused(self, iod: Iod, phys: cython.ulonglong, length: cython.ulonglong) -> cython.int:
        """A single segment could not be mapped."""
        iod.status = _RESOURCE
        return self._fail(iod, map_error(self.own, int(phys), int(length), 0), 0)

    def _not_started(self, iod: Iod) -> cython.int:
        """The iterator could not map the first range."""
        iod.status = self.walk.status
        return self._fail(iod, self.walk.error, self.walk.reason)

    def _give_up(self, iod: Iod, failed: cython.int, unkept: cython.bint) -> cython.int:
        """Descriptors could not be written (``failed``), or the iterator could not go on: undo everything."""
        error: object = self.walk.error if self.walk.status != 0 else None
        reason: cython.int = 0 if error is not None else _MALFORMED
        iod.state = self.walk.state
        iod.status = self.walk.status
        if failed == -ENOMEM:
            reason = _DESCRIPTORS_EXHAUSTED
            iod.status = _RESOURCE
            if unkept:
                error = ExhaustedError("no memory for the vectors of a request that is mapped segment by segment")
            else:
                error = self.prp._lacking() if iod.psdt == PSDT_PRP else self.sgl._lacking()
        elif failed != 0:
            iod.status = _IOERR
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

    def _unmap_payload(self, iod: Iod, cpu: cython.int) -> cython.int:
        """Undo the data mapping and give the list blocks back; harmless when nothing is mapped."""
        self.own = typed_device(self.device, cpu)
        return self._unmap_data(iod, cpu)

    def _unmap_data(self, iod: Iod, cpu: cython.int) -> cython.int:
        """``_unmap_payload`` when ``own`` is the device of ours, or None."""
        attrs: cython.int = ATTR_MMIO if iod.map_type == P2P_MAP_THRU_HOST_BRIDGE else 0
        done: cython.bint = True
        if not iod.flags & IOD_DATA_MAPPED:
            return 0
        if iod.flags & IOD_SINGLE_SEGMENT:
            self._unmap_one(iod.low, iod.total, iod.direction, 0, cpu)
        elif iod.map_type != P2P_MAP_BUS_ADDR:
            if iod.window_size != 0:
                self._destroy_window(iod, attrs, cpu)
            elif self.own is None or iod.state is not None:
                done = self._undo(iod, cpu)
            else:
                done = not self.own._need_unmap()
        if not done:
            self._unmap_listed(iod, attrs, cpu)
        iod.flags &= ~(IOD_DATA_MAPPED | IOD_SINGLE_SEGMENT)
        self.prp._drop(iod.chain)
        iod.chain = 0
        return 0

    def _destroy_window(self, iod: Iod, attrs: cython.int, cpu: cython.int) -> cython.int:
        """End a window that is only two words."""
        failed: cython.int
        self.walk.spare.addr = iod.window_addr
        self.walk.spare.size_word = iod.window_size
        failed = self.walk.spare._destroy(iod.window_size & SIZE_BITS, iod.direction, attrs, cpu)
        if failed != 0:
            return self._cut(iod, failed)
        iod.window_size = 0
        return 0

    def _cut(self, iod: Iod, failed: cython.int) -> cython.int:
        raise cut_error(self.own, f"destroy: [0x0, {int(iod.window_size & SIZE_BITS):#x})", -failed)

    def _undo(self, iod: Iod, cpu: cython.int) -> cython.bint:
        """End the request's window; False when there is none and every range is to be unmapped."""
        done: cython.bint = undo(self.own, self.device, iod.state, iod.total, iod.direction, iod.map_type, cpu)
        iod.state = None
        return done

    def _unmap_listed(self, iod: Iod, attrs: cython.int, cpu: cython.int) -> cython.int:
        """Unmap range by range: from the kept vectors, and from what an SGL says."""
        at: cython.Py_ssize_t = 0
        if iod.psdt != PSDT_PRP and iod.chain != 0 and not self.sgl._look(iod.chain, iod.entries):
            return self._no_list(iod)
        while at < iod.kept_count:
            self._unmap_one(iod.kept[2 * at], iod.kept[2 * at + 1], iod.direction, attrs, cpu)
            at += 1
        iod.kept_count = 0
        if iod.psdt == PSDT_PRP:
            return 0
        if iod.chain == 0:
            return self._unmap_one(iod.low, iod.high, iod.direction, attrs, cpu)
        at = 0
        while at < iod.entries:
            self._unmap_one(self.sgl.words[2 * at], self.sgl.words[2 * at + 1], iod.direction, attrs, cpu)
            at += 1
        return 0

    def _no_list(self, iod: Iod) -> cython.int:
        raise MisuseError(f"chain={iod.chain}, entries={iod.entries}: no list block that holds so many")

    def _unmap_one(
        self,
        addr: cython.ulonglong,
        length: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.int:
        """``unmap_phys``, without a Python call where the device is one of ours."""
        if self.own is None:
            return self._unmap_by_python(addr, length, direction, attrs, cpu)
        if self.own._unmap_phys(addr, length, direction, attrs, cpu) != 0:
            return self._nothing_mapped(addr)
        return 0

    def _unmap_by_python(
        self,
        addr: cython.ulonglong,
        length: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.int:
        self.device.unmap_phys(addr, length, direction, attrs, cpu=cpu)
        return 0

    def _nothing_mapped(self, addr: cython.ulonglong) -> cython.int:
        raise MisuseError(f"unmap_phys: nothing is mapped at {int(addr):#x}", rule="not-mapped")
