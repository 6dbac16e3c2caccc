"""What the host has to tell the owner of a device: it wants the device back (REQ), or the device failed (ERR).

vfio-pci has two interrupt indices that are not the device's. *REQ*: the device is being unbound, removed or unplugged.
The kernel waits in its remove callback until user space closes the device, and reminds us about every ten seconds;
until then everything works as before. *ERR*: the device reported an uncorrectable error (PCI Express AER); what it does
and what its registers say cannot be trusted any more. Only PCI Express devices have it. On the software machine a test
gives both (``soft.Function.notify``).

``Notices`` arms an eventfd for each that the device has and remembers what came: a notice is never taken back. Closing
the device's file disarms them in the kernel, so the eventfds are closed after it.

Source: ``drivers/vfio/pci/vfio_pci_core.c`` (vfio_pci_core_request, vfio_pci_core_aer_err_detected), ``vfio_main.c``
(vfio_unregister_group_dev).
"""

from __future__ import annotations

import errno
import select
from typing import TYPE_CHECKING

from dmakit.errors import HostError

if TYPE_CHECKING:
    from dmakit.platform.eventfds import Eventfds
    from dmakit.platform.interrupts import IrqSource

TEXTS = {
    "err": "the host reports a fatal error of the device (PCI Express AER)",
    "req": "the host wants the device back (it is being unbound, removed or unplugged)",
}
_ERRNOS = {"req": errno.ENODEV, "err": errno.EIO}


class Notices:
    """The notices about one device; ``name`` is for messages. ``heard``: the kinds that came."""

    def __init__(self, eventfds: Eventfds, name: str) -> None:
        self.eventfds, self.name = eventfds, name
        self.heard: set[str] = set()
        self._armed: dict[int, str] = {}
        self._ready = select.poll()

    def arm(self, source: IrqSource) -> None:
        """Listen to what ``source`` has of REQ and ERR; HostError leaves nothing open."""
        try:
            for kind in TEXTS:
                if source.count(kind):
                    fd = self.eventfds.eventfd()
                    self._armed[fd] = kind
                    self._ready.register(fd, select.POLLIN)
                    source.listen(kind, [fd])
        except BaseException:
            self.close()
            raise

    def descriptors(self) -> list[int]:
        """The eventfds: one is readable when there is something to hear."""
        return list(self._armed)

    def listen(self) -> set[str]:
        """The kinds that have come by now; never waits (one system call)."""
        for fd, _ in self._ready.poll(0):
            self.eventfds.take_events(fd, 0)
            self.heard.add(self._armed[fd])
        return self.heard

    def error(self) -> HostError | None:
        """What has come as an exception, ERR (EIO) before REQ (ENODEV); None when nothing has."""
        heard = self.listen()
        kind = next((kind for kind in TEXTS if kind in heard), "")
        return HostError(f"{self.name}: {TEXTS[kind]}", _ERRNOS[kind]) if kind else None

    def close(self) -> None:
        """Close the eventfds; what was heard stays. A second call does nothing."""
        for fd in self._armed:
            self.eventfds.close(fd)
        self._armed, self._ready = {}, select.poll()
