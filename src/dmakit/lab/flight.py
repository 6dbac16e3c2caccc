"""What the lab's compiled code works on: a workload in flat arrays, and the requests in flight.

``Columns`` are the layouts of a workload flattened once (there are few) and the columns of its requests as they are.
A ``Flight`` is one request between its submission and its completion: what it asks for, what a strategy gave the
device for it, and what undoes that. Flights are used again, so there are as many as were ever in flight at once, and a
request makes no object. ``InFlight`` finds one by the position of its request.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import cython

from dmakit.dma.direction import checked_cpu
from dmakit.errors import MisuseError
from dmakit.lab.request_table import Requests, Segments

if not cython.compiled:
    from dmakit.consts import DMA_FROM_DEVICE, DMA_TO_DEVICE

READ, WRITE = 0, 1  # the op column
NO_PATH = -1


def words(values: Sequence[int]) -> Any:
    """A flat view of 64-bit words; one word when there are none."""
    return memoryview(array("Q", values or [0]))


@cython.cclass
class Ranges:
    """Lists of (address, bytes), flat: list i has the items ``bounds[i]`` to ``bounds[i + 1]`` - 1."""

    def __init__(self, lists: Sequence[Segments]) -> None:
        self.count = max((len(one) for one in lists), default=0)
        self.addr = words([addr for one in lists for addr, _ in one])
        self.length = words([length for one in lists for _, length in one])
        self.bounds = words(list(accumulate((len(one) for one in lists), initial=0)))


@cython.cclass
class Columns:
    """Requests and their layouts in flat arrays. ``shared``: a byte a request, or empty when none shares its memory."""

    def __init__(self, requests: Requests, shared: bytearray | None, cpus: int) -> None:
        which, op, cpu, end_cpu, numbers = requests.columns()
        for column in (cpu, end_cpu):
            checked_cpu(max(column, default=0), cpus)
        self.count = len(requests)
        self.segments = Ranges([layout.segments for layout in requests.layouts])
        self.size = words([layout.size for layout in requests.layouts])
        self.which = memoryview(which or array("I", [0]))
        self.op = memoryview(op or array("B", [0]))
        self.cpu = memoryview(cpu or array("H", [0]))
        self.end_cpu = memoryview(end_cpu or array("H", [0]))
        self.numbers = words(numbers)
        self.numbered = len(numbers) > 0
        self.shared = memoryview(shared or bytearray(1))
        self.sharing = shared is not None

    def _number(self, position: cython.Py_ssize_t) -> cython.ulonglong:
        """The number of the request at ``position``."""
        return self.numbers[position] if self.numbered else position


@cython.cclass
class Flight:
    """One request in flight.

    ``addr``, ``length``, ``count``: its device ranges; ``psdt``, ``low``, ``high``, ``chain``: what the command says
    about them; ``taken``: the path and reason as ``PathLog`` codes them, ``NO_PATH`` when no branch was reached;
    ``token``: what else a strategy needs to undo its mapping.
    """

    def __init__(self) -> None:
        self.position = 0
        self.number = 0
        self.layout = 0
        self.size = 0
        self.cpu = 0
        self.end_cpu = 0
        self.direction = 0
        self.reads = False
        self.shared = False
        self.taken = NO_PATH
        self.psdt = 0
        self.low = 0
        self.high = 0
        self.chain = 0
        self.token: Any = None
        self.own = words([0])
        self.addr = self.own
        self.length = self.own
        self.phys = self.own
        self.count = 0

    def _begin(self, columns: Columns, position: cython.Py_ssize_t) -> cython.int:
        """Become the request at ``position``: its memory is ``count`` pieces of ``phys`` and ``length``."""
        first: cython.Py_ssize_t
        end: cython.Py_ssize_t
        self.position = position
        self.number = columns._number(position)
        self.layout = columns.which[position]
        self.size = columns.size[self.layout]
        self.cpu = columns.cpu[position]
        self.end_cpu = columns.end_cpu[position]
        self.reads = columns.op[position] == READ
        self.direction = DMA_FROM_DEVICE if self.reads else DMA_TO_DEVICE
        self.shared = columns.sharing and columns.shared[position] != 0
        self.taken = NO_PATH
        first = columns.segments.bounds[self.layout]
        end = columns.segments.bounds[self.layout + 1]
        self.phys = columns.segments.addr[first:end]
        self.length = columns.segments.length[first:end]
        self.count = end - first
        return 0

    def _own_ranges(self) -> cython.int:
        """Let ``addr`` be an array of this flight's own, with room for an address a piece."""
        if len(self.own) < self.count:
            self.own = words([0] * self.count)
        self.addr = self.own
        return 0

    def pairs(self) -> list[tuple[int, int]]:
        """The device ranges as (address, bytes)."""
        return [(int(self.addr[i]), int(self.length[i])) for i in range(self.count)]

    def memory(self) -> list[tuple[int, int]]:
        """The pieces of memory as (phys, bytes), while ``length`` is theirs."""
        return [(int(self.phys[i]), int(self.length[i])) for i in range(self.count)]


@cython.cclass
class InFlight:
    """Flights by the position of their request: a table with one place for each, doubled when two want the same."""

    def __init__(self) -> None:
        self.mask = 63
        self.table: list[Flight | None] = [None] * 64
        self.idle: list[Flight] = []

    def _take(self, position: cython.Py_ssize_t) -> Flight:
        """A flight for the request at ``position``; MisuseError when it is in flight."""
        while self.table[position & self.mask] is not None:
            if self._find(position) is not None:
                raise MisuseError(f"request at position {position}: is in flight already")
            self._double()
        flight: Flight = self.idle.pop() if self.idle else Flight()
        self.table[position & self.mask] = flight
        return flight

    def _find(self, position: cython.Py_ssize_t) -> Flight | None:
        """The flight of a request, or None when it is not in flight."""
        flight: Flight | None = self.table[position & self.mask]
        if flight is None or flight.position != position:
            return None
        return flight

    def _drop(self, flight: Flight) -> cython.int:
        """The request is done."""
        self.table[flight.position & self.mask] = None
        self.idle.append(flight)
        return 0

    def _double(self) -> cython.int:
        """Twice the places; flights that had different ones keep different ones."""
        flight: Flight | None
        held = self.table
        self.mask = 2 * self.mask + 1
        self.table = [None] * (self.mask + 1)
        for flight in held:
            if flight is not None:
                self.table[flight.position & self.mask] = flight
        return 0
