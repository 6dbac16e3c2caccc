"""The benchmark suite: every row beside its yardstick, repetition by repetition, on one pinned core.

A repetition measures the yardstick, the work, and the yardstick again; the ratio is taken to the mean of both, so that
a clock that changes or a neighbour on the machine weighs on both sides. The figures are medians over the repetitions
(at least 9), the spread is the middle half of the ratios. One repetition before them warms up and is not counted.

Rows come from the modules ``*_rows`` of this package, each a list ``ROWS``. In the report those with a goal are
``rows``, those that only inform are ``informative``.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median, quantiles

from dmakit import _core
from dmakit.bench import (
    bitmap_rows,
    dma_rows,
    iommu_rows,
    iova_rows,
    machine_rows,
    nvme_rows,
    thread_rows,
    trace_rows,
)
from dmakit.bench.row import Bench, Row
from dmakit.bench.yardsticks import MEASURES

MODULES = (iova_rows, thread_rows, machine_rows, iommu_rows, dma_rows, bitmap_rows, nvme_rows, trace_rows)
REPETITIONS = 9


@dataclass
class Figure:
    """What was measured of a row; ``ratio`` is None when the work could not be measured (``error`` says why).

    ``goal`` and ``met`` are None in a row that only informs.
    """

    id: str
    name: str
    value: float | None
    unit: str
    ratio: float | None
    yardstick: str
    goal: float | None
    better: str
    met: bool | None
    spread: tuple[float, float] | None = None
    times: float = 1.0
    error: str | None = None
    note: str | None = None


def all_rows() -> list[Row]:
    """The rows of every module, by id."""
    return sorted((row for module in MODULES for row in module.ROWS), key=order)


def order(row: Row) -> tuple[int, str]:
    """Sorting key: 2 before 10, 3a before 3b."""
    match = re.match(r"\d+", row.id)
    return int(match.group()) if match else 1 << 30, row.id


def asked(name: str, wanted: list[str]) -> bool:
    """Whether the row of this id was asked for (``10`` takes 10a, 10b …, ``T`` all of T's); each is without a wish."""
    ends = {wish: r"\d*[a-z]?" if wish.isalpha() else "[a-z]?" for wish in wanted}
    return not wanted or any(re.fullmatch(re.escape(wish) + end, name) for wish, end in ends.items())


def chosen(rows: list[Row], wanted: list[str]) -> list[Row]:
    """The rows that were asked for."""
    return [row for row in rows if asked(row.id, wanted)]


@contextmanager
def pinned(core: int | None = None) -> Iterator[int]:
    """Stay on one core (the last one allowed, unless told); the core's number."""
    allowed = os.sched_getaffinity(0)
    core = max(allowed) if core is None else core
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, allowed)


def measured(row: Row, bench: Bench, repetitions: int = REPETITIONS) -> Figure:
    """One row's figure."""
    samples: list[tuple[float, float]] = []
    try:
        for turn in range(repetitions + 1):
            sample = repetition(row, bench)
            if turn:
                samples.append(sample)
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
        lost = None if row.goal is None else False
        return Figure(row.id, row.name, None, row.unit, None, row.yardstick, row.goal, row.better, lost, error=wrong)
    ratios = [value / (peer * row.times) for value, peer in samples]
    if row.better == "higher":
        ratios = [1 / ratio for ratio in ratios]
    ratio = median(ratios)
    quarters = quantiles(ratios, n=4) if len(ratios) > 1 else [ratio] * 3
    met = reached(row, ratio)
    value = median(value for value, _ in samples)
    spread = (quarters[0], quarters[2])
    figure = Figure(
        row.id, row.name, value, row.unit, ratio, row.yardstick, row.goal, row.better, met, spread, row.times
    )
    figure.note = None if row.note is None else row.note(bench, value)
    return figure


def reached(row: Row, ratio: float) -> bool | None:
    """Whether the goal is met; None without one."""
    if row.goal is None:
        return None
    return ratio <= row.goal if row.better == "lower" else ratio >= row.goal


def repetition(row: Row, bench: Bench) -> tuple[float, float]:
    """(the work, what it is compared with), one time."""
    if row.yardstick == "own":
        both = row.measure(bench)
        assert isinstance(both, tuple), f"row {row.id}: a row with its own peer returns (value, peer)"
        return both
    before = MEASURES[row.yardstick](bench)
    bench.yardsticks[row.yardstick] = before
    value = row.measure(bench)
    assert not isinstance(value, tuple), f"row {row.id}: only a row with its own peer returns two values"
    return value, (before + MEASURES[row.yardstick](bench)) / 2


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    model = platform.processor()
    try:
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
    }


def run(
    rows: list[Row],
    *,
    short: bool = False,
    repetitions: int = REPETITIONS,
    core: int | None = None,
    progress: Callable[[Figure], None] = lambda figure: None,
) -> dict[str, object]:
    """Measure ``rows``; the report as it is written to JSON."""
    running = str(_core.status()["running"])
    figures: list[Figure] = []
    cores = tuple(sorted(os.sched_getaffinity(0)))
    with pinned(core) as cpu:
        shared = Bench(short=short, compiled=running == "compiled")
        limits = {name: median(measure(shared) for _ in range(repetitions)) for name, measure in MEASURES.items()}
        for row in rows:
            bench = Bench(short, shared.compiled, dict(limits), shared.kept.copy(), cores)
            figures.append(measured(row, bench, repetitions))
            progress(figures[-1])
    return {
        "machine": {**machine(), "pinned_to": cpu},
        "core": running,
        "short": short,
        "yardsticks": limits,
        "rows": [asdict(figure) for figure in figures if figure.goal is not None],
        "informative": [asdict(figure) for figure in figures if figure.goal is None],
    }
