"""``dmakit record``: a workload under the kernel's own tracing, into a file that replay, compare and explain read.

``Recorder.run`` sets the events (``session``), takes the set-up that boot-time probes saw (``boot_part``), runs the
workload, and moves what the ring buffers hold into the file (``recording``). Two ways to do that:

* *buffered*: the buffers keep what came first, and are read when the workload has ended: writing the file disturbs
  nothing that is recorded. When they are too small, the file is exact up to the first loss.
* *stream*: they are emptied all the time, and keep what came last when that is too slow. For long recordings; what
  writing the file does to the machine is in the trace.

A recording that lost anything is written, marked, and never called complete. Whatever happens, everything that was set
is undone.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from dmakit.errors import HostError, InputError, UnsupportedError
from dmakit.trace.boot import boot_name
from dmakit.trace.events import EVENTS, NEEDS, missing_events
from dmakit.trace.fresh_domain import FreshDomain
from dmakit.trace.loss import Account, Marker
from dmakit.trace.probes import ALLOCATOR, BOOT_EVENTS, INVALIDATION, MAPPING, STATIC, STATIC_CALLS, Probe
from dmakit.trace.recording import check_output, cpus_on_line, head, new_file, tail
from dmakit.trace.session import OVERWRITE, Refusal, Session
from dmakit.trace.tracefs import Tracefs
from dmakit.trace.workload_run import Signals, Workload
from dmakit.units import KIB, MIB

SETS: dict[str, tuple[tuple[Probe, ...], tuple[str, ...]]] = {
    "all": (ALLOCATOR + MAPPING, STATIC),
    "replay": (ALLOCATOR + tuple(p for p in MAPPING if p.name == "alloc_out"), ()),
    "compare": (tuple(p for p in ALLOCATOR if p.name in ("af_out", "ff_in")) + MAPPING, ("dma", *STATIC[3:])),
    "calls": (ALLOCATOR + MAPPING + INVALIDATION, STATIC + STATIC_CALLS),
}
CLOCKS = ("counter", "mono", "boot", "global", "local")
LARGEST_BUFFER = 64 * MIB  # what a CPU's buffer is by default, memory permitting
_SHARE = 4  # of the free memory that all buffers together take by default
_STEP = 0.05  # seconds between two looks at the workload
_PIECE = 1 << 16
_MARKER = "DMAKIT_TRACE_MARKER"
BOOT_PROBE = ("p", "kp", "init")
_BOOT_EVENT = re.compile(rf" (?:{'|'.join(BOOT_EVENTS)}): \(")
_BEGINNINGS = 10

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Order:
    """What to record. ``buffer``: bytes for each CPU, 0 for the default; ``duration`` in seconds, None for no limit."""

    output: Path
    command: tuple[str, ...] = ()
    duration: float | None = None
    buffer: int = 0
    clock: str = "counter"
    stream: bool = False
    device: str = ""
    events: str = "all"
    force: bool = False
    fresh: tuple[FreshDomain, ...] = ()

    def check(self) -> None:
        """InputError for what no recording can do."""
        check_output(self.output, force=self.force)
        if self.duration is not None and not self.duration > 0:
            raise InputError(f"--duration {self.duration:g}: must be more than 0 seconds")
        if self.buffer and self.buffer < 16 * KIB:
            raise InputError(f"--buffer {self.buffer}: must be at least 16K")
        if '"' in self.device or "\n" in self.device:
            raise InputError(f"--device {self.device!r}: is no device name")
        for domain in self.fresh:
            domain.check()


@dataclass
class Outcome:
    """What came of it."""

    output: Path
    boot: Path | None
    account: Account
    seconds: float
    status: int
    signal: int
    refused: list[Refusal] = field(default_factory=list)
    lost_verbs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    size: int = 0
    left: str = ""

    def as_json(self) -> dict[str, Any]:
        """The object of ``--json``."""
        return {
            "file": str(self.output),
            "boot": str(self.boot) if self.boot else None,
            "bytes": self.size,
            "seconds": round(self.seconds, 3),
            "status": self.status,
            "refused": {r.event: r.reason for r in self.refused},
            "without_them": self.lost_verbs,
            "notes": self.notes,
            "left": self.left or None,
        } | self.account.as_json()


class Recorder:
    """One recording. ``facts``: what is known about the machine (``facts.machine_facts``)."""

    def __init__(self, fs: Tracefs, order: Order, facts: dict[str, Any], *, progress: Progress | None = None) -> None:
        self.fs = fs
        self.order = order
        self.facts = facts
        self.progress = progress or (lambda text, share: None)
        self.now = time.monotonic
        self.pause: Callable[[float], object] = time.sleep
        self.account = Account()
        self.notes: list[str] = []

    def run(self) -> Outcome:
        """Record. HostError or UnsupportedError when this machine cannot; InputError for a bad order."""
        self.order.check()
        outcome = None
        try:
            with Signals() as signals, Session(self.fs, pause=self.pause) as session:
                self._set_up(session)
                if signals.count:
                    raise KeyboardInterrupt
                outcome = self._recorded(session, signals)
        except HostError as error:
            if outcome is None:
                raise
            outcome.left = str(error)  # the file is written; what could not be undone is part of the outcome
        return outcome

    def _recorded(self, session: Session, signals: Signals) -> Outcome:
        workload = Workload(self.order.command, {_MARKER: f"{self.fs.where}/{session.path('trace_marker')}"})
        try:
            return self._record(session, workload, signals)
        finally:
            workload.stop()

    # Before ---------------------------------------------------------------------------------------------------------

    def _set_up(self, session: Session) -> None:
        order = self.order
        self.notes += [f"removed what an earlier recording left: {name}" for name in session.swept]
        session.write("trace_clock", order.clock)
        session.option(OVERWRITE, order.stream)
        session.write("buffer_size_kb", str((order.buffer or self._default_buffer(session)) // KIB))
        probes, static = SETS[order.events]
        session.enable(static, device=order.device)
        session.define(probes, device=order.device)
        if not session.present:
            why = session.refused[0].reason if session.refused else ""
            raise UnsupportedError(
                f"this kernel has none of the events to record ({why}): it needs CONFIG_FPROBE_EVENTS or "
                "CONFIG_KPROBE_EVENTS, and CONFIG_IOMMU_DMA for anything to happen"
            )

    @staticmethod
    def _default_buffer(session: Session) -> int:
        """Of each CPU: 64 MiB, or what leaves three quarters of the free memory free."""
        cpus = max(len(session.stats()), 1)
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return max(min(LARGEST_BUFFER, free // _SHARE // cpus), MIB)

    def _begin(self, session: Session) -> str:
        """Begin to record. Returns what probes on the kernel's command line saw before; the top-level trace keeps it.

        What an allocator does in the moment in which our own buffer takes over would be in neither trace or in both:
        such a beginning is taken back and tried again.
        """
        if BOOT_PROBE not in session.dynamic():
            session.switch(True)
            return ""
        text, quiet = self._take_over(session)
        for _ in range(_BEGINNINGS - 1):
            if quiet:
                break
            session.switch(False)
            session.clear()
            self.pause(_STEP)
            text, quiet = self._take_over(session)
        return self._boot_part(text, quiet)

    @staticmethod
    def _take_over(session: Session) -> tuple[str, bool]:
        """Start. The top-level trace up to then, and whether no allocator was at work at that moment."""

        def write(mark: str) -> None:
            session.top("write trace_marker", lambda fs: fs.write("trace_marker", f"{mark}\n"))

        mark = f"dmakit record {os.getpid()} {time.monotonic_ns()}"
        session.switch(True, first=partial(write, f"{mark} begins"), then=partial(write, f"{mark} began"))
        text = session.top("read trace", lambda fs: fs.read("trace"))
        before, begins, rest = text.partition(f"{mark} begins")
        return before if begins else "", _BOOT_EVENT.search(rest.partition(f"{mark} began")[0]) is None

    def _boot_part(self, text: str, quiet: bool) -> str:
        """The boot trace up to its last line, our mark; empty when its beginning or its end is not known."""
        lines = text.splitlines(keepends=True)[:-1]
        if not any(" init: " in line for line in lines):
            self.notes.append("the boot trace has overwritten its beginning: a larger trace_buf_size= keeps it longer")
            return ""
        if not quiet:
            self.notes.append(
                f"the boot trace is left out: {_BEGINNINGS} tries to begin, and allocators were at work in each"
            )
            return ""
        return "".join(lines)

    # During ---------------------------------------------------------------------------------------------------------

    def _record(self, session: Session, workload: Workload, signals: Signals) -> Outcome:
        order = self.order
        legend = session.read("trace")
        with new_file(order.output) as sink:
            cpus = cpus_on_line(legend) or len(session.stats())
            sink.write(head(legend, self._facts(session) | {"cpus": cpus}))
            marker = Marker()
            boot = self._begin(session)
            began = self.now()
            for domain in order.fresh:
                domain.renew()
            workload.start()
            self._watch(session, workload, signals, sink if order.stream else None, marker)
            self.account.switched_off = not session.recording
            session.switch(False)
            seconds = self.now() - began
            self._wait_out(workload, signals)
            self._empty(session, sink, marker, signals)
            self._settle(session, marker)
            account = self.account.as_json() | {"seconds": round(seconds, 3), "status": workload.status}
            sink.write(tail(account, cpus))
            boot_path = self._write_boot(boot)
        return self._outcome(session, workload, signals, seconds, boot_path)

    def _facts(self, session: Session) -> dict[str, Any]:
        order = self.order
        made = {
            "clock": order.clock,
            "mode": "stream" if order.stream else "buffered",
            "buffer_kb": session.read("buffer_size_kb").split()[0],
            "device": order.device,
            "command": list(order.command),
            "events": sorted(session.present),
            "refused": {r.event: r.reason for r in session.refused},
        }
        return self.facts | made

    def _watch(
        self, session: Session, workload: Workload, signals: Signals, sink: BinaryIO | None, marker: Marker
    ) -> None:
        """Until the command ends, the time is over or a signal comes; empties the buffers when there is a sink."""
        began = self.now()
        shown = 0.0
        while not workload.ended(_STEP if workload.process else 0):
            now = self.now()
            if signals.count:
                workload.ask(signals.first, now)
                if workload.process is None:
                    return
            if self.order.duration is not None and now - began >= self.order.duration:
                return
            if sink is not None:
                self._move(session, sink, marker)
            if now - shown >= 1:
                shown = now
                self.progress("recording", now - began)
            if workload.process is None:
                self.pause(_STEP)

    def _wait_out(self, workload: Workload, signals: Signals) -> None:
        """The time is over: the command may go on to its end."""
        while workload.process is not None and not workload.ended(_STEP):
            if signals.count:
                workload.ask(signals.first, self.now())

    def _move(self, session: Session, sink: BinaryIO, marker: Marker) -> bool:
        """Move what the buffers hold now; whether there was anything. Bounded, so that signals are seen."""
        some = False
        for _ in range(256):
            text = session.drain(_PIECE)
            if not text:
                return some
            some = True
            sink.write(marker.take(text))
        return some

    # After ----------------------------------------------------------------------------------------------------------

    def _empty(self, session: Session, sink: BinaryIO, marker: Marker, signals: Signals) -> None:
        """Move the rest, marking what was dropped. A signal here gives the file up."""
        stats = session.stats()
        total = sum(s.entries for s in stats.values())
        if not self.order.stream:
            dropped = {cpu: (s.entries, s.dropped) for cpu, s in stats.items() if s.dropped}
            rest = Marker(dropped)
            sink.write(rest.opening())
        else:
            rest = Marker()
        before = signals.count
        while self._move(session, sink, rest):
            self.progress("writing", rest.events / max(total, 1))
            if signals.count > before:
                raise KeyboardInterrupt
        marker.events += rest.events

    def _settle(self, session: Session, marker: Marker) -> None:
        """The final count."""
        self.account.by_cpu = session.stats()
        self.account.misses = session.misses()
        self.account.written = marker.events

    def _write_boot(self, text: str) -> Path | None:
        if not text:
            return None
        path = boot_name(self.order.output)
        with new_file(path) as sink:
            sink.write(text.encode())
        return path

    def _outcome(
        self, session: Session, workload: Workload, signals: Signals, seconds: float, boot: Path | None
    ) -> Outcome:
        aliases = {alias: event.name for event in EVENTS for alias in event.aliases}
        present = {aliases.get(name, name) for name in session.present} | {"mark"}
        verbs = NEEDS if self.order.events in ("all", "calls") else (self.order.events,)
        lost = [f"{verb}: {need.lost}" for verb in verbs for need in missing_events(present, verb)]
        return Outcome(
            output=self.order.output,
            boot=boot,
            account=self.account,
            seconds=seconds,
            status=workload.status,
            signal=signals.first,
            refused=session.refused,
            lost_verbs=lost,
            notes=self.notes,
            size=self.order.output.stat().st_size,
        )
