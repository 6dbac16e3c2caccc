"""The software machine (``from dmakit import soft``): memory, an IOMMU, and PCI functions made of Python.

``soft.Machine`` is the computer; ``machine.plug(model, bdf)`` puts a function into a slot, ``machine.open(bdf)`` takes
it as ``vfio.Machine.open`` takes a real one, and ``soft.Device.open(model)`` does it all. ``soft.Edu`` is a function to
try drivers on; a subclass of ``soft.Model`` is one of your own. The guide is ``docs/vfio.md``.

What belongs to PCI functions is loaded on first use: a machine without any costs no more to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmakit._later import later
from dmakit.platform.soft.machine import BRIDGE_WINDOWS, HIGH_RAM_START, LOW_RAM_END, MSI_WINDOW, Machine

if TYPE_CHECKING:
    from dmakit.platform.soft.device import Device
    from dmakit.platform.soft.edu import Edu
    from dmakit.platform.soft.function import Function
    from dmakit.platform.soft.model import Bar, Identity, Model

__all__ = [
    "BRIDGE_WINDOWS", "HIGH_RAM_START", "LOW_RAM_END", "MSI_WINDOW",
    "Bar", "Device", "Edu", "Function", "Identity", "Machine", "Model",
]  # fmt: skip

__getattr__ = later(
    __name__,
    {
        "Bar": "dmakit.platform.soft.model",
        "Device": "dmakit.platform.soft.device",
        "Edu": "dmakit.platform.soft.edu",
        "Function": "dmakit.platform.soft.function",
        "Identity": "dmakit.platform.soft.model",
        "Model": "dmakit.platform.soft.model",
    },
)
