"""How a driver gives a controller access to a request's memory: five strategies behind one interface.

========== ===================================================================================================
two-step   what Linux's driver does: one map for one segment, else one window, linked and synced (``mapping``)
page       a loop of dma_map_phys, one call a segment (``listed``)
sg         a scatterlist table and one dma_map_sg, which merges neighbours into fewer device ranges (``listed``)
premap     offered memory is registered at once and stays mapped; a request computes addresses (``premap``)
auto       two-step until a buffer's windows have cost as much as registering it, then premap (``auto``)
========== ===================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable

from dmakit.nvme.auto import AutoMapper
from dmakit.nvme.listed import Mapper, PageMapper, SgMapper
from dmakit.nvme.mapping import RequestMapper
from dmakit.nvme.premap import PremapMapper

STRATEGIES: dict[str, Callable[[RequestMapper], Mapper]] = {
    "two-step": lambda requests: requests,
    "page": PageMapper,
    "sg": SgMapper,
    "premap": PremapMapper,
    "auto": AutoMapper,
}
