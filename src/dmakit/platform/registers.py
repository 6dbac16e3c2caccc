"""A PCI function's registers as its driver sees them: BARs, and configuration space with its capabilities.

The rule of an access is the same wherever the function is: little endian, of 1, 2, 4 or 8 bytes, aligned to its size,
inside the region, in program order. What can be mapped is an array (``words``) and has a place in the machine's source
space (``phys``), so that peers can be given it; the rest goes to whoever answers: the kernel (``linux.region``), or the
model of a device (``soft.device``).

Source: PCI Local Bus 3.0 (configuration space), PCI Express Base (extended capabilities).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from dmakit.errors import MisuseError, UnsupportedError

CODES: dict[int, Any] = {1: "B", 2: "H", 4: "I", 8: "Q"}
COMMAND, STATUS, CAPABILITY_POINTER = 0x04, 0x06, 0x34
COMMAND_MEMORY, COMMAND_BUS_MASTER, STATUS_CAPABILITIES = 2, 4, 0x10
EXTENDED_START = 0x100


class Registers(ABC):
    """Region ``index`` of a function: ``size`` bytes.

    ``memory``: its place in the source space while (parts of) it are mapped, else None; ``phys``: where that is."""

    def __init__(self, index: int, size: int, owner: Any) -> None:
        self.index, self.size, self.owner = index, size, owner
        self.memory: Any = None
        self._views: dict[int, memoryview] = {}

    @abstractmethod
    def _load(self, offset: int, width: int) -> int:
        """A register that is not mapped."""

    @abstractmethod
    def _store(self, offset: int, value: int, width: int) -> None:
        """Set a register that is not mapped."""

    @property
    def phys(self) -> int:
        """Where the region lies in the machine's source space; UnsupportedError when it cannot be mapped."""
        if self.memory is None:
            raise UnsupportedError(f"region {self.index} of {self.owner}: has no part that may be mapped")
        return int(self.memory.start)

    def words(self, width: int = 4) -> memoryview:
        """The mapped region as an array of ``width``-byte registers; UnsupportedError when it is not all mapped."""
        if width not in self._views:
            raise UnsupportedError(f"region {self.index} of {self.owner}: not mapped as a whole; use read and write")
        return self._views[width]

    def _show(self, view: memoryview) -> None:
        """From now on accesses go to this memory."""
        self._views = {width: view.cast("B").cast(code) for width, code in CODES.items()}

    def _check(self, offset: int, width: int) -> None:
        if self.owner.given_back:
            raise MisuseError(f"{self.owner} is closed")
        if width not in CODES or offset < 0 or offset % width or offset + width > self.size:
            raise MisuseError(
                f"region {self.index}: an access of {width} bytes at {offset:#x} must be aligned, of 1, 2, 4 or 8"
                f" bytes, inside {self.size:#x} bytes"
            )

    def _fits(self, value: int, width: int) -> None:
        if not 0 <= value < 1 << 8 * width:
            raise MisuseError(f"region {self.index}: value={value:#x} does not fit into {width} bytes")

    def read(self, offset: int, width: int = 4) -> int:
        """A register of ``width`` bytes."""
        self._check(offset, width)
        view = self._views.get(width)
        if view is not None and offset // width < len(view):
            return int(view[offset // width])
        return self._load(offset, width)

    def write(self, offset: int, value: int, width: int = 4) -> None:
        """Set a register of ``width`` bytes."""
        self._check(offset, width)
        self._fits(value, width)
        view = self._views.get(width)
        if view is not None and offset // width < len(view):
            view[offset // width] = value
        else:
            self._store(offset, value, width)

    def read32(self, offset: int) -> int:
        """A 32-bit register."""
        return self.read(offset, 4)

    def write32(self, offset: int, value: int) -> None:
        """Set a 32-bit register."""
        self.write(offset, value, 4)

    def read64(self, offset: int) -> int:
        """A 64-bit register, as two 32-bit accesses, low half first (which every device takes)."""
        self._check(offset + 4, 4)
        return self.read(offset, 4) | self.read(offset + 4, 4) << 32

    def write64(self, offset: int, value: int) -> None:
        """Set a 64-bit register, as two 32-bit accesses, low half first."""
        self._fits(value, 8)
        self._check(offset + 4, 4)
        self.write(offset, value & 0xFFFF_FFFF, 4)
        self.write(offset + 4, value >> 32, 4)


class ConfigRegisters(Registers):
    """Configuration space: ``read``/``write`` by offset, capabilities by id."""

    def capability(self, number: int) -> int:
        """Offset of a capability (5 = MSI, 16 = PCI Express, 17 = MSI-X …), 0 when the device has none."""
        if not self.read(STATUS, 2) & STATUS_CAPABILITIES:
            return 0
        at = self.read(CAPABILITY_POINTER, 1) & ~3
        for _ in range(48):
            if at < 0x40:
                return 0
            if self.read(at, 1) == number:
                return at
            at = self.read(at + 1, 1) & ~3
        return 0

    def extended_capability(self, number: int) -> int:
        """Offset of an extended capability (1 = AER, 13 = ACS, 15 = ATS …), 0 when the device has none."""
        at = EXTENDED_START if self.size > EXTENDED_START else 0
        for _ in range(960):
            if at < EXTENDED_START or at + 4 > self.size:
                return 0
            header = self.read(at, 4)
            if header & 0xFFFF == number:
                return at
            at = header >> 20 & ~3
        return 0

    def _command(self, bit: int, on: bool) -> None:
        value = self.read(COMMAND, 2)
        self.write(COMMAND, value | bit if on else value & ~bit, 2)

    def set_memory(self, on: bool) -> None:
        """Let the device answer at its BARs."""
        self._command(COMMAND_MEMORY, on)

    def set_bus_master(self, on: bool) -> None:
        """Let the device read and write memory."""
        self._command(COMMAND_BUS_MASTER, on)

    @property
    def bus_master(self) -> bool:
        """Whether the device may read and write memory."""
        return bool(self.read(COMMAND, 2) & COMMAND_BUS_MASTER)
