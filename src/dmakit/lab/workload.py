"""Workloads: what is asked of the device, independent of how the memory is mapped.

A workload is a list of requests and a schedule. A *request* is an operation (``read``: the device writes
memory; ``write``: the device reads it) on a list of physical segments. The *schedule* says in which order
requests are submitted and completed, hence how many are in flight, and on which CPU. Strategies see exactly
this and nothing else, so one workload means the same bytes at the same physical addresses for each of them.

Two sources: ``FioSpec``, a fio-like description placed on a machine's own memory, and a recorded trace
(``lab.recorded``), whose sizes, segments, order, CPUs and lifetimes are kept as they were.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from dmakit.errors import InputError
from dmakit.lab.request_table import Requests, Segments
from dmakit.lab.schedule import QueueSchedule, Schedule, stretches
from dmakit.lab.sharing import Sharing
from dmakit.memory.buffers import Buffer, allocate
from dmakit.memory.pages import PageAllocator
from dmakit.units import KIB, PAGE, format_size

_AT_ONCE = 1 << 14  # requests that are drawn, and events that are looked at, in one step


@dataclass(slots=True)
class Workload:
    """Requests and the order in which they are submitted and completed."""

    name: str
    requests: Requests
    schedule: Schedule
    cpus: int = 1
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Payload bytes of all requests."""
        return self.requests.size


def merge_adjacent(ranges: Iterable[tuple[int, int]]) -> Segments:
    """Join ranges that continue each other physically, as a bio does when pages are added."""
    merged: list[tuple[int, int]] = []
    for phys, length in ranges:
        if merged and merged[-1][0] + merged[-1][1] == phys:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((phys, length))
    return tuple(merged)


@dataclass(frozen=True, slots=True)
class FioSpec:
    """A fio-like job description.

    ``block_sizes`` are drawn with equal probability; ``offset`` is where buffers start inside a page;
    ``fragmentation`` 0 gives contiguous buffers, 1 scatters every page; ``read_share`` of requests are reads;
    ``iodepth`` requests are in flight in each of ``jobs`` jobs, one CPU a job; ``folio_order`` allocates the
    buffers as folios of 2**order pages (9: huge pages). ``piece``: buffers are made of separate pieces of that many
    bytes, each at the start of a page or folio of its own (``readv`` with many small vectors); 0 = one piece.
    """

    block_sizes: tuple[int, ...] = (4 * KIB,)
    iodepth: int = 1
    jobs: int = 1
    requests: int = 256
    read_share: float = 1.0
    fragmentation: float = 1.0
    offset: int = 0
    folio_order: int = 0
    piece: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("iodepth", self.iodepth, 1, 4096),
            ("jobs", self.jobs, 1, 256),
            ("requests", self.requests, 1, 10_000_000),
            ("offset", self.offset, 0, PAGE - 1),
            ("folio_order", self.folio_order, 0, 10),
            ("piece", self.piece, 0, 4096 << self.folio_order),
            ("read_share", self.read_share, 0, 1),
            ("fragmentation", self.fragmentation, 0, 1),
        ):
            if not low <= value <= high:
                raise InputError(f"{name}={value}: must be between {low} and {high}")
        if not self.block_sizes or any(not 512 <= size <= 8192 * KIB or size % 512 for size in self.block_sizes):
            raise InputError(f"block sizes {self.block_sizes}: each must be a multiple of 512 from 512 to 8M")
        if self.piece % 512 or (self.piece and self.offset):
            raise InputError(
                f"piece={self.piece}, offset={self.offset}: pieces are multiples of 512, without an offset"
            )
        if self.offset % 4:
            raise InputError(f"offset={self.offset}: NVMe buffers start on a dword")

    @property
    def name(self) -> str:
        """A short name that says what the job does."""
        sizes = "+".join(format_size(size) for size in self.block_sizes)
        kind = "read" if self.read_share == 1 else "write" if self.read_share == 0 else "mixed"
        return f"{sizes} {kind} QD{self.iodepth}" + (f" x{self.jobs}" if self.jobs > 1 else "")

    def _buffer(self, pages: PageAllocator, size: int) -> Buffer:
        """One buffer of a slot in flight."""
        if not self.piece:
            return allocate(pages, size, offset=self.offset, order=self.folio_order)
        pieces = [allocate(pages, self.piece, order=self.folio_order) for _ in range(-(-size // self.piece))]
        return Buffer(pages.memory, [part for piece in pieces for part in piece.ranges])

    def place(self, pages: PageAllocator) -> Workload:
        """Allocate the buffers (one a slot in flight) and draw the requests; deterministic in the seed."""
        largest = max(self.block_sizes)
        slots = [[self._buffer(pages, largest) for _ in range(self.iodepth)] for _ in range(self.jobs)]
        requests = Requests()
        self._draw(requests, slots)
        return Workload(self.name, requests, QueueSchedule(len(requests), self.iodepth * self.jobs), self.jobs)

    def _draw(self, requests: Requests, slots: list[list[Buffer]]) -> None:
        """Draw the size and the operation of each request, in steps; the slots in flight take turns."""
        draw, kinds, depth = random.Random(self.seed), len(self.block_sizes), self.iodepth * self.jobs
        places = np.full(depth * kinds, -1)
        for first in range(0, self.requests, _AT_ONCE):
            sizes, ops = _drawn(draw, kinds, self.read_share, min(_AT_ONCE, self.requests - first))
            slot = np.arange(first, first + len(ops)) % depth
            which = slot * kinds + np.frombuffer(sizes, np.uint16)
            for at in np.flatnonzero(places[which] < 0):
                if places[which[at]] < 0:
                    buffer = slots[slot[at] % self.jobs][slot[at] // self.jobs]
                    size = self.block_sizes[sizes[at]]
                    places[which[at]] = requests.layout(merge_adjacent(buffer.slices(0, size)))
            jobs = array("H", (slot % self.jobs).astype(np.uint16).tobytes())
            requests.extend(ops, array("I", places[which].astype(np.uint32).tobytes()), jobs, jobs)


def _drawn(draw: random.Random, kinds: int, read_share: float, count: int) -> tuple[array[int], bytes]:
    """Of ``count`` requests: which block size, as ``Random.choice`` draws it, and 0 for a read, 1 for a write."""
    bits, getrandbits, rand = kinds.bit_length(), draw.getrandbits, draw.random
    sizes, ops = array("H", bytes(2 * count)), bytearray(count)
    for at in range(count):
        size = getrandbits(bits)
        while size >= kinds:
            size = getrandbits(bits)
        sizes[at] = size
        ops[at] = rand() >= read_share
    return sizes, bytes(ops)


def overlapping(workload: Workload) -> set[int]:
    """Numbers of the requests that share a page with another one while both are in flight."""
    shared = sharing(workload)
    return set() if shared is None else {workload.requests[at].number for at, flag in enumerate(shared) if flag}


def sharing(workload: Workload) -> bytearray | None:
    """``overlapping`` as a byte a request, by position; None when no request shares a page."""
    requests = workload.requests
    walk = Sharing(requests.columns()[0], _atoms([_pages(layout.segments) for layout in requests.layouts]))
    for kinds, positions in stretches(workload.schedule, requests, _AT_ONCE):
        walk.follow(kinds, positions)
    return walk.shared


def _pages(segments: Segments) -> set[int]:
    """The pages that hold any byte of these."""
    return {page for phys, size in segments for page in range(phys >> 12, (phys + size + 4095) >> 12)}


def _atoms(pages: list[set[int]]) -> list[list[int]]:
    """What each set is made of: pages that the same sets have count as one, numbered from 0."""
    holders: dict[int, list[int]] = {}
    for which, held in enumerate(pages):
        for page in held:
            holders.setdefault(page, []).append(which)
    numbers: dict[tuple[int, ...], int] = {}
    made: list[list[int]] = [[] for _ in pages]
    for sets in map(tuple, holders.values()):
        if sets not in numbers:
            numbers[sets] = len(numbers)
            for which in sets:
                made[which].append(numbers[sets])
    return made
