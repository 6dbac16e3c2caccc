"""Compare: one workload through every strategy, on the same machine, byte-checked and counted.

A run walks the workload's schedule, a stretch of it a call (``lab.engine``). Submitting maps the request; completing
lets the device carry it out by translated DMA, unmaps, and compares every byte with what had to arrive. Between two
events virtual time passes, so that flush queues and depots work as they do.

The result of a strategy is its ledger over all requests (registration of ``premap`` is kept apart, as ``setup``),
the shares of submission and completion (what is left ran on timers), the paths taken with their reasons, modelled
nanoseconds, and the wall time that dmakit itself took to map and unmap (``simulator_ns``), which ranks nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dmakit.errors import UnsupportedError
from dmakit.lab.engine import MOST_EVENTS, Engine
from dmakit.lab.flight import Columns
from dmakit.lab.options import Options
from dmakit.lab.outcome import Outcome
from dmakit.lab.pattern import Pattern
from dmakit.lab.payload import DataPath
from dmakit.lab.profile import PUBLISHED, cheaper, derived, modelled
from dmakit.lab.rig import Rig, Source
from dmakit.lab.schedule import stretches
from dmakit.lab.strategies import STRATEGIES, Strategy
from dmakit.lab.workload import sharing
from dmakit.ledger import ROWS, difference

Progress = Callable[[str, int, int], None]
"""Called with (strategy, requests done, requests in all), from stretch to stretch."""


@dataclass(slots=True)
class StrategyResult(Outcome):
    """What one strategy did with the workload, in ledgers: all of it, registrations apart (``setup``), by phase."""

    faults: int = 0
    ledger: dict[str, int] = field(default_factory=dict)
    setup: dict[str, int] = field(default_factory=dict)
    submission: dict[str, int] = field(default_factory=dict)
    completion: dict[str, int] = field(default_factory=dict)
    simulator_ns: int = 0

    @property
    def modelled_ns(self) -> tuple[float, float]:
        """Modelled nanoseconds of all requests, [low, high]."""
        return modelled(self.ledger)

    def report(self) -> dict[str, object]:
        """The JSON form."""
        low, high = self.modelled_ns
        return {
            **self.facts(),
            "ledger": self.ledger,
            "setup_ledger": self.setup,
            "phases": {
                name: {"ledger": ledger, "modelled_ns": dict(zip(("low", "high"), modelled(ledger), strict=True))}
                for name, ledger in (("submission", self.submission), ("completion", self.completion))
            },
            "modelled_ns": {"low": round(low, 3), "high": round(high, 3), "profile": PUBLISHED.name},
            "simulator_ns": self.simulator_ns,
        }


@dataclass(slots=True)
class Comparison:
    """All strategies on one input."""

    input: str
    options: Options
    results: list[StrategyResult]
    notes: list[str] = field(default_factory=list)
    replay: tuple[int, int] | None = None

    @property
    def wrong(self) -> int:
        """Bytes that differ, over all strategies."""
        return sum(result.wrong for result in self.results)

    def result(self, name: str) -> StrategyResult:
        """The result of one strategy."""
        return next(result for result in self.results if result.name == name)

    def cheapest(self) -> list[str]:
        """Strategies that no other one beats in modelled time (direct is not in the race: it does not protect)."""
        racing = [r for r in self.results if r.requests and r.name != "direct"]
        return [a.name for a in racing if not any(cheaper(b.modelled_ns, a.modelled_ns) for b in racing)]

    def report(self) -> dict[str, object]:
        """The JSON form."""
        return {
            "input": self.input,
            "platform": self.options.platform,
            "options": self.options.describe(),
            "iovas": None if self.replay is None else {"matched": self.replay[0], "allocations": self.replay[1]},
            "notes": self.notes,
            "strategies": [result.report() for result in self.results],
        }


def run_strategy(name: str, source: Source, options: Options, progress: Progress | None = None) -> StrategyResult:
    """Run one strategy on a machine of its own."""
    kind = STRATEGIES[name]
    result = StrategyResult(name)
    if kind.identity and options.untrusted:
        result.unavailable = "an untrusted device always gets a translating domain"
        return result
    rig = Rig(source, options, identity=kind.identity)
    try:
        _run(rig, kind, result, progress)
    except UnsupportedError as error:
        result.unavailable = str(error)
    finally:
        rig.close()
    return result


def _run(rig: Rig, kind: type[Strategy], result: StrategyResult, progress: Progress | None) -> None:
    strategy, workload = kind(rig), rig.workload
    result.workload, result.paths = workload.requests, strategy.path_log()
    blank = rig.ledger.snapshot()
    strategy.prepare()
    before = rig.ledger.snapshot()
    result.setup = difference(before, blank)
    columns = Columns(workload.requests, sharing(workload), rig.ledger.cpus)
    pattern = Pattern(max((layout.size for layout in workload.requests.layouts), default=0), rig.options.seed)
    engine = Engine(rig, strategy, columns, DataPath(rig.device, rig.machine.cache, columns, pattern))
    for kinds, positions in stretches(workload.schedule, workload.requests, MOST_EVENTS):
        done = 0
        while done < len(kinds):
            done += engine.run(kinds, positions, done)
            result.paths.take_all(*engine.log)
            if progress is not None:
                progress(result.name, engine.requests + engine.failed, len(workload.requests))
    rig.machine.settle()
    result.ledger = difference(rig.ledger.snapshot(), before)
    result.submission = {row.name: int(engine.submission[row.index]) for row in ROWS}
    result.completion = {row.name: int(engine.completion[row.index]) for row in ROWS}
    result.requests, result.size, result.wrong = engine.requests, engine.size, engine.wrong
    result.failed, result.faults, result.simulator_ns = engine.failed, engine.faults, engine.simulator_ns
    strategy.finish()


def compare(
    source: Source, options: Options, names: list[str] | None = None, progress: Progress | None = None
) -> Comparison:
    """Run the strategies (all of them unless ``names`` says which), one after the other; the requests are kept once."""
    results: list[StrategyResult] = []
    for name in names or list(STRATEGIES):
        results.append(run_strategy(name, source, options, progress))
        results[-1].workload = next((one.workload for one in results if len(one.workload)), results[-1].workload)
    return Comparison(source.name, options, results, source.missing())


def deciding(one: StrategyResult, other: StrategyResult, most: int = 3) -> list[tuple[str, int, int, float]]:
    """The counters that make up most of the difference in price: (row, one's units, other's units, ns saved)."""
    left, right = derived(one.ledger), derived(other.ledger)
    rows = []
    for rate in PUBLISHED.rates:
        a, b = (sum(ledger.get(row, 0) for row in rate.rows) for ledger in (left, right))
        if a != b:
            rows.append(("+".join(rate.rows), a, b, (b - a) * (rate.low + rate.high) / 2))
    return sorted(rows, key=lambda row: -abs(row[3]))[:most]
