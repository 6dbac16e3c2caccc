"""The locked form of a domain: the same answers as the plain one, and nothing lost between threads."""

from __future__ import annotations

import random
import threading
from array import array
from collections.abc import Callable

import pytest

from dmakit.errors import ExhaustedError, MisuseError
from dmakit.iova.domain import IovaDomain
from dmakit.iova.shared import SharedDomain

LIMIT = (1 << 20) - 1


def test_batches_and_calls_answer_count_and_leave_what_the_plain_form_does() -> None:
    plain, guarded = IovaDomain(cpus=2), IovaDomain(cpus=2)
    shared = SharedDomain(guarded)
    rnd = random.Random(5)
    for step in range(60):
        n, cpu = rnd.randrange(1, 400), step & 1
        sizes = array("Q", [rnd.choice((1, 1, 1, 2, 4, 33)) if step % 3 else 1 for _ in range(n)])
        limit = rnd.choice((LIMIT, LIMIT, 700))
        mine, its = array("Q", [0]) * n, array("Q", [0]) * n
        assert plain.alloc_batch(sizes, limit, its, cpu=cpu) == shared.alloc_batch(sizes, limit, mine, cpu=cpu)
        assert mine == its
        one = plain.alloc_fast(3, (1 << 40) - 1, cpu=cpu)
        assert shared.alloc_fast(3, (1 << 40) - 1, cpu=cpu) == one
        for domain in (plain, shared):
            domain.free_fast(one, 3, cpu=1 - cpu)
            domain.free_batch(its, sizes, cpu=cpu if step % 5 else 1 - cpu)
    assert plain.fingerprint() == guarded.fingerprint()
    shared.settle()
    assert plain.ledger.snapshot() == guarded.ledger.snapshot()
    assert plain.ledger.lock_counts() == guarded.ledger.lock_counts()


def test_what_magazines_did_reaches_the_ledger_with_the_shared_lock_and_when_settled() -> None:
    domain = IovaDomain()
    shared = SharedDomain(domain)
    pfns = array("Q", [0]) * 64

    def counted() -> tuple[int, int]:
        counts = domain.ledger.snapshot()
        return counts["iova_magazine"], counts["iova_free_magazine"]

    def batch() -> None:
        shared.alloc_batch(array("Q", [1]) * 64, LIMIT, pfns)
        shared.free_batch(pfns, array("Q", [1]) * 64)

    batch()
    assert counted() == (0, 0)
    batch()
    assert counted() == (0, 0)
    shared.settle()
    assert counted() == (64, 128)
    shared.settle()
    assert counted() == (64, 128)
    batch()
    shared.free_fast(shared.alloc_fast(64, LIMIT), 64)
    assert counted() == (128, 192)


def test_events_are_recorded_as_by_the_plain_form() -> None:
    plain, guarded = IovaDomain(), IovaDomain()
    plain.events, guarded.events = [], []
    sizes, pfns = array("Q", [1, 1, 2]), array("Q", [0, 0, 0])
    for domain in (plain, SharedDomain(guarded)):
        domain.alloc_batch(sizes, LIMIT, pfns)
        domain.free_batch(pfns, sizes)
    assert plain.events == guarded.events != []


def test_errors_are_those_of_the_plain_form() -> None:
    shared = SharedDomain(IovaDomain())
    words = array("Q", [1])
    with pytest.raises(MisuseError, match=r"^cpu=1: must be from 0 to 0$"):
        shared.alloc_fast(1, LIMIT, cpu=1)
    with pytest.raises(MisuseError, match=r"^size=0: "):
        shared.alloc_fast(0, LIMIT)
    with pytest.raises(ExhaustedError, match=r"^no free range of 9 granules at or below pfn 0x4$"):
        shared.alloc_fast(9, 4)
    with pytest.raises(MisuseError, match=r"^pfn=0x7: no range is allocated there$"):
        shared.free_fast(7, 1)
    with pytest.raises(MisuseError, match=r"^sizes\[0\]=0: "):
        shared.alloc_batch(array("Q", [0]), LIMIT, words)
    with pytest.raises(MisuseError, match=r"^pfns: must have as many items as sizes \(2\), not 1$"):
        shared.alloc_batch(array("Q", [1, 1]), LIMIT, words)
    with pytest.raises(MisuseError, match=r"^sizes: must have as many items as pfns \(1\), not 2$"):
        shared.free_batch(words, array("Q", [1, 1]))
    with pytest.raises(MisuseError, match=r"^pfns: must be a contiguous buffer of unsigned 64-bit words$"):
        shared.free_batch(array("i", [1]), words)


def side_by_side(work: Callable[[int], None], threads: int) -> None:
    """``work(0)``, ``work(1)`` … in a thread each, to their ends."""
    workers = [threading.Thread(target=work, args=(me,)) for me in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


@pytest.mark.parametrize("same_cpu", [False, True])
def test_threads_share_a_domain(same_cpu: bool) -> None:
    threads, rounds, n = 4, 60, 300
    domain = IovaDomain(cpus=threads)
    shared = SharedDomain(domain)
    wrong: list[object] = []
    live: list[set[int]] = [set() for _ in range(threads)]

    def work(me: int) -> None:
        cpu, rnd = 0 if same_cpu else me, random.Random(me)
        try:
            for turn in range(rounds):
                sizes = array("Q", [1 << rnd.randrange(7) if turn % 2 else 1]) * n
                pfns = array("Q", [0]) * n
                assert shared.alloc_batch(sizes, (1 << 40) - 1, pfns, cpu=cpu) == n
                assert len(set(pfns)) == n
                single = shared.alloc_fast(1, LIMIT, cpu=cpu)
                assert single not in pfns
                shared.free_fast(single, 1, cpu=cpu)
                if turn == rounds - 1:
                    live[me] = set(pfns)
                else:
                    shared.free_batch(pfns, sizes, cpu=cpu)
        except BaseException as error:
            wrong.append(error)

    side_by_side(work, threads)
    assert wrong == []
    assert len(set.union(*live)) == threads * n
    shared.settle()
    counts = domain.ledger.snapshot()
    calls = threads * (rounds * n + rounds)
    assert sum(counts[f"iova_{how}"] for how in ("magazine", "depot", "tree")) == calls
    domain.flush_rcaches()
    assert domain.node_count == threads * n


class Owners:
    """Who holds which pfn: a range that is handed out twice, or freed by who does not hold it, is an error."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.held: set[int] = set()

    def take(self, pfns: array[int], sizes: array[int]) -> None:
        pieces = [pfn + i for pfn, size in zip(pfns, sizes, strict=True) if pfn for i in range(size)]
        with self.lock:
            assert self.held.isdisjoint(pieces), sorted(self.held & set(pieces))[:9]
            self.held.update(pieces)
            assert len(set(pieces)) == len(pieces)

    def give(self, pfns: array[int], sizes: array[int]) -> None:
        pieces = {pfn + i for pfn, size in zip(pfns, sizes, strict=True) if pfn for i in range(size)}
        with self.lock:
            assert self.held >= pieces
            self.held -= pieces


def stress(shared: SharedDomain, limit: int, rounds: int, *, threads: int = 4) -> tuple[int, int, int]:
    """Threads allocate and free batches, each freeing what another allocated, and settle now and then; settled at the
    end: (allocated, failed, freed)."""
    owners, mail, wrong = Owners(), [[] for _ in range(threads)], []
    tally = [[0, 0, 0] for _ in range(threads)]

    def work(me: int) -> None:
        rnd = random.Random(me)
        try:
            for turn in range(rounds):
                n = rnd.choice((1, 7, 64, 300, 1000))
                sizes = array("Q", [1 << rnd.randrange(6) if turn % 3 == 0 else 1]) * n
                if turn % 7 == 0:
                    sizes = array("Q", [rnd.choice((1, 2, 3, 40)) for _ in range(n)])
                pfns = array("Q", [0]) * n
                if turn % 5 == 0:
                    shared.settle()
                done = shared.alloc_batch(sizes, limit, pfns, cpu=(me + turn // 50) % shared.cpus)
                assert done == n - pfns.count(0)
                owners.take(pfns, array("Q", [1 << (size - 1).bit_length() if size <= 32 else size for size in sizes]))
                tally[me][0] += done
                tally[me][1] += n - done
                mail[(me + 1) % threads].append((pfns, sizes))
                while mail[me] and (len(mail[me]) > 3 or rnd.random() < 0.7):
                    theirs, spans = mail[me].pop()
                    whole = array("Q", [1 << (size - 1).bit_length() if size <= 32 else size for size in spans])
                    owners.give(theirs, whole)
                    shared.free_batch(theirs, spans, cpu=me % shared.cpus)
                    tally[me][2] += len(theirs) - theirs.count(0)
        except BaseException as error:
            wrong.append(error)

    side_by_side(work, threads)
    assert wrong == []
    for box in mail:
        for pfns, sizes in box:
            shared.free_batch(pfns, sizes)
            tally[0][2] += len(pfns) - pfns.count(0)
    shared.settle()
    return sum(t[0] for t in tally), sum(t[1] for t in tally), sum(t[2] for t in tally)


def conserved(domain: IovaDomain, allocated: int, failed: int, freed: int) -> None:
    """The ledger's sums are exact, and nothing is lost."""
    counts = domain.ledger.snapshot()
    assert allocated == freed
    assert sum(counts[f"iova_{how}"] for how in ("magazine", "depot", "tree")) == allocated
    assert counts["iova_failed"] == failed
    assert sum(row["rbtree"] for row in domain.ledger.lock_counts()) == counts["lock_rbtree"]
    assert sum(row["depot"] for row in domain.ledger.lock_counts()) == counts["lock_depot"]
    cached = domain.cached_pfns()
    assert len({pfn for pfn, _ in cached}) == len(cached) == domain.node_count
    domain.flush_rcaches()
    assert domain.node_count == 0
    after = domain.ledger.snapshot()
    pool = domain.rcaches.pool
    assert pool.allocated == 2 * 6 * domain.cpus
    assert after["iova_free_magazine"] + after["iova_free_tree"] >= freed


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_no_range_is_handed_out_twice_and_every_one_is_counted(cpus: int) -> None:
    domain = IovaDomain(cpus=cpus)
    sums = stress(SharedDomain(domain), (1 << 36) - 1, 40)
    assert sums[1] == 0
    conserved(domain, *sums)


def test_the_same_when_the_space_runs_out() -> None:
    """Then one CPU empties every CPU's magazines while the others use theirs."""
    domain = IovaDomain(cpus=4)
    sums = stress(SharedDomain(domain), 6000, 40)
    assert sums[1] > 0 and domain.ledger.snapshot()["rcache_flushes"] > 0
    conserved(domain, *sums)


@pytest.mark.long
@pytest.mark.parametrize("limit", [6000, (1 << 36) - 1])
def test_the_same_for_long(limit: int) -> None:
    domain = IovaDomain(cpus=3)
    conserved(domain, *stress(SharedDomain(domain), limit, 4000, threads=6))
