"""One real PCI device in our hands: registers, memory it may reach, interrupts.

``Device.open(bdf)`` takes a device that is bound to vfio-pci, attaches it to an I/O address space of its own and resets
it. What it then offers is ``platform.function.PciFunction``, the same as on the software machine.

A process that is killed leaves the same behind as one that closes: mappings and pinned pages live, in the kernel, until
the device's file is closed and the device disabled.

Source: ``Documentation/driver-api/vfio.rst``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dmakit.errors import UnsupportedError
from dmakit.platform.function import PciFunction
from dmakit.platform.linux import uapi
from dmakit.platform.linux.irqs import VfioIrqs
from dmakit.platform.linux.pci import check_ready, find
from dmakit.platform.linux.region import ConfigSpace, Region
from dmakit.platform.linux.space import MemoryObject
from dmakit.platform.linux.uapi import LAYOUTS
from dmakit.platform.pci import PciDevice

if TYPE_CHECKING:
    from dmakit.platform.linux.machine import Machine

_RDWR_CLOEXEC = 0o2 | 0o2000000


class RealPort:
    """A real device makes its own accesses: nobody makes them for it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def read(self, iova: int, size: int) -> bytes:
        """Refused."""
        raise UnsupportedError(f"{self.name} is real: it reads memory when its registers tell it to")

    def write(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        """Refused."""
        raise UnsupportedError(f"{self.name} is real: it writes memory when its registers tell it to")


class Device(PciFunction):
    """A device that this process owns through VFIO; made by ``open`` (or ``Machine.open``), a context manager."""

    regions: dict[int, Region]

    def __init__(self, machine: Machine, info: PciDevice, fd: int, space: Any, owns_machine: bool) -> None:
        super().__init__(machine, info, machine.kernel, VfioIrqs(machine.kernel, fd), owns_machine)
        self.kernel, self.fd, self.space = machine.kernel, fd, space
        self.dma = None
        self._dma_bufs: dict[tuple[int, int], int] = {}
        facts = LAYOUTS["vfio_device_info"].pack()
        self.kernel.ioctl(fd, "VFIO_DEVICE_GET_INFO", facts)
        self.facts = LAYOUTS["vfio_device_info"].unpack(facts)
        self.config = ConfigSpace(self.kernel, fd, uapi.CONFIG_REGION, self)

    @staticmethod
    def open(
        bdf: str, *, machine: Machine | None = None, backend: str = "auto", ram: int | str = "64M", **options: Any
    ) -> Device:
        """Take the device at ``bdf``; on a machine of its own (with ``ram``) unless one is given.

        ``backend``: ``iommufd``, ``type1``, or ``auto`` (iommufd where the host has it). ``options``: those of
        ``dma.device.Device`` (mask, trusted, max_segment …). HostError says what is missing and how to get it.
        """
        from dmakit.platform.linux.machine import Machine

        own = machine is None
        home = Machine(backend=backend, ram=ram) if machine is None else machine
        try:
            return home.open(bdf, owns_machine=own, **options)
        except BaseException:
            if own:
                home.close()
            raise

    def __repr__(self) -> str:
        return f"<vfio device {self.bdf}, {self.info.vendor:04x}:{self.info.device:04x}>"

    @property
    def region_count(self) -> int:
        """As the kernel tells."""
        return int(self.facts.num_regions)

    def _region(self, index: int) -> Region:
        made = Region(self.kernel, self.fd, index, self)
        if index != uapi.CONFIG_REGION:
            made.map(self.machine.space)
        return made

    def reset(self) -> None:
        """Reset the function: it stops, and forgets what its registers held; UnsupportedError when it cannot be."""
        self._held()
        if not self.facts.flags & uapi.DEVICE_RESET:
            raise UnsupportedError(f"{self} cannot be reset alone (no FLR, no power management, not alone on its bus)")
        self.kernel.ioctl(self.fd, "VFIO_DEVICE_RESET")

    def dma_buf(self, memory: MemoryObject, offset: int) -> tuple[int, int]:
        """A dma-buf of the mapped area of a BAR that holds ``offset``, and where in it that is."""
        region = next(entry for entry in self.regions.values() if entry.memory is memory)
        start, size = next(area for area in region.areas if area[0] <= offset < sum(area))
        key = (region.index, start)
        if key not in self._dma_bufs:
            body = LAYOUTS["vfio_device_feature_dma_buf"].pack(
                region_index=region.index, open_flags=_RDWR_CLOEXEC, nr_ranges=1
            )
            body += LAYOUTS["vfio_region_dma_range"].pack(offset=start, length=size)
            flags = uapi.FEATURE_GET | uapi.FEATURE_DMA_BUF
            data = LAYOUTS["vfio_device_feature"].pack(bytes(body), flags=flags)
            self._dma_bufs[key] = self.kernel.ioctl(self.fd, "VFIO_DEVICE_FEATURE", data)
        return self._dma_bufs[key], offset - start

    def _let_go(self) -> None:
        for region in self.regions.values():
            region.unmap(self.machine.space)
        for fd in self._dma_bufs.values():
            self.kernel.close(fd)


def ready(kernel: Any, bdf: str) -> PciDevice:
    """The device at ``bdf``, checked to be VFIO's; HostError with the remedy."""
    found = find(kernel, bdf)
    check_ready(kernel, found)
    return found
