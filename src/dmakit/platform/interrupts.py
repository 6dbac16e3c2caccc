"""Interrupts of a PCI function that this process drives: each vector is an eventfd that is added to.

A function has INTx (one line, level: whoever delivers it masks it when it fires, ``unmask`` opens it again after the
device was served), MSI or MSI-X (vectors, edge: a write to memory, which only a bus master makes). One of the three
kinds is on at a time. ``Interrupts`` owns the eventfds of the kind that is on: ``wait`` on one of its vectors, or hand
``fileno()`` to an event loop.

Who adds to the eventfds is an ``IrqSource``: the host's kernel (``linux.irqs``), or a function of the software machine
(``soft.function``). It also delivers the two notices that are not the device's (``platform.notices``).

Source: ``include/uapi/linux/vfio.h`` (VFIO_DEVICE_SET_IRQS), whose rules hold for both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from dmakit.errors import DmakitError, MisuseError, UnsupportedError

if TYPE_CHECKING:
    from dmakit.platform.eventfds import Eventfds
    from dmakit.platform.notices import Notices

KINDS = ("intx", "msi", "msix")


class IrqSource(Protocol):
    """Who delivers the interrupts of one function. ``kind`` is one of ``KINDS``, or ``err`` or ``req``."""

    def count(self, kind: str) -> int:
        """How many vectors of a kind there are to listen to; 0 when there are none."""

    def listen(self, kind: str, eventfds: list[int]) -> None:
        """Add to these, for vectors 0, 1, …, from now on."""

    def silence(self, kind: str) -> None:
        """Switch the kind off: nothing is added any more."""

    def unmask(self, kind: str, vector: int) -> None:
        """Open a vector that masked itself when it fired."""


class Interrupt:
    """One vector. ``wait`` returns how often it fired since the last call."""

    def __init__(self, owner: Interrupts, vector: int, fd: int) -> None:
        self.owner, self.vector, self.fd = owner, vector, fd

    def fileno(self) -> int:
        """The eventfd, for event loops; MisuseError once the vector is off: its number may be another's by then."""
        if self.fd < 0:
            raise MisuseError(f"{self.owner.kind} vector {self.vector} is switched off")
        return self.fd

    def take(self) -> int:
        """How often it fired since the last call, without waiting."""
        return self.owner.eventfds.take_events(self.fileno(), 0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait up to ``timeout`` seconds (None: for ever); how often it fired, 0 when it did not.

        HostError, at once, when it did not and the host wants the device back or reports that it failed.
        """
        eventfds, notices = self.owner.eventfds, self.owner.notices
        fired = eventfds.take_events(self.fileno(), 0 if notices.heard else timeout, notices.descriptors())
        if not fired and (error := notices.error()) is not None:
            raise error
        return fired

    def unmask(self) -> None:
        """Open a line that masked itself when it fired (INTx); UnsupportedError for vectors, which do not."""
        if self.owner.kind != "intx":
            raise UnsupportedError(f"{self.owner.kind} vectors do not mask themselves: there is nothing to open")
        self.fileno()
        self.owner.source.unmask(self.owner.kind, self.vector)


class Interrupts:
    """``count`` vectors of one ``kind`` (``msix``, ``msi``, ``intx``), on until ``close``."""

    def __init__(self, eventfds: Eventfds, source: IrqSource, kind: str, count: int, notices: Notices) -> None:
        if kind not in KINDS:
            raise MisuseError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
        self.eventfds, self.source, self.kind, self.notices = eventfds, source, kind, notices
        self.vectors: list[Interrupt] = []
        there = source.count(kind)
        if count < 1 or count > there:
            raise UnsupportedError(f"{count} {kind} vectors: the device has {there}")
        try:
            for vector in range(count):
                self.vectors.append(Interrupt(self, vector, eventfds.eventfd()))
            source.listen(kind, [entry.fd for entry in self.vectors])
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
                self.source.silence(self.kind)
            self._close_eventfds()

    def _close_eventfds(self) -> None:
        for entry in self.vectors:
            self.eventfds.close(entry.fd)
            entry.fd = -1
        self.vectors = []
