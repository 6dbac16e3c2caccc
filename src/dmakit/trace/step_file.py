"""Step files: what the real DMA API answered, call by call.

A step file is JSON lines (plain or compressed). Each object is one command that a small kernel module ran and
what it answered: ``n`` the kernel's step number, ``cpu``, ``case`` a label, ``cmd`` the command, and the answers
(``ret``, ``addr``, ``size``, ``tr``, ``out``, ``bytes``, ``warn`` …). ``events`` are the tracepoints seen between the
call's begin and end, ``after`` those between its end and the next call: ``[clock, cpu, name, text]``. ``wait``,
``leaf`` and skipped commands share the number of the call before them, so a step is known by its line.

Vocabulary: a *slot* (``S``) holds one mapping of the module, a *device number* (``D``) one of its devices, a buffer
``bN`` was allocated by ``buf``; ``tN+OFF`` in ``line`` is the physical address behind slot N at that offset.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmakit.errors import InputError
from dmakit.trace.archive import read_all

Record = dict[str, Any]

#: Commands of a step file and the least number of words each has.
COMMANDS = {
    "dev": 3, "mask": 3, "seg": 4, "minalign": 3, "buf": 3, "fill": 4, "peek": 3, "try": 5, "link": 7, "sync": 4,
    "unlink": 6, "destroy": 5, "free": 2, "map": 7, "unmap": 2, "sg": 5, "unsg": 2, "look": 2, "wait": 2, "leaf": 2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """One line: ``line`` (from 1), ``n``, ``cpu``, ``words`` of the command, and the whole ``record``."""

    line: int
    n: int
    cpu: int
    words: tuple[str, ...]
    record: Record

    @property
    def op(self) -> str:
        """The command's name."""
        return self.words[0]

    @property
    def skipped(self) -> bool:
        """True when the recorder could not run this command."""
        return "skipped" in self.record


@dataclass(frozen=True, slots=True)
class StepFile:
    """All steps of one file, in order."""

    path: Path
    steps: tuple[Step, ...]

    def events(self) -> list[list[Any]]:
        """Every recorded event of the file, in order."""
        return [event for step in self.steps for key in ("events", "after") for event in step.record.get(key, ())]


def read_text(path: Path) -> str:
    """The text of a plain or compressed file; InputError when it cannot be read."""
    data = read_all(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text: byte {error.start} is not UTF-8") from None


def is_step_file(path: str | Path) -> bool:
    """Whether the first line of the file is a step (the dispatch of ``dmakit replay``)."""
    first = next((line for line in read_text(Path(path)).splitlines() if line.strip()), "")
    return is_step_record(first)


def is_step_record(line: str) -> bool:
    """True when a line of JSON is a step (it has ``n`` and ``cmd``), which tells step files from other JSON lines."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and "cmd" in record and "n" in record


def load_steps(path: str | Path) -> StepFile:
    """Read a step file; InputError names the first line that is not a step."""
    path = Path(path)
    steps = [_step(path, i, line) for i, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    if not steps:
        raise InputError(f"{path}: no step in it: a step file has one JSON object a line")
    return StepFile(path, tuple(steps))


def _step(path: Path, number: int, text: str) -> Step:
    where = f"{path}:{number}"
    try:
        record = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("cmd"), str) or not isinstance(record.get("n"), int):
        raise InputError(f"{where}: not a step: it needs a number n and a text cmd")
    words = tuple(record["cmd"].split())
    if not words or words[0] not in COMMANDS:
        raise InputError(f"{where}: unknown command {record['cmd']!r}: one of {', '.join(COMMANDS)}")
    if len(words) < COMMANDS[words[0]] and "skipped" not in record:
        raise InputError(f"{where}: command {record['cmd']!r} needs {COMMANDS[words[0]]} words")
    return Step(number, record["n"], int(record.get("cpu", 0)), words, record)
