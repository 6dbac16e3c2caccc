"""A kernel's tracefs as an object: dynamic events, instances, ring buffers with the kernel's accounting, locks.

Semantics follow what tracefs does (``test_record_command.py`` records on a real one): a definition is refused with
EINVAL and a line in ``error_log``; an enabled event cannot be removed (EBUSY); an instance with an open file cannot be
removed (EBUSY); a buffer that overwrites leaves ``[LOST n EVENTS]`` in ``trace_pipe``, one that does not drops the
newest and leaves nothing. Every operation asks ``fail`` first.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from dmakit.failpoint import FailPoint

BYTES_OF_EVENT = 64
LEGEND = (
    "# tracer: nop\n#\n# entries-in-buffer/entries-written: 0/0   #P:{cpus}\n#\n"
    "#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION\n#              | |         |   |||||     |         |\n"
)
MANUALS = {"f": "\t   f[:[<group>/][<event>]] <func-name>[%return] [<args>]\n", "p": "   place (kretprobe): <symbol>\n"}
DEFINITION = re.compile(r"(f|p|r\d*):(\w+)/(\w+) (\w+)(%return)? ")


def refuse(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@dataclass
class Buffer:
    """One CPU's ring buffer: (stamp, line) not yet read."""

    events: list[tuple[int, str]] = field(default_factory=list)
    overrun: int = 0
    dropped: int = 0
    commit: int = 0
    read: int = 0
    told: int = 0  # of overrun, by [LOST n EVENTS]

    def stats(self) -> str:
        return (
            f"entries: {len(self.events)}\noverrun: {self.overrun}\ncommit overrun: {self.commit}\nbytes: 0\n"
            f"oldest event ts:     0.0\nnow ts:     0.0\ndropped events: {self.dropped}\nread events: {self.read}\n"
        )


@dataclass
class Instance:
    files: dict[str, str]
    buffers: list[Buffer]
    enabled: set[str] = field(default_factory=set)
    filters: dict[str, str] = field(default_factory=dict)
    opened: int = 0


class FakePipe:
    def __init__(self, fs: FakeTracefs, instance: Instance) -> None:
        self.fs, self.instance = fs, instance
        instance.opened += 1

    def read(self, size: int) -> bytes:
        self.fs.ask()
        out, length = [], 0
        while length < min(size, 8192) and any(b.events for b in self.instance.buffers):
            cpu, buffer = min(
                ((n, b) for n, b in enumerate(self.instance.buffers) if b.events), key=lambda item: item[1].events[0][0]
            )
            if buffer.overrun > buffer.told:
                out.append(f"CPU:{cpu} [LOST {buffer.overrun - buffer.told} EVENTS]\n")
                buffer.told = buffer.overrun
            out.append(buffer.events.pop(0)[1])
            buffer.read += 1
            length += len(out[-1])
        return "".join(out).encode()

    def close(self) -> None:
        self.instance.opened -= 1


class FakeLock:
    def __init__(self, fs: FakeTracefs, path: str) -> None:
        self.fs, self.path = fs, path
        fs.locks.add(path)

    def release(self) -> None:
        self.fs.locks.discard(self.path)


class FakeTracefs:
    """``functions``: what can be probed (all when None); ``kinds``: ``f``, ``p``; ``groups``: static events."""

    def __init__(
        self,
        *,
        cpus: int = 2,
        kinds: str = "fp",
        functions: set[str] | None = None,
        groups: dict[str, tuple[str, ...]] | None = None,
        old: bool = False,
    ) -> None:
        self.where = "/fake/tracing"
        self.cpus, self.kinds, self.functions, self.old = cpus, kinds, functions, old
        self.groups = {
            "iommu": ("map", "unmap"),
            "dma": ("dma_map_phys", "dma_unmap_phys"),
            "swiotlb": ("swiotlb_bounced",),
            "block": ("block_rq_issue", "block_rq_complete"),
        } if groups is None else groups  # fmt: skip
        self.fail = FailPoint()
        self.dynamic: dict[str, str] = {}
        self.instances: dict[str, Instance] = {}
        self.locks: set[str] = set()
        self.stuck: set[str] = set()  # paths of instances that cannot be removed
        self.errors = ""
        self.top_trace: list[str] | None = None  # lines of the boot trace; None without boot-time probes
        self.top_enabled: set[str] = set()
        self.marked: Callable[[str], None] = lambda text: None  # called when a mark was written to the top-level trace
        self.profile: dict[str, int] = {}
        self.stamp = 0

    @property
    def boot(self) -> tuple[str, ...]:
        """The probes of the kernel's command line."""
        return () if self.top_trace is None else ("p:kp/init init_iova_domain iovad=$arg1", "r10:kp/afr x pfn=$retval")

    # The kernel at work ---------------------------------------------------------------------------------------------

    def emit(self, cpu: int, event: str, *, line: str = "") -> None:
        """An event happens: every instance that records it has it, or loses it."""
        self.stamp += 1
        text = line or f"            task-{cpu + 100}     [{cpu:03d}] .....  {self.stamp:11d}: {event}\n"
        for instance in self.instances.values():
            if instance.files["tracing_on"] != "1":
                continue
            buffer = instance.buffers[cpu]
            if len(buffer.events) < int(instance.files["buffer_size_kb"]) * 1024 // BYTES_OF_EVENT:
                buffer.events.append((self.stamp, text))
            elif instance.files["options/overwrite"] == "1":
                buffer.events.pop(0)
                buffer.events.append((self.stamp, text))
                buffer.overrun += 1
            else:
                buffer.dropped += 1

    def state(self) -> tuple[object, ...]:
        """What a recording must leave as it found it."""
        opened = sum(instance.opened for instance in self.instances.values())
        return dict(self.dynamic), sorted(self.instances), sorted(self.locks), opened

    def ask(self) -> None:
        if self.fail.hit():
            raise refuse(errno.EIO)

    # The interface --------------------------------------------------------------------------------------------------

    def _inside(self, path: str) -> tuple[Instance, str]:
        _, name, rest = (*path.split("/", 2), "")[:3]
        if name not in self.instances:
            raise refuse(errno.ENOENT)
        return self.instances[name], rest

    def read(self, path: str) -> str:
        self.ask()
        if path.startswith("instances/"):
            instance, rest = self._inside(path)
            if rest == "trace":
                return LEGEND.format(cpus=self.cpus)
            if rest.startswith("per_cpu/"):
                return instance.buffers[int(rest.split("/")[1][3:])].stats()
            return instance.files[rest]
        return {
            "README": lambda: "tracing mini-HOWTO:\n" + "".join(MANUALS[kind] for kind in self.kinds),
            "dynamic_events": lambda: "".join(f"{text}\n" for text in (*self.boot, *self.dynamic.values())),
            "error_log": lambda: self.errors,
            "trace": lambda: "".join(self.top_trace or ()),
            "kprobe_profile": lambda: "".join(f"  {name} {7} {count}\n" for name, count in self.profile.items()),
        }[path]()

    def write(self, path: str, text: str) -> None:
        self.ask()
        if path == "dynamic_events":
            self._define(text.rstrip("\n"))
        elif path == "trace_marker":
            assert self.top_trace is not None
            for instance in self.instances.values():
                if instance.files["options/copy_trace_marker"] == "1" and instance.files["tracing_on"] != "1":
                    raise refuse(errno.EBADF)
            self.top_trace.append(f"  dmakit-1   [000] .....  9.0: tracing_mark_write: {text}")
            self.marked(text)
        else:
            instance, rest = self._inside(path)
            if rest.startswith("events/") and rest.endswith("/filter"):
                instance.filters[rest[7:-7]] = text.strip()
            elif rest.startswith("events"):
                self._enable(instance, rest[7:-7].strip("/"), text.strip())
            elif rest in instance.files:
                instance.files[rest] = text.strip()
                copied = instance.files["options/copy_trace_marker"] == "1"
                assert not copied or instance.files["tracing_on"] == "1", "everybody's marks would be refused"
            else:
                raise refuse(errno.ENOENT)

    def clear(self, path: str) -> None:
        self.ask()
        instance, rest = self._inside(path)
        assert rest == "trace"
        instance.buffers = [Buffer() for _ in range(self.cpus)]

    def _enable(self, instance: Instance, event: str, text: str) -> None:
        if not event:
            instance.enabled = set() if text == "0" else instance.enabled
        elif event in self.dynamic or event.split("/")[0] in self.groups:
            (instance.enabled.add if text == "1" else instance.enabled.discard)(event)
        else:
            raise refuse(errno.ENOENT)

    def _define(self, text: str) -> None:
        if text.startswith("-:"):
            event = text[2:]
            if event not in self.dynamic:
                raise refuse(errno.ENOENT)
            if event in self.top_enabled or any(event in instance.enabled for instance in self.instances.values()):
                raise refuse(errno.EBUSY)
            del self.dynamic[event]
            return
        found = DEFINITION.match(text)
        assert found, text
        kind, group, name, function, on_return = found.groups()
        assert bool(on_return) == (kind == "f" and name.endswith("_out"))
        reason = ""
        if kind[0].replace("r", "p") not in self.kinds:
            raise refuse(errno.EINVAL)
        if self.functions is not None and function not in self.functions:
            reason = "Invalid probed address or symbol"
        elif kind[0] == "r" and self.old and "$arg" in text:
            reason = "$arg* can be used only on function entry"
        if reason:
            self.errors += f"[  1.0] trace_kprobe: error: {reason}\n  Command: {text}\n           ^\n"
            raise refuse(errno.EINVAL)
        self.dynamic[f"{group}/{name}"] = text

    def names(self, path: str) -> list[str]:
        self.ask()
        if path == "instances":
            return sorted(self.instances)
        _, rest = self._inside(path)
        if rest == "per_cpu":
            return [f"cpu{cpu}" for cpu in range(self.cpus)]
        return sorted((*self.groups[rest[7:]], "enable", "filter"))

    def exists(self, path: str) -> bool:
        self.ask()
        if path == "dynamic_events":
            return bool(self.kinds)
        if path == "kprobe_profile":
            return "p" in self.kinds
        instance, rest = self._inside(path)
        if rest.startswith("events/"):
            group, _, event = rest[7:].removesuffix("/enable").partition("/")
            return group in self.groups and (not event or event in self.groups[group])
        return rest in instance.files

    def make(self, path: str) -> None:
        self.ask()
        name = path.split("/")[1]
        if name in self.instances:
            raise refuse(errno.EEXIST)
        files = {
            "tracing_on": "1", "trace_clock": "local", "buffer_size_kb": "1408", "options/overwrite": "1",
            "options/copy_trace_marker": "0",
        }  # fmt: skip
        self.instances[name] = Instance(files, [Buffer() for _ in range(self.cpus)])

    def remove(self, path: str) -> None:
        self.ask()
        instance, _ = self._inside(path)
        if instance.opened or path in self.stuck:
            raise refuse(errno.EBUSY)
        del self.instances[path.split("/")[1]]

    def lock(self, path: str, *, wait: bool) -> FakeLock | None:
        self.ask()
        if path != "instances":
            self._inside(path)
        if path in self.locks:
            assert not wait, "would wait for ever"
            return None
        return FakeLock(self, path)

    def pipe(self, path: str) -> FakePipe:
        self.ask()
        return FakePipe(self, self._inside(path)[0])
