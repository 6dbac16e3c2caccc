"""Exercising a controller: ``verify`` writes and compares every byte, ``perf`` measures.

``verify`` does not trust statuses: a controller may report success for data that never arrived. It divides a range of
the namespace into extents of random sizes, writes them in random order with a random number in flight, from memory
pages picked at random (scattered, with random offsets, and with gaps where the controller has SGLs), then reads
them, in another order, into other pages that were filled with something else before, and compares.

Everything is derived from ``seed``, so a run can be repeated; and what one run wrote another can check without writing,
with another strategy, after a reset, a reboot or a change of driver (``run(write=False)``).
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import Any

from dmakit.block.request import Op
from dmakit.errors import DmakitError, InputError
from dmakit.nvme.auto import AutoMapper
from dmakit.nvme.batch import pointers
from dmakit.nvme.buffers import DmaBuffer
from dmakit.nvme.commands import Done
from dmakit.nvme.controller import Controller
from dmakit.nvme.registration import shape_of

PAGE = 4096
MAX_IO = 512 << 10
_CHUNK = 2 << 20  # the arena is made of such buffers
_FILLER = 0xA5
Progress = Callable[[str, int, int], None]
Pieces = list[tuple[int, int]]  # (offset in the arena, length)


@dataclass
class Mismatch:
    """The first byte of an extent that differs."""

    lba: int
    offset: int
    expected: int
    found: int


@dataclass
class Verified:
    """What ``verify`` did and found; ``auto``: what that strategy measured and chose."""

    controller: str
    nsid: int
    strategy: str
    sgl: bool
    seed: int
    first_lba: int
    bytes_total: int = 0
    bytes_written: int = 0
    bytes_compared: int = 0
    commands: int = 0
    prp_commands: int = 0
    sgl_commands: int = 0
    extents: int = 0
    max_in_flight: int = 0
    resets: int = 0
    auto: dict[str, Any] | None = None
    failed: list[str] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Every byte compared, none different, no command failed."""
        return not self.failed and not self.mismatches and self.bytes_compared == self.bytes_total > 0

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "good": self.good}


class Verifier:
    """One run; see the head of the module. ``total`` bytes from block ``first``, up to ``depth`` extents in flight."""

    def __init__(
        self,
        controller: Controller,
        nsid: int,
        *,
        total: int,
        first: int = 0,
        depth: int = 32,
        seed: int = 0,
        max_io: int = MAX_IO,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        self.controller, self.driver = controller, controller.driver
        self.space = controller.namespaces[nsid]
        self.random = Random(seed)
        self.seed, self.depth, self.progress = seed, depth, progress
        size = self.space.block_size
        blocks = total // size
        if blocks < 1 or first < 0 or first + blocks > self.space.blocks:
            raise InputError(
                f"{total} bytes from block {first}: namespace {nsid} has {self.space.blocks} blocks of {size} bytes"
            )
        self.largest = max(1, min(max_io, total) // size)
        self.extents = self._divide(first, blocks)
        self.sgl = self.driver.use_sgl and bool(controller.facts.sgls & 3)
        pages = depth * (self.largest * size // PAGE + 2)
        pages = max(_CHUNK // PAGE, min(pages, 64 * _CHUNK // PAGE))
        self.arena: list[DmaBuffer] = [controller.buffer(_CHUNK) for _ in range(-(-pages * PAGE // _CHUNK))]
        self.idle = list(range(len(self.arena) * _CHUNK // PAGE))
        self.report = Verified(controller.name, nsid, self.driver.strategy, self.sgl, seed, first)
        self.report.extents = len(self.extents)
        self.report.bytes_total = blocks * size

    def _divide(self, first: int, blocks: int) -> list[tuple[int, int]]:
        """Extents (block, blocks): half of them small, the others up to the largest."""
        found, at, end = [], first, first + blocks
        small = max(1, min(self.largest, 8))
        while at < end:
            count = min(self.random.randint(1, self.random.choice((small, self.largest))), end - at)
            found.append((at, count))
            at += count
        return found

    def data(self, lba: int, blocks: int) -> bytes:
        """What an extent holds."""
        return Random(self.seed << 64 | lba).randbytes(blocks * self.space.block_size)

    # Memory -------------------------------------------------------------------------------------------------

    def _pick(self, size: int) -> Pieces:
        """Random pages for ``size`` bytes; PRP rules unless the controller has SGLs and the dice want gaps."""
        shuffle = self.random.random
        grain = self.space.block_size if self.space.block_size < PAGE else PAGE
        pieces: Pieces = []
        gaps = self.sgl and shuffle() < 0.2 and size <= 64 * grain
        offset = self.random.randrange(0, PAGE, 512) if shuffle() < 0.5 else 0
        left = size
        while left:
            page = self._take_page()
            start = offset if not pieces or gaps else 0
            room = PAGE - start
            take = min(left, self.random.randrange(4, room + 1, 4) if gaps and len(pieces) < 200 else room)
            pieces.append((page * PAGE + start, take))
            left -= take
        return pieces

    def _view(self, offset: int, length: int) -> memoryview:
        """Part of a page of the arena."""
        return self.arena[offset // _CHUNK].view[offset % _CHUNK : offset % _CHUNK + length]

    def _take_page(self) -> int:
        at = self.random.randrange(len(self.idle))
        self.idle[at], self.idle[-1] = self.idle[-1], self.idle[at]
        return self.idle.pop()

    def _put_back(self, pieces: Pieces) -> None:
        self.idle += [offset // PAGE for offset, _ in pieces]

    def _needed(self, blocks: int) -> int:
        """Pages that an extent may take at worst."""
        size = blocks * self.space.block_size
        return max(size // PAGE + 2, min(size // 4, 264) if self.sgl else 0)

    # The two passes -----------------------------------------------------------------------------------------

    def run(self, *, write: bool = True) -> Verified:
        """Write everything (unless an earlier run with the same total, first, seed, max_io has), read everything."""
        try:
            if write:
                self._pass(Op.WRITE)
                self.controller.namespaces[self.space.nsid].flush()
            self._pass(Op.READ)
            self.report.resets = self.driver.recovery.resets
            self.report.auto = self.driver.mapper.report() if isinstance(self.driver.mapper, AutoMapper) else None
            return self.report
        finally:
            if not self.driver.in_flight:
                for buffer in self.arena:
                    buffer.free()

    def _pass(self, op: Op) -> None:
        order = list(self.extents)
        self.random.shuffle(order)
        out: dict[int, _Out] = {}
        depth = self.depth
        done_bytes, total = 0, sum(blocks for _, blocks in order) * self.space.block_size
        while order or out:
            while order and len(out) < depth and len(self.idle) >= self._needed(order[-1][1]):
                self._issue(op, *order.pop(), out)
            self.report.max_in_flight = max(self.report.max_in_flight, self.driver.in_flight)
            for extent in self._collect(out):
                done_bytes += extent.blocks * self.space.block_size
                self._finish(op, extent)
                self.progress("writing" if op == Op.WRITE else "reading", done_bytes, total)
                depth = self.random.randint(1, self.depth)

    def _issue(self, op: Op, lba: int, blocks: int, out: dict[int, _Out]) -> None:
        size = blocks * self.space.block_size
        pieces = self._pick(size)
        content = self.data(lba, blocks) if op == Op.WRITE else bytes([_FILLER]) * size
        at = 0
        for offset, length in pieces:
            self._view(offset, length)[:] = content[at : at + length]
            at += length
        memory = [part for o, n in pieces for part in self.arena[o // _CHUNK].pieces(o % _CHUNK, n)]
        requests = self.controller.spread(self.driver.requests(op, lba, memory, nsid=self.space.nsid))
        extent = _Out(lba, blocks, pieces, len(requests))
        out[lba] = extent
        for request in requests:
            request.context = extent
            while not self.driver.room(request):
                self._take(self.driver.progress())
            iod = self.driver.submit(request, nsid=self.space.nsid)
            self.report.commands += 1
            if iod.psdt:
                self.report.sgl_commands += 1
            else:
                self.report.prp_commands += 1

    def _take(self, finished: list[Done]) -> None:
        for done in finished:
            extent = done.request.context
            assert isinstance(extent, _Out)
            extent.left -= 1
            if done.error is not None or done.status & 0x7FF:
                extent.failed = str(done.error) if done.error is not None else done.text

    def _collect(self, out: dict[int, _Out]) -> list[_Out]:
        self._take(self.driver.progress())
        ended = [extent for extent in out.values() if extent.left == 0]
        for extent in ended:
            del out[extent.lba]
        if self.driver.dead is not None and not ended and not self.driver.in_flight:
            raise self.driver.dead
        return ended

    def _finish(self, op: Op, extent: _Out) -> None:
        size = extent.blocks * self.space.block_size
        if extent.failed:
            self.report.failed.append(f"{op.name} of {extent.blocks} blocks at {extent.lba}: {extent.failed}")
        elif op == Op.WRITE:
            self.report.bytes_written += size
        else:
            found = b"".join(bytes(self._view(offset, n)) for offset, n in extent.pieces)
            self._compare(extent, found)
            self.report.bytes_compared += size
        self._put_back(extent.pieces)

    def _compare(self, extent: _Out, found: bytes) -> None:
        expected = self.data(extent.lba, extent.blocks)
        if found != expected:
            at = next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
            self.report.mismatches.append(Mismatch(extent.lba, at, expected[at], found[at]))


@dataclass
class _Out:
    """An extent in flight."""

    lba: int
    blocks: int
    pieces: Pieces
    left: int
    failed: str = ""


@dataclass
class Measured:
    """What ``perf`` measured. Times in ns; ``software_ns``: of this thread, in submit and complete, an I/O;
    ``verdict``: what ``auto`` would do with such I/O (``costs.Verdict``), were its addresses not asked for."""

    controller: str
    nsid: int
    op: str
    block_bytes: int
    depth: int
    seconds: float
    ios: int
    errors: int
    iops: float
    bytes_per_second: float
    latency_mean: float
    latency_p50: float
    latency_p99: float
    latency_max: float
    software_ns: float
    strategy: str = ""
    verdict: str = ""

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def perf(
    controller: Controller,
    nsid: int,
    *,
    op: str = "read",
    size: int = PAGE,
    depth: int = 32,
    seconds: float = 2.0,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Measured:
    """Random ``read`` or ``write`` of ``size`` bytes (at most two pages) on registered memory, ``depth`` in flight."""
    space = controller.namespaces[nsid]
    blocks = size // space.block_size
    if size % space.block_size or not 0 < size <= 2 * PAGE or blocks > space.blocks:
        raise InputError(f"--bs {size}: must be whole blocks of {space.block_size} bytes, at most {2 * PAGE}")
    queue = controller.batch(nsid)
    if not 1 <= depth <= queue.depth:
        raise InputError(f"--depth {depth}: must lie in [1, {queue.depth}]")
    stride = -(-size // PAGE) * PAGE
    with controller.buffer(depth * stride) as buffer:
        runner = _Runner(queue, [buffer.address(slot * stride) for slot in range(depth)], op, size, blocks, seed)
        try:
            took = runner.run(seconds, progress)
        finally:
            runner.drain()
    found = runner.measured(controller.name, nsid, took)
    return replace(found, strategy=controller.driver.strategy, verdict=_verdict(controller, size, depth * stride))


def _verdict(controller: Controller, size: int, whole: int) -> str:
    """Of ``auto``, for I/O of ``size`` bytes on a buffer of ``whole``; empty with another strategy."""
    mapper = controller.driver.mapper
    costs = mapper.measured() if isinstance(mapper, AutoMapper) else None
    return "" if costs is None else str(costs.verdict(shape_of([(0, size)]), shape_of([(0, whole)])))


class _Runner:
    """Keeps ``depth`` commands in flight: what has completed is issued again at another place."""

    def __init__(self, queue: Any, addresses: list[int], op: str, size: int, blocks: int, seed: int) -> None:
        self.queue, self.op, self.size, self.blocks = queue, op, size, blocks
        self.depth = len(addresses)
        self.low, self.high = pointers(array("Q", addresses), size)
        self.random = Random(seed)
        self.places = queue.space.blocks // blocks
        self.started = [0] * self.depth
        self.tags, self.statuses = array("Q", bytes(8 * self.depth)), array("Q", bytes(8 * self.depth))
        self.latencies: list[int] = []
        self.errors = 0
        self.software = 0

    def _issue(self, slots: list[int]) -> None:
        now = time.perf_counter_ns()
        lbas = array("Q", [self.random.randrange(self.places) * self.blocks for _ in slots])
        counts = array("Q", [self.blocks]) * len(slots)
        low, high = array("Q", [self.low[s] for s in slots]), array("Q", [self.high[s] for s in slots])
        for slot in slots:
            self.started[slot] = now
        begin = time.thread_time_ns()
        issued = self.queue.submit(self.op, lbas, counts, low, high, array("Q", slots))
        self.software += time.thread_time_ns() - begin
        assert issued == len(slots)

    def _take(self) -> list[int]:
        begin = time.thread_time_ns()
        count = self.queue.complete(self.tags, self.statuses)
        if count:
            self.software += time.thread_time_ns() - begin
        else:
            count = self.queue.complete(self.tags, self.statuses, wait_ns=1_000_000)
        now = time.perf_counter_ns()
        slots = list(self.tags[:count])
        self.latencies += [now - self.started[slot] for slot in slots]
        self.errors += sum(1 for status in self.statuses[:count] if status & 0x7FF)
        return slots

    def run(self, seconds: float, progress: Progress) -> float:
        """Issue and complete for so long; the seconds it took."""
        begin = time.perf_counter()
        self._issue(list(range(self.depth)))
        while (passed := time.perf_counter() - begin) < seconds:
            slots = self._take()
            if slots:
                self._issue(slots)
            progress(self.op, int(passed * 1000), int(seconds * 1000))
        return time.perf_counter() - begin

    def drain(self) -> None:
        """Wait for what is in flight, as long as its time-outs."""
        try:
            while self.queue.in_flight:
                self._take()
        except DmakitError:
            return

    def measured(self, name: str, nsid: int, took: float) -> Measured:
        """The figures."""
        times = sorted(self.latencies) or [0]
        count = len(self.latencies)
        return Measured(
            name,
            nsid,
            self.op,
            self.size,
            self.depth,
            took,
            count,
            self.errors,
            count / took,
            count * self.size / took,
            sum(times) / len(times),
            times[len(times) // 2],
            times[min(len(times) - 1, len(times) * 99 // 100)],
            times[-1],
            self.software / max(count, 1),
        )
