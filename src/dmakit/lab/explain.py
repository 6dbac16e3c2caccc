"""Explain: why each request took its path, and what would put it on the fast one.

The two-step strategy is run on the input (it takes the decisions that Linux's NVMe driver takes); its path log
is read out, nothing is guessed. What a trace does not show is said to be unknown, with the event that would.

On a real controller ``auto`` is run, which chooses between windows and registered memory by what they cost there: each
line then has the figures that were measured, for its first request. There a line counts commands: a request may be
split.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dmakit.errors import InputError, UnsupportedError
from dmakit.lab.compare import Progress, run_strategy
from dmakit.lab.options import Options
from dmakit.lab.request_table import IoRequest, Requests
from dmakit.lab.rig import Source
from dmakit.nvme.costs import Costs
from dmakit.nvme.registration import shape_of
from dmakit.reasons import RULES, PathLog, Reason, Rule

if TYPE_CHECKING:
    from dmakit.lab.hardware import HardwareResult, Target


@dataclass(frozen=True, slots=True)
class Line:
    """One (path, reason) with everything a reader needs; ``figures``: what was measured for its first request."""

    path: str
    reason: Reason
    count: int
    fast: bool
    phases: tuple[tuple[str, int], ...]
    examples: tuple[int, ...]
    figures: str = ""

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
            "figures": self.figures or None,
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
    """A path log, grouped. ``commands``: the request of each entry, where requests were split; ``costs``: measured."""

    def __init__(
        self, log: PathLog, requests: Requests, commands: Sequence[int] | None = None, costs: Costs | None = None
    ) -> None:
        self.log = log
        self.requests = requests
        self.costs = costs
        groups: dict[tuple[int, Reason], array[int]] = {}
        self.first: dict[int, tuple[int, Reason]] = {}
        for entry, taken in log.requests.items():
            number = entry if commands is None else commands[entry]
            groups.setdefault(taken, array("Q")).append(number)
            self.first.setdefault(number, taken)
        self.lines = [self._line(path, reason, numbers) for (path, reason), numbers in sorted(groups.items())]

    def _line(self, path: int, reason: Reason, numbers: array[int]) -> Line:
        phases: dict[str, int] = {}
        for number in numbers:
            phase = self.requests.numbered(number).phase
            phases[phase] = phases.get(phase, 0) + 1
        name, examples = self.log.paths[path], tuple(dict.fromkeys(numbers[:5]))
        figures = self.figures(examples[0])
        return Line(name, reason, len(numbers), name in self.log.fast, tuple(sorted(phases.items())), examples, figures)

    def figures(self, number: int) -> str:
        """What was measured for a request whose buffer is its own memory; empty when nothing was."""
        if self.costs is None:
            return ""
        layout = self.requests.numbered(number).layout
        return str(self.costs.verdict(shape_of(layout.segments), shape_of(layout.bvecs or layout.segments)))

    @property
    def total(self) -> int:
        """Requests (or commands) explained."""
        return len(self.log.requests)

    def of_reason(self, name: str) -> list[Line]:
        """The lines of one reason; InputError when no request has it."""
        found = [line for line in self.lines if line.reason.name == name.upper().replace("-", "_")]
        if not found:
            known = ", ".join(sorted({line.reason.name for line in self.lines}))
            raise InputError(f"--reason {name}: no request has it; the reasons here are {known or 'none'}")
        return found

    def of_request(self, number: int) -> Detail:
        """One request (its first command); InputError when there is no such number."""
        if number not in self.first:
            raise InputError(f"--request {number}: requests here are numbered 0 to {len(self.requests) - 1}")
        path, reason = self.first[number]
        line = next(x for x in self.lines if (x.path, x.reason) == (self.log.paths[path], reason))
        return Detail(self.requests.numbered(number), replace(line, figures=self.figures(number)))


def explain(source: Source, options: Options, progress: Progress | None = None) -> Explanation:
    """Run the NVMe driver's decisions over the input and group what they recorded."""
    result = run_strategy("two-step", source, options, progress)
    return Explanation(result.paths, result.workload)


def explain_on_hardware(
    source: Source, target: Target, progress: Progress | None = None
) -> tuple[Explanation, HardwareResult]:
    """Run the choice between windows and registered memory on a real controller; what it recorded, and the run."""
    from dmakit.lab.hardware import compare_on_hardware  # the software machine needs nothing of VFIO

    (result,) = compare_on_hardware(source, target, ["auto"], progress).results
    if result.unavailable:
        raise UnsupportedError(result.unavailable)
    return Explanation(result.paths, result.workload, result.commands, result.costs), result
