"""Growing the bounce memory: pools added by a background worker, transient pools for one mapping.

Models CONFIG_SWIOTLB_DYNAMIC of ``kernel/dma/swiotlb.c``. When a search finds no run of slots:

* the *worker* is scheduled (once, however often it is asked) to add a pool as large as the first one, at most the
  page allocator's largest block (4 MiB), halved until memory is found, at least 1 MiB;
* the mapping that failed must not wait: it gets a *transient* pool of exactly its slots, in one area, whose memory
  the device can reach, and which is freed when that mapping is undone.

The worker runs on the virtual clock, as soon as time moves at all. Pools lie in blocks of ``pages``, a
page allocator over low memory (``alloc(order)``, ``free(phys, order)``, raising ExhaustedError).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from dmakit.clock import VirtualClock
from dmakit.consts import IO_TLB_SEGSIZE, IO_TLB_SIZE, L_BOUNCE_POOLS, L_BOUNCE_TRANSIENT, PAGE_SIZE
from dmakit.errors import ExhaustedError
from dmakit.ledger import Ledger
from dmakit.memory.physical import PhysicalMemory
from dmakit.swiotlb.pool import SwiotlbPool, limit_areas

MIN_SLOTS = (1 << 20) // IO_TLB_SIZE
MAX_ORDER = 10
MAX_SLOTS = (PAGE_SIZE << MAX_ORDER) // IO_TLB_SIZE


class Pages(Protocol):
    """What the grower needs of a page allocator: naturally aligned blocks of 2**order pages."""

    def alloc(self, order: int = 0) -> int:
        """A block's physical address, or ExhaustedError."""

    def free(self, phys: int, order: int = 0) -> None:
        """Give a block back."""


def block_order(size: int) -> int:
    """The order of the smallest block of pages that holds ``size`` bytes (``get_order``)."""
    return max(0, (size - 1) // PAGE_SIZE).bit_length()


class PoolGrower:
    """Makes further pools for one ``Swiotlb``: ``slots`` and ``areas`` are what a full-sized pool should have.

    ``phys_limit``: the highest address a lasting pool may reach (32-bit by default: every device reaches it).
    ``failures``: how often the worker found no memory.
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        pages: Pages,
        clock: VirtualClock,
        *,
        slots: int = 32768,
        areas: int = 1,
        phys_limit: int = (1 << 32) - 1,
        ledger: Ledger,
    ) -> None:
        self.memory = memory
        self.pages = pages
        self.clock = clock
        self.slots = slots
        self.areas = areas
        self.phys_limit = phys_limit
        self.ledger = ledger
        self.failures = 0
        self.pending = False
        self._add: Callable[[SwiotlbPool], None] | None = None

    def attach(self, add: Callable[[SwiotlbPool], None]) -> None:
        """Say who takes the pools that the worker makes."""
        self._add = add

    def request(self) -> None:
        """Schedule the worker, unless it is scheduled already."""
        if not self.pending:
            self.pending = True
            self.clock.call_later(0, self._work)

    def _work(self) -> None:
        self.pending = False
        pool = self._make(min(MIN_SLOTS, self.slots), self.slots, self.areas, self.phys_limit, transient=False)
        if pool is None or self._add is None:
            self.failures += 1
            return
        self.ledger.count(L_BOUNCE_POOLS)
        self._add(pool)

    def transient(self, slots: int, limit: int) -> SwiotlbPool | None:
        """A pool of exactly ``slots`` slots below ``limit`` for one mapping, or None without memory."""
        pool = self._make(slots, slots, 1, limit, transient=True)
        if pool is not None:
            self.ledger.count(L_BOUNCE_TRANSIENT)
        return pool

    def _make(self, least: int, slots: int, areas: int, limit: int, *, transient: bool) -> SwiotlbPool | None:
        slots = min(slots, MAX_SLOTS)
        while (start := self._block(slots * IO_TLB_SIZE, limit)) == 0:
            if slots <= least:
                return None
            slots = -(-(slots // 2) // IO_TLB_SEGSIZE) * IO_TLB_SEGSIZE
        size = slots * IO_TLB_SIZE
        areas = limit_areas(areas, slots)
        self.memory.fill(start, size, 0)
        return SwiotlbPool(self.memory, start, size, areas=areas, ledger=self.ledger, transient=transient)

    def _block(self, size: int, limit: int) -> int:
        order = block_order(size)
        try:
            start = self.pages.alloc(order)
        except ExhaustedError:
            return 0
        if start + size - 1 > limit:
            self.pages.free(start, order)
            return 0
        return start

    def release(self, pool: SwiotlbPool) -> None:
        """Free the memory of a transient pool."""
        self.pages.free(pool.start, block_order(pool.end - pool.start))
