"""``replay_calls``: run a trace's DMA API calls on our stack and compare everything they cause.

The trace's calls (``calls.py``) run in the order in which they took effect, on a machine set up like the recorded
one. Each kind of event is one *stream*, in order: invalidation descriptors, bounce slots taken and released, unmaps,
flushes, IOVAs … A stream is equal when ours is the kernel's, item by item.

Three questions are answered beside that: is every IOTLB invalidation explained (its cause in the trace is known, and
the same call of ours emits the same descriptor for the same cause); are the output segments of every scatterlist
whose input the trace holds equal; are bounce slots equal.

An IOVA that the allocator answered differently (an interrupt fell into an allocation) is adopted and counted: the
replay of allocations with a search over such orders is ``replay.py``'s work, here it would only blur what lies above.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dmakit.consts import L_IOVA_TREE
from dmakit.errors import DmakitError
from dmakit.trace import step_adopt
from dmakit.trace.calls import EVENTS, Call, CallTrace, read_calls
from dmakit.trace.facts import bounce_pool, lazy
from dmakit.trace.recorded_machine import (
    ALL_ONES,
    BOUNCE_START,
    RecordedMachine,
    Setup,
    boot_beside,
    compared,
    first_domain_id,
)
from dmakit.trace.step_events import Event

MAP_SIDE = frozenset({"sync", "map", "sg", "alloc", "link"})


@dataclass(slots=True)
class Stream:
    """One kind of event: how many the kernel recorded, how many ours did, how many are equal, the first that is not."""

    kernel: int
    ours: int
    equal: int
    first: dict[str, Any] | None = None


@dataclass(slots=True)
class Invalidations:
    """IOTLB descriptors: recorded, explained (cause known, ours emits the same for the same cause), by cause."""

    descriptors: int
    explained: int
    causes: dict[str, int]
    not_iotlb: int


@dataclass(slots=True)
class Scatterlists:
    """dma_map_sg calls: all, with every input length dumped, with inferred lengths, and equal ones of both."""

    lists: int = 0
    complete: int = 0
    inferred: int = 0
    complete_equal: int = 0
    inferred_equal: int = 0
    first: dict[str, Any] | None = None


@dataclass(slots=True)
class CallsResult:
    """What a call replay found."""

    file: str
    calls: int
    answers_equal: int
    iovas_adopted: int
    unknown_mappings: int
    invalidations: Invalidations
    scatterlists: Scatterlists
    streams: dict[str, Stream]
    malformed_lines: int
    first: dict[str, Any] | None = None
    kind: str = "calls"

    @property
    def equal(self) -> bool:
        """True when every answer, stream and scatterlist is the kernel's and every invalidation is explained."""
        lists = self.scatterlists
        return (
            self.answers_equal == self.calls
            and self.invalidations.explained == self.invalidations.descriptors
            and (lists.complete, lists.inferred) == (lists.complete_equal, lists.inferred_equal)
            and all(stream.first is None for stream in self.streams.values())
        )

    @property
    def explained(self) -> bool:
        """What the exit status of ``dmakit replay`` asks: nothing differs."""
        return self.equal

    def as_json(self) -> dict[str, Any]:
        """The object of ``--json``."""
        return {**asdict(self), "equal": self.equal}

    def render(self) -> str:
        """Lines for people."""
        inv, sg = self.invalidations, self.scatterlists
        lines = [f"{self.file}: {self.answers_equal} of {self.calls} calls answered as the kernel did"]
        causes = ", ".join(f"{cause} {count}" for cause, count in inv.causes.items())
        if "qi" in self.streams:
            lines.append(f"  invalidations: {inv.explained} of {inv.descriptors} explained and equal ({causes})")
        else:
            lines.append("  invalidations: the trace has no qi_submit events (record intel_iommu:qi_submit)")
        if sg.lists:
            lines.append(
                f"  scatterlists: {sg.complete_equal} of {sg.complete} with recorded lengths and {sg.inferred_equal}"
                f" of {sg.inferred} with inferred lengths have the kernel's segments ({sg.lists} lists)"
            )
        for name, stream in self.streams.items():
            if stream.kernel or stream.ours:
                lines.append(f"  {name}: {stream.equal} of {stream.kernel} equal, ours has {stream.ours}")
            if stream.first:
                lines.append(f"    first difference: {stream.first}")
        if self.first:
            lines.append(f"  first call answered differently: {self.first}")
        if self.iovas_adopted or self.unknown_mappings:
            lines.append(
                f"  adopted: {self.iovas_adopted} IOVAs, {self.unknown_mappings} calls on mappings made earlier"
            )
        return "\n".join(lines)


def replay_calls(
    path: str | Path,
    *,
    boot: str | Path | None = None,
    defects: tuple[str, ...] = ("7.2",),
    max_segment: int = 64 << 10,
) -> CallsResult:
    """Replay the DMA calls of the trace ``path``; InputError for files that cannot be read.

    ``max_segment`` (bytes) is what the recorded drivers had set for scatterlists: the trace does not show it.
    """
    trace = read_calls(path)
    boot_path = Path(boot) if boot else boot_beside(trace.path)
    return _CallReplay(trace, boot_path, defects, max_segment).run()


def _setup(trace: CallTrace, boot: Path | None, defects: tuple[str, ...]) -> Setup:
    """The recorded machine: what ``dmakit record`` wrote down about it, otherwise what the events give away."""
    policies = {lazy(trace.facts, call.device) for call in trace.calls if call.device} - {None}
    pool = bounce_pool(trace.facts)
    slots = [event[3] for _, event in trace.events if event[0] == "tblmap" and event[3] != ALL_ONES]
    return Setup(
        boot=boot,
        untrusted=frozenset(trace.bounced),
        strict=True not in policies if policies else not trace.names & {"fqring_in", "fqto_in"},
        caching_mode=trace.caching_mode,
        cpus=1 + max((call.cpu for call in trace.calls), default=0),
        bounce_start=pool[0] if pool else slots[0] & ~4095 if slots else BOUNCE_START,
        highest_phys=trace.highest_phys,
        first_domain_id=first_domain_id(boot, (event for _, event in trace.events)),
        attached=trace.attached,
        defects=defects,
    )


def _keeps_offsets(trace: CallTrace) -> bool:
    """Did the recorded driver set a min_align_mask? Then a slot keeps the low bits of what it bounces."""
    pairs = [(event[1] & 4095, event[3] & 4095) for _, event in trace.events if event[0] == "tblmap"]
    return any(offset and offset == kept for offset, kept in pairs)


class _CallReplay:
    """One run of a trace's calls."""

    def __init__(self, trace: CallTrace, boot: Path | None, defects: tuple[str, ...], max_segment: int) -> None:
        self.trace = trace
        self.bench = RecordedMachine(_setup(trace, boot, defects))
        self.max_segment = max_segment
        self.min_align_mask = 4095 if _keeps_offsets(trace) else 0
        self.live: dict[tuple[str, int], Any] = {}  # by device and the kernel's address: state, mapping or memory
        self.lists = Scatterlists()
        self.events: list[tuple[int, Event]] = []
        self.causes: list[str] = []
        self.adopted = 0
        self.unknown = 0
        self.first: dict[str, Any] | None = None
        self._ready: set[str] = set()

    def run(self) -> CallsResult:
        equal = 0
        for call in self.trace.calls:
            equal += self._call(call)
            taken = self.bench.take_events()
            caused = [event for event in compared(taken) if (call.kind, event[0]) != ("alloc", "map")]
            self.events += [(call.cpu, event) for event in caused]
            self.causes += [_cause(call)] * sum(event[0] == "qi" for event in taken)
        return CallsResult(
            file=str(self.trace.path),
            calls=len(self.trace.calls),
            answers_equal=equal,
            iovas_adopted=self.adopted,
            unknown_mappings=self.unknown,
            invalidations=self._invalidations(),
            scatterlists=self.lists,
            streams={
                name: _stream(name, self.trace.events, self.events)
                for source, (name, *_) in EVENTS.items()
                if source in self.trace.names
            },
            malformed_lines=self.trace.malformed,
            first=self.first,
        )

    def _invalidations(self) -> Invalidations:
        kernel, ours = _caused(self.trace.events, self.trace.causes), _caused(self.events, self.causes)
        explained = sum(k == o and k[2] != "" for k, o in zip(kernel, ours, strict=False))
        return Invalidations(len(kernel), explained, dict(Counter(self.trace.causes)), self.trace.other_descriptors)

    # calls ---------------------------------------------------------------------------------------------------

    def _call(self, call: Call) -> bool:
        """Run one call; True when its answer is the kernel's."""
        if call.kind == "timer":
            self.bench.events += self.bench.flush(call.numbers.get("timer", 0), call.cpu)
            return True
        device = self._device(call.device)
        answer, kernel = getattr(self, f"_{call.kind}")(device, call)
        if answer != kernel and self.first is None:
            self.first = {"stamp": call.stamp, "call": call.kind, "ours": answer, "kernel": kernel}
        return bool(answer == kernel)

    def _device(self, name: str) -> Any:
        device = self.bench.device(name)
        if name not in self._ready:
            self._ready.add(name)
            device.set_max_segment(self.max_segment)
            device.set_min_align_mask(self.min_align_mask)
        return device

    def _answer(self, function: Callable[..., Any], *arguments: Any) -> int:
        try:
            function(*arguments)
        except DmakitError as error:
            return -error.errno
        return 0

    def _find(self, call: Call, address: int, *, end: bool = False) -> Any:
        """What the kernel's ``address`` names here; None (counted) when it was made before the trace began."""
        key = (call.device, address)
        if key not in self.live:
            self.unknown += 1
            return None
        return self.live.pop(key) if end else self.live[key]

    def _window(self, device: Any, call: Call, wanted: int, pages: int, make: Callable[[], Any]) -> Any:
        """Make something that takes an IOVA; when it is not the kernel's, adopt the kernel's and make it again."""
        before = len(self.bench.events)
        searched = self.bench.machine.ledger.counts[L_IOVA_TREE]
        made = make()
        from_tree = self.bench.machine.ledger.counts[L_IOVA_TREE] != searched
        addr = _address(made)
        if addr >> 12 == wanted >> 12 or not addr or wanted in (0, ALL_ONES):
            return made
        _give_back(device, call, made, pages, from_tree)
        held = step_adopt.make_next(device.iovad, call.cpu, wanted >> 12, pages)
        del self.bench.events[before:]
        self.adopted += 1
        made = make()
        for lo in held:
            device.iovad.free(lo)
        return made

    def _try(self, device: Any, call: Call) -> tuple[Any, Any]:
        phys, size, wanted = call["phys"], call["size"], call["addr"] if call["ok"] else 0
        pages = (phys & 4095) + size + 4095 >> 12
        state = self._window(device, call, wanted, pages, lambda: device.try_alloc(phys, size, cpu=call.cpu))
        if state:
            self.live[call.device, wanted] = state
        return state.addr if state else 0, wanted

    def _link(self, device: Any, call: Call) -> tuple[Any, Any]:
        state = self._find(call, call["addr"])
        if state is None:
            return None, None
        ret = self._answer(state.link, call["phys"], call["off"], call["size"], call["dir"])
        return ret, call["ret"]

    def _sync(self, device: Any, call: Call) -> tuple[Any, Any]:
        state = self._find(call, call["addr"])
        if state is None:
            return None, None
        return self._answer(state.sync, call["off"], call["size"]), call["ret"]

    def _unlink(self, device: Any, call: Call) -> tuple[Any, Any]:
        state = self._find(call, call["addr"])
        if state is not None:
            state.unlink(call["off"], call["size"], call["dir"])
        return None, None

    def _destroy(self, device: Any, call: Call) -> tuple[Any, Any]:
        state = self._find(call, call["addr"], end=True)
        if state is None:
            return None, None
        word = state.size_word
        state.destroy(call["mapped"], call["dir"])
        return word, call["ssize"] & ALL_ONES

    def _free(self, device: Any, call: Call) -> tuple[Any, Any]:
        state = self._find(call, call["addr"], end=True)
        if state is not None:
            state.free()
        return None, None

    def _map(self, device: Any, call: Call) -> tuple[Any, Any]:
        phys, size, wanted = call["phys"], call["size"], call["ret"] & ALL_ONES
        pages = (phys & 4095) + size + 4095 >> 12
        attrs = call.numbers.get("attrs", 0)

        def make() -> Any:
            try:
                return device.map_phys(phys, size, call["dir"], attrs, cpu=call.cpu)
            except DmakitError:
                return 0

        addr = self._window(device, call, wanted, pages, make)
        if addr:
            self.live[call.device, wanted] = (addr, attrs)
        return addr or ALL_ONES, wanted

    def _unmap(self, device: Any, call: Call) -> tuple[Any, Any]:
        found = self._find(call, call["addr"], end=True)
        if found is not None:
            device.unmap_phys(found[0], call["size"], call["dir"], found[1], cpu=call.cpu)
        return None, None

    def _sg(self, device: Any, call: Call) -> tuple[Any, Any]:
        self.lists.lists += 1
        if call["ret"] <= 0 or not call.outputs:
            return None, None
        entries = call.inputs or call.runs
        wanted = call.outputs[0][0]
        pages = sum((phys & 4095) + size + 4095 >> 12 for phys, size in entries)
        attrs = call.numbers.get("attrs", 0)
        make = lambda: device.map_sg(entries, call["dir"], attrs, cpu=call.cpu)  # noqa: E731
        mapping = self._window(device, call, wanted, pages, make)
        self.live[call.device, wanted & ~4095] = mapping
        if not call.inputs:
            return None, None
        answer, kernel = list(mapping.segments), call.outputs
        self._count_list(call, answer == kernel, answer, kernel)
        return answer, kernel

    def _count_list(self, call: Call, equal: bool, answer: Any, kernel: Any) -> None:
        lists = self.lists
        if call.inferred:
            lists.inferred += 1
            lists.inferred_equal += equal
        else:
            lists.complete += 1
            lists.complete_equal += equal
        if not equal and lists.first is None:
            lists.first = {"stamp": call.stamp, "entries": call.inputs, "ours": answer, "kernel": kernel}

    def _unsg(self, device: Any, call: Call) -> tuple[Any, Any]:
        mapping = self._find(call, call.numbers.get("iova", 0), end=True)
        if mapping is not None:
            device.unmap_sg(mapping, cpu=call.cpu)
        return None, None

    def _alloc(self, device: Any, call: Call) -> tuple[Any, Any]:
        size, wanted = call["size"], call["handle"]
        pages = size + 4095 >> 12
        memory = self._window(device, call, wanted, pages, lambda: device.alloc_coherent(size, cpu=call.cpu))
        self.live[call.device, wanted] = memory
        return memory.addr, wanted

    def _release(self, device: Any, call: Call) -> tuple[Any, Any]:
        memory = self._find(call, call["handle"], end=True)
        if memory is not None:
            memory.free()
        return None, None


def _address(made: Any) -> int:
    """The bus address of what a call made: a number, a state, coherent memory or a scatterlist."""
    if isinstance(made, int):
        return made
    if hasattr(made, "segments"):
        return int(made.segments[0][0])
    return int(made.addr)


def _give_back(device: Any, call: Call, made: Any, pages: int, from_tree: bool) -> None:
    """Undo what a call made."""
    if call.kind == "map":
        undo = partial(device.unmap_phys, made, call["size"], call["dir"], call.numbers.get("attrs", 0), cpu=call.cpu)
    elif call.kind == "sg":
        undo = partial(device.unmap_sg, made, cpu=call.cpu)
    else:
        undo = made.free
    step_adopt.give_back(device, call.cpu, _address(made), pages, undo, from_tree, mapped=call.kind in ("map", "sg"))


def _cause(call: Call) -> str:
    """The cause of an invalidation that this call of ours emitted, in the words of ``calls.py``."""
    if call.kind == "timer":
        return "flush queue timer"
    return "map-side sync" if call.kind in MAP_SIDE else call.kind


def _caused(events: list[tuple[int, Event]], causes: list[str]) -> list[tuple[int, Event, str]]:
    """The invalidations with their causes, CPU by CPU as in ``_stream``."""
    found = [(cpu, event) for cpu, event in events if event[0] == "qi"]
    return sorted(((*row, cause) for row, cause in zip(found, causes, strict=True)), key=lambda row: row[0])


def _stream(name: str, kernel: list[tuple[int, Event]], ours: list[tuple[int, Event]]) -> Stream:
    """Compare one kind of event. CPUs run at the same time: the order is compared CPU by CPU."""
    theirs = sorted((row for row in kernel if row[1][0] == name), key=lambda row: row[0])
    mine = sorted((row for row in ours if row[1][0] == name), key=lambda row: row[0])
    equal = sum(a == b for a, b in zip(theirs, mine, strict=False))
    stream = Stream(len(theirs), len(mine), equal)
    if theirs != mine:
        at = next(
            (i for i, (a, b) in enumerate(zip(theirs, mine, strict=False)) if a != b), min(len(theirs), len(mine))
        )
        stream.first = {"index": at, "ours": mine[at : at + 1], "kernel": theirs[at : at + 1]}
    return stream
