"""The strategies: ways to give a device access to the memory of a request.

=========== ==============================================================================================
direct      no translation: the device uses physical addresses (passthrough, or no IOMMU)
page        a loop of dma_map_phys, one call a segment: the open-coded competitor
sg          a scatterlist table and one dma_map_sg, which merges neighbours into fewer device ranges
sg-nomerge  a scatterlist whose entries are mapped one by one: merging opt-in, as its critics suggest
two-step    what Linux's NVMe driver does today: one map for one segment, else one IOVA window, linked and synced
premap      the buffer's window is mapped when the buffer is registered; a request computes offsets
=========== ==============================================================================================

Each strategy maps and unmaps flights (``lab.flight``); descriptors are written by the same NVMe code for all, so the
difference between two strategies is the mapping alone. A strategy leaves one (path, reason) a request in the flight and
counts the bytes it keeps to undo a mapping (``bookkeeping_bytes``) and its walks over the segments (``passes``).

What a request needs of the block layer depends on its layout and direction alone, so it is made once for each of these.
Where every call must be seen by itself (the contract checker, a peer that is asked page by page) the same strategy
makes the device's public calls.
"""

from __future__ import annotations

from typing import Any

import cython

from dmakit.block.request import Op
from dmakit.block.sg import blk_rq_map_sg, table_bytes
from dmakit.dma.report import map_error, sg_error
from dmakit.errors import DmakitError, MisuseError, UnsupportedError
from dmakit.lab.request_table import Layout, Segments
from dmakit.nvme.iod import FAST_PATHS, PATHS
from dmakit.nvme.registration import Registration, register
from dmakit.p2p.decision import MapType
from dmakit.reasons import PathLog, Reason

if not cython.compiled:
    from dmakit.block.request import Request
    from dmakit.consts import ATTR_MMIO, EREMOTEIO, L_BOOKKEEPING_BYTES, L_PASSES
    from dmakit.dma.device import Device
    from dmakit.dma.scatter import SgMapping
    from dmakit.lab.descriptors import DescriptorWriter
    from dmakit.lab.flight import Flight, Ranges
    from dmakit.nvme.iod import Iod
    from dmakit.nvme.mapping import RequestMapper

_VECTOR_BYTES = 16
_SG_ENTRY_BYTES = 32
_SINGLE_SEGMENT = int(Reason.SINGLE_SEGMENT)
_STRATEGY = int(Reason.STRATEGY)
_SG_MERGED = int(Reason.SG_MERGED)
_SG_NOT_MERGED = int(Reason.SG_NOT_MERGED)
_PREMAPPED = int(Reason.PREMAPPED)


@cython.cclass
class Strategy:
    """Base: maps and unmaps flights on a rig. Subclasses give ``_ranges`` and ``_release``."""

    name = ""
    path = ""
    identity = False

    def __init__(self, rig: Any) -> None:
        self.rig = rig
        self.device = rig.device
        self.ledger = rig.ledger
        self.peer = rig.peer
        self.layouts: list[Layout] = rig.workload.requests.layouts
        self.writer = DescriptorWriter(rig.mapper)
        self.watched = rig.device.checker is not None

    def path_log(self) -> PathLog:
        """The declared paths of this strategy; its own one is its fast path."""
        return PathLog((self.path,), frozenset({self.path}))

    def prepare(self) -> None:
        """Work that is done once, before the first request."""

    def finish(self) -> None:
        """Undo ``prepare``, after the last request."""

    def _map(self, f: Flight) -> cython.int:
        """Give the device access; DmakitError leaves nothing mapped."""
        self._ranges(f)
        try:
            self.writer._write(f)
        except DmakitError:
            self._release(f)
            raise
        return 0

    def _unmap(self, f: Flight) -> cython.int:
        """Take the access back."""
        self.writer._drop(f)
        return self._release(f)

    def _ranges(self, f: Flight) -> cython.int:
        """Let the flight have the device ranges of its request."""
        raise UnsupportedError(f"strategy {self.name!r} maps no ranges")

    def _release(self, f: Flight) -> cython.int:
        """Undo ``_ranges``."""
        return 0

    def request_of(self, layout: int, reads: bool) -> Request:
        """The block layer's request for a layout."""
        shape = self.layouts[layout]
        op = Op.READ if reads else Op.WRITE
        return Request(op, list(shape.bvecs or shape.segments), limits=self.rig.limits)


@cython.cclass
class Page(Strategy):
    """A loop of dma_map_phys."""

    name = "page"
    path = "map_phys each"

    def __init__(self, rig: Any) -> None:
        Strategy.__init__(self, rig)
        self.bus = rig.options.p2p == "bus"
        self.attrs = ATTR_MMIO if rig.peer is not None else 0

    def _ranges(self, f: Flight) -> cython.int:
        self.ledger.counts[L_PASSES] += 1
        f._own_ranges()
        if self.watched or self.peer is not None:
            self._each(f)
        else:
            self._batch(f)
        if self.peer is None and self.device._need_unmap():
            self.ledger.counts[L_BOOKKEEPING_BYTES] += _VECTOR_BYTES * f.count
        f.taken = self._reason(f)
        return 0

    def _reason(self, f: Flight) -> cython.int:
        """Why this path: nothing else was open."""
        return _SINGLE_SEGMENT if f.count == 1 else _STRATEGY

    def _batch(self, f: Flight) -> cython.int:
        """The loop without a Python call a piece; all or nothing."""
        device: Device = self.device
        i: cython.Py_ssize_t
        done: cython.Py_ssize_t
        for done in range(f.count):
            f.addr[done] = device._map_phys(f.phys[done], f.length[done], f.direction, 0, f.cpu)
            if f.addr[done] == 0:
                error = map_error(device, int(f.phys[done]), int(f.length[done]), 0)
                for i in range(done):
                    device._unmap_phys(f.addr[i], f.length[i], f.direction, 0, f.cpu)
                raise error
        return 0

    def _each(self, f: Flight) -> cython.int:
        """The loop by public calls."""
        at: cython.Py_ssize_t = 0
        wanted: cython.Py_ssize_t = f.count
        try:
            for at in range(wanted):
                f.addr[at] = self.one(int(f.phys[at]), int(f.length[at]), int(f.direction), int(f.cpu))
        except DmakitError:
            f.count = at
            self._release(f)
            raise
        return 0

    def one(self, phys: int, size: int, direction: int, cpu: int) -> int:
        """The device's address of one piece."""
        peer = self.peer
        found: int
        if peer is None:
            found = self.device.map_phys(phys, size, direction, cpu=cpu)
            return found
        peer.reset()  # a loop over pages has no memo: each page asks again
        kind = peer.map_type(phys)
        if kind == MapType.BUS_ADDR:
            found = peer.bus_address(phys)
            return found
        if kind == MapType.THRU_HOST_BRIDGE:
            found = self.device.map_phys(phys, size, direction, ATTR_MMIO, cpu=cpu)
            return found
        raise UnsupportedError(f"peer memory at {phys:#x} cannot be reached", EREMOTEIO)

    def _release(self, f: Flight) -> cython.int:
        i: cython.Py_ssize_t
        if self.bus:
            return 0
        for i in range(f.count):
            if self.watched:
                self.device.unmap_phys(int(f.addr[i]), int(f.length[i]), f.direction, self.attrs, cpu=f.end_cpu)
            elif self.device._unmap_phys(f.addr[i], f.length[i], f.direction, self.attrs, f.end_cpu) != 0:
                raise MisuseError(f"unmap_phys: nothing is mapped at {int(f.addr[i]):#x}", rule="not-mapped")
        return 0


@cython.cclass
class Direct(Page):
    """The same loop on a device without translation."""

    name = "direct"
    path = "physical addresses"
    identity = True

    def __init__(self, rig: Any) -> None:
        Page.__init__(self, rig)
        self.why = int(Reason.NO_IOMMU if rig.options.iommu == "none" else Reason.IDENTITY_DOMAIN)

    def _reason(self, f: Flight) -> cython.int:
        return self.why


@cython.cclass
class Sg(Strategy):
    """A scatterlist table and one dma_map_sg."""

    name = "sg"
    path = "map_sg"

    def __init__(self, rig: Any) -> None:
        Strategy.__init__(self, rig)
        self.entries: list[list[tuple[int, int]] | None] = [None] * len(self.layouts)
        self.tables: list[int] = [0] * len(self.layouts)
        self.idle: list[list[SgMapping]] = [[] for _ in self.layouts]
        self.peer_reason = 0
        if rig.peer is not None:
            self.peer_reason = int(Reason.P2P_BUS if rig.options.p2p == "bus" else Reason.P2P_HOST_BRIDGE)

    def _ranges(self, f: Flight) -> cython.int:
        sg: SgMapping
        pieces: cython.Py_ssize_t = f.count
        if self.entries[f.layout] is None:
            self.shape(f.layout)
        self.ledger.counts[L_BOOKKEEPING_BYTES] += self.tables[f.layout]
        self.ledger.counts[L_PASSES] += 1
        if self.watched:
            sg = self.device.map_sg(self.entries[f.layout], f.direction, cpu=f.cpu)
        else:
            sg = self._mapped(f)
        self.ledger.counts[L_PASSES] += 2  # the driver walks the mapped entries when it writes its descriptors
        f.token = sg
        f.addr, f.length, f.count = sg.addr, sg.out_length, sg.count
        if self.peer_reason != 0:
            f.taken = self.peer_reason
        else:
            f.taken = _SG_MERGED if sg.count < pieces or pieces == 1 else _SG_NOT_MERGED
        return 0

    def shape(self, layout: int) -> None:
        """What the block layer makes of a layout: the entries of its scatterlist, and the bytes of the table."""
        request = self.request_of(layout, True)
        self.tables[layout] = table_bytes(request.segments)
        self.entries[layout] = blk_rq_map_sg(request)

    def _mapped(self, f: Flight) -> SgMapping:
        """``map_sg`` without making its list anew."""
        sg: SgMapping
        count: cython.Py_ssize_t
        idle: list[SgMapping] = self.idle[f.layout]
        if idle:
            sg = idle.pop()
        else:
            sg = self.fresh(f.layout)
        sg.direction = f.direction
        count = self.device._map_sg(sg, f.cpu)
        if count <= 0:
            idle.append(sg)
            raise sg_error(self.device, int(count), sg)
        return sg

    def fresh(self, layout: int) -> SgMapping:
        """A scatterlist with the entries of a layout."""
        entries = self.entries[layout] or []
        sg: SgMapping = SgMapping(len(entries))
        at: cython.Py_ssize_t = 0
        for phys, length in entries:
            sg.phys[at] = phys
            sg.length[at] = length
            at += 1
        sg.entries = at
        return sg

    def _release(self, f: Flight) -> cython.int:
        sg: SgMapping = f.token
        f.token = None
        if self.watched:
            self.device.unmap_sg(sg, cpu=f.end_cpu)
            return 0
        self.device._unmap_sg(sg, f.end_cpu)
        idle: list[SgMapping] = self.idle[f.layout]
        idle.append(sg)
        return 0


@cython.cclass
class SgNoMerge(Page):
    """A scatterlist whose entries are mapped one by one."""

    name = "sg-nomerge"
    path = "map each entry"

    def _ranges(self, f: Flight) -> cython.int:
        kept: cython.longlong
        Page._ranges(self, f)
        self.ledger.counts[L_PASSES] += 2
        kept = _VECTOR_BYTES if self.peer is None and self.device._need_unmap() else 0
        self.ledger.counts[L_BOOKKEEPING_BYTES] += (_SG_ENTRY_BYTES - kept) * f.count
        return 0


@cython.cclass
class TwoStep(Strategy):
    """What the NVMe driver does: its own decisions, windows and fallbacks."""

    name = "two-step"

    def __init__(self, rig: Any) -> None:
        Strategy.__init__(self, rig)
        self.mapper: RequestMapper = rig.mapper
        self.requests: list[Request | None] = [None] * (2 * len(self.layouts))

    def path_log(self) -> PathLog:
        return PathLog(PATHS, FAST_PATHS)

    def _map(self, f: Flight) -> cython.int:
        at: cython.Py_ssize_t = 2 * f.layout + f.reads
        request: Request | None = self.requests[at]
        iod: Iod
        if self.peer is not None:
            self.peer.reset()
        if request is None:
            request = self.requests[at] = self.request_of(f.layout, f.reads)
        if f.token is None:
            f.token = Iod(request)
        iod = f.token
        self.mapper._map_into(iod, request, f.cpu, False)
        f.taken = iod.path << 8 | iod.reason
        if iod.status != 0:
            raise iod.error if isinstance(iod.error, DmakitError) else UnsupportedError(f"status {iod.status}")
        f.psdt, f.low, f.high = iod.psdt, iod.low, iod.high
        return 0

    def _unmap(self, f: Flight) -> cython.int:
        return self.mapper._unmap(f.token, f.end_cpu)


@cython.cclass
class Premap(Strategy):
    """Registered buffers: one window for each distinct buffer, mapped once for both directions."""

    name = "premap"
    path = "registered buffer"

    def __init__(self, rig: Any) -> None:
        Strategy.__init__(self, rig)
        self.registered: dict[Segments, Registration] = {}
        self.windows = Ranges([])

    def prepare(self) -> None:
        if self.peer is not None:
            raise UnsupportedError("premap registers memory of this machine, not of a peer device")
        try:
            for layout in self.layouts:
                if layout.segments not in self.registered:
                    self.registered[layout.segments] = register(self.device, layout.segments)
        except DmakitError:
            self.finish()
            raise
        self.windows = Ranges([tuple(self.registered[layout.segments].ranges) for layout in self.layouts])

    def _ranges(self, f: Flight) -> cython.int:
        windows: Ranges = self.windows
        first: cython.Py_ssize_t = windows.bounds[f.layout]
        end: cython.Py_ssize_t = windows.bounds[f.layout + 1]
        f.taken = _PREMAPPED
        f.addr, f.length, f.count = windows.addr[first:end], windows.length[first:end], end - first
        return 0

    def finish(self) -> None:
        for registration in self.registered.values():
            registration.release()
        self.registered.clear()


STRATEGIES: dict[str, type[Strategy]] = {kind.name: kind for kind in (Direct, Page, Sg, SgNoMerge, TwoStep, Premap)}
