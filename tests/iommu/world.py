"""A small machine for page-table tests: memory, pages, ledger, tables; and helpers that look at it from outside."""

from __future__ import annotations

from dataclasses import dataclass, field

from dmakit.failpoint import FailPoint
from dmakit.iommu.domain import PageTableDomain
from dmakit.iommu.formats.base import PtFormat
from dmakit.iommu.formats.vtdss import VtdSecondStage
from dmakit.iommu.formats.x86_64 import X86_64
from dmakit.iommu.pagetable import PageTable
from dmakit.iommu.tables import TablePages
from dmakit.iommu.unit import IommuUnit
from dmakit.ledger import Ledger
from dmakit.memory.pages import PageAllocator
from dmakit.memory.physical import PhysicalMemory

K4, M2, G1 = 1 << 12, 1 << 21, 1 << 30
R, W, RW = 1, 2, 3
MAKERS = {"vtdss": VtdSecondStage, "x86_64": X86_64}
# every format, height and set of leaf sizes that the tests go through
SHAPES = [
    (name, levels, sizes)
    for name, heights in (("vtdss", (3, 4, 5)), ("x86_64", (3, 4, 5)))
    for levels in heights
    for sizes in (K4, K4 | M2, K4 | M2 | G1)
]


def page_format(name: str, sizes: int = K4 | M2 | G1) -> PtFormat:
    made: PtFormat = MAKERS[name](page_sizes=sizes)
    return made


@dataclass
class World:
    """``ram`` bytes of memory that is all handed out by ``pages``."""

    ram: int = 64 << 20
    fail: FailPoint = field(default_factory=FailPoint)

    def __post_init__(self) -> None:
        self.memory = PhysicalMemory(self.ram)
        self.memory.add_region(0, self.ram)
        self.ledger = Ledger()
        self.pages = PageAllocator(self.memory, 0, self.ram, fail=self.fail)
        self.tables = TablePages(self.pages, ledger=self.ledger)

    def table(self, fmt: PtFormat | None = None, levels: int = 4, *, coherent: bool = True) -> PageTable:
        return PageTable(fmt or VtdSecondStage(), self.tables, levels=levels, coherent_walker=coherent)

    def domain(self, fmt: PtFormat | None = None, levels: int = 4, **unit_options: object) -> PageTableDomain:
        unit = IommuUnit(self.memory, ledger=self.ledger, **unit_options)  # type: ignore[arg-type]
        return PageTableDomain(unit, fmt or VtdSecondStage(), self.tables, levels=levels)

    def count(self, row: str) -> int:
        return self.ledger.snapshot()[row]


def record(domain: PageTableDomain) -> list[tuple[object, ...]]:
    """Let the domain and its unit append to one list of events; returns it."""
    events: list[tuple[object, ...]] = []
    domain.events = events
    domain.unit.events = events
    return events


def entry(table: PageTable, iova: int, level: int) -> int:
    """The raw entry for ``iova`` in its table of ``level``, by reading memory (0 when the table is not there)."""
    node = table.root
    for at in range(table.levels, 0, -1):
        word = int.from_bytes(table.memory.read(node + 8 * ((iova >> (12 + 9 * (at - 1))) & 511), 8), "little")
        if at == level:
            return word
        if word == 0:
            return 0
        node = word & ((1 << 52) - 4096)
    raise AssertionError("no such level")


def linked_tables(table: PageTable) -> set[int]:
    """Addresses of all tables that hang in the tree, each seen once."""
    seen: set[int] = set()

    def visit(node: int, level: int) -> None:
        assert node not in seen, f"table {node:#x} is linked twice"
        seen.add(node)
        if level > 1:
            for index in range(512):
                word = table.memory.words[(node >> 3) + index]
                if word & table.fmt.present_bits and not word & table.fmt.large_bit:
                    visit(word & ((1 << 52) - 4096), level - 1)

    visit(table.root, table.levels)
    return seen
