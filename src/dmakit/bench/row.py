"""What a benchmark row is, and what it measures with.

A row is one line of the goals table: some work, and how far it may be from a *yardstick*, the least that this machine
can do of that kind of work (``yardsticks.py``). ``measure(bench)`` does the work once (one repetition) and returns ns
per operation; the runner calls it at least nine times, each time beside its yardstick, and takes medians. So:

* ``yardstick`` E, F or W: ns per operation of the work against ns of the yardstick. M: ns per *byte*.
* ``yardstick`` own: ``measure`` returns ``(value, peer)``: the work and its peer, measured beside it.
* ``times``: the ratio is to so many yardsticks ("2.3 × two empty calls": goal 2.3, times 2).
* ``goal`` None: the row informs, there is nothing to reach.
* ``better`` lower: ratio = value / yardstick, at most ``goal``. ``better`` higher: yardstick / value, at least ``goal``
  (a rate against a rate: "0.9 × memcpy").

Time is this thread's processor time, so that the turns of other programs on a shared core do not count; what waits for
other processes or threads measures by ``time.perf_counter_ns``, beside a peer measured in the same way.

What is expensive to set up is made once: ``bench.once("iova", make)``. Buffers are flat arrays; repetitions must leave
the state as they found it.

    def pair(bench: Bench) -> float:
        domain = bench.once("domain", lambda: IovaDomain(granule=4096))
        return bench.statement("free(alloc(1, top), 1)", alloc=domain.alloc_fast, free=domain.free_fast, top=1 << 20)

    ROWS = [Row("2", "IOVA alloc + free, two Python calls", "ns/pair", 2.3, "lower", "E", pair, times=2)]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import thread_time_ns
from typing import TypeVar, cast

Made = TypeVar("Made")
UNROLL = 10  # statements written out in one turn of a loop, so that the loop itself weighs nothing


@dataclass
class Bench:
    """Helpers for ``measure``: state that outlives a repetition, timing, the yardsticks so far.

    ``short``: CI's form, take fewer operations. ``compiled``: False when the core runs interpreted: take far fewer.
    ``yardsticks``: latest ns of E, F, W (an operation) and M (a byte). ``cores``: what threads may use (the run itself
    stays on one); empty when nobody said.
    """

    short: bool = False
    compiled: bool = True
    yardsticks: dict[str, float] = field(default_factory=dict)
    kept: dict[str, object] = field(default_factory=dict)
    cores: tuple[int, ...] = ()

    def once(self, key: str, make: Callable[[], Made]) -> Made:
        """What ``make()`` returned the first time ``key`` was asked for."""
        if key not in self.kept:
            self.kept[key] = make()
        return cast(Made, self.kept[key])

    def scaled(self, operations: int) -> int:
        """A number of operations fit for the form that runs: all compiled, 1/4 short, 1/200 interpreted; at least 1."""
        operations //= 4 if self.short else 1
        return max(1, operations // (1 if self.compiled else 200))

    def timed(self, work: Callable[[], object], operations: float = 1) -> float:
        """ns per operation of one call of ``work``, which does ``operations`` of them."""
        begin = thread_time_ns()
        work()
        return (thread_time_ns() - begin) / operations

    def statement(self, code: str, number: int = 20_000, **names: object) -> float:
        """ns of one execution of the Python statement ``code``, of ``number``; ``names`` are its (local) variables."""
        key = f"statement {code} {sorted(names)}"
        function = self.once(key, lambda: _loop(code, sorted(names)))
        turns = max(1, self.scaled(number) // UNROLL)
        begin = thread_time_ns()
        function(turns, **names)
        return (thread_time_ns() - begin) / (turns * UNROLL)


@dataclass(frozen=True)
class Row:
    """One goal. ``id`` as in the table (1, 2, 3a, 3b …); see the module's head for the rest."""

    id: str
    name: str
    unit: str
    goal: float | None
    better: str
    yardstick: str
    measure: Callable[[Bench], float | tuple[float, float]]
    times: float = 1.0
    note: Callable[[Bench, float], str] | None = None  # a remark on the figure, given its value


def _loop(code: str, names: list[str]) -> Callable[..., None]:
    """A function that executes ``code`` UNROLL times in each of ``turns`` turns."""
    body = "\n".join(f"        {code}" for _ in range(UNROLL))
    source = f"def loop(turns, {', '.join(names)}):\n    for _ in range(turns):\n{body}\n"
    space: dict[str, Callable[..., None]] = {}
    exec(compile(source, "<bench>", "exec"), {}, space)
    return space["loop"]
