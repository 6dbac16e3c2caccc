"""One real PCI device in our hands: registers, memory it may reach, interrupts.

``Device.open(bdf)`` takes a device that is bound to vfio-pci, attaches it to an I/O address space of its own and resets
it. Then ``config`` is its configuration space, ``bar(n)`` its registers, ``dma`` its mappings (a ``dma.Device``: the
same calls as on the software machine), ``interrupts(…)`` its vectors. Nothing is reachable for it until it is
mapped, and it masters the bus only when told (``set_bus_master``).

The host may want the device back (an administrator unbinds or removes it, somebody pulls it out) or report that it
failed: ``wanted_back``, ``failed`` and ``check`` tell, ``notices.descriptors()`` are for event loops. Nothing is taken
away: the host waits until the device is closed.

Closing keeps an order: bus mastering off, interrupts off, registers unmapped, device given back to the kernel (which
resets it), and only then the memory that it could reach. A process that is killed leaves the same behind: mappings and
pinned pages live, in the kernel, until the device's file is closed and the device disabled.

Source: ``Documentation/driver-api/vfio.rst``.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from dmakit.errors import DmakitError, MisuseError, UnsupportedError
from dmakit.memory.buffers import Buffer
from dmakit.platform.linux import uapi
from dmakit.platform.linux.interrupts import Interrupts
from dmakit.platform.linux.irqs import vectors
from dmakit.platform.linux.notices import Notices
from dmakit.platform.linux.pci import PciDevice, check_ready, find
from dmakit.platform.linux.region import ConfigSpace, Region
from dmakit.platform.linux.space import MemoryObject
from dmakit.platform.linux.uapi import LAYOUTS

if TYPE_CHECKING:
    from types import TracebackType

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


class Device:
    """A device that this process owns through VFIO; made by ``open`` (or ``Machine.open``), a context manager."""

    def __init__(self, machine: Machine, info: PciDevice, fd: int, space: Any, owns_machine: bool) -> None:
        self.machine, self.info, self.fd, self.space = machine, info, fd, space
        self.kernel = machine.kernel
        self.owns_machine = owns_machine
        self.bdf = info.bdf
        self.dma: Any = None
        self.regions: dict[int, Region] = {}
        self.closed = False
        self.notices = Notices(self.kernel, self.bdf)
        self._interrupts: Interrupts | None = None
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

    def __str__(self) -> str:
        return self.bdf

    def __repr__(self) -> str:
        return f"<vfio device {self.bdf}, {self.info.vendor:04x}:{self.info.device:04x}>"

    # Registers ------------------------------------------------------------------------------------------------

    def region(self, index: int) -> Region:
        """Region ``index`` (0 to 5 = BARs, 6 = ROM, 7 = configuration), mapped where the kernel allows."""
        if index not in self.regions:
            if not 0 <= index < self.facts.num_regions:
                raise MisuseError(f"region {index}: {self} has regions 0 to {self.facts.num_regions - 1}")
            made = Region(self.kernel, self.fd, index, self)
            if index != uapi.CONFIG_REGION:
                made.map(self.machine.space)
            self.regions[index] = made
        return self.regions[index]

    def bar(self, index: int) -> Region:
        """BAR ``index``; UnsupportedError when the device has none there."""
        found = self.region(index)
        if index > 5 or found.size == 0:
            raise UnsupportedError(f"{self} has no BAR {index}")
        return found

    def set_bus_master(self, on: bool) -> None:
        """Let the device read and write what is mapped for it, or stop it."""
        self.config.set_bus_master(on)

    def reset(self) -> None:
        """Reset the function: it stops, and forgets what its registers held; UnsupportedError when it cannot be."""
        if not self.facts.flags & uapi.DEVICE_RESET:
            raise UnsupportedError(f"{self} cannot be reset alone (no FLR, no power management, not alone on its bus)")
        self.kernel.ioctl(self.fd, "VFIO_DEVICE_RESET")

    # Interrupts -----------------------------------------------------------------------------------------------

    def interrupt_counts(self) -> dict[str, int]:
        """How many vectors of each kind the device has."""
        kinds = (("intx", uapi.IRQ_INTX), ("msi", uapi.IRQ_MSI), ("msix", uapi.IRQ_MSIX))
        return {kind: vectors(self.kernel, self.fd, index)[0] for kind, index in kinds}

    def interrupts(self, count: int = 1, kind: str = "") -> Interrupts:
        """Switch on ``count`` vectors of ``kind`` (default: the best that has so many: msix, msi, intx)."""
        if self._interrupts is not None:
            self._interrupts.close()
        if not kind:
            counts = self.interrupt_counts()
            kind = next((name for name in ("msix", "msi", "intx") if counts[name] >= count), "msix")
        self._interrupts = Interrupts(self.kernel, self.fd, kind, count, self.notices)
        return self._interrupts

    # What the host says ---------------------------------------------------------------------------------------

    @property
    def wanted_back(self) -> bool:
        """Whether the host waits for this device to be closed: it is being unbound, removed or unplugged."""
        return uapi.IRQ_REQ in self.notices.listen()

    @property
    def failed(self) -> bool:
        """Whether the host has reported a fatal error of the device (AER): nothing that it says counts any more."""
        return uapi.IRQ_ERR in self.notices.listen()

    def check(self) -> None:
        """HostError when the device is ``wanted_back`` (ENODEV) or has ``failed`` (EIO): time to leave its block."""
        if (error := self.notices.error()) is not None:
            raise error

    # Memory ---------------------------------------------------------------------------------------------------

    def buffer(self, size: int | str, **options: Any) -> Buffer:
        """Memory of the machine (``Machine.buffer``); map it with ``dma``."""
        return self.machine.buffer(size, **options)

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

    # End ------------------------------------------------------------------------------------------------------

    def leftovers(self) -> None:
        """MisuseError naming what is still mapped, when something is."""
        if self.dma is not None:
            self.dma.release()

    def close(self) -> None:
        """Give the device back; a second call does nothing. Its mappings go with it."""
        if self.closed:
            return
        self.closed = True
        with contextlib.suppress(DmakitError):
            self.set_bus_master(False)
        if self._interrupts is not None:
            self._interrupts.close()
        for region in self.regions.values():
            region.unmap(self.machine.space)
        for fd in self._dma_bufs.values():
            self.kernel.close(fd)
        self.machine.give_back(self)
        self.notices.close()
        if self.owns_machine:
            self.machine.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.leftovers()
        finally:
            self.close()


def prepare(device: Device) -> None:
    """A defined state for a device just taken: reset, deaf to the bus, answering at its BARs."""
    with contextlib.suppress(UnsupportedError):
        device.reset()
    device.set_bus_master(False)
    device.config.set_memory(True)


def ready(kernel: Any, bdf: str) -> PciDevice:
    """The device at ``bdf``, checked to be VFIO's; HostError with the remedy."""
    found = find(kernel, bdf)
    check_ready(kernel, found)
    return found
