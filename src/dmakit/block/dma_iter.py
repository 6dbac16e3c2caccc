"""The block DMA iterator: how the memory of a request becomes addresses that a device can use.

``start`` decides once for the whole request and maps the first range; ``next`` maps one further segment at a
time where the request was not coalesced. The decision, in order, with the reason that is recorded:

1. peer memory below the same switch: bus addresses, no IOMMU (``P2P_BUS``); through a host bridge: like memory,
   with the MMIO attribute (``P2P_HOST_BRIDGE``); otherwise the request fails with ``INVAL`` (``P2P_NOT_SUPPORTED``);
2. gaps that the IOMMU's granule cannot hide: segment by segment (``GAP_IN_MERGE_BOUNDARY``; under the older
   rule ``NO_VIRT_BOUNDARY``: there the queue's virtual boundary decided, not the request's own gaps);
3. a window of the payload's size can be had: every segment linked, one sync, one range (``COALESCED``);
4. else segment by segment (``NO_IOMMU``, ``IDENTITY_DOMAIN`` or ``IOVA_EXHAUSTED``).

Failures leave nothing mapped by the failing call: a window is destroyed with what was linked; segments that
were mapped one by one before belong to the caller, who holds their addresses.

Models ``block/blk-mq-dma.c`` and ``include/linux/blk-mq-dma.h``.
"""

from __future__ import annotations

from typing import Any

import cython

from dmakit.block.device import MappingDevice, PeerMemory, Window
from dmakit.block.status import BlkStatus, errno_to_blk_status
from dmakit.dma.report import cut_error, link_error, map_error
from dmakit.errors import DmakitError, MisuseError
from dmakit.ledger import MOST_CPUS
from dmakit.reasons import Reason

if not cython.compiled:
    from dmakit.block.request import Payload, Request
    from dmakit.block.segments import SegmentIter
    from dmakit.consts import (
        ATTR_MMIO,
        DMA_NONE,
        P2P_MAP_BUS_ADDR,
        P2P_MAP_NONE,
        P2P_MAP_NOT_SUPPORTED,
        P2P_MAP_THRU_HOST_BRIDGE,
    )
    from dmakit.dma.device import Device
    from dmakit.dma.iova_state import IovaState
    from dmakit.dma.window import SIZE_BITS, IovaWindow

GAP_RULE = "gap"
VIRT_BOUNDARY_RULE = "virt-boundary"
RULES = (GAP_RULE, VIRT_BOUNDARY_RULE)

_RESOURCE = int(BlkStatus.RESOURCE)
_INVAL = int(BlkStatus.INVAL)
_COALESCED = int(Reason.COALESCED)
_GAP_IN_MERGE_BOUNDARY = int(Reason.GAP_IN_MERGE_BOUNDARY)
_NO_VIRT_BOUNDARY = int(Reason.NO_VIRT_BOUNDARY)
_NO_IOMMU = int(Reason.NO_IOMMU)
_IDENTITY_DOMAIN = int(Reason.IDENTITY_DOMAIN)
_IOVA_EXHAUSTED = int(Reason.IOVA_EXHAUSTED)
_P2P_BUS = int(Reason.P2P_BUS)
_P2P_HOST_BRIDGE = int(Reason.P2P_HOST_BRIDGE)
_P2P_NOT_SUPPORTED = int(Reason.P2P_NOT_SUPPORTED)


def gap_rule(rule: str) -> bool:
    """Which of the two rules ``rule`` names: whether it is ``gap``.

    ``gap`` (Linux 6.19 and later): a request gets a window when no bit of its gap mask lies inside the device's merge
    boundary. ``virt-boundary`` (6.17 and 6.18): when its queue's virtual boundary is at least as wide. A merge boundary
    of 0 forbids nothing here: without an IOMMU the window cannot be allocated.
    """
    if rule not in RULES:
        raise MisuseError(f"rule={rule!r}: must be one of {', '.join(RULES)}")
    return rule == GAP_RULE


def typed_device(device: MappingDevice, cpu: cython.int) -> Device | None:
    """The device, when its typed internals may be called: one of ours, no checker watches, ``cpu`` exists."""
    own: Device
    if not isinstance(device, Device):
        return None
    own = device
    return own if own.checker is None and 0 <= cpu < own.ledger.cpus else None


@cython.cclass
class BlkDmaIter:
    """``struct blk_dma_iter``: ``addr`` and ``len`` of the range just mapped, ``status`` when a call answered False.

    ``state`` is the window when the request was coalesced, else None; ``mapped`` counts bytes mapped so far;
    ``reason`` is the ``Reason`` of the branch taken; ``error`` what
    the mapping said when ``status`` is not OK; ``map_type`` the peer-to-peer decision.
    """

    def __init__(self) -> None:
        self.walk = SegmentIter()
        self.state: Window | None = None
        self.window: Any = None
        self.opened: Any = None
        self.spare = IovaWindow()
        self.plain = False
        self.windowed = False
        self.peer: PeerMemory | None = None
        self.device: MappingDevice | None = None
        self.own: Any = None
        self.error: DmakitError | None = None
        self.status = 0
        self.reason = 0
        self.map_type = P2P_MAP_NONE
        self.addr = 0
        self.len = 0
        self.mapped = 0
        self.bus_offset = 0
        self.direction = 0
        self.attrs = 0
        self.cpu = 0

    def start(
        self,
        request: Request,
        device: MappingDevice,
        *,
        integrity: bool = False,
        rule: str = GAP_RULE,
        peer: PeerMemory | None = None,
        cpu: int | None = None,
    ) -> bool:
        """Map the first range of the data (or integrity) payload; False with ``status`` OK when there is none.

        ``rule``: see ``gap_rule``; ``cpu``: who maps (default: the CPU that submits the request).
        """
        if device is None:
            raise MisuseError("start: device=None: must be a device")
        if cpu is not None and (cpu < 0 or cpu >= MOST_CPUS):
            raise MisuseError(f"start: cpu={cpu}: must be 0 to {MOST_CPUS - 1}")
        payload: Payload = request.integrity if integrity else request.data
        on: int = request.cpu if cpu is None else cpu
        return bool(self._start(payload, device, request.direction, gap_rule(rule), peer, on))

    def _start(
        self,
        payload: Payload,
        device: MappingDevice,
        direction: cython.int,
        by_gap: cython.bint,
        peer: PeerMemory | None,
        cpu: cython.int,
    ) -> cython.bint:
        """``start`` with checked arguments."""
        self._prepare(payload, device, peer, cpu)
        return self._begin(payload, direction, by_gap)

    def _prepare(self, payload: Payload, device: MappingDevice, peer: PeerMemory | None, cpu: cython.int) -> cython.int:
        """What of a start touches Python objects: whose memory, for which device, by whom."""
        self.device = device
        self.own = typed_device(device, cpu)
        self.peer = peer
        self.cpu = cpu
        self.state = None
        self.window = None
        self.opened = None
        self.plain = False
        self.error = None
        payload._iterate(self.walk)
        return 0

    def _without_objects(self) -> cython.int:
        """After ``_prepare`` for a device of ours: windows are words, ``spare``'s, which the caller keeps."""
        assert self.own is not None
        self.plain = True
        self.spare.core = self.own
        self.window = self.spare
        return 0

    def _aim(self, first: cython.Py_ssize_t, end: cython.Py_ssize_t, cpu: cython.int) -> cython.void:
        """After ``_without_objects``: go on with another part of the same columns, for ``cpu``."""
        self.walk._aim(first, end)
        self.cpu = cpu

    def _begin(self, payload: Payload, direction: cython.int, by_gap: cython.bint) -> cython.bint:
        """The rest of a start, behind ``_prepare``."""
        self.status = 0
        self.reason = 0
        self.map_type = P2P_MAP_NONE
        self.windowed = False
        self.mapped = 0
        self.attrs = 0
        self.bus_offset = 0
        self.direction = direction
        if not self.walk._next():
            return False
        if self.peer is not None and not self._classify():
            return False
        if self.map_type != P2P_MAP_BUS_ADDR:
            if not payload._may_coalesce(self._merge_boundary(), by_gap):
                self._because(_GAP_IN_MERGE_BOUNDARY if by_gap else _NO_VIRT_BOUNDARY)
            elif self._open(payload.size):
                return self._start_window(payload.size)
        return self._one()

    def next(self) -> bool:
        """Map the next segment of a request that was not coalesced; False at the end or on failure."""
        return bool(self._next())

    def _next(self) -> cython.bint:
        if self.windowed or not self.walk._next():
            return False
        return self._one()

    def _merge_boundary(self) -> cython.ulonglong:
        """``dma_get_merge_boundary``."""
        if self.own is None:
            return self._boundary_by_python()
        return self.own.granule_mask if self.own.translating else 0

    def _boundary_by_python(self) -> cython.ulonglong:
        device = self.device
        assert device is not None
        return device.merge_boundary

    def _open(self, size: cython.ulonglong) -> cython.bint:
        """A window for the whole payload; False, with the reason, when the device gives none."""
        if self.plain:
            self.windowed = self.spare._open_window(self.walk.paddr, size, self.cpu) != 0
            return self.windowed or self._without(self.own.translating, self.own.identity)
        self.windowed = self._open_state(size)
        return self.windowed

    def _open_state(self, size: cython.ulonglong) -> cython.bint:
        """``_open`` with an object in ``state``."""
        device = self.device
        assert device is not None
        if self.own is not None:
            window: IovaState = self.own._opened(self.walk.paddr, size, self.cpu)
            if window.live:
                self.state = self.window = self.opened = window
                return True
        else:
            state = device.try_alloc(self.walk.paddr, size, cpu=self.cpu)
            if state:
                self.state = state
                return True
        return self._without(device.translating, device.identity)

    def _without(self, translating: cython.bint, identity: cython.bint) -> cython.bint:
        """Say why there is no window; False."""
        if translating:
            self._because(_IOVA_EXHAUSTED)
        else:
            self._because(_IDENTITY_DOMAIN if identity else _NO_IOMMU)
        return False

    def _because(self, reason: cython.int) -> cython.void:
        """Record why; a peer-to-peer decision made before stands."""
        if self.reason == 0:
            self.reason = reason

    def _classify(self) -> cython.bint:
        """Ask what memory the first segment is; False when the device cannot reach it."""
        peer = self.peer
        assert peer is not None
        peer.reset()
        self.map_type = int(peer.map_type(self.walk.paddr))
        self.bus_offset = peer.bus_offset
        if self.map_type == P2P_MAP_BUS_ADDR:
            self.reason = _P2P_BUS
        elif self.map_type == P2P_MAP_THRU_HOST_BRIDGE:
            self.reason = _P2P_HOST_BRIDGE
            self.attrs = ATTR_MMIO
        elif self.map_type != P2P_MAP_NONE:
            self.map_type = P2P_MAP_NOT_SUPPORTED
            self.reason = _P2P_NOT_SUPPORTED
            self.status = _INVAL
            return False
        return True

    def _start_window(self, size: cython.ulonglong) -> cython.bint:
        """Link every segment into the window and sync once; on failure destroy it with what was linked."""
        self.len = size
        self._because(_COALESCED)
        return self._link_window() if self.window is not None else self._link_by_python()

    def _link_window(self) -> cython.bint:
        """The rest of ``_start_window`` for a window of the machine's own."""
        mapped: cython.ulonglong = 0
        failed: cython.int = 0
        self.addr = self.window.addr
        while True:
            failed = self.window._link(self.walk.paddr, mapped, self.walk.size, self.direction, self.attrs, self.cpu)
            if failed != 0:
                return self._link_refused(failed, mapped)
            mapped += self.walk.size
            if not self.walk._next():
                break
        failed = self.window._sync(0, mapped, self.cpu)
        if failed != 0:
            return self._link_refused(failed, mapped)
        if self.opened is not None:
            self.opened._note_run(mapped, self.direction, self.attrs)
        self.mapped = mapped
        return True

    def _link_refused(self, failed: cython.int, mapped: cython.ulonglong) -> cython.bint:
        """The segment under the walk could not be linked: the window goes."""
        error = link_error(
            self.own, int(failed), int(self.walk.paddr), int(mapped), int(self.walk.size), self.direction, self.attrs
        )
        return self._lost(mapped, error)

    def _link_by_python(self) -> cython.bint:
        """The rest of ``_start_window`` for any other window."""
        walk: SegmentIter = self.walk
        mapped: cython.ulonglong = 0
        state: Window | None = self.state
        assert state is not None
        self.addr = state.addr
        try:
            while True:
                state.link(walk.paddr, mapped, walk.size, self.direction, self.attrs)
                mapped += walk.size
                if not walk._next():
                    break
            state.sync(0, mapped)
        except DmakitError as error:
            return self._lost(mapped, error)
        self.mapped = mapped
        return True

    def _lost(self, mapped: cython.ulonglong, error: DmakitError) -> cython.bint:
        """Destroy the window with the ``mapped`` bytes that were linked; False."""
        state: Window | None = self.state
        if self.plain:
            self.spare._destroy(mapped, self.direction, self.attrs, self.cpu)
        elif state is not None:
            state.destroy(mapped, self.direction, self.attrs)
            self.state = self.window = self.opened = None
        self.windowed = False
        return self._refused(error, errno_to_blk_status(error.errno))

    def _refused(self, error: DmakitError, status: cython.int) -> cython.bint:
        """Keep why nothing was mapped; False."""
        self.error = error
        self.status = status
        return False

    def _one(self) -> cython.bint:
        """Give the segment under the walk its own address."""
        if self.map_type == P2P_MAP_BUS_ADDR:
            self.addr = self.walk.paddr + self.bus_offset
        elif self.own is not None:
            self.addr = self.own._map_phys(self.walk.paddr, self.walk.size, self.direction, self.attrs, self.cpu)
            if self.addr == 0:
                return self._map_refused()
        elif not self._one_by_python():
            return False
        self.len = self.walk.size
        self.mapped += self.len
        return True

    def _map_refused(self) -> cython.bint:
        """The segment under the walk could not be mapped."""
        error = map_error(self.own, int(self.walk.paddr), int(self.walk.size), int(self.attrs))
        return self._refused(error, _RESOURCE)

    def _one_by_python(self) -> cython.bint:
        """``_one`` on a device that is not ours, or that is watched."""
        device = self.device
        assert device is not None, "start comes before next"
        try:
            self.addr = device.map_phys(self.walk.paddr, self.walk.size, self.direction, self.attrs, cpu=self.cpu)
        except DmakitError as error:
            return self._refused(error, _RESOURCE)
        return True


def unmap(
    device: MappingDevice,
    state: Window | None,
    mapped_len: int,
    direction: int,
    map_type: int = P2P_MAP_NONE,
    *,
    cpu: int | None = None,
) -> bool:
    """``blk_rq_dma_unmap``: True when all is undone; False when the caller must unmap each range by itself.

    Bus addresses need nothing; a window is destroyed in one call (``mapped_len`` bytes were linked); a device
    for which ``need_unmap`` is false keeps nothing mapped.
    """
    if map_type == P2P_MAP_BUS_ADDR:
        return True
    if state is not None:
        state.destroy(mapped_len, direction, ATTR_MMIO if map_type == P2P_MAP_THRU_HOST_BRIDGE else 0, cpu=cpu)
        return True
    return not device.need_unmap()


def undo(
    own: Device | None,
    device: MappingDevice,
    state: Window | None,
    mapped: cython.ulonglong,
    direction: cython.int,
    map_type: cython.int,
    cpu: cython.int,
) -> cython.bint:
    """``unmap`` for compiled callers; ``own``: what ``typed_device`` said."""
    window: IovaState
    failed: cython.int
    if own is None or map_type == P2P_MAP_BUS_ADDR:
        return unmap(device, state, mapped, direction, map_type, cpu=cpu)
    if state is None:
        return not own._need_unmap()
    if not isinstance(state, IovaState):
        return unmap(device, state, mapped, direction, map_type, cpu=cpu)
    window = state
    if not window.live or mapped > window.size_word & SIZE_BITS or direction < 0 or direction > DMA_NONE:
        return unmap(device, state, mapped, direction, map_type, cpu=cpu)  # it tells what is wrong
    failed = window._destroy(mapped, direction, ATTR_MMIO if map_type == P2P_MAP_THRU_HOST_BRIDGE else 0, cpu)
    if failed != 0:
        raise cut_error(own, f"destroy: [0x0, {int(mapped):#x})", -failed)
    window._close()
    return True
