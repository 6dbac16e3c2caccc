"""Sources of workloads for the rig: a fio-like job placed on the machine's memory, or a recorded trace.

A recorded request keeps its physical addresses, so contiguity and alignment are those of the recorded machine.
Addresses that this machine has no RAM at (the recorded one had another layout) are moved up together by whole GiB.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dmakit.errors import InputError
from dmakit.lab.inputs import Input
from dmakit.lab.request_table import IoRequest, Layout, Requests, Segments
from dmakit.lab.schedule import ListedSchedule
from dmakit.lab.workload import FioSpec, Workload
from dmakit.platform.soft import HIGH_RAM_START, LOW_RAM_END, Machine
from dmakit.trace.requests import Recorded
from dmakit.units import GIB, MIB, PAGE

_LARGEST_REQUEST = 64 * MIB


class FioSource:
    """A fio-like job: its buffers are allocated from the machine, in order, before anything is mapped."""

    def __init__(self, name: str, spec: FioSpec) -> None:
        self.name = name
        self.spec = spec
        self.cpus = spec.jobs
        data = spec.iodepth * spec.jobs * max(spec.block_sizes)
        host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if data > host // 2:
            raise InputError(
                f"{name}: buffers for {spec.iodepth * spec.jobs} requests in flight need {data >> 20} MiB, more than "
                f"half of this host's {host >> 20} MiB: use a smaller bs, iodepth or jobs"
            )
        buffers = spec.iodepth * spec.jobs * (max(spec.block_sizes) + 4 * MIB)
        unit = PAGE << spec.folio_order
        pieces, piece = (
            (-(-max(spec.block_sizes) // spec.piece), spec.piece) if spec.piece else (1, max(spec.block_sizes))
        )
        self.memory = 2 * spec.iodepth * spec.jobs * pieces * -(-(piece + spec.offset) // unit) * unit
        self.machine_options: dict[str, Any] = {
            "ram": -(-2 * buffers // GIB) * GIB + 4 * GIB,
            "fragmentation": spec.fragmentation,
        }

    def place(self, machine: Machine) -> Workload:
        """Allocate the buffers and draw the requests."""
        return self.spec.place(machine.pages)

    def replay_score(self) -> tuple[int, int] | None:
        """There is no kernel to compare with."""
        return None

    def missing(self) -> list[str]:
        """Nothing is unknown about a description."""
        return []


class TraceSource:
    """The requests of one device of a recorded trace: the one with the most of them."""

    def __init__(self, name: str, path: Path, boot: Path | None = None) -> None:
        from dmakit.trace.columns import load
        from dmakit.trace.requests import extract

        self.name = name
        self.path = path
        self.boot = boot
        self.extracted = extract(load(path))
        if not self.extracted.requests:
            lacks = "; ".join(self.extracted.missing) or "no mapping of a request was recorded"
            raise InputError(f"{path}: no request with its memory is in this trace: {lacks}")
        devices = self.extracted.devices()
        self.device = max(devices, key=lambda name: devices[name])
        self.cpus = self.extracted.cpus
        self.requests = [
            request
            for request in self.extracted.requests
            if request.device == self.device and sum(n for _, n in request.segments) <= _LARGEST_REQUEST
        ]
        self._lay_out()

    def _lay_out(self) -> None:
        """Where recorded addresses go, and how much RAM that needs."""
        ends = [phys + size for request in self.requests for phys, size in request.segments]
        high = max((end for end in ends if end > HIGH_RAM_START), default=HIGH_RAM_START)
        self.high = -(-high // GIB) * GIB
        moved = any(LOW_RAM_END < end <= HIGH_RAM_START for end in ends)
        if self.high > 1 << 43:
            raise InputError(f"{self.path}: physical address {high:#x} is beyond the 8 TiB that a machine can have")
        own = self.high + (2 * GIB if moved else 0)
        self.machine_options: dict[str, Any] = {
            "ram": own - HIGH_RAM_START + LOW_RAM_END + 4 * GIB,
            "pool": (own, 2 * GIB),
        }

    def _placed(self, phys: int, size: int) -> tuple[int, int]:
        if LOW_RAM_END < phys + size <= HIGH_RAM_START:
            return phys - LOW_RAM_END + self.high, size
        return phys, size

    def _bvecs(self, request: Recorded) -> Segments:
        """Two pieces for a request of one segment that the kernel did not treat as one.

        Its driver asks for the number of pieces before it looks at contiguity, so a window with a single link shows
        that the request had been merged from more than one.
        """
        if request.method != "two-step" or len(request.segments) != 1:
            return ()
        phys, size = self._placed(*request.segments[0])
        first = PAGE - phys % PAGE
        if first >= size:
            return ()
        return (phys, first), (phys + first, size - first)

    def place(self, machine: Machine) -> Workload:
        """The recorded requests; nothing is allocated, the addresses are theirs."""
        from dmakit.trace.requests import schedule

        requests = Requests(
            IoRequest(
                request.number,
                "read" if request.read else "write",
                Layout.of(tuple(self._placed(phys, size) for phys, size in request.segments), self._bvecs(request)),
                request.cpu,
                request.end_cpu,
                request.phase,
            )
            for request in self.requests
        )
        return Workload(self.name, requests, ListedSchedule(schedule(self.requests)), self.cpus)

    def replay_score(self) -> tuple[int, int] | None:
        """(allocations whose IOVA is the kernel's, allocations), by the allocator replay of the same trace."""
        from dmakit.trace.replay import replay_file

        result = replay_file(self.path, boot=self.boot)
        return (result.matched, result.allocations) if result.allocations else None

    def missing(self) -> list[str]:
        """What this trace does not show."""
        lines = list(self.extracted.missing)
        if self.extracted.unseen:
            lines.append(f"{self.extracted.unseen} block requests whose mapping was not recorded")
        return lines


def source_of(given: Input, boot: Path | None = None) -> FioSource | TraceSource:
    """The source for an input; a boot file makes sense only with a trace."""
    if given.trace is not None:
        return TraceSource(given.name, given.trace, boot)
    if boot is not None:
        raise InputError(f"--boot {boot}: the input is a workload, not a trace")
    assert given.spec is not None
    return FioSource(given.name, given.spec)
