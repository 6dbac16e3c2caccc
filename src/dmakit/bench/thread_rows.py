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

from array import array
from collections.abc import Callable
from functools import partial

from dmakit.bench import pairs
from dmakit.bench.row import Bench, Row
from dmakit.bench.threads import Rounds, elapsed, few_cores
from dmakit.iova.domain import IovaDomain
from dmakit.iova.shared import SharedDomain

_LIMIT = (1 << 20) - 1
_DEPTH = 64
_ROUNDS = 40_000
_CALLS = 10_000
Work = Callable[[int, memoryview, memoryview, int], None]  # CPU, sizes, pfns, rounds


def _fill(work: Work) -> Callable[[int], Rounds]:
    """``work`` for ``elapsed``: each thread with arrays of its own."""

    def prepare(cpu: int) -> Rounds:
        sizes, pfns = (memoryview(array("Q", [word]) * _DEPTH) for word in (1, 0))
        return partial(work, cpu, sizes, pfns)

    return prepare


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
    return elapsed(bench, 1, bench.scaled(_ROUNDS), _fill(work)) / _DEPTH


def with_locks(threads: int, bench: Bench) -> tuple[float, float]:
    """ns a pair of ``threads`` threads behind locks, and of one without; no Python between the batches."""
    domain = bench.once(f"threads {threads}", lambda: SharedDomain(IovaDomain(cpus=threads)))
    work: Work = lambda cpu, sizes, pfns, rounds: pairs._shared_unchecked(domain, cpu, sizes, pfns, _LIMIT, rounds)  # noqa: E731
    return elapsed(bench, threads, bench.scaled(_ROUNDS), _fill(work)) / _DEPTH, without_locks(bench)


def with_locks_from_python(threads: int, bench: Bench) -> tuple[float, float]:
    """ns a pair of ``threads`` threads behind locks, and of one without; every batch a Python call."""
    domain = bench.once(f"threads {threads}", lambda: SharedDomain(IovaDomain(cpus=threads)))
    alone = bench.once("threads alone", IovaDomain)
    rounds = bench.scaled(_CALLS)
    together = elapsed(bench, threads, rounds, _fill(_calls(domain)))
    return together / _DEPTH, elapsed(bench, 1, rounds, _fill(_calls(alone))) / _DEPTH


def note(threads: int, bench: Bench, value: float) -> str:
    """What the figure is in E and in pairs a second, and whether every thread had a core."""
    figure = f"{value / bench.yardsticks['E']:.3g} E a pair, {1e3 / value:.3g} M pairs/s in all"
    return "; ".join(filter(None, (figure, few_cores(bench, threads))))


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
