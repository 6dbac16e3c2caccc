"""A small machine: RAM, a unit, and tables written entry by entry, so that the tests decide each bit."""

from __future__ import annotations

import pytest

from dmakit.consts import PAGE_SIZE
from dmakit.errors import FaultError
from dmakit.iommu.formats.base import PtFormat
from dmakit.iommu.formats.vtdss import VtdSecondStage
from dmakit.iommu.port import DmaPort
from dmakit.iommu.unit import IommuUnit
from dmakit.ledger import Ledger
from dmakit.memory.physical import PhysicalMemory

SPAN = 64 << 20
SIZES = {1: 4096, 2: 2 << 20, 3: 1 << 30}
Options = dict[str, object]


class Tables:
    """Page tables of one domain, written directly as words. ``pages``: table page by (level, span number)."""

    def __init__(self, bench: Bench, fmt: PtFormat, levels: int) -> None:
        self.bench, self.fmt, self.levels = bench, fmt, levels
        self.pages: dict[tuple[int, int], int] = {}
        self.root = self._page(levels, 0)

    def _page(self, level: int, iova: int) -> int:
        key = (level, iova >> (12 + 9 * level))
        if key not in self.pages:
            self.pages[key] = self.bench.page()
            if level < self.levels:
                self.bench.memory.words[self.slot(level + 1, iova)] = self.pages[key] | self.fmt.table_bits
        return self.pages[key]

    def slot(self, level: int, iova: int) -> int:
        """Word index of the entry of ``iova`` in its table of ``level``; the tables above are made when missing."""
        if level < self.levels:
            self._page(level + 1, iova)
        return (self._page(level, iova) >> 3) + ((iova >> (3 + 9 * level)) & 511)

    def map(self, iova: int, phys: int, *, prot: int = 3, level: int = 1) -> None:
        """Write one leaf; prot bit 0 reads, bit 1 writes."""
        fmt = self.fmt
        entry = (
            phys | fmt.leaf_bits | (fmt.leaf_read_bits if prot & 1 else 0) | (fmt.leaf_write_bits if prot & 2 else 0)
        )
        self.bench.memory.words[self.slot(level, iova)] = entry | (fmt.large_bit if level > 1 else 0)

    def unmap(self, iova: int, *, level: int = 1) -> None:
        """Clear one entry; caches are told nothing."""
        self.bench.memory.words[self.slot(level, iova)] = 0

    def entry(self, iova: int, *, level: int = 1) -> int:
        """The word as it stands in memory."""
        return int(self.bench.memory.words[self.slot(level, iova)])


class Bench:
    """RAM from 0 to SPAN; pages are handed out from 1 MiB up."""

    def __init__(self, *, fmt: PtFormat | None = None, levels: int = 4, span: int = SPAN, **options: object) -> None:
        self.memory = PhysicalMemory(span)
        self.memory.add_region(0, SPAN)
        self.ledger = Ledger(2)
        self.unit = IommuUnit(self.memory, ledger=self.ledger, **options)  # type: ignore[arg-type]
        self.next = 1 << 20
        self.fmt = fmt or VtdSecondStage()
        self.tables = Tables(self, self.fmt, levels)
        self.did = self.unit.attach(self.fmt, self.tables.root, levels)
        self.port = DmaPort(self.memory, self.unit, self.did, source=0x20)

    def page(self, align: int = PAGE_SIZE) -> int:
        """A page of RAM nobody uses."""
        phys = (self.next + align - 1) & -align
        self.next = phys + PAGE_SIZE
        return phys

    def domain(self, levels: int = 4) -> tuple[int, Tables]:
        """One more domain: (did, tables)."""
        tables = Tables(self, self.fmt, levels)
        return self.unit.attach(self.fmt, tables.root, levels), tables

    def blocked(self, iova: int, *, write: bool = False, did: int | None = None) -> str:
        """The sentence with which an access is refused."""
        with pytest.raises(FaultError) as caught:
            self.unit.translate(self.did if did is None else did, iova, write, source=0x20)
        assert (caught.value.iova, caught.value.write) == (iova, write)
        return str(caught.value)

    def counts(self) -> dict[str, int]:
        """The ledger rows that are not 0, since the last call."""
        found = {name: count for name, count in self.ledger.snapshot().items() if count}
        self.ledger.reset()
        return found
