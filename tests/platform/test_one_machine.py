"""Threads that share one machine: calls wait for its turn, and what they do together adds up."""

from __future__ import annotations

import random
import threading
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest

from dmakit import _core
from dmakit.dma.batch import (
    link_many,
    map_many,
    sync_many,
    sync_many_for_cpu,
    sync_many_for_device,
    unlink_many,
    unmap_many,
)
from dmakit.dma.checker import ContractChecker
from dmakit.dma.direction import Direction
from dmakit.errors import DmakitError, MisuseError
from dmakit.iommu.bitmap import Bitmap
from dmakit.iommu.dirty import LeafBitScan
from dmakit.iommu.domain import PageTableDomain
from dmakit.iommu.gather import Gather
from dmakit.iommu.pagetable import PageTable
from dmakit.platform.soft import Machine

PAGE, MIB = 4096, 1 << 20
BOTH = Direction.BIDIRECTIONAL
THREADS = 4
RW = 3
COUNTED = (  # what a call costs whatever the order of the calls; IOVAs and tables depend on it
    *("map_calls", "unmap_calls", "try_alloc_calls", "link_calls", "sync_calls", "unlink_calls", "destroy_calls"),
    *("domain_maps", "domain_unmaps", "sync_map", "pte_set_1", "pte_clear_1", "fq_entries"),
)
SOON = 30.0  # seconds


def words(*values: int) -> array[int]:
    return array("Q", values)


def calls(machine: Machine) -> dict[str, Callable[[], object]]:
    """One call of each public way into a machine, by name."""
    device, checked = machine.device("nvme0"), machine.device("nvme1", checker=ContractChecker("raise"))
    domain, unit, iovad, bounce = device.domain, machine.unit, device.iovad, machine.swiotlb
    page = machine.pages.alloc()
    spot, one = words(page), words(PAGE)
    addr = [device.map_phys(page, PAGE, BOTH) for _ in range(8)]
    sg = [device.map_sg([(page, PAGE)], BOTH) for _ in range(2)]
    far = [device.try_alloc(0, 4 * PAGE) for _ in range(12)]
    for state in far:
        state.link(page, 0, PAGE, BOTH)
    states, scan = words(0, 0), LeafBitScan(domain.table, 0, MIB, None, Gather())
    device.map_windows(spot, one, words(0, 1), states, BOTH)
    tlb, base = bounce.map(page, 100), 1 << 40
    memory = [device.alloc_coherent(PAGE) for _ in range(2)]
    return {
        "map_phys": lambda: device.map_phys(page, PAGE, BOTH),
        "map_phys, checked": lambda: checked.map_phys(page, PAGE, BOTH),
        "unmap_phys": lambda: device.unmap_phys(addr[0], PAGE, BOTH),
        "sync_single_for_cpu": lambda: device.sync_single_for_cpu(addr[1], PAGE, BOTH),
        "sync_single_for_device": lambda: device.sync_single_for_device(addr[1], PAGE, BOTH),
        "map_sg": lambda: device.map_sg([(page, PAGE)], BOTH),
        "unmap_sg": lambda: device.unmap_sg(sg[0]),
        "sync_sg_for_cpu": lambda: device.sync_sg_for_cpu(sg[1]),
        "map_ranges": lambda: device.map_ranges([(page, PAGE)], BOTH),
        "alloc_coherent": lambda: device.alloc_coherent(PAGE),
        "coherent.free": lambda: memory[0].free(),
        "iova_to_phys": lambda: device.iova_to_phys(addr[1]),
        "leaf_across": lambda: device.leaf_across(addr[1]),
        "dma_read": lambda: device.dma_read(addr[1], 8),
        "dma_write": lambda: device.dma_write(addr[1], b"12345678"),
        "try_alloc": lambda: device.try_alloc(0, PAGE),
        "map_window": lambda: device.map_window(spot, one, BOTH),
        "map_windows": lambda: device.map_windows(spot, one, words(0, 1), words(0, 0), BOTH),
        "unmap_windows": lambda: device.unmap_windows(states, BOTH),
        "link": lambda: far[0].link(page, PAGE, PAGE, BOTH),
        "sync": lambda: far[1].sync(0, PAGE),
        "unlink": lambda: far[2].unlink(0, PAGE, BOTH),
        "destroy": lambda: far[3].destroy(PAGE, BOTH),
        "undo": lambda: far[4].undo(),
        "map_many": lambda: map_many(device, spot, one, words(0), BOTH),
        "unmap_many": lambda: unmap_many(device, words(addr[2]), one, BOTH),
        "sync_many_for_cpu": lambda: sync_many_for_cpu(device, words(addr[3]), one, BOTH),
        "sync_many_for_device": lambda: sync_many_for_device(device, words(addr[3]), one, BOTH),
        "link_many": lambda: link_many(far[5], spot, one, BOTH, offset=PAGE),
        "sync_many": lambda: sync_many(far[6], words(0), one),
        "unlink_many": lambda: unlink_many(far[7], words(0), one, BOTH),
        "domain.map": lambda: domain.map(base, page, PAGE, RW),
        "domain.map, large": lambda: domain.map(base + (1 << 30), 0, 32 * MIB, RW),
        "domain.unmap": lambda: domain.unmap(base, PAGE),
        "domain.unmap, large": lambda: domain.unmap(base + (1 << 30), 32 * MIB),
        "domain.unmap_gather": lambda: domain.unmap_gather(base, PAGE, Gather()),
        "domain.sync_map": lambda: domain.sync_map(base, PAGE),
        "domain.flush": lambda: domain.flush(Gather()),
        "domain.flush_all": lambda: domain.flush_all(),
        "domain.iova_to_phys": lambda: domain.iova_to_phys(base),
        "domain.map_many": lambda: domain.map_many(words(base + MIB), spot, one, RW),
        "domain.unmap_many": lambda: domain.unmap_many(words(base + MIB), one),
        "domain.iova_to_phys_many": lambda: domain.iova_to_phys_many(words(base), words(0)),
        "set_dirty_tracking": lambda: domain.set_dirty_tracking(True),
        "read_and_clear_dirty": lambda: domain.read_and_clear_dirty(0, MIB, None),
        "LeafBitScan": lambda: scan.run(),
        "leaves": lambda: domain.table.leaves(),
        "translate": lambda: unit.translate(domain.did, addr[1]),
        "translate_many": lambda: unit.translate_many(domain.did, words(addr[1]), words(0)),
        "flush_range": lambda: unit.flush_range(domain.did, 0, MIB),
        "inv_global": lambda: unit.inv_global(),
        "faults": lambda: unit.faults,
        "clear_faults": lambda: unit.clear_faults(),
        "alloc_fast": lambda: iovad.alloc_fast(1, 1 << 20),
        "alloc": lambda: iovad.alloc(1, 1 << 20),
        "free_fast": lambda: iovad.free_fast(addr[4] // PAGE, 1),
        "alloc_batch": lambda: iovad.alloc_batch(words(1), 1 << 20, words(0)),
        "free_batch": lambda: iovad.free_batch(words(addr[5] // PAGE), words(1)),
        "reserve": lambda: iovad.reserve(1, 2),
        "flush_rcaches": lambda: iovad.flush_rcaches(),
        "iovad.copy": lambda: iovad.copy(),
        "fingerprint": lambda: iovad.fingerprint(),
        "nodes": lambda: iovad.nodes(),
        "magazines": lambda: iovad.magazines(0, 0),
        "cached_pfns": lambda: iovad.cached_pfns(),
        "queue": lambda: device.flush_queue.queue(addr[6] // PAGE, 1),
        "waiting": lambda: device.flush_queue.waiting(),
        "timeout": lambda: device.flush_queue.timeout(),
        "fq.flush": lambda: device.flush_queue.flush(),
        "bounce.map": lambda: bounce.map(page, 100),
        "bounce.unmap": lambda: bounce.unmap(tlb, 100, BOTH),
    }


def test_every_call_waits_for_whoever_has_the_turn() -> None:
    machine = Machine(ram="64M", swiotlb="2M", mode="lazy")
    ways = calls(machine)
    gate, ended, wrong = threading.Barrier(len(ways) + 1), [], []

    def run(name: str, call: Callable[[], object]) -> None:
        gate.wait()
        try:
            call()
        except DmakitError:
            pass  # another call was there before: this test is about when, not about what
        except BaseException as error:
            wrong.append((name, error))
        ended.append(name)

    threads = [threading.Thread(target=run, args=way, daemon=True) for way in ways.items()]
    for thread in threads:
        thread.start()
    before = machine.ledger.snapshot()
    with machine.ledger.turn:
        gate.wait()
        threads[0].join(0.2)
        assert ended == []
        assert machine.ledger.snapshot() == before
    for thread in threads:
        thread.join(SOON)
    assert sorted(ended) == sorted(ways)
    assert not wrong


def test_what_a_call_saw_before_it_waited_is_looked_at_again() -> None:
    """Two threads end the same thing while a third has the turn: the one that comes second finds it ended."""
    machine = Machine(ram="64M", swiotlb=0, cpus=3)
    device, unit = machine.device("nvme0"), machine.unit
    domain, iovad = device.domain, device.iovad
    lone = PageTable(domain.table.fmt, domain.tables, levels=4)
    lone.map(0, 0, PAGE, RW, Gather())
    ended = unit.attach(lone.fmt, lone.root, 4)
    twice: dict[str, Callable[[], object]] = {
        "set_online": lambda: iovad.set_online(1, False),
        "destroy": lambda: lone.destroy(),
        "detach": lambda: domain.detach(),
        "unit.detach": lambda: unit.detach(ended),
    }
    refused = []

    def run(name: str) -> None:
        try:
            twice[name]()
        except MisuseError as error:
            refused.append((name, str(error)))

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in [*twice, *twice]]
    with machine.ledger.turn:
        for thread in threads:
            thread.start()
        threads[0].join(0.2)
    for thread in threads:
        thread.join(SOON)
    assert refused == [("unit.detach", f"did={ended}: no domain with this id is attached")]
    assert iovad.online_cpus == 2
    assert machine.live()["table_pages"] == 0
    assert machine.ledger.snapshot()["tables_allocated"] == machine.ledger.snapshot()["tables_freed"]


@pytest.mark.skipif(_core.status()["running"] == "compiled", reason="compiled loops cannot be interrupted")
@pytest.mark.parametrize("call", ["domain.map, large", "domain.unmap, large", "LeafBitScan", "translate_many"])
def test_an_interrupted_call_gives_the_turn_back(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(ram="64M", swiotlb="2M", mode="lazy")
    ways = calls(machine)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for owner, name in ((PageTableDomain, "_map"), (PageTableDomain, "_unmap"), (LeafBitScan, "_run")):
        monkeypatch.setattr(owner, name, interrupted)
    monkeypatch.setattr(type(machine.unit), "_translate_many", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ways[call]()
    assert not machine.ledger.turn.taken


def churn(machine: Machine, me: int, rounds: int) -> int:
    """Random calls of every form on the machine's one device; everything is given back. The pages mapped."""
    device: Any = machine.devices[0]
    rnd, mapped = random.Random(me), 0
    # interpreted, or through a model of CPU caches, a scalar call may be interrupted: there the turn is the caller's
    interpreted = _core.status()["running"] != "compiled"
    with machine.ledger.turn if interpreted else nullcontext():
        pages = words(*(machine.pages.alloc() for _ in range(64)))
    sizes = words(*[PAGE] * 64)
    at = (1 << 41) + me * (1 << 33)
    for _ in range(rounds):
        with machine.ledger.turn if interpreted else nullcontext():
            n, way = rnd.randrange(1, 65), rnd.randrange(6)
            some, lengths, out = pages[:n], sizes[:n], words(*[0] * n)
            mapped += n
            if way == 0:
                map_many(device, some, lengths, out, BOTH)
                unmap_many(device, out, lengths, BOTH)
            elif way == 1:
                addresses = [device.map_phys(page, PAGE, BOTH) for page in some]
                assert len(set(addresses)) == n
                assert [device.iova_to_phys(addr) for addr in addresses] == list(some)
                for addr in addresses:
                    device.unmap_phys(addr, PAGE, BOTH)
            elif way == 2:
                with device.try_alloc(0, n * PAGE) as window:
                    link_many(window, some, lengths, BOTH)
                    window.sync()
                    unlink_many(window, words(*range(0, n * PAGE, PAGE)), lengths, BOTH)
            elif way == 3:
                states = words(0, 0)
                device.map_windows(some, lengths, words(0, n), states, BOTH)
                device.unmap_windows(states, BOTH)
            elif way == 4:
                places = words(*range(at, at + n * PAGE, PAGE))
                device.domain.map_many(places, some, lengths, RW)
                assert device.domain.read_and_clear_dirty(at, 64 * PAGE, None) == 0
                assert device.domain.unmap_many(places, lengths) == n * PAGE
            else:
                device.domain.map(at, 0, 32 * MIB, RW)
                assert device.domain.unmap(at, 32 * MIB) == 32 * MIB
                mapped -= n
    for page in pages:
        with machine.ledger.turn if interpreted else nullcontext():
            machine.pages.free(page)
    return mapped


@pytest.mark.parametrize("mode", ["strict", "lazy"])
def test_threads_on_one_device_answer_right_and_count_exactly(mode: str, rounds: int = 40) -> None:
    def run(workers: int) -> tuple[int, dict[str, int]]:
        machine = Machine(ram="64M", swiotlb=0, mode=mode, cpus=2)
        machine.device("nvme0")
        live = machine.live()
        with ThreadPoolExecutor(workers) as pool:
            total = sum(pool.map(lambda me: churn(machine, me, rounds), range(THREADS)))
        machine.settle()
        counted = machine.ledger.snapshot()
        assert machine.live() | {"table_pages": 0} == live | {"table_pages": 0}
        assert not machine.ledger.turn.taken
        machine.close()
        return total, {row: counted[row] for row in COUNTED}

    total, together = run(THREADS)
    assert together["pte_set_1"] == together["pte_clear_1"] == total
    assert together == run(1)[1]


@pytest.mark.long
@pytest.mark.parametrize("mode", ["strict", "lazy"])
def test_threads_on_one_device_for_long(mode: str) -> None:
    test_threads_on_one_device_answer_right_and_count_exactly(mode, rounds=3000)


def test_threads_that_share_bitmaps_lose_no_page() -> None:
    """Pages wander from a pile to another and back; whatever the order, each is in exactly one of them."""
    piles = [Bitmap(1 << 16) for _ in range(2)]
    piles[0].set(0, 1 << 16)

    def work(me: int) -> None:
        for _ in range(50):
            piles[me & 1].take(piles[1 - (me & 1)])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    assert sorted(pile.count() for pile in piles) == [0, 1 << 16]
