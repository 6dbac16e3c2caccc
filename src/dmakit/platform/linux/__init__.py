"""Real PCI devices through Linux VFIO (``from dmakit import vfio``).

``vfio.Device.open("0000:01:00.0")`` takes one device; ``vfio.Machine()`` holds several and the memory that they share;
``vfio.scan()`` lists what this host has, ``vfio.bind`` and ``vfio.unbind`` take a device from its driver and give it
back. The guide is ``docs/vfio.md``.

Classes are loaded on first use: to list devices and to say whose they are takes no mapping code.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

_LATER = {
    "ConfigSpace": "linux.region",
    "Device": "linux.device",
    "Interrupt": "interrupts",
    "Interrupts": "interrupts",
    "Machine": "linux.machine",
    "Region": "linux.region",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"dmakit.platform.{_LATER[name]}"), name)


def scan() -> list[PciDevice]:
    """Every PCI device of this host."""
    return pci.scan(Kernel())


def bind(bdf: str) -> PciDevice:
    """Take a device from its driver for VFIO; refused while it is in use."""
    return binding.bind(Kernel(), bdf)


def unbind(bdf: str, *, wait: bool = False) -> PciDevice:
    """Give a device back to the driver ``bind`` took it from; refused while a process holds it, unless ``wait``."""
    return binding.unbind(Kernel(), bdf, wait=wait)
