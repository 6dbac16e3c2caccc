"""dma_map_sg: merging, padding to the boundary, limits; against the kernel's own answers where there are some."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmakit.dma.direction import Attrs, Direction
from dmakit.errors import ExhaustedError, MisuseError, UnsupportedError
from dmakit.reasons import Reason
from tests.dma.world import PAGE, Counted, another, examples, needs_made_up_bars, pattern, world

pytestmark = pytest.mark.portable

TO, FROM = Direction.TO_DEVICE, Direction.FROM_DEVICE
U64 = (1 << 64) - 1
RECORDED = Path(__file__).parent.parent / "data" / "kernel-steps"


def recorded_lists(name: str) -> list[dict[str, Any]]:
    with lzma.open(RECORDED / f"{name}.jsonl.xz", "rt") as lines:
        steps = [json.loads(line) for line in lines]
    return [step for step in steps if step["cmd"].startswith("sg ") and step.get("ret", 0) > 0]


@pytest.mark.parametrize("name", ["sg-module", "unlink-lazy"])
def test_a24_the_output_equals_the_kernels(name: str) -> None:
    """300 random lists and the named cases, recorded on Linux 7.2: counts, lengths and places inside the IOVA range."""
    _, device = world({"ram": "64M", "reserved": ()})
    lists = recorded_lists(name)
    assert len(lists) == {"sg-module": 300, "unlink-lazy": 17}[name]
    for step in lists:
        device.set_max_segment(step["max_seg"])
        device.set_boundary(step["boundary"])
        sg = device.map_sg([tuple(entry) for entry in step["in"]], TO)
        ours, kernel = sg.segments, step["out"]
        assert len(ours) == step["ret"]
        shift = kernel[0][0] - ours[0][0]
        assert [[addr + shift, length] for addr, length in ours] == kernel, step["n"]
        device.unmap_sg(sg)


def segments(machine: Any, sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Entries at given (offset in page, length), each in pages of its own."""
    found = []
    for offset, length in sizes:
        found.append((machine.buffer(offset + length, order=4).ranges[0][0] + offset, length))
    return found


def test_neighbours_merge_only_when_they_meet_on_granules() -> None:
    machine, device = world({"fragmentation": 1.0})
    cases = [
        ([(0, PAGE), (0, PAGE), (0, PAGE)], 1),
        ([(0x200, 0xE00), (0, PAGE), (0, 0x200)], 1),
        ([(0x200, 0x200), (0, PAGE)], 2),
        ([(0, PAGE), (0x200, 0x200)], 2),
        ([(0, 0x1001), (0, 0xFFF)], 2),
    ]
    for sizes, count in cases:
        entries = segments(machine, sizes)
        sg = device.map_sg(entries, TO)
        assert len(sg.segments) == count and sg.inputs == entries
        assert device.why == (Reason.SG_MERGED if count < len(sizes) else Reason.SG_NOT_MERGED)
        device.unmap_sg(sg)


def test_max_segment_and_boundary_are_obeyed() -> None:
    machine, device = world(None, max_segment=3 * PAGE)
    sg = device.map_sg(segments(machine, [(0, PAGE)] * 8), TO)
    assert [length for _, length in sg.segments] == [3 * PAGE, 3 * PAGE, 2 * PAGE]
    device.unmap_sg(sg)
    machine, device = world(None, boundary=0x3FFF)
    sg = device.map_sg(segments(machine, [(0, 3 * PAGE)] * 3), TO)
    assert all(addr // 0x4000 == (addr + length - 1) // 0x4000 for addr, length in sg.segments)
    device.unmap_sg(sg)


def test_the_data_is_what_the_entries_hold() -> None:
    for options in (
        {"mode": "strict"},
        {"iommu": "none"},
        {"mode": "strict", "coherent": False},
        {"iommu": "none", "coherent": False},
    ):
        for trusted in (True, False):
            machine, device = world(options, trusted=trusted, min_align_mask=PAGE - 1)
            buffers = [
                machine.buffer(size, offset=offset) for offset, size in ((0, PAGE), (0x300, 0x500), (0, 3 * PAGE))
            ]
            for i, buffer in enumerate(buffers):
                buffer.write(0, pattern(buffer.size, i))
            entries = [piece for buffer in buffers for piece in buffer.ranges]
            sg = device.map_sg(entries, Direction.BIDIRECTIONAL)
            assert b"".join(device.dma_read(a, n) for a, n in sg.segments) == b"".join(b.read() for b in buffers)
            for addr, length in sg.segments:
                device.dma_write(addr, b"\x77" * length)
            device.sync_sg_for_cpu(sg)
            assert all(buffer.read() == b"\x77" * buffer.size for buffer in buffers)
            buffers[0].write(0, b"abc")
            device.sync_sg_for_device(sg)
            assert device.dma_read(sg.segments[0][0], 3) == b"abc"
            device.unmap_sg(sg)
            assert machine.live()["iova_ranges"] == machine.live()["bounce_slots"] == 0


def test_an_untrusted_device_gets_every_entry_by_itself() -> None:
    machine, device = world(None, trusted=False, min_align_mask=PAGE - 1)
    entries = [(machine.pages.alloc(), PAGE) for _ in range(3)]
    sg = device.map_sg(entries, TO)
    assert len(sg.segments) == 3
    device.unmap_sg(sg)
    with Counted(machine) as spent, pytest.raises(ExhaustedError) as caught:
        device.map_sg([*entries, (entries[0][0] + 0x10, 400 << 10)], TO)
    assert caught.value.errno_name == "EIO"
    assert spent["bounce_slots"] == 0 and machine.live()["iova_ranges"] == 0


def test_bad_lists() -> None:
    machine, device = world()
    phys = machine.buffer(PAGE).ranges[0][0]
    with pytest.raises(MisuseError, match="needs at least one entry"):
        device.map_sg([], TO)
    with pytest.raises(MisuseError, match="needs at least one entry and a direction"):
        device.map_sg([(phys, PAGE)], Direction.NONE)
    sg = device.map_sg([(phys, PAGE)], TO)
    device.unmap_sg(sg)
    with pytest.raises(MisuseError, match="this list is not mapped"):
        device.unmap_sg(sg)
    device.set_mask((1 << 24) - 1)
    with pytest.raises(ExhaustedError, match="no free IOVA range at or below 0xffffff"):
        device.map_sg([(0, 32 << 20)], TO)
    for bad in (0, 1 << 32):
        with pytest.raises(MisuseError, match="max_segment"):
            device.set_max_segment(bad)
    with pytest.raises(MisuseError, match="boundary"):
        device.set_boundary(12)


def peers() -> tuple[Any, Any, int, Any]:
    from dmakit.p2p.state import P2pState
    from dmakit.p2p.topology import HostBridge, PciTopology

    machine, _ = world()
    needs_made_up_bars(machine)
    bar = machine.add_bar("64K", "peer")
    topology = PciTopology(machine.memory)
    return machine, topology, bar.start, (HostBridge, P2pState)


@pytest.mark.parametrize("defects", [(), ("sg-bus-entry-length-of-head",)])
def test_a_peer_below_the_same_switch_keeps_a_segment_of_its_own(defects: tuple[str, ...]) -> None:
    machine, topology, bar, (host_bridge, state) = peers()
    first, second = host_bridge("pci0").root_port("rp").switch("sw", 2)
    provider, client = first.endpoint("nvme0"), second.endpoint("nvme1")
    topology.provide(provider, bar, 64 << 10, bus_offset=-0x1000)
    device = another(p2p=state(topology, client, machine.ledger), defects=defects)
    ram = machine.buffer(3 * PAGE).ranges[0][0]
    sg = device.map_sg([(ram, PAGE), (bar + PAGE, 2 * PAGE), (ram + 2 * PAGE, PAGE)], TO)
    assert [length for _, length in sg.segments] == [PAGE, PAGE if defects else 2 * PAGE, PAGE]
    assert sg.segments[1][0] == bar  # bus address: physical address + offset
    assert device.iova_to_phys(sg.segments[2][0]) == ram + 2 * PAGE
    device.unmap_sg(sg)
    assert machine.live()["iova_ranges"] == 0


def test_a_peer_that_cannot_be_reached() -> None:
    machine, topology, bar, (host_bridge, state) = peers()
    provider, client = host_bridge("pci0").endpoint("a"), host_bridge("pci1").endpoint("b")
    topology.provide(provider, bar, 64 << 10)
    device = another(p2p=state(topology, client, machine.ledger))
    with pytest.raises(UnsupportedError) as caught:
        device.map_sg([(machine.pages.alloc(), PAGE), (bar, PAGE)], TO)
    assert caught.value.errno_name == "EREMOTEIO" and machine.live()["iova_ranges"] == 0


entry = st.tuples(st.integers(0, 4095), st.integers(1, 20_000))


@settings(max_examples=examples(60))
@given(
    sizes=st.lists(entry, min_size=1, max_size=12),
    max_segment=st.sampled_from([0x1000, 0x3000, 0x10000, 0xFFFFFFFF]),
    boundary=st.sampled_from([0xFFFF, 0x1FFFF, 0xFFFFFFFF, U64]),
)
def test_every_byte_is_reached_once_and_in_order(sizes: list[tuple[int, int]], max_segment: int, boundary: int) -> None:
    machine, device = world(None, max_segment=max_segment, boundary=boundary)
    entries = [(offset, min(length, max_segment)) for offset, length in sizes]
    placed = segments(machine, entries)
    sg = device.map_sg(placed, FROM, Attrs.SKIP_CPU_SYNC)
    wanted = [(phys + at) // PAGE for phys, length in placed for at in range(0, length, 512)]
    flat = [(addr, length) for addr, length in sg.segments]
    assert sum(length for _, length in flat) == sum(length for _, length in placed)
    order = []
    place, used = iter(flat), 0
    addr, left = next(place)
    for _, length in placed:
        for at in range(0, length, 512):
            step = min(512, length - at)
            order.append(device.iova_to_phys(addr + used) // PAGE)
            used += step
            left -= step
        if left == 0:
            addr, left = next(place, (0, 0))
            used = 0
    assert order == wanted
    assert all(length <= max_segment for _, length in flat)
    device.unmap_sg(sg)
    assert machine.live()["iova_ranges"] == 0
