"""Every call that the host can refuse on the way through ``Controller.open``, I/O, a reset and the end refuses once.

Whatever step it hits: the caller gets an error or his data, and descriptors, pinned bytes and IOVAs are back where they
were. What the host refuses to unmap goes with the device's address space; memory in staging stays pinned with its
machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from tests.support.sweep import descriptors, no_collection, sweep
from tests.support.vfio.devices import FakeNvme
from tests.support.vfio.host import FakeHost

from dmakit.failpoint import FailPoint
from dmakit.nvme.controller import Controller
from dmakit.nvme.namespace import Namespace
from dmakit.platform.linux.machine import Machine

BDF = "0000:00:04.0"
BACKENDS = ("type1", "iommufd", "unstaged")
DATA = random.Random(5).randbytes(12 << 10)


@pytest.fixture(autouse=True)
def no_collection_in_between() -> Iterator[None]:
    with no_collection():
        yield


class World:
    """A host with a drive, and what this process had open at first."""

    def __init__(self, backend: str, strategy: str) -> None:
        self.backend, self.strategy = backend, strategy
        self.space = Namespace(1, 256)
        self.host = FakeHost([FakeNvme(BDF, 4, namespaces=[self.space])])
        self.start = descriptors()
        self.machine: Machine | None = None
        self.told: list[bytes] = []

    def take(self) -> None:
        """A machine on the host."""
        backend = "type1" if self.backend == "type1" else "iommufd"
        self.machine = Machine(kernel=self.host, backend=backend, ram="8M", staging=self.backend != "unstaged")

    def open(self) -> Controller:
        """The controller on the machine."""
        return Controller.open(BDF, machine=self.machine, strategy=self.strategy, queues=2, depth=4)

    @property
    def fail(self) -> FailPoint:
        """What the host asks before it does anything."""
        return self.host.fail

    def check(self, failed: bool) -> None:
        """Nothing is left; data that were read are right, and a read that was not told as failed was made."""
        assert all(data == DATA for data in self.told) and (failed or self.told)
        device = self.host.devices[BDF]
        assert not device.master and device.faults == []
        if self.machine is not None:
            live = self.machine.live()
            assert self.machine.vfio_devices == [] and live["mappings"] == live["iova_ranges"] == 0
            assert live["pinned_bytes"] == self.host.account.bytes
            self.machine.close()
            assert self.machine.live()["pinned_bytes"] == 0
        assert self.host.left() == {"files": 0, "pinned": 0}
        assert descriptors() == self.start


def write_and_read(world: World) -> None:
    """Open, identify, write, read, compare by every kind of memory, close."""
    if world.machine is None:
        world.take()
    with world.open() as controller:
        disk = controller.namespaces[1]
        disk.write(1, DATA)
        world.told.append(bytes(disk.read(1, len(DATA) // 512)))
        with controller.buffer(len(DATA)) as buffer:
            disk.read_into(1, buffer)
            world.told.append(bytes(buffer.view))
        disk.flush()


def reset_in_between(world: World) -> None:
    """Open, write, reset the controller, read, close."""
    with world.open() as controller:
        disk = controller.namespaces[1]
        disk.write(1, DATA)
        controller.reset()
        world.told.append(bytes(disk.read(1, len(DATA) // 512)))


@pytest.mark.parametrize("strategy", ["premap", "two-step", "sg"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_open_identify_io_and_close(backend: str, strategy: str) -> None:
    uses = sweep(lambda: World(backend, strategy), lambda world: world.fail, write_and_read, World.check)
    assert uses > 40


@pytest.mark.parametrize("operation", [write_and_read, reset_in_between])
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_machine_that_stays(backend: str, operation: Callable[[World], None]) -> None:
    def make() -> World:
        world = World(backend, "premap")
        world.take()
        return world

    assert sweep(make, lambda world: world.fail, operation, World.check) > 30
