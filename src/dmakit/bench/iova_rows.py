"""Rows 1 to 3: the IOVA allocator.

* **1, 2**: one allocation and one free of a single page that the magazines serve, as in an I/O path that has warmed
  up: 64 at a time in a batch (two calls with arrays), and as two Python calls.
* **3**: one allocation that only the last gap of a fragmented space can serve. The space is the 4 GiB below the 32-bit
  limit: of its top 2**18 pages every other one is allocated (131,072 ranges), and the one gap of 64 pages lies below
  them all. Before, all pages were freed and allocated once more in random order, as in a machine that has run for a
  while: neighbours in the space are strangers in memory. The linux policy walks all ranges; the augmented one does
  not. Freed and allocated again between two measurements: the topmost page, which makes the linux policy begin there.
"""

from __future__ import annotations

from array import array
from random import Random
from time import perf_counter_ns

from dmakit.bench.row import Bench, Row
from dmakit.iova.domain import IovaDomain

_LIMIT = (1 << 20) - 1
_DEPTH = 64
_PAGES = 1 << 18
_GAP = 64


def pair_in_a_batch(bench: Bench) -> float:
    """ns a pair of one ``alloc_batch`` and one ``free_batch`` of 64 single pages."""
    domain = bench.once("iova batch", lambda: IovaDomain())
    sizes, pfns = array("Q", [1]) * _DEPTH, array("Q", [0]) * _DEPTH
    domain.alloc_batch(sizes, _LIMIT, pfns)
    domain.free_batch(pfns, sizes)
    both = {"alloc": domain.alloc_batch, "free": domain.free_batch}
    code = "alloc(sizes, top, pfns); free(pfns, sizes)"
    return bench.statement(code, 500, **both, sizes=sizes, pfns=pfns, top=_LIMIT) / _DEPTH


def pair_of_calls(bench: Bench) -> float:
    """ns of ``free_fast(alloc_fast(…), 1)``."""
    domain = bench.once("iova calls", lambda: IovaDomain())
    domain.free_fast(domain.alloc_fast(1, _LIMIT), 1)
    both = {"alloc": domain.alloc_fast, "free": domain.free_fast}
    return bench.statement("free(alloc(1, top), 1)", 4000, **both, top=_LIMIT)


def fragmented(policy: str, pages: int = _PAGES) -> IovaDomain:
    """A domain whose 32-bit space is in ``pages / 2`` pieces; see the head of this file."""
    domain = IovaDomain(policy=policy)
    low = _LIMIT + 1 - pages
    domain.reserve(1, _GAP - 1)
    domain.reserve(2 * _GAP, low - 1)
    held = [domain.alloc(1, _LIMIT) for _ in range(pages)]
    Random(1).shuffle(held)
    for pfn in held:
        domain.free(pfn)
    for pfn in [domain.alloc(1, _LIMIT) for _ in range(pages)]:
        if pfn % 2 == 0:
            domain.free(pfn)
    return domain


def _from_the_top(domain: IovaDomain, times: int) -> float:
    """ns of one allocation of the low gap, by a search that begins at the top of the space; mean of ``times``."""
    spent = 0
    for _ in range(times):
        domain.free(_LIMIT)
        domain.alloc(1, _LIMIT)
        begin = perf_counter_ns()
        pfn = domain.alloc(_GAP, _LIMIT)
        spent += perf_counter_ns() - begin
        domain.free(pfn)
    return spent / times


def _spaces(bench: Bench) -> tuple[IovaDomain, IovaDomain]:
    pages = max(64, bench.scaled(_PAGES) // 2 * 2)
    return bench.once("iova fragmented", lambda: (fragmented("linux", pages), fragmented("augmented", pages)))


def linux_against_augmented(bench: Bench) -> tuple[float, float]:
    """ns an allocation of the augmented policy, and of the linux policy."""
    linux, augmented = _spaces(bench)
    return _from_the_top(augmented, bench.scaled(1000)), _from_the_top(linux, 1)


def augmented_alone(bench: Bench) -> float:
    """ns an allocation of the augmented policy."""
    return _from_the_top(_spaces(bench)[1], bench.scaled(1000))


ROWS = [
    Row("1", "IOVA alloc + free, magazines, in a batch", "ns/pair", 0.45, "lower", "E", pair_in_a_batch),
    Row("2", "IOVA alloc + free, two Python calls", "ns/pair", 2.3, "lower", "E", pair_of_calls, times=2),
    Row("3a", "fragmented space, augmented against linux", "ns/alloc", 1500, "higher", "own", linux_against_augmented),
    Row("3b", "fragmented space, augmented", "ns/alloc", 150, "lower", "E", augmented_alone),
]
