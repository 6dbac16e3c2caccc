"""What giving a device access to memory costs here: measured with the code that will do it, not guessed.

Three things are timed, each with its undoing, on memory of this machine:

* a *window*: what the two-step strategy does for a request (one map, or a window allocated, linked, synced; unlinked);
* a *use* of registered memory: the same request when its addresses are only computed;
* a *registration*, and its end.

On type1 a link pins memory, on iommufd it is an IOAS_COPY, on the software machine it is our own code: all of them cost
something each time, something a piece, and something a page, so each is a ``Line``: fixed + piece · pieces + page ·
pages, through three shapes (one page, one long piece, single scattered pages). Of each shape the fastest sample counts:
what disturbs a measurement only adds to it. What window and use have in common (writing descriptors) cancels out.

Measuring is bounded: a round is ``CALLS_A_ROUND`` mapping calls; ``LEAST`` rounds are made, so that one disturbance
decides nothing, and up to ``ROUNDS`` as long as they end within ``BUDGET_NS``. Nothing of it stays mapped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dmakit.block.request import Op, Request
from dmakit.consts import PAGE_SIZE
from dmakit.errors import DmakitError, HostError
from dmakit.nvme.listed import Mapper
from dmakit.nvme.mapping import RequestMapper
from dmakit.nvme.premap import PremapMapper
from dmakit.nvme.registration import register

LEAST, ROUNDS = 3, 5
BUDGET_NS = 5_000_000
_ORDER = 5
_LONG = 1 << _ORDER  # pages of the long piece, and of the memory that is measured on
_SCATTERED = 8
_SHAPES = ((1, 1), (1, _LONG), (_SCATTERED, _SCATTERED))  # (pieces, pages)
CALLS_A_ROUND = 2 * sum(pieces + 1 for pieces, _ in _SHAPES)  # windows and registrations: maps, and one unmap each
Clock = Callable[[], int]


@dataclass(frozen=True, slots=True)
class Line:
    """ns of something done on memory: ``fixed``, a ``piece`` (of neighbouring addresses), a ``page``."""

    fixed: float
    piece: float
    page: float

    def of(self, pieces: int, pages: int) -> float:
        """ns."""
        return self.fixed + self.piece * pieces + self.page * pages

    @classmethod
    def through(cls, one: float, long: float, scattered: float) -> Line:
        """The line through the three shapes; none of its parts is below 0."""
        page = max(0.0, (long - one) / (_LONG - 1))
        piece = max(0.0, (scattered - one) / (_SCATTERED - 1) - page)
        return cls(max(0.0, one - piece - page), piece, page)

    def __str__(self) -> str:
        return f"{self.fixed / 1000:.2f} + {self.piece / 1000:.2f} a piece + {self.page / 1000:.3f} a page"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One request on one buffer, in ns: its ``window``, its ``use`` when registered, the buffer's ``price``."""

    window: float
    use: float
    price: float

    @property
    def excess(self) -> float:
        """What a window costs more than the use of registered memory."""
        return self.window - self.use

    @property
    def uses(self) -> int | None:
        """The use from which on the buffer is registered (``nvme.auto``); None: never."""
        return int(self.price // self.excess) + 1 if self.excess > 0 else None

    def __str__(self) -> str:
        text = f"window: {self.window / 1000:.1f} us a request, registered: {self.use / 1000:.1f} us, "
        text += f"registration: {self.price / 1000:.1f} us once: "
        return text + ("never premapped" if self.uses is None else f"premapped from use {self.uses:,} on")


@dataclass(frozen=True, slots=True)
class Costs:
    """The three lines; ``took_ns`` and ``rounds``: of measuring them."""

    window: Line
    use: Line
    price: Line
    took_ns: int = 0
    rounds: int = 0

    def verdict(self, request: tuple[int, int], buffer: tuple[int, int]) -> Verdict:
        """For a request and a buffer of (pieces, pages)."""
        return Verdict(self.window.of(*request), self.use.of(*request), self.price.of(*buffer))

    def __str__(self) -> str:
        return (
            f"us measured here: a window {self.window}; a use of registered memory {self.use}; "
            f"a registration {self.price} ({self.rounds} rounds, {self.took_ns / 1e6:.1f} ms)"
        )

    def report(self) -> dict[str, Any]:
        """The JSON form, in ns."""
        lines = {name: getattr(self, name) for name in ("window", "use", "price")}
        return {
            **{name: {"fixed": x.fixed, "piece": x.piece, "page": x.page} for name, x in lines.items()},
            "took_ns": self.took_ns,
            "rounds": self.rounds,
        }


def measure(requests: RequestMapper, clock: Clock = time.perf_counter_ns) -> Costs:
    """Measure on the device of ``requests``; the errors of mapping, with nothing left mapped."""
    device: Any = requests.device
    with _pages(device.pages) as phys:
        registered = PremapMapper(requests)
        offer = registered.offer([(phys, _LONG * PAGE_SIZE)])
        try:
            return _rounds(phys, {"window": requests, "use": registered}, device, clock)
        finally:
            registered.withdraw(offer)


@contextmanager
def _pages(pages: Any) -> Iterator[int]:
    phys = pages.alloc(_ORDER)
    try:
        yield phys
    finally:
        pages.free(phys, _ORDER)


def _memory(phys: int, pieces: int, pages: int) -> list[tuple[int, int]]:
    """Memory of this shape; several pieces are every other page."""
    length = pages // pieces * PAGE_SIZE
    return [(phys + 2 * at * length, length) for at in range(pieces)]


def _rounds(phys: int, mappers: dict[str, Mapper], device: Any, clock: Clock) -> Costs:
    times: dict[str, list[list[int]]] = {name: [[] for _ in _SHAPES] for name in (*mappers, "price")}
    begin = clock()
    rounds = 0
    while rounds < LEAST or (rounds < ROUNDS and (clock() - begin) * (rounds + 1) <= BUDGET_NS * rounds):
        rounds += 1
        for shape, found in enumerate(_SHAPES):
            memory = _memory(phys, *found)
            for name, mapper in mappers.items():
                times[name][shape].append(_request(mapper, Request(Op.READ, memory), clock))
            started = clock()
            register(device, memory).release()
            times["price"][shape].append(clock() - started)
    lines = {name: Line.through(*(min(shape) for shape in shapes)) for name, shapes in times.items()}
    return Costs(**lines, took_ns=clock() - begin, rounds=rounds)


def _request(mapper: Mapper, request: Request, clock: Clock) -> int:
    """ns to map and unmap a request; raises what refused it."""
    started = clock()
    iod = mapper.map(request)
    if iod.status:
        raise iod.error if isinstance(iod.error, DmakitError) else HostError(f"status {iod.status} of a mapping", 5)
    mapper.unmap(iod)
    return clock() - started
