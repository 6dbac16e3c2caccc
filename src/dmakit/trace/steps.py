"""``replay_steps``: run a step file on our stack and compare it with the kernel, field by field.

Compared are the return value, the IOVA, the state's size word, the page range and its translations, leaf entries,
output segments, bytes, warnings, the events a call causes in their order (``events``) and what flush-queue timers did
around it (``after``). A step matches when all its fields do.

With the defects of the recorded kernel switched on, every step is expected to match. Without them a difference must
have a name, and the name is found by experiment, not by a list: the file is replayed with every defect of that kernel
but one; the differences of that replay are what the missing defect explains. A difference that no such replay shows
has no explanation (``defect`` is null) and the file counts as diverged.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dmakit.dma.defects import defects_of
from dmakit.trace import step_adopt
from dmakit.trace.recorded_machine import boot_beside, compared
from dmakit.trace.step_bench import Bench, Slot
from dmakit.trace.step_commands import Answer, Commands
from dmakit.trace.step_events import Event, Flush, KernelEvents, separate, warning_function
from dmakit.trace.step_file import Step, StepFile, is_step_file, load_steps
from dmakit.trace.step_unknown import UnknownState

__all__ = ["StepDifference", "StepsResult", "is_step_file", "replay_steps"]

RECORDED_KERNEL = "7.2"
#: The fields of a record that are answers; the rest is input or bookkeeping of the recorder.
FIELDS = (
    "ret", "untrusted", "domain_type", "phys", "len", "addr", "size", "max_seg", "boundary", "in", "out", "sg_after",
    "base", "span", "tr", "bytes", "leaves", "warn", "events", "after", "skipped",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepDifference:
    """One field of one step that is not the kernel's; ``defect`` names what explains it, None when nothing does."""

    n: int
    line: int
    cmd: str
    field: str
    ours: Any
    kernel: Any
    defect: str | None = None


@dataclass(slots=True)
class StepsResult:
    """What ``dmakit replay`` reports of one step file."""

    file: str
    steps: int
    matched: int
    differences: list[StepDifference]
    kind: str = "steps"
    adopted: int = 0
    defects: tuple[str, ...] = ()
    unknown_events: dict[str, int] = field(default_factory=dict)

    @property
    def divergence(self) -> StepDifference | None:
        """The first difference."""
        return self.differences[0] if self.differences else None

    @property
    def explained(self) -> bool:
        """True when every difference has the name of a defect."""
        return all(difference.defect for difference in self.differences)

    def as_json(self) -> dict[str, Any]:
        """The object of ``--json``."""
        return {
            "file": self.file,
            "kind": self.kind,
            "steps": self.steps,
            "matched": self.matched,
            "adopted": self.adopted,
            "differences": [asdict(difference) for difference in self.differences],
            "divergence": asdict(self.divergence) if self.divergence else None,
            "unknown_events": self.unknown_events,
        }

    def render(self, limit: int = 10) -> str:
        """Lines for people: the count, then the differences by defect, then the first ``limit`` unexplained ones."""
        lines = [f"{self.file}: {self.matched} of {self.steps} steps equal to the kernel's"]
        if self.adopted:
            lines.append(
                f"  {self.adopted} steps depend on what came before the recording: adopted, not counted as equal"
            )
        by_defect: dict[str, list[StepDifference]] = {}
        for difference in self.differences:
            by_defect.setdefault(difference.defect or "not explained", []).append(difference)
        for name, found in by_defect.items():
            where = ", ".join(f"{d.n}:{d.field}" for d in found[:6]) + (" …" if len(found) > 6 else "")
            lines.append(f"  {name}: {len(found)} differences (step:field {where})")
        for d in by_defect.get("not explained", [])[:limit]:
            lines += [
                f"  step {d.n} (line {d.line}) {d.cmd}: {d.field}",
                f"    ours   {d.ours}",
                f"    kernel {d.kernel}",
            ]
        return "\n".join(lines)


def replay_steps(path: str | Path, *, boot: str | Path | None = None, defects: tuple[str, ...] = ()) -> StepsResult:
    """Replay the step file ``path``; ``boot`` defaults to ``NAME.boot.txt`` beside it. InputError for bad files."""
    file = load_steps(path)
    boot_path = Path(boot) if boot else boot_beside(file.path)
    on = tuple(defect.name for defect in defects_of(defects))
    result = _Replay(file, boot_path, on).run()
    missing = [defect.name for defect in defects_of(RECORDED_KERNEL) if defect.name not in on]
    if result.differences and missing:
        result.differences = _explain(file, boot_path, on, missing, result.differences)
    return result


def _explain(
    file: StepFile, boot: Path | None, on: tuple[str, ...], missing: list[str], found: list[StepDifference]
) -> list[StepDifference]:
    """Name each difference after the defects whose absence alone brings it about."""
    names: dict[tuple[int, str], list[str]] = {}
    for name in missing:
        others = (*on, *(other for other in missing if other != name))
        for difference in _Replay(file, boot, others).run().differences:
            names.setdefault((difference.line, difference.field), []).append(name)
    faithful = {(d.line, d.field) for d in _Replay(file, boot, (*on, *missing)).run().differences}
    named = []
    for d in found:
        key = (d.line, d.field)
        explanation = ", ".join(names.get(key, ())) if key not in faithful else None
        named.append(StepDifference(d.n, d.line, d.cmd, d.field, d.ours, d.kernel, explanation or None))
    return named


class _Replay:
    """One run of a file with one set of defects."""

    def __init__(self, file: StepFile, boot: Path | None, defects: tuple[str, ...]) -> None:
        self.file = file
        self.defects = defects
        self.bench = Bench(file, boot, defects)
        self.commands = Commands(self.bench)
        self.differences: list[StepDifference] = []
        self.unknown: dict[str, int] = {}
        self.before = UnknownState(file, self.bench)
        self.adopted = 0

    def run(self) -> StepsResult:
        matched = sum(self._step(step) for step in self.file.steps)
        return StepsResult(
            str(self.file.path),
            len(self.file.steps),
            matched,
            self.differences,
            adopted=self.adopted,
            defects=self.defects,
            unknown_events=self.unknown,
        )

    def _step(self, step: Step) -> bool:
        """Run and compare one step; True when every field is the kernel's."""
        recorded = separate(step.record.get("events", ()), step.record.get("after", ()))
        for name in recorded.unknown:
            self.unknown[name] = self.unknown.get(name, 0) + 1
        before = [flush for flush in recorded.flushes if self._fires_before(flush, recorded)]
        later = [flush for flush in recorded.flushes if flush not in before]
        adopted_so_far = self.before.adopted
        flushes = [self._fire(flush) for flush in before]
        found, adopted = self._command(step, recorded)
        flushes += [self._fire(flush) for flush in later]
        if self.before.adopted == adopted_so_far + adopted:  # no flush was adopted
            found += self._compare(step, {"after": flushes}, {"after": [flush.events for flush in before + later]})
        else:
            adopted = True
        self.differences += found
        self.adopted += adopted
        return not found and not adopted

    def _command(self, step: Step, recorded: KernelEvents) -> tuple[list[StepDifference], bool]:
        """Run the step's command; its differences, and whether it was adopted as depending on what came before."""
        self.before.prepare(step)
        if self.before.adopts_slot(step):
            return [], True
        hints = self.bench.hints()
        answer = self._skipped(step) if step.skipped and not self._runs_here(step) else self.commands.run(step)
        expected = self._expected(step, recorded)
        found = self._compare(step, answer, expected)
        if not found:
            if any(event[0] == "af_out" for event in recorded.own):
                self.before.saw_allocation(self._device(step))
            return [], False
        again = self._adopt(step, answer, recorded, hints, {difference.field for difference in found})
        if again is not None and self.before.adopts_allocation(self._device(step), answer["events"], recorded.own):
            self.before.adopted += 1
            left = {difference.field for difference in self._compare(step, again, expected)}
            return [difference for difference in found if difference.field in left], True
        if {difference.field for difference in found} == {"events"}:
            return (found, False) if not self.before.adopts_table(answer["events"], recorded.own) else ([], True)
        return found, False

    def _device(self, step: Step) -> Any:
        return self.bench.devices[int(step.words[2], 0)]

    def _fire(self, flush: Flush) -> list[Event]:
        """Let the timer run that ran here; what it did. The kernel's frees are adopted when they differ."""
        hints = self.bench.hints()
        owner = self.bench.owner_of_timer(flush.timer)
        ours = compared(self.bench.flush(flush.timer, flush.cpu))
        if owner is not None:
            self.before.adopts_flush(owner, ours, flush.events)
            step_adopt.adopt_frees(owner.iovad, flush.cpu, ours, flush.events, hints[owner.name])
            self.bench.take_events()
        return ours

    @staticmethod
    def _fires_before(flush: Flush, recorded: KernelEvents) -> bool:
        """Did the timer run before this call took effect? A flush that frees what the call queued ran after it."""
        if flush.position < 0:
            return False
        if flush.position == 0:
            return True
        unmapped = {event[1] >> 12 for event in recorded.own if event[0] == "unmap"}
        return bool(unmapped) and not unmapped & set(flush.freed())

    @staticmethod
    def _runs_here(step: Step) -> bool:
        """A skipped ``peek``/``fill`` is tried: it must find no translation here either."""
        return step.op in ("peek", "fill")

    @staticmethod
    def _skipped(step: Step) -> Answer:
        return {"skipped": step.record["skipped"], "events": [], "warn": []}

    @staticmethod
    def _expected(step: Step, recorded: KernelEvents) -> Answer:
        """The kernel's answer, in the fields of ours."""
        warned = [warning_function(text) for text in step.record.get("warn", ())]
        return {
            **step.record,
            "warn": [function for function in warned if function],
            "events": recorded.own,
            "after": None,
        }

    @staticmethod
    def _compare(step: Step, ours: Answer, kernel: Answer) -> list[StepDifference]:
        command = str(step.record["cmd"])
        return [
            StepDifference(step.n, step.line, command, key, ours.get(key), kernel.get(key))
            for key in FIELDS
            if ours.get(key) != kernel.get(key)
        ]

    def _adopt(
        self, step: Step, answer: Answer, recorded: KernelEvents, hints: dict[str, step_adopt.Hints], fields: set[str]
    ) -> Answer | None:
        """Bring the bench to the kernel's state after a step that differs in ``fields``.

        When that took another IOVA, the answer of the step that ran again.
        """
        again = None
        slot = self._slot(step)
        if "bytes" in fields and "phys" in answer:
            step_adopt.adopt_bytes(self.bench, answer["phys"], step.record["bytes"])
        if slot is None or slot.device < 0:
            return None
        device = self.bench.devices[slot.device]
        if "events" in fields:
            step_adopt.adopt_frees(device.iovad, step.cpu, answer["events"], recorded.own, hints[device.name])
        if {"addr", "ret", "out"} & fields and step.op in ("try", "map", "sg"):
            again = step_adopt.adopt_window(self.commands, slot, step, recorded.own)
        if "tr" in fields and "tr" in step.record:
            slot.base, slot.span = step.record["base"], step.record["span"]
            step_adopt.adopt_tables(self.bench, slot, step.record["tr"])
        self.bench.take_events()
        return again

    def _slot(self, step: Step) -> Slot | None:
        return self.bench.slot(step.words[1]) if step.op in _SLOT_OPS else None


_SLOT_OPS = frozenset({"try", "link", "sync", "unlink", "destroy", "free", "map", "unmap", "sg", "unsg", "look"})
