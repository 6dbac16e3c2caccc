"""The host takes a controller away or says that it failed: idle, with I/O in flight, in a wait; no other notices."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.support.sweep import descriptors
from tests.support.vfio.devices import FakeNvme
from tests.support.vfio.host import FakeHost

from dmakit import soft
from dmakit.cli.main import run
from dmakit.errors import HostError
from dmakit.nvme import recovery
from dmakit.nvme.batch import pointers
from dmakit.nvme.controller import Controller
from dmakit.nvme.function import NvmeFunction
from dmakit.nvme.namespace import Namespace
from dmakit.nvme.registers import ControllerError
from dmakit.nvme.spec import Status
from dmakit.platform.linux.machine import Machine

BDF, OTHER = "0000:00:04.0", "0000:00:05.0"
ERR, REQ = 3, 4
ASKED = f"{BDF}: the host wants the device back (it is being unbound, removed or unplugged)"
FAILED = f"{BDF}: the host reports a fatal error of the device (PCI Express AER)"
STATE = "; CC=0x00460001 CSTS=0x00000001 (ready)"
TEXTS = {REQ: (ASKED + STATE, errno.ENODEV), ERR: (FAILED + STATE, errno.EIO)}
DATA = b"data" * 1024
backends = pytest.mark.parametrize("backend", ["pci", "type1", "iommufd"])
notices = pytest.mark.parametrize("index", [REQ, ERR])


class Plugged:
    """A drive of the software machine, in the words of ``FakeNvme``."""

    def __init__(self, machine: soft.Machine, bdf: str) -> None:
        self.model = NvmeFunction([Namespace(1, 8192)])
        self.function = machine.plug(self.model, bdf)
        self.controller = self.model.controller

    def notify(self, index: int) -> bool:
        return self.function.notify({ERR: "err", REQ: "req"}[index])

    @property
    def master(self) -> bool:
        return self.function.config.masters

    @property
    def eventfds(self) -> bool:
        return any(self.function.notify(kind) for kind in ("err", "req")) or self.function.message()

    @property
    def faults(self) -> list[int]:
        return [self.function.blocked] if self.function.blocked else []


class World:
    """Two drives on one machine (``pci``: the software machine); afterwards nothing of them may be left."""

    def __init__(self, backend: str) -> None:
        self.host: FakeHost | None = None
        self.machine: Any
        self.drive: Any
        self.other: Any
        self.before = descriptors()
        if backend == "pci":
            self.machine = soft.Machine(ram="96M", swiotlb="1M", mode="strict")
            self.drive, self.other = Plugged(self.machine, BDF), Plugged(self.machine, OTHER)
        else:
            self.drive, self.other = FakeNvme(BDF, 4, namespaces=[Namespace(1, 8192)]), FakeNvme(OTHER, 5)
            self.host = FakeHost([self.drive, self.other])
            self.machine = Machine(kernel=self.host, backend=backend, ram="64M")
        self.deleted: list[int] = []
        handlers = self.drive.controller.admin.handlers
        for opcode in (0, 4):  # Delete I/O SQ, CQ
            handlers[opcode] = self._note(opcode, handlers[opcode])

    def _note(self, opcode: int, handler: Callable[[Any], int]) -> Callable[[Any], int]:
        def noted(command: Any) -> int:
            self.deleted.append(opcode)
            return handler(command)

        return noted

    def open(self, bdf: str = BDF, **options: Any) -> Controller:
        return Controller.open(bdf, machine=self.machine, **{"depth": 8, **options})

    def close(self) -> None:
        live = self.machine.live()
        assert live["iova_ranges"] == live.get("mappings", 0) == 0
        self.machine.close()
        if self.host is None:
            assert descriptors() == self.before and not self.machine.ledger.snapshot()["faults"]
        else:
            assert self.host.left() == {"files": 0, "pinned": 0}
        assert self.drive.faults == self.other.faults == []
        assert not self.drive.master and not self.drive.eventfds


@pytest.fixture
def world(backend: str) -> Iterator[World]:
    made = World(backend)
    yield made
    made.close()


def told(caught: pytest.ExceptionInfo[ControllerError], index: int) -> None:
    """The error says what the host said, and how the registers were."""
    assert (str(caught.value), caught.value.errno) == TEXTS[index]
    assert caught.value.registers["CSTS"] == 1


@notices
@pytest.mark.parametrize("interrupts", [True, False])
@backends
def test_an_idle_controller_ends_and_its_neighbour_does_not(world: World, index: int, interrupts: bool) -> None:
    with world.open(OTHER) as other, world.open(interrupts=interrupts) as controller:
        controller.check()
        controller.namespaces[1].write(0, DATA)
        other.namespaces[1].write(8, DATA)
        assert world.drive.notify(index)
        with pytest.raises(ControllerError) as caught:
            controller.check()
        told(caught, index)
        assert not world.drive.master and world.other.master
        assert world.deleted == ([0, 4] if index == REQ else []), "a drive that is well loses its queues in order"
        for call in (lambda: controller.namespaces[1].read(0, 8), controller.check, controller.reset):
            with pytest.raises(ControllerError) as caught:
                call()
            told(caught, index)
        assert other.namespaces[1].read(8, 8) == DATA
        assert controller.driver.recovery.resets == other.driver.recovery.resets == 0
        assert [str(error) for error in controller.driver.recovery.incidents] == [TEXTS[index][0]]
    assert not other.driver.recovery.incidents


@backends
def test_what_is_in_flight_ends_well_when_the_drive_does(world: World) -> None:
    """The drive works on until the queues are deleted; nothing more is given to it."""
    with world.open() as controller:
        driver, drive = controller.driver, world.drive
        wait, drive.model.auto = driver.transport.wait, False

        def works(timeout_ns: int) -> bool:
            drive.controller.run()
            return wait(timeout_ns)

        buffer = controller.buffer(4 * 4096)
        buffer.view[:] = DATA * 4
        requests = [r for at in range(4) for r in driver.requests(1, 8 * at, buffer.pieces(4096 * at, 4096), nsid=1)]
        for request in requests:
            driver.submit(request, nsid=1)
        drive.notify(REQ)
        driver.transport.wait = works  # type: ignore[method-assign]
        driver.recovery.check()
        with pytest.raises(ControllerError):
            driver.submit(requests[0], nsid=1)
        ended = driver.poll()
        assert [(done.status, done.error) for done in ended] == [(0, None)] * 4 and driver.in_flight == 0
        drive.model.auto = True
    assert world.deleted == [0, 4]
    assert world.drive.controller.io.namespaces[1].read(0, 32) == DATA * 4


@notices
@backends
def test_what_does_not_end_gets_the_error_in_bounded_time(
    world: World, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "DRAIN_NS", 50_000_000)
    monkeypatch.setattr("dmakit.nvme.driver.LEAVE_NS", 50_000_000)
    timer = threading.Timer(0.1, world.drive.notify, [index])

    async def main() -> list[Any]:
        async with world.open() as controller:
            world.drive.model.auto = False  # nothing is executed any more, not even Delete I/O SQ
            timer.start()
            disk = controller.namespaces[1]
            return await asyncio.gather(*(disk.write(8 * at, DATA) for at in range(20)), return_exceptions=True)

    started = time.monotonic()
    ended = asyncio.run(main())
    timer.join()
    assert time.monotonic() - started < 10
    assert [(str(error), error.errno) for error in ended] == [TEXTS[index]] * 20


@notices
@backends
def test_a_wait_for_interrupts_ends_at_once(world: World, index: int) -> None:
    with world.open() as controller:
        wait = controller.driver.transport.wait
        while wait(1):
            pass  # what is left of the start
        timer = threading.Timer(0.1, world.drive.notify, [index])
        timer.start()
        started = time.monotonic()
        assert wait(60_000_000_000)
        assert time.monotonic() - started < 30
        timer.join()
        assert not wait(1), "it wakes once"
        with pytest.raises(ControllerError) as caught:
            controller.check()
        told(caught, index)


@notices
@backends
def test_commands_of_a_batch_are_lost_and_then_told(world: World, index: int) -> None:
    with world.open(queues=2, strategy="premap") as controller, controller.buffer(4096) as buffer:
        batch = controller.batch(1)
        world.drive.model.auto = False
        low, high = pointers(array("Q", [buffer.address()]), 4096)
        zero, count, tag, status = (memoryview(array("Q", [n])) for n in (0, 8, 77, 0))
        assert batch.submit("write", zero, count, memoryview(low), memoryview(high), tag) == 1
        world.drive.model.auto = True
        world.drive.notify(index)
        tags = memoryview(array("Q", [0]))
        assert batch.complete(tags, status, wait_ns=1) == 0
        assert batch.complete(tags, status, wait_ns=1) == 1
        assert (tags[0], status[0]) == (77, int(Status.HOST_ABORTED))
        with pytest.raises(ControllerError) as caught:
            batch.complete(tags, status, wait_ns=1)
        told(caught, index)


@notices
@backends
def test_a_controller_that_is_taken_while_it_comes_up(world: World, index: int) -> None:
    """An Identify without an answer ends with the notice, long before its minute is over."""
    execute = world.drive.controller.admin.handlers[6]

    def identify(command: Any) -> int:
        world.drive.notify(index)
        world.drive.controller.run = lambda *_: 0  # type: ignore[method-assign]
        return execute(command)

    world.drive.controller.admin.handlers[6] = identify
    started = time.monotonic()
    with pytest.raises(HostError) as caught:
        world.open()
    assert time.monotonic() - started < 30
    assert TEXTS[index][0].split(";")[0] in str(caught.value)
    assert world.machine.devices == []


@notices
def test_the_command_line_says_it_in_one_sentence(
    index: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        ["perf", "--seconds", "60", "--depth", "4"],
        ["verify", "--yes", "--size", "4M", "--max-io", "32K", "--depth", "4", "--strategy", "two-step"],
    ):
        drive = FakeNvme(BDF, 4, namespaces=[Namespace(1, 8192)])
        fake = FakeHost([drive])
        monkeypatch.setattr("dmakit.platform.linux.machine.Kernel", lambda fake=fake: fake)
        executed: list[int] = []
        trigger = drive.controller.on_interrupt

        def count(vector: int, drive: Any = drive, executed: list[int] = executed, trigger: Any = trigger) -> None:
            executed.append(vector)
            if len(executed) == 40:
                drive.notify(index)
            trigger(vector)

        drive.controller.on_interrupt = count
        assert run(["nvme", *words, "--platform", f"vfio:{BDF}"]) == 2
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dmakit: ")]
        assert told == [f"dmakit: {TEXTS[index][0]}"]
        assert fake.left() == {"files": 0, "pinned": 0}
