"""The software machine: layout, choices, observation."""

from __future__ import annotations

import pytest

from dmakit.dma.direction import Direction
from dmakit.errors import ExhaustedError, InputError, MisuseError
from dmakit.platform.soft import Machine

TO = Direction.TO_DEVICE
PAGE = 4096


def test_memory_is_laid_out_as_a_pc_has_it() -> None:
    with Machine(ram="4G") as machine:
        ram = [(r.start, r.end) for r in machine.memory.regions if r.kind == "ram"]
        assert ram == [(0, 2 << 30), (4 << 30, 6 << 30)]
        assert machine.swiotlb is not None and machine.swiotlb.high == 2 << 30
        assert machine.buffer(PAGE).ranges[0][0] >= 4 << 30
        bar = machine.add_bar("1M", "regs")
        assert bar.start == 6 << 30 and not machine.memory.is_ram(bar.start)
        assert machine.add_bar(5000 // PAGE * PAGE).start == bar.end
    with Machine(ram="256M") as machine:
        assert machine.buffer(PAGE).ranges[0][0] < 256 << 20


def test_nodes_share_the_ram() -> None:
    with Machine(ram="4G", nodes=2) as machine:
        assert [pages.node for pages in machine.node_pages] == [0, 1]
        phys = machine.buffer(PAGE, node=1).ranges[0][0]
        assert machine.memory.region_at(phys).node == 1


def test_buffers_do_not_depend_on_how_they_are_mapped() -> None:
    layouts = []
    for options in ({"iommu": "none"}, {"mode": "strict"}, {"iommu": "x86"}):
        with Machine(fragmentation=0.5, seed=3, **options) as machine:
            device = machine.device("d")
            ranges = []
            for _ in range(20):
                buffer = machine.buffer("64K")
                ranges.append(buffer.ranges)
                for phys, size in buffer.ranges:
                    device.map_phys(phys, size, TO)
            layouts.append(ranges)
    assert layouts[0] == layouts[1] == layouts[2]


def test_reserved_ranges_are_never_given_out() -> None:
    with Machine(mode="strict") as machine:
        device = machine.device("d", mask=(1 << 32) - 1)
        seen = [device.try_alloc(0, 16 << 20).addr for _ in range(70)]
        for addr in seen:
            for lo, hi in machine.reserved:
                assert not (addr < (hi + 1) << 12 and lo << 12 < addr + (16 << 20))


def test_a_recorded_pool_and_bounce_memory_can_be_placed() -> None:
    with Machine(ram="4G", pool=(0x10000000, 1 << 20), swiotlb=(0x7BFD7000, 64 << 20)) as machine:
        assert 0x10000000 <= machine.buffer(PAGE).ranges[0][0] < 0x10100000
        assert machine.swiotlb is not None and machine.swiotlb.low == 0x7BFD7000


def test_events_reach_the_list_in_order() -> None:
    events: list[tuple[object, ...]] = []
    with Machine(mode="lazy") as machine:
        machine.record_events(events)
        device = machine.device("d")
        phys = machine.buffer(PAGE).ranges[0][0]
        device.unmap_phys(device.map_phys(phys, PAGE, TO), PAGE, TO)
        assert [event[0] for event in events] == ["af_out", "map", "syncmap_in", "unmap"]
        machine.clock.advance(10_000_000)
        assert [event[0] for event in events[4:]] == ["fqto_in", "flush_range", "qi", "ff_in"]
        machine.record_events(None)
        device.map_phys(phys, PAGE, TO)
        assert len(events) == 8


@pytest.mark.parametrize(
    "options, message",
    [
        ({"iommu": "amd"}, "iommu='amd': must be one of vtd, x86, none"),
        ({"mode": "fast"}, "mode='fast': must be one of lazy, strict, passthrough"),
        ({"ram": "1M"}, "ram=1048576: a machine needs at least 16777216 bytes"),
        ({"ram": "64M", "swiotlb": "48M"}, "swiotlb='48M': does not fit into 67108864 bytes of low RAM"),
        ({"ram": 5000}, "ram=5000: must be a multiple of 4096 bytes"),
        ({"nodes": 0}, "nodes=0: must be at least 1, with 2 MiB of RAM each"),
        ({"defects": ("x",)}, None),
    ],
)
def test_impossible_machines_are_refused(options: dict[str, object], message: str | None) -> None:
    with pytest.raises(InputError) as caught:
        Machine(**options).device("d")
    assert message is None or str(caught.value) == message


def test_running_out_is_told() -> None:
    with Machine(ram="16M", swiotlb="1M") as machine:
        with pytest.raises(ExhaustedError):
            machine.buffer("1G")
        with pytest.raises(ExhaustedError, match="no room for a BAR"):
            machine.add_bar("128G")
        with pytest.raises(MisuseError):
            machine.buffer(0)


def test_the_same_seed_gives_the_same_ledger() -> None:
    def run() -> dict[str, int]:
        with Machine(fragmentation=0.7, seed=11, mode="lazy") as machine:
            device = machine.device("d")
            for i in range(50):
                buffer = machine.buffer(PAGE * (1 + i % 7))
                sg = device.map_sg(buffer.ranges, TO)
                device.unmap_sg(sg)
                machine.clock.advance(1_000_000)
            return machine.ledger.snapshot()

    assert run() == run()
