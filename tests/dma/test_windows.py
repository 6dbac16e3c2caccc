"""Whole windows in one call and by the batch: the same answers, entries, costs and errors as the single calls."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmakit.dma.device import Device
from dmakit.dma.direction import Attrs, Direction
from dmakit.dma.iova_state import IovaState
from dmakit.errors import DmakitError, ExhaustedError, MisuseError, UnsupportedError
from dmakit.platform.soft import Machine
from tests.dma.world import PAGE, Counted, examples, leaves, world

pytestmark = pytest.mark.portable

TO = Direction.TO_DEVICE
MIB = 1 << 20


def one_by_one(device: Device, phys: Any, sizes: Any, direction: int = TO, attrs: int = 0) -> IovaState:
    """What ``map_window`` stands for."""
    state = device.try_alloc(phys[0], sum(sizes))
    if not state:
        return state
    linked = 0
    try:
        for place, size in zip(phys, sizes, strict=True):
            state.link(place, linked, size, direction, attrs)
            linked += size
        state.sync(0, linked)
    except DmakitError:
        state.destroy(linked, direction, attrs)
        raise
    return state


def outcome(machine: Machine, device: Device, phys: Any, sizes: Any, way: str, **call: Any) -> Any:
    """Everything that can be seen of mapping once and unmapping: addresses, entries, counts, or the error."""
    direction, attrs = call.get("direction", TO), call.get("attrs", 0)
    with Counted(machine) as spent:
        try:
            if way == "batch":
                states = array("Q", [0, 0])
                device.map_windows(phys, sizes, array("Q", [0, len(phys)]), states, direction, attrs)
                addr, word = states
            else:
                mapper = device.map_window if way == "call" else lambda *given: one_by_one(device, *given)
                state = mapper(phys, sizes, direction, attrs)
                addr, word = state.addr, state.size_word
        except DmakitError as error:
            return type(error), str(error), error.errno, machine.live(), spent
        held = leaves(device, addr & ~(PAGE - 1), sum(sizes) + PAGE)
        if way == "batch":
            device.unmap_windows(states, direction, attrs)
            assert list(states) == [0, 0]
        else:
            state.destroy(sum(sizes), direction, attrs)
    return addr, word, held, machine.live(), spent


@pytest.mark.parametrize("iommu", ["vtd", "x86"])
@pytest.mark.parametrize("mode", ["strict", "lazy"])
def test_scattered_pages_cost_what_the_single_calls_cost(iommu: str, mode: str) -> None:
    results = []
    for way in ("single", "call", "batch"):
        machine, device = world({"fragmentation": 1.0, "iommu": iommu, "mode": mode})
        phys = array("Q", [machine.pages.alloc() for _ in range(32)])
        results.append([outcome(machine, device, phys, array("Q", [PAGE] * 32), way) for _ in range(3)])
    assert results[0] == results[1] == results[2]
    assert results[0][0][4]["link_calls"] == 32
    assert results[0][0][4]["pte_set_1"] >= 32


@settings(
    max_examples=examples(60),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(
    pieces=st.lists(
        st.tuples(
            st.integers(0, 4000).map(lambda page: page * PAGE),
            st.sampled_from([PAGE, PAGE, PAGE, 2 * PAGE, 5 * PAGE, MIB, 2 * MIB, 3 * MIB, 100, 0, PAGE + 8]),
            st.sampled_from([0, 0, 0, 0, 0, 8]),
        ),
        min_size=1,
        max_size=24,
    ),
    direction=st.sampled_from([TO, Direction.FROM_DEVICE, Direction.BIDIRECTIONAL, Direction.NONE]),
    attrs=st.sampled_from([0, 0, Attrs.SKIP_CPU_SYNC, Attrs.MMIO, Attrs.REQUIRE_COHERENT]),
    kind=st.sampled_from([{}, {}, {"trusted": False}, {"coherent": False}, {"mask": (1 << 30) - 1}]),
    unit=st.sampled_from([{}, {"caching_mode": True}, {"coherent_walker": False}, {"iommu": "x86", "levels": 5}]),
    nth=st.integers(-1, 12),
)
def test_any_pieces_end_as_with_the_single_calls(
    pieces: list[tuple[int, int, int]], direction: int, attrs: int, kind: Any, unit: Any, nth: int
) -> None:
    phys = array("Q", [place + skew for place, _, skew in pieces])
    sizes = array("Q", [size for _, size, _ in pieces])
    results = []
    for way in ("single", "call"):
        machine, device = world(unit, **kind)
        if nth >= 0:
            machine.fail.arm(nth)
        results.append(outcome(machine, device, phys, sizes, way, direction=direction, attrs=attrs))
        machine.fail.disarm()
        results[-1] += (device.why,)
    assert results[0] == results[1]


def test_events_are_those_of_the_single_calls() -> None:
    seen = []
    for way in ("single", "call", "batch"):
        machine, device = world({"mode": "lazy"})
        events: list[Any] = []
        machine.record_events(events)
        outcome(machine, device, array("Q", [1 << 20, 3 << 20, 5 << 20]), array("Q", [PAGE, 2 * PAGE, PAGE]), way)
        seen.append(events)
    assert seen[0] == seen[1] == seen[2]


def test_a_batch_is_all_or_nothing() -> None:
    machine, device = world()
    first = machine.buffer(8 * PAGE, order=3).ranges[0][0]
    phys, sizes = array("Q", [first + i * PAGE for i in range(8)]), array("Q", [PAGE] * 8)
    states = array("Q", bytes(8 * 8))
    sizes[5] = 100
    with pytest.raises(MisuseError):
        device.map_windows(phys, sizes, array("Q", [0, 2, 4, 7, 8]), states, TO)
    assert machine.live()["iova_ranges"] == 0
    sizes[5] = 0
    with pytest.raises(MisuseError, match="pieces 4 to 6"):
        device.map_windows(phys, sizes, array("Q", [0, 2, 4, 7, 8]), states, TO)
    assert machine.live()["iova_ranges"] == 0
    device.set_mask((1 << 24) - 1)
    with pytest.raises(ExhaustedError, match="no free IOVA"):
        device.map_windows(phys, array("Q", [PAGE, 32 * MIB] * 4), array("Q", [0, 1, 2]), states, TO)
    assert machine.live()["iova_ranges"] == 0


def test_arguments_are_looked_at() -> None:
    _, device = world()
    one, two = array("Q", [PAGE]), array("Q", [PAGE, PAGE])
    for call, text in (
        (lambda: device.map_window(one, two, TO), "phys, sizes have 1, 2 items"),
        (lambda: device.map_window(array("Q"), array("Q"), TO), "at least 1"),
        (lambda: device.map_window([1], one, TO), "phys: must be a contiguous buffer"),
        (lambda: device.map_window(one, array("I", [1]), TO), "sizes: must be a contiguous buffer"),
        (lambda: device.map_window(one, one, 7), "direction=7"),
        (lambda: device.map_window(one, one, TO, 1 << 40), "attrs="),
        (lambda: device.map_window(one, one, TO, 0, 99), "cpu=99"),
        (lambda: device.map_windows(two, two, array("Q", [0, 1, 1]), array("Q", [0] * 4), TO), "bounds: must ascend"),
        (lambda: device.map_windows(two, two, array("Q", [0, 3]), array("Q", [0] * 4), TO), "bounds: must ascend"),
        (lambda: device.map_windows(two, two, array("Q", [0, 1, 2]), one, TO), "states has 1 items: needs 4"),
        (lambda: device.map_windows(two, one, array("Q", [0, 1]), two, TO), "phys, sizes have 2, 1 items"),
        (lambda: device.unmap_windows(bytes(16), TO), "states: must be"),
    ):
        with pytest.raises(MisuseError, match=text):
            call()


def test_a_device_without_an_iommu_has_no_windows() -> None:
    _, device = world({"iommu": "none", "mode": "passthrough"})
    assert not device.map_window(array("Q", [PAGE]), array("Q", [PAGE]), TO)
    with pytest.raises(UnsupportedError, match="no IOMMU that translates"):
        device.map_windows(array("Q", [PAGE]), array("Q", [PAGE]), array("Q", [0, 1]), array("Q", [0, 0]), TO)


def test_a_window_of_one_call_undoes_itself() -> None:
    machine, device = world()
    pages = [machine.pages.alloc(), machine.pages.alloc()]
    with device.map_window(array("Q", pages), array("Q", [PAGE, PAGE]), TO) as state:
        assert state.pieces == [(0, 2 * PAGE, TO, 0)]
        assert [device.iova_to_phys(state.addr + at) for at in (0, PAGE)] == pages
        with pytest.raises(MisuseError, match="live mappings"):
            device.release()
    assert machine.live()["iova_ranges"] == 0
