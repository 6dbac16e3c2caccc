"""The requests of a workload, in columns: no Python object is kept for a request.

A *layout* is where a request's memory lies: its segments and how the block layer holds them. A job draws from few
layouts (its buffers, by its block sizes), so they are kept once and a request is a few small integers: 11 bytes, and 8
more where numbers do not simply count up. ``IoRequest`` objects are made when they are asked for. So ten million
requests take about 110 MB. In which order they are submitted and completed says a schedule (``lab.schedule``).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from dmakit.errors import MisuseError

OPS = ("read", "write")
_AT_ONCE = 1 << 16  # requests whose columns are made in one step
Segments = tuple[tuple[int, int], ...]


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
        self._which.append(layout)
        self._op.append(OPS.index(op))
        self._cpus.append(cpu)
        self._complete_cpus.append(complete_cpu)
        self._phase.append(self._phase_index(phase))

    def _phase_index(self, phase: str) -> int:
        if phase not in self._phases:
            self._phases.append(phase)
        return self._phases.index(phase)

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

    def positions(self, numbers: Any) -> Any:
        """Where the requests of these numbers are; KeyError when there is none."""
        if self._positions is not None:
            return array("Q", [self._positions[number] for number in numbers])
        if len(numbers) and int(np.max(numbers)) >= len(self):
            raise KeyError(int(np.max(numbers)))
        return numbers

    def extend(self, op: bytes, layouts: array[int], cpus: array[int], complete_cpus: array[int]) -> None:
        """Columns of further requests, without a phase; MisuseError when they do not fit one another or the layouts."""
        count = len(op)
        if not len(layouts) == len(cpus) == len(complete_cpus) == count:
            raise MisuseError(f"columns of {count}, {len(layouts)}, {len(cpus)}, {len(complete_cpus)} requests")
        if count and (max(layouts) >= len(self.layouts) or max(op) >= len(OPS)):
            raise MisuseError(f"layout {max(layouts)}, op {max(op)}: must be one of {len(self.layouts)}, {len(OPS)}")
        if self._positions is not None:
            raise MisuseError("columns of requests without numbers, after requests that have them")
        self._phase.extend(array("H", [self._phase_index("")]) * count)
        self._which.extend(layouts)
        self._op.frombytes(op)
        self._cpus.extend(cpus)
        self._complete_cpus.extend(complete_cpus)

    def columns(self) -> tuple[array[int], array[int], array[int], array[int], array[int]]:
        """Layout, op (index in ``OPS``), submitting and completing CPU, and number (empty while they count up)."""
        return self._which, self._op, self._cpus, self._complete_cpus, self._numbers

    def cut(self, parts: list[list[Layout]]) -> tuple[Requests, array[int]]:
        """Each request as several, numbered anew: one for each of ``parts[its layout]``.

        Also returns where they are: the request at position i became those from ``first[i]`` to ``first[i + 1]`` - 1.
        """
        new, first = Requests(), array("Q", [0])
        places = [[new._index(part) for part in cut] for cut in parts]
        counts = np.array([len(cut) for cut in parts], np.int64)
        starts = np.cumsum(counts) - counts
        flat = np.array([place for cut in places for place in cut], np.uint32)
        pairs = ((self._op, new._op), (self._phase, new._phase), (self._cpus, new._cpus))
        for begin in range(0, len(self), _AT_ONCE):
            which = np.frombuffer(self._which[begin : begin + _AT_ONCE], np.uint32)
            each = counts[which]
            ends = np.cumsum(each)
            within = np.arange(int(ends[-1])) - np.repeat(ends - each, each)
            new._which.frombytes(flat[np.repeat(starts[which], each) + within].tobytes())
            for old, copy in (*pairs, (self._complete_cpus, new._complete_cpus)):
                copy.frombytes(np.repeat(np.array(old[begin : begin + _AT_ONCE], old.typecode), each).tobytes())
            first.frombytes((ends + first[-1]).astype(np.uint64).tobytes())
        new._phases = list(self._phases)
        return new, first

    def replaced(self, layouts: list[Layout]) -> Requests:
        """The same requests, with ``layouts[i]`` in place of the i-th layout."""
        new = Requests()
        places = np.array([new._index(layout) for layout in layouts], np.uint32)
        if len(self):
            new._which.frombytes(places[np.frombuffer(self._which, np.uint32)].tobytes())
        new._op, new._phase, new._phases = self._op[:], self._phase[:], list(self._phases)
        new._cpus, new._complete_cpus, new._numbers = self._cpus[:], self._complete_cpus[:], self._numbers[:]
        new._positions = None if self._positions is None else dict(self._positions)
        return new

    @property
    def size(self) -> int:
        """Payload bytes of all."""
        counts = np.bincount(np.frombuffer(self._which, np.uint32)) if len(self) else np.zeros(0)
        return sum(self.layouts[which].size * int(count) for which, count in enumerate(counts))

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
