"""The bounce pool against an obvious model: used slots as a set, candidates tried one after the other.

The model knows nothing of free-run counts, strides or backward repairs. It recomputes from the set of used slots
which slot the search must answer, and from plain byte strings what buffers and slots must hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from dmakit import consts
from dmakit.errors import ExhaustedError
from dmakit.ledger import Ledger
from dmakit.memory.physical import PhysicalMemory
from dmakit.swiotlb.bounce import Swiotlb

SLOT, SEGMENT, SEGMENT_BYTES = 2048, 128, 262144
START, RAM = 0x3F000, 0x400000  # the pool starts on a page, not on a rounder number
AREAS, AREA_SLOTS = 2, 2 * SEGMENT
MASKS = st.sampled_from([0, 0, 511, 2047, 4095, 8191])
SIZES = st.one_of(st.integers(1, 9000), st.integers(1, SEGMENT_BYTES + 10), st.just(SEGMENT_BYTES))


@dataclass
class Live:
    """A mapping as the model knows it."""

    phys: int
    size: int
    tlb: int
    slots: range
    device: bytearray  # what the device sees in the slots


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.memory = PhysicalMemory(16 << 20)
        self.memory.add_region(0, 16 << 20)
        self.pool = Swiotlb(self.memory, START, AREAS * AREA_SLOTS * SLOT, areas=AREAS, ledger=Ledger())
        self.used: set[int] = set()
        self.index = [0] * AREAS
        self.live: list[Live] = []
        self.high = 0

    def usable(self, slot: int, phys: int, need: int, align: int, min_align: int, boundary: int) -> bool | None:
        """True: fits here; False: look further; None: wrong alignment."""
        at = START + slot * SLOT
        keep = min_align & ~align & ~(SLOT - 1) if phys else 0
        judged = (START & boundary) + slot * SLOT  # Linux judges alignment on the pool's start inside the boundary
        if judged & align or judged & keep != phys & keep:
            return None
        if slot // SEGMENT != (slot + need - 1) // SEGMENT:
            return False
        if at // (boundary + 1) != (at + need * SLOT - 1) // (boundary + 1):
            return False
        return not any(one in self.used for one in range(slot, slot + need))

    def expected(self, phys: int, total: int, align: int, min_align: int, boundary: int, cpu: int) -> int | None:
        """The slot that the search must answer, with its area's index moved on; None when there is none."""
        need = -(-total // SLOT)
        if total > SEGMENT_BYTES:
            return None
        if not align and not min_align and total >= 4096:
            align = 4095
        stride = max(1, (max(align, min_align & ~align) + 1) // SLOT)
        for turn in range(AREAS):
            area = (cpu + turn) % AREAS
            index, tried = self.index[area], 0
            while tried < AREA_SLOTS and AREA_SLOTS - self.taken(area) >= need:
                fits = self.usable(area * AREA_SLOTS + index, phys, need, align, min_align, boundary)
                if fits:
                    after = index + need
                    self.index[area] = after if after < AREA_SLOTS else 0
                    return area * AREA_SLOTS + index
                step = 1 if fits is None else stride
                tried, index = tried + step, index + step
                if index >= AREA_SLOTS:
                    index = 0
        return None

    def taken(self, area: int) -> int:
        return sum(1 for slot in self.used if slot // AREA_SLOTS == area)

    @rule(
        phys=st.one_of(st.integers(0, 0x3000), st.just(0)),
        size=SIZES,
        align=MASKS,
        min_align=MASKS,
        boundary=st.sampled_from([(1 << 32) - 1, (1 << 64) - 1, 65535, 4095]),
        cpu=st.integers(0, 3),
        seed=st.integers(0, 255),
    )
    def map(self, phys: int, size: int, align: int, min_align: int, boundary: int, cpu: int, seed: int) -> None:
        phys += RAM
        self.memory.write(phys, bytes((seed + i) & 255 for i in range(min(size, 300))))
        offset = phys & min_align & (align | (SLOT - 1))
        total = (size + offset + align) & ~align
        slot = self.expected(phys, total, align, min_align, boundary, cpu)
        try:
            tlb = self.pool.map(
                phys, size, alloc_align_mask=align, min_align_mask=min_align, boundary=boundary, cpu=cpu
            )
        except ExhaustedError:
            assert slot is None
            return
        assert slot is not None and tlb == START + slot * SLOT + offset
        slots = range(slot, slot + -(-total // SLOT))
        assert not self.used & set(slots)
        self.used |= set(slots)
        self.high = max(self.high, len(self.used))
        self.live.append(Live(phys, size, tlb, slots, bytearray(self.memory.read(phys, size))))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), at=st.integers(0, 9000), seed=st.integers(0, 255))
    def device_writes(self, which: int, at: int, seed: int) -> None:
        one = self.live[which % len(self.live)]
        at %= one.size
        text = bytes((seed ^ i) & 255 for i in range(min(40, one.size - at)))
        self.memory.write(one.tlb + at, text)
        one.device[at : at + len(text)] = text

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), at=st.integers(0, 9000), size=st.integers(1, 5000), to_device=st.booleans())
    def sync(self, which: int, at: int, size: int, to_device: bool) -> None:
        one = self.live[which % len(self.live)]
        at %= one.size
        size = min(size, one.size - at)
        if to_device:
            one.device[at : at + size] = self.memory.read(one.phys + at, size)
            self.pool.sync_for_device(one.tlb + at, size, consts.DMA_BIDIRECTIONAL)
        else:
            self.pool.sync_for_cpu(one.tlb + at, size, consts.DMA_BIDIRECTIONAL)
            assert self.memory.read(one.phys + at, size) == bytes(one.device[at : at + size])

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), direction=st.integers(0, 2), attrs=st.sampled_from([0, consts.ATTR_SKIP_CPU_SYNC]))
    def unmap(self, which: int, direction: int, attrs: int) -> None:
        one = self.live.pop(which % len(self.live))
        before = self.memory.read(one.phys, one.size)
        self.pool.unmap(one.tlb, one.size, direction, attrs)
        back = direction != consts.DMA_TO_DEVICE and not attrs
        assert self.memory.read(one.phys, one.size) == (bytes(one.device) if back else before)
        self.used -= set(one.slots)

    @invariant()
    def slots_agree(self) -> None:
        inner = self.pool.pools[0]
        run = 0
        for slot in reversed(range(AREAS * AREA_SLOTS)):
            run = 0 if slot in self.used else 1 if slot % SEGMENT == SEGMENT - 1 else run + 1
            assert inner.free_run[slot] == run
        assert [inner.area_used[area] for area in range(AREAS)] == [self.taken(area) for area in range(AREAS)]
        assert (self.pool.used, self.pool.high_water) == (len(self.used), self.high)
        assert len(inner.allocations()) == len(self.live)

    @invariant()
    def device_bytes_agree(self) -> None:
        for one in self.live:
            assert self.memory.read(one.tlb, one.size) == bytes(one.device)


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        PoolMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_pool_agrees_with_the_model() -> None:
    run(40, 50)


@pytest.mark.long
def test_pool_agrees_with_the_model_long() -> None:
    run(1000, 100)
