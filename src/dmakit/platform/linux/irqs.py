"""The two calls about a device's interrupt indices: what there is, and who listens.

Source: ``include/uapi/linux/vfio.h`` (vfio_irq_info, vfio_irq_set).
"""

from __future__ import annotations

import errno
import struct

from dmakit.errors import DmakitError
from dmakit.platform.linux import uapi
from dmakit.platform.linux.kernel import Kernel
from dmakit.platform.linux.uapi import LAYOUTS

INDICES = {
    "intx": uapi.IRQ_INTX,
    "msi": uapi.IRQ_MSI,
    "msix": uapi.IRQ_MSIX,
    "err": uapi.IRQ_ERR,
    "req": uapi.IRQ_REQ,
}


def vectors(kernel: Kernel, device: int, index: int) -> tuple[int, int]:
    """(vectors, flags) of an interrupt index; (0, 0) when the device has none of that kind."""
    data = LAYOUTS["vfio_irq_info"].pack(index=index)
    try:
        kernel.ioctl(device, "VFIO_DEVICE_GET_IRQ_INFO", data)
    except DmakitError as error:
        if error.errno == errno.EINVAL:
            return 0, 0
        raise
    info = LAYOUTS["vfio_irq_info"].unpack(data)
    return int(info.count), int(info.flags)


def set_irqs(kernel: Kernel, device: int, index: int, flags: int, start: int, count: int, data: bytes = b"") -> None:
    """One VFIO_DEVICE_SET_IRQS."""
    packed = LAYOUTS["vfio_irq_set"].pack(data, flags=flags, index=index, start=start, count=count)
    kernel.ioctl(device, "VFIO_DEVICE_SET_IRQS", packed)


def listen(kernel: Kernel, device: int, index: int, eventfds: list[int]) -> None:
    """Let vectors 0, 1, … of an index add to these eventfds from now on."""
    data = struct.pack(f"={len(eventfds)}i", *eventfds)
    set_irqs(kernel, device, index, uapi.SET_DATA_EVENTFD | uapi.SET_TRIGGER, 0, len(eventfds), data)


class VfioIrqs:
    """``interrupts.IrqSource``: the kernel delivers for the device behind the file ``fd``."""

    def __init__(self, kernel: Kernel, fd: int) -> None:
        self.kernel, self.fd = kernel, fd

    def count(self, kind: str) -> int:
        """Vectors that can be listened to through eventfds."""
        there, flags = vectors(self.kernel, self.fd, INDICES[kind])
        return there if flags & uapi.IRQ_EVENTFD else 0

    def listen(self, kind: str, eventfds: list[int]) -> None:
        """One ioctl: the kernel sets up as many vectors."""
        listen(self.kernel, self.fd, INDICES[kind], eventfds)

    def silence(self, kind: str) -> None:
        """One ioctl: the kernel frees the vectors."""
        set_irqs(self.kernel, self.fd, INDICES[kind], uapi.SET_DATA_NONE | uapi.SET_TRIGGER, 0, 0)

    def unmask(self, kind: str, vector: int) -> None:
        """One ioctl."""
        set_irqs(self.kernel, self.fd, INDICES[kind], uapi.SET_DATA_NONE | uapi.SET_UNMASK, vector, 1)
