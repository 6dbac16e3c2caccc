"""Interrupts of a VFIO device: each vector is an eventfd that the kernel adds to.

A device has INTx (one line, level: the kernel masks it when it fires, ``unmask`` opens it again after the device was
served), MSI or MSI-X (vectors, edge). One of the three kinds is on at a time. ``Interrupts`` owns the eventfds of the
kind that is on: ``wait`` on one of its vectors, or hand ``fileno()`` to an event loop.

Source: ``include/uapi/linux/vfio.h`` (vfio_irq_info, vfio_irq_set).
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

from dmakit.errors import DmakitError, MisuseError, UnsupportedError
from dmakit.platform.linux import uapi
from dmakit.platform.linux.kernel import Kernel
from dmakit.platform.linux.uapi import LAYOUTS

KINDS = {"intx": uapi.IRQ_INTX, "msi": uapi.IRQ_MSI, "msix": uapi.IRQ_MSIX}


def vectors(kernel: Kernel, fd: int, index: int) -> tuple[int, int]:
    """(vectors, flags) of an interrupt index; (0, 0) when the device has none of that kind."""
    data = LAYOUTS["vfio_irq_info"].pack(index=index)
    try:
        kernel.ioctl(fd, "VFIO_DEVICE_GET_IRQ_INFO", data)
    except DmakitError as error:
        if error.errno == 22:
            return 0, 0
        raise
    info = LAYOUTS["vfio_irq_info"].unpack(data)
    return int(info.count), int(info.flags)


class Interrupt:
    """One vector. ``wait`` returns how often it fired since the last call."""

    def __init__(self, owner: Interrupts, vector: int, fd: int) -> None:
        self.owner, self.vector, self.fd = owner, vector, fd

    def fileno(self) -> int:
        """The eventfd, for select and event loops."""
        return self.fd

    def wait(self, timeout: float | None = None) -> int:
        """Wait up to ``timeout`` seconds (None: for ever); how often it fired, 0 when it did not."""
        return self.owner.kernel.take_events(self.fd, timeout)

    def unmask(self) -> None:
        """Open a line that masked itself when it fired (INTx)."""
        self.owner.set(uapi.SET_DATA_NONE | uapi.SET_UNMASK, self.vector, 1)


class Interrupts:
    """``count`` vectors of one ``kind`` (``msix``, ``msi``, ``intx``), on until ``close``."""

    def __init__(self, kernel: Kernel, device: int, kind: str, count: int) -> None:
        if kind not in KINDS:
            raise MisuseError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
        self.kernel, self.device, self.kind, self.index = kernel, device, kind, KINDS[kind]
        self.vectors: list[Interrupt] = []
        there, flags = vectors(kernel, device, self.index)
        if count < 1 or count > there or not flags & uapi.IRQ_EVENTFD:
            raise UnsupportedError(f"{count} {kind} vectors: the device has {there}")
        try:
            for vector in range(count):
                self.vectors.append(Interrupt(self, vector, kernel.eventfd()))
            fds = struct.pack(f"={count}i", *(entry.fd for entry in self.vectors))
            self.set(uapi.SET_DATA_EVENTFD | uapi.SET_TRIGGER, 0, count, fds)
        except BaseException:
            self._close_eventfds()
            raise

    def set(self, flags: int, start: int, count: int, data: bytes = b"") -> None:
        """One VFIO_DEVICE_SET_IRQS."""
        packed = LAYOUTS["vfio_irq_set"].pack(data, flags=flags, index=self.index, start=start, count=count)
        self.kernel.ioctl(self.device, "VFIO_DEVICE_SET_IRQS", packed)

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, vector: int) -> Interrupt:
        return self.vectors[vector]

    def __iter__(self) -> Iterator[Interrupt]:
        return iter(self.vectors)

    def close(self) -> None:
        """Switch the kind off and close the eventfds; a second call does nothing."""
        if self.vectors:
            with contextlib.suppress(DmakitError):
                self.set(uapi.SET_DATA_NONE | uapi.SET_TRIGGER, 0, 0)
            self._close_eventfds()

    def _close_eventfds(self) -> None:
        for entry in self.vectors:
            self.kernel.close(entry.fd)
        self.vectors = []
