"""The dump of a real VT-d table decodes, and our code rebuilds it bit for bit, software bits included."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmakit.errors import InputError
from dmakit.iommu.dump import TableDump, parse, render
from dmakit.iommu.formats.vtdss import VtdSecondStage
from dmakit.iommu.gather import Gather
from dmakit.iommu.pagetable import PageTable
from tests.iommu.world import G1, K4, M2, RW, R, World

REAL = Path(__file__).resolve().parents[1] / "data" / "domain_translation_struct.txt"


def real() -> TableDump:
    (dump,) = parse(REAL.read_text().splitlines())
    return dump


def placed_at(addresses: list[int]) -> World:
    """A world whose page allocator has exactly these pages left, and hands them out in this order."""
    world = World()
    for page in range(K4, world.ram, K4):
        world.pages.take(page)
    for address in reversed(addresses):
        world.pages.free(address)
    return world


def rebuilt(dump: TableDump, fmt: VtdSecondStage, *, coherent: bool) -> PageTable:
    """The same mappings made by our code, with the tables at the same addresses."""
    world = placed_at(dump.tables(fmt))
    table = PageTable(fmt, world.tables, levels=dump.levels, coherent_walker=coherent)
    for leaf in dump.leaves(fmt):
        assert table.map(leaf.iova, leaf.phys, leaf.size, leaf.entry & RW, Gather()) == 0
    return table


def test_the_real_dump_decodes() -> None:
    dump, fmt = real(), VtdSecondStage()
    leaves = dump.leaves(fmt)
    assert (dump.device, dump.root, dump.levels, len(leaves)) == ("0000:00:04.0", 0x3A2A000, 4, 44)
    assert (leaves[0].iova, leaves[0].phys, leaves[-1].phys) == (0xFFFC0000, 0x3C80000, 0x3CAC000)
    assert {(leaf.level, leaf.entry & 0xFFF) for leaf in leaves} == {(1, 3)}
    assert dump.tables(fmt) == [0x3A2A000, 0x3CE7000, 0x3CDC000, 0x3C69000]


def test_the_real_table_is_rebuilt_bit_for_bit() -> None:
    dump, fmt = real(), VtdSecondStage()
    table = rebuilt(dump, fmt, coherent=False)
    slots = dump.slots(fmt)
    assert len(slots) == 44 + 3
    ours = {at: int.from_bytes(table.memory.read(at, 8), "little") for at in slots}
    assert ours == slots
    for address in dump.tables(fmt):  # and not one bit more
        page = table.memory.read(address, K4)
        used = {at - address for at in slots if address <= at < address + K4}
        assert all(page[n : n + 8] == bytes(8) for n in range(0, K4, 8) if n not in used)
    assert render(table, "0000:00:04.0") == REAL.read_text()


def test_on_a_coherent_unit_the_same_table_lacks_only_the_software_bit() -> None:
    dump, fmt = real(), VtdSecondStage()
    table = rebuilt(dump, fmt, coherent=True)
    (ours,) = parse(render(table, dump.device).splitlines())
    for row, kernel in zip(ours.rows, dump.rows, strict=True):
        assert row.path == tuple(e & ~(1 << 10) if i < 4 else e for i, e in enumerate(kernel.path))


@pytest.mark.parametrize("levels", [3, 4, 5])
def test_our_own_tables_print_and_read_back(levels: int) -> None:
    table = World().table(levels=levels)
    table.map(G1 - M2 - K4, 5 * G1 - M2 - K4, G1 + 2 * M2, RW, Gather())
    table.map(9 * G1, K4, 3 * K4, R, Gather())
    (dump,) = parse(render(table, "0000:01:00.0").splitlines())
    assert dump.leaves(table.fmt) == table.leaves()
    assert (dump.levels, dump.root) == (levels, table.root)


def test_what_is_no_dump_is_refused() -> None:
    text = REAL.read_text().splitlines()
    with pytest.raises(InputError, match=r"^line 3: '0x00000000fffc0 \|\\t0x00' is not part of a domain_"):
        parse([*text[:2], "0x00000000fffc0 |\t0x00"])
    with pytest.raises(InputError, match=r"^line 1: "):
        parse(text[2:])
    assert parse([]) == []
