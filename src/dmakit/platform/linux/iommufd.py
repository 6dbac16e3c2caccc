"""VFIO's newer interface: iommufd, one file with I/O address spaces (IOAS) to which single devices attach.

``/dev/iommu`` opened holds *objects*, named by numbers: an IOAS (what is mapped where), a hardware page table (HWPT)
that a device attaches to, a device. A device's own file (``/dev/vfio/devices/vfioN``) is first bound to the iommufd,
then attached to an IOAS or HWPT; until then nothing else works on it, and detached it can reach nothing.

*Staging.* Mapping pins memory, and the kernel charges for it. So one more IOAS, the staging one, keeps memory pinned:
a chunk (2 MiB) is mapped there when something in it is first used, at the IOVA that equals its ``phys``. A mapping for
a device is then IOAS_COPY out of it: the pages are shared, pinned and charged once. Only a page table pins, so the
staging IOAS has a HWPT of its own, to which no device is ever attached. Where the host refuses that HWPT, and for
memory outside its aperture, memory is mapped straight (MAP_FILE of a memory file, else MAP).

A peer's BAR is mapped through its dma-buf (``VFIO_DEVICE_FEATURE_DMA_BUF``), never by address.

Models ``drivers/iommu/iommufd/`` (io_pagetable.c, ioas.c, hw_pagetable.c, pages.c).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from typing import Any

import numpy as np

from dmakit.consts import PAGE_SIZE, PROT_READ, PROT_WRITE
from dmakit.errors import DmakitError, HostError, MisuseError, UnsupportedError
from dmakit.platform.linux import dirty, uapi
from dmakit.platform.linux.kernel import Kernel, address_of
from dmakit.platform.linux.limits import PinLedger, UserPins
from dmakit.platform.linux.space import HUGE_PAGE, MemoryObject, Piece
from dmakit.platform.linux.type1 import drop_range
from dmakit.platform.linux.uapi import LAYOUTS

IOMMU_FILE = "/dev/iommu"
_ALL = (1 << 64) - 1
_COPY, _UNMAP = LAYOUTS["iommu_ioas_copy"], LAYOUTS["iommu_ioas_unmap"]
_REMOVED = _UNMAP.offsets["length"]


class Iommufd:
    """One open ``/dev/iommu``, shared by the address spaces of a machine."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.fd = kernel.open(IOMMU_FILE)
        self.maps_files = True

    def call(self, name: str, layout: str, **values: Any) -> Any:
        """One ioctl with the structure ``layout``; its fields afterwards."""
        data = LAYOUTS[layout].pack(**values)
        self.kernel.ioctl(self.fd, name, data)
        return LAYOUTS[layout].unpack(data)

    def new_ioas(self) -> int:
        """The number of a new address space."""
        return int(self.call("IOMMU_IOAS_ALLOC", "iommu_ioas_alloc").out_ioas_id)

    def new_table(self, device: int, ioas: int, flags: int = 0) -> int:
        """The number of a new page table for ``device`` that follows ``ioas``."""
        table = self.call("IOMMU_HWPT_ALLOC", "iommu_hwpt_alloc", dev_id=device, pt_id=ioas, flags=flags)
        return int(table.out_hwpt_id)

    def destroy(self, number: int) -> None:
        """Destroy an object; what still refers to it goes when the file is closed."""
        with contextlib.suppress(DmakitError):
            self.call("IOMMU_DESTROY", "iommu_destroy", id=number)

    def tracks_dirty(self, device: int) -> bool:
        """Whether the IOMMU in front of ``device`` tracks dirty pages."""
        info = self.call("IOMMU_GET_HW_INFO", "iommu_hw_info", dev_id=device)
        return bool(info.out_capabilities & uapi.HW_CAP_DIRTY_TRACKING)

    def ranges(self, ioas: int) -> list[tuple[int, int]]:
        """IOVAs that ``ioas`` allows, as (first, last), ascending."""
        room = 32
        while True:
            spans = np.zeros(2 * room, np.uint64)
            data = LAYOUTS["iommu_ioas_iova_ranges"].pack(ioas_id=ioas, num_iovas=room, allowed_iovas=address_of(spans))
            try:
                self.kernel.ioctl(self.fd, "IOMMU_IOAS_IOVA_RANGES", data)
            except HostError as error:
                needed = LAYOUTS["iommu_ioas_iova_ranges"].unpack(data).num_iovas
                if error.errno != errno.EMSGSIZE or needed <= room:
                    raise
                room = needed
                continue
            count = LAYOUTS["iommu_ioas_iova_ranges"].unpack(data).num_iovas
            return sorted((int(spans[2 * i]), int(spans[2 * i + 1])) for i in range(count))

    def map_memory(self, ioas: int, iova: int, piece: Piece, flags: int) -> None:
        """Map a piece of RAM or of a caller's memory: as a file where there is one, else by address.

        A file's pages that nobody touched yet are allocated without regard to madvise: they would become small ones.
        """
        if piece.memory.fd >= 0 and self.maps_files:
            for block in range(piece.va // HUGE_PAGE * HUGE_PAGE, piece.va + piece.size, HUGE_PAGE):
                self.kernel.touch(max(block, piece.va))
            start = piece.memory.fd_offset + piece.offset
            try:
                self.map_file(ioas, iova, piece.memory.fd, start, piece.size, flags)
                return
            except HostError as error:
                if error.errno != errno.ENOTTY:
                    raise
                self.maps_files = False
        self.call("IOMMU_IOAS_MAP", "iommu_ioas_map",
                  flags=flags, ioas_id=ioas, user_va=piece.va, length=piece.size, iova=iova)  # fmt: skip

    def map_file(self, ioas: int, iova: int, fd: int, start: int, length: int, flags: int) -> None:
        """Map [start, start + length) of a memory file or a dma-buf."""
        self.call("IOMMU_IOAS_MAP_FILE", "iommu_ioas_map_file",
                  flags=flags, ioas_id=ioas, fd=fd, start=start, length=length, iova=iova)  # fmt: skip

    def copy(self, source: int, source_iova: int, ioas: int, iova: int, length: int, flags: int) -> None:
        """Map in ``ioas`` what is mapped in ``source``: the pages are shared."""
        self.kernel.ioctl(self.fd, "IOMMU_IOAS_COPY", _COPY.row(flags, ioas, source, length, iova, source_iova))

    def unmap(self, ioas: int, iova: int, size: int) -> int:
        """Take away whole mappings; the bytes removed."""
        data = _UNMAP.row(ioas, iova, size)
        self.kernel.ioctl(self.fd, "IOMMU_IOAS_UNMAP", data)
        return int.from_bytes(data[_REMOVED : _REMOVED + 8], "little")

    def close(self) -> None:
        """Close the file: every object and mapping goes with it."""
        if self.fd >= 0:
            self.kernel.close(self.fd)
            self.fd = -1


class Staging:
    """The address space that keeps memory pinned. ``chunks``: the pieces of memory (by ``phys``) that it holds."""

    def __init__(self, iommufd: Iommufd, device: int, pins: PinLedger, aperture_end: int) -> None:
        self.iommufd = iommufd
        self.pins = UserPins(pins)
        self.aperture_end = aperture_end
        self.ioas = iommufd.new_ioas()
        self.chunks: dict[int, int] = {}
        try:
            self.table = iommufd.new_table(device, self.ioas)
        except DmakitError:
            iommufd.destroy(self.ioas)
            raise

    def hold(self, piece: Piece) -> bool:
        """Keep all chunks of ``piece`` pinned; False when this memory cannot be staged."""
        memory = piece.memory
        if memory.end - 1 > self.aperture_end:
            return False
        first = piece.phys // HUGE_PAGE * HUGE_PAGE
        for chunk in range(first, piece.phys + piece.size, HUGE_PAGE):
            if (start := max(chunk, memory.start)) not in self.chunks:
                self._pin(memory, start, min(chunk + HUGE_PAGE, memory.end) - start)
        return True

    def _pin(self, memory: MemoryObject, start: int, size: int) -> None:
        self.pins.check(size, "IOMMU_IOAS_MAP")
        offset = start - memory.start
        flags = uapi.MAP_FIXED_IOVA | uapi.MAP_READABLE | (0 if memory.readonly else uapi.MAP_WRITEABLE)
        self.iommufd.map_memory(self.ioas, start, Piece(memory.va + offset, size, memory, offset), flags)
        self.chunks[start] = size
        self.pins.add(size)

    def forget(self, memory: MemoryObject) -> None:
        """Unpin the chunks of an object that leaves the space."""
        for start in [at for at in self.chunks if memory.start <= at < memory.end]:
            self.iommufd.unmap(self.ioas, start, self.chunks[start])
            self.pins.add(-self.chunks.pop(start))

    def close(self) -> None:
        """Unpin everything."""
        self.iommufd.destroy(self.table)
        self.iommufd.destroy(self.ioas)
        self.chunks.clear()
        self.pins.close()


class Ioas:
    """One address space for devices: a backend of ``HostDomain``.

    ``staging()``: the machine's staging address space or None; ``table``: the HWPT with dirty tracking, 0 without."""

    name = "iommufd"
    dirty_source = "hardware"

    def __init__(self, iommufd: Iommufd, pins: PinLedger, staging: Callable[[], Staging | None]) -> None:
        self.iommufd = iommufd
        self.pins = UserPins(pins)
        self.staging = staging
        self.number = iommufd.new_ioas()
        self.table = 0
        self.page_sizes = PAGE_SIZE | HUGE_PAGE | 1 << 30
        self.peers: dict[int, int] = {}
        self.unstaged: dict[int, int] = {}
        self.closed = False

    @property
    def dirty(self) -> bool:
        """Whether hardware tracks dirty pages here."""
        return self.table != 0

    def attach_target(self, device: int) -> int:
        """What ``device`` attaches to: a page table with dirty tracking where the host has it, else the IOAS."""
        if not self.table and self.iommufd.tracks_dirty(device):
            self.table = self.iommufd.new_table(device, self.number, uapi.HWPT_ALLOC_DIRTY_TRACKING)
        return self.table or self.number

    def ranges(self) -> list[tuple[int, int]]:
        """IOVAs that may be mapped, as (first, last), ascending."""
        return self.iommufd.ranges(self.number)

    def map(self, iova: int, piece: Piece, prot: int) -> None:
        """One mapping of a piece: a copy out of staging where possible."""
        if prot & PROT_WRITE and piece.memory.readonly:
            raise MisuseError("a device may not write to memory that is read-only for this process", errno.EFAULT)
        flags = uapi.MAP_FIXED_IOVA | (uapi.MAP_READABLE if prot & PROT_READ else 0)
        flags |= uapi.MAP_WRITEABLE if prot & PROT_WRITE else 0
        if piece.memory.kind == "bar":
            self._map_peer(iova, piece, flags)
            return
        staging = self.staging()
        if staging is not None and staging.hold(piece):
            self.iommufd.copy(staging.ioas, piece.phys, self.number, iova, piece.size, flags)
            return
        self.pins.check(piece.size, "IOMMU_IOAS_MAP")
        self.iommufd.map_memory(self.number, iova, piece, flags)
        self.pins.add(piece.size)
        if staging is not None:
            self.unstaged[iova] = piece.size

    def _map_peer(self, iova: int, piece: Piece, flags: int) -> None:
        try:
            fd, start = piece.memory.device.dma_buf(piece.memory, piece.offset)
            self.iommufd.map_file(self.number, iova, fd, start, piece.size, flags)
        except HostError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL, errno.ENODEV, errno.EOPNOTSUPP, errno.EBADF):
                raise UnsupportedError(
                    f"this kernel's iommufd cannot map a device's BAR ({error}): use backend='type1'", error.errno
                ) from error
            raise
        self.peers[iova] = piece.size

    def unmap(self, iova: int, size: int) -> int:
        """Take away whole mappings; the bytes removed."""
        removed = self.iommufd.unmap(self.number, iova, size)
        peers = drop_range(self.peers, iova, size) if self.peers else 0
        if self.staging() is None:
            self.pins.add(peers - removed)
        elif self.unstaged:
            self.pins.add(-drop_range(self.unstaged, iova, size))
        return removed

    def set_dirty(self, on: bool) -> None:
        """Switch hardware dirty tracking; switching on makes every page clean."""
        self.iommufd.call("IOMMU_HWPT_SET_DIRTY_TRACKING", "iommu_hwpt_set_dirty_tracking",
                          hwpt_id=self.table, flags=uapi.DIRTY_TRACKING_ENABLE if on else 0)  # fmt: skip

    def read_dirty(
        self, parts: list[tuple[int, int]], first: int, size: int, bitmap: Any, unit: int, flags: int
    ) -> int:
        """OR what hardware marked dirty into ``bitmap``, and clear it in the table unless flags say not to."""

        def ask(iova: int, length: int, words: Any) -> None:
            self.iommufd.call("IOMMU_HWPT_GET_DIRTY_BITMAP", "iommu_hwpt_get_dirty_bitmap", hwpt_id=self.table,
                              flags=flags & uapi.GET_DIRTY_NO_CLEAR, iova=iova, length=length, page_size=PAGE_SIZE,
                              data=address_of(words))  # fmt: skip

        return dirty.gather(parts, first, size, bitmap, unit, ask)

    def close(self) -> None:
        """Destroy the address space with every mapping in it. Devices must be detached before."""
        if self.closed:
            return
        self.closed = True
        with contextlib.suppress(DmakitError):
            self.iommufd.unmap(self.number, 0, _ALL)
        if self.table:
            self.iommufd.destroy(self.table)
        self.iommufd.destroy(self.number)
        self.pins.close()
