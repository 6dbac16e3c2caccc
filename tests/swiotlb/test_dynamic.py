"""Growing bounce memory: transient pools, the background worker, limits, and what is given back."""

from __future__ import annotations

import pytest

from dmakit import consts
from dmakit.clock import VirtualClock
from dmakit.errors import ExhaustedError
from dmakit.failpoint import FailPoint
from dmakit.ledger import Ledger
from dmakit.memory.pages import PageAllocator
from dmakit.memory.physical import PhysicalMemory
from dmakit.swiotlb.bounce import Swiotlb
from dmakit.swiotlb.dynamic import PoolGrower, block_order
from dmakit.swiotlb.pool import limit_areas
from tests.support.sweep import sweep

TO = consts.DMA_TO_DEVICE
RAM = 0x100000
SEGMENT_BYTES = consts.IO_TLB_SEGSIZE * consts.IO_TLB_SIZE


class World:
    """A full pool of one segment, a grower, and the memory it takes pools from."""

    def __init__(self, *, slots: int = 512, low: int = 64 << 20) -> None:
        memory = PhysicalMemory(256 << 20)
        memory.add_region(0, 256 << 20)
        self.fail, self.clock, self.ledger = FailPoint(), VirtualClock(), Ledger()
        self.pages = PageAllocator(memory, 8 << 20, low, fail=self.fail)
        self.grower = PoolGrower(memory, self.pages, self.clock, slots=slots, areas=4, ledger=self.ledger)
        self.pool = Swiotlb(memory, 4 << 20, SEGMENT_BYTES, ledger=self.ledger, fail=self.fail, grower=self.grower)
        self.first = self.pool.map(RAM, SEGMENT_BYTES)
        self.free_pages = self.pages.free_pages_count


def test_a_full_pool_answers_from_a_transient_one_that_is_freed_at_unmap() -> None:
    world = World()
    pool, memory = world.pool, world.pool.memory
    memory.write(RAM + 0x345, b"bounced")
    tlb = pool.map(RAM + 0x345, 7, alloc_align_mask=4095, min_align_mask=4095)
    assert (tlb & 4095, memory.read(tlb, 7)) == (0x345, b"bounced")
    assert (pool.transient_slots, pool.used, pool.slots, len(pool.transients)) == (2, 130, 128, 1)
    assert pool.contains(tlb)
    memory.write(tlb, b"DEVICE!")
    pool.unmap(tlb, 7, consts.DMA_FROM_DEVICE)
    assert memory.read(RAM + 0x345, 7) == b"DEVICE!"
    assert (pool.transient_slots, pool.used, pool.transients) == (0, 128, [])
    assert world.pages.free_pages_count == world.free_pages
    assert not pool.contains(tlb)
    assert world.ledger.snapshot()["bounce_transient"] == 1


def test_a_new_pool_shows_nothing_of_the_memorys_last_owner() -> None:
    world = World()
    phys = world.pages.alloc()
    world.pool.memory.fill(phys, 4096, 0xAA)
    world.pages.free(phys)
    tlb = world.pool.map(RAM, 8)
    assert tlb == phys
    assert world.pool.memory.read(tlb + 8, 2040) == bytes(2040)  # the slot; the page has room for one more


def test_the_worker_runs_once_when_time_moves_and_its_pool_is_asked_first() -> None:
    world = World()
    taken = [world.pool.map(RAM, 2048) for _ in range(3)]
    assert (world.clock.pending(), len(world.pool.transients), len(world.pool.pools)) == (1, 3, 1)
    world.clock.advance(1)
    assert (world.clock.pending(), len(world.pool.pools), world.pool.slots) == (0, 2, 128 + 512)
    assert world.ledger.snapshot()["bounce_pools"] == 1
    newest = world.pool.pools[0]
    assert (newest.slots, newest.areas, newest.transient) == (512, 4, False)
    tlb = world.pool.map(RAM, 2048)
    assert newest.start <= tlb < newest.end
    for one in [*taken, tlb, world.first]:
        world.pool.unmap(one, 2048, TO)
    assert (world.pool.used, world.pool.transients) == (0, [])


def test_a_lasting_pool_halves_until_memory_is_found() -> None:
    world = World(slots=32768, low=3 << 20)  # wants 64 MiB, may have 4 MiB, finds 2
    world.grower.request()
    world.clock.advance(1)
    assert [pool.slots for pool in world.pool.pools] == [1024, 128]
    world.grower.request()
    world.clock.advance(1)
    assert [pool.slots for pool in world.pool.pools] == [512, 1024, 128]
    world.grower.request()
    world.clock.advance(1)
    assert (len(world.pool.pools), world.grower.failures) == (3, 1)  # 1 MiB is the least


def test_a_transient_pool_must_be_in_the_devices_reach() -> None:
    world = World()
    with pytest.raises(ExhaustedError):
        world.pool.map(RAM, 2048, limit=(8 << 20) - 1)
    assert world.pages.free_pages_count == world.free_pages
    assert world.pool.map(RAM, 2048, limit=(128 << 20) - 1)


def test_a_transient_pool_that_cannot_keep_the_offset_is_given_back() -> None:
    """One page-aligned slot cannot preserve bit 11 of the address: no answer, as in the kernel, and no leak."""
    world = World()
    with pytest.raises(ExhaustedError):
        world.pool.map(RAM + 0x800, 64, min_align_mask=4095)
    assert world.pages.free_pages_count == world.free_pages
    assert world.pool.used == 128


def test_fail_nth_leaks_neither_slots_nor_pages() -> None:
    def operation(world: World) -> None:
        tlb = world.pool.map(RAM, 9000)
        world.clock.advance(1)
        try:
            world.pool.unmap(world.pool.map(RAM, 300), 300, TO)
        finally:
            world.pool.unmap(tlb, 9000, TO)

    def check(world: World, failed: bool) -> None:
        assert (world.pool.used, world.pool.transients, world.pool.transient_slots) == (128, [], 0)
        lasting = sum(pool.slots * 2048 // 4096 for pool in world.pool.pools[:-1])
        assert world.pages.free_pages_count == world.free_pages - lasting

    assert sweep(World, lambda world: world.fail, operation, check) >= 4


def test_orders_and_areas() -> None:
    assert [block_order(size) for size in (1, 4096, 4097, 1 << 20, (1 << 20) + 1)] == [0, 0, 1, 8, 9]
    assert [limit_areas(8, slots) for slots in (128, 256, 1024, 32768, 3 * 128)] == [1, 2, 8, 8, 1]
