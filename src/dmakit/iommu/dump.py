"""The kernel's view of a live VT-d table as text: read it, and print our own tables in the same form.

``/sys/kernel/debug/iommu/intel/domain_translation_struct`` prints, for each device, the address of its root table and
one row a leaf: the page number of the IOVA and the raw entries on the way to it, level 5 first (0 where the table
has no such level, or the leaf stands higher). Models ``drivers/iommu/intel/debugfs.c``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from dmakit.consts import PAGE_SHIFT, PT_ENTRIES, PT_INDEX_BITS, PT_MAX_LEVELS
from dmakit.errors import InputError
from dmakit.iommu.formats.base import PtFormat
from dmakit.iommu.pagetable import PageTable
from dmakit.iommu.tree import Leaf, level_shift

_DEVICE = re.compile(r"Device (\S+) (?:with pasid ([0-9a-fx]+) )?@0x([0-9a-f]+)$")
_ROW = re.compile(r"0x([0-9a-f]+) \|" + r"\t0x([0-9a-f]{16})" * PT_MAX_LEVELS + "$")
_HEADER = "\t".join((f"{'IOVA_PFN':<17}", *(f"{title:<18}" for title in ("PML5E", "PML4E", "PDPE", "PDE")), "PTE"))


@dataclass(frozen=True, slots=True)
class Row:
    """One leaf: page number of its IOVA, and the entries of levels 5 to 1 on the way to it."""

    pfn: int
    path: tuple[int, ...]

    @property
    def level(self) -> int:
        """Level of the leaf: the deepest entry that is not 0."""
        return min(PT_MAX_LEVELS - i for i, entry in enumerate(self.path) if entry)


@dataclass(frozen=True, slots=True)
class TableDump:
    """The table of one device: name, physical address of the root, rows in ascending order."""

    device: str
    root: int
    rows: tuple[Row, ...]

    @property
    def levels(self) -> int:
        """Height of the table (0 when it is empty: an empty dump does not tell)."""
        return max((PT_MAX_LEVELS - i for row in self.rows for i, entry in enumerate(row.path) if entry), default=0)

    def leaves(self, fmt: PtFormat) -> list[Leaf]:
        """The mappings that the rows describe."""
        found = []
        for row in self.rows:
            entry, size = row.path[PT_MAX_LEVELS - row.level], 1 << level_shift(row.level)
            phys = entry & int(fmt.address_mask) & -size
            found.append(Leaf((row.pfn << PAGE_SHIFT) & -size, phys, size, row.level, entry))
        return found

    def tables(self, fmt: PtFormat) -> list[int]:
        """Physical addresses of all tables, in the order in which mapping the rows one by one makes them."""
        seen = {self.root: None}
        for row in self.rows:
            for entry in row.path[: PT_MAX_LEVELS - row.level]:
                if entry:
                    seen.setdefault(entry & int(fmt.address_mask))
        return list(seen)

    def slots(self, fmt: PtFormat) -> dict[int, int]:
        """Every entry that the dump shows: physical address of the entry -> its 64 bits."""
        found: dict[int, int] = {}
        for row in self.rows:
            table = self.root
            for level in range(self.levels, row.level - 1, -1):
                entry = row.path[PT_MAX_LEVELS - level]
                index = (row.pfn >> (PT_INDEX_BITS * (level - 1))) & (PT_ENTRIES - 1)
                found[table + 8 * index] = entry
                table = entry & int(fmt.address_mask)
        return found


def parse(lines: Iterable[str]) -> list[TableDump]:
    """The tables of a dump; InputError names the line that is neither a device, the header, a row, nor blank."""
    dumps: list[tuple[str, int, list[Row]]] = []
    for number, raw in enumerate(lines, 1):
        line = raw.rstrip()
        if match := _DEVICE.match(line):
            dumps.append((match[1], int(match[3], 16), []))
        elif (match := _ROW.match(line)) and dumps and any(int(match[i], 16) for i in range(2, PT_MAX_LEVELS + 2)):
            path = tuple(int(match[i], 16) for i in range(2, PT_MAX_LEVELS + 2))
            dumps[-1][2].append(Row(int(match[1], 16), path))
        elif line and not line.startswith("IOVA_PFN"):
            raise InputError(f"line {number}: {line[:60]!r} is not part of a domain_translation_struct dump")
    return [TableDump(device, root, tuple(rows)) for device, root, rows in dumps]


def render(table: PageTable, device: str) -> str:
    """``table`` as the kernel prints it for ``device``."""
    lines = [f"Device {device} @0x{int(table.root):x}", _HEADER]
    for leaf in table.leaves():
        path = [0] * PT_MAX_LEVELS
        node = int(table.root)
        for level in range(int(table.levels), leaf.level - 1, -1):
            entry = int(table.memory.words[(node >> 3) + ((leaf.iova >> level_shift(level)) & (PT_ENTRIES - 1))])
            path[PT_MAX_LEVELS - level] = entry
            node = entry & int(table.fmt.address_mask)
        lines.append("\t".join([f"0x{leaf.iova >> PAGE_SHIFT:013x} |"] + [f"0x{entry:016x}" for entry in path]))
    return "\n".join(lines) + "\n"
