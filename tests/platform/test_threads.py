"""Machines share nothing: threads that drive one each, in batches without the GIL, get what each gets alone."""

from __future__ import annotations

import random
import threading
from array import array
from collections.abc import Callable

import pytest

from dmakit.dma.batch import link_many, map_many, unmap_many
from dmakit.dma.direction import Direction
from dmakit.iommu.bitmap import Bitmap
from dmakit.platform.soft import Machine

PAGE = 4096
BOTH = Direction.BIDIRECTIONAL
THREADS = 4
VARIANTS = [
    {"mode": "lazy", "cpus": 2},
    {"mode": "strict", "iommu": "x86"},
    {"mode": "lazy", "caching_mode": True},
    {"iommu": "none", "force_bounce": True},
]


def zeros(count: int) -> array[int]:
    return array("Q", bytes(8 * count))


def drive(me: int, rounds: int) -> object:
    """One machine through every kind of batch; all that it answered and counted."""
    machine = Machine(ram="64M", fragmentation=1.0, seed=me, swiotlb="4M", **VARIANTS[me % len(VARIANTS)])
    rnd, seen = random.Random(me), []
    device = machine.device("nvme0")
    pages = array("Q", [machine.pages.alloc() for _ in range(256)])
    sizes = array("Q", [PAGE] * 256)
    for _ in range(rounds):
        n = rnd.randrange(1, 256)
        out = zeros(n)
        map_many(device, pages[:n], sizes[:n], out, BOTH)
        seen.append(hash(bytes(out)))
        if device.domain is not None:
            edges = sorted({0, n, *(rnd.randrange(n) for _ in range(8))})
            states, found = zeros(2 * (len(edges) - 1)), zeros(n)
            device.map_windows(pages[:n], sizes[:n], array("Q", edges), states, BOTH)
            assert machine.unit.translate_many(device.domain.did, out, found) == 0
            assert found == pages[:n]
            with device.try_alloc(0, n * PAGE) as window:
                link_many(window, pages[:n], sizes[:n], BOTH)
                window.sync()
            device.unmap_windows(states, BOTH)
        unmap_many(device, out, sizes[:n], BOTH)
    bits = Bitmap((64 << 20) // PAGE)
    bits.set_many(array("Q", [page // PAGE for page in pages]))
    seen.append((bits.count(), list(bits.pages())))
    machine.settle()
    counted = (machine.ledger.snapshot(), machine.ledger.lock_counts(), machine.live())
    machine.close()
    return seen, counted


def together(work: Callable[[int], object]) -> list[object]:
    """What ``work(0)`` … return in threads that begin at once."""
    gate, answers = threading.Barrier(THREADS), [None] * THREADS

    def run(me: int) -> None:
        gate.wait()
        try:
            answers[me] = work(me)
        except BaseException as error:
            answers[me] = error

    workers = [threading.Thread(target=run, args=(me,)) for me in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return answers


def check(rounds: int) -> None:
    alone = [drive(me, rounds) for me in range(THREADS)]
    assert together(lambda me: drive(me, rounds)) == alone


def test_machines_side_by_side_answer_and_count_as_alone() -> None:
    check(6)


@pytest.mark.long
def test_machines_side_by_side_for_long() -> None:
    check(1500)


def test_one_machine_may_be_handed_from_thread_to_thread() -> None:
    """Nothing belongs to the thread that made it: a lock around each use is enough."""
    machine, lock = Machine(ram="64M", swiotlb=0), threading.Lock()
    device = machine.device("nvme0")
    before = machine.ledger.snapshot()["map_calls"]

    def work(me: int) -> object:
        for _ in range(20):
            with lock:
                page = machine.pages.alloc()
                addr = device.map_phys(page, PAGE, BOTH)
            with lock:
                device.unmap_phys(addr, PAGE, BOTH)
                machine.pages.free(page)
        return None

    assert together(work) == [None] * THREADS
    assert machine.ledger.snapshot()["map_calls"] - before == 20 * THREADS
    machine.settle()
    assert machine.live()["iova_ranges"] == 0
    machine.close()
