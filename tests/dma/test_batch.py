"""The batch forms do what loops of the scalar calls do, at the same cost, and undo what they did when they fail."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from dmakit.dma.batch import (
    link_many,
    map_many,
    sync_many,
    sync_many_for_cpu,
    sync_many_for_device,
    unlink_many,
    unmap_many,
)
from dmakit.dma.direction import Direction
from dmakit.dma.iova_state import IovaState
from dmakit.errors import ExhaustedError, MisuseError
from tests.dma.world import PAGE, Counted, leaves, needs_unmap_by_the_page, world

pytestmark = pytest.mark.portable

TO, BOTH = Direction.TO_DEVICE, Direction.BIDIRECTIONAL
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


@pytest.mark.parametrize("bad", [(0, 0), (PAGE, 0), (1 << 63, 1 << 63 | PAGE), (PAGE, (1 << 64) - 1)])
def test_what_is_no_range_is_refused_before_anything_is_done(bad: tuple[int, int]) -> None:
    """An empty range given to unmap went to the allocator as a mapping of no pages."""
    machine, device = world()
    page = machine.pages.alloc()
    addr = device.map_phys(page, PAGE, TO)
    addresses, sizes = array("Q", [addr, bad[0]]), array("Q", [PAGE, bad[1]])
    text = f"item 1: [{bad[0]}, +{bad[1]}): must be a non-empty range of 64-bit addresses"
    with Counted(machine) as spent:
        for name, call in {
            "unmap_many": lambda: unmap_many(device, addresses, sizes, TO),
            "sync_many_for_cpu": lambda: sync_many_for_cpu(device, addresses, sizes, TO),
            "sync_many_for_device": lambda: sync_many_for_device(device, addresses, sizes, TO),
            "map_many": lambda: map_many(device, addresses, sizes, array("Q", [0, 0]), TO),
        }.items():
            with pytest.raises(MisuseError) as caught:
                call()
            assert str(caught.value) == f"{name}: {text}"
    assert spent == dict.fromkeys(spent, 0)
    assert device.iova_to_phys(addr) == page
    device.unmap_phys(addr, PAGE, TO)


@pytest.mark.parametrize("bad", [(0, 0), ((1 << 64) - PAGE, 2 * PAGE)])
def test_no_piece_is_linked_when_one_is_no_range(bad: tuple[int, int]) -> None:
    """The pieces before it were linked, counted and unlinked again."""
    machine, device = world()
    page = machine.pages.alloc()
    with device.try_alloc(0, 8 * PAGE) as state:
        with Counted(machine) as spent, pytest.raises(MisuseError) as caught:
            link_many(state, array("Q", [page, bad[0], page]), array("Q", [PAGE, bad[1], PAGE]), TO)
        text = f"[{bad[0]}, +{bad[1]}): must be a non-empty range of 64-bit addresses"
        assert str(caught.value) == f"link_many: item 1: {text}"
        assert spent == dict.fromkeys(spent, 0)


@pytest.mark.parametrize("call", [link_many, sync_many, unlink_many])
def test_a_state_that_no_device_gave_out_is_refused(call: Any) -> None:
    with pytest.raises(MisuseError) as caught:
        call(IovaState(), array("Q"), array("Q"), *(() if call is sync_many else (TO,)), cpu=0)
    assert str(caught.value) == f"{call.__name__}: this state has no live window (never allocated, freed or destroyed)"


def test_a_batch_without_a_direction_is_refused_as_the_scalar_call_is() -> None:
    machine, device = world()
    out = array("Q", [0])
    with pytest.raises(MisuseError, match="^map_many: Direction.NONE cannot be mapped$"):
        map_many(device, array("Q", [machine.pages.alloc()]), array("Q", [PAGE]), out, Direction.NONE)


def test_what_bounces_is_synced_by_the_batch() -> None:
    machine, device = world({"swiotlb": "2M"}, trusted=False)
    pages = [machine.pages.alloc() for _ in range(4)]
    for page in pages:
        machine.memory.write(page, b"before" * 4)
    out, sizes = array("Q", bytes(32)), array("Q", [24] * 4)
    map_many(device, array("Q", pages), sizes, out, BOTH)
    for addr in out:
        device.dma_write(addr, b"device" * 4)
    sync_many_for_cpu(device, out, sizes, BOTH)
    assert [machine.memory.read(page, 24) for page in pages] == [b"device" * 4] * 4
    for page in pages:
        machine.memory.write(page, b"driver" * 4)
    sync_many_for_device(device, out, sizes, BOTH)
    assert [device.dma_read(addr, 24) for addr in out] == [b"driver" * 4] * 4
    unmap_many(device, out, sizes, BOTH)


def test_syncing_what_is_not_mapped_names_the_first_and_syncs_the_others() -> None:
    machine, device = world({"swiotlb": "2M"}, trusted=False)
    page = machine.pages.alloc()
    addr = device.map_phys(page, 24, BOTH)
    device.dma_write(addr, b"device" * 4)
    addresses = array("Q", [1 << 30, addr, 2 << 30])
    for call in (sync_many_for_cpu, sync_many_for_device):
        with pytest.raises(MisuseError) as caught:
            call(device, addresses, array("Q", [24] * 3), BOTH)
        assert str(caught.value) == f"{call.__name__}: item 0: nothing is mapped at {1 << 30:#x}"
        assert caught.value.rule == "not-mapped"
        assert machine.memory.read(page, 24) == b"device" * 4
    device.unmap_phys(addr, 24, BOTH)


def test_unlink_many_leaves_the_window_and_what_was_not_named() -> None:
    machine, device = world({"fragmentation": 1.0})
    pages = array("Q", [machine.pages.alloc() for _ in range(COUNT)])
    with device.try_alloc(0, COUNT * PAGE) as state:
        for i, page in enumerate(pages):
            state.link(page, i * PAGE, PAGE, TO)
        sync_many(state, array("Q", [0, 8 * PAGE]), array("Q", [8 * PAGE] * 2))
        odd = array("Q", range(PAGE, COUNT * PAGE, 2 * PAGE))
        unlink_many(state, odd, array("Q", [PAGE] * len(odd)), TO)
        at = [device.iova_to_phys(state.addr + i * PAGE) for i in range(COUNT)]
        assert at == [0 if i % 2 else page for i, page in enumerate(pages)]
        assert state.pieces == [(i * PAGE, PAGE, TO, 0) for i in range(0, COUNT, 2)]
        left = array("Q", range(0, COUNT * PAGE, 2 * PAGE))
        unlink_many(state, left[::-1], array("Q", [PAGE] * len(left)), TO)
        assert state.pieces == []
        assert leaves(device, state.addr, COUNT * PAGE) == []
        assert state
    assert machine.live()["iova_ranges"] == 0


def test_a_range_that_cuts_a_large_leaf_is_named_and_the_others_are_gone() -> None:
    machine, device = world()
    needs_unmap_by_the_page(device)
    page, huge = machine.pages.alloc(), 2 << 20
    block = machine.pages.alloc(9)
    with device.try_alloc(0, 3 * huge) as state:
        at = -state.addr % huge
        state.link(block, at, huge, TO)
        state.link(page, at + huge, PAGE, TO)
        state.link(page, at + huge + PAGE, PAGE, TO)
        offsets = array("Q", [at + huge, at + PAGE, at + huge + PAGE])
        with pytest.raises(MisuseError) as caught:
            unlink_many(state, offsets, array("Q", [PAGE] * 3), TO)
        cut = f"[{at + PAGE:#x}, {at + 2 * PAGE:#x})"
        assert str(caught.value) == (
            f"unlink_many: item 1: {cut} cuts a large leaf: unlink what was linked as one piece"
        )
        assert state.pieces == [(at, huge, TO, 0)]
        unlink_many(state, array("Q", [at]), array("Q", [huge]), TO)
    assert machine.live()["iova_ranges"] == 0


@pytest.mark.parametrize("call", [unlink_many, sync_many])
def test_ranges_outside_the_window_are_refused_before_anything_is_done(call: Any) -> None:
    machine, device = world()
    page, rest = machine.pages.alloc(), (TO,) if call is unlink_many else ()
    with device.try_alloc(0, 4 * PAGE) as state:
        state.link(page, 0, PAGE, TO)
        name = call.__name__
        for offset, size, text in (
            (3 * PAGE, 2 * PAGE, f"[{3 * PAGE:#x}, {5 * PAGE:#x}) is outside the window of {4 * PAGE:#x} bytes"),
            (PAGE, 0, f"offset={PAGE}, size=0: must be integers, offset >= 0 and size > 0"),
        ):
            with pytest.raises(MisuseError) as caught:
                call(state, array("Q", [0, offset]), array("Q", [PAGE, size]), *rest)
            assert str(caught.value) == f"{name}: item 1: {text}"
        assert device.iova_to_phys(state.addr) == page
    with pytest.raises(MisuseError) as caught:
        call(state, array("Q", [0]), array("Q", [PAGE]), *rest)
    assert str(caught.value) == f"{name}: this state has no live window (never allocated, freed or destroyed)"


def test_a_windows_batches_run_on_its_own_cpu_unless_told() -> None:
    """As the scalar calls do; they counted on CPU 0 before."""
    locks = []
    for batch in (True, False):
        machine, device = world({"cpus": 3, "caching_mode": True})
        page = machine.pages.alloc()
        state = device.try_alloc(0, PAGE, 2)
        if batch:
            link_many(state, array("Q", [page]), array("Q", [PAGE]), TO)
            sync_many(state, array("Q", [0]), array("Q", [PAGE]))
            unlink_many(state, array("Q", [0]), array("Q", [PAGE]), TO)
        else:
            state.link(page, 0, PAGE, TO)
            state.sync()
            state.unlink(0, PAGE, TO)
        state.free()
        locks.append([cpu["qi"] for cpu in machine.ledger.lock_counts()])
    assert locks[0] == locks[1] == [0, 0, locks[1][2]]
    assert locks[1][2] > 0
