"""Rows 4, 5, 6, 8, the first half of 9, and D1: page tables and translation, through the public calls of a domain.

The table has only 4 KiB leaves, the ledger counts, the walker is coherent. Row 4 maps 1 GiB in runs of 256 pages, rows
of one batch: half of the runs make a table. Row 5 unmaps it table by table, invalidates once and frees the tables.
Row 6 does one page: many in a batch, of which the unmap invalidates once, and as two Python calls, each
unmap with its invalidation. Row 8 translates random addresses of 1 GiB through an IOTLB of 512 entries, which nearly
all miss.
"""

from __future__ import annotations

import random
from array import array

from dmakit.bench.row import Bench, Row
from dmakit.consts import DIRTY_NO_CLEAR, PAGE_SIZE, PROT_READ, PROT_WRITE
from dmakit.iommu.domain import PageTableDomain
from dmakit.iommu.formats.vtdss import VtdSecondStage
from dmakit.iommu.tables import TablePages
from dmakit.iommu.unit import IommuUnit
from dmakit.ledger import Ledger
from dmakit.memory.pages import PageAllocator
from dmakit.memory.physical import PhysicalMemory

GIB = 1 << 30
RUN = 256 * PAGE_SIZE  # what one call of rows 4 and 5 maps
TABLE = 512 * PAGE_SIZE  # what one table of 4 KiB leaves spans
RW = PROT_READ | PROT_WRITE
IOVA = 4 * GIB
SINGLES = 1 << 16
ADDRESSES = 1 << 17
Words = memoryview


def small_pages(bench: Bench, key: str) -> PageTableDomain:
    """A domain of 4 KiB leaves, made once for each ``key``; one page on each side keeps the upper tables."""

    def make() -> PageTableDomain:
        memory = PhysicalMemory(2 * GIB)
        memory.add_region(0, 2 * GIB)
        ledger = Ledger()
        tables = TablePages(PageAllocator(memory, 0, 64 << 20), ledger=ledger)
        unit = IommuUnit(memory, ledger=ledger)
        domain = PageTableDomain(unit, VtdSecondStage(page_sizes=PAGE_SIZE), tables)
        domain.map(IOVA - PAGE_SIZE, 0, PAGE_SIZE, RW)
        domain.map(IOVA + GIB, 0, PAGE_SIZE, RW)
        return domain

    return bench.once(f"iommu {key}", make)


def spread(bench: Bench, key: str, count: int, step: int, first: int) -> Words[int]:
    """``count`` addresses ``step`` apart, made once."""
    return bench.once(f"iommu {key} {count}", lambda: memoryview(array("Q", range(first, first + count * step, step))))


def _runs(bench: Bench) -> tuple[PageTableDomain, int, Words[int], Words[int], Words[int]]:
    calls = max(2, bench.scaled(GIB // RUN) // 2 * 2)
    domain = small_pages(bench, "runs")
    iovas = spread(bench, "runs iova", calls, RUN, IOVA)
    phys = spread(bench, "runs phys", calls, RUN, GIB)
    sizes = bench.once(f"iommu runs sizes {calls}", lambda: memoryview(array("Q", [RUN]) * calls))
    return domain, calls * (RUN // PAGE_SIZE), iovas, phys, sizes


def _tables(bench: Bench, pages: int) -> tuple[Words[int], Words[int]]:
    """What ``_runs`` maps as rows of whole tables: what an unmap covers whole it frees."""
    count = pages * PAGE_SIZE // TABLE
    iovas = spread(bench, "tables iova", count, TABLE, IOVA)
    return iovas, bench.once(f"iommu tables sizes {count}", lambda: memoryview(array("Q", [TABLE]) * count))


def map_pages(bench: Bench) -> float:
    """4."""
    domain, pages, iovas, phys, sizes = _runs(bench)
    spent = bench.timed(lambda: domain.map_many(iovas, phys, sizes, RW), pages)
    domain.unmap_many(*_tables(bench, pages))
    return spent


def unmap_pages(bench: Bench) -> float:
    """5."""
    domain, pages, iovas, phys, sizes = _runs(bench)
    domain.map_many(iovas, phys, sizes, RW)
    tables = _tables(bench, pages)
    return bench.timed(lambda: domain.unmap_many(*tables), pages)


def single_pages(bench: Bench) -> float:
    """6a."""
    count = bench.scaled(SINGLES)
    domain = small_pages(bench, "runs")
    iovas = spread(bench, "single", count, PAGE_SIZE, IOVA)
    sizes = bench.once(f"iommu single sizes {count}", lambda: memoryview(array("Q", [PAGE_SIZE]) * count))

    def pairs() -> None:
        domain.map_many(iovas, iovas, sizes, RW)
        domain.unmap_many(iovas, sizes)

    return bench.timed(pairs, count)


def single_calls(bench: Bench) -> float:
    """6b."""
    domain = small_pages(bench, "runs")
    domain.map(IOVA + PAGE_SIZE, GIB, PAGE_SIZE, RW)  # the table stays
    spent = bench.statement(
        "map(iova, phys, size, prot); unmap(iova, size)",
        map=domain.map,
        unmap=domain.unmap,
        iova=IOVA,
        phys=GIB,
        size=PAGE_SIZE,
        prot=RW,
    )
    domain.unmap(IOVA + PAGE_SIZE, PAGE_SIZE)
    return spent


def _mapped(bench: Bench) -> tuple[PageTableDomain, Words[int]]:
    """A domain with 1 GiB of 4 KiB pages, and random addresses in it."""

    def make() -> Words[int]:
        small_pages(bench, "mapped").map(IOVA, GIB, bench.scaled(GIB // PAGE_SIZE) * PAGE_SIZE, RW)
        seeded, size = random.Random(1), bench.scaled(GIB // PAGE_SIZE) * PAGE_SIZE
        return memoryview(array("Q", [IOVA + seeded.randrange(size) for _ in range(bench.scaled(ADDRESSES))]))

    addresses = bench.once("iommu addresses", make)
    return small_pages(bench, "mapped"), addresses


def translate_batch(bench: Bench) -> float:
    """8."""
    domain, addresses = _mapped(bench)
    out = bench.once("iommu translated", lambda: memoryview(array("Q", bytes(8 * len(addresses)))))
    return bench.timed(lambda: domain.unit.translate_many(int(domain.did), addresses, out), len(addresses))


def look_up(bench: Bench) -> float:
    """9a."""
    domain, addresses = _mapped(bench)
    return bench.statement("look(iova)", look=domain.iova_to_phys, iova=addresses[len(addresses) // 2])


def scan_dirty(bench: Bench) -> float:
    """D1: every 64th page was written; what is found stays dirty, so that each scan finds the same."""
    domain, _ = _mapped(bench)
    pages = bench.scaled(GIB // PAGE_SIZE) // 64 * 64  # whole words of the bitmap

    def make() -> Words[int]:
        written = memoryview(array("Q", range(IOVA, IOVA + pages * PAGE_SIZE, 64 * PAGE_SIZE)))
        domain.set_dirty_tracking(True)
        domain.unit.translate_many(int(domain.did), written, array("Q", bytes(8 * len(written))), True)
        return memoryview(array("Q", bytes(pages // 8)))

    bitmap, size = bench.once("iommu dirty", make), pages * PAGE_SIZE
    return bench.timed(lambda: domain.read_and_clear_dirty(IOVA, size, bitmap, flags=DIRTY_NO_CLEAR), pages)


ROWS = [
    Row("D1", "dirty scan of 1 GiB of 4 KiB leaves, one in 64 dirty", "ns/leaf", None, "lower", "F", scan_dirty),
    Row("4", "map 4 KiB pages, 256 a call", "ns/page", 2.8, "lower", "F", map_pages),
    Row("5", "unmap the same, with gather and table freeing", "ns/page", 2.2, "lower", "F", unmap_pages),
    Row("6a", "map + unmap one page, in a batch", "ns/pair", 1.1, "lower", "E", single_pages),
    Row("6b", "map + unmap one page, two Python calls", "ns/pair", 6.5, "lower", "E", single_calls, times=2),
    Row("8", "translate, random over 1 GiB of 4 KiB pages", "ns/access", 1.6, "lower", "W", translate_batch),
    Row("9a", "iova_to_phys, one Python call", "ns/call", 9, "lower", "E", look_up),
]
