"""The engine of ``compare``: a stretch of the schedule is one call.

A *stretch* is a run of scheduled events in two arrays: what happens (submit or complete) and to which request, by
position. Submitting fills the buffer of a write and maps; completing lets the device carry the request out, unmaps,
and compares every byte. Between two events virtual time passes (``STEP_NS``), so flush queues and depots work as they
do. No Python object is made for a request: what is in flight is kept in flights that are used again.

A call ends early when it has moved ``MOST_BYTES``, so that progress shows and an interrupt is heard however large the
requests are.

Counted: the ledger's growth inside map (``submission``) and inside unmap (``completion``), and the wall time of both
(``simulator_ns``). ``log`` holds (number, path and reason) of the requests submitted in the last stretch.
"""

from __future__ import annotations

import time
from array import array
from typing import Any

import cython
import numpy as np

from dmakit.errors import DmakitError, FaultError, MisuseError
from dmakit.lab.flight import words
from dmakit.lab.rig import Rig

if cython.compiled:
    from cython.cimports.posix.time import CLOCK_MONOTONIC, clock_gettime, timespec
else:
    from dmakit.clock import VirtualClock
    from dmakit.consts import N_LEDGER
    from dmakit.lab.flight import Columns, Flight, InFlight
    from dmakit.lab.payload import DataPath
    from dmakit.lab.strategies import Strategy

STEP_NS = 10_000  # of virtual time between two scheduled events; flush-queue and depot timers run on it
MOST_EVENTS = 4096
MOST_BYTES = 32 << 20
_STEP_NS = STEP_NS
_MOST_BYTES = MOST_BYTES
_SUBMIT = 0


def _now() -> cython.longlong:
    """A monotonic wall clock in nanoseconds."""
    if cython.compiled:
        spec = cython.declare(timespec)
        clock_gettime(CLOCK_MONOTONIC, cython.address(spec))
        return spec.tv_sec * 1_000_000_000 + spec.tv_nsec
    return time.perf_counter_ns()


@cython.cclass
class Engine:
    """One strategy on one rig, over the requests of ``columns``."""

    def __init__(self, rig: Rig, strategy: Strategy, columns: Columns, data: DataPath) -> None:
        self.strategy = strategy
        self.columns = columns
        self.data = data
        self.clock: VirtualClock = rig.machine.clock
        self.counts = np.asarray(rig.ledger.counts)
        self.flights = InFlight()
        self.submission: Any = np.zeros(N_LEDGER, np.int64)
        self.completion: Any = np.zeros(N_LEDGER, np.int64)
        self.numbers = words([0] * MOST_EVENTS)
        self.taken = memoryview(array("H", bytes(2 * MOST_EVENTS)))
        self.logged = 0
        self.requests = self.size = self.wrong = self.failed = self.faults = 0
        self.simulator_ns = 0

    def run(self, kinds: Any, positions: Any, start: int = 0) -> int:
        """Let the events from ``start`` on happen; returns how many did. At most ``MOST_EVENTS`` may be given."""
        if len(kinds) != len(positions) or len(kinds) > MOST_EVENTS or not 0 <= start <= len(kinds):
            raise MisuseError(
                f"stretch of {len(kinds)}, {len(positions)} events from {start}: as many kinds as positions, at most "
                f"{MOST_EVENTS}"
            )
        if len(kinds) and int(np.max(positions)) >= self.columns.count:
            raise MisuseError(f"position {int(np.max(positions))}: there are {int(self.columns.count)} requests")
        self.logged = 0
        return int(self._run(kinds, positions, start))

    @property
    def log(self) -> tuple[Any, Any]:
        """(numbers, paths and reasons) of the requests that took a path in the last stretch, in order."""
        return self.numbers[: self.logged], self.taken[: self.logged]

    def _run(self, kinds: memoryview[int], positions: memoryview[int], start: cython.Py_ssize_t) -> cython.Py_ssize_t:
        at: cython.Py_ssize_t = start
        moved: cython.ulonglong = self.size + _MOST_BYTES
        while at < len(kinds) and self.size < moved:
            if kinds[at] == _SUBMIT:
                self._submit(positions[at])
            else:
                self._complete(positions[at])
            self.clock._tick(_STEP_NS)
            at += 1
        return at - start

    def _submit(self, position: cython.Py_ssize_t) -> cython.int:
        """Fill the buffer of a write, and map."""
        f: Flight = self.flights._take(position)
        started: cython.longlong
        f._begin(self.columns, position)
        if not f.reads:
            self.data._fill(f)
        self._subtract(self.submission)
        started = _now()
        try:
            self.strategy._map(f)
        except DmakitError:
            self.failed += 1
            self.flights._drop(f)
        self.simulator_ns += _now() - started
        self._add(self.submission)
        if f.taken >= 0:
            self.numbers[self.logged] = f.number
            self.taken[self.logged] = f.taken
            self.logged += 1
        return 0

    def _complete(self, position: cython.Py_ssize_t) -> cython.int:
        """The device does its work, the request is unmapped, the bytes are compared."""
        f: Flight | None = self.flights._find(position)
        started: cython.longlong
        wrong: cython.longlong
        if f is None:
            return 0
        try:
            wrong = self.data._carry(f)
        except FaultError:
            self.faults += 1
            wrong = f.size
        self._subtract(self.completion)
        started = _now()
        self.strategy._unmap(f)
        self.simulator_ns += _now() - started
        self._add(self.completion)
        if f.reads:
            wrong = self.data._arrived(f)
        self.wrong += wrong
        self.requests += 1
        self.size += f.size
        return self.flights._drop(f)

    def _subtract(self, phase: Any) -> cython.void:
        """Open a phase: what the ledger says now does not belong to it."""
        if not cython.compiled:
            phase -= self.counts
            return
        i: cython.Py_ssize_t
        for i in range(N_LEDGER):
            phase[i] -= self.counts[i]

    def _add(self, phase: Any) -> cython.void:
        """Close a phase."""
        if not cython.compiled:
            phase += self.counts
            return
        i: cython.Py_ssize_t
        for i in range(N_LEDGER):
            phase[i] += self.counts[i]
