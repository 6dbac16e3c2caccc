"""What the driver needs of a controller: registers, shared memory, a mapping device, and a way to wait.

Two kinds of controller fit behind it: the model (``ModelTransport``), whose registers are method calls and which
works when it is waited for; and real hardware, whose BAR 0 is mapped by VFIO and which works by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from dmakit.nvme.coherent import DeviceSource

if TYPE_CHECKING:
    from dmakit.nvme.model import ControllerModel
    from dmakit.nvme.pool import CoherentSource


class SharedMemory(Protocol):
    """Memory that CPU and controller see alike."""

    @property
    def addr(self) -> int:
        """DMA address of the first byte."""

    def read(self, offset: int, n: int) -> bytes:
        """``n`` bytes from ``offset``."""

    def write(self, offset: int, data: bytes) -> None:
        """Store ``data`` at ``offset``."""

    def free(self) -> None:
        """Give it back."""


class Transport(Protocol):
    """A way to one controller; ``device`` maps memory for it (``dma.Device``)."""

    device: Any

    def read32(self, offset: int) -> int:
        """A 32-bit property."""

    def read64(self, offset: int) -> int:
        """A 64-bit property."""

    def write32(self, offset: int, value: int) -> None:
        """Write a 32-bit property or a doorbell."""

    def write64(self, offset: int, value: int) -> None:
        """Write a 64-bit property."""

    def allocate(self, size: int) -> SharedMemory:
        """Zeroed shared memory; ExhaustedError when there is none."""

    def pages(self) -> CoherentSource:
        """Pages for descriptor lists."""

    def wait(self) -> bool:
        """Let the controller make progress; False when there is no point in waiting further."""


class ModelTransport:
    """A controller model on a device of the software machine."""

    def __init__(self, controller: ControllerModel, device: Any) -> None:
        self.controller = controller
        self.device = device
        self.read32 = controller.read32
        self.read64 = controller.read64
        self.write32 = controller.write32
        self.write64 = controller.write64

    def allocate(self, size: int) -> SharedMemory:
        """Coherent memory of the device, cleared."""
        memory: SharedMemory = self.device.alloc_coherent(size)
        memory.write(0, bytes(size))
        return memory

    def pages(self) -> CoherentSource:
        """Pages of coherent memory of the device."""
        return DeviceSource(self.device)

    def wait(self) -> bool:
        """Let the model execute what waits; False when nothing did."""
        return self.controller.run() > 0
