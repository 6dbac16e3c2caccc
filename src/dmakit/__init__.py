"""dmakit: the Linux DMA-mapping stack in user space.

See ``docs/`` for the tutorial and the guide to each room. The public names below are loaded on first use,
so that ``import dmakit`` (and ``dmakit --help``) stays instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dmakit import _core
from dmakit._later import later

_core.install()

__version__ = "0.1.0"

_PUBLIC = {
    "Attrs": "dmakit.dma.direction",
    "Device": "dmakit.dma.device",
    "Direction": "dmakit.dma.direction",
    "ExhaustedError": "dmakit.errors",
    "FaultError": "dmakit.errors",
    "HostError": "dmakit.errors",
    "IovaState": "dmakit.dma.iova_state",
    "Machine": "dmakit.platform.soft",
    "MisuseError": "dmakit.errors",
    "UnsupportedError": "dmakit.errors",
}

_ROOMS = {"soft": "dmakit.platform.soft", "vfio": "dmakit.platform.linux"}

__all__ = ["__version__", *sorted(_PUBLIC), *_ROOMS]
_public = later(__name__, _PUBLIC)


def __getattr__(name: str) -> Any:
    return import_module(_ROOMS[name]) if name in _ROOMS else _public(name)


def __dir__() -> list[str]:
    return sorted(__all__)
