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
