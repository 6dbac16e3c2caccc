"""One conversation with a kernel, ioctl by ioctl: the fake host and a real one must answer it alike.

``talk(kernel, backend, bdf)`` opens a device bound to vfio-pci by hand and returns (what was asked, answer) pairs: an
errno's name, or what came back. Only answers that do not depend on the machine are in it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import struct
from collections.abc import Callable
from typing import Any

from dmakit.errors import HostError
from dmakit.platform.linux import pci, uapi
from dmakit.platform.linux.irqs import listen, set_irqs
from dmakit.platform.linux.kernel import Kernel
from dmakit.platform.linux.uapi import LAYOUTS

PAGE = 4096
BASE = 0x1_0000_0000
ASK = uapi.SET_DATA_NONE | uapi.SET_TRIGGER
RW = uapi.MAP_FIXED_IOVA | uapi.MAP_READABLE | uapi.MAP_WRITEABLE
Answers = list[tuple[str, object]]


class Talk:
    """Collects the answers."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.answers: Answers = []

    def note(self, asked: str, call: Callable[[], Any]) -> Any:
        try:
            answer = call()
        except HostError as error:
            self.answers.append((asked, errno.errorcode[error.errno]))
            return None
        self.answers.append((asked, answer if isinstance(answer, (int, str, tuple)) else "ok"))
        return answer

    def struct(self, fd: int, name: str, layout: str, **values: Any) -> Any:
        data = LAYOUTS[layout].pack(**values)
        self.kernel.ioctl(fd, name, data)
        return LAYOUTS[layout].unpack(data)


def talk(kernel: Kernel, backend: str, bdf: str) -> Answers:
    """The whole conversation; everything is closed afterwards."""
    speaker = Talk(kernel)
    memory = mmap.mmap(-1, 16 * PAGE)
    va = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    opened: list[int] = []
    try:
        (_type1 if backend == "type1" else _iommufd)(speaker, bdf, va, opened)
    finally:
        for fd in reversed(opened):
            kernel.close(fd)
    return speaker.answers


def _type1(t: Talk, bdf: str, va: int, opened: list[int]) -> None:
    kernel, group_number = t.kernel, pci.find(t.kernel, bdf).group
    container = kernel.open("/dev/vfio/vfio")
    opened.append(container)
    t.note("version", lambda: kernel.ioctl(container, "VFIO_GET_API_VERSION"))
    t.note("type1v2", lambda: kernel.ioctl(container, "VFIO_CHECK_EXTENSION", uapi.TYPE1V2_IOMMU))
    t.note("map on an empty container", lambda: _map1(t, container, va, BASE, PAGE))
    group = kernel.open(f"/dev/vfio/{group_number}")
    opened.append(group)
    t.note("group twice", lambda: kernel.open(f"/dev/vfio/{group_number}"))
    status = "VFIO_GROUP_GET_STATUS", "vfio_group_status"
    t.note("viable", lambda: t.struct(group, *status).flags)
    t.note("device before container", lambda: _device(t, group, bdf))
    kernel.ioctl(group, "VFIO_GROUP_SET_CONTAINER", bytearray(container.to_bytes(4, "little")))
    t.note("in a container", lambda: t.struct(group, *status).flags)
    t.note("container twice", lambda: kernel.ioctl(group, "VFIO_GROUP_SET_CONTAINER",
                                                   bytearray(container.to_bytes(4, "little"))))  # fmt: skip
    kernel.ioctl(container, "VFIO_SET_IOMMU", uapi.TYPE1V2_IOMMU)
    t.note("no such device", lambda: _device(t, group, "0000:00:1e.7"))
    device = _device(t, group, bdf)
    opened.append(device)
    _maps1(t, container, va)
    _device_calls(t, device)


def _device(t: Talk, group: int, bdf: str) -> int:
    return t.kernel.ioctl(group, "VFIO_GROUP_GET_DEVICE_FD", bytearray(bdf.encode() + b"\0"))


def _map1(t: Talk, container: int, va: int, iova: int, size: int, flags: int = 3) -> Any:
    return t.struct(container, "VFIO_IOMMU_MAP_DMA", "vfio_iommu_type1_dma_map",
                    flags=flags, vaddr=va, iova=iova, size=size)  # fmt: skip


def _maps1(t: Talk, container: int, va: int) -> None:
    def unmap(iova: int, size: int, flags: int = 0) -> int:
        layout = "vfio_iommu_type1_dma_unmap"
        return int(t.struct(container, "VFIO_IOMMU_UNMAP_DMA", layout, flags=flags, iova=iova, size=size).size)

    t.note("map", lambda: _map1(t, container, va, BASE, 4 * PAGE))
    t.note("overlap", lambda: _map1(t, container, va, BASE + PAGE, PAGE))
    t.note("no protection", lambda: _map1(t, container, va, BASE + 8 * PAGE, PAGE, 0))
    t.note("unaligned iova", lambda: _map1(t, container, va, BASE + 8 * PAGE + 8, PAGE))
    t.note("unaligned size", lambda: _map1(t, container, va, BASE + 8 * PAGE, 100))
    t.note("size 0", lambda: _map1(t, container, va, BASE + 8 * PAGE, 0))
    t.note("unmap a part", lambda: unmap(BASE, PAGE))
    t.note("unmap nothing", lambda: unmap(BASE + 64 * PAGE, PAGE))
    t.note("map beside", lambda: _map1(t, container, va + 4 * PAGE, BASE + 4 * PAGE, PAGE, 1))
    t.note("unmap both", lambda: unmap(BASE, 5 * PAGE))
    t.note("map again", lambda: _map1(t, container, va, BASE, 2 * PAGE))
    t.note("bitmap before start", lambda: _bitmap(t, container, BASE, 2 * PAGE))
    t.note("start", lambda: t.struct(container, "VFIO_IOMMU_DIRTY_PAGES", "vfio_iommu_type1_dirty_bitmap", flags=1))
    t.note("bitmap", lambda: _bitmap(t, container, BASE, 2 * PAGE))
    t.note("stop", lambda: t.struct(container, "VFIO_IOMMU_DIRTY_PAGES", "vfio_iommu_type1_dirty_bitmap", flags=2))
    t.note("unmap all", lambda: unmap(0, 0, uapi.DMA_UNMAP_ALL))


def _bitmap(t: Talk, container: int, iova: int, size: int) -> int:
    words = bytearray(8)
    address = ctypes.addressof(ctypes.c_char.from_buffer(words))
    body = struct.pack("=QQQQQ", iova, size, PAGE, 8, address)
    data = LAYOUTS["vfio_iommu_type1_dirty_bitmap"].pack(body, flags=uapi.DIRTY_GET_BITMAP)
    t.kernel.ioctl(container, "VFIO_IOMMU_DIRTY_PAGES", data)
    return int.from_bytes(words, "little")


def _iommufd(t: Talk, bdf: str, va: int, opened: list[int]) -> None:
    kernel = t.kernel
    fd = kernel.open("/dev/iommu")
    opened.append(fd)
    cdev = pci.find(kernel, bdf).cdev
    device = kernel.open(cdev)
    opened.append(device)
    t.note("info before bind", lambda: t.struct(device, "VFIO_DEVICE_GET_INFO", "vfio_device_info"))
    bind = "VFIO_DEVICE_BIND_IOMMUFD", "vfio_device_bind_iommufd"
    t.note("bind to nothing", lambda: t.struct(device, *bind, iommufd=-1))
    number = t.struct(device, *bind, iommufd=fd).out_devid
    t.note("bind twice", lambda: t.struct(device, *bind, iommufd=fd))
    ioas = t.struct(fd, "IOMMU_IOAS_ALLOC", "iommu_ioas_alloc").out_ioas_id
    other = t.struct(fd, "IOMMU_IOAS_ALLOC", "iommu_ioas_alloc").out_ioas_id
    t.note("alloc with a flag", lambda: t.struct(fd, "IOMMU_IOAS_ALLOC", "iommu_ioas_alloc", flags=1))
    attach = "VFIO_DEVICE_ATTACH_IOMMUFD_PT", "vfio_device_attach_iommufd_pt"
    t.note("attach to nothing", lambda: t.struct(device, *attach, pt_id=9999))
    t.note("attach", lambda: t.struct(device, *attach, pt_id=ioas) and "ok")
    t.note("destroy in use", lambda: t.struct(fd, "IOMMU_DESTROY", "iommu_destroy", id=ioas))
    t.note("destroy nothing", lambda: t.struct(fd, "IOMMU_DESTROY", "iommu_destroy", id=9999))
    t.note("dirty tracking", lambda: t.struct(fd, "IOMMU_HWPT_ALLOC", "iommu_hwpt_alloc", dev_id=number, pt_id=ioas,
                                              flags=uapi.HWPT_ALLOC_DIRTY_TRACKING))  # fmt: skip
    _maps2(t, fd, ioas, other, va)
    _device_calls(t, device)


def _maps2(t: Talk, fd: int, ioas: int, other: int, va: int) -> None:
    def map_(iova: int, size: int, flags: int = RW, number: int = ioas, at: int = va) -> Any:
        return t.struct(fd, "IOMMU_IOAS_MAP", "iommu_ioas_map",
                        flags=flags, ioas_id=number, user_va=at, length=size, iova=iova)  # fmt: skip

    def unmap(iova: int, size: int) -> int:
        layout = "iommu_ioas_unmap"
        return int(t.struct(fd, "IOMMU_IOAS_UNMAP", layout, ioas_id=ioas, iova=iova, length=size).length)

    def copy(source_iova: int, size: int, iova: int, flags: int = RW) -> Any:
        return t.struct(fd, "IOMMU_IOAS_COPY", "iommu_ioas_copy", flags=flags, dst_ioas_id=ioas, src_ioas_id=other,
                        length=size, dst_iova=iova, src_iova=source_iova)  # fmt: skip

    t.note("map", lambda: map_(BASE, 4 * PAGE))
    t.note("overlap", lambda: map_(BASE + PAGE, PAGE))
    t.note("no protection", lambda: map_(BASE + 8 * PAGE, PAGE, uapi.MAP_FIXED_IOVA))
    t.note("unknown flag", lambda: map_(BASE + 8 * PAGE, PAGE, RW | 64))
    t.note("unaligned iova", lambda: map_(BASE + 8 * PAGE + 8, PAGE))
    t.note("unknown ioas", lambda: map_(BASE + 8 * PAGE, PAGE, number=9999))
    t.note("MSI window", lambda: map_(0xFEE00000, PAGE))
    t.note("unmap a part", lambda: unmap(BASE, PAGE))
    t.note("unmap nothing", lambda: unmap(BASE + 64 * PAGE, PAGE))
    t.note("unmap length 0", lambda: unmap(BASE, 0))
    t.note("map in the other", lambda: map_(0x10000, 2 * PAGE, number=other))
    t.note("map behind it", lambda: map_(0x10000 + 2 * PAGE, 2 * PAGE, number=other, at=va + 2 * PAGE))
    t.note("copy across both", lambda: copy(0x10000 + PAGE, 2 * PAGE, BASE + 16 * PAGE))
    t.note("copy over it", lambda: copy(0x10000, PAGE, BASE + 16 * PAGE))
    t.note("copy a hole", lambda: copy(0x10000 + 3 * PAGE, 2 * PAGE, BASE + 32 * PAGE))
    t.note("unmap the copy", lambda: unmap(BASE + 16 * PAGE, 2 * PAGE))
    t.note("unmap all", lambda: unmap(0, (1 << 64) - 1))
    t.note("unmap all again", lambda: unmap(0, (1 << 64) - 1))


def _device_calls(t: Talk, device: int) -> None:
    """What every PCI function answers alike."""
    t.note("regions, interrupts", lambda: _info(t, device))
    t.note("region 7 is there", lambda: int(_region(t, device, 7).size > 0))
    t.note("region 99", lambda: _region(t, device, 99))
    t.note("interrupt index 99", lambda: t.struct(device, "VFIO_DEVICE_GET_IRQ_INFO", "vfio_irq_info", index=99))
    t.note("intx", lambda: t.struct(device, "VFIO_DEVICE_GET_IRQ_INFO", "vfio_irq_info", index=0).flags & 7)
    t.note("too many vectors", lambda: _set_irqs(t, device, 64))
    t.note("switch msi off", lambda: _set_irqs(t, device, 0))
    t.note("error index", lambda: t.struct(device, "VFIO_DEVICE_GET_IRQ_INFO", "vfio_irq_info", index=3))
    t.note("request index", lambda: _irq(t, device, 4))
    t.note("request, nobody listens", lambda: set_irqs(t.kernel, device, 4, ASK, 0, 1))
    heard = t.kernel.eventfd()
    t.note("listen", lambda: listen(t.kernel, device, 4, [heard]))
    t.note("request", lambda: set_irqs(t.kernel, device, 4, ASK, 0, 1))
    t.note("heard", lambda: t.kernel.take_events(heard, 0))
    t.note("listen no more", lambda: set_irqs(t.kernel, device, 4, ASK, 0, 0))
    t.note("request, nobody listens now", lambda: set_irqs(t.kernel, device, 4, ASK, 0, 1))
    t.kernel.close(heard)


def _irq(t: Talk, device: int, index: int) -> tuple[int, int]:
    info = t.struct(device, "VFIO_DEVICE_GET_IRQ_INFO", "vfio_irq_info", index=index)
    return info.count, info.flags


def _info(t: Talk, device: int) -> tuple[int, int]:
    info = t.struct(device, "VFIO_DEVICE_GET_INFO", "vfio_device_info")
    return info.num_regions, info.num_irqs


def _region(t: Talk, device: int, index: int) -> Any:
    return t.struct(device, "VFIO_DEVICE_GET_REGION_INFO", "vfio_region_info", index=index)


def _set_irqs(t: Talk, device: int, count: int) -> Any:
    flags = uapi.SET_TRIGGER | (uapi.SET_DATA_EVENTFD if count else uapi.SET_DATA_NONE)
    data = LAYOUTS["vfio_irq_set"].pack(bytes(4 * count), flags=flags, index=uapi.IRQ_MSI, count=count)
    return t.kernel.ioctl(device, "VFIO_DEVICE_SET_IRQS", data)
