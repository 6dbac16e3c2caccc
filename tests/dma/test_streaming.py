"""The classic calls: direct and behind an IOMMU, bounced, not coherent, of device memory."""

from __future__ import annotations

import pytest

from dmakit.dma.direction import Attrs, Direction
from dmakit.errors import ExhaustedError, FaultError, MisuseError, UnsupportedError
from dmakit.reasons import Reason
from tests.dma.world import (
    PAGE,
    Counted,
    another,
    invalidations,
    leaves,
    needs_made_up_bars,
    pattern,
    pte_writes,
    world,
)

pytestmark = pytest.mark.portable

TO, FROM, BOTH = Direction.TO_DEVICE, Direction.FROM_DEVICE, Direction.BIDIRECTIONAL
EVERYWHERE = [
    {"iommu": "none"},
    {"mode": "passthrough"},
    {"mode": "strict"},
    {"mode": "lazy"},
    {"iommu": "x86", "mode": "strict"},
    {"caching_mode": True},
    {"iommu": "none", "force_bounce": True},
    {"mode": "strict", "coherent": False},
    {"iommu": "none", "coherent": False},
]


@pytest.mark.parametrize("options", EVERYWHERE)
@pytest.mark.parametrize("trusted", [True, False])
def test_a27_one_call_for_all_cases(options: dict[str, object], trusted: bool) -> None:
    machine, device = world(options, trusted=trusted, min_align_mask=PAGE - 1)
    memory = machine.buffer(4 * PAGE)
    memory.fill(0x11)
    for offset, size in ((0, PAGE), (0x200, 0x100), (0xF00, 0x200), (0, 0x2300), (0x40, 3 * PAGE)):
        phys = memory.ranges[0][0] + offset
        payload = pattern(size, offset)
        memory.write(offset, payload)
        addr = device.map_phys(phys, size, TO)
        assert device.dma_read(addr, size) == payload
        device.unmap_phys(addr, size, TO)
        addr = device.map_phys(phys, size, FROM)
        device.dma_write(addr, payload[::-1])
        device.unmap_phys(addr, size, FROM)
        assert memory.read(offset, size) == payload[::-1]
        memory.fill(0x11)
    machine.settle()
    assert machine.live()["iova_ranges"] == machine.live()["bounce_slots"] == machine.live()["queued"] == 0


def test_a28_device_memory_is_mapped_without_cache_care_or_bounce() -> None:
    for options in ({"mode": "strict", "coherent": False}, {"iommu": "none", "force_bounce": False}):
        machine, device = world(options, trusted=False)
        needs_made_up_bars(machine)
        bar = machine.add_bar("64K", "regs")
        with Counted(machine) as spent:
            addr = device.map_resource(bar.start + 0x100, 0x80, BOTH)
            device.dma_write(addr, b"doorbell")
            device.unmap_resource(addr, 0x80, BOTH)
        assert machine.memory.read(bar.start + 0x100, 8) == b"doorbell"
        assert spent["cache_clean_bytes"] == spent["cache_inv_bytes"] == spent["bounced_bytes"] == 0
        ram = machine.buffer(PAGE).ranges[0][0]
        with pytest.raises(MisuseError, match="is RAM; use map_phys"):
            device.map_resource(ram, PAGE, BOTH)
        with pytest.raises(MisuseError, match="must be RAM"):
            device.map_page(bar.start, PAGE, BOTH)


def test_a29_the_reverse_look_up_is_exact_for_every_byte() -> None:
    machine, device = world({"fragmentation": 1.0})
    memory = machine.buffer(3 * PAGE, offset=0x123)
    addr = device.map_phys(memory.ranges[0][0], 0x400, TO)
    assert [device.iova_to_phys(addr + i) for i in range(0x400)] == [memory.ranges[0][0] + i for i in range(0x400)]
    device.unmap_phys(addr, 0x400, TO)
    assert device.iova_to_phys(addr) == 0
    state = device.try_alloc(memory.ranges[0][0], memory.size)
    offset = 0
    for phys, size in memory.ranges:
        state.link(phys, offset, size, TO)
        for i in (0, 1, size // 2, size - 1):
            assert device.iova_to_phys(state.addr + offset + i) == phys + i
        offset += size
    state.undo()


def test_a32_the_classic_calls_do_not_notice_two_step_users() -> None:
    def run(with_state: bool) -> tuple[list[object], dict[str, int]]:
        machine, device = world()
        other = another()
        memory = machine.buffer(8 * PAGE)
        addresses: list[object] = []
        with Counted(machine) as spent:
            for i in range(8):
                state = other.try_alloc(0, 4 * PAGE) if with_state else None
                if state:
                    state.link(memory.ranges[0][0], 0, PAGE, TO)
                addresses.append(device.map_phys(memory.ranges[0][0] + i * PAGE, PAGE, TO))
                if state:
                    state.undo()
            tables = leaves(device, 0, 1 << 48)
        return addresses + tables, spent

    alone, beside = run(False), run(True)
    assert alone[0] == beside[0]
    assert beside[1]["map_calls"] == alone[1]["map_calls"]


def test_a33_one_dispatch_per_call() -> None:
    machine, device = world()
    phys = machine.buffer(PAGE).ranges[0][0]
    with Counted(machine) as spent:
        for _ in range(10):
            device.unmap_phys(device.map_phys(phys, PAGE, TO), PAGE, TO)
    assert (spent["map_calls"], spent["unmap_calls"], spent["sync_map"], invalidations(spent)) == (10, 10, 10, 10)
    assert spent["iova_magazine"] + spent["iova_tree"] == 10 and pte_writes(spent) == 10


@pytest.mark.parametrize("mode", ["strict", "lazy"])
def test_a25_the_loop_of_map_page_and_the_window_are_counted_alike(mode: str) -> None:
    machine, device = world({"mode": mode, "fragmentation": 1.0})
    pages = [machine.pages.alloc() for _ in range(32)]
    with Counted(machine) as loop:
        mapped = [device.map_page(phys, PAGE, TO) for phys in pages]
        for addr in mapped:
            device.unmap_page(addr, PAGE, TO)
        machine.settle()
    with Counted(machine) as window:
        state = device.try_alloc(0, 32 * PAGE)
        for i, phys in enumerate(pages):
            state.link(phys, i * PAGE, PAGE, TO)
        state.sync()
        state.destroy(32 * PAGE, TO)
        machine.settle()
    allocations = [sum(s[f"iova_{way}"] for way in ("magazine", "depot", "tree")) for s in (loop, window)]
    assert allocations == [32, 1]
    assert pte_writes(loop) == pte_writes(window) == 32
    assert (invalidations(loop), invalidations(window)) == ((32, 1) if mode == "strict" else (1, 1))
    assert (loop["fq_entries"], window["fq_entries"]) == ((0, 0) if mode == "strict" else (32, 1))


def test_a26_up_to_128_kib_comes_from_a_magazine_and_more_never_does() -> None:
    machine, device = world()
    for size, way in ((PAGE, "magazine"), (128 << 10, "magazine"), (132 << 10, "tree")):
        device.try_alloc(0, size).free()
        with Counted(machine) as spent:
            device.try_alloc(0, size).free()
        assert spent[f"iova_{way}"] == 1 and spent["iova_magazine"] + spent["iova_tree"] == 1
    assert device.opt_mapping_size() == 128 << 10


def test_e1_the_one_shot_path_stage_by_stage() -> None:
    machine, device = world({"fragmentation": 1.0})
    segments = [(machine.pages.alloc(), PAGE) for _ in range(8)]
    with Counted(machine) as spent:
        sg = device.map_sg(segments, TO)
    assert spent["sg_calls"] == 1 and spent["passes"] == 3  # lengths, map, finalise
    assert sum(spent[f"iova_{way}"] for way in ("magazine", "depot", "tree")) == 1
    assert pte_writes(spent) == 8 and spent["sync_map"] == 1
    device.unmap_sg(sg)


def test_lazy_leaves_access_until_the_queue_is_flushed_and_strict_does_not() -> None:
    for mode in ("strict", "lazy"):
        machine, device = world({"mode": mode})
        memory = machine.buffer(PAGE)
        memory.fill(0x5A)
        addr = device.map_phys(memory.ranges[0][0], PAGE, TO)
        device.dma_read(addr, 1)
        device.unmap_phys(addr, PAGE, TO)
        if mode == "lazy":
            device.dma_read(addr, 1)  # a stale IOTLB entry still translates
            machine.clock.advance(10_000_000)
        with pytest.raises(FaultError):
            device.dma_read(addr, 1)


def test_permissions_follow_the_direction() -> None:
    machine, device = world()
    phys = machine.buffer(PAGE).ranges[0][0]
    reads = device.map_phys(phys, PAGE, TO)
    writes = device.map_phys(phys, PAGE, FROM)
    with pytest.raises(FaultError):
        device.dma_write(reads, b"x")
    with pytest.raises(FaultError):
        device.dma_read(writes, 1)


def test_an_untrusted_device_is_strict_and_never_passed_through() -> None:
    machine, device = world({"mode": "passthrough"}, trusted=False)
    assert device.translating and device.flush_queue is None
    machine, device = world({"mode": "lazy"}, trusted=False)
    assert device.flush_queue is None
    assert another().flush_queue is not None
    assert world({"mode": "lazy", "caching_mode": True})[1].flush_queue is None


def test_the_classic_path_bounces_the_whole_unaligned_buffer() -> None:
    machine, device = world(None, trusted=False, min_align_mask=PAGE - 1)
    memory = machine.buffer(128 * PAGE)
    phys = memory.ranges[0][0]
    with Counted(machine) as spent:
        addr = device.map_phys(phys + 0x200, 0x4000, TO)
    assert spent["bounced_bytes"] == 0x4000 and device.why == Reason.UNTRUSTED_BOUNCE
    device.unmap_phys(addr, 0x4000, TO)
    with Counted(machine) as spent:
        addr = device.map_phys(phys, 0x4000, TO)
    assert spent["bounced_bytes"] == 0 and device.why == Reason.NONE
    device.unmap_phys(addr, 0x4000, TO)
    with pytest.raises(ExhaustedError) as caught:
        device.map_phys(phys + 0x200, 256 << 10, TO)
    assert caught.value.errno_name == "ENOMEM"
    assert str(caught.value).endswith("no run of free bounce slots (at most 256 KiB at once)")
    assert device.max_mapping_size() == (256 << 10) - PAGE


def test_without_min_align_mask_the_classic_bounce_drops_the_offset() -> None:
    machine, device = world(None, trusted=False)
    phys = machine.buffer(PAGE).ranges[0][0]
    assert device.map_phys(phys + 0x200, 0x100, TO) & 0xFFF == 0


def test_without_a_pool_nothing_can_be_bounced() -> None:
    machine, device = world({"swiotlb": 0}, trusted=False)
    phys = machine.buffer(PAGE).ranges[0][0]
    with pytest.raises(UnsupportedError, match="there is no swiotlb pool") as caught:
        device.map_phys(phys + 1, 10, TO)
    assert caught.value.errno_name == "ENOMEM" and device.why == Reason.SLOTS_EXHAUSTED
    machine, device = world({"iommu": "none", "ram": "4G", "swiotlb": 0}, mask=(1 << 32) - 1)
    with pytest.raises(UnsupportedError, match="reaches only up to 0xffffffff"):
        device.map_phys(machine.buffer(PAGE).ranges[0][0], PAGE, TO)


def test_direct_bounces_what_the_mask_cannot_reach() -> None:
    machine, device = world({"iommu": "none", "ram": "4G", "swiotlb": "1M"}, mask=(1 << 32) - 1)
    memory = machine.buffer(PAGE)
    memory.write(0, b"data")
    addr = device.map_phys(memory.ranges[0][0], PAGE, BOTH)
    assert addr < 1 << 32 <= memory.ranges[0][0] and device.why == Reason.MASK_BOUNCE
    assert device.dma_read(addr, 4) == b"data"
    device.dma_write(addr, b"DATA")
    assert memory.read(0, 4) == b"data"
    device.sync_single_for_cpu(addr, 4, BOTH)
    assert memory.read(0, 4) == b"DATA"
    memory.write(0, b"more")
    device.sync_single_for_device(addr, 4, BOTH)
    assert device.dma_read(addr, 4) == b"more"
    device.unmap_phys(addr, PAGE, BOTH, Attrs.SKIP_CPU_SYNC)
    assert device.max_mapping_size() == 256 << 10 == device.opt_mapping_size()


def test_a_small_buffer_of_a_device_that_does_not_snoop_is_bounced() -> None:
    for options in ({"iommu": "none", "coherent": False}, {"mode": "strict", "coherent": False}):
        machine, device = world(options, min_align_mask=PAGE - 1)
        memory = machine.buffer(PAGE)
        phys = memory.ranges[0][0]
        for size, direction, bounced in (
            (16, FROM, True),
            (16, TO, False),
            (64, FROM, False),
            (96, BOTH, True),
            (300, FROM, False),
        ):
            memory.write(0, pattern(512))
            with Counted(machine) as spent:
                addr = device.map_phys(phys, size, direction)
                if direction != TO:
                    device.dma_write(addr, b"\x5a" * size)
                device.unmap_phys(addr, size, direction)
            assert (spent["bounce_maps"] == 1) == bounced, (size, direction)
            expected = pattern(512) if direction == TO else b"\x5a" * size + pattern(512)[size:]
            assert memory.read(0, 512) == expected


def test_require_coherent_and_mmio() -> None:
    machine, device = world(None, trusted=False)
    phys = machine.buffer(PAGE).ranges[0][0]
    with pytest.raises(UnsupportedError) as caught:
        device.map_phys(phys + 0x200, 0x100, TO, Attrs.REQUIRE_COHERENT)
    assert caught.value.errno_name == "EPERM"
    addr = device.map_phys(phys + 0x200, 0x100, TO, Attrs.MMIO)  # observed: in place
    assert device.iova_to_phys(addr) == phys + 0x200
    for options in ({"coherent": False}, {"coherent": False, "iommu": "none"}):
        machine, device = world(options)
        with pytest.raises(UnsupportedError, match="does not snoop"):
            device.map_phys(phys, PAGE, TO, Attrs.REQUIRE_COHERENT)
    machine, device = world({"iommu": "none", "force_bounce": True})
    with pytest.raises(UnsupportedError, match="must be bounced"):
        device.map_phys(phys, PAGE, TO, Attrs.REQUIRE_COHERENT)


def test_a_min_align_mask_over_the_granule_is_refused() -> None:
    machine, device = world(None, min_align_mask=0x1FFF)
    with pytest.raises(MisuseError, match="min_align_mask=0x1fff exceeds the granule"):
        device.map_phys(machine.buffer(PAGE).ranges[0][0], PAGE, TO)


def test_bad_arguments() -> None:
    machine, device = world()
    for arguments in (
        (-1, 1, TO),
        (0, 0, TO),
        (1 << 64, 1, TO),
        (0, 1, 4),
        (0, 1, Direction.NONE),
        (0, 1, TO, 1 << 20),
    ):
        with pytest.raises(MisuseError):
            device.map_phys(*arguments)
    with pytest.raises(MisuseError, match="nothing is mapped at 0x1000"):
        device.unmap_phys(0x1000, PAGE, TO)
    with pytest.raises(MisuseError, match="unknown option 'colour'"):
        another(colour=1)
    with pytest.raises(MisuseError, match="must be 2\\*\\*n - 1"):
        another(mask=12)
    with pytest.raises(MisuseError, match="exists already|is open already"):
        machine.device(device.name)


def test_merge_boundary_and_sizes() -> None:
    assert world()[1].merge_boundary == 4095
    assert world({"iommu": "none"})[1].merge_boundary == 0
    assert world()[1].max_mapping_size() == (1 << 64) - 1
    assert world({"iommu": "none"})[1].opt_mapping_size() == (1 << 64) - 1
    assert world({"iommu": "none", "force_bounce": True})[1].max_mapping_size() == 256 << 10


def test_a_device_released_with_live_mappings_is_told() -> None:
    machine, device = world()
    with pytest.raises(MisuseError, match="a window of 0x1000 bytes") as caught, device:
        state = device.try_alloc(0, PAGE)
    assert caught.value.rule == "leak"
    state.free()
    device.release()
