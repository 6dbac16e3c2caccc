"""A device's registers: its regions (BARs, ROM, configuration space) and how to reach them.

A *region* is a part of the device's file. What may be mapped is mapped, into the machine's source space, so that it
has a ``phys`` and peers can be given it; the rest (configuration space, an MSI-X table, a region that a kernel will not
map) is reached by pread and pwrite, which the kernel turns into accesses of the same width.

Source: ``include/uapi/linux/vfio.h`` (vfio_region_info).
"""

from __future__ import annotations

import contextlib
from typing import Any

from dmakit.consts import PAGE_SIZE
from dmakit.platform.linux import uapi
from dmakit.platform.linux.kernel import Kernel
from dmakit.platform.linux.space import MemoryObject, SourceSpace
from dmakit.platform.linux.uapi import LAYOUTS
from dmakit.platform.registers import ConfigRegisters, Registers


class Region(Registers):
    """Region ``index`` of a device: ``size`` bytes, ``flags`` (readable, writable, mappable)."""

    memory: MemoryObject | None

    def __init__(self, kernel: Kernel, fd: int, index: int, owner: Any) -> None:
        self.kernel, self.fd = kernel, fd
        layout = LAYOUTS["vfio_region_info"]
        data = layout.pack(index=index)
        kernel.ioctl(fd, "VFIO_DEVICE_GET_REGION_INFO", data)
        needed = layout.unpack(data).argsz
        if needed > layout.size:
            data = layout.pack(bytes(needed - layout.size), index=index)
            kernel.ioctl(fd, "VFIO_DEVICE_GET_REGION_INFO", data)
        info = layout.unpack(data)
        super().__init__(index, int(info.size), owner)
        self.offset, self.flags = int(info.offset), int(info.flags)
        self.areas = self._areas(data, info.cap_offset if info.flags & uapi.REGION_CAPS else 0)

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

    def map(self, space: SourceSpace) -> None:
        """Map what may be mapped into ``space``."""
        if self.areas and self.memory is None:
            self.memory = space.add_bar(self.owner, self.fd, self.offset, self.size, self.areas)
            if self.areas == [(0, self.memory.size)] or self.areas[0] == (0, self.size):
                whole = space.memory.view[self.memory.start : self.memory.start + self.areas[0][1]]
                self._show(whole)

    def unmap(self, space: SourceSpace) -> None:
        """Undo ``map``; accesses through the file keep working. What a caller still holds is memory then."""
        if self.memory is not None:
            for view in self._views.values():
                with contextlib.suppress(BufferError):
                    view.release()
            self._views = {}
            space.remove(self.memory)
            self.memory = None

    def _load(self, offset: int, width: int) -> int:
        return int.from_bytes(self.kernel.read_at(self.fd, width, self.offset + offset), "little")

    def _store(self, offset: int, value: int, width: int) -> None:
        self.kernel.write_at(self.fd, value.to_bytes(width, "little"), self.offset + offset)


class ConfigSpace(Region, ConfigRegisters):
    """Configuration space, through the device's file: the kernel virtualises what is its own (BARs, MSI)."""
