"""The fake host's type1 container."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Any

from tests.support.vfio.files import TOP, File, report_dirty
from tests.support.vfio.pages import PAGE, Area, Pages, Space, refuse

if TYPE_CHECKING:
    from tests.support.vfio.host import FakeHost
    from tests.support.vfio.opened import GroupFile


class ContainerFile(File):
    """/dev/vfio/vfio."""

    calls = {
        "VFIO_GET_API_VERSION": None,
        "VFIO_CHECK_EXTENSION": None,
        "VFIO_SET_IOMMU": None,
        "VFIO_IOMMU_GET_INFO": "vfio_iommu_type1_info",
        "VFIO_IOMMU_MAP_DMA": "vfio_iommu_type1_dma_map",
        "VFIO_IOMMU_UNMAP_DMA": "vfio_iommu_type1_dma_unmap",
        "VFIO_IOMMU_DIRTY_PAGES": "vfio_iommu_type1_dirty_bitmap",
    }

    def __init__(self, host: FakeHost) -> None:
        super().__init__(host)
        self.groups: list[GroupFile] = []
        self.space: Space | None = None
        self.limit = host.entry_limit

    def vfio_get_api_version(self, _: Any) -> int:
        return 0

    def vfio_check_extension(self, which: int) -> int:
        return int(which in (1, 3, 9))

    def vfio_set_iommu(self, which: int) -> None:
        if not self.groups:
            raise refuse(errno.ENODEV)
        if which != 3 or self.space is not None:
            raise refuse(errno.EINVAL)
        self.space = Space(self.host.ranges)
        self.space.add_table()

    def _set(self) -> Space:
        if self.space is None:
            raise refuse(errno.EINVAL)
        return self.space

    def vfio_iommu_get_info(self, f: Any, data: bytearray) -> None:
        space = self._set()
        f.flags, f.iova_pgsizes = 3, PAGE | 2 << 20 | 1 << 30
        spans = b"".join(struct.pack("=QQ", *span) for span in space.ranges)
        first = struct.pack("=HHIII", 1, 1, 24 + 16 + len(spans), len(space.ranges), 0) + spans
        caps = first + struct.pack("=HHII", 3, 1, 0, self.limit - len(space.areas))
        if f.argsz >= 24 + len(caps):
            f.cap_offset = 24
            data[24 : 24 + len(caps)] = caps
        else:
            f.cap_offset = 0
        f.argsz = 24 + len(caps) if f.argsz < 24 + len(caps) else f.argsz

    def vfio_iommu_map_dma(self, f: Any, _: Any) -> None:
        space = self._set()
        if f.flags & ~7 or not f.flags & 3 or f.size == 0 or (f.iova | f.vaddr | f.size) % PAGE:
            raise refuse(errno.EINVAL)
        if f.iova + f.size > TOP:
            raise refuse(errno.EOVERFLOW)
        if any(f.iova < area.end and area.iova < f.iova + f.size for area in space.areas.values()):
            raise refuse(errno.EEXIST)
        if len(space.areas) >= self.limit:
            raise refuse(errno.ENOSPC)
        space.check(f.iova, f.size)
        account = None if self.host.is_device_memory(f.vaddr) else self.host.account.process
        space.add(Area(f.iova, f.size, f.flags & 3, Pages(f.vaddr, f.size, account), 0))

    def vfio_iommu_unmap_dma(self, f: Any, _: Any) -> None:
        space = self._set()
        if f.flags & 2:
            found = list(space.areas.values())
        elif f.size == 0 or (f.iova | f.size) % PAGE:
            raise refuse(errno.EINVAL)
        else:
            found = space.inside(f.iova, f.size)
            if any(area.iova < f.iova or area.end > f.iova + f.size for area in found):
                raise refuse(errno.EINVAL)
        for area in found:
            space.drop(area)
        f.size = sum(area.size for area in found)

    def vfio_iommu_dirty_pages(self, f: Any, data: bytearray) -> None:
        space = self._set()
        if f.flags in (1, 2):
            space.tracking = f.flags == 1
            return
        if f.flags != 4 or not space.tracking:
            raise refuse(errno.EINVAL)
        iova, size, pgsize, room, address = struct.unpack_from("=QQQQQ", data, 8)
        if pgsize != PAGE or room < -(-size // PAGE // 64) * 8:
            raise refuse(errno.EINVAL)
        mapped = {page for area in space.areas.values() for page in range(area.iova // PAGE, area.end // PAGE)}
        report_dirty(mapped, iova, size, PAGE, address)

    def close(self) -> None:
        if self.space is not None:
            for area in list(self.space.areas.values()):
                self.space.drop(area)
