"""Every call that the host can refuse refuses once: descriptors, pins and IOVAs are back where they were."""

from __future__ import annotations

import ast
import mmap
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmakit.errors import DmakitError
from dmakit.failpoint import FailPoint
from dmakit.platform import linux
from dmakit.platform.linux.machine import Machine
from dmakit.platform.linux.uapi import IOCTLS
from tests.linux.worlds import BACKENDS, BOTH, EDU, NVME, PAGE, host
from tests.support.sweep import descriptors, no_collection, sweep
from tests.support.vfio.devices import FakeDevice, FakeRegion
from tests.support.vfio.host import FakeHost

PEER = "0000:00:07.0"


@pytest.fixture(autouse=True)
def no_collection_in_between() -> Iterator[None]:
    with no_collection():
        yield


class World:
    """A host, what it had open at first, and a machine where the operation wants one."""

    def __init__(self, backend: str, *, opened: bool, dirty: bool = False) -> None:
        self.backend = backend
        self.host = host(dirty=dirty)
        self.host.devices[PEER] = FakeDevice(PEER, 7)
        self.host.devices[PEER].regions[2] = FakeRegion(4 * PAGE, mapped=True)
        self.start = descriptors()
        self.machine: Machine | None = None
        self.device: Any = None
        if opened:
            self.open()

    def open(self) -> None:
        backend = "type1" if self.backend == "type1" else "iommufd"
        self.machine = Machine(kernel=self.host, backend=backend, ram="4M", staging=self.backend != "unstaged")
        self.device = self.machine.open(EDU, mask=(1 << 28) - 1)

    def fail(self) -> FailPoint:
        return self.host.fail

    def nothing_left(self) -> None:
        self.device = None
        if self.machine is not None:
            self.machine.close()
            live = self.machine.live()
            assert live["mappings"] == live["iova_ranges"] == live["pinned_bytes"] == 0
        assert self.host.left() == {"files": 0, "pinned": 0}
        assert descriptors() == self.start

    def nothing_mapped(self) -> None:
        assert self.machine is not None
        live = self.machine.live()
        assert live["mappings"] == live["iova_ranges"] == 0, live
        assert self.machine.pins.pinned == self.host.account.bytes


def bring_up(world: World) -> None:
    world.open()
    assert world.machine is not None
    world.machine.open(NVME).bar(0)
    world.device.interrupts(2)
    world.device.set_bus_master(True)
    world.device.bar(0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dirty", (False, True))
def test_bringing_a_machine_up(backend: str, dirty: bool) -> None:
    uses = sweep(
        lambda: World(backend, opened=False, dirty=dirty),
        World.fail,
        bring_up,
        lambda world, failed: world.nothing_left(),
    )
    assert uses > 20


def streaming(world: World) -> None:
    assert world.machine is not None
    buffer = world.machine.buffer(PAGE)
    try:
        addr = world.device.dma.map_phys(*buffer.ranges[0], BOTH)
        world.device.dma.unmap_phys(addr, PAGE, BOTH)
    finally:
        buffer.release()


def two_step(world: World) -> None:
    assert world.machine is not None
    buffer = world.machine.buffer(3 * PAGE)
    try:
        state = world.device.dma.try_alloc(0, 3 * PAGE)
        if not state:
            raise DmakitErrorAsIova
        with state:
            for i in (2, 0, 1):
                state.link(buffer.slices(i * PAGE, PAGE)[0][0], i * PAGE, PAGE, BOTH)
            state.sync()
    finally:
        buffer.release()


def scatter(world: World) -> None:
    assert world.machine is not None
    buffers = [world.machine.buffer(PAGE) for _ in range(3)]
    try:
        world.device.dma.unmap_sg(world.device.dma.map_sg([b.ranges[0] for b in reversed(buffers)], BOTH))
    finally:
        for buffer in buffers:
            buffer.release()


def coherent(world: World) -> None:
    world.device.dma.alloc_coherent(3 * PAGE).free()


def registered(world: World) -> None:
    assert world.machine is not None
    for memory in (mmap.mmap(-1, PAGE), np.zeros(PAGE, np.uint8)):
        with world.machine.register(memory) as buffer:
            phys, size = buffer.ranges[0]
            world.device.dma.unmap_phys(world.device.dma.map_phys(phys, size, BOTH), size, BOTH)


def peer(world: World) -> None:
    assert world.machine is not None
    with world.machine.open(PEER) as other:
        bar = other.bar(2)
        addr = world.device.dma.map_resource(bar.phys, PAGE, BOTH)
        world.device.dma.unmap_resource(addr, PAGE, BOTH)


def dirty_pages(world: World) -> None:
    assert world.machine is not None
    buffer, domain = world.machine.buffer(PAGE), world.device.space.domain
    try:
        addr = world.device.dma.map_phys(*buffer.ranges[0], BOTH)
        try:
            domain.set_dirty_tracking(True)
            try:
                domain.read_and_clear_dirty(addr, PAGE, np.zeros(1, np.uint64))
            finally:
                domain.set_dirty_tracking(False)
        finally:
            world.device.dma.unmap_phys(addr, PAGE, BOTH)
    finally:
        buffer.release()


class DmakitErrorAsIova(DmakitError):
    """try_alloc answers a failed allocation with a falsy state."""

    def __init__(self) -> None:
        super().__init__("no IOVA")


OPERATIONS = (streaming, two_step, scatter, coherent, registered, peer, dirty_pages)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_mapping_operations(backend: str, operation: Any) -> None:
    def run(world: World) -> None:
        operation(world)
        assert world.machine is not None
        if world.machine.live()["mappings"]:
            raise DmakitErrorAsIova  # an unmap was refused: the mapping stays until the machine is closed

    def check(world: World, failed: bool) -> None:
        assert world.machine is not None
        if failed and not world.machine.live()["mappings"]:
            world.nothing_mapped()
        world.nothing_left()

    assert sweep(lambda: World(backend, opened=True, dirty=operation is dirty_pages), World.fail, run, check) >= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_closing(backend: str) -> None:
    """Whatever the host refuses on the way out, everything goes."""

    def opened() -> World:
        world = World(backend, opened=False, dirty=True)
        bring_up(world)
        streaming(world)
        return world

    def close(world: World) -> None:
        assert world.machine is not None
        world.machine.close()

    assert sweep(opened, World.fail, close, lambda world, failed: world.nothing_left()) >= 3


def used_by_the_source() -> set[str]:
    """The ioctls that some module of the platform names in a call."""
    found = set()
    for path in Path(linux.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                found |= {word.value for word in node.args if isinstance(word, ast.Constant) and word.value in IOCTLS}
    return found


def test_the_sweeps_refuse_every_ioctl_once() -> None:
    """A sweep refuses each call that its operation makes; here they run without one, and are watched."""
    swept: set[str] = set()
    for backend, operation in product(BACKENDS, (bring_up, *OPERATIONS)):
        for dirty in (False, True) if operation is bring_up else (operation is dirty_pages,):
            world = World(backend, opened=operation is not bring_up, dirty=dirty)
            world.host.calls.clear()
            operation(world)
            swept |= set(world.host.calls)
            world.nothing_left()
    assert swept == used_by_the_source()


def test_interrupted_hosts_can_be_used_again() -> None:
    fake: FakeHost = host()
    for nth in range(12):
        fake.fail.arm(nth)
        try:
            with Machine(kernel=fake, backend="iommufd", ram="4M") as made, made.open(EDU):
                pass
        except DmakitError:
            pass
        fake.fail.disarm()
        with Machine(kernel=fake, backend="iommufd", ram="4M") as made, made.open(EDU) as device:
            assert device.bar(0).read32(0) == 0x010000ED
        assert fake.left() == {"files": 0, "pinned": 0}
