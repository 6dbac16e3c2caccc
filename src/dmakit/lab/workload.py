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
from collections.abc import Iterable
from dataclasses import dataclass, field

from dmakit.errors import InputError
from dmakit.lab.request_table import COMPLETE, QueueSchedule, Requests, Schedule, Segments
from dmakit.memory.buffers import Buffer, allocate
from dmakit.memory.pages import PageAllocator
from dmakit.units import KIB, PAGE, format_size


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
        draw = random.Random(self.seed)
        largest = max(self.block_sizes)
        slots = [[self._buffer(pages, largest) for _ in range(self.iodepth)] for _ in range(self.jobs)]
        requests, depth = Requests(), self.iodepth * self.jobs
        layouts: dict[tuple[int, int], int] = {}
        for number in range(self.requests):
            slot, job = divmod(number % depth, self.jobs)
            size = draw.choice(self.block_sizes)
            op = "read" if draw.random() < self.read_share else "write"
            if (number % depth, size) not in layouts:
                pieces = merge_adjacent(slots[job][slot].slices(0, size))
                layouts[number % depth, size] = requests.layout(pieces)
            requests.add(op, layouts[number % depth, size], job, job)
        return Workload(self.name, requests, QueueSchedule(len(requests), depth), self.jobs)


def overlapping(workload: Workload) -> set[int]:
    """Numbers of the requests that share a page with another one while both are in flight."""
    requests, shared = workload.requests, set[int]()
    pages = [_pages(layout.segments) for layout in requests.layouts]
    groups = _groups(pages)
    inflight: list[dict[int, int]] = [{} for _ in pages]  # by group: request number, layout
    for kind, number in workload.schedule:
        which = requests.layout_index(requests.position(number))
        others = inflight[groups[which]]
        if kind == COMPLETE:
            others.pop(number, None)
            continue
        if others:
            sharing = [other for other, there in others.items() if not pages[which].isdisjoint(pages[there])]
            if sharing:
                shared.update(sharing, (number,))
        others[number] = which
    return shared


def _pages(segments: Segments) -> set[int]:
    """The pages that hold any byte of these."""
    return {page for phys, size in segments for page in range(phys >> 12, (phys + size + 4095) >> 12)}


def _groups(pages: list[set[int]]) -> list[int]:
    """A number for each set, the same for sets that are linked by common pages (most often only a few sets are)."""
    group, first = list(range(len(pages))), dict[int, int]()

    def root(one: int) -> int:
        while group[one] != one:
            group[one] = one = group[group[one]]
        return one

    for one, held in enumerate(pages):
        for page in held:
            group[root(one)] = root(first.setdefault(page, one))
    return [root(one) for one in range(len(pages))]
