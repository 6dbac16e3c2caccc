"""What a scan counts about a whole file: lines of each sort, the header, and whether the file proves to be complete."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dmakit.errors import InputError
from dmakit.trace.recording import Recording, end_comments, read_end, read_start

if TYPE_CHECKING:
    from dmakit.trace.scanner import Scanner

_HEADER = re.compile(rb"entries-in-buffer/entries-written: (\d+)/(\d+)\s+#P:(\d+)")
_SHOWN = 5  # malformed lines kept with their text


@dataclass
class Totals:
    """Counts of lines; every line is one of ``records`` (understood), ``others``, ``notes`` and ``malformed``.

    ``bad``: the first malformed lines. ``header``: entries in the buffer, entries written, CPUs on line.
    ``recording``: what ``dmakit record`` wrote into the file about itself. ``marked``: events lost in marked places.
    """

    path: str
    lines: int = 0
    records: int = 0
    others: int = 0
    notes: int = 0
    malformed: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    seconds: bool = False
    header: tuple[int, int, int] | None = None
    recording: Recording | None = None
    marked: int = 0

    def scan(self, scanner: Scanner, chunk: bytes) -> None:
        """Let ``scanner`` scan the next chunk, and count what it found."""
        if self.lines == 0:
            self._read_header(chunk[:4096])
            self.recording = read_start(chunk)
        if self.recording is not None and (comments := end_comments(chunk)):
            self._read_header(comments)
            read_end(self.recording, comments)
        self.lines += scanner.scan(chunk, self.lines + 1)
        for begin, number in scanner.bad()[: _SHOWN - len(self.bad)] if scanner.malformed else ():
            text = chunk[begin : begin + 120].split(b"\n")[0].decode("utf-8", "replace").strip()
            self.bad.append((number, text))
        self.records += scanner.records
        self.others += scanner.others
        self.notes += scanner.notes
        self.malformed += scanner.malformed
        self.seconds = self.seconds or bool(scanner.seconds)

    def _read_header(self, text: bytes) -> None:
        if found := _HEADER.search(text):
            self.header = (int(found[1]), int(found[2]), int(found[3]))

    @property
    def online(self) -> int:
        """CPUs on line: by the header; where it is missing or not read yet (``dmakit record`` writes it at the end), by
        the recording's head; else 1."""
        if self.header is not None:
            return self.header[2]
        return (self.recording.cpus if self.recording is not None else 0) or 1

    @property
    def overwritten(self) -> bool:
        """Whether the header says that the ring buffer overwrote its oldest events, or (in a file by ``dmakit record``)
        lost more than its marks show the place of."""
        marked = self.marked if self.recording is not None else 0
        return self.header is not None and self.header[0] + marked < self.header[1]

    @property
    def whole(self) -> bool:
        """Whether the header is there and every event that it counts is in the file."""
        complete = self.recording is None or self.recording.complete
        return complete and self.header is not None and self.header[0] == self.header[1] <= self.records + self.others

    @property
    def malformed_text(self) -> str:
        """The malformed lines in words, the first few shown."""
        shown = "; ".join(f"line {number}: {text!r}" for number, text in self.bad)
        more = ", …" if self.malformed > len(self.bad) else ""
        return f"{self.malformed} malformed lines ({shown}{more})" if self.malformed else "no malformed line"

    def refuse_without_events(self, lost: int) -> None:
        """InputError when nothing was understood but ``lost`` markers of lost events."""
        if self.records - lost == 0:
            raise InputError(
                f"{self.path}: no recognised event in {self.lines} lines ({self.others} of unknown events, "
                f"{self.malformed_text}); expected ftrace text, see: dmakit record --help"
            )
