"""DMA API calls in a kernel trace, in the order in which they took effect.

A call shows itself at its return (``try_out``, ``link_out``, ``mp_out`` …, with its result) or at its entry
(``ump_in``, ``destroy_in`` …, everything it does follows). A call that returns late takes its place where its effect is
seen: in caching mode where it syncs (``syncmap_in``: that is its invalidation), else where it got its IOVA
(``af_out``); what an interrupt does between that and the return comes after it. Timers stand where they fired.

Scatterlists: ``dma_map_sg`` names every entry's address and every output segment. Input lengths are in the recorder's
dump of the first entries (words: ``page_link``, offset and length, DMA address, DMA length); a list that is longer or
chained is *inferred*: inside one physically contiguous ``map`` an entry ends where the next begins, and the last one
where the map ends (exact when entries end on pages).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmakit.trace.columns import Trace, load
from dmakit.trace.step_events import Event

Segment = tuple[int, int]
Task = tuple[int, int]

#: Return events of calls, by kind.
RETURNS = {
    "try_out": "try",
    "link_out": "link",
    "sync_out": "sync",
    "mp_out": "map",
    "mapsg_out": "sg",
    "al_out": "alloc",
}
#: Kinds that sync, and kinds that allocate: what an interrupt does after that comes after the call.
SYNCING = frozenset({"sync", "map", "sg", "alloc"})
ALLOCATING = frozenset({"try", "map", "sg", "alloc"})
ENTRIES = {
    "unlink_in": "unlink",
    "destroy_in": "destroy",
    "dfree_in": "free",
    "ump_in": "unmap",
    "umsg_in": "unsg",
    "fr_in": "release",
    "fqto_in": "timer",
}
SG_WORDS = 4  # 64-bit words of one scatterlist entry: page_link, offset and length, DMA address, DMA length and flags
SG_CHAIN = 1  # page_link bit: the entry links to another table


#: What a compared event is made of: its name in our machine's vocabulary and the trace's columns.
EVENTS = {
    "ff_in": ("ff_in", "pfn", "size"),
    "map": ("map", "iova", "paddr", "size"),
    "unmap": ("unmap", "iova", "size", "unmapped"),
    "syncmap_in": ("syncmap_in", "iova", "size"),
    "tlbsync_in": ("tlbsync_in", "start", "end", "queued"),
    "cache_tag_flush_range": ("flush_range", "start", "end", "addr", "mask"),
    "cache_tag_flush_range_np": ("flush_range_np", "start", "end", "addr", "mask"),
    "qi_submit": ("qi", "qw0", "qw1"),
    "swiotlb_bounced": ("swiotlb_bounced", "dev_addr", "size"),
    "tblmap_out": ("tblmap", "phys", "size", "ret"),
    "tblunmap_in": ("tblunmap", "tlb", "size"),
    "blink_in": ("blink", "addr", "phys", "len"),
}
WORDS = frozenset({"dev", "type", "iommu", "force"})
OTHERS = ("af_out", "mapsg_in", "dma_map_sg", "fqto_out", "all_in", "attach_device_to_domain")


@dataclass(slots=True)
class Row:
    """One event: its stamp, CPU, task's pid, name, numbers and words by column, and its lists."""

    stamp: int
    cpu: int
    pid: int
    name: str
    numbers: dict[str, int]
    words: dict[str, str]
    lists: dict[str, list[int]]

    @property
    def task(self) -> Task:
        """Who ran: a task keeps its pid when it moves to another CPU, the idle tasks (pid 0) are told by CPU."""
        return self.pid, self.cpu if self.pid == 0 else -1


@dataclass(slots=True)
class Call:
    """One call (or timer): ``kind``, the device's name, numbers by name; for scatterlists entries, segments, maps."""

    kind: str
    stamp: int
    cpu: int
    device: str = ""
    numbers: dict[str, int] = field(default_factory=dict)
    inputs: list[Segment] = field(default_factory=list)
    outputs: list[Segment] = field(default_factory=list)
    runs: list[Segment] = field(default_factory=list)
    inferred: bool = False

    def __getitem__(self, name: str) -> int:
        return self.numbers[name]


@dataclass(slots=True)
class CallTrace:
    """What ``read_calls`` found: calls in order, (CPU, compared event) in order, the cause of each invalidation.

    ``attached``: devices in the order in which they got a new domain inside the trace.
    """

    path: Path
    calls: list[Call] = field(default_factory=list)
    events: list[tuple[int, Event]] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    other_descriptors: int = 0
    names: set[str] = field(default_factory=set)
    bounced: set[str] = field(default_factory=set)
    attached: tuple[str, ...] = ()
    highest_phys: int = 0
    malformed: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def caching_mode(self) -> bool:
        """Did the recorded IOMMU cache entries that are not present?"""
        return bool(self.names & {"cflushnp_in", "cache_tag_flush_range_np"})


def rows(trace: Trace) -> Iterator[Row]:
    """The events that calls are made of, in order."""
    names = (*RETURNS, *ENTRIES, *EVENTS, *OTHERS)
    places = [(seq, name, i) for name in names for i, seq in enumerate(trace.table(name).seq.tolist())]
    for _, name, i in sorted(places):
        yield _row(trace, name, i)


def _row(trace: Trace, name: str, i: int) -> Row:
    table = trace.table(name)
    row = Row(int(table.stamp[i]), int(table.cpu[i]), int(table.pid[i]), name, {}, {}, {})
    for column, values in table.fields.items():
        if f"{column}.count" in table.fields:
            row.lists[column] = trace.elements(table, column, i)
        elif column in WORDS:
            row.words[column] = trace.word(int(values[i]))
        else:
            row.numbers[column] = int(values[i])
    return row


def read_calls(path: str | Path) -> CallTrace:
    """Calls and compared events of the trace ``path``; InputError when it cannot be read."""
    scanned = load(path)
    reader = _Reader(CallTrace(Path(path), names=set(scanned.present()), malformed=scanned.malformed))
    if scanned.recording is not None:
        reader.trace.facts = scanned.recording.start
    for row in rows(scanned):
        reader.add(row)
    return reader.finish()


class _Reader:
    """Collects rows into calls: a stack per task, since an interrupt's calls nest inside what it interrupted."""

    def __init__(self, trace: CallTrace) -> None:
        self.trace = trace
        self._mark = "syncmap_in" if trace.caching_mode else "af_out"
        self._placed: dict[Task, list[int]] = {}  # by task: indices of places that wait for their call's return
        self._calls: list[Call | None] = []
        self._trigger: dict[Task, str] = {}  # by task: what the next invalidation will be caused by
        self._last_call: dict[Task, str] = {}
        self._timer: dict[Task, bool] = {}
        self._maps: dict[Task, list[Segment]] = {}  # by task: (phys, size) of the maps of the call under way
        self._map_places: dict[Task, list[int]] = {}  # by task: where those maps are in ``trace.events``
        self._ignored: set[int] = set()
        self._entry: dict[Task, dict[str, int]] = {}  # by task: direction and attributes, seen only at map_sg's entry
        self._unsg: dict[Task, Call] = {}  # by task: an unmap_sg whose IOVA its first unmap will name
        self._context: dict[Task, int] = {}  # by task: the domain id of a context-cache invalidation just before
        self._sg: dict[Task, Call] = {}  # by task: the latest dma_map_sg, until its event has named the addresses

    def add(self, row: Row) -> None:
        """Take in one event."""
        if row.name == self._mark and row.numbers.get("pfn", 1):
            self._placed.setdefault(row.task, []).append(len(self._calls))
            self._calls.append(None)
        elif row.name in RETURNS:
            self._returned(row, RETURNS[row.name])
        elif row.name in ENTRIES:
            self._entered(row, ENTRIES[row.name])
        elif row.name == "attach_device_to_domain":
            self.trace.attached = tuple(dict.fromkeys((*self.trace.attached, row.words["dev"])))
        elif row.name == "mapsg_in":
            self._entry[row.task] = row.numbers
        elif row.name == "dma_map_sg" and row.task in self._sg:
            _name_segments(self._sg.pop(row.task), row.lists)
        if row.name == "qi_submit" and not self._of_calls(row):
            self.trace.other_descriptors += 1
            return
        self._invalidation(row)
        if row.name in EVENTS:
            name, *columns = EVENTS[row.name]
            self._event(row, (name, *(row.numbers[column] for column in columns)))

    def _of_calls(self, row: Row) -> bool:
        """Whether a descriptor invalidates IOTLB entries because of a mapping call.

        A device that joins or leaves a domain has its context entry invalidated, and at once the whole domain
        (``intel_context_flush_no_pasid``): that is no call's.
        """
        before = self._context.pop(row.task, -1)
        domain = row.numbers["qw0"] >> 16 & 0xFFFF
        if row.words["type"] == "cc_inv":
            self._context[row.task] = domain
        return row.words["type"] == "iotlb_inv" and domain != before

    def _event(self, row: Row, event: Event) -> None:
        self.trace.events.append((row.cpu, event))
        if event[0] == "tblmap":
            self.trace.bounced.add(row.words["dev"])
        elif event[0] == "unmap" and row.task in self._unsg:
            self._unsg.pop(row.task).numbers["iova"] = event[1]
        elif event[0] == "map":
            self._maps.setdefault(row.task, []).append((event[2], event[3]))
            self._map_places.setdefault(row.task, []).append(len(self.trace.events) - 1)
            self.trace.highest_phys = max(self.trace.highest_phys, event[2] + event[3])

    def _returned(self, row: Row, kind: str) -> None:
        call = Call(kind, row.stamp, row.cpu, row.words["dev"], row.numbers)
        places = self._placed.get(row.task, [])
        if places and kind in (SYNCING if self.trace.caching_mode else ALLOCATING):
            self._calls[places.pop()] = call
        else:
            self._calls.append(call)
        if kind == "sg":
            self._scatterlist(row, call)
        if kind == "alloc":  # coherent memory lies at pages of its own here: its maps are not compared
            self._ignored.update(self._map_places.get(row.task, ()))
        self._forget_maps(row.task)

    def _forget_maps(self, task: Task) -> None:
        self._maps.pop(task, None)
        self._map_places.pop(task, None)

    def _entered(self, row: Row, kind: str) -> None:
        call = Call(kind, row.stamp, row.cpu, row.words.get("dev", ""), row.numbers)
        self._calls.append(call)
        self._forget_maps(row.task)
        if kind == "unsg":
            self._unsg[row.task] = call
        if kind == "timer":
            self._timer[row.task] = True
        else:
            self._last_call[row.task] = kind

    def _scatterlist(self, row: Row, call: Call) -> None:
        """Lengths of the input entries, from the dump where it holds the whole list, else from the maps."""
        call.numbers = {**self._entry.pop(row.task, {}), **row.numbers}
        words = row.lists["sg"]
        entries = [words[i : i + SG_WORDS] for i in range(0, len(words) - SG_WORDS + 1, SG_WORDS)][: call["nents"]]
        whole = len(entries) == call["nents"] and not any(entry[0] & SG_CHAIN for entry in entries)
        call.inferred = not whole
        call.runs = self._maps.get(row.task, [])
        call.inputs = [(0, entry[1] >> 32) for entry in entries] if whole else call.runs
        self._sg[row.task] = call

    def _invalidation(self, row: Row) -> None:
        """Follow what the next IOTLB invalidation of this task will be for, and note it when it comes."""
        if row.name == "fqto_out":
            self._timer[row.task] = False
        elif row.name == "all_in":
            self._trigger[row.task] = "flush queue timer" if self._timer.get(row.task) else "flush queue full"
        elif row.name == "tlbsync_in":
            self._trigger[row.task] = self._last_call.get(row.task, "unmap")
        elif row.name == "syncmap_in":
            self._trigger[row.task] = "map-side sync"
        elif row.name == "qi_submit":
            self.trace.causes.append(self._trigger.pop(row.task, ""))

    def finish(self) -> CallTrace:
        """The trace; a place whose call's return was not recorded has no call."""
        self.trace.events = [event for i, event in enumerate(self.trace.events) if i not in self._ignored]
        self.trace.calls = [call for call in self._calls if call is not None]
        return self.trace


def _name_segments(call: Call, lists: dict[str, list[int]]) -> None:
    """Fill in addresses: input entries and output segments, as the ``dma_map_sg`` event lists them."""
    addresses = lists["phys_addrs"]
    if len(addresses) != call["nents"]:
        call.inputs = []  # the event lists at most 128 entries
    elif call.inferred:
        call.inputs = _inferred(addresses, call.inputs, sum(lists["sizes"]))
    else:
        call.inputs = [(phys, size) for phys, (_, size) in zip(addresses, call.inputs, strict=True)]
    call.outputs = list(zip(lists["dma_addrs"], lists["sizes"], strict=False))


def _inferred(addresses: list[int], maps: list[Segment], total: int) -> list[Segment]:
    """Entries from their addresses, the (phys, size) runs they were mapped in and their total; empty if they differ."""
    found: list[Segment] = []
    runs = iter(maps)
    start, size = next(runs, (0, 0))
    for phys, following in zip(addresses, [*addresses[1:], -1], strict=True):
        if not start <= phys < start + size:
            start, size = next(runs, (0, 0))
        if not start <= phys < start + size:
            return []
        end = following if phys < following < start + size else start + size
        found.append((phys, end - phys))
    excess = sum(size for _, size in found) - total
    if not 0 <= excess < 4096:  # only the last entry may end inside a page
        return []
    found[-1] = (found[-1][0], found[-1][1] - excess)
    return found
