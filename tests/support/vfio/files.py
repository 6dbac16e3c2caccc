"""The files of the fake host: what they share, and iommufd. Each answers the ioctl numbers of its own kind only."""

from __future__ import annotations

import ctypes
import errno
import struct
from typing import TYPE_CHECKING, Any

from dmakit.platform.linux.uapi import IOCTLS, LAYOUTS
from tests.support.vfio.pages import PAGE, Area, Pages, Space, map_file, refuse

if TYPE_CHECKING:
    from tests.support.vfio.devices import FakeDevice
    from tests.support.vfio.host import FakeHost

TOP = (1 << 64) - 1


class File:
    """One open file; ``handlers``: ioctl number to (method, structure)."""

    calls: dict[str, str | None] = {}

    def __init__(self, host: FakeHost) -> None:
        self.host = host
        self.references = 1
        self.handlers = {IOCTLS[name]: (getattr(self, name.lower()), layout) for name, layout in self.calls.items()}

    def ioctl(self, number: int, data: Any) -> int:
        if number not in self.handlers:
            raise refuse(errno.ENOTTY)
        method, layout = self.handlers[number]
        if layout is None:
            return int(method(data) or 0)
        shape = LAYOUTS[layout]
        if len(data) < shape.size:
            raise refuse(errno.EINVAL)
        fields = shape.unpack(data)
        try:
            return int(method(fields, data) or 0)
        finally:
            data[: shape.size] = shape.pack(**vars(fields))

    def hold(self) -> None:
        self.references += 1

    def release(self) -> None:
        """A descriptor, or another file that needs this one, is gone."""
        self.references -= 1
        if self.references == 0:
            self.close()

    def close(self) -> None:
        """The last reference is gone."""


class IommuFile(File):
    """/dev/iommu."""

    calls = {
        "IOMMU_DESTROY": "iommu_destroy",
        "IOMMU_IOAS_ALLOC": "iommu_ioas_alloc",
        "IOMMU_IOAS_IOVA_RANGES": "iommu_ioas_iova_ranges",
        "IOMMU_IOAS_MAP": "iommu_ioas_map",
        "IOMMU_IOAS_MAP_FILE": "iommu_ioas_map_file",
        "IOMMU_IOAS_COPY": "iommu_ioas_copy",
        "IOMMU_IOAS_UNMAP": "iommu_ioas_unmap",
        "IOMMU_HWPT_ALLOC": "iommu_hwpt_alloc",
        "IOMMU_GET_HW_INFO": "iommu_hw_info",
        "IOMMU_HWPT_SET_DIRTY_TRACKING": "iommu_hwpt_set_dirty_tracking",
        "IOMMU_HWPT_GET_DIRTY_BITMAP": "iommu_hwpt_get_dirty_bitmap",
    }

    def __init__(self, host: FakeHost) -> None:
        super().__init__(host)
        self.objects: dict[int, Any] = {}

    def new(self, thing: Any) -> int:
        number = next(n for n in range(1, 1 << 20) if n not in self.objects)
        self.objects[number] = thing
        return number

    def space(self, number: int) -> Space:
        found = self.objects.get(number)
        if not isinstance(found, Space):
            raise refuse(errno.ENOENT)
        return found

    def iommu_destroy(self, f: Any, _: Any) -> None:
        thing = self.objects.get(f.id)
        if thing is None:
            raise refuse(errno.ENOENT)
        if isinstance(thing, Space):
            if thing.tables:
                raise refuse(errno.EBUSY)
            for area in list(thing.areas.values()):
                thing.drop(area)
        elif isinstance(thing, Table):
            if thing.devices:
                raise refuse(errno.EBUSY)
            thing.space.drop_table()
        else:
            raise refuse(errno.EBUSY)
        del self.objects[f.id]

    def iommu_ioas_alloc(self, f: Any, _: Any) -> None:
        if f.flags:
            raise refuse(errno.EOPNOTSUPP)
        f.out_ioas_id = self.new(Space([(0, TOP)]))

    def iommu_ioas_iova_ranges(self, f: Any, _: Any) -> None:
        ranges = self.space(f.ioas_id).ranges
        for i, (first, last) in enumerate(ranges[: f.num_iovas]):
            ctypes.memmove(f.allowed_iovas + 16 * i, struct.pack("=QQ", first, last), 16)
        short = f.num_iovas < len(ranges)
        f.num_iovas, f.out_iova_alignment = len(ranges), PAGE
        if short:
            raise refuse(errno.EMSGSIZE)

    def _map(self, ioas: int, flags: int, iova: int, length: int, pages: Pages) -> None:
        if flags & ~7:
            raise refuse(errno.EOPNOTSUPP)
        if not flags & 6 or not flags & 1:
            raise refuse(errno.EINVAL)
        if iova + length > TOP or length > TOP:
            raise refuse(errno.EOVERFLOW)
        space = self.space(ioas)
        space.check(iova, length)
        space.add(Area(iova, length, (1 if flags & 4 else 0) | (2 if flags & 2 else 0), pages, 0))

    def iommu_ioas_map(self, f: Any, _: Any) -> None:
        if vars(f)["__reserved"]:
            raise refuse(errno.EOPNOTSUPP)
        self._map(f.ioas_id, f.flags, f.iova, f.length, Pages(f.user_va, f.length, self.host.account.user))

    def iommu_ioas_map_file(self, f: Any, _: Any) -> None:
        if not self.host.maps_files:
            raise refuse(errno.ENOTTY)
        buf = self.host.open_files.get(f.fd)
        if isinstance(buf, DmaBuf):
            pages = Pages(buf.va + f.start, f.length, None)
            if f.start + f.length > buf.size:
                raise refuse(errno.EINVAL)
        else:
            pages = map_file(f.fd, f.start, f.length, self.host.account.user)
        self._map(f.ioas_id, f.flags, f.iova, f.length, pages)

    def iommu_ioas_copy(self, f: Any, _: Any) -> None:
        source, target = self.space(f.src_ioas_id), self.space(f.dst_ioas_id)
        areas = source.inside(f.src_iova, f.length)
        at = f.src_iova
        for area in areas:
            if area.iova > at:
                raise refuse(errno.ENOENT)
            at = area.end
        if at < f.src_iova + f.length:
            raise refuse(errno.ENOENT)
        target.check(f.dst_iova, f.length)
        prot = (1 if f.flags & 4 else 0) | (2 if f.flags & 2 else 0)
        made: list[Area] = []
        for area in areas:
            low, high = max(area.iova, f.src_iova), min(area.end, f.src_iova + f.length)
            made.append(
                Area(f.dst_iova + low - f.src_iova, high - low, prot, area.pages, area.offset + low - area.iova)
            )
            target.add(made[-1])

    def iommu_ioas_unmap(self, f: Any, _: Any) -> None:
        space = self.space(f.ioas_id)
        everything = f.iova == 0 and f.length == TOP
        if f.length == 0:
            raise refuse(errno.EINVAL)
        found = list(space.areas.values()) if everything else space.inside(f.iova, f.length)
        if not found and not everything:
            raise refuse(errno.ENOENT)
        done = 0
        for area in found:
            if not everything and (area.iova < f.iova or area.end > f.iova + f.length):
                raise refuse(errno.ENOENT)
            space.drop(area)
            done += area.size
        f.length = done

    def iommu_hwpt_alloc(self, f: Any, _: Any) -> None:
        device = self.objects.get(f.dev_id)
        if device is None:
            raise refuse(errno.ENOENT)
        if f.flags & 2 and not self.host.dirty:
            raise refuse(errno.EOPNOTSUPP)
        if not self.host.extra_tables and not f.flags & 2:
            raise refuse(errno.EOPNOTSUPP)
        space = self.space(f.pt_id)
        space.add_table()
        f.out_hwpt_id = self.new(Table(space))

    def iommu_get_hw_info(self, f: Any, _: Any) -> None:
        if f.dev_id not in self.objects:
            raise refuse(errno.ENOENT)
        f.out_capabilities = 1 if self.host.dirty else 0

    def _table(self, number: int) -> Table:
        found = self.objects.get(number)
        if not isinstance(found, Table):
            raise refuse(errno.ENOENT)
        return found

    def iommu_hwpt_set_dirty_tracking(self, f: Any, _: Any) -> None:
        space = self._table(f.hwpt_id).space
        space.tracking = bool(f.flags & 1)
        space.dirty.clear()

    def iommu_hwpt_get_dirty_bitmap(self, f: Any, _: Any) -> None:
        space = self._table(f.hwpt_id).space
        if not f.page_size or (f.iova | f.length) % f.page_size:
            raise refuse(errno.EINVAL)
        report_dirty(space.dirty, f.iova, f.length, f.page_size, f.data)
        if not f.flags & 1:
            space.dirty -= set(range(f.iova // PAGE, (f.iova + f.length) // PAGE))

    def close(self) -> None:
        for thing in self.objects.values():
            if isinstance(thing, Table):
                thing.space.drop_table()
        for thing in self.objects.values():
            if isinstance(thing, Space):
                for area in list(thing.areas.values()):
                    thing.drop(area)
        self.objects.clear()


def report_dirty(dirty: set[int], iova: int, length: int, page: int, address: int) -> None:
    """OR the bits of the dirty pages into a bitmap at ``address``."""
    for number in range(length // page):
        if any((iova + number * page) // PAGE + i in dirty for i in range(page // PAGE)):
            byte = ctypes.c_uint8.from_address(address + number // 8)
            byte.value |= 1 << number % 8


class Table:
    """A hardware page table that follows a space."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.devices: list[FakeDevice] = []


class DmaBuf(File):
    """A dma-buf of device memory."""

    def __init__(self, host: FakeHost, va: int, size: int) -> None:
        super().__init__(host)
        self.va, self.size = va, size
