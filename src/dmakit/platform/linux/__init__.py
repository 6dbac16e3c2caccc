"""Real PCI devices through Linux VFIO (``from dmakit import vfio``).

``vfio.Device.open("0000:01:00.0")`` takes one device; ``vfio.Machine()`` holds several and the memory that they share;
``vfio.scan()`` lists what this host has, ``vfio.bind`` and ``vfio.unbind`` take a device from its driver and give it
back. The guide is ``docs/vfio.md``.

Classes are loaded on first use: to list devices and to say whose they are takes no mapping code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmakit._later import later
from dmakit.platform.linux import binding, pci
from dmakit.platform.linux.kernel import Kernel
from dmakit.platform.pci import PciDevice

if TYPE_CHECKING:
    from dmakit.platform.interrupts import Interrupt, Interrupts
    from dmakit.platform.linux.device import Device
    from dmakit.platform.linux.machine import Machine
    from dmakit.platform.linux.region import ConfigSpace, Region

__all__ = [
    "ConfigSpace", "Device", "Interrupt", "Interrupts", "Machine", "PciDevice", "Region", "bind", "scan", "unbind",
]  # fmt: skip

__getattr__ = later(
    __name__,
    {
        "ConfigSpace": "dmakit.platform.linux.region",
        "Device": "dmakit.platform.linux.device",
        "Interrupt": "dmakit.platform.interrupts",
        "Interrupts": "dmakit.platform.interrupts",
        "Machine": "dmakit.platform.linux.machine",
        "Region": "dmakit.platform.linux.region",
    },
)


def scan() -> list[PciDevice]:
    """Every PCI device of this host."""
    return pci.scan(Kernel())


def bind(bdf: str) -> PciDevice:
    """Take a device from its driver for VFIO; refused while it is in use."""
    return binding.bind(Kernel(), bdf)


def unbind(bdf: str, *, wait: bool = False) -> PciDevice:
    """Give a device back to the driver ``bind`` took it from; refused while a process holds it, unless ``wait``."""
    return binding.unbind(Kernel(), bdf, wait=wait)
