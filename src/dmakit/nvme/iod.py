"""What the driver keeps for one request while its memory is mapped (``struct nvme_iod``).

The data pointer of the command (``low``, ``high``: PRP1 and PRP2, or the SGL descriptor) doubles as the store of the
mapping's address: a single segment, and an inline or listed SGL, are unmapped from what the command already says.
Only two things cost memory: the window of the two-step API (16 bytes: address and size), and, where PRPs describe
segments that were mapped one by one and must be unmapped, one 16-byte vector a segment.

Models ``struct nvme_iod`` of ``drivers/nvme/host/pci.c``.
"""

from __future__ import annotations

from array import array
from typing import Any

import cython

from dmakit.errors import MisuseError

if not cython.compiled:
    from dmakit.block.request import Request
    from dmakit.consts import P2P_MAP_NONE, PATH_NO_DATA

PATHS = ("no-data", "map_phys", "two-step", "bus", "per-segment", "failed", "map_phys each", "map_sg", "registered")
FAST_PATHS = frozenset({"no-data", "map_phys", "two-step", "bus", "map_phys each", "map_sg", "registered"})

WINDOW_BYTES = 16
VECTOR_BYTES = 16
_WINDOW_BYTES = WINDOW_BYTES
_VECTOR_BYTES = VECTOR_BYTES


@cython.cclass
class Iod:
    """The mapping of one request; ``status`` is a ``BlkStatus``, OK while it is usable.

    ``cpu``: who mapped; ``psdt``: which form ``low``/``high`` have (``consts.PSDT_*``); ``mptr``: the metadata pointer;
    ``chain``: the list blocks (``nvme.lists``); ``vectors``: (address, length) that must be unmapped one by one;
    ``path`` (``consts.PATH_*``) and ``reason``: the way taken and the branch that chose it; ``error``: the exception
    behind a bad status. Compiled callers use one Iod for one request after the other (``_reset``).
    """

    def __init__(self, request: Request) -> None:
        self.kept = memoryview(array("Q", (0, 0)))
        self.room = 1
        self._reset(request, request.cpu)

    def _reset(self, request: Request, cpu: cython.int) -> cython.int:
        """Start over with another request, of which nothing is mapped."""
        self.request = request
        self.state: Any = None
        self.meta_state: Any = None
        self.meta_block: Any = None
        self.error: object = None
        self._clear(request.direction, cpu)
        return 0

    def _clear(self, direction: cython.int, cpu: cython.int) -> cython.void:
        """The numbers of an Iod of which nothing is mapped."""
        self.cpu = cpu
        self.direction = direction
        self.status = 0
        self.flags = 0
        self.psdt = 0
        self.low = 0
        self.high = 0
        self.mptr = 0
        self.total = 0
        self.window_addr = 0
        self.window_size = 0
        self.map_type = P2P_MAP_NONE
        self.chain = 0
        self.kept_count = 0
        self.entries = 0
        self.meta_map_type = P2P_MAP_NONE
        self.meta_total = 0
        self.meta_entries = 0
        self.path = PATH_NO_DATA
        self.reason = 0

    def _keep(self, addr: cython.ulonglong, length: cython.ulonglong) -> cython.int:
        """Note a range that must be unmapped by itself."""
        if self.kept_count == self.room:
            self._widen()
        self.kept[2 * self.kept_count] = addr
        self.kept[2 * self.kept_count + 1] = length
        self.kept_count += 1
        return 0

    def _widen(self) -> cython.int:
        """Double the array of ranges."""
        self.kept = memoryview(array("Q", bytes(self.kept) + bytes(16 * self.room)))
        self.room *= 2
        return 0

    def _bookkeeping(self) -> cython.longlong:
        windows: cython.int = (self.state is not None) + (self.meta_state is not None) + (self.window_size != 0)
        return _WINDOW_BYTES * windows + _VECTOR_BYTES * self.kept_count

    @property
    def vectors(self) -> list[tuple[int, int]]:
        """(address, length) of the ranges that must be unmapped one by one, and that the command does not say."""
        return [(self.kept[2 * i], self.kept[2 * i + 1]) for i in range(self.kept_count)]

    @property
    def path_name(self) -> str:
        """The path's declared name."""
        if not 0 <= self.path < len(PATHS):
            raise MisuseError(f"path={self.path}: must be from 0 to {len(PATHS) - 1}")
        return PATHS[self.path]

    @property
    def bookkeeping_bytes(self) -> int:
        """Bytes that exist only to undo this mapping."""
        return int(self._bookkeeping())
