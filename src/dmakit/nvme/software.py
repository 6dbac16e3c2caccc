"""``Controller.open("soft")``: a software machine with one controller model in it, as a host for the driver.

A *host* is what ``Controller`` needs besides the driver: the transport to one controller, memory for I/O, and an end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from dmakit.consts import PAGE_SIZE
from dmakit.errors import ExhaustedError, MisuseError
from dmakit.memory.buffers import Buffer, allocate
from dmakit.nvme.buffers import HostMemory
from dmakit.nvme.model import ControllerModel
from dmakit.nvme.namespace import Namespace
from dmakit.nvme.transport import ModelTransport, Transport
from dmakit.platform.soft import Machine

BLOCKS = 1 << 18  # 128 MiB of 512-byte blocks
_ORDER = 10  # the largest block of the page allocator: 4 MiB


class Host(Protocol):
    """Where a controller lives."""

    @property
    def transport(self) -> Transport:
        """The way to it."""

    @property
    def name(self) -> str:
        """For messages."""

    def memory(self, size: int) -> tuple[HostMemory, memoryview]:
        """Memory for I/O and a flat view of it; ExhaustedError when there is none."""

    def close(self) -> None:
        """Let go of device and memory."""


class SoftHost:
    """A machine (``Machine`` options), a model (``model``: options of it) and namespaces of it."""

    def __init__(
        self,
        *,
        machine: Machine | None = None,
        namespaces: list[Namespace] | None = None,
        build: Callable[..., ControllerModel] = ControllerModel,
        **model: Any,
    ) -> None:
        self.machine = machine if machine is not None else Machine(ram="512M")
        self.device = self.machine.device(f"nvme{len(self.machine.devices)}")
        self._own = namespaces is None
        spaces = namespaces if namespaces is not None else [Namespace(1, BLOCKS)]
        self.model = build(self.device.port, spaces, **model)
        self.transport: Transport = ModelTransport(self.model, self.device)
        self.name = "soft"

    def memory(self, size: int) -> tuple[HostMemory, memoryview]:
        """Contiguous memory of the machine."""
        if size <= 0:
            raise MisuseError(f"size={size}: must be above 0")
        order = min((-(-size // PAGE_SIZE) - 1).bit_length(), _ORDER)
        buffer: Buffer = allocate(self.machine.pages, size, order=order)
        if len(buffer.ranges) != 1:
            buffer.release()
            raise ExhaustedError(f"no contiguous memory of {size} bytes on this machine")
        ((phys, _),) = buffer.ranges
        return buffer, memoryview(self.machine.memory.data)[phys : phys + size]

    def close(self) -> None:
        """The device leaves; the backing goes with it unless the namespaces were given."""
        self.device.release()
        self.machine.devices.remove(self.device)
        if self._own:
            self.model.close()
