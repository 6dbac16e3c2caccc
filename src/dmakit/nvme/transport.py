"""What the driver needs of a controller: registers, shared memory, a mapping device, time, and a way to wait.

Two kinds of controller fit behind it: the model (``ModelTransport``), whose registers are method calls, which works
when it is waited for and whose time is the machine's; and real hardware (``nvme.vfio``), whose BAR 0 is mapped and
which works by itself.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from dmakit.consts import PAGE_SIZE
from dmakit.errors import HostError, UnsupportedError
from dmakit.nvme.busmaster import CMB_BAR
from dmakit.nvme.coherent import DeviceSource

if TYPE_CHECKING:
    from dmakit.nvme.model import ControllerModel
    from dmakit.nvme.pool import CoherentSource


class SharedMemory(Protocol):
    """Memory that CPU and controller see alike."""

    @property
    def addr(self) -> int:
        """DMA address of the first byte."""

    @property
    def words(self) -> memoryview[int]:
        """64-bit words that contain it."""

    @property
    def pages(self) -> memoryview[int]:
        """Index in ``words`` of the first word of each of its 4 KiB pages."""

    def read(self, offset: int, n: int) -> bytes:
        """``n`` bytes from ``offset``."""

    def write(self, offset: int, data: bytes) -> None:
        """Store ``data`` at ``offset``."""

    def free(self) -> None:
        """Give it back."""


class Notice(NamedTuple):
    """The host's word that the controller's time is over: ``error`` says why. ``well``: it still works as it should."""

    error: HostError
    well: bool


class Transport(Protocol):
    """A way to one controller; ``device`` maps memory for it (``dma.Device``), ``name`` is for messages.

    ``bar``: BAR 0 as 32-bit words when doorbells are plain stores, else None. ``vectors``: interrupts that ``wait``
    and ``descriptors`` know, 0 when the driver has to poll.
    """

    device: Any
    name: str
    bar: memoryview[int] | None
    vectors: int

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

    def bar_memory(self, index: int) -> tuple[int, int]:
        """(phys, size) of a BAR that holds memory; UnsupportedError when there is none."""

    def now(self) -> int:
        """ns on a clock that only runs forward."""

    def wait(self, timeout_ns: int) -> bool:
        """Let the controller work until it gives a sign, at most ``timeout_ns``; False when it gave none."""

    def descriptors(self) -> Sequence[int]:
        """File descriptors that become readable with each interrupt or notice; none when the driver has to poll."""

    def notice(self) -> Notice | None:
        """What the host has told us that ends everything, if it has; cheap, and the same from then on."""

    def start(self) -> None:
        """Give the controller access to memory (bus mastering on)."""

    def stop(self) -> None:
        """Take the controller's access to memory away (bus mastering off): what is in flight cannot land any more."""

    def close(self) -> None:
        """Let go of the device."""


class DeviceMemory:
    """Coherent memory of a ``dma.Device`` as ``SharedMemory``."""

    def __init__(self, device: Any, size: int) -> None:
        self.memory = device.alloc_coherent(size)
        self.addr: int = self.memory.addr
        self.read, self.write = self.memory.read, self.memory.write
        self.words: memoryview[int] = memoryview(device.memory.words)
        starts = [phys >> 3 for at in range(0, size, PAGE_SIZE) for phys, _ in self.memory.buffer.slices(at, 1)]
        self.pages = memoryview(array("Q", starts))
        self.write(0, bytes(size))

    def free(self) -> None:
        """Unmap and give the pages back."""
        self.memory.free()


class ModelTransport:
    """A controller model on a device of the software machine; time is the machine's."""

    def __init__(self, controller: ControllerModel, device: Any) -> None:
        self.controller = controller
        self.device = device
        self.name = f"soft:{device.name}"
        self.bar: memoryview[int] | None = None
        self.vectors = 0
        self.read32 = controller.read32
        self.read64 = controller.read64
        self.write32 = controller.write32
        self.write64 = controller.write64

    def allocate(self, size: int) -> SharedMemory:
        """Coherent memory of the device, cleared."""
        return DeviceMemory(self.device, size)

    def pages(self) -> CoherentSource:
        """Pages of coherent memory of the device."""
        return DeviceSource(self.device)

    def bar_memory(self, index: int) -> tuple[int, int]:
        """The model's memory buffer."""
        buffer = self.controller.port.buffer
        if buffer is None or index != CMB_BAR:
            raise UnsupportedError(f"{self.name}: has no memory in BAR {index}")
        return buffer.start, buffer.size

    def now(self) -> int:
        """The machine's virtual time."""
        return int(self.device.clock.now)

    def wait(self, timeout_ns: int) -> bool:
        """Let the model execute what waits; when nothing does, time passes."""
        if self.controller.run() > 0:
            return True
        self.device.clock.advance(timeout_ns)
        return False

    def descriptors(self) -> Sequence[int]:
        """None: the model works when it is waited for."""
        return ()

    def notice(self) -> Notice | None:
        """None: the software machine takes nothing back."""
        return None

    def start(self) -> None:
        """Bus mastering on."""
        self.controller.port.enabled = True

    def stop(self) -> None:
        """Bus mastering off: every later access of the model is blocked."""
        self.controller.port.enabled = False

    def close(self) -> None:
        """Nothing of the host's is held."""
