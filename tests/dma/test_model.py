"""The mapping calls against a truth that only knows bytes: who may read which byte, and when.

The truth keeps, for every page of device address space, what a device must find there (a live mapping), what it may
still find there (unmapped, but not flushed: lazy mode only), or nothing. Memory is a dict of pages. Each rule makes
one API call and the same change in the truth; the invariant reads through the device and looks at the CPU's side.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dmakit.dma.direction import Direction
from dmakit.dma.iova_state import IovaState
from dmakit.errors import FaultError, MisuseError
from tests.dma.world import PAGE, platform_here, world

TO, FROM, BOTH = Direction.TO_DEVICE, Direction.FROM_DEVICE, Direction.BIDIRECTIONAL
PAGES = 24
CONFIGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"mode": mode, "coherent": coherent, "iommu": iommu}, {"trusted": trusted, "min_align_mask": PAGE - 1})
    for mode in ("strict", "lazy")
    for coherent in (True, False)
    for trusted in (True, False)
    for iommu in ("vtd", "x86")
]
HOST_CONFIGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"trusted": trusted, "min_align_mask": PAGE - 1}) for trusted in (True, False)
]


@dataclass
class Piece:
    """Bytes [addr, addr+size) of device space stand for CPU memory at ``at`` of the arena."""

    addr: int
    at: int
    size: int
    direction: int
    device_view: bytearray = field(default_factory=bytearray)


@dataclass
class Window:
    state: IovaState
    pieces: dict[int, Piece] = field(default_factory=dict)  # by offset


class Truth:
    """One machine, one device, an arena of CPU memory, and what must be visible where."""

    def __init__(self, config: tuple[dict[str, Any], dict[str, Any]], seed: int = 0) -> None:
        machine, device = config
        options = {"ram": "64M", "swiotlb": "2M", "fragmentation": 1.0, "seed": seed, **machine}
        self.machine, self.device = world(options, **device)
        self.write_implies_read = platform_here().write_implies_read()
        self.arena = self.machine.buffer(PAGES * PAGE)
        self.pages = [phys for phys, size in self.arena.ranges for phys in range(phys, phys + size, PAGE)]
        self.cpu = bytearray(PAGES * PAGE)  # what the CPU must read
        self.owner = [0] * PAGES  # how many mappings use an arena page: only unused ones are mapped writable
        self.windows: list[Window] = []
        self.singles: list[Piece] = []
        self.random = random.Random(seed)
        self.write_cpu(0, len(self.cpu))

    # helpers

    def take(self, count: int) -> int | None:
        free = [i for i in range(PAGES - count + 1) if not any(self.owner[i : i + count])]
        return self.random.choice(free) if free else None

    def write_cpu(self, at: int, size: int) -> None:
        data = self.random.randbytes(size)
        self.cpu[at : at + size] = data
        self.arena.write(at, data)

    def hold(self, at: int, size: int, by: int) -> None:
        for page in range(at // PAGE, (at + size - 1) // PAGE + 1):
            self.owner[page] += by

    def mapped(self, piece: Piece) -> None:
        piece.device_view = bytearray(self.cpu[piece.at : piece.at + piece.size])
        self.hold(piece.at, piece.size, 1)

    def unmapped(self, piece: Piece) -> None:
        """The CPU owns the bytes again: what the device wrote is there."""
        if piece.direction != TO:
            self.cpu[piece.at : piece.at + piece.size] = piece.device_view
        self.hold(piece.at, piece.size, -1)
        assert self.arena.read(piece.at, piece.size) == self.cpu[piece.at : piece.at + piece.size]

    def live(self) -> list[Piece]:
        return self.singles + [piece for window in self.windows for piece in window.pieces.values()]

    # steps

    def map_single(self, pages: int, offset: int, size: int, direction: int) -> None:
        first = self.take(pages)
        if first is None:
            return
        at = first * PAGE + offset
        size = min(size, PAGE - offset)  # the arena's pages are not neighbours
        self.write_cpu(at, size)
        piece = Piece(self.device.map_phys(self.pages[first] + offset, size, direction), at, size, direction)
        self.mapped(piece)
        self.singles.append(piece)

    def unmap_single(self, which: int) -> None:
        piece = self.singles.pop(which % len(self.singles))
        self.device.unmap_phys(piece.addr, piece.size, piece.direction)
        self.unmapped(piece)

    def open_window(self, pages: int, lead: int) -> None:
        state = self.device.try_alloc(lead, pages * PAGE - lead)
        assert state
        self.windows.append(Window(state))

    def link(self, which: int, slot: int, direction: int, tail: int) -> None:
        window = self.windows[which % len(self.windows)]
        lead = window.state.addr % PAGE
        granules = (window.state.size + lead) // PAGE
        slot %= granules
        offset = slot * PAGE - lead if slot else 0
        pad = 0 if slot else lead
        size = PAGE - pad
        if slot == granules - 1:
            size = max(1, size - tail)
        first = self.take(1)
        if first is None:
            return
        at = first * PAGE + pad
        self.write_cpu(at, size)
        if offset in window.pieces:
            with pytest.raises(MisuseError) as caught:
                window.state.link(self.pages[first] + pad, offset, size, direction)
            assert caught.value.errno_name == "EADDRINUSE"
            return
        window.state.link(self.pages[first] + pad, offset, size, direction)
        window.state.sync(offset, size)
        piece = Piece(window.state.addr + offset, at, size, direction)
        self.mapped(piece)
        window.pieces[offset] = piece

    def unlink(self, which: int, piece_at: int) -> None:
        window = self.windows[which % len(self.windows)]
        if not window.pieces:
            return
        offset = sorted(window.pieces)[piece_at % len(window.pieces)]
        piece = window.pieces.pop(offset)
        window.state.unlink(offset, piece.size, piece.direction)
        self.unmapped(piece)
        with pytest.raises(FaultError):  # flushed when unlink returned, in lazy mode too
            self.device.dma_read(piece.addr, 1)

    def close_window(self, which: int) -> None:
        window = self.windows.pop(which % len(self.windows))
        window.state.undo()
        for piece in window.pieces.values():
            self.unmapped(piece)

    def device_access(self, which: int, start: int, length: int) -> None:
        live = self.live()
        piece = live[which % len(live)]
        start %= piece.size
        length = min(length, piece.size - start)
        if piece.direction != FROM or self.write_implies_read:
            expected = bytes(piece.device_view[start : start + length])
            assert self.device.dma_read(piece.addr + start, length) == expected
        else:
            with pytest.raises(FaultError):
                self.device.dma_read(piece.addr + start, length)
        if piece.direction != TO:
            data = self.random.randbytes(length)
            self.device.dma_write(piece.addr + start, data)
            piece.device_view[start : start + length] = data
        else:
            with pytest.raises(FaultError):
                self.device.dma_write(piece.addr + start, bytes([piece.device_view[start] ^ 0xFF]))

    def hand_over(self, which: int) -> None:
        """sync_for_cpu, a CPU write, sync_for_device: both sides agree afterwards."""
        if not self.singles:
            return
        piece = self.singles[which % len(self.singles)]
        if piece.direction != BOTH:
            return
        self.device.sync_single_for_cpu(piece.addr, piece.size, piece.direction)
        self.cpu[piece.at : piece.at + piece.size] = piece.device_view
        assert self.arena.read(piece.at, piece.size) == bytes(piece.device_view)
        self.write_cpu(piece.at, piece.size)
        self.device.sync_single_for_device(piece.addr, piece.size, piece.direction)
        piece.device_view = bytearray(self.cpu[piece.at : piece.at + piece.size])

    def neighbours_are_untouched(self) -> None:
        """CPU bytes that no writable mapping covers are what the CPU wrote."""
        covered = set()
        for piece in self.live():
            if piece.direction != TO:
                covered |= set(range(piece.at // PAGE, (piece.at + piece.size - 1) // PAGE + 1))
        for page in range(PAGES):
            if page not in covered:
                assert self.arena.read(page * PAGE, PAGE) == self.cpu[page * PAGE : (page + 1) * PAGE]

    def finish(self) -> None:
        while self.singles:
            self.unmap_single(0)
        while self.windows:
            self.close_window(0)
        self.machine.settle()
        live = self.machine.live()
        assert (live["iova_ranges"], live["bounce_slots"], live["queued"]) == (0, 0, 0)
        assert self.arena.read() == self.cpu
        self.device.release()


class MappingMachine(RuleBasedStateMachine):
    """Hypothesis drives the truth."""

    @initialize(config=st.sampled_from(CONFIGS), seed=st.integers(0, 1 << 16))
    def start(self, config: tuple[dict[str, Any], dict[str, Any]], seed: int) -> None:
        self.truth = Truth(config, seed)

    @rule(offset=st.integers(0, 4095), size=st.integers(1, 4096), direction=st.sampled_from([TO, FROM, BOTH]))
    def map_single(self, offset: int, size: int, direction: int) -> None:
        self.truth.map_single(1, offset, size, direction)

    @precondition(lambda self: self.truth.singles)
    @rule(which=st.integers(0, 99))
    def unmap_single(self, which: int) -> None:
        self.truth.unmap_single(which)

    @precondition(lambda self: len(self.truth.windows) < 4)
    @rule(pages=st.integers(1, 9), lead=st.sampled_from([0, 0, 0x200, 0xFFF]))
    def open_window(self, pages: int, lead: int) -> None:
        self.truth.open_window(pages, lead)

    @precondition(lambda self: self.truth.windows)
    @rule(
        which=st.integers(0, 9),
        slot=st.integers(0, 9),
        direction=st.sampled_from([TO, FROM, BOTH]),
        tail=st.integers(0, 4000),
    )
    def link(self, which: int, slot: int, direction: int, tail: int) -> None:
        self.truth.link(which, slot, direction, tail)

    @precondition(lambda self: self.truth.windows)
    @rule(which=st.integers(0, 9), piece=st.integers(0, 9))
    def unlink(self, which: int, piece: int) -> None:
        self.truth.unlink(which, piece)

    @precondition(lambda self: self.truth.windows)
    @rule(which=st.integers(0, 9))
    def close_window(self, which: int) -> None:
        self.truth.close_window(which)

    @precondition(lambda self: self.truth.live())
    @rule(which=st.integers(0, 99), start=st.integers(0, 4095), length=st.integers(1, 4096))
    def device_access(self, which: int, start: int, length: int) -> None:
        self.truth.device_access(which, start, length)

    @rule(which=st.integers(0, 99))
    def hand_over(self, which: int) -> None:
        self.truth.hand_over(which)

    @rule(ms=st.integers(1, 30))
    def time_passes(self, ms: int) -> None:
        self.truth.machine.clock.advance(ms * 1_000_000)

    @invariant()
    def neighbours(self) -> None:
        if hasattr(self, "truth"):
            self.truth.neighbours_are_untouched()

    def teardown(self) -> None:
        if hasattr(self, "truth"):
            self.truth.finish()


TestMapping = MappingMachine.TestCase
TestMapping.settings = settings(max_examples=25, stateful_step_count=30)


def drive(truth: Truth, steps: int) -> None:
    """A long random walk over the same steps."""
    rng = truth.random
    for step in range(steps):
        roll = rng.random()
        direction = rng.choice([TO, FROM, BOTH])
        if roll < 0.2:
            truth.map_single(1, rng.randrange(4096), rng.randrange(1, 4097), direction)
        elif roll < 0.35 and truth.singles:
            truth.unmap_single(rng.randrange(99))
        elif roll < 0.4 and len(truth.windows) < 4:
            truth.open_window(rng.randrange(1, 10), rng.choice([0, 0, 0x200, 0xFFF]))
        elif roll < 0.6 and truth.windows:
            truth.link(rng.randrange(9), rng.randrange(9), direction, rng.randrange(4000))
        elif roll < 0.68 and truth.windows:
            truth.unlink(rng.randrange(9), rng.randrange(9))
        elif roll < 0.7 and truth.windows:
            truth.close_window(rng.randrange(9))
        elif roll < 0.9 and truth.live():
            truth.device_access(rng.randrange(99), rng.randrange(4096), rng.randrange(1, 4097))
        elif roll < 0.95:
            truth.hand_over(rng.randrange(99))
        else:
            truth.machine.clock.advance(rng.randrange(1, 30) * 1_000_000)
        if step % 500 == 0:
            truth.neighbours_are_untouched()
    truth.finish()


@pytest.mark.portable
@pytest.mark.parametrize("config", [*HOST_CONFIGS, *CONFIGS[1::5]], ids=str)
def test_a_walk_of_a_few_hundred_steps(config: tuple[dict[str, Any], dict[str, Any]]) -> None:
    drive(Truth(config, 7), 300)


@pytest.mark.long
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_walk_of_100_000_steps(config: tuple[dict[str, Any], dict[str, Any]]) -> None:
    drive(Truth(config, 1), 100_000)
