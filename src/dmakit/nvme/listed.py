"""Strategies that first have a request's device ranges and then describe them: a loop of map_phys, one map_sg.

``Mapper`` is what the driver asks of any strategy. ``Listed`` writes descriptors by the rules of ``RequestMapper``: an
SGL where the controller has them and PRPs cannot say it or ranges are large on average, else PRPs. Requests without
data, and metadata, are ``RequestMapper``'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

from dmakit.block.request import Request
from dmakit.block.sg import SgRequest
from dmakit.block.status import BlkStatus
from dmakit.consts import (
    IOD_DATA_MAPPED,
    L_BOOKKEEPING_BYTES,
    L_DESCRIPTORS,
    L_PASSES,
    PAGE_SIZE,
    PATH_EACH,
    PATH_FAILED,
    PATH_SG,
    PSDT_PRP,
    PSDT_SGL_METABUF,
)
from dmakit.errors import DmakitError, UnsupportedError
from dmakit.nvme.iod import VECTOR_BYTES, Iod
from dmakit.nvme.mapping import RequestMapper
from dmakit.reasons import Reason

Ranges = list[tuple[int, int]]


class Mapper(Protocol):
    """What the driver asks of a strategy."""

    def map(self, request: Request) -> Iod:
        """Map a request; ``iod.status`` tells how it went, and on failure nothing is mapped."""

    def unmap(self, iod: Iod, *, cpu: int | None = None) -> None:
        """Undo ``map``."""


def _fit_prps(ranges: Ranges) -> bool:
    """Whether PRPs can describe the ranges: they meet on controller pages."""
    last = len(ranges) - 1
    for at, (addr, size) in enumerate(ranges):
        if (at and addr % PAGE_SIZE) or (at != last and (addr + size) % PAGE_SIZE):
            return False
    return True


def describe(mapper: RequestMapper, ranges: Ranges, size: int) -> tuple[int, int, int, int, int]:
    """An SGL or PRPs for ``size`` bytes in device ranges: (PSDT, low, high, chain of list blocks, entries).

    ExhaustedError when no list block can be had, MisuseError when PRPs cannot say it; then nothing is kept.
    """
    large = mapper.sgl_threshold and size >= mapper.sgl_threshold * len(ranges)
    if mapper.sgl_supported and (large or not _fit_prps(ranges)):
        found = (PSDT_SGL_METABUF, *mapper.sgl.build(ranges), len(ranges))
    else:
        found = (PSDT_PRP, *mapper.prp.build(ranges), mapper.prp.entries)
    mapper.ledger.count(L_DESCRIPTORS, found[4])
    return found


class Listed(ABC):
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
            found = self.ranges(request)
        except DmakitError as error:
            return self._fail(iod, error)
        return self._give(iod, *found)

    def _give(self, iod: Iod, ranges: Ranges, token: Any, reason: int) -> Iod:
        """Describe device ranges to the controller; on failure they are released."""
        iod.state, iod.reason = token, reason
        iod.flags |= IOD_DATA_MAPPED
        iod.path, iod.total = self.path, iod.request.data.size
        try:
            iod.psdt, iod.low, iod.high, iod.chain, iod.entries = describe(self.requests, ranges, iod.total)
        except DmakitError as error:
            self.unmap(iod)
            return self._fail(iod, error)
        return iod

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
        self.requests.prp.drop(iod.chain)
        iod.chain = 0
        self.release(iod.request, token, iod.request.cpu if cpu is None else cpu)

    @abstractmethod
    def ranges(self, request: Request) -> tuple[Ranges, Any, int]:
        """Device ranges, the token that releases them, and the reason of the path."""

    @abstractmethod
    def release(self, request: Request, token: Any, cpu: int) -> None:
        """Undo ``ranges``."""


class PageMapper(Listed):
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


class SgMapper(Listed):
    """A scatterlist and one dma_map_sg."""

    path = PATH_SG

    def ranges(self, request: Request) -> tuple[Ranges, Any, int]:
        """What ``map_sg`` merged."""
        sg = SgRequest(request, self.device, ledger=self.ledger)
        merged = len(sg.ranges) < request.segments or request.segments == 1
        return sg.consume(), sg, int(Reason.SG_MERGED if merged else Reason.SG_NOT_MERGED)

    def release(self, request: Request, token: Any, cpu: int) -> None:
        """Undo ``map_sg``."""
        token.unmap(cpu=cpu)
