"""The platforms that the driver's contract tests run on, without a line of difference: what ``Controller.open`` takes.

``soft``: the software machine. ``pci``: the same controller model as a PCI function of it, reached as a real one is.
``type1``, ``iommufd``: the model behind a fake VFIO device, whose registers, mappings and interrupts go through the
code that talks to a real kernel; in the test VM QEMU's drive behind that kernel, where what only a model can do (bad
blocks, faults, counters) is gated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tests.support.gates import gate
from tests.support.platforms import IN_GUEST
from tests.support.sweep import descriptors
from tests.support.vfio.devices import FakeNvme
from tests.support.vfio.host import FakeHost

from dmakit.nvme.controller import Controller
from dmakit.nvme.function import NvmeFunction
from dmakit.nvme.model import ControllerModel
from dmakit.nvme.namespace import Namespace
from dmakit.nvme.software import SoftHost
from dmakit.platform.linux.machine import Machine as LinuxMachine
from dmakit.platform.soft import Machine as SoftMachine

__all__ = ["PLATFORMS", "World", "world"]
PLATFORMS = ("soft", "pci", "type1", "iommufd")
BDF = "0000:00:04.0"
BLOCKS = 8192


class World:
    """One platform with one controller; ``open`` it, as often as wanted, look at its ``space``."""

    def __init__(self, platform: str, build: Callable[..., ControllerModel] = ControllerModel, **model: Any) -> None:
        self.platform = platform
        self.space = Namespace(1, BLOCKS)
        self.build, self.model_options = build, model
        self.soft: SoftMachine | None = None
        self.fake: FakeHost | None = None
        if platform in ("soft", "pci"):
            self.soft = SoftMachine(ram="96M", swiotlb="1M", mode="strict")
            self.machine: Any = self.soft
            if platform == "pci":
                self.soft.plug(NvmeFunction([self.space], build=build, **model), BDF)
        else:
            self.fake = FakeHost([FakeNvme(BDF, 4, namespaces=[self.space], build=build, **model)])
            self.machine = LinuxMachine(ram="64M", kernel=self.fake, backend=platform)

    def open(self, **options: Any) -> Controller:
        """Bring the controller up."""
        if self.platform != "soft":
            return Controller.open(BDF, machine=self.machine, **options)
        return Controller.open(
            "soft", machine=self.soft, namespaces=[self.space], build=self.build, **self.model_options, **options
        )

    @property
    def blocks(self) -> int:
        """Blocks of the namespace."""
        return BLOCKS

    @staticmethod
    def model(controller: Controller) -> ControllerModel:
        """The model behind an open controller."""
        host: Any = controller.host
        if isinstance(host, SoftHost):
            return host.model
        if isinstance(host.machine, SoftMachine):
            return host.device.function.model.controller
        found: ControllerModel = host.machine.kernel.devices[BDF].controller
        return found

    def masters_the_bus(self, model: ControllerModel) -> bool:
        """Whether the controller can reach memory at all."""
        if self.fake is not None:
            return bool(self.fake.devices[BDF].master)
        assert self.soft is not None
        return self.soft.functions[BDF].config.masters if self.soft.functions else model.port.enabled

    def abandon(self) -> None:
        """The test has failed, or was gated: whatever is left goes."""
        self.machine.close()

    def check_nothing_left(self) -> None:
        """Every mapping, pin, file and page is back; the device touched nothing that was not its own."""
        live = self.machine.live()
        assert live["iova_ranges"] == live["bounce_slots"] == live["queued"] == 0
        if self.soft is not None:
            assert self.soft.ledger.snapshot()["faults"] == 0
            return
        assert self.fake is not None
        assert live["mappings"] == 0
        self.machine.close()
        assert self.fake.left() == {"files": 0, "pinned": 0}
        assert self.fake.devices[BDF].faults == []


@contextmanager
def world(platform: str, **options: Any) -> Iterator[World]:
    """A platform; afterwards nothing may be left."""
    made = (
        GuestWorld(platform, **options) if IN_GUEST and platform in ("type1", "iommufd") else World(platform, **options)
    )
    try:
        yield made
    except BaseException:
        made.abandon()
        raise
    made.check_nothing_left()


class _Medium:
    """What the real drive holds, read and written through the controller that is open."""

    def __init__(self, world: GuestWorld) -> None:
        self.world = world

    def read(self, lba: int, blocks: int) -> bytes:
        """Through bytes of the driver's own, not through the caller's buffers."""
        return bytes(self.world.current.namespaces[1].read(lba, blocks))

    def write(self, lba: int, data: bytes) -> None:
        """The same way."""
        self.world.current.namespaces[1].write(lba, data)

    @property
    def bad_blocks(self) -> set[int]:
        gate("bad blocks: QEMU's drive has none")


class GuestWorld(World):
    """QEMU's drive on the test VM's kernel, bound to VFIO while the world lasts."""

    def __init__(self, platform: str, **model: Any) -> None:
        from tests.vm.guest import vfio_support as guest

        if platform not in guest.BACKENDS:
            gate(f"{platform}: this kernel has none")
        if model:
            gate(f"{', '.join(model)}: QEMU's drive is what it is")
        self.platform, self.guest, self.undo = platform, guest, ExitStack()
        self.undo.enter_context(guest.bound(guest.NVME))
        self.before = descriptors(), guest.pinned()
        self.machine: Any = LinuxMachine(ram="64M", backend=platform)
        self.space: Any = _Medium(self)
        self.current: Any = None

    def open(self, **options: Any) -> Controller:
        first, self.current = self.current is None, Controller.open(self.guest.NVME, machine=self.machine, **options)
        if first:
            self.current.namespaces[1].write_zeroes(0, BLOCKS)
        made: Controller = self.current
        return made

    @property
    def blocks(self) -> int:
        return int(self.current.namespaces[1].blocks)

    @staticmethod
    def model(controller: Controller) -> ControllerModel:
        gate("the controller model: this controller is QEMU's")

    def abandon(self) -> None:
        with self.undo:
            self.machine.close()

    def check_nothing_left(self) -> None:
        with self.undo:
            live = self.machine.live()
            self.machine.close()
            assert live["iova_ranges"] == live["mappings"] == 0
            assert (descriptors(), self.guest.pinned()) == self.before
