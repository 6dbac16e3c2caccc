"""The file of a recording: ftrace text between two comments that say how it was made and whether it is complete.

    # tracer: nop
    # dmakit record: {"kernel": "7.2.12", "cpus": 2, "clock": "counter", "groups": [...], ...}     what is known before
    #                                _-----=> irqs-off/BH-disabled …                               the kernel's legend
    … events, as ``trace_pipe`` prints them …
    # dmakit record: {"complete": true, "events": 58885, "lost": 0, ...}                           what is known after
    # entries-in-buffer/entries-written: 58885/58885   #P:2                                        as the kernel's head

Any reader of ftrace text can read it. The last line counts lost events as written, so that readers which know
only that line see a loss too. A file without the end was cut off and is never taken for complete.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import zstandard

from dmakit.errors import HostError, InputError

_PREFIX = b"# dmakit record: "
_LONGEST_END = 1 << 20  # of the comments at the end that are looked at


class Sink(Protocol):
    """Where bytes go."""

    def write(self, data: bytes, /) -> object:
        """Take them."""


@dataclass
class Recording:
    """What the comments of a recording say; ``end`` is empty in a file that was cut off."""

    start: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)

    @property
    def cpus(self) -> int:
        """CPUs on line when the recording began; 0 when its head does not tell."""
        cpus = self.start.get("cpus")
        return cpus if isinstance(cpus, int) and cpus > 0 else 0

    @property
    def complete(self) -> bool:
        """Whether every event from start to end is in the file."""
        return self.end.get("complete") is True

    def notes(self) -> list[str]:
        """In words: who recorded, and what is missing."""
        start, lines = self.start, []
        lines.append(f"recorded by dmakit {start.get('dmakit', '')} on Linux {start.get('kernel', '?')}")
        if not self.end:
            lines.append("INCOMPLETE: the recording was cut off before its end")
        elif not self.complete:
            reasons = "; ".join(map(str, self.end.get("reasons", ())))
            lines.append(f"INCOMPLETE: {self.end.get('lost', 'some')} events were lost in recording ({reasons})")
        return lines


def comment(facts: dict[str, Any]) -> bytes:
    """The comment line that holds ``facts``."""
    return _PREFIX + json.dumps(facts, ensure_ascii=True).encode() + b"\n"


def cpus_on_line(legend: str) -> int | None:
    """CPUs on line, from what the kernel prints above its events; None when it does not tell."""
    found = re.search(r"#P:(\d+)", legend)
    return int(found[1]) if found else None


def head(legend: str, facts: dict[str, Any]) -> bytes:
    """The comments before the first event; ``legend``: what the kernel prints above its events."""
    lines = [line for line in legend.splitlines() if line.startswith("#") and "entries-in-buffer" not in line]
    first, rest = (lines[:1] or ["# tracer: nop"]), lines[1:]
    return "\n".join(first).encode() + b"\n" + comment(facts) + "".join(f"{line}\n" for line in rest).encode()


def tail(account: dict[str, Any], cpus: int) -> bytes:
    """The comments behind the last event."""
    events, lost = account["events"], account["lost"]
    counts = f"# entries-in-buffer/entries-written: {events}/{events + lost}   #P:{cpus}\n"
    return comment(account) + counts.encode()


def _facts(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line[len(_PREFIX) :])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def read_start(chunk: bytes) -> Recording | None:
    """From the first bytes of a file; None when dmakit did not record it."""
    at = 0
    while chunk[at : at + 1] == b"#":
        stop = chunk.find(b"\n", at)
        stop = len(chunk) if stop < 0 else stop
        if chunk.startswith(_PREFIX, at):
            return Recording(start=_facts(chunk[at:stop]))
        at = stop + 1
    return None


def end_comments(chunk: bytes) -> bytes:
    """The comment lines at the end of a chunk, empty when it ends otherwise."""
    at = len(chunk)
    while at > max(0, len(chunk) - _LONGEST_END):
        begin = chunk.rfind(b"\n", 0, at - 1) + 1
        if chunk[begin : begin + 1] != b"#":
            break
        at = begin
    return chunk[at:]


def read_end(recording: Recording, comments: bytes) -> None:
    """Take in what the comments at the end say."""
    for line in comments.splitlines():
        if line.startswith(_PREFIX):
            found = _facts(line)
            recording.end = found if "complete" in found else recording.end


# Writing ------------------------------------------------------------------------------------------------------------


def compressor(raw: BinaryIO, name: str) -> BinaryIO:
    """A writer into ``raw`` that compresses as the suffix of ``name`` says; closing it leaves ``raw`` open."""
    if name.endswith(".zst"):
        packed = zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False)
        return cast(BinaryIO, packed)
    if name.endswith(".xz"):
        return cast(BinaryIO, lzma.open(raw, "wb", preset=1))
    if name.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=3, filename=""))
    return cast(BinaryIO, _Plain(raw))


class _Plain:
    """No compression; closing flushes."""

    def __init__(self, raw: BinaryIO) -> None:
        self.write = raw.write
        self.close = raw.flush


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A writer for ``path``, which appears when all is written, or not at all. HostError when the host refuses."""
    handle, part = -1, ""
    try:
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:64]}.")
        with os.fdopen(handle, "wb") as raw:
            packed = compressor(raw, path.name)
            yield packed
            packed.close()
        Path(part).chmod(0o644)
        Path(part).replace(path)
        part = ""
    except OSError as error:
        raise HostError(f"{path}: cannot be written: {error.strerror or error}", error.errno or 5) from error
    finally:
        if part:
            Path(part).unlink(missing_ok=True)


def check_output(path: Path, *, force: bool = False) -> None:
    """Refuse, before anything is recorded, a place that cannot be written or holds a file already."""
    if path.is_dir() or not path.name:
        raise InputError(f"-o {path}: is a directory")
    if not path.parent.is_dir():
        raise InputError(f"-o {path}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"-o {path}: the directory {path.parent} cannot be written")
    if path.exists() and not force:
        raise InputError(f"-o {path}: the file exists (another name, or --force)")
