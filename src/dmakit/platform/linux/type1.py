"""VFIO's older interface: a container with the type1 IOMMU driver, into which whole groups of devices go.

``/dev/vfio/vfio`` opened is a *container*, an I/O address space; ``/dev/vfio/N`` is a *group*: all devices that the
IOMMU cannot tell apart. A group joins one container, the first group brings the IOMMU driver in (TYPE1v2: a mapping
goes as a whole), and the group gives out the file of a device. Mapping is by this process's virtual address and pins
the memory each time: two mappings of one page are charged twice.

A container holds at most 65,535 mappings (``dma_entry_limit``); the kernel says how many are left (DMA_AVAIL), and this
module counts along, so that the caller learns it from us, before the kernel's ENOSPC.

Dirty pages: the container can only say "everything that is mapped" for devices like ours, and does (``dirty_source``
= pinned). Models ``drivers/vfio/vfio_iommu_type1.c``, ``container.c``, ``group.c``.
"""

from __future__ import annotations

import errno
from typing import Any

from dmakit.consts import PAGE_SIZE, PROT_READ, PROT_WRITE
from dmakit.errors import ExhaustedError, MisuseError, UnsupportedError
from dmakit.platform.linux import dirty, uapi
from dmakit.platform.linux.kernel import Kernel, address_of, host_error
from dmakit.platform.linux.limits import PinLedger, Pins
from dmakit.platform.linux.space import Piece
from dmakit.platform.linux.uapi import LAYOUTS

CONTAINER = "/dev/vfio/vfio"
_MAP, _UNMAP = LAYOUTS["vfio_iommu_type1_dma_map"], LAYOUTS["vfio_iommu_type1_dma_unmap"]
_REMOVED = _UNMAP.offsets["size"]


class Type1Container:
    """One container: a backend of ``HostDomain``.

    ``left``: at least so many mappings fit in still (None: unknown); the kernel is asked again when it reaches 0."""

    name = "type1"
    dirty = True
    dirty_source = "pinned"

    def __init__(self, kernel: Kernel, pins: PinLedger) -> None:
        self.kernel = kernel
        self.pins = Pins(pins)
        self.fd = kernel.open(CONTAINER)
        self.groups: dict[int, int] = {}
        self.left: int | None = None
        self.limit: int | None = None
        self.page_sizes = PAGE_SIZE
        self.peers: dict[int, int] = {}
        self.closed = False

    # Groups and devices --------------------------------------------------------------------------------------

    def add_group(self, number: int) -> None:
        """Bring group ``number`` in; the first one decides the IOMMU driver."""
        if number in self.groups:
            return
        group = self.kernel.open(f"/dev/vfio/{number}")
        try:
            self._join(group, number)
        except BaseException:
            self.kernel.close(group)
            raise
        self.groups[number] = group
        self._refresh()

    def _join(self, group: int, number: int) -> None:
        data = LAYOUTS["vfio_group_status"].pack()
        self.kernel.ioctl(group, "VFIO_GROUP_GET_STATUS", data)
        if not LAYOUTS["vfio_group_status"].unpack(data).flags & uapi.GROUP_VIABLE:
            raise host_error("VFIO_GROUP_GET_STATUS", errno.EPERM, f"(group {number} is not viable: every device of the"
                             " group must be bound to vfio-pci or to no driver; see: dmakit vfio list)")  # fmt: skip
        self.kernel.ioctl(group, "VFIO_GROUP_SET_CONTAINER", bytearray(self.fd.to_bytes(4, "little")))
        if not self.groups:
            if not self.kernel.ioctl(self.fd, "VFIO_CHECK_EXTENSION", uapi.TYPE1V2_IOMMU):
                raise UnsupportedError("this kernel's VFIO has no type1v2 IOMMU driver: load vfio_iommu_type1")
            self.kernel.ioctl(self.fd, "VFIO_SET_IOMMU", uapi.TYPE1V2_IOMMU)

    def open_device(self, group: int, bdf: str) -> int:
        """The file of a device of a group that is in this container."""
        return self.kernel.ioctl(self.groups[group], "VFIO_GROUP_GET_DEVICE_FD", bytearray(bdf.encode() + b"\0"))

    # Backend -------------------------------------------------------------------------------------------------

    def _info(self) -> tuple[Any, bytearray]:
        layout = LAYOUTS["vfio_iommu_type1_info"]
        data = layout.pack()
        self.kernel.ioctl(self.fd, "VFIO_IOMMU_GET_INFO", data)
        needed = layout.unpack(data).argsz
        if needed > layout.size:
            data = layout.pack(bytes(needed - layout.size))
            self.kernel.ioctl(self.fd, "VFIO_IOMMU_GET_INFO", data)
        return layout.unpack(data), data

    def _refresh(self) -> list[tuple[int, int]]:
        info, data = self._info()
        self.page_sizes = info.iova_pgsizes
        chain = uapi.capabilities(data, info.cap_offset if info.flags & uapi.INFO_CAPS else 0)
        if uapi.CAP_DMA_AVAIL in chain:
            self.left = LAYOUTS["vfio_iommu_type1_info_dma_avail"].unpack(data, chain[uapi.CAP_DMA_AVAIL]).avail
            self.limit = self.left if self.limit is None else self.limit
        if uapi.CAP_IOVA_RANGE not in chain:
            return [(0, (1 << 39) - 1)]
        at = chain[uapi.CAP_IOVA_RANGE]
        count = int.from_bytes(data[at + 8 : at + 12], "little")
        layout = LAYOUTS["vfio_iova_range"]
        spans = [layout.unpack(data, at + 16 + i * layout.size) for i in range(count)]
        return sorted((span.start, span.end) for span in spans)

    def ranges(self) -> list[tuple[int, int]]:
        """IOVAs that may be mapped, as (first, last), ascending."""
        return self._refresh()

    def map(self, iova: int, piece: Piece, prot: int) -> None:
        """One mapping of a piece, pinned."""
        if self.left == 0:
            self._refresh()
        if self.left == 0:
            raise ExhaustedError(
                f"VFIO_IOMMU_MAP_DMA: the container holds {self.limit} mappings, its limit: raise dma_entry_limit of"
                " vfio_iommu_type1, or map larger pieces once (premapped buffers)",
                errno.ENOSPC,
            )
        if prot & PROT_WRITE and piece.memory.readonly:
            raise MisuseError("a device may not write to memory that is read-only for this process", errno.EFAULT)
        peer = piece.memory.kind == "bar"
        if not peer:
            self.pins.check(piece.size, "VFIO_IOMMU_MAP_DMA")
        flags = (uapi.DMA_MAP_READ if prot & PROT_READ else 0) | (uapi.DMA_MAP_WRITE if prot & PROT_WRITE else 0)
        self.kernel.ioctl(self.fd, "VFIO_IOMMU_MAP_DMA", _MAP.row(flags, piece.va, iova, piece.size))
        if self.left is not None:
            self.left -= 1
        if peer:
            self.peers[iova] = piece.size
        else:
            self.pins.add(piece.size)

    def unmap(self, iova: int, size: int) -> int:
        """Take away the mappings of [iova, iova + size), which must cut none; the bytes removed."""
        data = _UNMAP.row(0, iova, size)
        self.kernel.ioctl(self.fd, "VFIO_IOMMU_UNMAP_DMA", data)
        removed = int.from_bytes(data[_REMOVED : _REMOVED + 8], "little")
        self.pins.add((drop_range(self.peers, iova, size) if self.peers else 0) - removed)
        return removed

    # Dirty pages ---------------------------------------------------------------------------------------------

    def set_dirty(self, on: bool) -> None:
        """Start or stop logging; at a start every pinned page is dirty."""
        flags = uapi.DIRTY_START if on else uapi.DIRTY_STOP
        self.kernel.ioctl(self.fd, "VFIO_IOMMU_DIRTY_PAGES", LAYOUTS["vfio_iommu_type1_dirty_bitmap"].pack(flags=flags))

    def read_dirty(
        self, parts: list[tuple[int, int]], first: int, size: int, bitmap: Any, unit: int, flags: int
    ) -> int:
        """OR what the container calls dirty into ``bitmap``; it clears nothing that is still pinned."""
        return dirty.gather(parts, first, size, bitmap, unit, self._ask_dirty)

    def _ask_dirty(self, iova: int, size: int, words: Any) -> None:
        inner = LAYOUTS["vfio_bitmap"].pack(pgsize=PAGE_SIZE, size=words.nbytes, data=address_of(words))
        get = LAYOUTS["vfio_iommu_type1_dirty_bitmap_get"].pack(iova=iova, size=size, bitmap=bytes(inner))
        data = LAYOUTS["vfio_iommu_type1_dirty_bitmap"].pack(bytes(get), flags=uapi.DIRTY_GET_BITMAP)
        self.kernel.ioctl(self.fd, "VFIO_IOMMU_DIRTY_PAGES", data)

    def close(self) -> None:
        """Close groups and container: the kernel drops every mapping with it. Devices must be closed before."""
        if self.closed:
            return
        self.closed = True
        for group in self.groups.values():
            self.kernel.close(group)
        self.kernel.close(self.fd)
        self.pins.close()


def drop_range(noted: dict[int, int], iova: int, size: int) -> int:
    """Bytes of the mappings (IOVA to size) that lie in [iova, iova + size); they are forgotten."""
    return sum(noted.pop(at) for at in [at for at in noted if iova <= at < iova + size])
