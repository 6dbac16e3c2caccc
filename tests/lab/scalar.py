"""A comparison as plain as it can be said: one request after the other, by public calls only.

The truth model of ``lab.engine`` and ``lab.strategies``: what they do by stretches, in flat arrays and by internals, is
done here with lists, objects and the device's scalar calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dmakit.block.request import Op, Request
from dmakit.block.sg import SgRequest
from dmakit.consts import ATTR_MMIO, DMA_FROM_DEVICE, DMA_TO_DEVICE, L_BOOKKEEPING_BYTES, L_PASSES, PSDT_PRP
from dmakit.errors import DmakitError, FaultError, UnsupportedError
from dmakit.lab.request_table import IoRequest
from dmakit.lab.rig import Rig
from dmakit.lab.schedule import SUBMIT
from dmakit.ledger import ROWS, difference
from dmakit.nvme.iod import PATHS
from dmakit.nvme.listed import describe
from dmakit.nvme.prp import PrpWalker
from dmakit.nvme.registration import register
from dmakit.nvme.sgl import SglWalker
from dmakit.p2p.decision import MapType
from dmakit.reasons import Reason

Ranges = list[tuple[int, int]]
Mapped = tuple[int, int, int, Callable[[], None]]
"""(PSDT, low word, high word, what undoes it)."""


class Scalar:
    """Runs ``name`` on a rig; attributes as of a ``StrategyResult``; ``log`` is [(request, path, reason)]."""

    def __init__(self, rig: Rig, name: str, payload: Callable[[int, int], bytes]) -> None:
        self.rig, self.name, self.payload = rig, name, payload
        self.device, self.ledger, self.peer = rig.device, rig.ledger, rig.peer
        self.cpu: Any = rig.machine.cache or rig.machine.memory
        self.requests = self.size = self.wrong = self.failed = self.faults = 0
        self.log: list[tuple[int, str, Reason]] = []
        self.submission, self.completion = ({row.name: 0 for row in ROWS} for _ in range(2))
        self.inflight: dict[int, tuple[IoRequest, Mapped]] = {}
        self.registered: dict[Any, Any] = {}
        self.shared = self._shared()

    def _shared(self) -> set[int]:
        """Requests that share a page with another one in flight: each against each."""
        pages: dict[int, set[int]] = {}
        found: set[int] = set()
        for kind, number in self.rig.workload.schedule:
            if kind != SUBMIT:
                del pages[number]
                continue
            segments = self.rig.workload.requests.numbered(number).segments
            mine = {page for phys, n in segments for page in range(phys >> 12, (phys + n + 4095) >> 12)}
            for other, theirs in pages.items():
                if mine & theirs:
                    found |= {number, other}
            pages[number] = mine
        return found

    def run(self) -> None:
        blank = self.ledger.snapshot()
        if self.name == "premap":
            self._register()
        before = self.ledger.snapshot()
        self.setup = difference(before, blank)
        for kind, number in self.rig.workload.schedule:
            if kind == SUBMIT:
                self.submit(self.rig.workload.requests.numbered(number))
            elif number in self.inflight:
                self.complete(*self.inflight.pop(number))
            self.rig.machine.clock.advance(10_000)
        self.rig.machine.settle()
        self.counted = difference(self.ledger.snapshot(), before)
        for registration in self.registered.values():
            registration.release()

    def _register(self) -> None:
        if self.peer is not None:
            raise UnsupportedError("premap registers memory of this machine, not of a peer device")
        for layout in self.rig.workload.requests.layouts:
            if layout.segments not in self.registered:
                self.registered[layout.segments] = register(self.device, layout.segments)

    def _phase(self, sums: dict[str, int], work: Callable[[], Any]) -> Any:
        before = self.ledger.snapshot()
        try:
            return work()
        finally:
            for name, count in difference(self.ledger.snapshot(), before).items():
                sums[name] += count

    def submit(self, request: IoRequest) -> None:
        if request.op == "write":
            at = 0
            payload = self.payload(request.number, request.size)
            for phys, size in request.segments:
                self.cpu.write(phys, payload[at : at + size])
                at += size
        try:
            self.inflight[request.number] = request, self._phase(self.submission, lambda: self.map(request))
        except DmakitError:
            self.failed += 1

    def complete(self, request: IoRequest, mapped: Mapped) -> None:
        expected = self.payload(request.number, request.size)
        if request.op == "write" and request.number in self.shared:
            expected = self._held(request)
        found = b""
        try:
            found = self._io(request, mapped, expected)
        except FaultError:
            self.faults += 1
        self._phase(self.completion, mapped[3])
        if request.op == "read":
            found = self._held(request)
        padded = found.ljust(len(expected), b"\0")
        differ = sum(a != b for a, b in zip(expected, padded, strict=True))
        self.wrong += differ if found else len(expected)
        self.requests += 1
        self.size += request.size

    def _held(self, request: IoRequest) -> bytes:
        return b"".join(self.cpu.read(phys, size) for phys, size in request.segments)

    # The device ---------------------------------------------------------------------------------------------

    def _io(self, request: IoRequest, mapped: Mapped, payload: bytes) -> bytes:
        at = 0
        found = b""
        for addr, size in self._fetch(request, mapped):
            if request.op == "read":
                self.device.dma_write(addr, payload[at : at + size])
            else:
                found += self.device.dma_read(addr, size)
            at += size
        return found

    def _fetch(self, request: IoRequest, mapped: Mapped) -> Ranges:
        psdt, low, high, _ = mapped
        if psdt == PSDT_PRP:
            prp = PrpWalker()
            prp.begin(low, high, request.size)
            while prp.list_entries and not prp.status:
                prp.list_words(self.device.dma_read(prp.list_addr, prp.list_entries << 3))
            status, ranges = prp.status, prp.ranges
        else:
            sgl = SglWalker()
            sgl.begin(low, high, request.size, to_host=request.op == "read")
            while sgl.segment_bytes and not sgl.status:
                sgl.segment(self.device.dma_read(sgl.segment_addr, sgl.segment_bytes))
            status, ranges = sgl.status, sgl.ranges
        if status:
            raise FaultError(f"status {status:#x}")
        return ranges

    # The strategies -----------------------------------------------------------------------------------------

    def map(self, request: IoRequest) -> Mapped:
        if self.name == "two-step":
            return self._two_step(request)
        ways = {"sg": self._sg, "premap": self._premapped}
        ranges, release = ways.get(self.name, self._each)(request)
        try:
            psdt, low, high, chain, _ = describe(self.rig.mapper, ranges, request.size)
        except DmakitError:
            release()
            raise

        def undo() -> None:
            self.rig.mapper.prp.drop(chain)
            release()

        return psdt, low, high, undo

    def _block(self, request: IoRequest) -> Request:
        op = Op.READ if request.op == "read" else Op.WRITE
        return Request(op, list(request.bvecs or request.segments), limits=self.rig.limits, cpu=request.cpu)

    def _two_step(self, request: IoRequest) -> Mapped:
        if self.peer is not None:
            self.peer.reset()
        iod = self.rig.mapper.map(self._block(request))
        self.log.append((request.number, PATHS[iod.path], Reason(iod.reason)))
        if iod.status:
            raise UnsupportedError(f"status {iod.status}")
        return iod.psdt, iod.low, iod.high, lambda: self.rig.mapper.unmap(iod, cpu=request.complete_cpu)

    def _premapped(self, request: IoRequest) -> tuple[Ranges, Callable[[], None]]:
        self.log.append((request.number, "registered buffer", Reason.PREMAPPED))
        return self.registered[request.segments].ranges, lambda: None

    def _sg(self, request: IoRequest) -> tuple[Ranges, Callable[[], None]]:
        sg = SgRequest(self._block(request), self.device, ledger=self.ledger)
        merged = len(sg.ranges) < len(request.segments) or len(request.segments) == 1
        reason = Reason.SG_MERGED if merged else Reason.SG_NOT_MERGED
        if self.peer is not None:
            reason = Reason.P2P_BUS if self.rig.options.p2p == "bus" else Reason.P2P_HOST_BRIDGE
        self.log.append((request.number, "map_sg", reason))
        return sg.consume(), lambda: sg.unmap(cpu=request.complete_cpu)

    def _each(self, request: IoRequest) -> tuple[Ranges, Callable[[], None]]:
        direction = DMA_FROM_DEVICE if request.op == "read" else DMA_TO_DEVICE
        done: Ranges = []
        alone = self.peer is None and self.device.checker is None

        def release(cpu: int = request.complete_cpu) -> None:
            for addr, size in done if self.rig.options.p2p != "bus" else ():
                self.device.unmap_phys(addr, size, direction, 0 if self.peer is None else ATTR_MMIO, cpu=cpu)

        self.ledger.count(L_PASSES)
        try:
            for phys, size in request.segments:
                done.append((self._one(phys, size, direction, request.cpu), size))
        except DmakitError:
            release(request.cpu if alone else request.complete_cpu)
            raise
        kept = 16 if self.peer is None and self.device.need_unmap() else 0
        if self.name == "sg-nomerge":
            self.ledger.count(L_PASSES, 2)
            kept = 32
        self.ledger.count(L_BOOKKEEPING_BYTES, kept * len(done))
        self.log.append((request.number, *self._why(len(done))))
        return done, release

    def _why(self, pieces: int) -> tuple[str, Reason]:
        if self.name == "direct":
            none = self.rig.options.iommu == "none"
            return "physical addresses", Reason.NO_IOMMU if none else Reason.IDENTITY_DOMAIN
        path = "map_phys each" if self.name == "page" else "map each entry"
        return path, Reason.SINGLE_SEGMENT if pieces == 1 else Reason.STRATEGY

    def _one(self, phys: int, size: int, direction: int, cpu: int) -> int:
        if self.peer is None:
            return self.device.map_phys(phys, size, direction, cpu=cpu)
        self.peer.reset()
        kind = self.peer.map_type(phys)
        if kind == MapType.BUS_ADDR:
            return self.peer.bus_address(phys)
        assert kind == MapType.THRU_HOST_BRIDGE
        return self.device.map_phys(phys, size, direction, ATTR_MMIO, cpu=cpu)
