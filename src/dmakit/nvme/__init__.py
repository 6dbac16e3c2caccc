"""NVMe: a driver for real and modelled controllers, and the controller model.

``from dmakit import nvme; nvme.Controller.open(…)`` is the public face (``nvme.controller``); the rest is by module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmakit._later import later

if TYPE_CHECKING:
    from dmakit.nvme.controller import Controller as Controller

__all__ = ["Controller"]

# Loaded when it is asked for: the lower modules of this package are used without it.
__getattr__ = later(__name__, {"Controller": "dmakit.nvme.controller"})
