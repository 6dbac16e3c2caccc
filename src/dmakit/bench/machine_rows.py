"""Rows T of machines: two-step mapping in one, two and four threads. Informative: no goals.

Row 7a's work, 1,024 requests of 32 scattered pages a call, so that the call and not the interpreter is measured; every
batch lets go of the GIL.

* **T1m, T2m, T4m**: a machine for each thread. Machines share nothing: as many run as there are cores.
* **T1d, T2d, T4d**: one device of one machine for all. A batch takes the machine's turn (``turn.py``) and the
  others wait for it: sharing is safe and gains nothing.

The value is elapsed ns by requests of all threads; the ratio is to one thread with a machine, measured beside it. Time
is the clock on the wall: on a machine that others use, threads suffer first.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

from dmakit.bench.row import Bench, Row
from dmakit.bench.threads import Rounds, elapsed, few_cores
from dmakit.dma.direction import Direction
from dmakit.platform.soft import Machine

_PAGE = 4096
_BASE = 256 << 20
_PIECES = 32
_REQUESTS = 1024
_FEW = 8  # interpreted
_ROUNDS = 48
_TO = int(Direction.TO_DEVICE)


def _device(bench: Bench, number: int) -> Any:
    """The device of machine ``number``, made once."""
    machine = bench.once(f"machine {number}", partial(Machine, ram="1G"))
    return bench.once(f"machine {number} device", lambda: machine.device("bench"))


def _pages(bench: Bench, number: int) -> array[int]:
    """The memory of thread ``number``'s requests: pages of RAM in random order."""
    pages = Random(number).sample(range(1 << 17), (_REQUESTS if bench.compiled else _FEW) * _PIECES)
    return array("Q", [_BASE + page * _PAGE for page in pages])


def _windows(bench: Bench, shared: bool) -> Callable[[int], Rounds]:
    """For ``elapsed``: rounds of mapping and unmapping windows, each thread with memory of its own."""

    def prepare(number: int) -> Rounds:
        device = _device(bench, 0 if shared else number)
        phys = bench.once(f"pages {number}", lambda: _pages(bench, number))
        sizes, bounds = array("Q", [_PAGE]) * len(phys), array("Q", range(0, len(phys) + 1, _PIECES))
        states = array("Q", [0]) * (2 * (len(phys) // _PIECES))

        def rounds(count: int) -> None:
            for _ in range(count):
                device.map_windows(phys, sizes, bounds, states, _TO)
                device.unmap_windows(states, _TO)

        return rounds

    return prepare


def windows(threads: int, shared: bool, bench: Bench) -> tuple[float, float]:
    """ns a request of ``threads`` threads, and of one alone."""
    count, requests = bench.scaled(_ROUNDS), _REQUESTS if bench.compiled else _FEW
    together = elapsed(bench, threads, count, _windows(bench, shared))
    return together / requests, elapsed(bench, 1, count, _windows(bench, shared)) / requests


def note(threads: int, bench: Bench, value: float) -> str:
    """What the figure is in requests a second, and whether every thread had a core."""
    return "; ".join(filter(None, (f"{1e3 / value:.3g} M requests/s in all", few_cores(bench, threads))))


def _row(threads: int, shared: bool) -> Row:
    name = f"two-step mapping, {threads} thread{'s' if threads > 1 else ''}, "
    return Row(
        f"T{threads}{'d' if shared else 'm'}",
        name + ("one device" if shared else "a machine each"),
        "ns/request",
        None,
        "lower",
        "own",
        partial(windows, threads, shared),
        note=partial(note, threads),
    )


ROWS = [_row(threads, shared) for shared in (False, True) for threads in (1, 2, 4)]
