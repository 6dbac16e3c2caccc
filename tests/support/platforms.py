"""The platforms of the portable contract tests: the same test files run on each, without a line of difference.

``soft``: the software machine. ``type1`` and ``iommufd``: the host's IOMMU through VFIO; in the test VM a real kernel
with an NVMe drive as the device, elsewhere the fake host with a device that has no registers. A platform makes one
*world* at a time, a machine and a device on it whose own accesses (``dma_read``, ``dma_write``) work: on the real
platform the drive makes them. What an option asks for and a host cannot choose is gated (``tests.support.gates``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from dmakit.dma.device import Device
from dmakit.platform.linux.machine import Machine as HostMachine
from dmakit.platform.soft import Machine as SoftMachine
from tests.support.gates import gate
from tests.support.vfio.devices import FakeDevice
from tests.support.vfio.host import FakeHost

PLATFORMS = ("soft", "type1", "iommufd")
IN_GUEST = "DMAKIT_VM_KERNEL" in os.environ
LEAST_POOL = 2 << 20  # bytes: bounce memory of a host machine comes in whole huge pages
_FIXED = {"coherent": True, "caching_mode": False, "coherent_walker": True, "force_bounce": False}


def host_options(options: dict[str, Any], device: dict[str, Any]) -> dict[str, Any]:
    """The options that a host machine takes; gated when one is the host's to decide."""
    taken = dict(options)
    if taken.pop("mode", "strict") != "strict":
        gate("no lazy mode and no passthrough: VFIO maps, and flushes before an unmap returns (deferred_flush)")
    for name, given in _FIXED.items():
        if taken.pop(name, given) != given:
            gate(f"{name}={not given}: the hardware is what it is")
    for name in ("iommu", "levels", "reserved", "nodes"):
        if name in taken:
            gate(f"{name}=: the host's IOMMU and memory are what they are")
    if not device.get("coherent", True):
        gate("coherent=False: the hardware is what it is")
    if not device.get("trusted", True) and "swiotlb" not in taken:
        taken["swiotlb"] = LEAST_POOL
    return {"ram": "64M", **taken}


class Platform:
    """One platform; ``world`` ends the one before it, ``close`` the last."""

    names = ("dev0", "dev1")

    def __init__(self, name: str) -> None:
        self.name = name
        self.machine: Any = None
        self.undo = ExitStack()

    def world(self, machine: dict[str, Any], device: dict[str, Any]) -> tuple[Any, Device]:
        """A strict machine of 64 MiB and the device ``names[0]`` on it."""
        self.machine = SoftMachine(**{"mode": "strict", "ram": "64M", "swiotlb": "1M", **machine})
        return self.machine, self.machine.device(self.names[0], **device)

    def another(self, **device: Any) -> Device:
        """A second device of the same machine, ``names[1]``."""
        made: Device = self.machine.device(self.names[1], **device)
        return made

    def write_implies_read(self) -> bool:
        """Whether a device may read what it may write (a first-stage table has no other way)."""
        return bool(self.machine.iommu == "x86")

    def close(self) -> None:
        """Give everything back."""
        self.undo.close()


class FakePlatform(Platform):
    """A host machine on the fake host; when a world ends, nothing of it may be left."""

    names = ("0000:00:05.0", "0000:00:06.0")

    def world(self, machine: dict[str, Any], device: dict[str, Any]) -> tuple[Any, Device]:
        options = host_options(machine, device)
        self.undo.close()
        fake = FakeHost([FakeDevice(bdf, group) for group, bdf in enumerate(self.names)])
        made = self.machine = HostMachine(kernel=fake, backend=self.name, **options)
        self.undo.callback(self._end, made, fake)
        return made, self._open(0, device)

    def _open(self, number: int, options: dict[str, Any]) -> Device:
        fake = self.machine.kernel.devices[self.names[number]]
        opened = self.machine.open(self.names[number], **{"port": _Accesses(fake), **options})
        opened.set_bus_master(True)
        made: Device = opened.dma
        return made

    def _end(self, machine: Any, fake: FakeHost) -> None:
        machine.close()
        assert fake.left() == {"files": 0, "pinned": 0}

    def another(self, **device: Any) -> Device:
        return self._open(1, device)

    def write_implies_read(self) -> bool:
        return False


class _Accesses:
    """The port of a fake device."""

    def __init__(self, device: FakeDevice) -> None:
        self.read: Callable[[int, int], bytes] = device.dma_read
        self.device = device

    def write(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        self.device.dma_write(iova, bytes(data))


def platform(name: str) -> Platform:
    """The platform of this name, here."""
    if name == "soft":
        return Platform(name)
    if not IN_GUEST:
        return FakePlatform(name)
    from tests.vm.guest.platform import GuestPlatform

    return GuestPlatform(name)
