"""Memory that driver and device share."""

from __future__ import annotations

import pytest

from dmakit.dma.direction import Attrs, Direction
from dmakit.errors import ExhaustedError, MisuseError, UnsupportedError
from tests.dma.world import PAGE, Counted, pattern, world

pytestmark = pytest.mark.portable

KINDS = [{"mode": "strict"}, {"mode": "lazy"}, {"iommu": "x86"}, {"iommu": "none"}, {"mode": "passthrough"}]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("coherent", [True, False])
def test_cpu_and_device_see_the_same_bytes_at_any_time(options: dict[str, str], coherent: bool) -> None:
    machine, device = world({**options, "coherent": coherent})
    live = machine.live()
    free = machine.pages.free_pages_count
    with device.alloc_coherent(3 * PAGE - 100) as memory:
        assert memory.read() == bytes(3 * PAGE - 100)
        memory.write(10, b"from the CPU")
        assert device.dma_read(memory.addr + 10, 12) == b"from the CPU"
        device.dma_write(memory.addr + PAGE - 2, b"from the device")
        assert memory.read(PAGE - 2, 15) == b"from the device"
        assert machine.pages.free_pages_count < free
    machine.settle()
    assert machine.pages.free_pages_count == free
    assert machine.live()["iova_ranges"] == live["iova_ranges"]


def test_memory_is_taken_in_the_largest_leaves_and_falls_back() -> None:
    machine, device = world({"ram": "128M"})
    with Counted(machine) as spent, device.alloc_coherent((4 << 20) + PAGE) as memory:
        orders = [order for _, _, order in memory._blocks]
    every = device.domain.page_sizes >> 22 & 1  # AMD's tables have leaves of every size, and type1 says so
    assert orders == ([10, 0] if every else [9, 9, 0]) and spent["pte_set_1"] == 1
    with device.alloc_coherent(4 << 20, Attrs.ALLOC_SINGLE_PAGES) as memory:
        assert {order for _, _, order in memory._blocks} == {0}
    with device.alloc_coherent(3 * PAGE, Attrs.FORCE_CONTIGUOUS) as memory:
        assert [order for _, _, order in memory._blocks] == [2]


def test_memory_falls_back_to_single_pages_when_it_is_fragmented() -> None:
    machine, device = world({"ram": "32M"})
    held = [machine.pages.alloc() for _ in range(machine.pages.free_pages_count)]
    for phys in held[::2]:
        machine.pages.free(phys)
    with device.alloc_coherent(4 << 20) as memory:
        assert {order for _, _, order in memory._blocks} == {0}
    free = machine.pages.free_pages_count
    with pytest.raises(ExhaustedError):
        device.alloc_coherent(32 << 20)
    assert machine.pages.free_pages_count == free


def test_the_coherent_mask_counts() -> None:
    machine, device = world({"ram": "4G", "iommu": "none"}, coherent_mask=(1 << 32) - 1)
    with device.alloc_coherent(PAGE) as memory:
        assert memory.addr < 1 << 32
    device.set_mask((1 << 64) - 1, (1 << 20) - 1)
    with pytest.raises(UnsupportedError, match="at or below 0xfffff"):
        device.alloc_coherent(PAGE)
    machine, device = world(None, coherent_mask=(1 << 24) - 1)
    with device.alloc_coherent(PAGE) as memory:
        assert memory.addr < 1 << 24


@pytest.mark.parametrize("options", KINDS)
def test_noncontiguous_memory_is_one_range_and_is_synced(options: dict[str, str]) -> None:
    machine, device = world({**options, "coherent": False, "fragmentation": 1.0})
    size = 5 * PAGE
    with device.alloc_noncontiguous(size, Direction.BIDIRECTIONAL) as memory:
        memory.write(0, pattern(size))
        assert device.dma_read(memory.addr, size) == bytes(size)
        memory.sync_for_device()
        assert device.dma_read(memory.addr, size) == pattern(size)
        device.dma_write(memory.addr, b"\x01" * size)
        assert memory.read() == pattern(size)
        memory.sync_for_cpu()
        assert memory.read() == b"\x01" * size


def test_misuse() -> None:
    machine, device = world()
    memory = device.alloc_coherent(PAGE)
    with pytest.raises(MisuseError, match="coherent memory of 0x1000 bytes"):
        device.release()
    memory.free()
    with pytest.raises(MisuseError, match="was freed already"):
        memory.free()
    with pytest.raises(MisuseError):
        device.alloc_coherent(0)
    device.set_mask((1 << 24) - 1, (1 << 24) - 1)
    free = machine.pages.free_pages_count
    with pytest.raises(ExhaustedError, match="no IOVA range or table page"):
        device.alloc_coherent(17 << 20)
    assert machine.pages.free_pages_count == free
