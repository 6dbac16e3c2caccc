"""The portable contract tests' platforms on this guest's kernel: an NVMe drive behind the emulated IOMMU."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from dmakit import vfio
from dmakit.dma.device import Device
from tests.support.gates import gate
from tests.support.platforms import Platform, host_options
from tests.support.sweep import descriptors
from tests.vm.guest.accesses import DriveAccesses
from tests.vm.guest.support import IOMMU, KERNEL, NVME
from tests.vm.guest.vfio_support import EDU, bound, pinned


class GuestPlatform(Platform):
    """A host machine on this kernel: the first drive is the device, edu the second. Worlds leave nothing."""

    names = (NVME[0], EDU)

    def __init__(self, name: str) -> None:
        super().__init__(name)
        if name == "iommufd" and KERNEL != "iommufd":
            gate("iommufd: this kernel has none")
        self.binding = ExitStack()

    def world(self, machine: dict[str, Any], device: dict[str, Any]) -> tuple[Any, Device]:
        options = host_options(machine, device)
        if self.machine is None:
            self.binding.enter_context(bound(*self.names))
        self.undo.close()
        self.undo.callback(self._nothing_left, descriptors(), pinned())
        made = self.machine = self.undo.enter_context(vfio.Machine(backend=self.name, **options))
        accesses = DriveAccesses()
        opened = made.open(self.names[0], **{"port": accesses, **device})
        accesses.of(opened)
        self.undo.callback(accesses.stop)
        return made, opened.dma

    def close(self) -> None:
        with self.binding:
            super().close()

    @staticmethod
    def _nothing_left(files: int, locked: int) -> None:
        assert (descriptors(), pinned()) == (files, locked)

    def another(self, **device: Any) -> Device:
        made: Device = self.machine.device(self.names[1], **device)
        return made

    def write_implies_read(self) -> bool:
        return IOMMU == "vtd-sm"
