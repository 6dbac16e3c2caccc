"""The platforms that the driver's contract tests run on, without a line of difference: what ``Controller.open`` takes.

``soft``: the software machine. ``type1``, ``iommufd``: the same controller model behind a fake VFIO device, whose
registers, mappings and interrupts go through the code that talks to a real kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.vfio.devices import FakeNvme
from tests.support.vfio.host import FakeHost

from dmakit.nvme.controller import Controller
from dmakit.nvme.model import ControllerModel
from dmakit.nvme.namespace import Namespace
from dmakit.nvme.software import SoftHost
from dmakit.platform.linux.machine import Machine as LinuxMachine
from dmakit.platform.soft import Machine as SoftMachine

PLATFORMS = ("soft", "type1", "iommufd")
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
        if platform == "soft":
            self.soft = SoftMachine(ram="96M", swiotlb="1M", mode="strict")
            self.machine: Any = self.soft
        else:
            self.fake = FakeHost([FakeNvme(BDF, 4, namespaces=[self.space], build=build, **model)])
            self.machine = LinuxMachine(ram="64M", kernel=self.fake, backend=platform)

    def open(self, **options: Any) -> Controller:
        """Bring the controller up."""
        if self.soft is None:
            return Controller.open(BDF, machine=self.machine, **options)
        return Controller.open(
            "soft", machine=self.soft, namespaces=[self.space], build=self.build, **self.model_options, **options
        )

    @staticmethod
    def model(controller: Controller) -> ControllerModel:
        """The model behind an open controller."""
        host: Any = controller.host
        if isinstance(host, SoftHost):
            return host.model
        found: ControllerModel = host.machine.kernel.devices[BDF].controller
        return found

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
    made = World(platform, **options)
    yield made
    made.check_nothing_left()
