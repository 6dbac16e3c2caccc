"""The rules of map and unmap, one by one; table memory; what an incoherent walker costs."""

from __future__ import annotations

import errno

import pytest

from dmakit.iommu.formats.vtdss import VtdSecondStage
from dmakit.iommu.gather import Gather
from dmakit.iommu.pagetable import PageTable
from tests.iommu.world import G1, K4, M2, RW, R, W, World, entry, linked_tables

TOP = (1 << 64) - 1


def shape(table: PageTable) -> list[tuple[int, int]]:
    """(iova, level) of each leaf."""
    return [(leaf.iova, leaf.level) for leaf in table.leaves()]


def put(table: PageTable, iova: int, phys: int, size: int) -> Gather:
    gather = Gather()
    assert table.map(iova, phys, size, RW, gather) == 0
    assert gather.mapped == size
    return gather


def test_contiguous_aligned_memory_gets_the_largest_leaves() -> None:
    table = World().table()
    put(table, G1 - M2 - K4, 5 * G1 - M2 - K4, G1 + 2 * M2 + 2 * K4)
    ends = [(G1 - M2 - K4, 1), (G1 - M2, 2), (G1, 3), (2 * G1, 2), (2 * G1 + M2, 1)]
    assert shape(table) == ends
    assert table.iova_to_phys(G1 + 12345) == 5 * G1 + 12345


def test_memory_that_is_not_congruent_gets_small_leaves() -> None:
    table = World().table()
    put(table, M2, 4 * M2 + K4, M2)
    assert shape(table) == [(M2 + n * K4, 1) for n in range(512)]


@pytest.mark.parametrize(
    ("iova", "phys", "size", "prot", "error"),
    [
        (K4, K4, K4, 0, errno.EINVAL),
        (K4, K4, K4, 4, errno.EINVAL),
        (K4, K4, 0, R, errno.EINVAL),
        (K4, 1 << 52, K4, R, errno.ERANGE),
        (K4, TOP & ~0xFFF, K4, R, errno.ERANGE),
        (K4, (1 << 52) - K4, 2 * K4, R, errno.ERANGE),
        (1 << 48, K4, K4, R, errno.ERANGE),
        ((1 << 48) - K4, K4, 2 * K4, R, errno.ERANGE),
        (TOP & ~0xFFF, K4, 2 * K4, R, errno.EOVERFLOW),
        (K4 + 0x200, K4, K4, R, errno.ENXIO),
        (K4, K4 + 1, K4, R, errno.ENXIO),
        (K4, K4, K4 - 1, R, errno.ENXIO),
        (K4, 1 << 52, 0, 0, errno.EINVAL),
        (K4, 1 << 52, 0, R, errno.ERANGE),
        (TOP & ~0xFFF, 1, 2 * K4, R, errno.EOVERFLOW),
        (1 << 48, K4 + 1, K4, R, errno.ENXIO),
    ],
)
def test_bad_maps_get_the_kernels_errno_and_change_nothing(
    iova: int, phys: int, size: int, prot: int, error: int
) -> None:
    world = World()
    table, gather = world.table(), Gather()
    assert table.map(iova, phys, size, prot, gather) == -error
    assert (gather.mapped, gather.is_empty, table.table_pages, table.leaves()) == (0, True, 1, [])


def test_a_size_that_is_no_multiple_of_a_page_maps_what_it_can_and_says_enxio() -> None:
    table, gather = World().table(), Gather()
    assert table.map(K4, K4, 3 * K4 + 512, R, gather) == -errno.ENXIO
    assert gather.mapped == 3 * K4


def test_a19_mapping_over_anything_present_is_eaddrinuse() -> None:
    table, gather = World().table(), Gather()
    put(table, M2 + 8 * K4, 0x100000, K4)
    put(table, 4 * M2, 8 * M2, M2)
    for iova, phys, size, mapped in (
        (M2 + 8 * K4, 0x900000, K4, 0),  # the very page
        (M2, 0x900000, 16 * K4, 8 * K4),  # a page in the middle: what came before stays for the caller to undo
        (M2, 16 * M2, M2, 0),  # a large leaf over a table in use
        (4 * M2 + 5 * K4, 0x900000, K4, 0),  # a small leaf below a large one
        (4 * M2, 12 * M2, M2, 0),
    ):
        before = table.leaves()
        assert table.map(iova, phys, size, RW, gather) == -errno.EADDRINUSE
        assert gather.mapped == mapped
        assert table.unmap(iova, mapped, Gather()) == mapped
        assert table.leaves() == before


def test_a_large_leaf_replaces_an_empty_table_through_the_gather() -> None:
    world = World()
    table = world.table()
    put(table, G1 + M2, 0, K4)
    put(table, G1 + 5 * M2, 0, K4)
    assert table.unmap(G1 + M2, K4, Gather()) == K4 and table.unmap(G1 + 5 * M2, K4, Gather()) == K4
    middle, low = entry(table, G1, 3) & ~0xFFF, entry(table, G1 + M2, 2) & ~0xFFF
    gather = put(table, G1 + M2, 8 * M2, M2)
    assert (gather.start, gather.end, gather.freelist) == (G1 + M2, G1 + 2 * M2 - 1, low)
    assert table.unmap(G1 + M2, M2, Gather()) == M2
    gather = put(table, G1, G1, G1)  # two levels of empty tables
    assert (gather.start, gather.end) == (G1, 2 * G1 - 1)
    assert world.tables.in_use == table.table_pages + 3
    assert world.tables.free_list(low) == 1 and world.tables.free_list(gather.freelist) == 2
    assert middle not in linked_tables(table) and table.table_pages == world.pages.allocated_pages == 2


def test_unmap_inside_a_large_leaf_removes_nothing() -> None:
    table, gather = World().table(), Gather()
    put(table, 4 * M2, 8 * M2, 2 * M2)
    for iova, size in ((4 * M2 + K4, K4), (5 * M2 - K4, M2 + K4), (4 * M2 + 1, M2)):
        assert table.unmap(iova, size, gather) == 0
    assert gather.is_empty and shape(table) == [(4 * M2, 2), (5 * M2, 2)]


def test_unmap_that_ends_inside_a_large_leaf_removes_all_of_it() -> None:
    table, gather = World().table(), Gather()
    put(table, 4 * M2, 8 * M2, 2 * M2)
    assert table.unmap(4 * M2, M2 + K4, gather) == 2 * M2
    assert (gather.start, gather.end, gather.freelist) == (4 * M2, 6 * M2 - 1, 0)
    assert table.leaves() == []


def test_unmap_stops_at_the_first_hole() -> None:
    table, gather = World().table(), Gather()
    put(table, K4, K4, 2 * K4)
    put(table, 4 * K4, K4, K4)
    assert table.unmap(K4, 4 * K4, gather) == 2 * K4
    assert shape(table) == [(4 * K4, 1)]
    assert (gather.start, gather.end) == (K4, 3 * K4 - 1)
    assert table.unmap(0, 8 * K4, Gather()) == 0


@pytest.mark.parametrize(
    ("iova", "size"), [(K4, 0), (1 << 48, K4), ((1 << 48) - K4, 2 * K4), (TOP & ~0xFFF, 2 * K4), (TOP, 1)]
)
def test_unmap_outside_the_aperture_removes_nothing(iova: int, size: int) -> None:
    table, gather = World().table(), Gather()
    put(table, (1 << 48) - K4, K4, K4)
    assert table.unmap(iova, size, gather) == 0 and gather.is_empty


def test_tables_go_only_when_the_range_covers_their_whole_span() -> None:
    table = World().table()
    put(table, M2, K4, 2 * M2)
    assert table.table_pages == 5
    gather = Gather()
    assert table.unmap(M2, M2 - K4, gather) == M2 - K4
    assert table.unmap(2 * M2 - K4, K4, gather) == K4
    assert (gather.freelist, table.table_pages) == (0, 5)  # emptied in two steps: it stays
    assert table.unmap(2 * M2, M2, gather) == M2
    assert (gather.freelist != 0, table.table_pages) == (True, 4)


def test_a_freed_table_keeps_its_bytes_until_the_flush() -> None:
    world = World()
    table, gather = world.table(), Gather()
    put(table, G1, K4, G1)
    low, upper = entry(table, G1, 2) & ~0xFFF, entry(table, G1, 3) & ~0xFFF
    assert table.unmap(G1, G1, gather) == G1
    assert table.table_pages == 2  # the root and the level-3 table, which spans 512 GiB
    assert world.memory.read(low, 8) == bytes(8)  # leaves are cleared …
    assert world.memory.read(upper, 8) == bytes(8)
    held = world.pages.allocated_pages
    assert world.tables.free_list(gather.freelist) == 513
    assert world.pages.allocated_pages == held - 513


def test_a_full_unmap_of_the_aperture_keeps_only_the_root() -> None:
    table, gather = World(512 << 20).table(VtdSecondStage(page_sizes=K4 | M2 | G1), levels=3), Gather()
    put(table, 0, 0, 512 * G1)
    assert table.unmap(0, 512 * G1, gather) == 512 * G1
    assert table.table_pages == 1


def table_bytes(size: int, leaf: int, levels: int) -> int:
    """Bytes of tables for one aligned mapping of ``size`` in leaves of ``leaf``: a table for every span begun."""
    total, span = 0, leaf * 512
    for _ in range((leaf.bit_length() - 13) // 9 + 1, levels + 1):
        total += -(-size // span) * 4096
        span *= 512
    return total


def test_a34_table_memory_follows_the_formula() -> None:
    tib = 1 << 40
    assert table_bytes(tib, K4, 4) == (2 << 30) + (4 << 20) + (8 << 10) + K4  # 1 TiB at 4 KiB: 2 GiB of leaf tables
    assert table_bytes(tib, M2, 4) == (4 << 20) + (8 << 10) + K4
    for levels in (3, 4, 5):
        for size, leaf in ((G1, K4), (G1 + 3 * M2, K4), (64 * G1, M2), (256 * G1, G1), (K4, K4)):
            world = World()
            table = world.table(levels=levels)
            put(table, 0, K4 if leaf == K4 else M2 if leaf == M2 else 0, size)
            assert table.table_pages * 4096 == table_bytes(size, leaf, levels)
            assert world.count("tables_allocated") == table.table_pages == world.pages.allocated_pages
            assert table.unmap(0, size, Gather()) == size


def test_entries_written_are_counted_by_level() -> None:
    world = World()
    table = world.table(levels=5)
    put(table, G1 - K4, 3 * G1 - K4, G1 + M2 + 3 * K4)
    written = [world.count(f"pte_set_{level}") for level in range(1, 6)]
    # 1 + 2 small leaves; one 2 MiB leaf and two level-1 tables; one 1 GiB leaf and two level-2 tables; …
    assert written == [1 + 2, 1 + 2, 1 + 2, 1, 1]
    table.unmap(G1 - K4, G1 + M2 + 3 * K4, Gather())
    assert [world.count(f"pte_clear_{level}") for level in range(1, 6)] == [3, 1, 1, 0, 0]


def test_an_incoherent_walker_costs_whole_cache_lines_and_whole_new_tables() -> None:
    world = World()
    table = world.table(coherent=False)
    assert world.count("table_flush_bytes") == 4096
    put(table, 0, K4, K4)
    assert world.count("table_flush_bytes") == 4096 + 3 * (4096 + 64) + 64
    put(table, 7 * K4, K4, 2 * K4)  # the 8th and 9th entry lie in two lines
    table.unmap(7 * K4, K4, Gather())
    assert world.count("table_flush_bytes") == 4096 + 3 * (4096 + 64) + 64 + 128 + 64
    coherent = World()
    put(coherent.table(), 0, K4, K4)
    assert coherent.count("table_flush_bytes") == 0


def test_e8_pieces_may_be_mapped_in_any_order() -> None:
    order = [(n * 37) % 100 for n in range(100)]
    table, straight = World().table(), World().table()
    for n in order:
        put(table, M2 + n * K4, (1000 - 3 * n) * K4, K4)
    for n in range(100):
        put(straight, M2 + n * K4, (1000 - 3 * n) * K4, K4)
    assert table.leaves() == straight.leaves()
    assert all(table.iova_to_phys(M2 + n * K4) == (1000 - 3 * n) * K4 for n in range(100))


def test_a29_the_reverse_look_up_is_exact_for_every_byte() -> None:
    table = World().table()
    put(table, M2 + 3 * K4, 77 * K4, 2 * K4)
    put(table, 4 * M2, 9 * M2, M2)
    assert [table.iova_to_phys(M2 + 3 * K4 + n) for n in range(2 * K4)] == list(range(77 * K4, 79 * K4))
    assert all(table.iova_to_phys(4 * M2 + n) == 9 * M2 + n for n in range(0, M2, 509))
    assert [table.iova_to_phys(x) for x in (M2 + 3 * K4 - 1, M2 + 5 * K4, 4 * M2 - 1, 5 * M2, TOP)] == [0] * 5


def test_write_only_leaves_are_present() -> None:
    table, gather = World().table(), Gather()
    assert table.map(K4, K4, K4, W, gather) == 0
    assert table.map(K4, K4, K4, W, gather) == -errno.EADDRINUSE
    assert table.unmap(K4, K4, gather) == K4


@pytest.mark.parametrize(("first", "count"), [(0, 1), (0, 512), (3, 4), (511, 1), (256, 256), (1, 510)])
def test_a_new_table_holds_its_leaves_and_zeros_whatever_was_in_its_page(first: int, count: int) -> None:
    world = World(ram=1 << 20)
    table = world.table(VtdSecondStage(page_sizes=K4))
    pages = [world.pages.alloc() for _ in range(int(world.pages.free_pages_count))]
    for page in pages:
        world.memory.fill(page, K4, 0xFF)
        world.pages.free(page)
    put(table, G1 + first * K4, K4, count * K4)
    start = entry(table, G1, 2) & ~0xFFF
    words = list(world.memory.words[start >> 3 : (start >> 3) + 512])
    assert words == [0] * first + [(n + 1) * K4 | RW for n in range(count)] + [0] * (512 - first - count)


def test_a_table_that_was_used_last_is_forgotten_when_it_leaves_the_tree() -> None:
    world = World()
    table, gather = world.table(), Gather()
    put(table, 0, 8 * G1 + M2, G1)  # leaves of 2 MiB
    assert table.unmap(0, G1, gather) == G1
    world.tables.free_list(gather.freelist)
    taken = [world.pages.alloc() for _ in range(4)]  # the pages belong to somebody else now
    put(table, 0, 8 * G1 + M2, M2)
    put(table, M2, 8 * G1 + K4, 2 * K4)
    assert shape(table) == [(0, 2), (M2, 1), (M2 + K4, 1)]
    assert table.table_pages == 4
    assert linked_tables(table).isdisjoint(taken)


def test_a_large_leaf_that_takes_the_place_of_tables_makes_them_forgotten() -> None:
    world = World()
    table = world.table()
    put(table, G1, K4, K4)
    assert table.unmap(G1, K4, Gather()) == K4
    gather = put(table, G1, 4 * G1, G1)
    assert gather.freelist != 0
    assert table.map(G1 + K4, K4, K4, RW, Gather()) == -errno.EADDRINUSE
    assert table.map(G1 + M2, M2, M2, RW, Gather()) == -errno.EADDRINUSE
    assert shape(table) == [(G1, 3)]
