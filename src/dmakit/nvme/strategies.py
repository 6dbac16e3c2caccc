"""How a driver gives a controller access to a request's memory: four strategies behind one interface.

========== ===================================================================================================
two-step   what Linux's driver does: one map for one segment, else one window, linked and synced (``mapping``)
page       a loop of dma_map_phys, one call a segment
sg         a scatterlist table and one dma_map_sg, which merges neighbours into fewer device ranges
premap     memory is registered once (``register``) and stays mapped; a request computes addresses
========== ===================================================================================================

All of them write descriptors by the same rules: an SGL where the controller has them and PRPs cannot say it or ranges
are large on average, else PRPs. Requests without data, and metadata, are ``RequestMapper``'s.

Registered memory is mapped for both directions, as one window where the two-step API can, so that a request is
usually one range. It needs a device that snoops, and memory that is not bounced.
"""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dmakit.block.request import Request
from dmakit.block.sg import SgRequest
from dmakit.block.status import BlkStatus
from dmakit.consts import L_BOOKKEEPING_BYTES, L_BOUNCE_MAPS, L_DESCRIPTORS, L_PASSES, PAGE_SIZE
from dmakit.dma.direction import Direction
from dmakit.errors import DmakitError, MisuseError, UnsupportedError
from dmakit.nvme.iod import IOD_DATA_MAPPED, PATH_EACH, PATH_FAILED, PATH_REGISTERED, PATH_SG, VECTOR_BYTES, Iod
from dmakit.nvme.mapping import RequestMapper
from dmakit.nvme.prp import entries_needed
from dmakit.nvme.spec import PSDT_PRP, PSDT_SGL_METABUF
from dmakit.reasons import Reason

Ranges = list[tuple[int, int]]


class Mapper(Protocol):
    """What the driver asks of a strategy."""

    def map(self, request: Request) -> Iod:
        """Map a request; ``iod.status`` tells how it went, and on failure nothing is mapped."""

    def unmap(self, iod: Iod, *, cpu: int | None = None) -> None:
        """Undo ``map``."""


class Registration:
    """Memory that stays mapped: ``pieces`` are (phys, length, device address), sorted by phys."""

    def __init__(self, pieces: list[tuple[int, int, int]], undo: Callable[[], None]) -> None:
        self.pieces = sorted(pieces)
        self._undo: Callable[[], None] | None = undo

    def address(self, phys: int) -> int:
        """The device address of a byte of it; MisuseError outside."""
        at = bisect.bisect_right(self.pieces, (phys, 1 << 64, 0)) - 1
        if at >= 0 and phys < self.pieces[at][0] + self.pieces[at][1]:
            return self.pieces[at][2] + phys - self.pieces[at][0]
        raise MisuseError(f"memory at {phys:#x} is not part of this registration")

    def release(self) -> None:
        """Unmap (once)."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


def register(device: Any, pieces: Sequence[tuple[int, int]]) -> Registration:
    """Map memory (phys, length) for both directions until ``release``; one window when it has no gaps inside pages."""
    if not device.coherent:
        raise UnsupportedError("registered memory is not synced on each use: it needs a device that snoops")
    bounced = device.ledger.counts[L_BOUNCE_MAPS]
    inner = all(phys % PAGE_SIZE == 0 for phys, _ in pieces[1:]) and all(
        (p + n) % PAGE_SIZE == 0 for p, n in pieces[:-1]
    )
    size = sum(length for _, length in pieces)
    state = device.try_alloc(pieces[0][0], size) if inner and len(pieces) > 1 else None
    if state:
        found = _linked(state, pieces, size)
    else:
        found = _mapped(device, pieces)
    if device.ledger.counts[L_BOUNCE_MAPS] != bounced:
        found.release()
        raise UnsupportedError("registered memory is not synced on each use: it must not be bounced")
    return found


def _linked(state: Any, pieces: Sequence[tuple[int, int]], size: int) -> Registration:
    """One window."""
    done = 0
    placed: list[tuple[int, int, int]] = []
    try:
        for phys, length in pieces:
            state.link(phys, done, length, Direction.BIDIRECTIONAL)
            placed.append((phys, length, state.addr + done))
            done += length
        state.sync(0, size)
    except DmakitError:
        state.destroy(done, Direction.BIDIRECTIONAL)
        raise
    return Registration(placed, lambda: state.destroy(size, Direction.BIDIRECTIONAL))


def _mapped(device: Any, pieces: Sequence[tuple[int, int]]) -> Registration:
    """Piece by piece."""
    placed: list[tuple[int, int, int]] = []

    def undo() -> None:
        for _, length, addr in placed:
            device.unmap_phys(addr, length, Direction.BIDIRECTIONAL)

    try:
        for phys, length in pieces:
            placed.append((phys, length, device.map_phys(phys, length, Direction.BIDIRECTIONAL)))
    except DmakitError:
        undo()
        raise
    return Registration(list(placed), undo)


def _fit_prps(ranges: Ranges) -> bool:
    starts = all(addr % PAGE_SIZE == 0 for addr, _ in ranges[1:])
    return starts and all((addr + size) % PAGE_SIZE == 0 for addr, size in ranges[:-1])


class _Listed(ABC):
    """Base: ``ranges`` gives device ranges and a token, ``release`` undoes them; descriptors are written here."""

    path = PATH_EACH

    def __init__(self, requests: RequestMapper) -> None:
        self.requests = requests
        self.device = requests.device
        self.ledger = requests.ledger

    def map(self, request: Request) -> Iod:
        """See ``Mapper``."""
        if request.data.count == 0:
            return self.requests.map(request)
        iod = Iod(request)
        if request.integrity.count:
            return self._fail(iod, UnsupportedError("metadata is mapped by the two-step strategy only"))
        try:
            ranges, iod.state, iod.reason = self.ranges(request)
        except DmakitError as error:
            return self._fail(iod, error)
        iod.flags |= IOD_DATA_MAPPED
        iod.path, iod.total = self.path, request.data.size
        try:
            self._describe(iod, ranges)
        except DmakitError as error:
            self.unmap(iod)
            return self._fail(iod, error)
        return iod

    def _describe(self, iod: Iod, ranges: Ranges) -> None:
        """PRPs or an SGL."""
        mapper = self.requests
        large = mapper.sgl_threshold and iod.total >= mapper.sgl_threshold * len(ranges)
        if mapper.sgl_supported and (large or not _fit_prps(ranges)):
            iod.psdt = PSDT_SGL_METABUF
            iod.low, iod.high, iod.blocks = mapper.sgl.build(ranges)
            iod.entries = len(ranges)
        else:
            iod.psdt = PSDT_PRP
            iod.low, iod.high, iod.blocks = mapper.prp.build(ranges)
            iod.entries = sum(entries_needed(addr, length) for addr, length in ranges)
        self.ledger.count(L_DESCRIPTORS, iod.entries)

    def _fail(self, iod: Iod, error: DmakitError) -> Iod:
        iod.error, iod.path, iod.reason = error, PATH_FAILED, self.device.why or int(Reason.MALFORMED_SEGMENTS)
        iod.status = int(BlkStatus.RESOURCE)
        return iod

    def unmap(self, iod: Iod, *, cpu: int | None = None) -> None:
        """See ``Mapper``."""
        if not iod.flags & IOD_DATA_MAPPED:
            return
        iod.flags &= ~IOD_DATA_MAPPED
        token, iod.state = iod.state, None
        writer = self.requests.prp if iod.psdt == PSDT_PRP else self.requests.sgl
        writer.drop(iod.blocks)
        self.release(iod.request, token, iod.request.cpu if cpu is None else cpu)

    @abstractmethod
    def ranges(self, request: Request) -> tuple[Ranges, Any, int]:
        """Device ranges, the token that releases them, and the reason of the path."""

    @abstractmethod
    def release(self, request: Request, token: Any, cpu: int) -> None:
        """Undo ``ranges``."""


class PageMapper(_Listed):
    """A loop of dma_map_phys."""

    def ranges(self, request: Request) -> tuple[Ranges, Any, int]:
        """One call a segment."""
        done: Ranges = []
        self.ledger.count(L_PASSES)
        try:
            for phys, length in request.data.vectors:
                done.append((self.device.map_phys(phys, length, request.direction, cpu=request.cpu), length))
        except DmakitError:
            self.release(request, done, request.cpu)
            raise
        self.ledger.count(L_BOOKKEEPING_BYTES, VECTOR_BYTES * len(done) if self.device.need_unmap() else 0)
        return done, done, int(Reason.SINGLE_SEGMENT if len(done) == 1 else Reason.STRATEGY)

    def release(self, request: Request, token: Any, cpu: int) -> None:
        """One call a segment."""
        for addr, length in token:
            self.device.unmap_phys(addr, length, request.direction, cpu=cpu)


class SgMapper(_Listed):
    """A scatterlist and one dma_map_sg."""

    path = PATH_SG

    def ranges(self, request: Request) -> tuple[Ranges, Any, int]:
        """What ``map_sg`` merged."""
        sg = SgRequest(request, self.device, ledger=self.ledger)
        merged = len(sg.ranges) < request.segments or request.segments == 1
        return sg.consume(), sg, int(Reason.SG_MERGED if merged else Reason.SG_NOT_MERGED)

    def release(self, request: Request, token: Any, cpu: int) -> None:
        """Undo ``map_sg``."""
        token.unmap()


class PremapMapper(_Listed):
    """Registered memory: ``add`` before requests use it, ``remove`` after."""

    path = PATH_REGISTERED

    def __init__(self, requests: RequestMapper) -> None:
        super().__init__(requests)
        self.pieces: list[tuple[int, int, int]] = []

    def add(self, registration: Registration) -> None:
        """Let requests use it."""
        for piece in registration.pieces:
            bisect.insort(self.pieces, piece)

    def remove(self, registration: Registration) -> None:
        """Requests may not use it any more; nothing of it is in flight."""
        gone = set(registration.pieces)
        self.pieces = [piece for piece in self.pieces if piece not in gone]

    def ranges(self, request: Request) -> tuple[Ranges, Any, int]:
        """Addresses computed; neighbours joined."""
        found: Ranges = []
        self.ledger.count(L_PASSES)
        for phys, length in request.data.vectors:
            while length:
                at = bisect.bisect_right(self.pieces, (phys, 1 << 64, 0)) - 1
                start, size, addr = self.pieces[at] if at >= 0 else (0, 0, 0)
                if phys >= start + size:
                    raise MisuseError(f"memory at {phys:#x} is not registered: the premap strategy maps nothing itself")
                take = min(length, start + size - phys)
                where = addr + phys - start
                if found and sum(found[-1]) == where:
                    found[-1] = (found[-1][0], found[-1][1] + take)
                else:
                    found.append((where, take))
                phys, length = phys + take, length - take
        return found, None, int(Reason.PREMAPPED)

    def release(self, request: Request, token: Any, cpu: int) -> None:
        """Nothing: registered memory stays mapped."""


STRATEGIES: dict[str, Callable[[RequestMapper], Mapper]] = {
    "two-step": lambda requests: requests,
    "page": PageMapper,
    "sg": SgMapper,
    "premap": PremapMapper,
}
