"""The requests of a workload, in columns: no Python object is kept for a request.

A *layout* is where a request's memory lies: its segments and how the block layer holds them. A job draws from few
layouts (its buffers, by its block sizes), so they are kept once and a request is a few small integers: 11 bytes, and 8
more where numbers do not simply count up. ``IoRequest`` objects are made when they are asked for. A schedule of a queue
is a rule, not a list. So ten million requests take about 110 MB.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

SUBMIT, COMPLETE = 0, 1
OPS = ("read", "write")
Segments = tuple[tuple[int, int], ...]
Schedule = Iterable[tuple[int, int]]
"""(SUBMIT or COMPLETE, request number), in order; can be walked more than once."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the memory of requests lies; ``size`` is payload bytes. See ``IoRequest`` for the rest."""

    segments: Segments
    bvecs: Segments
    size: int

    @classmethod
    def of(cls, segments: Segments, bvecs: Segments = ()) -> Layout:
        """The layout of these segments."""
        return cls(segments, bvecs, sum(length for _, length in segments))


@dataclass(slots=True)
class IoRequest:
    """One request: ``op`` is ``read`` (device writes memory) or ``write``; segments are (phys, bytes).

    ``bvecs``: how the block layer holds the same memory, where that is known to be more pieces than segments (a request
    merged from several bios whose memory happens to be contiguous); empty: one piece a segment.
    """

    number: int
    op: str
    layout: Layout
    cpu: int = 0
    complete_cpu: int = 0
    phase: str = ""

    @property
    def segments(self) -> Segments:
        """(phys, bytes) of each segment."""
        return self.layout.segments

    @property
    def bvecs(self) -> Segments:
        """As the block layer holds them, or empty."""
        return self.layout.bvecs

    @property
    def size(self) -> int:
        """Payload bytes."""
        return self.layout.size


class Requests(Sequence[IoRequest]):
    """All requests, by position; ``numbered`` finds one by its number."""

    def __init__(self, requests: Iterable[IoRequest] = ()) -> None:
        self.layouts: list[Layout] = []
        self._layout_of: dict[Layout, int] = {}
        self._phases: list[str] = []
        self._which, self._op, self._phase = array("I"), array("B"), array("H")
        self._cpus, self._complete_cpus = array("H"), array("H")
        self._positions: dict[int, int] | None = None  # by number, once numbers do not count up from 0
        self._numbers = array("Q")
        for request in requests:
            self.append(request)

    def layout(self, segments: Segments, bvecs: Segments = ()) -> int:
        """The index in ``layouts`` of this layout; it is added when it is new."""
        return self._index(Layout.of(segments, bvecs))

    def _index(self, layout: Layout) -> int:
        which = self._layout_of.setdefault(layout, len(self.layouts))
        if which == len(self.layouts):
            self.layouts.append(layout)
        return which

    def append(self, request: IoRequest) -> None:
        """Add a request, with its number."""
        if self._positions is None and request.number != len(self):
            self._positions = {number: number for number in range(len(self))}
            self._numbers = array("Q", range(len(self)))
        if self._positions is not None:
            self._positions[request.number] = len(self)
            self._numbers.append(request.number)
        self.add(request.op, self._index(request.layout), request.cpu, request.complete_cpu, request.phase)

    def add(self, op: str, layout: int, cpu: int = 0, complete_cpu: int = 0, phase: str = "") -> None:
        """The columns of the next request; numbers count up unless ``append`` gave others."""
        if phase not in self._phases:
            self._phases.append(phase)
        self._which.append(layout)
        self._op.append(OPS.index(op))
        self._cpus.append(cpu)
        self._complete_cpus.append(complete_cpu)
        self._phase.append(self._phases.index(phase))

    def numbered(self, number: int) -> IoRequest:
        """The request of that number; KeyError when there is none."""
        return self[self.position(number)]

    def position(self, number: int) -> int:
        """Where the request of that number is; KeyError when there is none."""
        if self._positions is not None:
            return self._positions[number]
        if not 0 <= number < len(self):
            raise KeyError(number)
        return number

    def layout_index(self, position: int) -> int:
        """Which of ``layouts`` the request at ``position`` has, without making the request."""
        return self._which[position]

    def replaced(self, layouts: list[Layout]) -> Requests:
        """The same requests, with ``layouts[i]`` in place of the i-th layout."""
        new = Requests()
        for request in self:
            new.append(
                IoRequest(
                    request.number,
                    request.op,
                    layouts[self._layout_of[request.layout]],
                    request.cpu,
                    request.complete_cpu,
                    request.phase,
                )
            )
        return new

    @property
    def size(self) -> int:
        """Payload bytes of all."""
        return sum(self.layouts[which].size for which in self._which)

    def __len__(self) -> int:
        return len(self._which)

    @overload
    def __getitem__(self, at: int) -> IoRequest: ...
    @overload
    def __getitem__(self, at: slice) -> list[IoRequest]: ...
    def __getitem__(self, at: int | slice) -> IoRequest | list[IoRequest]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        layout = self.layouts[self._which[at]]
        number = self._numbers[at] if self._positions is not None else at % len(self)
        phase = self._phases[self._phase[at]]
        return IoRequest(number, OPS[self._op[at]], layout, self._cpus[at], self._complete_cpus[at], phase)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Requests) and len(self) == len(other) and all(map(IoRequest.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class QueueSchedule:
    """Submit until ``depth`` are in flight, then complete the oldest before each further submission."""

    count: int
    depth: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for number in range(self.count):
            if number >= self.depth:
                yield COMPLETE, number - self.depth
            yield SUBMIT, number
        for number in range(max(0, self.count - self.depth), self.count):
            yield COMPLETE, number


@dataclass(frozen=True, slots=True)
class SplitSchedule:
    """For requests that were cut: the one at position i became those numbered ``first[i]`` to ``first[i+1]`` - 1."""

    schedule: Schedule
    requests: Requests
    first: array[int]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for kind, number in self.schedule:
            at = self.requests.position(number)
            for part in range(self.first[at], self.first[at + 1]):
                yield kind, part
