"""The feature rows of the two-step API: what each promises, observed from outside."""

from __future__ import annotations

import pytest

from dmakit.consts import EOPNOTSUPP
from dmakit.dma.direction import Attrs, Direction
from dmakit.errors import ExhaustedError, FaultError, MisuseError, UnsupportedError
from dmakit.platform.soft import Machine
from tests.dma.world import (
    PAGE,
    Counted,
    held,
    invalidations,
    needs_tables,
    needs_unmap_by_the_page,
    pattern,
    pte_writes,
    table_pages,
    world,
)

pytestmark = pytest.mark.portable

TO, FROM, BOTH = Direction.TO_DEVICE, Direction.FROM_DEVICE, Direction.BIDIRECTIONAL


def test_a1_a_window_is_reserved_but_not_mapped() -> None:
    machine, device = world()
    before = machine.live()["iova_ranges"]
    with Counted(machine) as spent, device.try_alloc(0, 4 * PAGE) as state:
        assert machine.live()["iova_ranges"] == before + 1
        with pytest.raises(FaultError):
            device.dma_read(state.addr, 1)
    assert pte_writes(spent) == 0
    assert machine.live()["iova_ranges"] == before


def test_a2_the_offset_inside_a_granule_is_kept() -> None:
    machine, device = world()
    buffer = machine.buffer(PAGE, offset=0x800)
    phys = buffer.ranges[0][0]
    with device.try_alloc(phys, PAGE) as state:
        assert state.addr & 0xFFF == phys & 0xFFF == 0x800
        with Counted(machine) as spent:
            state.link(phys, 0, PAGE, TO)
        assert pte_writes(spent) == 2


def test_a3_a_link_writes_entries_and_nothing_else() -> None:
    machine, device = world()
    buffer = machine.buffer(3 * PAGE)
    with device.try_alloc(0, 8 * PAGE) as state:
        with Counted(machine) as spent:
            state.link(buffer.ranges[0][0], PAGE, 3 * PAGE, TO)
        assert pte_writes(spent) == 3
        assert spent["iova_magazine"] == spent["iova_tree"] == spent["iova_depot"] == 0
        assert invalidations(spent) == 0 and spent["sync_map"] == 0


@pytest.mark.parametrize("caching", [False, True])
def test_a4_one_sync_for_many_links(caching: bool) -> None:
    machine, device = world({"caching_mode": caching})
    pages = [machine.pages.alloc() for _ in range(6)]
    with device.try_alloc(0, 6 * PAGE) as state:
        with Counted(machine) as spent:
            for i, phys in enumerate(pages):
                state.link(phys, i * PAGE, PAGE, TO)
            state.sync()
        assert spent["sync_map"] == 1 and invalidations(spent) == (1 if caching else 0)
    with Counted(machine) as spent:
        addresses = [device.map_phys(phys, PAGE, TO) for phys in pages]
    assert spent["sync_map"] == 6 and invalidations(spent) == (6 if caching else 0)
    for addr in addresses:
        device.unmap_phys(addr, PAGE, TO)


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("mode", ["strict", "lazy"])
def test_a5_unlink_is_flushed_when_it_returns_and_keeps_the_window(mode: str, pieces: int) -> None:
    machine, device = world({"mode": mode})
    if pieces == 1:
        needs_unmap_by_the_page(device)
    buffer, other = machine.buffer(2 * PAGE), machine.buffer(PAGE)
    buffer.write(0, pattern(2 * PAGE))
    other.write(0, b"new")
    with device.try_alloc(0, 2 * PAGE) as state:
        for at in range(pieces):
            state.link(buffer.ranges[0][0] + at * PAGE, at * PAGE, 2 * PAGE // pieces, TO)
        state.sync()
        assert device.dma_read(state.addr, 2 * PAGE) == pattern(2 * PAGE)
        with Counted(machine) as spent:
            state.unlink(PAGE, PAGE, TO)
        assert spent["inv_page"] == 1 and spent["fq_entries"] == 0
        with pytest.raises(FaultError):
            device.dma_read(state.addr + PAGE, 1)
        assert device.dma_read(state.addr, PAGE) == pattern(2 * PAGE)[:PAGE]
        state.link(other.ranges[0][0], PAGE, PAGE, TO)
        state.sync(PAGE, PAGE)
        assert device.dma_read(state.addr + PAGE, 3) == b"new"


@pytest.mark.parametrize("mode", ["strict", "lazy"])
def test_a6_destroy_unlinks_and_frees_in_one_pass(mode: str) -> None:
    machine, device = world({"mode": mode})
    buffer = machine.buffer(4 * PAGE)
    before = machine.live()["iova_ranges"]
    state = device.try_alloc(0, 16 * PAGE)
    addr = state.addr
    state.link(buffer.ranges[0][0], 0, 4 * PAGE, TO)
    with Counted(machine) as spent:
        state.destroy(4 * PAGE, TO)
    assert (invalidations(spent), spent["fq_entries"]) == ((1, 0) if mode == "strict" else (0, 1))
    machine.clock.advance(10_000_000)
    assert machine.live()["iova_ranges"] == before
    again = device.try_alloc(0, 16 * PAGE)  # the partial destroy gave back all of it
    assert again.addr == addr
    again.free()


@pytest.mark.parametrize("mode", ["strict", "lazy"])
def test_a7_destroy_of_nothing_is_a_free(mode: str) -> None:
    machine, device = world({"mode": mode})
    before = machine.live()["iova_ranges"]
    state = device.try_alloc(0, 2 * PAGE)
    with Counted(machine) as spent:
        state.destroy(0, TO)
    assert invalidations(spent) == 0 and spent["fq_entries"] == 0
    assert machine.live()["iova_ranges"] == before


def test_a9_whether_the_window_can_be_used() -> None:
    _, device = world()
    state = device.try_alloc(0, PAGE)
    assert state and state.use_iova and state.size == PAGE
    state.free()
    assert not state and not state.use_iova
    assert not world({"mode": "passthrough"})[1].try_alloc(0, PAGE)
    assert not world({"iommu": "none"})[1].try_alloc(0, PAGE)


@pytest.mark.parametrize("options", [{"iommu": "none"}, {"mode": "passthrough"}, {"mode": "strict"}, {"mode": "lazy"}])
def test_a10_the_same_data_with_and_without_an_iommu(options: dict[str, str]) -> None:
    machine, device = world({"fragmentation": 1.0, **options})
    buffer = machine.buffer(5 * PAGE, offset=0x200)
    data = pattern(5 * PAGE)
    state = device.try_alloc(buffer.ranges[0][0], buffer.size)
    if state:
        offset = 0
        for phys, size in buffer.ranges:
            state.link(phys, offset, size, FROM)
            offset += size
        state.sync()
        device.dma_write(state.addr, data)
        state.destroy(offset, FROM)
    else:
        done = 0
        for phys, size in buffer.ranges:
            addr = device.map_phys(phys, size, FROM)
            device.dma_write(addr, data[done : done + size])
            device.unmap_phys(addr, size, FROM)
            done += size
    assert buffer.read() == data


def test_a11_need_unmap_is_false_only_for_direct_mappings_that_never_bounced() -> None:
    machine, device = world({"iommu": "none", "ram": "4G"})
    assert not device.need_unmap()
    device.unmap_phys(device.map_phys(machine.buffer(PAGE).ranges[0][0], PAGE, TO), PAGE, TO)
    assert not device.need_unmap()
    device.set_mask((1 << 32) - 1)
    high = machine.buffer(PAGE).ranges[0][0]
    addr = device.map_phys(high, PAGE, TO)
    assert high >= 1 << 32 > addr and device.need_unmap()
    device.unmap_phys(addr, PAGE, TO)
    assert world()[1].need_unmap()
    assert world({"iommu": "none", "coherent": False})[1].need_unmap()
    assert world({"iommu": "none"}, debug=True)[1].need_unmap()


UNTRUSTED = {"trusted": False, "min_align_mask": PAGE - 1}


@pytest.mark.parametrize(
    "offset, size", [(0x200, 0x3400), (0, 0x300), (0x400, 0x300), (0xF00, 0x200), (0, 0x3600), (0x200, 0x3E00)]
)
def test_a13_head_and_tail_are_bounced_alone(offset: int, size: int) -> None:
    machine, device = world(None, **UNTRUSTED)
    memory = machine.buffer(4 * PAGE)
    memory.fill(0x11)
    assert machine.swiotlb is not None
    machine.memory.fill(machine.swiotlb.low, machine.swiotlb.high - machine.swiotlb.low, 0xCC)  # somebody's old data
    phys = memory.ranges[0][0] + offset
    payload = pattern(size, 3)
    memory.write(offset, payload)
    head = min(size, -offset % PAGE)
    tail = (offset + size) % PAGE if size > head else 0
    state = device.try_alloc(phys, size)
    with Counted(machine) as spent:
        state.link(phys, 0, size, BOTH)
        state.sync()
    assert state.bounced and spent["bounced_bytes"] == head + tail
    assert device.dma_read(state.addr, size) == payload
    base, granules = state.addr & -PAGE, -(-(offset + size) // PAGE)
    visible = device.dma_read(base, granules * PAGE)  # whole granules, but nothing of the neighbours
    assert visible[:offset] == bytes(offset)
    assert visible[offset + size :] == bytes(granules * PAGE - offset - size)
    device.dma_write(base, b"\xee" * (granules * PAGE))
    state.destroy(size, BOTH)
    expected = b"\x11" * offset + b"\xee" * size + b"\x11" * (4 * PAGE - offset - size)
    assert memory.read() == expected
    assert machine.live()["bounce_slots"] == 0


def test_a15_the_aligned_middle_is_in_place_whatever_its_length() -> None:
    costs = set()
    for pages in (1, 4, 64):
        machine, device = world(None, **UNTRUSTED)
        size = (pages + 1) * PAGE
        memory = machine.buffer(size + PAGE)
        phys = memory.ranges[0][0] + 0x200
        state = device.try_alloc(phys, size)
        with Counted(machine) as spent:
            state.link(phys, 0, size, TO)
        costs.add(spent["bounced_bytes"])
        assert device.iova_to_phys(state.addr + PAGE) == phys + PAGE
        state.destroy(size, TO)
    assert costs == {PAGE}


def test_a16_a_device_that_does_not_snoop_sees_cpu_data_after_the_link() -> None:
    machine, device = world({"coherent": False})
    buffer = machine.buffer(2 * PAGE)
    buffer.write(0, b"A" * 2 * PAGE)
    state = device.try_alloc(0, 2 * PAGE)
    state.link(buffer.ranges[0][0], 0, PAGE, TO, Attrs.SKIP_CPU_SYNC)
    state.sync(0, PAGE)
    assert device.dma_read(state.addr, 1) == b"\0"  # still only in the CPU's cache
    with Counted(machine) as spent:
        state.link(buffer.ranges[0][0] + PAGE, PAGE, PAGE, BOTH)
    assert spent["cache_clean_bytes"] == PAGE
    state.sync(PAGE, PAGE)
    assert device.dma_read(state.addr + PAGE, 1) == b"A"
    device.dma_write(state.addr + PAGE, b"B")
    assert buffer.read(PAGE, 1) == b"A"  # the CPU's own line hides it
    with Counted(machine) as spent:
        state.unlink(PAGE, PAGE, BOTH)
    assert spent["cache_inv_bytes"] == PAGE and buffer.read(PAGE, 1) == b"B"
    with Counted(machine) as spent:
        state.destroy(PAGE, TO, Attrs.SKIP_CPU_SYNC)
    assert spent["cache_inv_bytes"] == 0


def test_a17_a_piece_that_starts_inside_a_granule_is_refused_without_damage() -> None:
    machine, device = world()
    buffer = machine.buffer(4 * PAGE)
    phys = buffer.ranges[0][0]
    with device.try_alloc(0, 4 * PAGE) as state:
        state.link(phys, 0, PAGE, TO)
        with Counted(machine) as spent, pytest.raises(MisuseError) as caught:
            state.link(phys + 0x200, PAGE, 0x200, TO)
        assert caught.value.errno_name == "EIO" and caught.value.rule == "unaligned-interior"
        assert str(caught.value) == (
            f"link of 0x200 bytes at phys {phys + 0x200:#x}, offset 0x1000: phys starts 0x200 into a granule of 0x1000 "
            "at an offset above 0; only the first piece may"
        )
        assert pte_writes(spent) == 0
        with pytest.raises(MisuseError) as caught:
            state.link(phys, 0x1200, PAGE, TO)
        assert caught.value.errno_name == "ENXIO"
        assert device.iova_to_phys(state.addr) == phys and device.iova_to_phys(state.addr + PAGE) == 0


@pytest.mark.parametrize("lack", ["table page", "bounce slot"])
def test_a18_a_failing_link_leaves_earlier_pieces_until_destroy(lack: str) -> None:
    """−ENOMEM at each link k: what was linked before stays, nothing of the failed piece does, nothing leaks."""
    step = 2 << 20  # every piece needs a table page of its own
    for k in range(4):
        machine, device = world({"ram": "128M"}, **UNTRUSTED)
        if lack == "table page":
            needs_tables(device)
        pages = [machine.pages.alloc() for _ in range(4)]
        size = PAGE if lack == "table page" else 0x600
        live, unused = held(machine), table_pages(machine)
        state = device.try_alloc(0, 4 * step)
        for i in range(k):
            state.link(pages[i], i * step, size, TO)
        machine.fail.arm(0)
        with pytest.raises(ExhaustedError) as caught:
            state.link(pages[k], k * step, size, TO)
        machine.fail.disarm()
        assert caught.value.errno_name == "ENOMEM" and str(caught.value).endswith(lack) and machine.fail.fired
        assert [device.iova_to_phys(state.addr + i * step) != 0 for i in range(4)] == [i < k for i in range(4)]
        state.undo()
        assert held(machine) == live
        assert table_pages(machine) == (machine.live()["table_pages"] or 0) >= unused


def test_a19_a_link_over_a_linked_range_fails() -> None:
    machine, device = world()
    buffer = machine.buffer(4 * PAGE)
    phys = buffer.ranges[0][0]
    with device.try_alloc(0, 4 * PAGE) as state:
        state.link(phys + PAGE, PAGE, PAGE, TO)
        with pytest.raises(MisuseError) as caught:
            state.link(phys, 0, 4 * PAGE, TO)
        assert caught.value.errno_name == "EADDRINUSE" and caught.value.rule == "overlapping-link"
        assert [device.iova_to_phys(state.addr + i * PAGE) for i in range(4)] == [0, phys + PAGE, 0, 0]


def test_e8_pieces_may_be_linked_in_any_order() -> None:
    machine, device = world({"fragmentation": 1.0})
    pages = [machine.pages.alloc() for _ in range(16)]
    with device.try_alloc(0, 16 * PAGE) as state:
        for i in (7, 0, 15, 3, 8, 1, 2, 14, 4, 5, 6, 9, 13, 10, 12, 11):
            state.link(pages[i], i * PAGE, PAGE, TO)
        state.sync()
        assert [device.iova_to_phys(state.addr + i * PAGE) for i in range(16)] == pages
        with Counted(machine) as spent:
            state.undo()
        assert spent["inv_page"] == 1  # contiguous from 0: one destroy


def test_an_untrusted_device_without_min_align_mask_cannot_bounce_a_head() -> None:
    machine, device = world(None, trusted=False)
    phys = machine.buffer(PAGE).ranges[0][0] + 0x200
    with device.try_alloc(phys, 0x400) as state:
        with pytest.raises(MisuseError) as caught:
            state.link(phys, 0, 0x400, TO)
        assert caught.value.errno_name == "ENXIO" and "min_align_mask" in str(caught.value)
    assert machine.live()["bounce_slots"] == 0


def test_what_forbids_a_bounce_is_told() -> None:
    machine, device = world(None, **UNTRUSTED)
    phys = machine.buffer(PAGE).ranges[0][0] + 0x200
    with device.try_alloc(phys, 0x400) as state:
        for attrs in (Attrs.MMIO, Attrs.REQUIRE_COHERENT):
            with pytest.raises(UnsupportedError) as caught:
                state.link(phys, 0, 0x400, TO, attrs)
            assert caught.value.errno_name == "EPERM"
        state.link(phys, 0, 0x400, TO)
        with pytest.raises(UnsupportedError) as caught:
            state.link(phys, 0, 0x400, TO, Attrs.REQUIRE_COHERENT)
        assert caught.value.errno == EOPNOTSUPP
    _, device = world({"coherent": False})
    with device.try_alloc(0, PAGE) as state, pytest.raises(UnsupportedError) as caught:
        state.link(0x100000, 0, PAGE, TO, Attrs.REQUIRE_COHERENT)
    assert caught.value.errno == EOPNOTSUPP


def test_direction_none_and_size_zero() -> None:
    machine, device = world()
    phys = machine.buffer(PAGE).ranges[0][0]
    with device.try_alloc(0, PAGE) as state:
        with pytest.raises(MisuseError) as caught:
            state.link(phys, 0, PAGE, Direction.NONE)
        assert caught.value.errno_name == "EINVAL"
        with pytest.raises(MisuseError, match="size > 0"):
            state.link(phys, 0, 0, TO)


def test_an_unlink_that_cuts_a_large_leaf_changes_nothing() -> None:
    machine, device = world({"ram": "128M"})
    needs_unmap_by_the_page(device)
    block = 2 << 20
    memory = machine.buffer(block, order=9)
    state = device.try_alloc(0, block)
    with Counted(machine) as spent:
        state.link(memory.ranges[0][0], 0, block, TO)
    assert spent["pte_set_1"] == 0  # one 2 MiB leaf
    for offset, size in ((0, PAGE), (PAGE, PAGE), (block // 2, block // 2)):
        with pytest.raises(MisuseError) as caught:
            state.unlink(offset, size, TO)
        assert caught.value.rule == "unlink-cuts-leaf"
        assert device.dma_read(state.addr + offset, 8) == bytes(8)
    with pytest.raises(MisuseError):
        state.destroy(PAGE, TO)
    state.destroy(block, TO)


def test_a_dead_state_and_a_range_outside_are_refused() -> None:
    machine, device = world()
    phys = machine.buffer(2 * PAGE).ranges[0][0]
    state = device.try_alloc(0, PAGE)
    with pytest.raises(MisuseError) as caught:
        state.link(phys, 0, 2 * PAGE, TO)
    assert caught.value.rule == "outside-window"
    with pytest.raises(MisuseError):
        state.destroy(2 * PAGE, TO)
    state.free()
    for call in (
        lambda: state.link(phys, 0, PAGE, TO),
        lambda: state.sync(0, 1),
        lambda: state.destroy(0, TO),
        state.free,
    ):
        with pytest.raises(MisuseError) as caught:
            call()
        assert caught.value.rule == "stale-state"


def test_with_unchecked_a_caller_gets_the_kernels_answer() -> None:
    machine, device = world(None, unchecked=True)
    events: list[tuple[object, ...]] = []
    machine.record_events(events)
    for size in (0, 1 << 63, (1 << 63) + PAGE):
        assert not device.try_alloc(0, size)
    assert [event[0] for event in events] == ["warn"] * 3
    phys = machine.buffer(PAGE).ranges[0][0]
    state = device.try_alloc(0, PAGE)
    with pytest.raises(MisuseError) as caught:
        state.link(phys, 0, 0, TO)
    assert caught.value.errno_name == "EINVAL"
    state.destroy(PAGE, TO)
    state.unlink(0, PAGE, TO)  # warns, removes nothing
    assert events[-1] == ("warn", "__iommu_dma_iova_unlink: unmapped size differs")


def test_one_failed_32_bit_allocation_moves_the_device_to_64_bits_for_good() -> None:
    machine, device = world()
    with device.try_alloc(0, PAGE) as state:
        assert state.addr < 1 << 32
    events: list[tuple[object, ...]] = []
    machine.record_events(events)
    big = device.try_alloc(0, 4 << 30)
    assert big.addr >= 1 << 32
    big.free()
    bits = min(device.mask, device.domain.aperture_end).bit_length()
    assert bits > 32 and ("notice", f"{device.name}: Using {bits}-bit DMA addresses") in events
    with device.try_alloc(0, 2 * PAGE) as state:
        assert state.addr >= 1 << 32
    with device.try_alloc(0, PAGE) as state:  # a magazine still holds a low one
        assert state.addr < 1 << 32


def test_an_iova_space_that_is_full_is_told_by_a_falsy_state() -> None:
    _, device = world(None, mask=(1 << 24) - 1)
    state = device.try_alloc(0, 32 << 20)
    assert not state and state.addr == 0 and state.size == 0
    assert device.why != 0


def test_the_machine_of_the_readme() -> None:
    with Machine() as machine, machine.device("nvme0") as device:
        first, second = machine.buffer("64K"), machine.buffer("64K")
        first.write(0, b"hello ")
        second.write(0, b"world")
        with device.try_alloc(0, 128 << 10) as state:
            state.link(first.ranges[0][0], 0, 64 << 10, TO)
            state.link(second.ranges[0][0], 64 << 10, 64 << 10, TO)
            state.sync()
            assert device.dma_read(state.addr, 6) == b"hello "
            assert device.dma_read(state.addr + (64 << 10), 5) == b"world"
            state.destroy(128 << 10, TO)
