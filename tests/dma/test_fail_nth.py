"""Every public operation with its n-th fallible use failing: nothing leaks, nothing is damaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dmakit.dma.device import Device
from dmakit.dma.direction import Attrs, Direction
from dmakit.memory.buffers import Buffer
from dmakit.platform.soft import Machine
from tests.dma.world import PAGE, pattern
from tests.support.sweep import sweep

TO, FROM, BOTH = Direction.TO_DEVICE, Direction.FROM_DEVICE, Direction.BIDIRECTIONAL
SIZE = 12 * PAGE


class World:
    """A machine with one neighbour mapping that must survive everything."""

    def __init__(self, machine: dict[str, Any], device: dict[str, Any]) -> None:
        self.machine = Machine(**{"ram": "64M", "swiotlb": "1M", "fragmentation": 1.0, **machine})
        self.device: Device = self.machine.device("dev0", **device)
        self.memory: Buffer = self.machine.buffer(SIZE, offset=0x100)
        self.neighbour = self.machine.buffer(PAGE)
        self.neighbour.fill(0x3C)
        self.addr = self.device.map_phys(self.neighbour.ranges[0][0], PAGE, BOTH)
        self.memory.write(0, pattern(SIZE))
        self.before = self.state()

    def state(self) -> dict[str, int]:
        self.machine.settle()
        live = self.machine.live()
        live.pop("table_pages")  # a table stays until its whole range is unmapped
        return {**live, "pages": self.machine.pages.allocated_pages}

    def check(self, failed: bool) -> None:
        assert self.state() == self.before
        tables = self.machine.tables
        if tables is not None:
            assert tables.in_use == self.device.domain.table.table_pages == self.machine.table_pages.allocated_pages
        assert self.device.dma_read(self.addr, PAGE) == b"\x3c" * PAGE
        assert self.neighbour.read() == b"\x3c" * PAGE


def two_step(world: World) -> None:
    state = world.device.try_alloc(world.memory.ranges[0][0], SIZE)
    if not state:
        return
    with state:
        offset = 0
        for phys, size in world.memory.ranges:
            state.link(phys, offset, size, TO)
            offset += size
        state.sync()
        assert world.device.dma_read(state.addr, SIZE) == pattern(SIZE)
        state.unlink(0, world.memory.ranges[0][1], TO)
        state.link(*(world.memory.ranges[0][0], 0, world.memory.ranges[0][1]), TO)


def two_step_large(world: World) -> None:
    block = world.machine.buffer(2 << 20, order=9)
    try:
        with world.device.try_alloc(0, 4 << 20) as state:
            if state:
                state.link(block.ranges[0][0], 2 << 20, 2 << 20, BOTH)
                state.sync(2 << 20, 2 << 20)
    finally:
        block.release()


def classic_with_a_new_table(world: World) -> None:
    """2 MiB off by a page: 512 small leaves in a table that does not exist yet."""
    if not world.device.translating:
        return
    block = world.machine.buffer(4 << 20, order=10)
    try:
        addr = world.device.map_phys(block.ranges[0][0] + PAGE, 2 << 20, BOTH)
        world.device.unmap_phys(addr, 2 << 20, BOTH)
        sg = world.device.map_sg([(block.ranges[0][0] + PAGE, 1 << 20), (block.ranges[0][0], 1 << 20)], BOTH)
        world.device.unmap_sg(sg)
    finally:
        block.release()


def ranges(world: World) -> None:
    with world.device.map_ranges(world.memory.ranges, TO) as mapping:
        read = b"".join(world.device.dma_read(addr, size) for addr, size in mapping.segments)
        assert read == pattern(SIZE)


def classic(world: World) -> None:
    live = []
    try:
        for phys, size in world.memory.ranges:
            live.append((world.device.map_phys(phys, size, FROM), size))
    finally:
        for addr, size in live:
            world.device.dma_write(addr, b"\x01" * size)
            world.device.unmap_phys(addr, size, FROM)


def scatter(world: World) -> None:
    sg = world.device.map_sg(world.memory.ranges, BOTH)
    assert b"".join(world.device.dma_read(a, n) for a, n in sg.segments) == pattern(SIZE)
    world.device.sync_sg_for_cpu(sg)
    world.device.unmap_sg(sg)


def shared(world: World) -> None:
    with world.device.alloc_coherent(5 * PAGE) as memory, world.device.alloc_noncontiguous(3 * PAGE, TO) as other:
        memory.write(0, b"x")
        assert world.device.dma_read(memory.addr, 1) == b"x"
        other.sync_for_device()


def resource(world: World) -> None:
    bar = world.machine.memory.regions[-1]
    addr = world.device.map_resource(bar.start, PAGE, BOTH, Attrs.NO_WARN)
    world.device.unmap_resource(addr, PAGE, BOTH, Attrs.NO_WARN)


OPERATIONS: list[Callable[[World], None]] = [
    two_step,
    two_step_large,
    classic,
    classic_with_a_new_table,
    scatter,
    ranges,
    shared,
]
MACHINES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"mode": "strict"}, {}),
    ({"mode": "lazy"}, {}),
    ({"mode": "lazy", "iommu": "x86"}, {}),
    ({"caching_mode": True}, {}),
    ({"mode": "strict"}, {"trusted": False, "min_align_mask": PAGE - 1}),
    ({"mode": "strict", "coherent": False}, {}),
    ({"iommu": "none", "force_bounce": True}, {}),
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", MACHINES, ids=str)
def test_nothing_leaks(operation: Callable[[World], None], options: tuple[dict[str, Any], dict[str, Any]]) -> None:
    uses = sweep(
        lambda: World(*options),
        lambda world: world.machine.fail,
        operation,
        lambda world, failed: world.check(failed),
    )
    if options[0].get("iommu") != "none":
        assert uses >= 1


def test_a_map_resource_that_fails_leaves_nothing() -> None:
    def make() -> World:
        world = World({"mode": "strict"}, {})
        world.machine.add_bar("64K")
        return world

    assert sweep(make, lambda w: w.machine.fail, resource, lambda w, failed: w.check(failed)) >= 1


def test_making_a_device_that_fails_leaves_nothing() -> None:
    def make() -> Machine:
        return Machine(ram="64M", mode="lazy", swiotlb="1M")

    def check(machine: Machine, failed: bool) -> None:
        assert len(machine.devices) == (0 if failed else 1)
        assert machine.tables is not None
        assert machine.tables.in_use == (0 if failed else 1)
        if not failed:  # without memory for a flush queue the domain is strict
            assert (machine.devices[0].flush_queue is None) == machine.fail.fired

    assert sweep(make, lambda m: m.fail, lambda m: m.device("d"), check) >= 2
