"""A recording's own corner of tracefs: one instance (a ring buffer of its own) and one group of dynamic events.

Both have the same name, ``dmakit0``, ``dmakit1`` …, the first that is free. The instance's directory is locked as
long as the recording lives; the kernel drops the lock when it dies, so a later recording can tell what is left over
and removes it. Making, naming and removing happen under a lock on ``instances``. Nobody else's tracing is touched:
the top-level trace, its clock, size and switches stay as they are.

``close`` undoes everything, tries each step again when the kernel refuses it once (an event can be busy for a
moment), goes on to the next step when it refuses again, and says at the end what is left and how to remove it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from dmakit.errors import HostError
from dmakit.trace.loss import CpuStats
from dmakit.trace.probes import Probe
from dmakit.trace.tracefs import Lock, Pipe, Tracefs

PREFIX = "dmakit"
_OURS = re.compile(rf"{PREFIX}\d+")
_DEFINED = re.compile(r"^([a-z])\d*:(\w+)/(\w+) ", re.MULTILINE)
_REASON = re.compile(r"error: (.*)\n\s+Command: (.*)")
_MANUAL = {"f": "<func-name>[%return]", "p": "place (kretprobe)"}
NO_PROBES = "this kernel has neither fprobe nor kprobe events (CONFIG_FPROBE_EVENTS, CONFIG_KPROBE_EVENTS)"
#: Marks of the top-level trace are copied into an instance with this option: and while that instance is switched off,
#: every such write fails with EBADF. So it is on only while we record.
COPY_MARKS = "options/copy_trace_marker"
OVERWRITE = "options/overwrite"
_TRIES = 5
_PAUSE = 0.02  # seconds before a refused step is tried again
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Refusal:
    """An event that this kernel does not have, and its reason."""

    event: str
    function: str
    reason: str


class Session:
    """Opened by ``with``: afterwards the events are set, tracing is off. ``switch(True)`` starts the recording."""

    def __init__(self, fs: Tracefs, *, pause: Callable[[float], object]) -> None:
        self.fs = fs
        self.name = ""
        self.refused: list[Refusal] = []
        self.present: list[str] = []
        self.swept: list[str] = []
        self._pause = pause
        self._defined: list[str] = []
        self._kprobes: list[str] = []
        self._static: list[str] = []
        self._misses: dict[str, int] = {}
        self._known: str | None = None
        self._lock: Lock | None = None
        self._pipe: Pipe | None = None

    # Life -----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Session:
        try:
            self._make()
        except BaseException:
            self.close(quiet=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(quiet=error is not None)

    def _make(self) -> None:
        naming = self._do(lambda: self.fs.lock("instances", wait=True), "lock instances")
        try:
            self._sweep()
            taken = {group for _, group, _ in self.dynamic()}
            taken.update(self._do(lambda: self.fs.names("instances"), "list instances"))
            name = next(f"{PREFIX}{n}" for n in range(len(taken) + 1) if f"{PREFIX}{n}" not in taken)
            self._do(lambda: self.fs.make(f"instances/{name}"), f"make instances/{name}")
            self.name = name
            self._lock = self._do(lambda: self.fs.lock(self.path(""), wait=False), f"lock instances/{name}")
        finally:
            if naming is not None:
                naming.release()
        self.write("tracing_on", "0")

    def _sweep(self) -> None:
        """Remove what dead recordings left: their instances are not locked, or gone."""
        names = self._do(lambda: self.fs.names("instances"), "list instances")
        alive = {name for name in names if _OURS.fullmatch(name) and not self._swept(f"instances/{name}")}
        for _, group, event in self.dynamic():
            if _OURS.fullmatch(group) and group not in alive and self._gone(f"{group}/{event}"):
                self.swept.append(f"{group}/{event}")

    def _swept(self, path: str) -> bool:
        """Remove an instance if its recording is dead; False when it lives, or somebody still reads it."""
        held = self._do(lambda: self.fs.lock(path, wait=False), f"lock {path}")
        if held is None:
            return False
        try:
            self._retried(lambda: self._remove_instance(path))
        except OSError:
            return False
        finally:
            held.release()
        self.swept.append(path)
        return True

    def _remove_instance(self, path: str) -> None:
        if self.fs.exists(f"{path}/{COPY_MARKS}"):
            self.fs.write(f"{path}/{COPY_MARKS}", "0")
        self.fs.write(f"{path}/tracing_on", "0")
        self.fs.write(f"{path}/events/enable", "0")
        self.fs.remove(path)

    def _gone(self, event: str) -> bool:
        """Remove a dynamic event; False when it is in use."""
        try:
            self._retried(lambda: self.fs.write("dynamic_events", f"-:{event}\n"))
        except OSError as error:
            return error.errno == errno.ENOENT
        return True

    def close(self, *, quiet: bool = False) -> None:
        """Remove everything; HostError for what cannot be removed, unless another error is on its way (``quiet``)."""
        if not self.name:
            return
        left: list[str] = []
        naming = self._attempt("", lambda: self.fs.lock("instances", wait=True), left)
        if self._pipe is not None:
            self._pipe.close()
        where = f"instances/{self.name}"
        self._attempt(f"rmdir {self.fs.where}/{where}", lambda: self._remove_instance(where), left)
        for event in self._defined:
            if not self._gone(event):
                left.append(f"echo '-:{event}' >> {self.fs.where}/dynamic_events")
        for lock in (self._lock, naming):
            if lock is not None:
                lock.release()
        self.name, self._defined, self._lock, self._pipe = "", [], None, None
        if left and not quiet:
            raise HostError(f"{self.fs.where}: could not be removed, it is in use: {'; '.join(left)}", errno.EBUSY)

    def _attempt(self, remedy: str, step: Callable[[], Answer], left: list[str]) -> Answer | None:
        try:
            return self._retried(step)
        except FileNotFoundError:
            return None
        except OSError:
            if remedy:
                left.append(remedy)
            return None

    def _retried(self, step: Callable[[], Answer]) -> Answer:
        for _ in range(_TRIES - 1):
            try:
                return step()
            except OSError as error:
                if error.errno == errno.ENOENT:
                    raise
                self._pause(_PAUSE)
        return step()

    # Set-up ---------------------------------------------------------------------------------------------------------

    def define(self, probes: Iterable[Probe], *, device: str = "") -> None:
        """Define and enable dynamic events; those that the kernel refuses go to ``refused``."""
        for probe in probes:
            reason = self._define(probe)
            if reason:
                self.refused.append(Refusal(probe.name, probe.function, reason))
                continue
            self.present.append(probe.name)
            if device and probe.names_device:
                self.write(f"events/{self.name}/{probe.name}/filter", f'dev == "{device}"\n')

    def _define(self, probe: Probe) -> str:
        """Why the kernel refuses the probe in both forms; empty when it has it."""
        event, reason = f"{self.name}/{probe.name}", ""
        forms = {"f": probe.fprobe(self.name), "p": probe.kprobe(self.name)}
        for definition in [forms[kind] for kind in self._kinds()]:
            self._defined.append(event)  # before the write: an interrupted one may have been made
            try:
                self.fs.write("dynamic_events", f"{definition}\n")
                self.fs.write(self.path(f"events/{event}/enable"), "1")
            except OSError as error:
                reason = reason or self._why(definition) or (error.strerror or str(error))
                if self._gone(event):
                    self._defined.pop()
                continue
            if not definition.startswith("f"):
                self._kprobes.append(probe.name)
            return ""
        return reason or NO_PROBES

    def _kinds(self) -> str:
        """The kinds of dynamic events on kernel functions that this kernel has, by its own manual: ``f``, ``p``."""
        if self._known is None:
            self._known = ""
            if self._do(lambda: self.fs.exists("dynamic_events"), "look for dynamic_events"):
                manual = self._do(lambda: self.fs.read("README"), "read README")
                self._known = "".join(kind for kind, words in _MANUAL.items() if words in manual)
        return self._known

    def _why(self, definition: str) -> str:
        """The kernel's own words for its latest refusal."""
        try:
            found = _REASON.findall(self.fs.read("error_log"))
        except OSError:
            return ""
        reason, command = found[-1] if found else ("", "")
        return reason if command.strip() == definition else ""

    def enable(self, groups: Iterable[str], *, device: str = "") -> None:
        """Enable the kernel's own events, ``group`` or ``group/event``; absent ones go to ``refused``."""
        for group in groups:
            if not self._enable(group, device):
                self.refused.append(Refusal(group, "", "this kernel has no such events"))

    def _enable(self, group: str, device: str) -> bool:
        path = self.path(f"events/{group}")
        if not self._do(lambda: self.fs.exists(f"{path}/enable"), f"look for {path}"):
            return False
        if device and group == "dma":
            self.write(f"events/{group}/filter", f'device == "{device}"\n')
        self.write(f"events/{group}/enable", "1")
        subsystem, _, event = group.partition("/")
        names = [event] if event else self._do(lambda: self.fs.names(path), f"list {path}")
        self.present += [name for name in names if name not in ("enable", "filter")]
        return True

    def dynamic(self) -> list[tuple[str, str, str]]:
        """(kind, group, event) of every dynamic event."""
        if not self._do(lambda: self.fs.exists("dynamic_events"), "look for dynamic_events"):
            return []
        return _DEFINED.findall(self._do(lambda: self.fs.read("dynamic_events"), "read dynamic_events"))

    def top(self, what: str, step: Callable[[Tracefs], Answer]) -> Answer:
        """Do something to the top-level trace; HostError when the kernel refuses."""
        return self._do(lambda: step(self.fs), what)

    # Use ------------------------------------------------------------------------------------------------------------

    def path(self, path: str) -> str:
        """A file of the instance."""
        return f"instances/{self.name}/{path}".rstrip("/")

    def read(self, path: str) -> str:
        """A file of the instance; HostError when it cannot be read."""
        return self._do(lambda: self.fs.read(self.path(path)), f"read {path}")

    def write(self, path: str, text: str) -> None:
        """Write a file of the instance; HostError when the kernel refuses."""
        self._do(lambda: self.fs.write(self.path(path), text), f"write {text.strip()!r} to {path}")

    def option(self, name: str, on: bool) -> bool:
        """Set an option of the instance where this kernel has it; whether it has."""
        if not self._do(lambda: self.fs.exists(self.path(name)), f"look for {name}"):
            return False
        self.write(name, "1" if on else "0")
        return True

    def switch(
        self, on: bool, *, first: Callable[[], None] = lambda: None, then: Callable[[], None] = lambda: None
    ) -> None:
        """Start or stop recording; marks that others write to the top-level trace are recorded too.

        ``first`` is called right before it starts, ``then`` right after, when no mark is recorded yet.
        """
        if on:
            self._misses = self._profile()
            first()
            self.write("tracing_on", "1")
            then()
            self.option(COPY_MARKS, True)
        else:
            self.option(COPY_MARKS, False)
            self.write("tracing_on", "0")

    def clear(self) -> None:
        """Forget what was recorded."""
        self._do(lambda: self.fs.clear(self.path("trace")), "clear trace")

    @property
    def recording(self) -> bool:
        """Whether the kernel records."""
        return self.read("tracing_on").strip() == "1"

    def drain(self, size: int) -> bytes:
        """Whole lines of recorded events, taken out of the buffer; empty when there are none (yet)."""
        if self._pipe is None:
            self._pipe = self._do(lambda: self.fs.pipe(self.path("trace_pipe")), "open trace_pipe")
        pipe = self._pipe
        return self._do(lambda: pipe.read(size), "read trace_pipe")

    def stats(self) -> dict[int, CpuStats]:
        """What each CPU's buffer holds and has lost."""
        names = self._do(lambda: self.fs.names(self.path("per_cpu")), "list per_cpu")
        return {int(name[3:]): CpuStats.parse(self.read(f"per_cpu/{name}/stats")) for name in names}

    def misses(self) -> dict[str, int]:
        """Calls that our kretprobes could not follow since the recording began, by event."""
        now = self._profile()
        return {name: now[name] - self._misses.get(name, 0) for name in now if now[name] > self._misses.get(name, 0)}

    def _profile(self) -> dict[str, int]:
        if not self._kprobes or not self.fs.exists("kprobe_profile"):
            return {}
        rows = [line.split() for line in self._do(lambda: self.fs.read("kprobe_profile"), "").splitlines()]
        return {row[0]: int(row[2]) for row in rows if len(row) == 3 and row[0] in self._kprobes}

    def _do(self, step: Callable[[], Answer], what: str) -> Answer:
        try:
            return step()
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, "")
            text = f"{self.fs.where}: {what}: {os.strerror(error.errno or 5)} ({code}){_cause(error.errno, what)}"
            raise HostError(text, error.errno or errno.EIO) from error


def _cause(number: int | None, what: str) -> str:
    """The likely cause of a refusal."""
    if number == errno.ENOMEM and "buffer_size" in what:
        return ": not enough memory for the buffers: a smaller --buffer"
    if number in (errno.EPERM, errno.EACCES):
        return ": needs root, and a kernel that is not locked down"
    if number == errno.EBUSY:
        return ": another tracer uses it"
    return ""
