"""The kernel's events of a step, as the tuples that our machine records.

The recorder keeps the text of each tracepoint. ``parse`` turns it into the tuple of ``docs/design/contracts.md``
(kernel pointers are dropped: they name objects, not behaviour). Events that repeat what another event says are left
out: ``all_in`` (the ``flush_range`` over everything), ``fi_in``/``xfi_in`` (the ``ff_in`` of an uncacheable size),
``magfree_in`` (a magazine returned to the tree, seen in the next allocations), ``bounce_in`` (seen in the bytes).

A flush queue's timer fires on its own, so its events are taken out of the call that it interrupted: a ``Flush`` holds
what the timer did and how many of the call's own events had been seen before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from dmakit.errors import InputError

Event = tuple[Any, ...]

SILENT = frozenset({"all_in", "fi_in", "xfi_in", "magfree_in", "bounce_in", "fqto_in", "fqto_out"})
FLUSH_KINDS = frozenset({"flush_range", "qi", "ff_in"})


def _pattern(name: str, text: str) -> tuple[str, re.Pattern[str]]:
    return name, re.compile(text)


_HEX = r"(0x[0-9a-f]+)"
_RANGE = rf".*\[{_HEX}-{_HEX}\] addr {_HEX} mask {_HEX}"
_PATTERNS: dict[str, tuple[str, re.Pattern[str]]] = {
    "af_out": _pattern("af_out", rf".*size=(\d+) limit={_HEX} pfn={_HEX}"),
    "ff_in": _pattern("ff_in", rf".*pfn={_HEX} size=(\d+)"),
    "map": _pattern("map", rf".*iova={_HEX} - 0x[0-9a-f]+ paddr={_HEX} size=(\d+)"),
    "unmap": _pattern("unmap", rf".*iova={_HEX} - 0x[0-9a-f]+ size=(\d+) unmapped_size=(\d+)"),
    "syncmap_in": _pattern("syncmap_in", rf".*iova={_HEX} size=(\d+)"),
    "tlbsync_in": _pattern("tlbsync_in", rf".*start={_HEX} end={_HEX} .*queued=(\d+)"),
    "cache_tag_flush_range": _pattern("flush_range", _RANGE),
    "cache_tag_flush_range_np": _pattern("flush_range_np", _RANGE),
    "qi_submit": _pattern("qi", rf".*?: {_HEX} {_HEX} "),
    "swiotlb_bounced": _pattern("swiotlb_bounced", r".*dev_addr=([0-9a-f]+) size=(\d+)"),
    "tblmap_out": _pattern("tblmap", rf".*phys={_HEX} size=(\d+) .*ret={_HEX}"),
    "tblunmap_in": _pattern("tblunmap", rf".*tlb={_HEX} size=(\d+)"),
    "blink_in": _pattern("blink", rf".*addr={_HEX} phys={_HEX} len=(\d+)"),
}
#: The events that a comparison looks at.
COMPARED = frozenset(name for name, _ in _PATTERNS.values())


def parse(name: str, text: str) -> Event | None:
    """The tuple of one recorded event, None for an event that is not compared; InputError when its text is strange."""
    known = _PATTERNS.get(name)
    if known is None:
        return None
    match = known[1].match(text)
    if match is None:
        raise InputError(f"event {name}: unexpected text {text!r}")
    base: Callable[[str], int] = _hex if name == "swiotlb_bounced" else _number
    first, *rest = match.groups()
    return (known[0], base(first), *(_number(value) for value in rest))


def _number(text: str) -> int:
    return int(text, 0)


def _hex(text: str) -> int:
    return int(text, 16)


@dataclass(slots=True)
class Flush:
    """One run of a flush queue's timer: ``position`` own events came before it (−1: it ran after the call)."""

    cpu: int
    position: int
    timer: int = 0
    events: list[Event] = field(default_factory=list)

    def freed(self) -> list[int]:
        """The pfns that the flush returned to the allocator."""
        return [event[1] for event in self.events if event[0] == "ff_in"]


@dataclass(slots=True)
class KernelEvents:
    """What one step caused: its ``own`` events in order, the ``flushes`` of timers, and names that nobody knows."""

    own: list[Event] = field(default_factory=list)
    flushes: list[Flush] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def separate(events: Iterable[list[Any]], after: Iterable[list[Any]]) -> KernelEvents:
    """Split the recorded events of a step into its own and those of timers (a timer runs on one CPU)."""
    result = KernelEvents()
    running: dict[int, Flush] = {}
    for inside, batch in ((True, events), (False, after)):
        for _, cpu, name, text in batch:
            if name == "fqto_in":
                running[cpu] = Flush(cpu, len(result.own) if inside else -1, _timer(text))
                result.flushes.append(running[cpu])
                continue
            if name == "fqto_out":
                running.pop(cpu, None)
                continue
            event = parse(name, text)
            if event is None:
                if name not in SILENT:
                    result.unknown.append(name)
                continue
            if event[0] not in FLUSH_KINDS:
                running.pop(cpu, None)  # the timer's end was not recorded
            (running[cpu].events if cpu in running else result.own).append(event)
    return result


def _timer(text: str) -> int:
    match = re.search(r"timer=(0x[0-9a-f]+)", text)
    return int(match[1], 16) if match else 0


def warning_function(text: str) -> str:
    """The kernel function of a WARNING: ``WARNING: at f+0x1/0x2, CPU…`` and our ``f: reason`` give ``f``; else ''."""
    match = re.match(r"WARNING: .*?at ([A-Za-z_]\w*)|([A-Za-z_]\w*): ", text)
    return (match[1] or match[2]) if match else ""
