"""The ledger: cost counters, declared once, nearly free to count.

``ROWS`` is the declaration: for each index of ``consts.L_*`` its public name, its unit and what it means. Hot
code increments ``ledger.counts[L_X]`` (a typed memoryview when compiled); lock acquisitions are counted by
CPU in ``ledger.locks``. A row that a platform cannot observe is null in reports, never 0: ``observes`` names
the rows that are counted.

Two kinds of time never mix: nothing here is time. ``lab.profile`` turns counts into modelled nanoseconds.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import cython

from dmakit import consts
from dmakit.errors import MisuseError

if not cython.compiled:
    from dmakit.consts import L_LOCK_RBTREE, N_LEDGER
    from dmakit.turn import Turn

MOST_CPUS = 65536


@dataclass(frozen=True, slots=True)
class Row:
    """One counter: index, public name, unit, meaning."""

    index: int
    name: str
    unit: str
    meaning: str


_MEANINGS = {
    "IOVA_MAGAZINE": ("allocations", "IOVA allocations served by this CPU's loaded or previous magazine"),
    "IOVA_DEPOT": ("allocations", "IOVA allocations that took a full magazine from the depot"),
    "IOVA_TREE": ("allocations", "IOVA allocations served by a search of the tree"),
    "IOVA_FAILED": ("allocations", "IOVA allocations that failed"),
    "IOVA_FREE_MAGAZINE": ("frees", "IOVA frees into a magazine"),
    "IOVA_FREE_TREE": ("frees", "IOVA frees that removed a tree node at once"),
    "TREE_NODES": ("nodes", "tree nodes visited by allocation searches"),
    "RCACHE_FLUSHES": ("flushes", "flushes of all magazines and depots after a failed search"),
    "LOCK_RBTREE": ("locks", "acquisitions of iova_rbtree_lock"),
    "LOCK_DEPOT": ("locks", "acquisitions of a depot lock"),
    "LOCK_FQ": ("locks", "acquisitions of a flush-queue lock"),
    "LOCK_QI": ("locks", "acquisitions of the invalidation queue's lock"),
    "PTE_SET_1": ("entries", "level-1 entries written (4 KiB leaves)"),
    "PTE_SET_2": ("entries", "level-2 entries written (2 MiB leaves and tables)"),
    "PTE_SET_3": ("entries", "level-3 entries written (1 GiB leaves and tables)"),
    "PTE_SET_4": ("entries", "level-4 entries written"),
    "PTE_SET_5": ("entries", "level-5 entries written"),
    "PTE_CLEAR_1": ("entries", "level-1 entries cleared"),
    "PTE_CLEAR_2": ("entries", "level-2 entries cleared"),
    "PTE_CLEAR_3": ("entries", "level-3 entries cleared"),
    "PTE_CLEAR_4": ("entries", "level-4 entries cleared"),
    "PTE_CLEAR_5": ("entries", "level-5 entries cleared"),
    "TABLES_ALLOCATED": ("pages", "table pages allocated"),
    "TABLES_FREED": ("pages", "table pages freed"),
    "TABLE_FLUSH_BYTES": ("bytes", "cache-flushed bytes of table entries (incoherent page walker)"),
    "INV_PAGE": ("requests", "page-selective IOTLB invalidations"),
    "INV_DOMAIN": ("requests", "domain-selective IOTLB invalidations"),
    "INV_GLOBAL": ("requests", "global IOTLB invalidations"),
    "INV_DEVTLB": ("requests", "device-TLB invalidations"),
    "INV_WAIT": ("waits", "invalidation waits (one per submitted batch)"),
    "INV_CAUSE_UNMAP": ("requests", "invalidations caused by an unmap that flushes at once"),
    "INV_CAUSE_FQ_FULL": ("requests", "invalidations caused by a full flush queue"),
    "INV_CAUSE_FQ_TIMER": ("requests", "invalidations caused by the flush queue's timer"),
    "INV_CAUSE_SYNC_MAP": ("requests", "invalidations caused by a map-side sync"),
    "INV_CAUSE_TABLE": ("requests", "invalidations caused by a map that replaced a table"),
    "INV_CAUSE_OTHER": ("requests", "invalidations with another cause"),
    "FQ_ENTRIES": ("entries", "IOVA ranges queued for a later flush"),
    "FQ_FLUSHES_FULL": ("flushes", "flush-queue flushes because a queue was full"),
    "FQ_FLUSHES_TIMER": ("flushes", "flush-queue flushes by the timer"),
    "SYNC_MAP": ("calls", "map-side syncs asked of the IOMMU driver"),
    "WALK_READS": ("reads", "table entries read by the page walker"),
    "IOTLB_HITS": ("lookups", "device accesses served by the IOTLB"),
    "IOTLB_MISSES": ("lookups", "device accesses that needed a page walk"),
    "PSC_HITS": ("lookups", "page walks shortened by the paging-structure cache"),
    "DEVTLB_HITS": ("lookups", "device accesses served by the device's own TLB"),
    "FAULTS": ("faults", "device accesses that the IOMMU blocked"),
    "BOUNCE_MAPS": ("maps", "swiotlb mappings"),
    "BOUNCE_SLOTS": ("slots", "swiotlb slots taken"),
    "BOUNCED_BYTES": ("bytes", "bytes copied to or from bounce slots"),
    "BOUNCE_PAD_BYTES": ("bytes", "bytes zeroed around bounced pieces"),
    "CACHE_CLEAN_BYTES": ("bytes", "bytes of CPU-cache cleaning for a non-coherent device"),
    "CACHE_INV_BYTES": ("bytes", "bytes of CPU-cache invalidation for a non-coherent device"),
    "MAP_CALLS": ("calls", "dma_map_phys calls"),
    "UNMAP_CALLS": ("calls", "dma_unmap_phys calls"),
    "SG_CALLS": ("calls", "dma_map_sg calls"),
    "TRY_ALLOC_CALLS": ("calls", "dma_iova_try_alloc calls"),
    "LINK_CALLS": ("calls", "dma_iova_link calls"),
    "SYNC_CALLS": ("calls", "dma_iova_sync calls"),
    "UNLINK_CALLS": ("calls", "dma_iova_unlink calls"),
    "DESTROY_CALLS": ("calls", "dma_iova_destroy and dma_iova_free calls"),
    "DESCRIPTORS": ("entries", "PRP entries or SGL descriptors given to the device"),
    "DESCRIPTOR_PAGES": ("pages", "pages or pool blocks that hold descriptor lists"),
    "BOOKKEEPING_BYTES": ("bytes", "bytes kept per request to undo its mapping (states, vectors, sg entries)"),
    "P2P_LOOKUPS": ("lookups", "peer-to-peer decisions that were not answered by the memo"),
    "PASSES": ("passes", "passes over a request's segments by the mapping path"),
    "BOUNCE_AREA_LOCKS": ("locks", "acquisitions of a swiotlb area's lock"),
    "BOUNCE_POOLS": ("pools", "swiotlb pools added by the background worker"),
    "BOUNCE_TRANSIENT": ("pools", "transient swiotlb pools made for one mapping"),
    "DOMAIN_MAPS": ("maps", "physically contiguous runs mapped into an I/O page table"),
    "DOMAIN_UNMAPS": ("unmaps", "ranges unmapped from an I/O page table"),
}

ROWS: tuple[Row, ...] = tuple(
    Row(getattr(consts, f"L_{name}"), name.lower(), unit, meaning) for name, (unit, meaning) in _MEANINGS.items()
)


@cython.cclass
class Ledger:
    """The counters of one machine. ``counts``: int64 by ``L_*`` index; ``locks``: int64, 4 a CPU.

    ``turn``: what keeps the machine's threads apart.
    """

    def __init__(self, cpus: int = 1) -> None:
        if not 0 < cpus <= MOST_CPUS:
            raise MisuseError(f"cpus={cpus}: must be 1 to {MOST_CPUS}")
        self.cpus = cpus
        self.counts = memoryview(array("q", bytes(8 * N_LEDGER)))
        self.locks = memoryview(array("q", bytes(8 * 4 * cpus)))
        self.turn = Turn()

    def _lock(self, row: cython.int, cpu: cython.int) -> cython.void:
        """Count one acquisition of the lock of row L_LOCK_* by ``cpu``."""
        self.counts[row] += 1
        self.locks[cpu * 4 + row - L_LOCK_RBTREE] += 1

    def _alone(self) -> cython.void:
        """Wait until no other thread is inside a batch of this machine; the GIL is held from then on (``turn``)."""
        if self.turn.taken:
            self.turn._wait()

    def count(self, row: int, amount: int = 1) -> None:
        """Add to a row, for callers that are not compiled."""
        if not 0 <= row < N_LEDGER:
            raise MisuseError(f"row={row}: must be one of the L_* constants, 0 to {N_LEDGER - 1}")
        self.counts[row] += amount

    def snapshot(self) -> dict[str, int]:
        """All rows by public name."""
        return {row.name: self.counts[row.index] for row in ROWS}

    def observed(self, names: frozenset[str]) -> dict[str, int | None]:
        """All rows by public name, None for those that are not in ``names``: they were not counted."""
        return {row.name: self.counts[row.index] if row.name in names else None for row in ROWS}

    def lock_counts(self) -> list[dict[str, int]]:
        """Lock acquisitions, one dict a CPU."""
        names = ("rbtree", "depot", "fq", "qi")
        return [{name: self.locks[cpu * 4 + i] for i, name in enumerate(names)} for cpu in range(self.cpus)]

    def reset(self) -> None:
        """Set every counter to 0."""
        for i in range(len(self.counts)):
            self.counts[i] = 0
        for i in range(len(self.locks)):
            self.locks[i] = 0


def difference(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """Row by row ``after - before`` of two snapshots."""
    return {name: after[name] - before[name] for name in after}
