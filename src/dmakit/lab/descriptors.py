"""Descriptors of the lab's device: written by the driver's code, fetched by the device through its own port.

``DescriptorWriter`` turns the ranges of any strategy into PRPs or an SGL by the NVMe driver's own rules
(``nvme.listed.describe``). ``fetch`` is the device's half: it reads list blocks by translated DMA and yields the data
ranges found there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dmakit.consts import PSDT_PRP
from dmakit.errors import FaultError
from dmakit.nvme.iod import Iod
from dmakit.nvme.listed import Ranges, describe
from dmakit.nvme.mapping import RequestMapper
from dmakit.nvme.prp import PrpWalker
from dmakit.nvme.sgl import SglWalker


@dataclass(slots=True)
class Descriptors:
    """What the command carries: two 64-bit words and their form, for ``size`` bytes."""

    psdt: int
    low: int
    high: int
    size: int
    chain: int = 0

    @classmethod
    def of(cls, iod: Iod, size: int) -> Descriptors:
        """Those that the driver wrote for a request that it mapped itself (the blocks stay its own)."""
        return cls(iod.psdt, iod.low, iod.high, size)


class DescriptorWriter:
    """Writes descriptors for ranges that are mapped already."""

    def __init__(self, mapper: RequestMapper) -> None:
        self.mapper = mapper

    def write(self, ranges: Ranges, size: int) -> Descriptors:
        """PRPs or an SGL; ExhaustedError (nothing kept) when no block can be had."""
        psdt, low, high, chain, _ = describe(self.mapper, ranges, size)
        return Descriptors(psdt, low, high, size, chain)

    def drop(self, descriptors: Descriptors) -> None:
        """Give list blocks back."""
        self.mapper.prp.drop(descriptors.chain)


def fetch(dma_read: Callable[[int, int], bytes], wanted: Descriptors, *, to_host: bool) -> Ranges:
    """The data ranges of a command; FaultError when the IOMMU blocks a list or the device refuses what it says."""
    if wanted.psdt == PSDT_PRP:
        prp = PrpWalker()
        prp.begin(wanted.low, wanted.high, wanted.size)
        while prp.list_entries and not prp.status:
            prp.list_words(dma_read(prp.list_addr, prp.list_entries << 3))
        status, ranges = prp.status, prp.ranges
    else:
        sgl = SglWalker()
        sgl.begin(wanted.low, wanted.high, wanted.size, to_host=to_host)
        while sgl.segment_bytes and not sgl.status:
            sgl.segment(dma_read(sgl.segment_addr, sgl.segment_bytes))
        status, ranges = sgl.status, sgl.ranges
    if status:
        raise FaultError(f"the device refuses the descriptors of a {wanted.size}-byte request: status {status:#x}")
    return ranges
