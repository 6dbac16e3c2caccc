"""Rules of the bounce pool one by one: geometry, alignment, copies, pads, limits, areas, bad input."""

from __future__ import annotations

import pytest

from dmakit import consts
from dmakit.errors import ExhaustedError, MisuseError
from dmakit.failpoint import FailPoint
from dmakit.ledger import Ledger
from dmakit.memory.physical import PhysicalMemory
from dmakit.swiotlb.bounce import Swiotlb, max_mapping_size
from dmakit.swiotlb.pool import SwiotlbPool
from tests.support.sweep import sweep

BIDI, TO, FROM = consts.DMA_BIDIRECTIONAL, consts.DMA_TO_DEVICE, consts.DMA_FROM_DEVICE
SLOT, SEGMENT_BYTES = consts.IO_TLB_SIZE, max_mapping_size()
START, RAM = 0x400000, 0x100000  # the pool; where the buffers lie
KIB = 1024


def pool_of(size: int = 1 << 20, *, areas: int = 1, fail: FailPoint | None = None) -> Swiotlb:
    memory = PhysicalMemory(64 << 20)
    memory.add_region(0, 64 << 20)
    return Swiotlb(memory, START, size, areas=areas, ledger=Ledger(), fail=fail)


def test_a13_each_ragged_end_takes_a_granule_of_its_own() -> None:
    """The pool's half: head and tail of [0x200, 0x3600) are copied alone, at the offsets that they had."""
    pool = pool_of()
    pool.memory.fill(RAM, 0x4000, 0xEE)
    pool.memory.write(RAM + 0x200, bytes(range(256)) * 52)
    before = pool.ledger.snapshot()
    head = pool.map(RAM + 0x200, 0xE00, alloc_align_mask=4095, min_align_mask=4095)
    tail = pool.map(RAM + 0x3000, 0x600, alloc_align_mask=4095, min_align_mask=4095)
    assert (head & 4095, tail & 4095) == (0x200, 0)
    assert head & ~4095 != tail & ~4095
    after = pool.ledger.snapshot()
    assert after["bounced_bytes"] - before["bounced_bytes"] == 0xE00 + 0x600
    assert (after["bounce_maps"], after["bounce_slots"], pool.used) == (2, 4, 4)
    for tlb, phys, size in ((head, RAM + 0x200, 0xE00), (tail, RAM + 0x3000, 0x600)):
        assert pool.memory.read(tlb, size) == pool.memory.read(phys, size)
        granule = pool.memory.read(tlb & ~4095, 4096)
        assert granule.count(0xEE) == pool.memory.read(phys, size).count(0xEE)  # no neighbour's byte


def test_a14_the_rest_of_the_granule_is_zeroed_for_an_untrusted_device() -> None:
    pool = pool_of()
    memory = pool.memory
    memory.fill(START, 0x10000, 0xAA)  # what earlier users left in the slots
    memory.fill(RAM, 4096, 0x55)
    tlb = pool.map(RAM + 0x345, 0x123, alloc_align_mask=4095, min_align_mask=4095)
    pool.zero_pads(tlb, 0x123, 4096)
    assert memory.read(tlb & ~4095, 4096) == bytes(0x345) + b"\x55" * 0x123 + bytes(4096 - 0x345 - 0x123)
    assert pool.ledger.snapshot()["bounce_pad_bytes"] == 4096 - 0x123
    assert memory.read((tlb & ~4095) + 4096, 1) == b"\xaa"
    whole = pool.map(RAM, 4096, alloc_align_mask=4095)
    pool.zero_pads(whole, 4096, 4096)  # nothing beside it
    assert memory.read(whole, 4096) == memory.read(RAM, 4096)


@pytest.mark.parametrize("granule", [1 << 13, 1 << 21, 1 << 31])
def test_pads_end_with_the_mappings_slots(granule: int) -> None:
    """A granule larger than the mapping was aligned for holds other mappings, or memory behind the pool."""
    pool = pool_of()
    pool.memory.fill(RAM, 64 << 10, 0x55)
    first, tlb, last = (pool.map(RAM + 0x345, 0x123, alloc_align_mask=4095, min_align_mask=4095) for _ in range(3))
    low = tlb // granule * granule
    before = pool.memory.read(0, 64 << 20)
    text = rf"^granule={granule:#x}: \[{low:#x}, {low + granule:#x}\) is not inside one bounced mapping$"
    with pytest.raises(MisuseError, match=text):
        pool.zero_pads(tlb, 0x123, granule)
    assert pool.memory.read(0, 64 << 20) == before
    assert len({first >> 12, tlb >> 12, last >> 12}) == 3


def test_pads_take_in_the_padding_slots() -> None:
    pool = pool_of()
    pool.memory.fill(START, 0x4000, 0xAA)
    pool.memory.fill(RAM, 4096, 0x55)
    tlb = pool.map(RAM + 0xC00, 0x100, alloc_align_mask=8191, min_align_mask=4095)
    pool.zero_pads(tlb, 0x100, 8192)
    granule = pool.memory.read(tlb & ~8191, 8192)
    assert (granule.count(0), granule.count(0x55)) == (8192 - 0x100, 0x100)
    assert pool.memory.read((tlb & ~8191) + 8192, 1) == b"\xaa"


@pytest.mark.parametrize("direction", [BIDI, TO, FROM])
@pytest.mark.parametrize("skip", [False, True])
def test_copy_in_always_and_copy_back_by_direction(direction: int, skip: bool) -> None:
    pool = pool_of()
    pool.memory.write(RAM, b"original")
    tlb = pool.map(RAM, 8)
    assert pool.memory.read(tlb, 8) == b"original"  # FROM_DEVICE too: a short write must not show stale slot bytes
    pool.memory.write(tlb, b"DEV")
    pool.unmap(tlb, 8, direction, consts.ATTR_SKIP_CPU_SYNC if skip else 0)
    expected = b"original" if skip or direction == TO else b"DEVginal"
    assert pool.memory.read(RAM, 8) == expected
    assert pool.used == 0


def test_syncs_copy_a_part_and_only_in_their_direction() -> None:
    pool = pool_of()
    pool.memory.write(RAM + 0x300, bytes(range(250)) * 24)
    tlb = pool.map(RAM + 0x300, 6000, min_align_mask=4095)
    pool.memory.write(tlb + 3000, b"from the device")
    pool.sync_for_cpu(tlb + 3000, 15, TO)
    assert pool.memory.read(RAM + 0x300 + 3000, 4) == bytes((0, 1, 2, 3))
    pool.sync_for_cpu(tlb + 3000, 15, FROM)
    assert pool.memory.read(RAM + 0x300 + 3000, 15) == b"from the device"
    pool.memory.write(RAM + 0x300 + 5000, b"from the cpu")
    pool.sync_for_device(tlb + 5000, 12, FROM)
    assert pool.memory.read(tlb + 5000, 4) == bytes((0, 1, 2, 3))
    pool.sync_for_device(tlb + 5000, 12, BIDI)
    assert pool.memory.read(tlb + 5000, 12) == b"from the cpu"


def test_slots_are_used_round_robin_not_first_fit() -> None:
    pool = pool_of(16 * SLOT)
    first = pool.map(RAM, 10)
    pool.unmap(first, 10, TO)
    addresses = []
    for _ in range(17):
        addresses.append(pool.map(RAM, 10))
        pool.unmap(addresses[-1], 10, TO)
    assert addresses == [START + slot * SLOT for slot in [*range(1, 16), 0, 1]]


def test_no_mapping_crosses_a_segment_and_a_segment_is_the_largest() -> None:
    pool = pool_of(2 * SEGMENT_BYTES)
    pool.map(RAM, 10)
    assert pool.map(RAM, SEGMENT_BYTES) == START + SEGMENT_BYTES
    with pytest.raises(
        ExhaustedError,
        match=r"^no run of bounce slots for 262144 bytes at 0x100000: 129 of 256 slots in use, "
        r"at most 262144 bytes with offset and padding$",
    ):
        pool.map(RAM, SEGMENT_BYTES)
    assert pool.used == pool.high_water == 129


def test_the_offset_counts_against_the_largest_mapping() -> None:
    pool = pool_of()
    with pytest.raises(ExhaustedError):
        pool.map(RAM + 0x200, SEGMENT_BYTES, alloc_align_mask=4095, min_align_mask=4095)
    assert pool.map(RAM + 0x200, SEGMENT_BYTES - 0x200, alloc_align_mask=4095, min_align_mask=4095)
    assert [max_mapping_size(mask) for mask in (0, 511, 4095, 65535)] == [262144, 260096, 258048, 196608]


def test_padding_slots_keep_an_offset_larger_than_a_slot() -> None:
    """Offset 0xC00 in a page-aligned allocation: one padding slot in front, freed with the rest."""
    pool = pool_of(64 * SLOT)
    pool.memory.write(RAM + 0xC00, b"payload")
    tlb = pool.map(RAM + 0xC00, 7, alloc_align_mask=4095, min_align_mask=4095)
    assert tlb == START + 0xC00
    inner = pool.pools[0]
    assert inner.allocations() == [(0, 2, RAM + 0x800)]
    assert (inner.pad_slots[1], inner.room(START), inner.room(tlb)) == (1, 0, 4096 - 0xC00)
    pool.unmap(tlb, 7, TO)
    assert (pool.used, inner.free_run[0], inner.pad_slots[1]) == (0, 64, 0)


def test_a_page_or_more_without_masks_is_page_aligned() -> None:
    pool = pool_of()
    pool.map(RAM, 100)
    assert pool.map(RAM, 4096) == START + 4096
    assert pool.map(RAM, 4095) == START + 8192
    pool.map(RAM, 100)
    assert pool.map(RAM + 0x800, 4096, min_align_mask=2047) == START + 14336  # a mask was given: any slot will do


def test_a_buffer_at_address_0_has_no_bits_to_preserve() -> None:
    pool = pool_of()
    assert [pool.map(0, 10, min_align_mask=4095) for _ in range(2)] == [START, START + SLOT]
    assert [pool.map(0x1000, 10, min_align_mask=4095) for _ in range(2)] == [START + 2 * SLOT, START + 4 * SLOT]


def test_no_allocation_crosses_the_device_boundary() -> None:
    pool = pool_of()
    pool.map(RAM, 3 * SLOT, boundary=8191)
    assert pool.map(RAM, 3 * SLOT, boundary=8191) == START + 8192
    with pytest.raises(ExhaustedError):
        pool.map(RAM, 9000, boundary=8191)


def test_each_cpu_begins_in_its_area_and_moves_on_when_it_is_full() -> None:
    pool = pool_of(4 * SEGMENT_BYTES, areas=4)
    starts = [pool.map(RAM, SEGMENT_BYTES, cpu=cpu) for cpu in (2, 2, 5, 3)]
    assert [(tlb - START) // SEGMENT_BYTES for tlb in starts] == [2, 3, 1, 0]
    assert pool.ledger.snapshot()["bounce_area_locks"] == 1 + 2 + 1 + 2
    assert list(pool.pools[0].area_used) == [128] * 4


def test_events_carry_the_kernels_names_and_fields() -> None:
    pool = pool_of(4 * SLOT)
    pool.events = []
    tlb = pool.map(RAM, 5000)
    with pytest.raises(ExhaustedError):
        pool.map(RAM + 1, 5000)
    with pytest.raises(ExhaustedError):
        pool.map(RAM + 2, 5000, attrs=consts.ATTR_NO_WARN)
    pool.unmap(tlb, 5000, FROM)
    assert pool.events == [
        ("swiotlb_bounced", RAM, 5000),
        ("tblmap", RAM, 5000, START),
        ("swiotlb_bounced", RAM + 1, 5000),
        ("warn", "swiotlb buffer is full (sz: 5000 bytes)"),
        ("tblmap", RAM + 1, 5000, (1 << 64) - 1),
        ("swiotlb_bounced", RAM + 2, 5000),
        ("tblmap", RAM + 2, 5000, (1 << 64) - 1),
        ("tblunmap", START, 5000),
    ]


def test_contains_knows_the_pool_from_other_memory() -> None:
    pool = pool_of(4 * SLOT)
    inside = [pool.contains(START + at) for at in (-1, 0, 4 * SLOT - 1, 4 * SLOT)]
    assert inside == [False, True, True, False]
    assert not pool.contains(-1) and not pool.contains(1 << 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.map(RAM, 0), r"^size=0: a bounce needs at least one byte$"),
        (lambda p: p.map(RAM, 8, min_align_mask=5), r"^min_align_mask=0x5: must be 2\*\*n - 1 with n from 0 to 31$"),
        (
            lambda p: p.map(RAM, 8, alloc_align_mask=-1),
            r"^alloc_align_mask=-0x1: must be 2\*\*n - 1 with n from 0 to 31$",
        ),
        (lambda p: p.map(RAM, 8, boundary=1023), r"^boundary=0x3ff: must leave room for a slot of 2048 bytes$"),
        (lambda p: p.map(64 << 20, 8), r"^\[0x4000000, 0x4000008\) is not inside one region of physical memory$"),
        (
            lambda p: p.map(RAM, 8, cpu=-1),
            r"^cpu=-1, limit=0xffffffffffffffff: must be 0 to 65535, and 0 to 2\*\*64 - 1$",
        ),
        (lambda p: p.unmap(START, 8, TO), r"^\[0x400000, 0x400008\) is not inside one bounced mapping$"),
        (lambda p: p.unmap(RAM, 8, TO), r"^\[0x100000, 0x100008\) is not inside one bounced mapping$"),
        (lambda p: p.unmap(p.map(RAM, 8), 8, 3), r"^direction=3: must be BIDIRECTIONAL, TO_DEVICE or FROM_DEVICE$"),
        (lambda p: p.unmap(p.map(RAM, 8), 4097, TO), r"^\[0x400000, 0x401001\) is not inside one bounced mapping$"),
        (
            lambda p: p.unmap(p.map(RAM, 5000) + SLOT, 8, TO),
            r"^tlb=0x400800 is not the beginning of a bounced mapping$",
        ),
        (lambda p: SwiotlbPool(p.memory, 0, 4096, ledger=p.ledger), r"^start=0x0: a bounce pool starts on a page"),
        (lambda p: SwiotlbPool(p.memory, 4096, 100, ledger=p.ledger), r"^size=100: a bounce pool is one or more slots"),
        (lambda p: Swiotlb(p.memory, 4096, 8192, areas=3, ledger=p.ledger), r"^areas=3: must be a power of two$"),
        (
            lambda p: SwiotlbPool(p.memory, 4096, 8192, areas=3, ledger=p.ledger),
            r"^areas=3: must be a power of two that cuts 4 slots into whole segments$",
        ),
    ],
)
def test_bad_input_is_refused_with_value_and_rule(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MisuseError, match=message):
        call(pool_of())


def test_a_failed_map_takes_nothing() -> None:
    """Fail-nth over two maps and their unmaps: the failing map takes no slot, the other one is undone."""

    def operation(pool: Swiotlb) -> None:
        first = pool.map(RAM, 3000)
        try:
            pool.unmap(pool.map(RAM + 4096, 9000), 9000, FROM)
        finally:
            pool.unmap(first, 3000, BIDI)

    def check(pool: Swiotlb, failed: bool) -> None:
        assert pool.used == 0
        assert pool.pools[0].allocations() == []
        assert pool.ledger.snapshot()["bounce_maps"] == (2 if not failed else pool.high_water // 2)

    assert sweep(lambda: pool_of(fail=FailPoint()), lambda pool: pool.fail, operation, check) == 2
