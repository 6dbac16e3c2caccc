"""The files of the fake host: iommufd, container, group, device. Each answers the ioctl numbers of its own kind."""

from __future__ import annotations

import ctypes
import errno
import os
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
        self._map(f.ioas_id, f.flags, f.iova, f.length, Pages(f.user_va, f.length, self.host.account))

    def iommu_ioas_map_file(self, f: Any, _: Any) -> None:
        if not self.host.maps_files:
            raise refuse(errno.ENOTTY)
        buf = self.host.open_files.get(f.fd)
        if isinstance(buf, DmaBuf):
            pages = Pages(buf.va + f.start, f.length, None)
            if f.start + f.length > buf.size:
                raise refuse(errno.EINVAL)
        else:
            pages = map_file(f.fd, f.start, f.length, self.host.account)
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
        f.flags, f.iova_pgsizes = 3, PAGE
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
        account = None if self.host.is_device_memory(f.vaddr) else self.host.account
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


class GroupFile(File):
    """/dev/vfio/N."""

    calls = {
        "VFIO_GROUP_GET_STATUS": "vfio_group_status",
        "VFIO_GROUP_SET_CONTAINER": None,
        "VFIO_GROUP_GET_DEVICE_FD": None,
    }

    def __init__(self, host: FakeHost, number: int) -> None:
        super().__init__(host)
        self.number = number
        self.container: ContainerFile | None = None

    def vfio_group_get_status(self, f: Any, _: Any) -> None:
        f.flags = (1 if self.host.viable(self.number) else 0) | (2 if self.container else 0)

    def vfio_group_set_container(self, data: bytearray) -> None:
        found = self.host.open_files.get(int.from_bytes(data[:4], "little"))
        if not isinstance(found, ContainerFile) or self.container is not None:
            raise refuse(errno.EINVAL)
        if not self.host.viable(self.number):
            raise refuse(errno.EPERM)
        self.container = found
        found.groups.append(self)
        found.hold()

    def vfio_group_get_device_fd(self, data: bytearray) -> int:
        name = bytes(data).rstrip(b"\0").decode()
        device = self.host.devices.get(name)
        if device is None or device.group != self.number or self.container is None or self.container.space is None:
            raise refuse(errno.EINVAL)
        opened = DeviceFile(self.host, device)
        opened.open(self.container.space)
        opened.group = self
        self.hold()
        return self.host.new_fd(opened)

    def close(self) -> None:
        if self.container is not None:
            self.container.groups.remove(self)
            self.container.release()


class DeviceFile(File):
    """A device: from its group, or its own character device."""

    calls = {
        "VFIO_DEVICE_GET_INFO": "vfio_device_info",
        "VFIO_DEVICE_GET_REGION_INFO": "vfio_region_info",
        "VFIO_DEVICE_GET_IRQ_INFO": "vfio_irq_info",
        "VFIO_DEVICE_SET_IRQS": "vfio_irq_set",
        "VFIO_DEVICE_RESET": None,
        "VFIO_DEVICE_FEATURE": "vfio_device_feature",
        "VFIO_DEVICE_BIND_IOMMUFD": "vfio_device_bind_iommufd",
        "VFIO_DEVICE_ATTACH_IOMMUFD_PT": "vfio_device_attach_iommufd_pt",
        "VFIO_DEVICE_DETACH_IOMMUFD_PT": "vfio_device_detach_iommufd_pt",
    }

    def __init__(self, host: FakeHost, device: FakeDevice, *, cdev: bool = False) -> None:
        super().__init__(host)
        self.device = device
        self.cdev = cdev
        self.group: GroupFile | None = None
        self.iommufd: IommuFile | None = None
        self.number = 0
        self.table: Table | None = None
        self.own_table = 0
        if cdev:
            del self.handlers[IOCTLS["VFIO_DEVICE_RESET"]]

    def ioctl(self, number: int, data: Any) -> int:
        if self.cdev and self.iommufd is None and number != IOCTLS["VFIO_DEVICE_BIND_IOMMUFD"]:
            raise refuse(errno.EINVAL)
        return super().ioctl(number, data)

    def open(self, space: Space | None) -> None:
        if self.device.opened:
            raise refuse(errno.EBUSY)
        self.device.opened = True
        self.device.space = space
        self.device.enable()

    def vfio_device_bind_iommufd(self, f: Any, _: Any) -> None:
        found = self.host.open_files.get(f.iommufd)
        if not self.cdev or self.iommufd is not None or not isinstance(found, IommuFile):
            raise refuse(errno.EINVAL)
        self.open(None)
        self.iommufd = found
        found.hold()
        self.handlers[IOCTLS["VFIO_DEVICE_RESET"]] = (self.vfio_device_reset, None)
        f.out_devid = self.number = found.new(self.device)

    def vfio_device_attach_iommufd_pt(self, f: Any, _: Any) -> None:
        if self.iommufd is None:
            raise refuse(errno.EINVAL)
        target = self.iommufd.objects.get(f.pt_id)
        if isinstance(target, Space):
            target.add_table()
            table = Table(target)
            self.own_table = f.pt_id = self.iommufd.new(table)
        elif isinstance(target, Table):
            table = target
        else:
            raise refuse(errno.ENOENT)
        if any(
            not any(low <= area.iova and area.end - 1 <= high for low, high in self.host.ranges)
            for area in table.space.areas.values()
        ):
            raise refuse(errno.EADDRINUSE)
        table.space.ranges = self.host.ranges
        table.devices.append(self.device)
        self.table, self.device.space = table, table.space

    def vfio_device_detach_iommufd_pt(self, f: Any, _: Any) -> None:
        self._detach()

    def _detach(self) -> None:
        if self.table is not None and self.iommufd is not None:
            self.table.devices.remove(self.device)
            if self.own_table:
                self.table.space.drop_table()
                self.iommufd.objects.pop(self.own_table, None)
                self.own_table = 0
        self.table = self.device.space = None

    def vfio_device_get_info(self, f: Any, _: Any) -> None:
        f.flags, f.num_regions, f.num_irqs = 3 if self.device.resets else 2, 9, 5

    def vfio_device_get_region_info(self, f: Any, data: bytearray) -> None:
        region = self.device.regions.get(f.index)
        if f.index > 8:
            raise refuse(errno.EINVAL)
        f.size = f.flags = 0
        f.offset = f.index << 40
        if region is None:
            return
        f.size, f.flags = region.size, 3 | (4 if region.fd >= 0 else 0)
        if region.areas:
            caps = struct.pack("=HHIII", 1, 1, 0, len(region.areas), 0)
            caps += b"".join(struct.pack("=QQ", *area) for area in region.areas)
            f.flags |= 8
            f.cap_offset = 32 if f.argsz >= 32 + len(caps) else 0
            if f.cap_offset:
                data[32 : 32 + len(caps)] = caps
            else:
                f.argsz = 32 + len(caps)

    def vfio_device_get_irq_info(self, f: Any, _: Any) -> None:
        if f.index > 4:
            raise refuse(errno.EINVAL)
        f.count = self.device.vectors.get(f.index, 0)
        f.flags = 1 | (6 if f.index == 0 else 8)

    def vfio_device_set_irqs(self, f: Any, data: bytearray) -> None:
        there = self.device.vectors.get(f.index, 0)
        if f.flags & 56 == 32 and f.flags & 1 and f.count == 0:
            self.device.deafen(f.index)
            return
        if f.start + f.count > there or f.count == 0:
            raise refuse(errno.EINVAL)
        if f.flags & 4:
            fds = struct.unpack_from(f"={f.count}i", data, 20)
            if any(other != f.index for other in self.device.eventfds):
                raise refuse(errno.EINVAL)
            self.device.eventfds[f.index] = {f.start + i: os.dup(fd) for i, fd in enumerate(fds)}
        elif f.flags & 16:
            self.device.masked = False
            self.device.relevel()

    def vfio_device_reset(self, _: Any) -> None:
        if not self.device.resets:
            raise refuse(errno.ENOTTY)
        self.device.reset()

    def vfio_device_feature(self, f: Any, data: bytearray) -> int:
        if f.flags & 0xFFFF != 11 or not self.host.dma_bufs:
            raise refuse(errno.ENOTTY)
        index, _, _, count, offset, length = struct.unpack_from("=IIIIQQ", data, 8)
        region = self.device.regions.get(index)
        if region is None or region.fd < 0 or count != 1 or (offset | length) % PAGE:
            raise refuse(errno.EINVAL)
        return self.host.new_fd(DmaBuf(self.host, region.va + offset, length))

    def close(self) -> None:
        self._detach()
        if self.iommufd is not None:
            self.iommufd.objects.pop(self.number, None)
        if self.cdev and self.iommufd is None:
            return
        self.device.disable()
        self.device.space = None
        self.device.opened = False
        for owner in (self.iommufd, self.group):
            if owner is not None:
                owner.release()
