"""The unit under a real page-table domain, page allocator and flush queue: which bytes a device reaches, and when."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmakit import consts
from dmakit.clock import MS, VirtualClock
from dmakit.errors import FaultError
from dmakit.iommu.domain import PageTableDomain
from dmakit.iommu.formats.base import PtFormat
from dmakit.iommu.formats.vtdss import VtdSecondStage
from dmakit.iommu.formats.x86_64 import X86_64
from dmakit.iommu.gather import Gather
from dmakit.iommu.port import DmaPort
from dmakit.iommu.tables import TablePages
from dmakit.iommu.unit import IommuUnit
from dmakit.iova.domain import IovaDomain
from dmakit.iova.flush_queue import FlushQueue
from dmakit.ledger import Ledger
from dmakit.memory.pages import PageAllocator
from dmakit.memory.physical import PhysicalMemory

RW = consts.PROT_READ | consts.PROT_WRITE
MIB = 1 << 20
FORMATS = pytest.mark.parametrize("fmt", [VtdSecondStage(), X86_64()], ids=lambda fmt: fmt.name)


class System:
    """RAM of 16 MiB, one domain, a lazy flush queue on a virtual clock."""

    def __init__(self, fmt: PtFormat | None = None, *, caching_mode: bool = False) -> None:
        self.memory = PhysicalMemory(16 * MIB)
        self.memory.add_region(0, 16 * MIB)
        self.ledger, self.clock = Ledger(1), VirtualClock()
        self.pages = PageAllocator(self.memory, 0, 4 * MIB)
        self.unit = IommuUnit(self.memory, ledger=self.ledger, caching_mode=caching_mode)
        tables = TablePages(self.pages, ledger=self.ledger)
        self.domain = PageTableDomain(self.unit, fmt or VtdSecondStage(), tables)
        self.port = DmaPort(self.memory, self.unit, self.domain.did)
        iovad = IovaDomain(ledger=self.ledger, clock=self.clock)
        self.queue = FlushQueue(iovad, self.domain, clock=self.clock)

    def unmap_lazily(self, iova: int, size: int) -> None:
        """What the DMA layer does in lazy mode: clear, and queue the range with its table pages."""
        gather = Gather(queued=True)
        assert self.domain.unmap_gather(iova, size, gather) == size
        self.queue.queue(iova >> 12, size >> 12, gather.freelist)

    def blocked(self, iova: int) -> bool:
        """Whether a device read faults."""
        try:
            self.port.read(iova, 1)
        except FaultError:
            return True
        return False


@FORMATS
@pytest.mark.parametrize("size,leaves", [(4096, 1), (2 * MIB, 1), (2 * MIB + 3 * 4096, 4)])
def test_a_device_reaches_what_the_domain_mapped(fmt: PtFormat, size: int, leaves: int) -> None:
    s = System(fmt)
    data = np.arange(size // 8, dtype=np.uint64).tobytes()
    s.domain.map(32 * MIB, 8 * MIB, size, RW)
    s.port.write(32 * MIB, data)
    assert s.memory.read(8 * MIB, size) == data == s.port.read(32 * MIB, size)
    assert s.unit.iotlb.used == leaves
    assert s.domain.unmap(32 * MIB, size) == size
    assert s.blocked(32 * MIB) and s.blocked(32 * MIB + size - 1)
    assert (s.unit.iotlb.used, len(s.unit.faults)) == (0, 2)


@pytest.mark.parametrize("lazy", [False, True])
def test_freed_table_pages_are_never_walked_with_new_contents(lazy: bool) -> None:
    """Every page that becomes free is filled with entries that lead to a secret; the device must not find it.

    Holds only if table pages wait for the invalidation that covers them, and if that one has IH = 0.
    """
    s = System()
    secret = 12 * MIB
    s.memory.fill(secret, 4096, 0x5E)
    for page in range(512):
        s.domain.map(32 * MIB + page * 4096, 8 * MIB + page * 4096, 4096, RW)
    s.memory.fill(8 * MIB, 2 * MIB, 0x11)
    assert s.port.read(32 * MIB, 2) == b"\x11\x11"
    if lazy:
        s.unmap_lazily(32 * MIB, 2 * MIB)
    else:
        assert s.domain.unmap(32 * MIB, 2 * MIB) == 2 * MIB
    before = s.ledger.snapshot()["tables_freed"]
    leads = np.full(512, secret | 3, np.uint64).tobytes()
    for _ in range(s.pages.free_pages_count):
        s.memory.write(s.pages.alloc(), leads)
    for iova in (32 * MIB, 32 * MIB + 4096, 34 * MIB - 4096):
        try:
            assert s.port.read(iova, 2) == b"\x11\x11"
            assert lazy
        except FaultError:
            assert not lazy or iova != 32 * MIB  # the page read before stays in the IOTLB in lazy mode
    s.clock.advance(10 * MS)
    freed = s.ledger.snapshot()["tables_freed"] - before
    assert freed == s.pages.free_pages_count == (1 if lazy else 0)
    for _ in range(freed):
        s.memory.write(s.pages.alloc(), leads)
    assert all(s.blocked(iova) for iova in (32 * MIB, 32 * MIB + 4096, 34 * MIB - 4096))


def test_lazy_unmaps_stay_reachable_until_the_timer_and_strict_ones_do_not() -> None:
    s = System()
    s.domain.map(MIB, 8 * MIB, 8 * 4096, RW)
    s.port.read(MIB, 8 * 4096)
    for page in range(4):
        s.unmap_lazily(MIB + page * 4096, 4096)
    assert s.domain.unmap(MIB + 4 * 4096, 4096) == 4096
    assert [s.blocked(MIB + page * 4096) for page in range(8)] == [False] * 4 + [True] + [False] * 3
    s.clock.advance(10 * MS)
    assert [s.blocked(MIB + page * 4096) for page in range(8)] == [True] * 5 + [False] * 3


def test_in_caching_mode_a_map_is_unseen_after_a_fault_until_it_is_synced() -> None:
    s = System(caching_mode=True)
    assert s.blocked(MIB)
    s.domain.map(MIB, 8 * MIB, 4096, RW)
    assert s.blocked(MIB)
    s.domain.sync_map(MIB, 4096)
    assert not s.blocked(MIB)
    assert s.ledger.snapshot()["inv_cause_sync_map"] == 1


def test_a_write_after_read_and_clear_is_dirty_again() -> None:
    """The domain's flush after clearing is what makes the unit set the bit again."""
    s = System()
    s.domain.set_dirty_tracking(True)
    s.domain.map(MIB, 8 * MIB, 16 * 4096, RW)
    for written in ([3], [3, 9], [], [9]):
        for page in written:
            s.port.write(MIB + page * 4096 + 5, b"dirty")
        bitmap = np.zeros(1, np.uint64)
        s.domain.read_and_clear_dirty(MIB, 16 * 4096, bitmap)
        assert int(bitmap[0]) == sum(1 << page for page in written)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from(["map", "unmap", "read", "write"]), st.integers(0, 15), st.integers(1, 6)),
        max_size=40,
    )
)
def test_in_strict_mode_a_device_sees_exactly_what_is_mapped(steps: list[tuple[str, int, int]]) -> None:
    """No step leaves anything stale behind: the device's view equals a dict of pages after each of them."""
    s = System()
    truth: dict[int, int] = {}
    for number, (what, page, count) in enumerate(steps):
        span = range(page, min(page + count, 16))
        if what == "map" and not any(p in truth for p in span):
            s.domain.map(MIB + page * 4096, 8 * MIB + number * 16 * 4096, len(span) * 4096, RW)
            truth.update({p: 8 * MIB + (number * 16 + i) * 4096 for i, p in enumerate(span)})
        elif what == "unmap" and page in truth:
            removed = s.domain.unmap(MIB + page * 4096, len(span) * 4096) // 4096
            for p in range(page, page + removed):
                del truth[p]
        for p in range(16):
            assert s.blocked(MIB + p * 4096) == (p not in truth)
        if what == "write" and page in truth:
            s.port.write(MIB + page * 4096, bytes((count,)) * 8)
            assert s.memory.read(truth[page], 8) == bytes((count,)) * 8
