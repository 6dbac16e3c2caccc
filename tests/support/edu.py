"""A driver of ``edu``, whichever platform it is on: its DMA engine, and a device's own accesses made by it."""

from __future__ import annotations

from typing import Any

from dmakit.platform.function import PciFunction

PAGE = 4096
EDU_MASK = (1 << 28) - 1
BUFFER = 0x40000


class Edu:
    """4 KiB of its own at 0x40000, and a DMA engine; the bus is its own from now on."""

    def __init__(self, device: PciFunction) -> None:
        self.device = device
        self.bar = device.bar(0)
        self.interrupt = device.interrupts()[0]
        device.set_bus_master(True)

    def _transfer(self, command: int, source: int, target: int, size: int) -> None:
        for register, value in ((0x80, source), (0x88, target), (0x90, size), (0x98, command | 5)):
            self.bar.write(register, value, 8)
        assert self.interrupt.wait(10) == 1
        self.bar.write32(0x64, self.bar.read32(0x24))

    def fetch(self, addr: int, size: int) -> None:
        """The device reads memory."""
        self._transfer(0, addr, BUFFER, size)

    def store(self, addr: int, size: int) -> None:
        """The device writes memory."""
        self._transfer(2, BUFFER, addr, size)


class EduPort:
    """A dma.Device's own accesses, made by edu through a page that it can always reach."""

    def __init__(self, edu: Edu, machine: Any) -> None:
        self.edu, self.machine = edu, machine
        self.page = machine.buffer(PAGE)
        self.addr = edu.device.dma.map_phys(*self.page.ranges[0], 0)

    def read(self, iova: int, size: int) -> bytes:
        """What edu reads there (up to 4 KiB at a time)."""
        found = b""
        while len(found) < size:
            part = min(PAGE, size - len(found))
            self.edu.fetch(iova + len(found), part)
            self.edu.store(self.addr, part)
            found += self.page.read(0, part)
        return found

    def write(self, iova: int, data: bytes) -> None:
        """Let edu write there."""
        for at in range(0, len(data), PAGE):
            part = data[at : at + PAGE]
            self.page.write(0, part)
            self.edu.fetch(self.addr, len(part))
            self.edu.store(iova + at, len(part))

    def close(self) -> None:
        """Unmap the page."""
        self.edu.device.dma.unmap_phys(self.addr, PAGE, 0)
