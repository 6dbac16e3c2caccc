"""The workload in a trace: which requests were mapped, with which memory, when, and until when.

A driver maps the memory of a request and then issues it, in one task: all mapping events of a task since its last
issue belong to the request that it issues next. A request ends where its first range is unmapped. So a request is
known by events of several kinds, any of which a recording may lack:

* ``block_rq_issue`` separates requests; without it each mapping is a request of its own;
* ``link_out`` (two-step), ``mp_out`` or ``dma_map_phys`` (one range), ``dma_map_sg`` (a list) give the segments;
* ``destroy_in``, ``ump_in``/``dma_unmap_phys`` give the end; without them requests end in the order they began;
* marks ``PHASE x`` … ``PHASE x-end`` name phases.

``Recorded.method`` keeps what the kernel did (``map``, ``two-step``, ``each``: segment by segment after a refused or
untried window), so that a model's decision can be held against it. Block requests that were issued without any
visible mapping, on a disk whose other requests are visible, are counted (``unseen``), never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dmakit.trace.columns import Table, Trace
from dmakit.trace.events import ABSENT, missing_events

FROM_DEVICE = 2
_DIRECTIONS = {"BIDIRECTIONAL": 0, "TO_DEVICE": 1, "FROM_DEVICE": FROM_DEVICE}
_MARK = "PHASE "


@dataclass(slots=True)
class Recorded:
    """One request: segments (phys, bytes) in order, device-writes-memory (``read``), place in the trace's order."""

    number: int
    device: str
    read: bool
    segments: list[tuple[int, int]]
    method: str
    addr: int
    cpu: int
    begin: int
    end: int = -1
    end_cpu: int = 0
    phase: str = ""
    issued_bytes: int = 0


@dataclass(slots=True)
class Extracted:
    """The requests of a trace, in order of their beginning, and what could not be known."""

    requests: list[Recorded] = field(default_factory=list)
    cpus: int = 1
    unseen: int = 0
    unfinished: int = 0
    missing: list[str] = field(default_factory=list)

    def devices(self) -> dict[str, int]:
        """Requests by device name."""
        counts: dict[str, int] = {}
        for request in self.requests:
            counts[request.device] = counts.get(request.device, 0) + 1
        return counts


@dataclass(slots=True)
class _Pending:
    """What a task has mapped since its last issue."""

    device: str
    read: bool
    addr: int
    method: str
    begin: int
    cpu: int
    segments: list[tuple[int, int]] = field(default_factory=list)
    refused: bool = False


class _Reader:
    """Walks the events of a trace in order; one method a kind of event."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.out = Extracted(cpus=trace.cpus)
        self.pending: dict[int, list[_Pending]] = {}
        self.open: dict[tuple[str, int], Recorded] = {}
        self.phase = ""
        self.invisible: dict[int, int] = {}
        self.visible: set[int] = set()
        self.issues = bool(len(trace.table("block_rq_issue")))
        self.maps = "mp_out" if len(trace.table("mp_out")) else "dma_map_phys"
        self.unmaps = "ump_in" if len(trace.table("ump_in")) else "dma_unmap_phys"

    def read(self) -> Extracted:
        """Visit every event."""
        handlers = {
            "mark": self.mark,
            "try_out": self.window,
            "link_out": self.link,
            self.maps: self.map,
            "dma_map_sg": self.map_sg,
            "block_rq_issue": self.issue,
            "destroy_in": self.ended,
            self.unmaps: self.ended,
            "dma_unmap_sg": self.ended_sg,
        }
        tables = {name: self.trace.table(name) for name in handlers}
        order = np.concatenate([table.seq for table in tables.values()])
        kinds = np.repeat(np.arange(len(tables)), [len(table) for table in tables.values()])
        rows = np.concatenate([np.arange(len(table)) for table in tables.values()])
        calls = [(handler, tables[name]) for name, handler in handlers.items()]
        ranks = np.argsort(order, kind="stable")
        for kind, row in zip(kinds[ranks].tolist(), rows[ranks].tolist(), strict=True):
            handler, table = calls[kind]
            handler(table, row)
        self.finish()
        return self.out

    def mark(self, table: Table, row: int) -> None:
        """``PHASE x`` and ``PHASE x-end``."""
        text = self.trace.word(int(table["text"][row])).strip()
        if text.startswith(_MARK):
            name = text[len(_MARK) :].strip()
            self.phase = "" if name.endswith("-end") else name

    def device(self, table: Table, row: int) -> str:
        """The device of an event."""
        return self.trace.word(int(table["dev"][row]))

    def begin(self, table: Table, row: int, method: str, read: bool, addr: int) -> _Pending:
        """A mapping of this task begins."""
        pending = _Pending(self.device(table, row), read, addr, method, int(table.seq[row]), int(table.cpu[row]))
        self.pending.setdefault(int(table.pid[row]), []).append(pending)
        return pending

    def window(self, table: Table, row: int) -> None:
        """``dma_iova_try_alloc`` returned."""
        if int(table["ok"][row]) & 1:
            self.begin(table, row, "two-step", True, int(table["addr"][row]))
        else:
            self.begin(table, row, "refused", True, 0).refused = True

    def link(self, table: Table, row: int) -> None:
        """A piece was linked into the task's newest window."""
        addr = int(table["addr"][row])
        windows = [p for p in self.pending.get(int(table.pid[row]), ()) if p.method == "two-step" and p.addr == addr]
        if windows and table.signed("ret")[row] == 0:
            windows[-1].segments.append((int(table["phys"][row]), int(table["size"][row])))
            windows[-1].read = int(table["dir"][row]) == FROM_DEVICE

    def map(self, table: Table, row: int) -> None:
        """One range was mapped."""
        if self.maps == "mp_out":
            addr, phys, direction = (int(table[name][row]) for name in ("ret", "phys", "dir"))
        else:
            addr, phys = int(table["dma_addr"][row]), int(table["phys_addr"][row])
            direction = _DIRECTIONS.get(self.trace.word(int(table["dir"][row])), 0)
        if addr == ABSENT:
            return
        size = int(table["size"][row])
        mine = self.pending.get(int(table.pid[row]), [])
        if self.issues and mine and mine[-1].method in ("map", "each", "refused"):
            mine[-1].segments.append((phys, size))
            mine[-1].method = "each" if len(mine[-1].segments) > 1 else "map"
            mine[-1].addr = mine[-1].addr or addr
            mine[-1].read = direction == FROM_DEVICE
            return
        self.begin(table, row, "map", direction == FROM_DEVICE, addr).segments.append((phys, size))
        if not self.issues:
            self.close(int(table.pid[row]), 0)

    def map_sg(self, table: Table, row: int) -> None:
        """A scatterlist was mapped; its input is known as far as the event prints it."""
        phys = self.trace.elements(table, "phys_addrs", row)
        sizes = self.trace.elements(table, "sizes", row)
        addrs = self.trace.elements(table, "dma_addrs", row)
        if len(phys) != len(sizes):
            return  # merged: the input lengths are not printed
        read = self.trace.word(int(table["dir"][row])) == "FROM_DEVICE"
        self.begin(table, row, "sg", read, addrs[0]).segments.extend(zip(phys, sizes, strict=True))
        if not self.issues:
            self.close(int(table.pid[row]), 0)

    def issue(self, table: Table, row: int) -> None:
        """A block request was issued: what its task mapped since the last issue is its memory."""
        size, disk = int(table["bytes"][row]), int(table["dev"][row])
        if self.close(int(table.pid[row]), size):
            self.visible.add(disk)
        elif size:
            self.invisible[disk] = self.invisible.get(disk, 0) + 1

    def close(self, pid: int, size: int) -> bool:
        """Turn the task's pending mapping into a request; False when there is none."""
        mine = [p for p in self.pending.pop(pid, []) if p.segments]
        if not mine:
            return False
        # Metadata or an earlier failed attempt may be mapped too: the data is what adds up to the request's size.
        best = next((p for p in mine if sum(n for _, n in p.segments) == size), mine[0])
        request = Recorded(
            len(self.out.requests), best.device, best.read, best.segments, best.method, best.addr, best.cpu,
            best.begin, phase=self.phase, issued_bytes=size,
        )  # fmt: skip
        self.out.requests.append(request)
        self.open[best.device, best.addr] = request
        return True

    def ended(self, table: Table, row: int) -> None:
        """A window was destroyed or a range unmapped: the request that began there is over."""
        column = "addr" if "addr" in table.fields else "dma_addr"
        request = self.open.pop((self.device(table, row), int(table[column][row])), None)
        if request is not None:
            request.end, request.end_cpu = int(table.seq[row]), int(table.cpu[row])

    def ended_sg(self, table: Table, row: int) -> None:
        """A scatterlist was unmapped; the event names only its memory."""
        phys = self.trace.elements(table, "phys_addrs", row)
        for key, request in self.open.items() if phys else ():
            if request.method == "sg" and request.segments[0][0] == phys[0] and key[0] == self.device(table, row):
                request.end, request.end_cpu = int(table.seq[row]), int(table.cpu[row])
                del self.open[key]
                return

    def finish(self) -> None:
        """Requests without an end stay until the trace's end; say what was missing."""
        self.out.unseen = sum(count for disk, count in self.invisible.items() if disk in self.visible)
        for request in self.out.requests:
            if request.end < 0:
                self.out.unfinished += 1
                request.end_cpu = request.cpu
        self.out.missing = [
            f"{need.lost} (record {' or '.join(need.events)})"
            for need in missing_events(self.trace.present(), "compare")
        ]
        lost = int(self.trace.lost["count"].sum())
        if lost or self.trace.overwritten or (self.trace.recording and not self.trace.recording.complete):
            self.out.missing.append(
                f"{lost or 'some'} events: they were lost in recording, requests may be cut or absent"
            )


def extract(trace: Trace) -> Extracted:
    """The requests of a scanned trace."""
    return _Reader(trace).read()


def schedule(requests: list[Recorded]) -> list[tuple[int, int]]:
    """(kind, number) in the trace's order; kind 0 begins a request, 1 ends it; those without an end end last."""
    events = [(request.begin, 0, request.number) for request in requests]
    last = max((max(request.begin, request.end) for request in requests), default=0) + 1
    events += [(request.end if request.end >= 0 else last, 1, request.number) for request in requests]
    return [(kind, number) for _, kind, number in sorted(events)]
