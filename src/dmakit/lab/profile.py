"""Modelled nanoseconds: ledger counts times a named cost profile, as an interval, every figure with its source.

A profile is a table of rates. Each rate prices some ledger rows with a low and a high cost in nanoseconds per
unit. The sum over a run's ledger is an interval [low, high]; it says what the counted work costs on hardware
where the sourced figures hold, and nothing about dmakit's own speed. What no published figure prices (a bounce
slot's search, lock contention) is left out and listed in ``NOT_PRICED``: it is in the counters all the same.

"Strategy X wins" means that its interval lies below the other's, or, where the intervals overlap, that its
midpoint does and its ``low`` and ``high`` are both lower: see ``cheaper``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_IOVA_C = "Linux's iova.c run in user space: 13.4 ns an alloc + free pair with its lock, 3.0 ns without"
_TREE = "Linux's iova.c: 2.65 ms for one search over 131,072 ranges = 20 ns a node visited"
_GENERIC_PT = "J. Gunthorpe, generic_pt series (i7-12700), VT-d second stage"
_STRICT = "A. Gupta, premapped dma-buf reads: STRICT 570 K, LAZY 1.93 M IOPS: 1,236 ns an I/O between them"
_MAPBENCH = "Q. Xia, dma_map_benchmark: unmap 1.0 to 1.4 us in strict mode"
_MEMCPY = "memcpy of 32 MiB at 14.5 GB/s (measured), half of that when the source is cold"
_FLUSH = "J. Gunthorpe, incoherent walker: 4 KiB map 331 ns against 249 ns, the flush itself about 190 ns"
_DESCRIPTOR = "libvfn: 1.16 ns a PRP entry of contiguous memory, 15 to 17 ns a scattered segment"


@dataclass(frozen=True, slots=True)
class Rate:
    """``low`` and ``high`` nanoseconds for one unit of each ledger row in ``rows``."""

    rows: tuple[str, ...]
    low: float
    high: float
    source: str


@dataclass(frozen=True, slots=True)
class Profile:
    """A named table of rates."""

    name: str
    rates: tuple[Rate, ...]

    def price(self, ledger: Mapping[str, int]) -> tuple[float, float]:
        """The interval [low, high] in nanoseconds for a ledger snapshot (missing rows count as 0)."""
        low = high = 0.0
        for rate in self.rates:
            units = sum(ledger.get(row, 0) for row in rate.rows)
            low += units * rate.low
            high += units * rate.high
        return low, high

    def parts(self, ledger: Mapping[str, int]) -> list[tuple[str, int, float, float]]:
        """What makes up the price: (rows, units, low ns, high ns), dearest first, zero parts left out."""
        rows = []
        for rate in self.rates:
            units = sum(ledger.get(row, 0) for row in rate.rows)
            if units:
                rows.append(("+".join(rate.rows), units, units * rate.low, units * rate.high))
        return sorted(rows, key=lambda row: -(row[2] + row[3]))


PUBLISHED = Profile(
    "published",
    (
        Rate(("iova_magazine", "iova_depot", "iova_free_magazine"), 1.5, 6.7, _IOVA_C),
        Rate(("iova_tree", "iova_free_tree"), 6.7, 20.0, f"{_IOVA_C}; {_TREE}"),
        Rate(("tree_nodes",), 20.0, 20.0, _TREE),
        Rate(("domain_maps",), 53.5, 55.0, f"{_GENERIC_PT}: 55 ns a map of one 4 KiB page"),
        Rate(("pte_set_1", "pte_set_2", "pte_set_3"), 1.5, 2.0, f"{_GENERIC_PT}: 391 to 518 ns for 256 pages"),
        Rate(("domain_unmaps",), 68.0, 87.0, f"{_GENERIC_PT}: 69 to 87 ns an unmap of one 4 KiB page"),
        Rate(("pte_clear_1", "pte_clear_2", "pte_clear_3"), 0.6, 1.3, f"{_GENERIC_PT}: 210 to 321 ns for 256 pages"),
        Rate(("inv_wait",), 1000.0, 1236.0, f"{_STRICT}; {_MAPBENCH}"),
        Rate(("bounced_bytes", "bounce_pad_bytes", "bookkeeping_bytes"), 1 / 14.5, 2 / 14.5, _MEMCPY),
        Rate(("table_flushes",), 82.0, 190.0, _FLUSH),
        Rate(("cache_clean_lines", "cache_inv_lines"), 82.0, 190.0, _FLUSH),
        Rate(("descriptors",), 1.16, 17.0, _DESCRIPTOR),
    ),
)

NOT_PRICED = (
    "contended locks",
    "the search for bounce slots",
    "page walks of the device",
    "cache misses of the driver",
)


def derived(ledger: Mapping[str, int]) -> dict[str, int]:
    """The ledger with the rows that rates need but hardware does not count by itself.

    ``table_flushes``: entries flushed for an incoherent walker; ``*_lines``: 64-byte cache lines.
    """
    rows = dict(ledger)
    rows["table_flushes"] = ledger.get("table_flush_bytes", 0) // 8
    rows["cache_clean_lines"] = -(-ledger.get("cache_clean_bytes", 0) // 64)
    rows["cache_inv_lines"] = -(-ledger.get("cache_inv_bytes", 0) // 64)
    return rows


def modelled(ledger: Mapping[str, int], profile: Profile = PUBLISHED) -> tuple[float, float]:
    """Modelled nanoseconds [low, high] of a ledger snapshot."""
    return profile.price(derived(ledger))


def cheaper(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether ``one`` costs less: both of its ends lie below the other's."""
    return one[0] < other[0] and one[1] < other[1]
