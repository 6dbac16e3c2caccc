"""The software machine (``from dmakit import soft``): memory, an IOMMU, and PCI functions made of Python.

``soft.Machine`` is the computer; ``machine.plug(model, bdf)`` puts a function into a slot, ``machine.open(bdf)`` takes
it as ``vfio.Machine.open`` takes a real one, and ``soft.Device.open(model)`` does it all. ``soft.Edu`` is a function to
try drivers on; a subclass of ``soft.Model`` is one of your own. The guide is ``docs/vfio.md``.

What belongs to PCI functions is loaded on first use: a machine without any costs no more to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

_LATER = {
    "Bar": "model",
    "Device": "device",
    "Edu": "edu",
    "Function": "function",
    "Identity": "model",
    "Model": "model",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
