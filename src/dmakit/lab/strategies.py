"""The strategies: ways to give a device access to the memory of a request.

=========== ==============================================================================================
direct      no translation: the device uses physical addresses (passthrough, or no IOMMU)
page        a loop of dma_map_phys, one call a segment: the open-coded competitor
sg          a scatterlist table and one dma_map_sg, which merges neighbours into fewer device ranges
sg-nomerge  a scatterlist whose entries are mapped one by one: merging opt-in, as its critics suggest
two-step    what Linux's NVMe driver does today: one map for one segment, else one IOVA window, linked and synced
premap      the buffer's window is mapped when the buffer is registered; a request computes offsets
=========== ==============================================================================================

Each strategy maps and unmaps; descriptors are written by the same NVMe code for all, so the difference between
two strategies is the mapping alone. A strategy records one (path, reason) a request and counts the bytes it keeps
to undo a mapping (``bookkeeping_bytes``) and its walks over the segments (``passes``).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any, cast

from dmakit.block.device import MappingDevice
from dmakit.block.request import Op, Request
from dmakit.block.sg import SgRequest
from dmakit.consts import ATTR_MMIO, L_BOOKKEEPING_BYTES, L_PASSES
from dmakit.dma.batch import map_many, unmap_many
from dmakit.errors import DmakitError, UnsupportedError
from dmakit.lab.descriptors import Descriptors, DescriptorWriter
from dmakit.lab.request_table import IoRequest, Segments
from dmakit.lab.rig import Rig, direction_of
from dmakit.nvme.iod import FAST_PATHS, PATHS, VECTOR_BYTES, Iod
from dmakit.nvme.listed import Ranges
from dmakit.nvme.registration import Registration, register
from dmakit.p2p.decision import MapType
from dmakit.reasons import PathLog, Reason


@dataclass(slots=True)
class Mapped:
    """A mapped request: what the device is told, and what undoes it."""

    descriptors: Descriptors
    token: Any


class Strategy:
    """Base: maps one request after the other on a rig. Subclasses give ``ranges`` and ``release``."""

    name = ""
    path = ""
    identity = False

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.device = rig.device
        self.ledger = rig.ledger
        self.paths = self.path_log()
        self.writer = DescriptorWriter(rig.mapper)

    def path_log(self) -> PathLog:
        """The declared paths of this strategy; its own one is its fast path."""
        return PathLog((self.path,), frozenset({self.path}))

    def prepare(self) -> None:
        """Work that is done once, before the first request."""

    def finish(self) -> None:
        """Undo ``prepare``, after the last request."""

    def map(self, request: IoRequest) -> Mapped:
        """Give the device access; DmakitError leaves nothing mapped."""
        ranges, token = self.ranges(request)
        try:
            descriptors = self.writer.write(ranges, request.size)
        except DmakitError:
            self.release(request, token)
            raise
        return Mapped(descriptors, token)

    def unmap(self, request: IoRequest, mapped: Mapped) -> None:
        """Take the access back."""
        self.writer.drop(mapped.descriptors)
        self.release(request, mapped.token)

    def ranges(self, request: IoRequest) -> tuple[Ranges, Any]:
        """Device ranges of a request and the token that releases them."""
        raise UnsupportedError(f"strategy {self.name!r} maps no ranges")

    def release(self, request: IoRequest, token: Any) -> None:
        """Undo ``ranges``."""

    def keep(self, count: int) -> None:
        """Count bookkeeping bytes."""
        self.ledger.count(L_BOOKKEEPING_BYTES, count)

    def block_request(self, request: IoRequest) -> Request:
        """The block layer's request for the same data."""
        op = Op.READ if request.op == "read" else Op.WRITE
        return Request(op, list(request.bvecs or request.segments), limits=self.rig.limits, cpu=request.cpu)


class Page(Strategy):
    """A loop of dma_map_phys."""

    name = "page"
    path = "map_phys each"

    def ranges(self, request: IoRequest) -> tuple[Ranges, Any]:
        self.ledger.count(L_PASSES)
        done = self._each(request) if self._one_by_one(request) else self._batch(request)
        if self.device.need_unmap() and self.rig.peer is None:
            self.keep(VECTOR_BYTES * len(done))
        self.paths.take(request.number, self.path, self.reason(done))
        return done, done

    def reason(self, ranges: Ranges) -> Reason:
        """Why this path: nothing else was open."""
        return Reason.SINGLE_SEGMENT if len(ranges) == 1 else Reason.STRATEGY

    def _one_by_one(self, request: IoRequest) -> bool:
        """Whether each call must be seen: a peer is asked page by page, and the checker watches single calls."""
        return self.rig.peer is not None or self.device.checker is not None or len(request.segments) == 1

    def _batch(self, request: IoRequest) -> Ranges:
        """The loop as one batch call: the same calls, counted the same."""
        phys, sizes = (array("Q", column) for column in zip(*request.segments, strict=True))
        found = array("Q", bytes(8 * len(phys)))
        map_many(self.device, phys, sizes, found, direction_of(request), cpu=request.cpu)
        return list(zip(found, sizes, strict=True))

    def _each(self, request: IoRequest) -> Ranges:
        direction = direction_of(request)
        done: Ranges = []
        try:
            for phys, size in request.segments:
                done.append((self._one(phys, size, direction, request.cpu), size))
        except DmakitError:
            self.release(request, done)
            raise
        return done

    def _one(self, phys: int, size: int, direction: int, cpu: int) -> int:
        peer = self.rig.peer
        if peer is None:
            return self.device.map_phys(phys, size, direction, cpu=cpu)
        peer.reset()  # a loop over pages has no memo: each page asks again
        kind = peer.map_type(phys)
        if kind == MapType.BUS_ADDR:
            return peer.bus_address(phys)
        if kind == MapType.THRU_HOST_BRIDGE:
            return self.device.map_phys(phys, size, direction, ATTR_MMIO, cpu=cpu)
        raise UnsupportedError(f"peer memory at {phys:#x} cannot be reached", 121)

    def release(self, request: IoRequest, token: Any) -> None:
        if self.rig.options.p2p == "bus":
            return
        direction, cpu = direction_of(request), request.complete_cpu
        attrs = ATTR_MMIO if self.rig.peer is not None else 0
        if not self._one_by_one(request):
            found, sizes = (array("Q", column) for column in zip(*token, strict=True))
            unmap_many(self.device, found, sizes, direction, attrs, cpu=cpu)
            return
        for addr, size in token:
            self.device.unmap_phys(addr, size, direction, attrs, cpu=cpu)


class Direct(Page):
    """The same loop on a device without translation."""

    name = "direct"
    path = "physical addresses"
    identity = True

    def reason(self, ranges: Ranges) -> Reason:
        return Reason.NO_IOMMU if self.rig.options.iommu == "none" else Reason.IDENTITY_DOMAIN


class Sg(Strategy):
    """A scatterlist table and one dma_map_sg."""

    name = "sg"
    path = "map_sg"

    def ranges(self, request: IoRequest) -> tuple[Ranges, Any]:
        peer = self.rig.peer
        if peer is not None:
            peer.reset()
        sg = SgRequest(self.block_request(request), cast(MappingDevice, self.device), ledger=self.ledger)
        if peer is not None:
            reason = Reason.P2P_BUS if self.rig.options.p2p == "bus" else Reason.P2P_HOST_BRIDGE
        else:
            merged = len(sg.ranges) < len(request.segments) or len(request.segments) == 1
            reason = Reason.SG_MERGED if merged else Reason.SG_NOT_MERGED
        self.paths.take(request.number, self.path, reason)
        return sg.consume(), sg

    def release(self, request: IoRequest, token: Any) -> None:
        token.unmap(cpu=request.complete_cpu)


class SgNoMerge(Page):
    """A scatterlist whose entries are mapped one by one."""

    name = "sg-nomerge"
    path = "map each entry"

    def ranges(self, request: IoRequest) -> tuple[Ranges, Any]:
        done, token = super().ranges(request)
        self.ledger.count(L_PASSES, 2)
        kept = VECTOR_BYTES * len(done) if self.device.need_unmap() and self.rig.peer is None else 0
        self.keep(32 * len(done) - kept)
        return done, token


class TwoStep(Strategy):
    """What the NVMe driver does: its own decisions, windows and fallbacks."""

    name = "two-step"

    def path_log(self) -> PathLog:
        return PathLog(PATHS, FAST_PATHS)

    def map(self, request: IoRequest) -> Mapped:
        if self.rig.peer is not None:
            self.rig.peer.reset()
        iod: Iod = self.rig.mapper.map(self.block_request(request))
        self.paths.take(request.number, iod.path_name, Reason(iod.reason))
        if iod.status:
            raise iod.error if isinstance(iod.error, DmakitError) else UnsupportedError(f"status {iod.status}")
        return Mapped(Descriptors.of(iod, request.size), iod)

    def unmap(self, request: IoRequest, mapped: Mapped) -> None:
        self.rig.mapper.unmap(mapped.token, cpu=request.complete_cpu)


class Premap(Strategy):
    """Registered buffers: one window for each distinct buffer, mapped once for both directions."""

    name = "premap"
    path = "registered buffer"

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        self.registered: dict[Segments, Registration] = {}

    def prepare(self) -> None:
        if self.rig.peer is not None:
            raise UnsupportedError("premap registers memory of this machine, not of a peer device")
        try:
            for layout in self.rig.workload.requests.layouts:
                if layout.segments not in self.registered:
                    self.registered[layout.segments] = register(self.device, layout.segments)
        except DmakitError:
            self.finish()
            raise

    def ranges(self, request: IoRequest) -> tuple[Ranges, Any]:
        self.paths.take(request.number, self.path, Reason.PREMAPPED)
        return self.registered[request.segments].ranges, None

    def finish(self) -> None:
        for registration in self.registered.values():
            registration.release()
        self.registered.clear()


STRATEGIES: dict[str, type[Strategy]] = {kind.name: kind for kind in (Direct, Page, Sg, SgNoMerge, TwoStep, Premap)}
