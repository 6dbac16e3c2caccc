"""A device's registers: its regions (BARs, ROM, configuration space) and how to reach them.

A *region* is a part of the device's file. What may be mapped is mapped, into the machine's source space, so that it
has a ``phys`` and peers can be given it; the rest (configuration space, an MSI-X table, a region that a kernel will not
map) is reached by pread and pwrite, which the kernel turns into accesses of the same width. Accesses are little endian,
of 1, 2, 4 or 8 bytes, aligned to their size, and in program order.

Source: ``include/uapi/linux/vfio.h`` (vfio_region_info), PCI Local Bus 3.0 (configuration space).
"""

from __future__ import annotations

import contextlib
from typing import Any

from dmakit.consts import PAGE_SIZE
from dmakit.errors import MisuseError, UnsupportedError
from dmakit.platform.linux import uapi
from dmakit.platform.linux.kernel import Kernel
from dmakit.platform.linux.space import MemoryObject, SourceSpace
from dmakit.platform.linux.uapi import LAYOUTS

_CODES: dict[int, Any] = {1: "B", 2: "H", 4: "I", 8: "Q"}
COMMAND, STATUS, CAPABILITY_POINTER = 0x04, 0x06, 0x34
COMMAND_MEMORY, COMMAND_BUS_MASTER, STATUS_CAPABILITIES = 2, 4, 0x10
EXTENDED_START = 0x100


class Region:
    """Region ``index`` of a device: ``size`` bytes, ``flags`` (readable, writable, mappable).

    ``memory``: its place in the source space while (parts of) it are mapped, else None; ``phys``: where that is."""

    def __init__(self, kernel: Kernel, fd: int, index: int, owner: Any) -> None:
        self.kernel, self.fd, self.index, self.owner = kernel, fd, index, owner
        layout = LAYOUTS["vfio_region_info"]
        data = layout.pack(index=index)
        kernel.ioctl(fd, "VFIO_DEVICE_GET_REGION_INFO", data)
        needed = layout.unpack(data).argsz
        if needed > layout.size:
            data = layout.pack(bytes(needed - layout.size), index=index)
            kernel.ioctl(fd, "VFIO_DEVICE_GET_REGION_INFO", data)
        info = layout.unpack(data)
        self.size, self.offset, self.flags = int(info.size), int(info.offset), int(info.flags)
        self.areas = self._areas(data, info.cap_offset if info.flags & uapi.REGION_CAPS else 0)
        self.memory: MemoryObject | None = None
        self._views: dict[int, memoryview] = {}

    def _areas(self, data: bytearray, first: int) -> list[tuple[int, int]]:
        """The parts (offset, size), whole pages, that may be mapped."""
        if not self.flags & uapi.REGION_MMAP or self.size < PAGE_SIZE:
            return []
        chain = uapi.capabilities(data, first)
        if uapi.REGION_CAP_SPARSE_MMAP not in chain:
            return [(0, self.size // PAGE_SIZE * PAGE_SIZE)]
        at = chain[uapi.REGION_CAP_SPARSE_MMAP]
        layout = LAYOUTS["vfio_region_sparse_mmap_area"]
        count = int.from_bytes(data[at + 8 : at + 12], "little")
        found = [layout.unpack(data, at + 16 + i * layout.size) for i in range(count)]
        return [(area.offset, area.size) for area in found if area.size]

    @property
    def phys(self) -> int:
        """Where the region lies in the machine's source space; UnsupportedError when it cannot be mapped."""
        if self.memory is None:
            raise UnsupportedError(f"region {self.index} of {self.owner}: has no part that may be mapped")
        return self.memory.start

    def map(self, space: SourceSpace) -> None:
        """Map what may be mapped into ``space``."""
        if self.areas and self.memory is None:
            self.memory = space.add_bar(self.owner, self.fd, self.offset, self.size, self.areas)
            if self.areas == [(0, self.memory.size)] or self.areas[0] == (0, self.size):
                whole = space.memory.view[self.memory.start : self.memory.start + self.areas[0][1]]
                self._views = {width: whole.cast("B").cast(code) for width, code in _CODES.items()}

    def unmap(self, space: SourceSpace) -> None:
        """Undo ``map``; accesses through the file keep working. What a caller still holds is memory then."""
        if self.memory is not None:
            for view in self._views.values():
                with contextlib.suppress(BufferError):
                    view.release()
            self._views = {}
            space.remove(self.memory)
            self.memory = None

    def words(self, width: int = 4) -> memoryview:
        """The mapped region as an array of ``width``-byte registers; UnsupportedError when it is not all mapped."""
        if width not in self._views:
            raise UnsupportedError(f"region {self.index} of {self.owner}: not mapped as a whole; use read and write")
        return self._views[width]

    def _check(self, offset: int, width: int) -> None:
        if width not in _CODES or offset < 0 or offset % width or offset + width > self.size:
            raise MisuseError(
                f"region {self.index}: an access of {width} bytes at {offset:#x} must be aligned, of 1, 2, 4 or 8"
                f" bytes, inside {self.size:#x} bytes"
            )

    def read(self, offset: int, width: int = 4) -> int:
        """A register of ``width`` bytes."""
        self._check(offset, width)
        view = self._views.get(width)
        if view is not None and offset // width < len(view):
            return int(view[offset // width])
        return int.from_bytes(self.kernel.read_at(self.fd, width, self.offset + offset), "little")

    def write(self, offset: int, value: int, width: int = 4) -> None:
        """Set a register of ``width`` bytes."""
        self._check(offset, width)
        if not 0 <= value < 1 << 8 * width:
            raise MisuseError(f"region {self.index}: value={value:#x} does not fit into {width} bytes")
        view = self._views.get(width)
        if view is not None and offset // width < len(view):
            view[offset // width] = value
        else:
            self.kernel.write_at(self.fd, value.to_bytes(width, "little"), self.offset + offset)

    def read32(self, offset: int) -> int:
        """A 32-bit register."""
        return self.read(offset, 4)

    def write32(self, offset: int, value: int) -> None:
        """Set a 32-bit register."""
        self.write(offset, value, 4)

    def read64(self, offset: int) -> int:
        """A 64-bit register, as two 32-bit accesses, low half first (which every device takes)."""
        return self.read(offset, 4) | self.read(offset + 4, 4) << 32

    def write64(self, offset: int, value: int) -> None:
        """Set a 64-bit register, as two 32-bit accesses, low half first."""
        self.write(offset, value & 0xFFFF_FFFF, 4)
        self.write(offset + 4, value >> 32, 4)


class ConfigSpace(Region):
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
