"""``Edu``: a device to learn drivers on, after the public description of QEMU's ``edu`` (1234:11e8).

BAR 0, 1 MiB of registers. Below 0x80 they are 32 bits wide and answer only 32-bit accesses, from there on 32 or 64:

| offset | what |
|---|---|
| 0x00 | identification, 0x010000ED: version 1.0 |
| 0x04 | liveness: reads the complement of what was written |
| 0x08 | factorial: write n, read n! modulo 2**32 |
| 0x20 | status: bit 0 computing (never seen: it is done when the write returns), bit 7 interrupt when computed |
| 0x24 | interrupt status: the bits that were raised and not yet acknowledged |
| 0x60 | raise these interrupt bits |
| 0x64 | acknowledge these interrupt bits |
| 0x80, 0x88, 0x90 | DMA source, destination, byte count |
| 0x98 | DMA command: bit 0 start, bit 1 from the device to memory, bit 2 interrupt 0x100 when done |

The DMA engine moves between memory, of which it addresses 28 bits, and 4 KiB of its own at 0x40000. A transfer that
does not lie in the device's own memory is not made. A blocked read brings zeros, a blocked write changes nothing, and
edu tells nobody: the only sign is the data. One interrupt, MSI when that is on, else the line.
"""

from __future__ import annotations

import math

from dmakit.errors import FaultError
from dmakit.platform.soft.model import Bar, Identity, Model

BUFFER, BUFFER_SIZE = 0x40000, 4096
VERSION = 0x010000ED
STATUS_INTERRUPT = 0x80
FACTORIAL_DONE, DMA_DONE = 0x001, 0x100
DMA_START, DMA_TO_MEMORY, DMA_INTERRUPT = 1, 2, 4
_WIDE = 0x80  # registers that take 64 bits start here
_ZERO_FROM = 34  # 34! is a multiple of 2**32
_U32 = (1 << 32) - 1


class Edu(Model):
    """The device; ``dma_mask``: the addresses that its engine can reach (higher bits are cut off)."""

    identity = Identity(0x1234, 0x11E8, 0x00FF00, 0x10, (0x1AF4, 0x1100), {0: Bar(1 << 20)}, msi=1)

    def __init__(self, dma_mask: int = (1 << 28) - 1) -> None:
        self.dma_mask = dma_mask

    def reset(self) -> None:
        """Everything 0, its memory too."""
        self.alive = self.factorial = self.status = self.pending = 0
        self.source = self.destination = self.count = self.command = 0
        self.buffer = bytearray(BUFFER_SIZE)

    def read(self, bar: int, offset: int, width: int) -> int:
        """All ones where no register is, or not of this width."""
        registers = {
            0x00: VERSION, 0x04: self.alive, 0x08: self.factorial, 0x20: self.status, 0x24: self.pending,
            0x80: self.source, 0x88: self.destination, 0x90: self.count, 0x98: self.command,
        }  # fmt: skip
        if width == 4 or (width == 8 and offset >= _WIDE):
            return registers.get(offset, super().read(bar, offset, width))
        return super().read(bar, offset, width)

    def write(self, bar: int, offset: int, value: int, width: int) -> None:
        """Ignored where no register is, or not of this width."""
        if width != 4 and not (width == 8 and offset >= _WIDE):
            return
        if offset == 0x04:
            self.alive = ~value & _U32
        elif offset == 0x08:
            self.factorial = math.factorial(min(value, _ZERO_FROM)) & _U32
            if self.status & STATUS_INTERRUPT:
                self._raise(FACTORIAL_DONE)
        elif offset == 0x20:
            self.status = value & STATUS_INTERRUPT
        elif offset == 0x60:
            self._raise(value)
        elif offset == 0x64:
            self._acknowledge(value)
        elif offset >= _WIDE:
            self._set_engine(offset, value)

    def _set_engine(self, offset: int, value: int) -> None:
        if offset == 0x80:
            self.source = value
        elif offset == 0x88:
            self.destination = value
        elif offset == 0x90:
            self.count = value
        elif offset == 0x98 and value & DMA_START:
            self.command = value
            self._transfer(value)

    def _raise(self, bits: int) -> None:
        self.pending |= bits
        if self.pending and not self.function.message():
            self.function.set_line(True)

    def _acknowledge(self, bits: int) -> None:
        self.pending &= ~bits
        if not self.pending:
            self.function.set_line(False)

    def _transfer(self, command: int) -> None:
        to_memory = bool(command & DMA_TO_MEMORY)
        own, other = (self.source, self.destination) if to_memory else (self.destination, self.source)
        at, end = own - BUFFER, own - BUFFER + self.count
        if at >= 0 and end <= BUFFER_SIZE:
            try:
                if to_memory:
                    self.function.write(other & self.dma_mask, bytes(self.buffer[at:end]))
                else:
                    self.buffer[at:end] = bytes(self.count)  # what a blocked read brings
                    self.buffer[at:end] = self.function.read(other & self.dma_mask, self.count)
            except FaultError:
                pass  # edu has no way to tell
        self.command = command & ~DMA_START
        if command & DMA_INTERRUPT:
            self._raise(DMA_DONE)
