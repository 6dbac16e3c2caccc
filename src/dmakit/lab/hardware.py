"""Compare on a real controller: the same requests through every mapping strategy, behind the host's own IOMMU.

The NVMe driver itself carries the requests out (``nvme.driver`` with one of ``nvme.strategies``), on a device that VFIO
gave us. What is compared:

* *Bytes.* What a read must deliver is written to its blocks first, what a write left there is read back, both through
  *scratch*: memory of its own that stays mapped and is not measured. Statuses are not trusted, data is.
* *Time.* The nanoseconds inside ``map`` and ``unmap``, system calls included: measured on this host, so here they do
  rank. Medians leave the first request out, which pays for what is made once; the mean has everything in it,
  registrations too. ``auto`` measures its costs before the first request, which is told apart (``setup``).
* *Ledger.* Summed over the same calls. Rows that only the host's IOMMU driver could count are None.

The namespace's first blocks are overwritten: one extent for every request in flight. What a recorded driver mapped
beside whole blocks (lists, identify data) cannot be a read or a write here: it is left out and counted.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dmakit.block.request import Op, Request
from dmakit.errors import DmakitError, HostError, InputError, UnsupportedError
from dmakit.lab.outcome import Outcome
from dmakit.lab.pattern import Pattern, count_wrong
from dmakit.lab.relocate import depth_of, memory_needed, moved
from dmakit.lab.request_table import IoRequest, Segments
from dmakit.lab.schedule import SUBMIT
from dmakit.lab.sources import FioSource
from dmakit.lab.workload import Workload, overlapping
from dmakit.ledger import ROWS
from dmakit.nvme.auto import AutoMapper
from dmakit.nvme.commands import Done
from dmakit.nvme.costs import Costs
from dmakit.nvme.driver import NvmeDriver
from dmakit.nvme.iod import FAST_PATHS, PATHS, Iod
from dmakit.nvme.premap import Offer, PremapMapper
from dmakit.nvme.registration import register
from dmakit.nvme.vfio import VfioHost
from dmakit.platform.linux.kernel import Kernel
from dmakit.platform.linux.machine import OBSERVED, Machine
from dmakit.platform.linux.space import HUGE_PAGE
from dmakit.reasons import PathLog, Reason
from dmakit.units import MIB

STRATEGIES = ("page", "sg", "two-step", "premap", "auto")
_SLACK = 64 * MIB  # of memory: queues, lists, scratch
_MOST_QUEUES, _ENTRIES = 8, 256
_WAIT_S = 30
Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class HardwareResult(Outcome):
    """One strategy, measured: ``map_ns`` and ``unmap_ns`` are medians a request; ``setup_ns`` registered the buffers
    (premap) or measured the costs (auto); ``spent_ns``: all requests, and the registrations. ``commands``: the request
    of each command; ``choice``: what ``auto`` measured and did (``nvme.auto``)."""

    left_out: int = 0
    map_ns: float = 0.0
    unmap_ns: float = 0.0
    quartiles: tuple[float, float] = (0.0, 0.0)
    setup_ns: int = 0
    spent_ns: int = 0
    buffers: int = 0
    ledger: dict[str, int | None] = field(default_factory=dict)
    commands: array[int] = field(default_factory=lambda: array("Q"))
    costs: Costs | None = None
    choice: dict[str, Any] | None = None

    @property
    def mean_ns(self) -> float:
        """A request on average, its part of the registrations included."""
        return self.spent_ns / max(self.requests, 1)

    @property
    def total_ns(self) -> float:
        """Mapping and unmapping a request."""
        return self.map_ns + self.unmap_ns

    def report(self) -> dict[str, object]:
        """The JSON form."""
        return {
            **self.facts(),
            "left_out": self.left_out,
            "ledger": self.ledger,
            "measured_ns": {
                "map": self.map_ns,
                "unmap": self.unmap_ns,
                "middle_half": list(self.quartiles),
                "setup": self.setup_ns,
                "mean": round(self.mean_ns, 1),
            },
            "auto": self.choice,
            "buffers": self.buffers,
        }


@dataclass(frozen=True, slots=True)
class Target:
    """The controller: its PCI address, kernel interface, namespace; ``kernel``: another host, for tests."""

    bdf: str
    backend: str = "auto"
    nsid: int = 1
    sgl: bool = True
    seed: int = 0
    policy: str = "linux"
    kernel: Kernel | None = None

    def describe(self) -> dict[str, object]:
        """For reports: what a rerun needs besides the place."""
        return {name: getattr(self, name) for name in ("nsid", "sgl", "seed", "policy")}


class Measured:
    """A ``nvme.listed.Mapper`` that times another one and sums its ledger; not while ``off`` (scratch).

    ``now``: the request that commands belong to; ``commands``: that of each command, as ``paths`` numbers them."""

    def __init__(self, mapper: Any, ledger: Any, result: HardwareResult) -> None:
        self.mapper, self.paths, self.commands = mapper, result.paths, result.commands
        self.now = 0
        self.counts = np.asarray(ledger.counts)
        self.sums = np.zeros_like(self.counts)
        self.map_times: list[int] = []
        self.unmap_times: list[int] = []
        self.off = False
        self.skipped: set[Iod] = set()

    def map(self, request: Request) -> Iod:
        """Map, timed."""
        if self.off:
            iod: Iod = self.mapper.map(request)
            self.skipped.add(iod)
            return iod
        before = self.counts.copy()
        started = time.perf_counter_ns()
        iod = self.mapper.map(request)
        self.map_times.append(time.perf_counter_ns() - started)
        self.sums += self.counts - before
        self.paths.take(len(self.commands), iod.path_name, Reason(iod.reason))
        self.commands.append(self.now)
        return iod

    def unmap(self, iod: Iod, *, cpu: int | None = None) -> None:
        """Unmap, timed."""
        if iod in self.skipped:
            self.skipped.discard(iod)
            self.mapper.unmap(iod, cpu=cpu)
            return
        before = self.counts.copy()
        started = time.perf_counter_ns()
        self.mapper.unmap(iod, cpu=cpu)
        self.unmap_times.append(time.perf_counter_ns() - started)
        self.sums += self.counts - before


class HardwareRun:
    """One strategy over one workload on an open controller; use ``run``."""

    def __init__(
        self, host: VfioHost, driver: NvmeDriver, workload: Workload, result: HardwareResult, seed: int
    ) -> None:
        self.host, self.driver, self.workload, self.result = host, driver, workload, result
        self.memory = host.machine.memory
        self.timer = Measured(driver.mapper, driver.device.ledger, result)
        result.workload = workload.requests
        self.largest = max(layout.size for layout in workload.requests.layouts)
        self.block = driver.namespace.block_size
        self.extent = -(-self.largest // self.block)
        self.pattern = Pattern(self.largest, seed)
        self.scratch, self.scratch_view = host.memory(self.largest)
        self.shared = overlapping(workload)
        self.free = list(range(depth_of(workload)))
        self.flights: dict[int, tuple[int, list[Iod]]] = {}
        self.done: dict[Iod, Done] = {}
        self._check()

    def _check(self) -> None:
        blocks = self.driver.namespace.blocks
        if len(self.free) * self.extent > blocks:
            raise InputError(
                f"the namespace has {blocks} blocks, and {len(self.free)} requests in flight of {self.largest} bytes "
                f"need {len(self.free) * self.extent}: use a smaller bs or iodepth"
            )
        sizes = [layout.size for layout in self.workload.requests.layouts]
        odd = next((size for size in sizes if size % self.block), None)
        if odd is not None and all(size % self.block for size in sizes):
            raise InputError(f"a request of {odd} bytes: must be a multiple of the {self.block}-byte block")

    # Commands -----------------------------------------------------------------------------------------------

    def _submit(self, op: Op, lba: int, memory: Any, cpu: int) -> list[Iod]:
        """Queue the requests of one I/O; waits when the ring is full."""
        iods: list[Iod] = []
        for request in self.driver.requests(op, lba, memory, cpu=cpu):
            while not self.driver.room(request):
                self._progress()
            iods.append(self.driver.submit(request))
        return iods

    def _progress(self) -> None:
        for done in self.driver.progress():
            self.done[done.iod] = done

    def _wait(self, iods: list[Iod]) -> bool:
        """Wait for commands; whether all went well."""
        end = time.monotonic() + _WAIT_S
        while any(iod not in self.done for iod in iods):
            if time.monotonic() > end:
                raise HostError(f"{self.host.name}: no completion within {_WAIT_S} s", 110)
            self._progress()
        found = [self.done.pop(iod) for iod in iods]
        return all(done.status == 0 and done.error is None for done in found)

    def _scratch(self, op: Op, lba: int, size: int) -> None:
        """I/O on the scratch memory, not measured."""
        ((phys, _),) = self.scratch.ranges
        self.timer.off = True
        try:
            good = self._wait(self._submit(op, lba, [(phys, size)], 0))
        finally:
            self.timer.off = False
        if not good:
            raise HostError(f"{self.host.name}: {op.name.lower()} of {size} bytes at block {lba} failed", 5)

    # Requests -----------------------------------------------------------------------------------------------

    def submit(self, request: IoRequest) -> None:
        """Prepare blocks or memory, map, queue."""
        slot = self.free.pop()
        lba, payload = slot * self.extent, self.pattern.of(request.number, request.size)
        if request.op == "write":
            self._fill(request, payload)
        else:
            self.scratch_view[: request.size] = payload
            self._scratch(Op.WRITE, lba, request.size)
        op = Op.READ if request.op == "read" else Op.WRITE
        self.timer.now = request.number
        try:
            iods = self._submit(op, lba, request.bvecs or request.segments, request.cpu)
        except DmakitError:
            self.result.failed += 1
            self.free.append(slot)
            return
        self.flights[request.number] = slot, iods
        if request.number in self.shared:
            self.complete(request)  # somebody else uses this memory: look at it before he does

    def _fill(self, request: IoRequest, payload: memoryview) -> None:
        at = 0
        for phys, size in request.segments:
            self.memory.write(phys, payload[at : at + size])
            at += size

    def complete(self, request: IoRequest) -> None:
        """Wait for the request and compare every byte."""
        flight = self.flights.pop(request.number, None)
        if flight is None:
            return
        slot, iods = flight
        if not self._wait(iods):
            self.result.failed += 1
        if request.op == "read":
            found = b"".join(self.memory.read(phys, size) for phys, size in request.segments)
        else:
            self.scratch_view[: request.size] = bytes(request.size)
            self._scratch(Op.READ, slot * self.extent, request.size)
            found = bytes(self.scratch_view[: request.size])
        self.free.append(slot)
        self.result.wrong += count_wrong(self.pattern.of(request.number, request.size), found)
        self.result.requests += 1
        self.result.size += request.size

    def run(self, progress: Progress | None) -> None:
        """The whole schedule; results are in ``result``."""
        undo = self._offer()
        self.driver.mapper = self.timer
        requests = self.workload.requests
        try:
            for kind, number in self.workload.schedule:
                request = requests.numbered(number)
                if request.size % self.block:
                    self.result.left_out += kind == SUBMIT
                    continue
                if kind == SUBMIT:
                    self.submit(request)
                    continue
                self.complete(request)
                if progress is not None:
                    progress(self.result.name, self.result.requests + self.result.failed, len(requests))
            self._sum_up()
        finally:
            self.driver.drain()
            for offer in undo:
                self.timer.mapper.withdraw(offer)
            self.scratch.release()

    def _offer(self) -> list[Offer]:
        """Every distinct buffer, to a strategy that keeps memory mapped; the scratch memory is registered."""
        mapper = self.driver.mapper
        if not isinstance(mapper, PremapMapper):
            return []
        made = [mapper.add(register(self.driver.device, self.scratch.ranges))]
        buffers: set[Segments] = {layout.bvecs or layout.segments for layout in self.workload.requests.layouts}
        started = time.perf_counter_ns()
        made += [mapper.offer(parts) for parts in sorted(buffers)]
        if isinstance(mapper, AutoMapper):
            self.result.costs = mapper.measured()
        self.result.setup_ns, self.result.buffers = time.perf_counter_ns() - started, len(buffers)
        return made

    def _sum_up(self) -> None:
        result, timer = self.result, self.timer
        both = np.zeros((2, 3))
        for row, times in enumerate((timer.map_times, timer.unmap_times)):
            if times:
                commands = len(times) / max(result.requests, 1)  # a request may be split
                both[row] = np.percentile(times[1:] or times, (25, 50, 75)) * commands
        result.map_ns, result.unmap_ns = float(both[0, 1]), float(both[1, 1])
        mapper = timer.mapper
        premapped = not isinstance(mapper, AutoMapper) and isinstance(mapper, PremapMapper)
        result.spent_ns = sum(timer.map_times) + sum(timer.unmap_times) + (result.setup_ns if premapped else 0)
        if isinstance(mapper, AutoMapper):
            result.choice = {name: value for name, value in mapper.report().items() if name != "requests"}  # see paths
        result.quartiles = float(both[:, 0].sum()), float(both[:, 2].sum())
        result.ledger = {row.name: int(timer.sums[row.index]) if row.name in OBSERVED else None for row in ROWS}


@dataclass(slots=True)
class HardwareComparison:
    """All strategies on one controller."""

    input: str
    target: Target
    backend: str = ""
    controller: str = ""
    results: list[HardwareResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        """Bytes that differ, and requests that failed, over all strategies."""
        return sum(result.wrong + result.failed for result in self.results)

    def named(self, name: str) -> HardwareResult | None:
        """A strategy that ran."""
        return next((r for r in self.results if r.name == name and r.requests), None)

    def break_even(self) -> float | None:
        """Uses of a buffer from which on registering it costs less than two-step; None when never, or not run."""
        premap, two_step = self.named("premap"), self.named("two-step")
        if premap is None or two_step is None or premap.total_ns >= two_step.total_ns or not premap.buffers:
            return None
        return premap.setup_ns / premap.buffers / (two_step.total_ns - premap.total_ns)

    def choice(self) -> str:
        """Which strategy is cheaper here, two-step or premap, and why, in a sentence."""
        premap, two_step = self.named("premap"), self.named("two-step")
        if premap is None or two_step is None:
            return "two-step or premap: not measured (run both)"
        figures = f"two-step {two_step.total_ns / 1000:.1f} us, premap {premap.total_ns / 1000:.1f} us a request"
        uses = self.break_even()
        if uses is None:
            return f"use two-step: {figures}"
        register = premap.setup_ns / premap.buffers / 1000
        return f"use premap for a buffer used {uses:.3g} times or more: {figures}, registering one {register:.1f} us"

    def report(self) -> dict[str, object]:
        """The JSON form."""
        return {
            "input": self.input,
            "platform": f"vfio:{self.target.bdf}",
            "backend": self.backend,
            "controller": self.controller,
            "options": self.target.describe(),
            "break_even_uses": self.break_even(),
            "choice": self.choice(),
            "notes": self.notes,
            "strategies": [result.report() for result in self.results],
        }


def _machine(source: Any, target: Target) -> tuple[Machine, Workload]:
    """A machine with memory enough, and the workload placed on it."""
    recorded = None if isinstance(source, FioSource) else source.place(None)
    need = source.memory if recorded is None else memory_needed(recorded)
    machine = Machine(
        backend=target.backend,
        ram=-(-(need + _SLACK) // HUGE_PAGE) * HUGE_PAGE,
        cpus=source.cpus,
        policy=target.policy,
        seed=target.seed,
        fragmentation=source.machine_options.get("fragmentation", 0.0),
        kernel=target.kernel,
    )
    try:
        return machine, source.place(machine) if recorded is None else moved(recorded, machine.pages)
    except BaseException:
        machine.close()
        raise


def run_strategy(
    name: str, source: Any, target: Target, comparison: HardwareComparison, progress: Progress | None
) -> None:
    """Open the controller, run one strategy, give everything back."""
    result = HardwareResult(name, paths=PathLog(PATHS, FAST_PATHS))
    machine, workload = _machine(source, target)
    with machine, closing(VfioHost(target.bdf, machine=machine, interrupts=False)) as host:
        driver = NvmeDriver(
            host.transport,
            queues=max(1, min(source.cpus, _MOST_QUEUES)),
            entries=_ENTRIES,
            nsid=target.nsid,
            strategy=name,
            use_sgl=target.sgl,
            record=False,
        )
        with driver:
            comparison.controller = f"{driver.facts.model} {driver.facts.firmware}".strip()
            comparison.backend = host.device.space.domain.backend.name
            try:
                HardwareRun(host, driver, workload, result, target.seed).run(progress)
            except UnsupportedError as error:
                result.unavailable = str(error)
    comparison.results.append(result)


def compare_on_hardware(
    source: Any, target: Target, names: list[str] | None = None, progress: Progress | None = None
) -> HardwareComparison:
    """Run the strategies (all of them unless ``names`` says which) one after the other on the controller."""
    comparison = HardwareComparison(source.name, target, notes=source.missing())
    for name in names or STRATEGIES:
        if name not in STRATEGIES:
            raise InputError(f"--strategy {name}: on hardware it must be one of {', '.join(STRATEGIES)}")
        run_strategy(name, source, target, comparison, progress)
    return comparison
