"""A PCI controller behind the driver: registers in BAR 0, interrupts through eventfds, memory mapped for it.

A real one through VFIO, or one of the software machine (``nvme.function``): the driver sees the same.

Registers and doorbells are single aligned 32-bit stores and loads of the mapped BAR (a 64-bit property is two of them,
low half first, which every controller takes). Bus mastering is on only between ``start`` and ``stop``. With interrupts,
vector 0 is the admin queue's and vector n that of I/O queue n; a device with fewer shares the last one; without any,
the driver polls.

Closing is the host's order (``PciFunction.close``): bus mastering off, interrupts off, device given back, then memory.
"""

from __future__ import annotations

import select
import time
from collections.abc import Sequence
from typing import Any

from dmakit.consts import PAGE_SIZE
from dmakit.errors import DmakitError, ExhaustedError, MisuseError, UnsupportedError
from dmakit.memory.buffers import Buffer
from dmakit.nvme.coherent import DeviceSource
from dmakit.nvme.pool import CoherentSource
from dmakit.nvme.spec import Reg
from dmakit.nvme.transport import DeviceMemory, Notice, SharedMemory
from dmakit.platform.function import PciFunction
from dmakit.platform.interface import Platform

NVME_CLASS = 0x010802
_SPIN_NS = 50_000  # polling: how long to spin before sleeping


class VfioTransport:
    """``nvme.transport.Transport`` over a ``PciFunction``; up to ``vectors`` interrupts, 0 = poll."""

    def __init__(self, device: PciFunction, vectors: int = 0) -> None:
        self.pci = device
        self.device: Any = device.dma
        self.name = device.bdf
        self.registers = device.bar(0)
        self.notices = device.notices
        if self.registers.size < Reg.DOORBELLS + 8:
            raise UnsupportedError(f"{device}: BAR 0 of {self.registers.size} bytes is no NVMe controller's")
        self.read32, self.read64 = self.registers.read32, self.registers.read64
        self.write32, self.write64 = self.registers.write32, self.registers.write64
        self.bar: memoryview[int] | None
        try:
            self.bar = self.registers.words(4)
        except UnsupportedError:
            self.bar = None
        self.interrupts: Any = None
        self.vectors = self._switch_on(vectors)
        self._poll = select.poll()
        for fd in self.descriptors():
            self._poll.register(fd, select.POLLIN)

    def _switch_on(self, wanted: int) -> int:
        counts = self.pci.interrupt_counts()
        count = min(wanted, max(counts["msix"], counts["msi"]))
        if count:
            self.interrupts = self.pci.interrupts(count)
        return count

    def allocate(self, size: int) -> SharedMemory:
        """Memory of this process, mapped for the device, cleared."""
        return DeviceMemory(self.device, size)

    def pages(self) -> CoherentSource:
        """Pages of the same."""
        return DeviceSource(self.device)

    def bar_memory(self, index: int) -> tuple[int, int]:
        """A mapped BAR, in the machine's source space."""
        region = self.pci.bar(index)
        return region.phys, region.size

    def now(self) -> int:
        """The host's monotonic clock."""
        return time.monotonic_ns()

    def wait(self, timeout_ns: int) -> bool:
        """Sleep until an interrupt or a notice, or give the controller a moment when it has no interrupts."""
        if not self.vectors:
            time.sleep(min(timeout_ns, _SPIN_NS) / 1e9)
            return False
        fired = self._poll.poll(max(1, timeout_ns // 1_000_000))
        if fired:
            self.acknowledge()
        return bool(fired)

    def acknowledge(self) -> None:
        """Take the events of all vectors and notices, so that their descriptors are quiet until the next one."""
        for entry in self.interrupts:
            entry.take()
        self.notices.listen()

    def descriptors(self) -> Sequence[int]:
        """The eventfds of the vectors and, where there are any, of the notices."""
        if self.interrupts is None:
            return ()
        return [*(entry.fileno() for entry in self.interrupts), *self.notices.descriptors()]

    def notice(self) -> Notice | None:
        """The host wants the device back, which still works, or reports that it failed."""
        error = self.notices.error()
        return Notice(error, not self.pci.failed) if error is not None else None

    def start(self) -> None:
        """Bus mastering on."""
        self.pci.set_bus_master(True)

    def stop(self) -> None:
        """Bus mastering off; a device that is gone cannot reach memory anyway."""
        try:
            self.pci.set_bus_master(False)
        except DmakitError:
            return

    def close(self) -> None:
        """Let go of the registers; the host closes the device."""
        self.bar = None
        self._poll = select.poll()


class VfioHost:
    """The controller at a PCI address, of this host (``backend``, ``ram``) or of ``machine``, a real or a software one.

    ``interrupts``: False to poll. Raises HostError with the remedy when the device is not ours to take.
    """

    def __init__(
        self,
        bdf: str,
        *,
        vectors: int = 2,
        interrupts: bool = True,
        backend: str = "auto",
        ram: int | str = "256M",
        machine: Platform | None = None,
    ) -> None:
        from dmakit.platform.linux.machine import Machine

        self._own = machine is None
        self.machine: Any = Machine(backend=backend, ram=ram) if machine is None else machine
        self.name = bdf
        try:
            self.device: Any = self.machine.open(bdf)
            try:
                self.transport = self._transport(vectors if interrupts else 0)
            except BaseException:
                self.device.close()
                raise
        except BaseException:
            self._close_machine()
            raise

    def _transport(self, vectors: int) -> VfioTransport:
        kind = self.device.config.read(0x08, 4) >> 8
        if kind != NVME_CLASS:
            raise UnsupportedError(f"{self.name}: PCI class {kind:#08x} is no NVMe controller's ({NVME_CLASS:#08x})")
        return VfioTransport(self.device, vectors)

    def memory(self, size: int) -> tuple[Buffer, memoryview]:
        """Contiguous memory of the machine."""
        if size <= 0:
            raise MisuseError(f"size={size}: must be above 0")
        order = min((-(-size // PAGE_SIZE) - 1).bit_length(), 10)
        buffer = self.machine.buffer(size, order=order)
        if len(buffer.ranges) != 1:
            buffer.release()
            raise ExhaustedError(f"no contiguous memory of {size} bytes on this machine; use a larger ram=")
        ((phys, _),) = buffer.ranges
        return buffer, memoryview(self.machine.memory.data)[phys : phys + size]

    def close(self) -> None:
        """Give the device back, then the machine's memory."""
        try:
            self.device.close()
        finally:
            self._close_machine()

    def _close_machine(self) -> None:
        if self._own:
            self.machine.close()
