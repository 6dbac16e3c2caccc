"""The page-table domain: what it sends to the unit and when, how it undoes itself, batches, fail points."""

from __future__ import annotations

import errno
from array import array

import numpy as np
import pytest

from dmakit.errors import DmakitError, ExhaustedError, FaultError, MisuseError
from dmakit.iommu.domain import PageTableDomain
from dmakit.iommu.formats.x86_64 import X86_64
from dmakit.iommu.gather import Gather
from tests.iommu.world import G1, K4, M2, RW, R, World, linked_tables, record
from tests.support.sweep import sweep

LEAF = 0xFFC00000
PAGE_SELECTIVE = 0x200F2  # domain id 2, drain reads and writes
TOP = (1 << 64) - 1


def flush(start: int, size: int, mask: int, *, ih: bool) -> list[tuple[object, ...]]:
    """The events of one page-selective invalidation."""
    end = start + size - 1
    block = start >> (12 + mask) << (12 + mask)
    return [
        ("tlbsync_in", start, end, 0),
        ("flush_range", start, end, block, mask),
        ("qi", PAGE_SELECTIVE, block | ih << 6 | mask),
    ]


def test_a_map_sends_nothing_and_an_unmap_one_flush() -> None:
    domain = World().domain()
    events = record(domain)
    domain.map(0xFFFFC000, 0x4D28000, 4 * K4, R)
    domain.sync_map(0xFFFFC000, 4 * K4)
    assert events == [("map", 0xFFFFC000, 0x4D28000, 4 * K4), ("syncmap_in", 0xFFFFC000, 4 * K4)]
    events.clear()
    assert domain.unmap(0xFFFFC000, 4 * K4) == 4 * K4
    assert events == [("unmap", 0xFFFFC000, 4 * K4, 4 * K4), *flush(0xFFFFC000, 4 * K4, 2, ih=True)]


def test_in_caching_mode_a_sync_is_one_page_selective_request() -> None:
    domain = World().domain(caching_mode=True)
    domain.map(0xFFFFC000, 0x4D28000, 3 * K4, R)
    events = record(domain)
    domain.sync_map(0xFFFFC000, 3 * K4)
    assert events == [
        ("syncmap_in", 0xFFFFC000, 3 * K4),
        ("flush_range_np", 0xFFFFC000, 0xFFFFEFFF, 0xFFFFC000, 2),
        ("qi", PAGE_SELECTIVE, 0xFFFFC002),
    ]


def test_two_pages_at_odd_alignment_become_a_block_of_four() -> None:
    domain = World().domain()
    domain.map(K4, K4, 2 * K4, R)
    events = record(domain)
    domain.unmap(K4, 2 * K4)
    assert events[1:] == flush(K4, 2 * K4, 2, ih=True)


def test_a_leaf_that_replaces_an_empty_table_is_flushed_before_its_map_event() -> None:
    world = World()
    domain = world.domain()
    domain.map(LEAF, 0x4200000, K4, R)
    domain.unmap(LEAF, K4)
    tables = world.tables.in_use
    events = record(domain)
    domain.map(LEAF, 0x4200000, 2 * M2, R)  # only the first of the two leaves replaces a table
    assert events == [*flush(LEAF, M2, 9, ih=False), ("map", LEAF, 0x4200000, 2 * M2)]
    assert world.tables.in_use == tables - 1
    assert world.count("inv_cause_table") == 1


def test_a19_a_failing_map_undoes_itself_and_flushes_at_once() -> None:
    domain = World().domain()
    domain.map(0xFFFF5000, 0x4CAD000, K4, R)
    events = record(domain)
    with pytest.raises(
        MisuseError, match=r"^map \[0xffff4000, 0xffff8000\) to 0x4cac000: something is mapped at or"
    ) as e:
        domain.map(0xFFFF4000, 0x4CAC000, 4 * K4, R)
    assert e.value.errno == errno.EADDRINUSE
    assert events == [
        ("map", 0xFFFF4000, 0x4CAC000, K4),
        ("unmap", 0xFFFF4000, K4, K4),
        *flush(0xFFFF4000, K4, 0, ih=True),
    ]
    events.clear()
    with pytest.raises(MisuseError, match="something is mapped at or just above 0xffff5000$"):
        domain.map(0xFFFF5000, 0x4CAC000, K4, R)
    assert events == [("map", 0xFFFF5000, 0x4CAC000, 0), ("unmap", 0xFFFF5000, 0, 0)]
    assert [domain.iova_to_phys(0xFFFF4000 + n * K4) for n in range(4)] == [0, 0x4CAD000, 0, 0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((K4, K4, K4, 0), r"^map \[0x1000, 0x2000\) to 0x1000: prot=0x0 permits neither reading nor writing$"),
        ((K4, K4, 0, R), r"^map \[0x1000, 0x1000\) to 0x1000: the size must not be 0$"),
        ((K4 + 1, K4, K4, R), r": addresses and size must be multiples of 4096$"),
        (
            (1 << 48, K4, K4, R),
            r"highest address of the table \(IOVA 0xffffffffffff, physical address 0xfffffffffffff\)$",
        ),
        ((TOP & -K4, K4, 2 * K4, R), r": wraps around the end of the 64-bit address space$"),
        ((-1, K4, K4, R), r"^iova=-1: must be from 0 to 18446744073709551615$"),
        ((K4, 1 << 64, K4, R), r"^phys=18446744073709551616: must be from 0 to 18446744073709551615$"),
        ((K4, K4, "x", R), r"^size='x': must be an integer$"),
    ],
)
def test_errors_name_the_value_and_the_rule(args: tuple[int, int, int, int], message: str) -> None:
    domain = World().domain()
    with pytest.raises(MisuseError, match=message):
        domain.map(*args)


def test_a_map_without_permission_warns_as_the_kernel_does() -> None:
    domain = World().domain()
    events = record(domain)
    with pytest.raises(MisuseError):
        domain.map(K4, K4, K4, 0)
    assert [event[:2] for event in events] == [
        ("warn", "vtdss_map_range: neither read nor write permission"),
        ("map", K4),
        ("unmap", K4),
    ]


def test_an_unmap_that_removes_nothing_sends_no_flush() -> None:
    domain = World().domain()
    domain.map(LEAF, 0x4200000, M2, R)
    events = record(domain)
    assert domain.unmap(LEAF + K4, K4) == 0
    assert events == [("unmap", LEAF + K4, K4, 0)]
    events.clear()
    assert domain.unmap(LEAF, K4) == M2  # and one that cuts a leaf flushes all of it
    assert events == [("unmap", LEAF, K4, M2), *flush(LEAF, M2, 9, ih=True)]


def test_ih_is_clear_exactly_when_a_table_was_freed() -> None:
    domain = World().domain()
    domain.map(LEAF, K4, M2, R)
    events = record(domain)
    domain.unmap(LEAF, M2 - K4)
    domain.unmap(LEAF + M2 - K4, K4)
    assert [event[2] >> 6 & 1 for event in events if event[0] == "qi"] == [1, 1]
    domain.map(LEAF, K4, M2, R)
    events.clear()
    domain.unmap(LEAF, M2)
    assert events[1:] == flush(LEAF, M2, 9, ih=False)


def test_a_queued_gather_is_left_to_the_flush_queue() -> None:
    world = World()
    domain = world.domain()
    domain.map(LEAF, K4, M2, R)
    tables, events, gather = world.tables.in_use, record(domain), Gather(queued=True)
    assert domain.unmap_gather(LEAF, M2, gather) == M2
    domain.flush(gather)
    assert events == [("unmap", LEAF, M2, M2)]
    assert (gather.is_empty, gather.freelist != 0, world.tables.in_use) == (True, True, tables)
    domain.flush_all()
    assert events[1:] == [("flush_range", 0, TOP, 0, 52), ("qi", 0x200E2, 0)]
    assert world.tables.free_list(gather.freelist) == 1


class Watch(list[tuple[object, ...]]):
    """An event list that looks at the number of table pages in use whenever a request goes out."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.in_use: list[int] = []

    def append(self, event: tuple[object, ...]) -> None:
        if event[0] == "qi":
            self.in_use.append(self.world.tables.in_use)
        super().append(event)


def test_table_pages_are_freed_after_the_request_never_before() -> None:
    world = World()
    domain = world.domain()
    domain.events = domain.unit.events = watch = Watch(world)
    domain.map(LEAF, K4, M2, R)
    domain.unmap(LEAF, M2)  # frees one table
    domain.map(LEAF, K4, K4, R)
    domain.unmap(LEAF, K4)
    domain.map(LEAF, M2, M2, R)  # replaces one
    assert watch.in_use == [4, 4, 4]
    assert world.tables.in_use == 3


def test_stale_translations_answer_until_the_flush_and_not_after() -> None:
    domain = World().domain()
    domain.map(LEAF, 0x123000, K4, RW)
    assert domain.unit.translate(domain.did, LEAF + 5) == 0x123005
    gather = Gather()
    domain.unmap_gather(LEAF, K4, gather)
    assert domain.iova_to_phys(LEAF) == 0
    assert domain.unit.translate(domain.did, LEAF + 5) == 0x123005
    domain.flush(gather)
    assert gather.is_empty
    with pytest.raises(FaultError):
        domain.unit.translate(domain.did, LEAF + 5)


@pytest.mark.parametrize("fmt", [None, X86_64()], ids=["vtdss", "x86_64"])
@pytest.mark.parametrize("levels", [3, 4, 5])
def test_hardware_walks_what_software_wrote(fmt: X86_64 | None, levels: int) -> None:
    domain = World().domain(fmt, levels)
    top = domain.aperture_end + 1
    for iova, phys, size in ((top - K4, 0x5000, K4), (5 * M2, 9 * M2, M2), (3 * G1, 0, G1)):
        domain.map(iova, phys, size, RW)
        for offset in (0, 77, size - 1):
            assert domain.unit.translate(domain.did, iova + offset, True) == phys + offset


def rows(*values: int) -> array[int]:
    return array("Q", values)


def test_batches_do_what_single_calls_do() -> None:
    one, many = World().domain(), World().domain()
    iovas = np.arange(1, 200, 2, dtype=np.uint64) * np.uint64(K4)
    phys = iovas[::-1].copy()
    sizes = np.full(len(iovas), K4, dtype=np.uint64)
    for iova, to in zip(iovas.tolist(), phys.tolist(), strict=True):
        one.map(iova, to, K4, RW)
    many.map_many(iovas, phys, sizes, RW)
    assert many.table.leaves() == one.table.leaves()
    out = np.zeros(len(iovas), dtype=np.uint64)
    assert many.iova_to_phys_many(iovas + np.uint64(7), out) == len(iovas)
    assert (out == phys + np.uint64(7)).all()
    assert many.iova_to_phys_many(rows(0, K4, 2 * K4), answers := rows(9, 9, 9)) == 1
    assert answers[0] == answers[2] == 0
    events = record(many)
    assert many.unmap_many(iovas, sizes) == len(iovas) * K4
    assert [event[0] for event in events].count("qi") == 1
    assert many.table.leaves() == []


def test_a_batch_that_fails_maps_nothing() -> None:
    domain = World().domain()
    domain.map(9 * K4, K4, K4, R)
    with pytest.raises(
        MisuseError, match=r"^map \[0x8000, 0xa000\) to 0x3000: something is mapped at or just above 0x9"
    ):
        domain.map_many(rows(K4, 2 * K4, 8 * K4), rows(K4, K4, 3 * K4), rows(K4, K4, 2 * K4), R)
    assert [leaf.iova for leaf in domain.table.leaves()] == [9 * K4]
    with pytest.raises(MisuseError, match=r"^iovas, phys, sizes have 1, 1, 2 items: must have the same number$"):
        domain.map_many(rows(0), rows(0), rows(0, 0), R)
    with pytest.raises(MisuseError, match=r"^phys: must be a contiguous buffer of unsigned 64-bit words$"):
        domain.map_many(rows(0), [0], rows(0), R)
    with pytest.raises(MisuseError, match=r"^out has 1 items: needs 2$"):
        domain.iova_to_phys_many(rows(0, 0), rows(0))


PIECES = ((G1 - 2 * K4, G1, 4 * K4), (40 * G1, K4, M2), (80 * G1 + M2, 4 * M2, M2 + K4))


@pytest.mark.parametrize("levels", [3, 4, 5])
@pytest.mark.parametrize("batch", [False, True])
def test_a_map_that_runs_out_of_tables_changes_nothing(levels: int, batch: bool) -> None:
    """Every table allocation of a map fails in turn: no translation changes, no table leaks or is lost."""

    def make() -> PageTableDomain:
        domain = World().domain(levels=levels)
        domain.map(7 * K4, K4, K4, R)
        return domain

    def operation(domain: PageTableDomain) -> None:
        if batch:
            domain.map_many(*(array("Q", column) for column in zip(*PIECES, strict=True)), RW)
        else:
            domain.map(G1 - 2 * M2 - K4, 5 * K4, 2 * M2 + 4 * K4, RW)

    def check(domain: PageTableDomain, failed: bool) -> None:
        leaves = domain.table.leaves()
        assert (len(leaves) == 1) == failed
        tables = domain.tables
        assert tables.in_use == domain.table.table_pages == len(linked_tables(domain.table))
        assert tables.pages.allocated_pages == tables.in_use
        operation(domain) if failed else None
        domain.detach()
        domain.detach()
        assert tables.pages.allocated_pages == tables.in_use == 0

    uses = sweep(make, lambda domain: domain.tables.pages.fail, operation, check)
    assert uses == (7 if batch and levels == 3 else uses) and uses >= 3


def test_a_domain_that_cannot_be_made_leaks_nothing() -> None:
    world = World()
    world.fail.arm(0)
    with pytest.raises(ExhaustedError, match=r"^no page for the root table of vtdss$"):
        world.domain()
    domain = world.domain(domains=3)  # ids 0 and 1 are reserved: one domain fits
    held = world.pages.allocated_pages
    with pytest.raises(ExhaustedError):
        PageTableDomain(domain.unit, domain.table.fmt, world.tables)
    assert world.pages.allocated_pages == held
    domain.detach()
    assert world.pages.allocated_pages == 0
    assert PageTableDomain(domain.unit, domain.table.fmt, world.tables).did == 2


def test_a_detached_domain_maps_and_translates_nothing() -> None:
    world = World()
    domain = world.domain()
    domain.map(K4, K4, K4, R)
    domain.detach()
    with pytest.raises(MisuseError, match=r"^map \[0x1000, 0x2000\) to 0x1000: the domain is detached$"):
        domain.map(K4, K4, K4, R)
    assert (domain.unmap(K4, K4), domain.iova_to_phys(K4), domain.table.leaves()) == (0, 0, [])
    assert world.memory.read(0, K4) == bytes(K4)


def test_a_domain_declares_what_it_is() -> None:
    domain = World().domain()
    assert (domain.granule, domain.page_sizes, domain.aperture_end) == (K4, K4 | M2 | G1, (1 << 48) - 1)
    capabilities = domain.capabilities
    assert (capabilities.unmap_unit, capabilities.deferred_flush, capabilities.dirty) == ("granule", True, True)
    assert {"pte_set_1", "inv_page", "tables_freed"} <= capabilities.observes
    with pytest.raises(DmakitError, match=r"^size=0: must be from 1 to"):
        domain.sync_map(0, 0)
