"""The batch forms do what loops of the scalar calls do, at the same cost, and undo what they did when they fail."""

from __future__ import annotations

from array import array

import pytest

from dmakit.dma.batch import link_many, map_many, unmap_many
from dmakit.dma.direction import Direction
from dmakit.errors import ExhaustedError, MisuseError
from tests.dma.world import PAGE, Counted, world

pytestmark = pytest.mark.portable

TO = Direction.TO_DEVICE
COUNT = 16


def test_map_many_is_a_loop_of_map_phys() -> None:
    results = []
    for batch in (True, False):
        machine, device = world({"fragmentation": 1.0})
        pages = array("Q", [machine.pages.alloc() for _ in range(COUNT)])
        sizes, out = array("Q", [PAGE] * COUNT), array("Q", bytes(8 * COUNT))
        with Counted(machine) as spent:
            if batch:
                map_many(device, pages, sizes, out, TO)
                unmap_many(device, out, sizes, TO)
            else:
                for i in range(COUNT):
                    out[i] = device.map_phys(pages[i], PAGE, TO)
                for addr in out:
                    device.unmap_phys(addr, PAGE, TO)
        results.append((list(out), spent))
    assert results[0] == results[1]


def test_link_many_links_one_behind_the_other() -> None:
    machine, device = world({"fragmentation": 1.0})
    pages = array("Q", [machine.pages.alloc() for _ in range(COUNT)])
    with device.try_alloc(0, COUNT * PAGE) as state:
        assert link_many(state, pages, array("Q", [PAGE] * COUNT), TO) == COUNT * PAGE
        state.sync()
        assert [device.iova_to_phys(state.addr + i * PAGE) for i in range(COUNT)] == list(pages)
    assert machine.live()["iova_ranges"] == 0


def test_a_batch_that_fails_leaves_nothing() -> None:
    machine, device = world({"fragmentation": 1.0})
    pages = array("Q", [machine.pages.alloc() for _ in range(4)])
    sizes, out = array("Q", [PAGE] * 4), array("Q", bytes(32))
    with device.try_alloc(0, 8 * PAGE) as state:
        state.link(pages[3], 3 * PAGE, PAGE, TO)
        with pytest.raises(MisuseError) as caught:
            link_many(state, pages, sizes, TO)
        assert caught.value.errno_name == "EADDRINUSE"
        assert [device.iova_to_phys(state.addr + i * PAGE) for i in range(4)] == [0, 0, 0, pages[3]]
    device.set_mask((1 << 24) - 1)
    sizes[2] = 32 << 20
    with pytest.raises(ExhaustedError):
        map_many(device, pages, sizes, out, TO)
    assert machine.live()["iova_ranges"] == 0
    with pytest.raises(MisuseError, match="phys, sizes have 4, 1 items"):
        map_many(device, pages, array("Q", [1]), out, TO)
    with pytest.raises(MisuseError, match="out has 0 items: needs 4"):
        map_many(device, pages, sizes, array("Q"), TO)


@pytest.mark.parametrize("absent", [[0], [2], [1, 3], [0, 1, 2, 3]])
def test_unmapping_what_is_not_mapped_is_the_error_of_the_scalar_call(absent: list[int]) -> None:
    """The batch goes on: what is mapped is unmapped, and the first item that was not is named."""
    results = []
    for batch in (True, False):
        machine, device = world()
        pages = [machine.pages.alloc() for _ in range(4)]
        out, sizes = array("Q", [device.map_phys(page, PAGE, TO) for page in pages]), array("Q", [PAGE] * 4)
        for i in absent:
            device.unmap_phys(out[i], PAGE, TO)
        with Counted(machine) as spent:
            if batch:
                with pytest.raises(MisuseError) as caught:
                    unmap_many(device, out, sizes, TO)
                first = f"unmap_many: item {absent[0]}: nothing is mapped at {out[absent[0]]:#x}"
                assert (str(caught.value), caught.value.rule) == (first, "not-mapped")
            else:
                for i, addr in enumerate(out):
                    if i not in absent:
                        device.unmap_phys(addr, PAGE, TO)
                        continue
                    with pytest.raises(MisuseError) as caught:
                        device.unmap_phys(addr, PAGE, TO)
                    assert (str(caught.value), caught.value.rule) == (
                        f"unmap_phys: nothing is mapped at {addr:#x}",
                        "not-mapped",
                    )
        assert machine.live()["iova_ranges"] == 0
        results.append(spent)
    assert results[0] == results[1]


@pytest.mark.parametrize("sizes", [[1 << 63, 1 << 63], [(1 << 64) - 1, 1], [(1 << 64) - 1] * 3, [(1 << 64) - 1]])
def test_a_total_beyond_the_window_or_64_bits_is_refused_with_its_value(sizes: list[int]) -> None:
    machine, device = world()
    page, total = machine.pages.alloc(), sum(sizes)
    with device.try_alloc(0, 4 * PAGE) as state:
        text = f"link_many: [0x0, {total:#x}) is outside the window of {4 * PAGE:#x} bytes"
        if total >> 64:
            text = f"link_many: offset=0, size={total}: must be integers, offset >= 0 and size > 0"
        with pytest.raises(MisuseError) as caught:
            link_many(state, array("Q", [page] * len(sizes)), array("Q", sizes), TO)
        assert str(caught.value) == text
