"""Threads for a benchmark row: they begin together, each on a core of its own as far as there are cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from time import perf_counter_ns

from dmakit.bench.row import Bench

Rounds = Callable[[int], object]  # does so many rounds of the work


def elapsed(bench: Bench, threads: int, rounds: int, prepare: Callable[[int], Rounds]) -> float:
    """ns a round, of all threads together, of what ``prepare(number of the thread)`` returned, in each of ``threads``.

    From the first thread's begin to the last one's end, by their own clocks: where there are fewer cores than threads,
    a thread that looks on is late for both.
    """
    gate = threading.Barrier(threads)
    failed: list[BaseException] = []
    begins: list[int] = []
    ends: list[int] = []

    def run(number: int) -> None:
        try:
            if bench.cores:
                os.sched_setaffinity(0, {bench.cores[number % len(bench.cores)]})
            work = prepare(number)
            work(2)
            gate.wait()
            begins.append(perf_counter_ns())
            work(rounds)
            ends.append(perf_counter_ns())
        except BaseException as error:
            failed.append(error)
            gate.abort()

    workers = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        raise next((error for error in failed if not isinstance(error, threading.BrokenBarrierError)), failed[0])
    return (max(ends) - min(begins)) / (threads * rounds)


def few_cores(bench: Bench, threads: int) -> str:
    """A remark when not every thread had a core, else ''."""
    cores = len(bench.cores)
    return f"{threads} threads on {cores} cores" if cores and threads > cores else ""
