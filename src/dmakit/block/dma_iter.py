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

import cython

from dmakit.block.device import MappingDevice, PeerMemory, Window
from dmakit.block.status import BlkStatus, errno_to_blk_status
from dmakit.dma.report import link_error, map_error
from dmakit.errors import DmakitError, MisuseError
from dmakit.reasons import Reason

if not cython.compiled:
    from dmakit.block.request import Payload, Request
    from dmakit.block.segments import SegmentIter
    from dmakit.consts import (
        ATTR_MMIO,
        P2P_MAP_BUS_ADDR,
        P2P_MAP_NONE,
        P2P_MAP_NOT_SUPPORTED,
        P2P_MAP_THRU_HOST_BRIDGE,
    )
    from dmakit.dma.iova_state import IovaState
    from dmakit.dma.streaming import Streaming

GAP_RULE = "gap"
VIRT_BOUNDARY_RULE = "virt-boundary"
RULES = (GAP_RULE, VIRT_BOUNDARY_RULE)


def may_coalesce(request: Request, payload: Payload, boundary: int, rule: str = GAP_RULE) -> bool:
    """Whether the rule allows one window for ``payload``, given the device's merge boundary (a mask).

    ``gap`` (Linux 6.19 and later): no bit of the payload's gap mask lies inside the boundary. ``virt-boundary``
    (6.17 and 6.18): the queue's virtual boundary is at least as wide. A boundary of 0 forbids nothing here:
    without an IOMMU the window cannot be allocated.
    """
    if rule == GAP_RULE:
        return payload.gap_mask & boundary == 0
    if rule == VIRT_BOUNDARY_RULE:
        return (request.limits.virt_boundary_mask + 1) & boundary == 0
    raise MisuseError(f"rule={rule!r}: must be one of {', '.join(RULES)}")


def _without_window(device: MappingDevice) -> int:
    """Why a device gave no window."""
    if device.translating:
        return int(Reason.IOVA_EXHAUSTED)
    return int(Reason.IDENTITY_DOMAIN if device.identity else Reason.NO_IOMMU)


def typed_device(device: MappingDevice, cpu: cython.int) -> Streaming | None:
    """The device, when its typed internals may be called: one of ours, no checker watches, ``cpu`` exists."""
    own: Streaming
    if not isinstance(device, Streaming):
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
        self.device: MappingDevice | None = None
        self.own: Streaming | None = None
        self.error: DmakitError | None = None
        self.status = int(BlkStatus.OK)
        self.reason = int(Reason.NONE)
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
    ) -> bool:
        """Map the first range of the data (or integrity) payload; False with ``status`` OK when there is none."""
        payload: Payload = request.integrity if integrity else request.data
        self.device = device
        self.state = None
        self.error = None
        self.status = int(BlkStatus.OK)
        self.reason = int(Reason.NONE)
        self.map_type = P2P_MAP_NONE
        self.mapped = 0
        self.attrs = 0
        self.bus_offset = 0
        self.direction = request.direction
        self.cpu = request.cpu
        self.own = typed_device(device, self.cpu)
        payload._iterate(self.walk)
        if not self.walk._next():
            return False
        if peer is not None and not self._classify(peer):
            return False
        if self.map_type != P2P_MAP_BUS_ADDR:
            if may_coalesce(request, payload, device.merge_boundary, rule):
                state = device.try_alloc(self.walk.paddr, payload.size, cpu=self.cpu)
                if state:
                    return self._start_window(payload, state)
                self._because(_without_window(device))
            else:
                gap = rule == GAP_RULE
                self._because(int(Reason.GAP_IN_MERGE_BOUNDARY if gap else Reason.NO_VIRT_BOUNDARY))
        return self._one()

    def next(self) -> bool:
        """Map the next segment of a request that was not coalesced; False at the end or on failure."""
        if self.state is not None or not self.walk._next():
            return False
        return self._one()

    def _because(self, reason: cython.int) -> cython.void:
        """Record why; a peer-to-peer decision made before stands."""
        if self.reason == 0:
            self.reason = reason

    def _classify(self, peer: PeerMemory) -> cython.bint:
        """Ask what memory the first segment is; False when the device cannot reach it."""
        peer.reset()
        self.map_type = int(peer.map_type(self.walk.paddr))
        self.bus_offset = peer.bus_offset
        if self.map_type == P2P_MAP_BUS_ADDR:
            self.reason = int(Reason.P2P_BUS)
        elif self.map_type == P2P_MAP_THRU_HOST_BRIDGE:
            self.reason = int(Reason.P2P_HOST_BRIDGE)
            self.attrs = ATTR_MMIO
        elif self.map_type != P2P_MAP_NONE:
            self.map_type = P2P_MAP_NOT_SUPPORTED
            self.reason = int(Reason.P2P_NOT_SUPPORTED)
            self.status = int(BlkStatus.INVAL)
            return False
        return True

    def _start_window(self, payload: Payload, state: Window) -> cython.bint:
        """Link every segment into the window and sync once; on failure destroy it with what was linked."""
        walk: SegmentIter = self.walk
        mapped: cython.ulonglong = 0
        self.addr = state.addr
        self.len = payload.size
        self._because(int(Reason.COALESCED))
        if isinstance(state, IovaState) and state.core.checker is None:
            return self._link_window(state)
        try:
            while True:
                state.link(walk.paddr, mapped, walk.size, self.direction, self.attrs)
                mapped += walk.size
                if not walk._next():
                    break
            state.sync(0, mapped)
        except DmakitError as error:
            state.destroy(mapped, self.direction, self.attrs)
            self.error = error
            self.status = int(errno_to_blk_status(error.errno))
            return False
        self.state = state
        self.mapped = mapped
        return True

    def _link_window(self, state: IovaState) -> cython.bint:
        """The rest of ``_start_window`` for a window of the machine's own: no Python call a segment."""
        walk: SegmentIter = self.walk
        mapped: cython.ulonglong = 0
        failed: cython.int
        while True:
            failed = state._link(walk.paddr, mapped, walk.size, self.direction, self.attrs, state.cpu)
            if failed != 0:
                break
            mapped += walk.size
            if not walk._next():
                break
        if failed != 0:
            error = link_error(
                state.core, int(failed), int(walk.paddr), int(mapped), int(walk.size), self.direction, self.attrs
            )
            state.destroy(mapped, self.direction, self.attrs)
            self.error = error
            self.status = int(errno_to_blk_status(error.errno))
            return False
        state._sync(0, mapped, state.cpu)
        state._note_run(mapped, self.direction, self.attrs)
        self.state = state
        self.mapped = mapped
        return True

    def _one(self) -> cython.bint:
        """Give the segment under the walk its own address."""
        if self.map_type == P2P_MAP_BUS_ADDR:
            self.addr = self.walk.paddr + self.bus_offset
        elif self.own is not None:
            self.addr = self.own._map_phys(self.walk.paddr, self.walk.size, self.direction, self.attrs, self.cpu)
            if self.addr == 0:
                self.error = map_error(self.own, int(self.walk.paddr), int(self.walk.size), int(self.attrs))
                self.status = int(BlkStatus.RESOURCE)
                return False
        else:
            device = self.device
            assert device is not None, "start comes before next"
            try:
                self.addr = device.map_phys(self.walk.paddr, self.walk.size, self.direction, self.attrs, cpu=self.cpu)
            except DmakitError as error:
                self.error = error
                self.status = int(BlkStatus.RESOURCE)
                return False
        self.len = self.walk.size
        self.mapped += self.len
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
