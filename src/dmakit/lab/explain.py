"""Explain: why each request took its path, and what would put it on the fast one.

The two-step strategy is run on the input (it takes the decisions that Linux's NVMe driver takes); its path log
is read out, nothing is guessed. What a trace does not show is said to be unknown, with the event that would.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from dmakit.errors import InputError
from dmakit.lab.compare import Progress, StrategyResult, run_strategy
from dmakit.lab.options import Options
from dmakit.lab.request_table import IoRequest, Requests
from dmakit.lab.rig import Source
from dmakit.reasons import RULES, Reason, Rule


@dataclass(frozen=True, slots=True)
class Line:
    """One (path, reason) with everything a reader needs."""

    path: str
    reason: Reason
    count: int
    fast: bool
    phases: tuple[tuple[str, int], ...]
    examples: tuple[int, ...]

    @property
    def rule(self) -> Rule:
        """The rule in words, the remedy, the source."""
        return RULES[self.reason]

    def report(self) -> dict[str, object]:
        """The JSON form."""
        return {
            "path": self.path,
            "reason": self.reason.name,
            "count": self.count,
            "fast": self.fast,
            "rule": self.rule.text,
            "remedy": None if self.fast else self.rule.remedy,
            "source": self.rule.source or None,
            "phases": dict(self.phases),
            "examples": list(self.examples),
        }


@dataclass(frozen=True, slots=True)
class Detail:
    """One request in detail."""

    request: IoRequest
    line: Line

    def report(self) -> dict[str, object]:
        """The JSON form."""
        return {
            "request": self.request.number,
            "op": self.request.op,
            "bytes": self.request.size,
            "phase": self.request.phase,
            "cpu": self.request.cpu,
            "segments": [{"phys": phys, "length": length} for phys, length in self.request.segments],
            "path": self.line.path,
            "reason": self.line.reason.name,
        }


class Explanation:
    """The path log of one input, grouped."""

    def __init__(self, result: StrategyResult, requests: Requests) -> None:
        assert result.paths is not None
        self.log = result.paths
        self.requests = requests
        groups: dict[tuple[int, Reason], array[int]] = {}
        for number, (path, reason) in self.log.requests.items():
            groups.setdefault((path, reason), array("Q")).append(number)
        self.lines = [self._line(path, reason, numbers) for (path, reason), numbers in sorted(groups.items())]

    def _line(self, path: int, reason: Reason, numbers: array[int]) -> Line:
        phases: dict[str, int] = {}
        for number in numbers:
            phase = self.requests.numbered(number).phase
            phases[phase] = phases.get(phase, 0) + 1
        name = self.log.paths[path]
        return Line(
            name, reason, len(numbers), name in self.log.fast, tuple(sorted(phases.items())), tuple(numbers[:5])
        )

    @property
    def total(self) -> int:
        """Requests explained."""
        return len(self.log.requests)

    def of_reason(self, name: str) -> list[Line]:
        """The lines of one reason; InputError when no request has it."""
        found = [line for line in self.lines if line.reason.name == name.upper().replace("-", "_")]
        if not found:
            known = ", ".join(sorted({line.reason.name for line in self.lines}))
            raise InputError(f"--reason {name}: no request has it; the reasons here are {known or 'none'}")
        return found

    def of_request(self, number: int) -> Detail:
        """One request; InputError when there is no such number."""
        if number not in self.log.requests:
            raise InputError(f"--request {number}: requests here are numbered 0 to {len(self.requests) - 1}")
        path, reason = self.log.requests[number]
        line = next(x for x in self.lines if (x.path, x.reason) == (self.log.paths[path], reason))
        return Detail(self.requests.numbered(number), line)


def explain(source: Source, options: Options, progress: Progress | None = None) -> Explanation:
    """Run the NVMe driver's decisions over the input and group what they recorded."""
    result = run_strategy("two-step", source, options, progress)
    return Explanation(result, result.workload)
