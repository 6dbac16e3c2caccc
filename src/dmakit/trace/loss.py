"""Lost events: what the kernel counts of them, and where in the text of a trace each loss belongs.

The kernel counts by CPU: ``overrun`` (overwritten before anybody read them: the oldest go), ``commit overrun`` (an
interrupt filled the buffer inside another event), ``dropped events`` (a buffer that keeps the oldest was full: the
newest go), and for kretprobes misses (more calls under way than it can follow). Overwritten events leave a line
``CPU:1 [LOST 12 EVENTS]`` where they were. Dropped ones leave nothing; since a full buffer stays full until somebody
reads it, they all come behind that CPU's last event, and ``Marker`` puts the line there: everything before the line
is a complete record. The other kinds have no place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_COUNT = re.compile(r"^(entries|overrun|commit overrun|dropped events|read events): (\d+)", re.MULTILINE)
_CPU = re.compile(rb"^.{0,40}?-\d+ +(?:\([ \d-]+\) +)?\[(\d+)\] ")
_LOST = re.compile(rb"^CPU:\d+ \[(?:LOST )?(\d+) EVENTS", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class CpuStats:
    """One CPU's ring buffer: events in it, read from it, and lost by kind."""

    entries: int = 0
    overrun: int = 0
    commit_overrun: int = 0
    dropped: int = 0
    read: int = 0

    @classmethod
    def parse(cls, text: str) -> CpuStats:
        """From the text of ``per_cpu/cpuN/stats``."""
        found = {key: int(value) for key, value in _COUNT.findall(text)}
        names = ("entries", "overrun", "commit overrun", "dropped events", "read events")
        return cls(*(found.get(name, 0) for name in names))


@dataclass
class Account:
    """What a recording wrote and what it lost. ``by_cpu`` as at its end, ``misses`` by kretprobe."""

    by_cpu: dict[int, CpuStats] = field(default_factory=dict)
    misses: dict[str, int] = field(default_factory=dict)
    switched_off: bool = False
    written: int = 0

    @property
    def lost(self) -> int:
        """All events that are known to be lost."""
        buffers = sum(s.overrun + s.commit_overrun + s.dropped for s in self.by_cpu.values())
        return buffers + sum(self.misses.values()) + self.unwritten

    @property
    def unwritten(self) -> int:
        """Events that the kernel handed out and the file does not have (0 unless something is broken)."""
        return max(sum(s.read for s in self.by_cpu.values()) - self.written, 0)

    @property
    def complete(self) -> bool:
        """Whether every event from the first to the last is in the file."""
        return not self.lost and not self.switched_off

    def reasons(self) -> list[str]:
        """In words, a line for each way in which the recording is not complete."""
        lines = []
        for cpu, stats in sorted(self.by_cpu.items()):
            kinds = (("overwritten", stats.overrun), ("dropped", stats.dropped), ("nested", stats.commit_overrun))
            lost = [f"{count} {name}" for name, count in kinds if count]
            if lost:
                lines.append(f"CPU {cpu}: {', '.join(lost)}")
        lines += [f"{name}: {count} calls not followed" for name, count in sorted(self.misses.items()) if count]
        if self.unwritten:
            lines.append(f"{self.unwritten} events that the kernel counted were not in what it printed")
        if self.switched_off:
            lines.append("somebody else switched the recording off before its end")
        return lines

    def remedy(self) -> str:
        """What to do about it; empty when there is nothing to do."""
        if self.complete:
            return ""
        if self.switched_off:
            return "look for a traceoff trigger or a kernel warning, and record again"
        if any(self.misses.values()):
            return "record again on a kernel with fprobe events (CONFIG_FPROBE_EVENTS)"
        return "record again with a larger --buffer, with --stream, or with less: --device, --only, a shorter run"

    def as_json(self) -> dict[str, object]:
        """For the end of the file and for ``--json``."""
        return {
            "complete": self.complete,
            "events": self.written,
            "lost": self.lost,
            "reasons": self.reasons(),
            "by_cpu": {str(cpu): {name: getattr(s, name) for name in s.__slots__} for cpu, s in self.by_cpu.items()},
        }


class Marker:
    """Passes trace text on, counts its events, and marks where the ``dropped`` ones of each CPU would have been.

    ``dropped``: CPU to (events in its buffer, events dropped behind them); empty while buffers are being emptied.
    """

    def __init__(self, dropped: Mapping[int, tuple[int, int]] | None = None) -> None:
        self.events = 0
        self._left = {cpu: entries for cpu, (entries, _) in (dropped or {}).items()}
        self._dropped = {cpu: lost for cpu, (_, lost) in (dropped or {}).items()}

    def opening(self) -> bytes:
        """The marks of CPUs whose buffer held nothing at all."""
        return b"".join(self._line(cpu) for cpu, left in sorted(self._left.items()) if not left)

    def _line(self, cpu: int) -> bytes:
        return b"CPU:%d [LOST %d EVENTS]\n" % (cpu, self._dropped[cpu])

    def take(self, text: bytes) -> bytes:
        """Whole lines in, the same lines with marks out."""
        self.events += text.count(b"\n") - len(_LOST.findall(text))
        if not self._left:
            return text
        lines = []
        for line in text.splitlines(keepends=True):
            lines.append(line)
            found = _CPU.match(line)
            cpu = int(found[1]) if found else -1
            if cpu in self._left:
                self._left[cpu] -= 1
                if not self._left[cpu]:
                    lines.append(self._line(cpu))
        return b"".join(lines)
