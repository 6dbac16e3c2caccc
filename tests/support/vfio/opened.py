"""The fake host's groups and devices, opened."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Any

from dmakit.platform.linux.uapi import IOCTLS
from tests.support.vfio.container import ContainerFile
from tests.support.vfio.files import DmaBuf, File, IommuFile, Table
from tests.support.vfio.pages import PAGE, Space, refuse

if TYPE_CHECKING:
    from tests.support.vfio.devices import FakeDevice
    from tests.support.vfio.host import FakeHost


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
        if self.container is None or self.container.space is None:
            raise refuse(errno.EINVAL)
        if device is None or device.group != self.number:
            raise refuse(errno.ENODEV)
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
        if f.index > 4 or (f.index == 3 and 3 not in self.device.vectors):
            raise refuse(errno.EINVAL)
        f.count = self.device.vectors.get(f.index, 0)
        f.flags = 1 | (6 if f.index == 0 else 8)

    def vfio_device_set_irqs(self, f: Any, data: bytearray) -> None:
        there = self.device.vectors.get(f.index, 0)
        if f.flags & 56 == 32 and f.flags & 1 and f.count == 0:
            if f.index not in self.device.eventfds:
                raise refuse(errno.EINVAL)
            self.device.deafen(f.index)
            return
        if f.start + f.count > there or f.count == 0:
            raise refuse(errno.EINVAL)
        if f.index > 2 and f.flags & 1:
            if not self.device.notify(f.index):
                raise refuse(errno.EINVAL)
            return
        if f.flags & 4:
            fds = struct.unpack_from(f"={f.count}i", data, 20)
            if f.index <= 2 and any(other != f.index and other <= 2 for other in self.device.eventfds):
                raise refuse(errno.EINVAL)
            self.device.deafen(f.index)
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
