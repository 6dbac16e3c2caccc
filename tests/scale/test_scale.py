"""Large numbers, in deterministic terms: table pages to the page, nodes visited a search, bytes a live mapping.

Nothing here is timed. The small forms run always; ``pytest -m long`` goes to 10^7 live mappings and to 1 TiB of leaves.
"""

from __future__ import annotations

from array import array
from math import log2
from random import Random

import pytest

from dmakit.dma import batch
from dmakit.iommu.gather import Gather
from dmakit.iova.domain import IovaDomain
from dmakit.iova.tree import IovaTree
from dmakit.platform.soft import Machine
from tests.iommu.world import G1, K4, RW, World, page_format

LIMIT = (1 << 36) - 1
COLUMNS = {"lo": 8, "hi": 8, "left": 4, "right": 4, "parent": 4, "height": 4, "prev": 4, "next": 4}
GAP_COLUMNS = {"fit": 8, "best": 8}


# Table pages -----------------------------------------------------------------------------------------------------


def table_pages(start: int, size: int, levels: int) -> int:
    """Pages of a table of ``levels`` levels that maps [start, start + size) in 4 KiB leaves, the root included.

    A page at level 1 holds 512 leaves and spans 2 MiB; one at level n spans 512 times the one below. At each level
    there is one page for every span that is begun, so the count is exact: last span − first span + 1, and 1 for the
    root.
    """
    spans = [12 + 9 * level for level in range(1, levels)]
    return sum(((start + size - 1) >> span) - (start >> span) + 1 for span in spans) + 1


def check_tables(start: int, size: int, levels: int) -> None:
    world = World(ram=(table_pages(start, size, levels) + 16) * K4)
    table, gather = world.table(page_format("vtdss", K4), levels), Gather()
    before = world.pages.allocated_pages
    assert table.map(start, 1 << 40, size, RW, gather) == 0
    assert table.table_pages == world.pages.allocated_pages - before + 1 == table_pages(start, size, levels)
    for offset in (0, size // 2 // K4 * K4, size - K4):
        assert table.iova_to_phys(start + offset) == (1 << 40) + offset
    assert table.unmap(start, size, gather) == size
    world.tables.free_list(gather.freelist)
    table.destroy()
    assert world.tables.in_use == world.pages.allocated_pages == 0


@pytest.mark.parametrize("start", [0, K4, G1 - K4, (1 << 39) - 5 * K4])
@pytest.mark.parametrize("size", [K4, 512 * K4, 513 * K4, 96 << 20])
@pytest.mark.parametrize("levels", [4, 5])
def test_a_table_has_exactly_the_pages_of_the_formula(start: int, size: int, levels: int) -> None:
    check_tables(start, size, levels)


def test_the_formula_gives_the_documented_size_of_a_tebibyte() -> None:
    assert table_pages(0, 1 << 40, 4) * K4 == (2 << 30) + (4 << 20) + (8 << 10) + (4 << 10)


@pytest.mark.long
@pytest.mark.parametrize("start", [0, 3 * K4])
def test_a_tebibyte_of_small_leaves_has_exactly_the_pages_of_the_formula(start: int) -> None:
    check_tables(start, 1 << 40, 4)


# Nodes visited ---------------------------------------------------------------------------------------------------


def visits(live: int, calls: int = 2000, seed: int = 1) -> tuple[float, int]:
    """(mean, most) tree nodes that one allocation looks at in a fragmented space of about ``live`` ranges."""
    random = Random(seed)
    domain = IovaDomain(policy="augmented")
    sizes = array("Q", random.choices((1, 2, 4, 8, 33, 64, 100), k=live * 3 // 2))
    pfns = array("Q", bytes(8 * len(sizes)))
    assert domain.alloc_batch(sizes, LIMIT, pfns) == len(sizes)
    for at in random.sample(range(len(sizes)), len(sizes) - live):
        domain.free(pfns[at])
    assert domain.node_count == live
    total = most = 0
    for _ in range(calls):
        before = domain.ledger.snapshot()["tree_nodes"]
        pfn = domain.alloc(random.choice((1, 3, 16, 64, 200, 513)), LIMIT)
        spent = domain.ledger.snapshot()["tree_nodes"] - before
        total, most = total + spent, max(most, spent)
        domain.free(pfn)
    return total / calls, most


def check_visits(*numbers: int) -> None:
    """A search descends to the limit, climbs and descends to the gap, each at most the height of an AVL tree:
    ten times as many ranges cost a constant more."""
    means = []
    for live in numbers:
        mean, most = visits(live)
        assert most <= 3 * 1.45 * log2(live + 2), f"{most} nodes in one search among {live} ranges"
        means.append(mean)
    for fewer, more in zip(means, means[1:], strict=False):
        assert more - fewer <= 3 * 1.45 * log2(10), f"mean nodes a search: {means} at {numbers} ranges"


def test_an_allocation_visits_no_more_nodes_than_the_tree_is_high() -> None:
    check_visits(100, 1_000, 10_000)


@pytest.mark.long
def test_an_allocation_visits_no_more_nodes_than_the_tree_is_high_up_to_ten_million() -> None:
    check_visits(10_000, 100_000, 1_000_000, 10_000_000)


# Live mappings ---------------------------------------------------------------------------------------------------


def node_bytes(tree: IovaTree) -> float:
    """Bytes that the tree's arrays hold for each range in it, room to grow included."""
    columns = [getattr(tree, name) for name in (*COLUMNS, *GAP_COLUMNS)]
    return sum(column.nbytes for column in columns if len(column) > 1) / tree.count


def check_live(count: int, ram: str) -> None:
    """``count`` live mappings of a page each: all there, none in another's place, all gone afterwards."""
    with Machine(ram=ram, mode="strict", policy="augmented") as machine:
        device = machine.device("nvme0")
        first = machine.buffer(64 << 12, order=6).ranges[0][0]
        idle, tables = device.iovad.node_count, machine.tables.in_use
        phys = array("Q", (first + (at & 63) * K4 for at in range(count)))
        sizes, out = array("Q", (K4,)) * count, array("Q", bytes(8 * count))
        batch.map_many(device, phys, sizes, out, 0)
        assert device.iovad.node_count - idle == count == len(set(out))
        pages = (
            len({addr >> 21 for addr in out}) + len({addr >> 30 for addr in out}) + len({addr >> 39 for addr in out})
        )
        assert machine.tables.in_use - tables == pages
        for at in Random(count).sample(range(count), 1000):
            assert device.iova_to_phys(out[at] + 5) == phys[at] + 5
        room = 1.5 if count >= 1 << 20 else 2
        assert node_bytes(device.iovad.search.tree) <= room * sum((COLUMNS | GAP_COLUMNS).values())
        batch.unmap_many(device, out, sizes, 0)
        device.iovad.flush_rcaches()
        assert (device.iovad.node_count, machine.live()["iova_ranges"]) == (idle, 0)
        assert device.iova_to_phys(out[0]) == 0


def test_two_hundred_thousand_live_mappings() -> None:
    check_live(200_000 if core_is_compiled() else 5_000, "1G")


@pytest.mark.long
def test_ten_million_live_mappings() -> None:
    check_live(10_000_000 if core_is_compiled() else 300_000, "4G")


def core_is_compiled() -> bool:
    """The interpreted core does the same with fewer: it has no loops at C speed."""
    return not str(batch.__file__).endswith(".py")
