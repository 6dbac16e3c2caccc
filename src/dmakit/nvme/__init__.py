"""NVMe: a driver for real and modelled controllers, and the controller model.

``from dmakit import nvme; nvme.Controller.open(…)`` is the public face (``nvme.controller``); the rest is by module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmakit.nvme.controller import Controller as Controller

__all__ = ["Controller"]


def __getattr__(name: str) -> Any:
    """``Controller``, loaded when it is asked for: the lower modules of this package are used without it."""
    if name == "Controller":
        from dmakit.nvme.controller import Controller

        return Controller
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
