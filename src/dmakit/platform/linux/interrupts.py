"""Interrupts of a VFIO device: each vector is an eventfd that the kernel adds to.

A device has INTx (one line, level: the kernel masks it when it fires, ``unmask`` opens it again after the device was
served), MSI or MSI-X (vectors, edge). One of the three kinds is on at a time. ``Interrupts`` owns the eventfds of the
kind that is on: ``wait`` on one of its vectors, or hand ``fileno()`` to an event loop.

Source: ``include/uapi/linux/vfio.h`` (VFIO_DEVICE_SET_IRQS).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dmakit.errors import DmakitError, MisuseError, UnsupportedError
from dmakit.platform.linux import uapi
from dmakit.platform.linux.irqs import listen, set_irqs, vectors
from dmakit.platform.linux.kernel import Kernel
from dmakit.platform.linux.notices import Notices

KINDS = {"intx": uapi.IRQ_INTX, "msi": uapi.IRQ_MSI, "msix": uapi.IRQ_MSIX}


class Interrupt:
    """One vector. ``wait`` returns how often it fired since the last call."""

    def __init__(self, owner: Interrupts, vector: int, fd: int) -> None:
        self.owner, self.vector, self.fd = owner, vector, fd

    def fileno(self) -> int:
        """The eventfd, for select and event loops."""
        return self.fd

    def take(self) -> int:
        """How often it fired since the last call, without waiting."""
        return self.owner.kernel.take_events(self.fd, 0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait up to ``timeout`` seconds (None: for ever); how often it fired, 0 when it did not.

        HostError, at once, when it did not and the host wants the device back or reports that it failed.
        """
        kernel, notices = self.owner.kernel, self.owner.notices
        fired = kernel.take_events(self.fd, 0 if notices.heard else timeout, notices.descriptors())
        if not fired and (error := notices.error()) is not None:
            raise error
        return fired

    def unmask(self) -> None:
        """Open a line that masked itself when it fired (INTx)."""
        owner = self.owner
        how = uapi.SET_DATA_NONE | uapi.SET_UNMASK
        set_irqs(owner.kernel, owner.device, owner.index, how, self.vector, 1)


class Interrupts:
    """``count`` vectors of one ``kind`` (``msix``, ``msi``, ``intx``), on until ``close``."""

    def __init__(self, kernel: Kernel, device: int, kind: str, count: int, notices: Notices) -> None:
        if kind not in KINDS:
            raise MisuseError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
        self.kernel, self.device, self.kind, self.index = kernel, device, kind, KINDS[kind]
        self.notices = notices
        self.vectors: list[Interrupt] = []
        there, flags = vectors(kernel, device, self.index)
        if count < 1 or count > there or not flags & uapi.IRQ_EVENTFD:
            raise UnsupportedError(f"{count} {kind} vectors: the device has {there}")
        try:
            for vector in range(count):
                self.vectors.append(Interrupt(self, vector, kernel.eventfd()))
            listen(kernel, device, self.index, [entry.fd for entry in self.vectors])
        except BaseException:
            self._close_eventfds()
            raise

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
                set_irqs(self.kernel, self.device, self.index, uapi.SET_DATA_NONE | uapi.SET_TRIGGER, 0, 0)
            self._close_eventfds()

    def _close_eventfds(self) -> None:
        for entry in self.vectors:
            self.kernel.close(entry.fd)
        self.vectors = []
