"""Rows T: the IOVA allocator without locks, and behind its locks in one, two and four threads. Informative: no goals.

One pair is one allocation and one free of a single page that the magazines serve; 64 at a time, in two batch calls.

* **T0**: no locks, one thread; the ratio is to E.
* **T1, T2, T4**: ``SharedDomain`` in so many threads, each a CPU of the domain, each on a core of its own as far as
  there are cores. They run their rounds without Python (``pairs.py``): what is measured is the locks.
* **T1p, T2p, T4p**: the same rounds as Python calls. Where the interpreter has a GIL, threads take turns between their
  calls, and handing it over costs more than a batch of 64.

The value is elapsed ns by pairs of all threads; the ratio of a shared form is to the form without locks in one thread,
measured beside it in the same way. Time is the clock on the wall: on a machine that others use, threads suffer first.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Callable
from functools import partial
from time import perf_counter_ns

from dmakit.bench import pairs
from dmakit.bench.row import Bench, Row
from dmakit.iova.domain import IovaDomain
from dmakit.iova.shared import SharedDomain

_LIMIT = (1 << 20) - 1
_DEPTH = 64
_ROUNDS = 40_000
_CALLS = 10_000
Work = Callable[[int, memoryview, memoryview, int], None]


def elapsed(bench: Bench, threads: int, rounds: int, work: Work) -> float:
    """ns a pair, of all threads together, of ``work(cpu, sizes, pfns, rounds)`` in each of ``threads`` threads.

    From the first thread's begin to the last one's end, by their own clocks: where there are fewer cores than threads,
    a thread that looks on is late for both.
    """
    gate = threading.Barrier(threads)
    failed: list[BaseException] = []
    begins: list[int] = []
    ends: list[int] = []

    def run(cpu: int) -> None:
        try:
            if bench.cores:
                os.sched_setaffinity(0, {bench.cores[cpu % len(bench.cores)]})
            sizes, pfns = (memoryview(array("Q", [word]) * _DEPTH) for word in (1, 0))
            work(cpu, sizes, pfns, 2)
            gate.wait()
            begins.append(perf_counter_ns())
            work(cpu, sizes, pfns, rounds)
            ends.append(perf_counter_ns())
        except BaseException as error:
            failed.append(error)
            gate.abort()

    workers = [threading.Thread(target=run, args=(cpu,)) for cpu in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        raise next((error for error in failed if not isinstance(error, threading.BrokenBarrierError)), failed[0])
    return (max(ends) - min(begins)) / (threads * rounds * _DEPTH)


def _calls(domain: IovaDomain | SharedDomain) -> Work:
    """Rounds as Python calls."""

    def work(cpu: int, sizes: memoryview, pfns: memoryview, rounds: int) -> None:
        alloc, free = domain.alloc_batch, domain.free_batch
        for _ in range(rounds):
            alloc(sizes, _LIMIT, pfns, True, cpu)
            free(pfns, sizes, cpu)

    return work


def without_locks(bench: Bench) -> float:
    """ns a pair of the form without locks, no Python between the batches."""
    domain = bench.once("threads alone", IovaDomain)
    work: Work = lambda cpu, sizes, pfns, rounds: pairs._alone_unchecked(domain, sizes, pfns, _LIMIT, rounds)  # noqa: E731
    return elapsed(bench, 1, bench.scaled(_ROUNDS), work)


def with_locks(threads: int, bench: Bench) -> tuple[float, float]:
    """ns a pair of ``threads`` threads behind locks, and of one without; no Python between the batches."""
    domain = bench.once(f"threads {threads}", lambda: SharedDomain(IovaDomain(cpus=threads)))
    work: Work = lambda cpu, sizes, pfns, rounds: pairs._shared_unchecked(domain, cpu, sizes, pfns, _LIMIT, rounds)  # noqa: E731
    return elapsed(bench, threads, bench.scaled(_ROUNDS), work), without_locks(bench)


def with_locks_from_python(threads: int, bench: Bench) -> tuple[float, float]:
    """ns a pair of ``threads`` threads behind locks, and of one without; every batch a Python call."""
    domain = bench.once(f"threads {threads}", lambda: SharedDomain(IovaDomain(cpus=threads)))
    alone = bench.once("threads alone", IovaDomain)
    rounds = bench.scaled(_CALLS)
    return elapsed(bench, threads, rounds, _calls(domain)), elapsed(bench, 1, rounds, _calls(alone))


def note(threads: int, bench: Bench, value: float) -> str:
    """What the figure is in E and in pairs a second, and whether every thread had a core."""
    text = f"{value / bench.yardsticks['E']:.3g} E a pair, {1e3 / value:.3g} M pairs/s in all"
    cores = len(bench.cores)
    return text if not cores or threads <= cores else f"{text}; {threads} threads on {cores} cores"


def _row(
    name: str, threads: int, work: str, yardstick: str, measure: Callable[..., float | tuple[float, float]]
) -> Row:
    return Row(
        name, f"IOVA pair in a batch, {work}", "ns/pair", None, "lower", yardstick, measure, note=partial(note, threads)
    )


ROWS = [
    _row("T0", 1, "no locks", "E", without_locks),
    *(
        _row(f"T{n}", n, f"locks, {n} threads".replace("1 threads", "1 thread"), "own", partial(with_locks, n))
        for n in (1, 2, 4)
    ),
    *(
        _row(f"T{n}p", n, f"locks, {n} calling from Python", "own", partial(with_locks_from_python, n))
        for n in (1, 2, 4)
    ),
]
