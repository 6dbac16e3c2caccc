"""The life of stale entries: what a device still reaches after an unmap, and which request ends it."""

from __future__ import annotations

import pytest

from dmakit import consts
from dmakit.clock import MS, VirtualClock
from dmakit.errors import FaultError, MisuseError
from dmakit.iommu.devtlb import DeviceTlb
from dmakit.iommu.formats.x86_64 import X86_64
from dmakit.iommu.port import DmaPort
from dmakit.iova.domain import IovaDomain
from dmakit.iova.flush_queue import CallbackTarget, FlushQueue

from .bench import Bench

A, D = 1 << 8, 1 << 9  # accessed and dirty of a second-stage entry


def mapped(pages: int = 4, **options: object) -> Bench:
    """A bench with IOVA pages 0x10000 … mapped to 0x900000 …, each page holding its number, and all of them cached."""
    b = Bench(**options)  # type: ignore[arg-type]
    for i in range(pages):
        b.tables.map(0x10000 + i * 4096, 0x900000 + i * 4096)
        b.memory.fill(0x900000 + i * 4096, 4096, (i + 1) % 256)
        assert b.port.read(0x10000 + i * 4096, 1) == bytes(((i + 1) % 256,))
    b.counts()
    return b


def reaches(b: Bench, iova: int, *, did: int | None = None) -> bool:
    """Whether a device read of ``iova`` goes through."""
    try:
        b.unit.translate(b.did if did is None else did, iova)
    except FaultError:
        return False
    return True


def test_an_unmapped_page_is_read_and_written_until_it_is_invalidated() -> None:
    b = mapped()
    b.tables.unmap(0x10000)
    assert b.port.read(0x10000, 2) == b"\1\1"
    b.port.write(0x10000, b"late")
    assert b.memory.read(0x900000, 5) == b"late\1"
    b.unit.flush_range(b.did, 0x10000, 0x10FFF, ih=True)
    with pytest.raises(FaultError):
        b.port.read(0x10000, 2)
    assert [record.iova for record in b.unit.faults] == [0x10000]


def test_a_remapped_page_shows_the_old_page_until_it_is_invalidated() -> None:
    b = mapped()
    b.tables.map(0x11000, 0xA00000)
    b.memory.fill(0xA00000, 4096, 0xEE)
    assert b.port.read(0x11000, 1) == b"\2"
    b.unit.flush_range(b.did, 0x11000, 0x11FFF, ih=True)
    assert b.port.read(0x11000, 1) == b"\xee"


def test_a_request_reaches_its_block_and_its_domain_only() -> None:
    b = mapped()
    other, tables = b.domain()
    tables.map(0x10000, 0x300000)
    assert reaches(b, 0x10000, did=other)
    for i in range(4):
        b.tables.unmap(0x10000 + i * 4096)
    tables.unmap(0x10000)
    b.unit.inv_pages(b.did, 0x12000, 1)
    assert [reaches(b, 0x10000 + i * 4096) for i in range(4)] == [True, True, False, False]
    b.unit.inv_domain(b.did)
    assert [reaches(b, 0x10000 + i * 4096) for i in range(4)] == [False] * 4
    assert reaches(b, 0x10000, did=other)
    b.unit.inv_global()
    assert not reaches(b, 0x10000, did=other)


def test_a_block_that_touches_a_large_page_drops_it() -> None:
    b = Bench()
    b.tables.map(0x200000, 0x800000, level=2)
    assert reaches(b, 0x200000)
    b.tables.unmap(0x200000, level=2)
    b.unit.inv_pages(b.did, 0x400000, 4)
    assert reaches(b, 0x3FFFFF)
    b.unit.inv_pages(b.did, 0x3FF000, 0)
    assert not reaches(b, 0x200000)


def test_a_request_over_many_pages_finds_them_all() -> None:
    """More pages than sets, so that the cache is scanned instead of probed; the pages beside the block stay."""
    b = mapped(64, iotlb_entries=64, iotlb_ways=4)
    for i in range(64):
        b.tables.unmap(0x10000 + i * 4096)
    b.unit.inv_pages(b.did, 0x20000, 5)
    assert [reaches(b, 0x10000 + i * 4096) for i in range(64)] == [True] * 16 + [False] * 32 + [True] * 16


# The paging-structure cache and the hint ----------------------------------------------------------------------


def test_ih_keeps_the_paging_structures_and_its_absence_drops_them() -> None:
    b = mapped()
    assert [e.level for e in b.unit.psc.entries(b.did)] == [2, 3, 4]
    b.unit.flush_range(b.did, 0x10000, 0x13FFF, ih=True)
    assert (b.unit.iotlb.used, b.unit.psc.used) == (0, 3)
    b.counts()
    assert reaches(b, 0x10000)
    assert b.counts() == {"iotlb_misses": 1, "psc_hits": 1, "walk_reads": 1}
    b.unit.flush_range(b.did, 0x10000, 0x13FFF, ih=False)
    assert (b.unit.iotlb.used, b.unit.psc.used) == (0, 0)
    assert reaches(b, 0x10000)
    assert b.counts()["walk_reads"] == 4


def test_without_ih_only_the_paging_structures_of_the_range_go() -> None:
    b = mapped()
    b.tables.map(1 << 30, 0x300000)
    assert reaches(b, 1 << 30)
    b.unit.flush_range(b.did, 0x10000, 0x10FFF)
    assert [(e.level, e.iova) for e in b.unit.psc.entries()] == [(2, 1 << 30), (3, 1 << 30)]
    b.unit.flush_all(b.did)
    assert b.unit.psc.entries() == []


@pytest.mark.parametrize("ih", [True, False])
def test_a_table_freed_under_the_hint_is_walked_with_its_new_contents(ih: bool) -> None:
    """Freeing a table page and sending IH = 1 lets a device read through whatever the page holds next."""
    b = mapped()
    secret = b.page()
    b.memory.fill(secret, 4096, 0x5E)
    table = b.tables.pages[1, 0]
    b.tables.unmap(0, level=2)
    b.unit.flush_range(b.did, 0x10000, 0x13FFF, ih=ih)
    b.memory.words[(table >> 3) + 0x17] = secret | 3  # the page is someone's data now
    if ih:
        assert b.port.read(0x17000, 2) == b"\x5e\x5e"
    else:
        with pytest.raises(FaultError):
            b.port.read(0x17000, 2)


def test_a_table_freed_before_its_flush_is_walked_with_its_new_contents() -> None:
    """The wrong order: free, reuse, then flush. Between reuse and flush the device goes through foreign bytes."""
    b = mapped()
    table = b.tables.pages[1, 0]
    b.tables.unmap(0, level=2)
    b.memory.words[(table >> 3) + 0x17] = b.page() | 3
    assert reaches(b, 0x17000)
    b.unit.flush_range(b.did, 0, 0x1FFFFF, ih=False)
    assert not reaches(b, 0x17000)


# Capacity and replacement ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy,victim", [("lru", 1), ("fifo", 0)])
def test_replacement_is_the_declared_one(policy: str, victim: int) -> None:
    b = mapped(4, iotlb_entries=4, iotlb_ways=4, policy=policy)
    assert reaches(b, 0x10000)
    b.tables.map(0x20000, 0xA00000)
    assert reaches(b, 0x20000)
    left = {e.iova for e in b.unit.iotlb.entries()}
    assert left == {0x10000 + i * 4096 for i in range(4) if i != victim} | {0x20000}
    assert b.unit.iotlb.evictions == 1


def test_pages_compete_within_their_set_only() -> None:
    """Four sets of two ways: the low bits of the page number choose the set."""
    b = Bench(iotlb_entries=8, iotlb_ways=2)
    for page in (0, 4, 8, 1):
        b.tables.map(page << 12, 0x300000 + (page << 12))
        assert reaches(b, page << 12)
    assert [e.iova >> 12 for e in b.unit.iotlb.entries()] == [1, 4, 8]


def test_replacement_ends_a_stale_entry_too() -> None:
    b = mapped(4, iotlb_entries=4, iotlb_ways=4)
    b.tables.unmap(0x10000)
    assert reaches(b, 0x10000)
    for i in range(4):
        b.tables.map(0x20000 + i * 4096, 0xA00000)
        assert reaches(b, 0x20000 + i * 4096)
    assert not reaches(b, 0x10000)


# Caching mode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caching_mode,fmt,at_once", [(True, None, False), (False, None, True), (True, X86_64(), True)])
def test_a_map_after_a_fault_needs_a_sync_in_caching_mode_only(
    caching_mode: bool, fmt: X86_64 | None, at_once: bool
) -> None:
    b = Bench(caching_mode=caching_mode, fmt=fmt)
    assert not reaches(b, 0x10000)
    b.tables.map(0x10000, 0x900000)
    assert reaches(b, 0x10000) == at_once
    b.unit.sync_range(b.did, 0x10000, 0x10FFF)
    assert reaches(b, 0x10000)
    assert b.counts().get("inv_cause_sync_map", 0) == (0 if at_once else 1)


# Accessed and dirty bits -------------------------------------------------------------------------------------------


def test_second_stage_bits_are_set_only_while_dirty_tracking_is_on() -> None:
    b = mapped(1)
    b.port.write(0x10000, b"x")
    assert b.tables.entry(0x10000) == 0x900003
    b.unit.set_dirty_tracking(b.did, True)
    b.port.read(0x10000, 1)
    assert b.tables.entry(0x10000) == 0x900003 | A
    assert all(b.tables.entry(0, level=level) & A for level in (2, 3, 4))
    b.port.write(0x10000, b"x")
    assert b.tables.entry(0x10000) == 0x900003 | A | D
    b.unit.set_dirty_tracking(b.did, False)
    b.memory.words[b.tables.slot(1, 0x10000)] = 0x900003
    b.port.write(0x10000, b"x")
    assert b.tables.entry(0x10000) == 0x900003


def test_a_cached_entry_does_not_set_dirty_again_until_it_is_invalidated() -> None:
    b = mapped(1)
    b.unit.set_dirty_tracking(b.did, True)
    b.port.write(0x10000, b"x")
    slot = b.tables.slot(1, 0x10000)
    b.memory.words[slot] &= ~D
    b.port.write(0x10000, b"lost")
    assert not b.tables.entry(0x10000) & D
    b.unit.flush_range(b.did, 0x10000, 0x10FFF, ih=True)
    b.port.write(0x10000, b"seen")
    assert b.tables.entry(0x10000) & D


def test_the_first_stage_always_sets_its_bits() -> None:
    b = Bench(fmt=X86_64())
    b.tables.map(0x10000, 0x900000)
    accessed, dirty = b.fmt.accessed_bit, b.fmt.dirty_bit
    b.memory.words[b.tables.slot(1, 0x10000)] &= ~(accessed | dirty)
    b.port.read(0x10000, 1)
    assert b.tables.entry(0x10000) & (accessed | dirty) == accessed
    b.port.write(0x10000, b"x")
    assert b.tables.entry(0x10000) & (accessed | dirty) == accessed | dirty
    with pytest.raises(MisuseError, match=r"^domain 2: a first-stage table has no dirty tracking to switch$"):
        b.unit.set_dirty_tracking(b.did, True)


# Device TLB ---------------------------------------------------------------------------------------------------------


def test_a_device_tlb_is_stale_until_its_own_invalidation() -> None:
    b = mapped()
    tlb = DeviceTlb(0x20, entries=16)
    b.unit.attach_devtlb(tlb, b.did)
    port = DmaPort(b.memory, b.unit, b.did, source=0x20, devtlb=tlb)
    assert [port.read(0x10000, 1), port.read(0x10001, 1)] == [b"\1", b"\1"]
    assert b.counts() == {"iotlb_hits": 1, "devtlb_hits": 1}
    b.tables.unmap(0x10000)
    b.unit.inv_pages(b.did, 0x10000, 0)
    assert not reaches(b, 0x10000)
    assert port.read(0x10000, 1) == b"\1"
    b.unit.clear_faults()
    b.unit.flush_range(b.did, 0x10000, 0x10FFF, ih=True)
    with pytest.raises(FaultError, match=r"^device 00:04.0 may not read 0x10000: no read access is set"):
        port.read(0x10000, 1)
    assert b.unit.faults == []
    assert tlb.invalidations == 1


def test_disabling_ats_empties_the_device_tlb() -> None:
    b = mapped()
    tlb = DeviceTlb(0x20)
    with pytest.raises(MisuseError, match=r"^devtlb of requester 0x20: is not attached to domain 2 of this unit$"):
        DmaPort(b.memory, b.unit, b.did, devtlb=tlb)
    b.unit.attach_devtlb(tlb, b.did)
    with pytest.raises(MisuseError, match=r"^source=0x20: this requester's TLB is attached already$"):
        b.unit.attach_devtlb(DeviceTlb(0x20), b.did)
    DmaPort(b.memory, b.unit, b.did, devtlb=tlb).read(0x10000, 4096 * 4)
    assert tlb.cache.used == 4
    b.unit.detach(b.did)
    assert (tlb.cache.used, b.unit.devtlbs, b.unit.iotlb.used, b.unit.psc.used) == (0, [], 0, 0)


# Strict and lazy --------------------------------------------------------------------------------------------------


class Lazy:
    """A bench whose unmaps go through a real flush queue."""

    def __init__(self, pages: int) -> None:
        self.bench, self.clock = mapped(pages), VirtualClock()
        iovad = IovaDomain(ledger=self.bench.ledger, clock=self.clock)
        flush = CallbackTarget(lambda cause: self.bench.unit.flush_all(self.bench.did, cause=cause))
        self.queue = FlushQueue(iovad, flush, clock=self.clock)

    def unmap(self, page: int) -> None:
        """Clear the entry and leave the invalidation to the queue."""
        self.bench.tables.unmap(0x10000 + page * 4096)
        self.queue.queue(0x10 + page, 1)


def test_a35_the_window_of_stale_access_is_nothing_in_strict_mode_and_a_timer_in_lazy_mode() -> None:
    strict = mapped(300)
    for i in range(300):
        strict.tables.unmap(0x10000 + i * 4096)
        strict.unit.flush_range(strict.did, 0x10000 + i * 4096, 0x10FFF + i * 4096, ih=True, cause=consts.CAUSE_UNMAP)
        assert not reaches(strict, 0x10000 + i * 4096)
    counts = strict.counts()
    assert (counts["inv_page"], counts["inv_cause_unmap"]) == (300, 300)

    lazy = Lazy(300)
    for i in range(255):
        lazy.unmap(i)
    lazy.clock.advance(10 * MS - 1)
    assert all(reaches(lazy.bench, 0x10000 + i * 4096) for i in range(255))
    lazy.unmap(255)  # the ring of 256 keeps one place empty: full
    lazy.unmap(256)
    assert not any(reaches(lazy.bench, 0x10000 + i * 4096) for i in range(255))
    lazy.clock.advance(1)
    assert not any(reaches(lazy.bench, 0x10000 + i * 4096) for i in range(257))
    counts = lazy.bench.counts()
    assert (counts["inv_domain"], counts["inv_cause_fq_full"], counts["inv_cause_fq_timer"]) == (2, 1, 1)


def test_a5_an_unlinked_piece_faults_at_once_also_in_lazy_mode_and_can_be_linked_again() -> None:
    """Unlink never waits for the queue: its own flush ends the access while the queue's entries stay reachable."""
    lazy = Lazy(4)
    b = lazy.bench
    lazy.unmap(0)
    b.tables.unmap(0x11000)
    b.unit.flush_range(b.did, 0x11000, 0x11FFF, ih=True, cause=consts.CAUSE_UNMAP)
    assert [reaches(b, 0x10000 + i * 4096) for i in range(4)] == [True, False, True, True]
    b.tables.map(0x11000, 0xA00000)
    b.memory.fill(0xA00000, 4096, 0x77)
    assert b.port.read(0x11000, 2) == b"\x77\x77"
