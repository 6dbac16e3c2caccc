"""The scatterlist baseline: how drivers map a request that have not moved to the block DMA iterator.

Three passes where the iterator makes one: the request's segments are merged into a scatterlist that was
allocated for it (``blk_rq_map_sg``), the scatterlist is mapped (``dma_map_sg``), and the driver walks the mapped
entries to write its descriptors. The scatterlist lives until the request completes; its bytes are what the
iterator saves. A table is allocated in chunks of one page (128 entries of 32 bytes, the last one a link when
another chunk follows).

Models ``block/blk-mq-dma.c`` (``__blk_rq_map_sg``), ``lib/scatterlist.c`` and drivers that use ``dma_map_sgtable``.
"""

from __future__ import annotations

from dmakit.block.device import MappingDevice, SgMapping
from dmakit.block.request import Request
from dmakit.consts import L_BOOKKEEPING_BYTES, L_PASSES
from dmakit.errors import ExhaustedError, MisuseError
from dmakit.failpoint import FailPoint
from dmakit.ledger import Ledger

SG_ENTRY_BYTES = 32
SG_CHUNK_ENTRIES = 4096 // SG_ENTRY_BYTES


def table_bytes(entries: int) -> int:
    """Bytes that a scatterlist table of ``entries`` takes; links between full chunks included."""
    if entries < 0:
        raise MisuseError(f"entries={entries}: must not be negative")
    total = 0
    while entries > SG_CHUNK_ENTRIES:
        total += SG_CHUNK_ENTRIES * SG_ENTRY_BYTES
        entries -= SG_CHUNK_ENTRIES - 1
    return total + entries * SG_ENTRY_BYTES


def blk_rq_map_sg(request: Request) -> list[tuple[int, int]]:
    """The request's merged segments as scatterlist entries (phys, length)."""
    return list(request.data.vectors)


class SgRequest:
    """One request mapped through a scatterlist; ``ranges`` are the (address, length) pairs for the device.

    ``bytes_allocated``: the table; ``passes``: walks over the request's segments or entries (3 once the driver
    has written its descriptors from ``ranges``; ``consume`` counts that walk).
    """

    def __init__(
        self, request: Request, device: MappingDevice, *, ledger: Ledger | None = None, fail: FailPoint | None = None
    ) -> None:
        self.device = device
        self.ledger = ledger
        self.cpu = request.cpu
        self.passes = 0
        self.bytes_allocated = table_bytes(request.segments)
        if fail is not None and fail.hit():
            raise ExhaustedError(f"no memory for a scatterlist of {request.segments} entries")
        self._count(L_BOOKKEEPING_BYTES, self.bytes_allocated)
        self.entries = blk_rq_map_sg(request)
        self._pass()
        self.mapping: SgMapping | None = device.map_sg(self.entries, request.direction, cpu=request.cpu)
        self._pass()
        self.ranges = list(self.mapping.segments)

    def _count(self, row: int, amount: int) -> None:
        if self.ledger is not None:
            self.ledger.count(row, amount)

    def _pass(self) -> None:
        self.passes += 1
        self._count(L_PASSES, 1)

    def consume(self) -> list[tuple[int, int]]:
        """The mapped ranges, for the walk that writes descriptors."""
        self._pass()
        return self.ranges

    def unmap(self, *, cpu: int | None = None) -> None:
        """Undo the mapping (once); ``cpu`` is the one that completes the request (default: that submitted)."""
        if self.mapping is None:
            raise MisuseError("scatterlist request: already unmapped")
        mapping, self.mapping = self.mapping, None
        self.device.unmap_sg(mapping, cpu=self.cpu if cpu is None else cpu)
