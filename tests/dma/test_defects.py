"""Linux's known defects: absent by default, there when switched on."""

from __future__ import annotations

import pytest

from dmakit.dma.defects import BY_NAME, DEFECTS, defect_bits, defects_of
from dmakit.dma.direction import Direction
from dmakit.errors import InputError, MisuseError
from tests.dma.world import PAGE, pattern, world

TO, FROM, BOTH = Direction.TO_DEVICE, Direction.FROM_DEVICE, Direction.BIDIRECTIONAL
UNTRUSTED = {"trusted": False, "min_align_mask": PAGE - 1}


def test_names_and_versions() -> None:
    assert {defect.number for defect in defects_of("7.2")} == {"1", "6", "7", "8", "9"}
    assert [defect.name for defect in defects_of(["partial-destroy-frees-wrong-size"])] == [DEFECTS[0].name]
    assert defect_bits(()) == 0 and len(BY_NAME) == len(DEFECTS) == len({d.bit for d in DEFECTS})
    with pytest.raises(
        InputError, match="defect 'no-such' is not known; a name or a kernel version of: partial-destroy"
    ):
        defects_of("no-such")


@pytest.mark.parametrize("defects", [(), "7.2"])
def test_1_a_partial_destroy(defects: tuple[str, ...] | str) -> None:
    machine, device = world(None, defects=defects)
    memory = machine.buffer(8 * PAGE)
    state = device.try_alloc(0, 8 * PAGE)
    addr = state.addr
    state.link(memory.ranges[0][0], 0, 4 * PAGE, TO)
    state.destroy(4 * PAGE, TO)
    eight, four = device.try_alloc(0, 8 * PAGE), device.try_alloc(0, 4 * PAGE)
    if defects:
        assert four.addr == addr and eight.addr != addr
    else:
        assert eight.addr == addr and four.addr != addr


@pytest.mark.parametrize("on", [False, True])
def test_2_an_empty_middle(on: bool) -> None:
    machine, device = world(None, defects=("bounce-links-empty-middle",) if on else (), **UNTRUSTED)
    phys = machine.buffer(2 * PAGE).ranges[0][0] + 0xF00
    with device.try_alloc(phys, 0x200) as state:
        if on:
            with pytest.raises(MisuseError):
                state.link(phys, 0, 0x200, TO)
        else:
            state.link(phys, 0, 0x200, TO)
    assert machine.live()["bounce_slots"] == 0


@pytest.mark.parametrize("on", [False, True])
def test_3_the_unwind_of_a_failed_tail(on: bool) -> None:
    machine, device = world(None, defects=("bounce-unwind-from-zero",) if on else (), **UNTRUSTED)
    memory = machine.buffer(8 * PAGE)
    phys = memory.ranges[0][0]
    state = device.try_alloc(0, 8 * PAGE)
    state.link(phys, 0, 2 * PAGE, TO)
    state.link(phys + 5 * PAGE, 5 * PAGE, PAGE, TO)
    with pytest.raises(MisuseError):
        state.link(phys + 2 * PAGE, 2 * PAGE, 3 * PAGE + 0x100, TO)  # its tail collides
    mapped = [device.iova_to_phys(state.addr + i * PAGE) != 0 for i in range(6)]
    assert mapped == ([False, False, False, True, True, True] if on else [True, True, False, False, False, True])


@pytest.mark.parametrize("on", [False, True])
def test_4_a_failed_map_reported_as_success(on: bool) -> None:
    machine, device = world(None, defects=("failed-map-reported-as-success",) if on else ())
    phys = machine.buffer(PAGE).ranges[0][0]
    state = device.try_alloc(0, PAGE)
    if on:
        state.link(phys, 0, PAGE, Direction.NONE)
        assert device.iova_to_phys(state.addr) == 0
    else:
        with pytest.raises(MisuseError):
            state.link(phys, 0, PAGE, Direction.NONE)
    state.free()


@pytest.mark.parametrize("on", [False, True])
def test_6_dma_buf_ranges(on: bool) -> None:
    machine, device = world({"fragmentation": 1.0}, defects=("dmabuf-links-at-zero",) if on else ())
    memory = machine.buffer(4 * PAGE)
    memory.write(0, pattern(4 * PAGE))
    if on:
        with pytest.raises(MisuseError) as caught:
            device.map_ranges(memory.ranges, TO)
        assert caught.value.errno_name == "EADDRINUSE"
    else:
        with device.map_ranges(memory.ranges, TO) as mapping:
            assert len(memory.ranges) == 4 and [length for _, length in mapping.segments] == [4 * PAGE]
            assert device.dma_read(mapping.segments[0][0], 4 * PAGE) == pattern(4 * PAGE)
    assert machine.live()["iova_ranges"] == 0


@pytest.mark.parametrize("on", [False, True])
def test_7_pieces_that_do_not_meet_on_granules(on: bool) -> None:
    machine, device = world({"fragmentation": 1.0}, defects=("tso-links-unaligned-pieces",) if on else ())
    pages = [machine.pages.alloc() for _ in range(3)]
    ranges = [(pages[0] + 0x80, 0x40), (pages[1] + 0x200, 0x5A8), (pages[2], 0x600)]
    for i, (phys, size) in enumerate(ranges):
        machine.memory.write(phys, pattern(size, i))
    events: list[tuple[object, ...]] = []
    machine.record_events(events)
    with device.map_ranges(ranges, TO) as mapping:
        assert [device.dma_read(a, n) for a, n in mapping.segments] == [
            pattern(n, i) for i, (_, n) in enumerate(ranges)
        ]
    warnings = [event for event in events if event[0] == "warn"]
    assert warnings == ([("warn", "dma_iova_link: unaligned start at offset > 0")] if on else [])
    assert machine.live()["iova_ranges"] == 0


def test_map_ranges_without_a_window_maps_each_range() -> None:
    machine, device = world({"iommu": "none", "fragmentation": 1.0})
    ranges = [(machine.pages.alloc(), PAGE) for _ in range(3)]
    mapping = device.map_ranges(ranges, TO)
    assert mapping.segments == ranges
    mapping.unmap()
    with pytest.raises(MisuseError, match="these ranges are not mapped"):
        mapping.unmap()
    with pytest.raises(MisuseError, match="at least one range"):
        device.map_ranges([], TO)


@pytest.mark.parametrize("on", [False, True])
def test_8_when_bounce_slots_are_released(on: bool) -> None:
    machine, device = world(None, defects=("unlink-frees-slots-before-unmap",) if on else (), **UNTRUSTED)
    memory = machine.buffer(PAGE)
    phys = memory.ranges[0][0] + 0x100
    state = device.try_alloc(phys, 0x200)
    state.link(phys, 0, 0x200, FROM)
    state.sync()
    events: list[tuple[object, ...]] = []
    machine.record_events(events)
    device.dma_write(state.addr, pattern(0x200))
    state.destroy(0x200, FROM)
    assert memory.read(0x100, 0x200) == pattern(0x200)
    order = [event[0] for event in events if event[0] in ("tblunmap", "unmap", "qi")]
    assert order == (["tblunmap", "unmap", "qi"] if on else ["unmap", "qi", "tblunmap"])


@pytest.mark.parametrize("on", [False, True])
def test_9_an_unlink_that_cuts_a_leaf(on: bool) -> None:
    machine, device = world({"ram": "128M"}, defects=("unlink-cuts-large-leaf",) if on else ())
    block = 2 << 20
    memory = machine.buffer(block, order=9)
    state = device.try_alloc(0, block)
    state.link(memory.ranges[0][0], 0, block, TO)
    if not on:
        with pytest.raises(MisuseError):
            state.unlink(0, PAGE, TO)
        state.destroy(block, TO)
        return
    state.unlink(PAGE, PAGE, TO)
    assert device.iova_to_phys(state.addr + PAGE) != 0  # the device keeps access
    state.unlink(0, PAGE, TO)
    assert device.iova_to_phys(state.addr + block - PAGE) == 0  # and loses all of it


def test_5a_a_host_bridge_entry_without_address() -> None:
    from dmakit.p2p.state import P2pState
    from dmakit.p2p.topology import HostBridge, PciTopology, Platform

    for on in (False, True):
        machine, _ = world({"iommu": "none"})
        bar = machine.add_bar("64K", "peer").start
        topology = PciTopology(machine.memory, Platform("amd", 0x17))
        host = HostBridge("pci0")
        provider, client = host.root_port("a").endpoint("x"), host.root_port("b").endpoint("y")
        topology.provide(provider, bar, 64 << 10)
        defects = ("direct-sg-host-bridge-without-address",) if on else ()
        device = machine.device("y", p2p=P2pState(topology, client, machine.ledger), defects=defects)
        sg = device.map_sg([(bar, PAGE)], BOTH)
        assert sg.segments == [((1 << 64) - 1 if on else bar, PAGE)]
        device.unmap_sg(sg)
