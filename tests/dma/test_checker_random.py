"""The contract checker under random correct use: no false alarm, and no alarm when memory or slots run out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmakit.dma.checker import ContractChecker
from dmakit.dma.direction import Direction
from dmakit.errors import ExhaustedError
from dmakit.platform.soft import Machine
from tests.support.sweep import sweep

PAGE = 4096
BIDI, TO, FROM = Direction.BIDIRECTIONAL, Direction.TO_DEVICE, Direction.FROM_DEVICE
MACHINES: tuple[dict[str, Any], ...] = (
    {},
    {"mode": "strict"},
    {"iommu": "none"},
    {"iommu": "x86", "mode": "strict"},
    {"coherent": False},
    {"caching_mode": True},
)


class Driver:
    """A driver that keeps the contract whatever the dice say."""

    def __init__(self, machine: Machine, device: Any) -> None:
        self.machine, self.device = machine, device
        blocks = [machine.pages.alloc(1) for _ in range(24)]
        self.pages = [block + PAGE * (n % 2) for n, block in enumerate(blocks)]
        self.maps: list[tuple[int, int, Direction]] = []
        self.lists: list[Any] = []

    def single(self, draw: Any) -> None:
        offset, direction = draw(st.integers(0, PAGE - 1)), draw(st.sampled_from((BIDI, TO, FROM)))
        size = draw(st.integers(1, PAGE - offset))
        # pages are used once at a time: no two mappings share a cache line
        page = self.pages.pop()
        addr = self.device.map_phys(page + offset, size, direction)
        self.device.sync_single_for_cpu(addr, size, direction)
        if direction != TO:
            self.device.dma_write(addr, bytes(size))
        if direction != FROM:
            self.device.dma_read(addr, size)
        if draw(st.booleans()):
            self.device.unmap_phys(addr, size, direction)
            self.pages.append(page)
        else:
            self.maps.append((addr, size, direction))

    def scatter(self, draw: Any) -> None:
        count = draw(st.integers(1, 6))
        pages = [self.pages.pop() for _ in range(min(count, len(self.pages)))]
        sg = self.device.map_sg([(page, PAGE) for page in pages], draw(st.sampled_from((BIDI, TO, FROM))))
        self.device.sync_sg_for_cpu(sg)
        self.lists.append(sg)

    def shared(self, draw: Any) -> None:
        size = draw(st.integers(1, 3 * PAGE))
        with self.device.alloc_coherent(size) as memory:
            self.device.dma_write(memory.addr, bytes(size))
        with self.device.alloc_noncontiguous(size, FROM) as memory:
            self.device.dma_write(memory.addr, bytes(size))
            memory.sync_for_cpu()

    def window(self, draw: Any) -> None:
        """Pieces on granules with a ragged first and last one, unlinked here and there, linked again, torn down."""
        count, direction = draw(st.integers(1, 6)), draw(st.sampled_from((BIDI, TO, FROM)))
        first, last = draw(st.integers(0, PAGE - 1)), draw(st.integers(1, PAGE))
        if count == 1 and last <= first:
            last = PAGE
        size = (count - 1) * PAGE + last - first
        pages = self.pages[:count]
        state = self.device.try_alloc(pages[0] + first, size)
        if not state:
            return
        pieces = []
        for n, page in enumerate(pages[:count]):
            start = first if n == 0 else 0
            end = last if n == count - 1 else PAGE
            pieces.append((page + start, n * PAGE + start - first, end - start))
        for phys, offset, length in draw(st.permutations(pieces)):
            state.link(phys, offset, length, direction)
        state.sync()
        self.use(state, direction)
        for phys, offset, length in draw(st.lists(st.sampled_from(pieces), max_size=2, unique=True)):
            state.unlink(offset, length, direction)
            state.link(phys, offset, length, direction)
            state.sync(offset, length)
        self.use(state, direction)
        if draw(st.booleans()):
            state.destroy(size, direction)
            return
        for _, offset, length in pieces:
            state.unlink(offset, length, direction)
        state.free()

    def use(self, state: Any, direction: Direction) -> None:
        if direction != TO:
            self.device.dma_write(state.addr, bytes(state.size))
        if direction != FROM:
            self.device.dma_read(state.addr, state.size)

    def finish(self) -> None:
        for addr, size, direction in self.maps:
            self.device.unmap_phys(addr, size, direction)
        for sg in self.lists:
            self.device.unmap_sg(sg)
        self.device.release()


def run(examples: int, steps: int) -> None:
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def correct_use(data: Any) -> None:
        checker = ContractChecker("raise")
        options = data.draw(st.sampled_from(MACHINES))
        machine = Machine(ram="64M", swiotlb="1M", checker=checker, **options)
        trusted = data.draw(st.booleans())
        device = machine.device("dev", trusted=trusted, min_align_mask=PAGE - 1)
        driver = Driver(machine, device)
        for _ in range(data.draw(st.integers(1, steps))):
            if len(driver.pages) < 8:
                break
            data.draw(st.sampled_from((driver.single, driver.scatter, driver.shared, driver.window)))(data.draw)
            machine.clock.advance(data.draw(st.sampled_from((0, 20_000_000))))
        driver.finish()
        assert checker.reports == []
        assert machine.swiotlb is not None and machine.swiotlb.used == 0

    correct_use()


def test_correct_use_never_alarms() -> None:
    run(60, 8)


@pytest.mark.long
def test_correct_use_never_alarms_long() -> None:
    run(3000, 25)


@pytest.mark.parametrize("trusted", [True, False])
def test_running_out_is_not_a_breach(trusted: bool) -> None:
    """Fail-nth over a window of three links and its teardown: ExhaustedError only, nothing reported, nothing left."""

    class World:
        def __init__(self) -> None:
            self.checker = ContractChecker("raise")
            self.machine = Machine(ram="64M", swiotlb="1M", mode="strict", checker=self.checker)
            self.device = self.machine.device("dev", trusted=trusted, min_align_mask=PAGE - 1)
            self.pages = [self.machine.pages.alloc() for _ in range(5)][::2]
            self.live = self.machine.live()

    def operation(world: World) -> None:
        state = world.device.try_alloc(world.pages[0] + 0x300, 3 * PAGE - 0x600)
        if not state:
            raise ExhaustedError("no window")
        with state:
            state.link(world.pages[0] + 0x300, 0, PAGE - 0x300, FROM)
            state.link(world.pages[1], PAGE - 0x300, PAGE, FROM)
            state.link(world.pages[2], 2 * PAGE - 0x300, PAGE - 0x300, FROM)
            state.sync()

    def check(world: World, failed: bool) -> None:
        assert world.checker.reports == []
        world.device.release()
        live = world.machine.live()
        assert {**live, "table_pages": 0} == {**world.live, "table_pages": 0}

    assert sweep(World, lambda world: world.machine.fail, operation, check) >= 4
