"""What the driver keeps for one request while its memory is mapped (``struct nvme_iod``).

The data pointer of the command (``low``, ``high``: PRP1 and PRP2, or the SGL descriptor) doubles as the store of the
mapping's address: a single segment, and an inline or listed SGL, are unmapped from what the command already says.
Only two things cost memory: the window of the two-step API (16 bytes: address and size), and, where PRPs describe
segments that were mapped one by one and must be unmapped, one 16-byte vector a segment.

Models ``struct nvme_iod`` of ``drivers/nvme/host/pci.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cython

from dmakit.errors import MisuseError

if not cython.compiled:
    from dmakit.consts import P2P_MAP_NONE

if TYPE_CHECKING:
    from dmakit.nvme.pool import Block

IOD_SINGLE_SEGMENT = 1  # data: one dma_map_phys, address in the command
IOD_SINGLE_META_SEGMENT = 2  # metadata: likewise, address in MPTR
IOD_DATA_MAPPED = 4
IOD_META_MAPPED = 8

PATHS = ("no-data", "map_phys", "two-step", "bus", "per-segment", "failed", "map_phys each", "map_sg", "registered")
FAST_PATHS = frozenset({"no-data", "map_phys", "two-step", "bus", "map_phys each", "map_sg", "registered"})
PATH_NO_DATA, PATH_MAP_PHYS, PATH_TWO_STEP, PATH_BUS, PATH_PER_SEGMENT, PATH_FAILED = range(6)
PATH_EACH, PATH_SG, PATH_REGISTERED = 6, 7, 8  # of the other strategies

WINDOW_BYTES = 16
VECTOR_BYTES = 16


@cython.cclass
class Iod:
    """The mapping of one request; ``status`` is a ``BlkStatus``, OK while it is usable.

    ``psdt``: which form ``low``/``high`` have (``spec.PSDT_*``); ``mptr``: the metadata pointer; ``blocks``: list
    blocks in chain order; ``vectors``: (address, length) that must be unmapped one by one; ``path`` and ``reason``: the
    way taken and the branch that chose it; ``error``: the exception behind a bad status.
    """

    def __init__(self, request: Any) -> None:
        self.request = request
        self.status = 0
        self.flags = 0
        self.psdt = 0
        self.low = 0
        self.high = 0
        self.mptr = 0
        self.total = 0
        self.state: Any = None
        self.map_type = P2P_MAP_NONE
        self.blocks: list[Block] = []
        self.vectors: list[tuple[int, int]] = []
        self.entries = 0
        self.meta_state: Any = None
        self.meta_map_type = P2P_MAP_NONE
        self.meta_total = 0
        self.meta_block: Any = None
        self.meta_entries = 0
        self.path = PATH_NO_DATA
        self.reason = 0
        self.error: object = None

    @property
    def path_name(self) -> str:
        """The path's declared name."""
        if not 0 <= self.path < len(PATHS):
            raise MisuseError(f"path={self.path}: must be from 0 to {len(PATHS) - 1}")
        return PATHS[self.path]

    @property
    def bookkeeping_bytes(self) -> int:
        """Bytes that exist only to undo this mapping."""
        windows = (self.state is not None) + (self.meta_state is not None)
        return WINDOW_BYTES * windows + VECTOR_BYTES * len(self.vectors)
