"""From allocator events to operations: who did what to which domain between which two moments.

An *operation* is one call of the IOVA allocator. It takes effect at some moment of its interval: after its entry event
(``begin``) and before its return event (``end``); both are places in the order of the trace (``seq``). Intervals that
overlap leave the order open (``search.py`` finds one).

Entries and returns are paired on a stack for each task, so that an interrupt's operations nest in those of the task it
interrupted. A task is its pid, because tasks migrate between CPUs; the idle tasks all have pid 0 and stay on their CPU.

What has no partner: a return without an entry began behind its task's last event, if any in the trace; an entry without
a return is still open (``end`` = FOREVER): whether and how it took effect is not known.

Events inside a call narrow its interval: a tree search took effect before its ``ai_out``, a free into the tree after
its ``fi_in``.

Also operations: ``reserve``, ``init`` and ``put`` of a domain, ``free_iova`` outside of a fast free (``free_node``),
one run of a depot's delayed work (``depot``), a CPU's magazines given back (``offline``) and lost events (``lost``,
in every domain).
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, TypeAlias

import cython

from dmakit.trace.columns import Trace
from dmakit.trace.events import ABSENT

Text: TypeAlias = str
Cpus: TypeAlias = tuple[int, ...]
FOREVER = 1 << 62
_NONE: list[Any] = []  # of every operation that has none
_HIGHEST = (1 << 52) - 1  # the highest pfn of 4 KiB granules
_SLACK = 512  # events within which an operation without a recorded end has taken effect
KINDS = ("init_in", "res_in", "put_in", "af_in", "af_out", "ai_out", "ff_in", "ff_out", "fi_in", "depot_in",
         "magfree_in", "cpufree_in")  # fmt: skip


@cython.cclass
class Operation:
    """One call on one domain. ``pfn`` of an allocation is the recorded answer (0 = it failed, None = not recorded).

    ``cpus``: the CPU at the entry and, when the task migrated, the one at the return. ``searches``: what each tree
    search inside an allocation answered (0 = failed), or None when the trace does not record them; ``moments``: when.
    ``drained``: (seq, number of pfns, the first of them) of each magazine given back. ``retry``: the second search of
    an allocation whose first part is an operation ``miss``. ``to_tree``: whether a free went to the tree, None when
    not recorded. ``line``: of the event that shows the answer.
    """

    def __init__(
        self,
        kind: Text,
        iovad: cython.ulonglong,
        begin: cython.longlong,
        end: cython.longlong,
        cpus: Cpus,
        line: cython.longlong,
        pid: cython.longlong = 0,
    ) -> None:
        self.kind, self.iovad, self.begin, self.end = kind, iovad, begin, end
        self.cpus: tuple[int, ...] = cpus
        self.line, self.pid = line, pid
        self.size = self.limit = self.hi = 0
        self.flush = self.retry = False
        self.pfn: int | None = None
        self.searches: list[int] | None = None
        self.to_tree: bool | None = None
        self.moments: list[int] = _NONE
        self.drained: list[tuple[int, int, list[int]]] = _NONE

    def part(self, kind: Text, begin: cython.longlong, end: cython.longlong) -> Operation:
        """A failed search of this allocation as an operation of its own."""
        twin = Operation(kind, self.iovad, begin, end, self.cpus, self.line, self.pid)
        twin.size, twin.limit, twin.hi, twin.to_tree = self.size, self.limit, self.hi, self.to_tree
        twin.pfn, twin.searches, twin.retry = 0, [0], self.retry
        return twin

    @property
    def possible(self) -> bool:
        """Whether its numbers can be a call's (a damaged line may hold any)."""
        if self.kind in ("alloc", "miss", "drain"):
            return 0 < self.size <= _HIGHEST and (self.pfn or 0) <= _HIGHEST
        if self.kind == "free":
            return 0 < self.size <= _HIGHEST and 0 < (self.pfn or 0) <= _HIGHEST
        if self.kind == "free_node":
            return 0 < (self.pfn or 0) <= _HIGHEST
        if self.kind == "reserve":
            return (self.pfn or 0) <= self.hi <= _HIGHEST
        if self.kind == "init":
            return 4 <= self.size <= 1 << 30 and self.size & (self.size - 1) == 0 and 0 < (self.pfn or 0) < 1 << 34
        return True

    def __str__(self) -> str:
        where = f"cpu {self.cpus[0]}" if len(self.cpus) == 1 else f"cpu {self.cpus[0]} to {self.cpus[1]}"
        if self.kind == "alloc":
            return f"line {self.line}: alloc size={self.size} limit={self.limit:#x} -> {self.pfn or 0:#x} on {where}"
        if self.kind in ("free", "free_node"):
            return f"line {self.line}: {self.kind} pfn={self.pfn or 0:#x} size={self.size} on {where}"
        return f"line {self.line}: {self.kind} on {where}"


class OperationReader:
    """Pairs the events of one trace; ``offset`` shifts its order behind that of an earlier one (the boot trace)."""

    def __init__(self, trace: Trace, offset: int = 0) -> None:
        self.trace = trace
        self.offset = offset
        self.searches_recorded = len(trace.table("ai_out")) > 0
        self.frees_recorded = len(trace.table("fi_in")) > 0
        self.columns = {name: self._lists(name) for name in KINDS}
        self.stacks: dict[int, list[Operation]] = {}
        self.latest: dict[int, int] = {}
        self.works: dict[int, Operation] = {}
        self.operations: list[Operation] = []

    def _lists(self, name: str) -> dict[str, list[int]]:
        table = self.trace.table(name)
        columns = {column: values.tolist() for column, values in table.fields.items()}
        return columns | {
            "": (table.seq + self.offset).tolist(),
            "line": table.line.tolist(),
            "cpu": table.cpu.tolist(),
            "pid": table.pid.tolist(),
        }

    def read(self) -> list[Operation]:
        """All operations, by ``begin``; lost events are operations of domain 0 (which means every domain)."""
        handlers = [getattr(self, f"_{name}") for name in KINDS]
        columns = [self.columns[name] for name in KINDS]
        rows = [0] * len(KINDS)
        work: Operation
        for code in sorted(seq * 16 + which for which in range(len(KINDS)) for seq in columns[which][""]):
            which, seq = code & 15, code >> 4
            row, column = rows[which], columns[which]
            rows[which] = row + 1
            cpu, pid = column["cpu"][row], column["pid"][row]
            task = pid if pid else -1 - cpu
            if task in self.works:
                work = self.works.pop(task)
                work.end = seq
            handlers[which](column, row, task, self._new("", column, row, cpu, pid))
            self.latest[task] = seq
        self._close()
        lost = self.trace.lost
        for seq, line, cpu in zip(lost.seq.tolist(), lost.line.tolist(), lost.cpu.tolist(), strict=True):
            self.operations.append(Operation("lost", 0, seq + self.offset, seq + self.offset, (cpu,), line))
        self.operations.sort(key=attrgetter("begin"))
        return self.operations

    def _close(self) -> None:
        """Bound what has no end: a free without a return (none are recorded, or the last ones) and depot work."""
        for op in self.operations:
            if op.end == FOREVER and op.kind in ("free", "depot"):
                op.end = op.begin if op.kind == "free" and not self.columns["ff_out"][""] else op.begin + _SLACK

    def _unseen(self, entry: str, task: int, op: Operation) -> int:
        """Where a call began whose entry is not in the trace: behind its task's last event (or before the trace), or at
        its return when no entries are recorded at all."""
        return self.latest.get(task, self.offset - 1) if self.columns[entry][""] else op.begin

    def _new(self, kind: str, column: dict[str, list[int]], row: int, cpu: int, pid: int) -> Operation:
        seq = column[""][row]
        iovad = column["iovad"][row] if "iovad" in column else 0
        return Operation(kind, iovad, seq, FOREVER, (cpu,), column["line"][row], pid)

    # Allocations -----------------------------------------------------------------------------------------------------

    def _af_in(self, column: dict[str, list[int]], row: int, task: int, op: Operation) -> None:
        op.kind, op.size, op.limit = "alloc", column["size"][row], column["limit"][row]
        op.flush = column["flush"][row] in (1, ABSENT)
        op.searches = [] if self.searches_recorded else None
        op.moments, op.drained = [], []
        self.stacks.setdefault(task, []).append(op)
        self.operations.append(op)

    def _af_out(self, column: dict[str, list[int]], row: int, task: int, op: Operation) -> None:
        op.size, op.limit = column["size"][row], column["limit"][row]
        found = self._pop(task, "alloc", op, op.size)
        if found is None:
            if op.iovad == ABSENT or op.size == ABSENT:
                return  # a bare return value without its entry says nothing about the allocator
            found = op
            found.kind, found.end, found.begin, found.flush = "alloc", op.begin, self._unseen("af_in", task, op), True
            self.operations.append(found)
        self._return(found, op)
        found.pfn = column["pfn"][row]

    def _ai_out(self, column: dict[str, list[int]], row: int, task: int, op: Operation) -> None:
        top = self._top(task, "alloc", op.iovad)
        if top is not None and top.searches is not None:
            top.searches.append(column["lo"][row] if column["ret"][row] else 0)
            top.moments.append(op.begin)
            if len(top.searches) == 2:
                self._split(top)

    def _split(self, op: Operation) -> None:
        """An allocation that searched twice is three operations: the miss, the drain of all magazines, the retry.

        Interrupts and other tasks act between them; ``op`` becomes the retry.
        """
        first, second = op.moments
        miss = op.part("miss", op.begin, first)
        seqs = [seq for seq, _, _ in op.drained]
        drain = op.part("drain", min(seqs, default=first), max(seqs, default=second))
        self.operations += [miss, drain]
        op.begin, op.retry = drain.end, True

    # Frees -----------------------------------------------------------------------------------------------------------

    def _ff_in(self, column: dict[str, list[int]], row: int, task: int, op: Operation) -> None:
        op.kind, op.pfn, op.size = "free", column["pfn"][row], column["size"][row]
        op.to_tree = False if self.frees_recorded else None
        self.stacks.setdefault(task, []).append(op)
        self.operations.append(op)

    def _ff_out(self, column: dict[str, list[int]], row: int, task: int, op: Operation) -> None:
        op.size, op.pfn = column["size"][row], column["pfn"][row]
        found = self._pop(task, "free", op, op.size, op.pfn)
        if found is None:
            found = op
            found.kind, found.end, found.begin = "free", op.begin, self._unseen("ff_in", task, op)
            self.operations.append(found)
        self._return(found, op)

    def _fi_in(self, column: dict[str, list[int]], row: int, task: int, op: Operation) -> None:
        top = self._top(task, "free", op.iovad)
        if top is not None and top.pfn == column["pfn"][row]:
            top.to_tree, top.begin = True, op.begin
            return
        op.kind, op.pfn, op.end = "free_node", column["pfn"][row], op.begin
        self.operations.append(op)

    # Everything else --------------------------------------------------------------------------------------------------

    def _init_in(self, column: dict[str, list[int]], row: int, task: int, op: Operation) -> None:
        op.kind, op.size, op.pfn, op.end = "init", column["granule"][row], column["start"][row], op.begin
        self.operations.append(op)

    def _res_in(self, column: dict[str, list[int]], row: int, task: int, op: Operation) -> None:
        op.kind, op.pfn, op.hi, op.end = "reserve", column["lo"][row], column["hi"][row], op.begin
        self.operations.append(op)

    def _put_in(self, column: dict[str, list[int]], row: int, task: int, op: Operation) -> None:
        op.kind, op.end = "put", op.begin
        self.operations.append(op)

    def _depot_in(self, column: dict[str, list[int]], row: int, task: int, op: Operation) -> None:
        op.kind, op.hi = "depot", column["work"][row]
        self.works[task] = op
        self.operations.append(op)

    def _magfree_in(self, column: dict[str, list[int]], row: int, task: int, op: Operation) -> None:
        pool, start = self.trace.pool, column["pfns"][row]
        pfns = pool[start : start + column["pfns.count"][row]].tolist()
        top = self._top(task, "alloc", op.iovad)
        if top is not None:
            top.drained.append((op.begin, column["n"][row], pfns))
        work = self.operations[len(self.operations) - 1] if self.operations else None
        if top is None and work is not None and work.kind == "depot" and work.pid == op.pid:
            work.iovad, work.drained = op.iovad, [(op.begin, column["n"][row], pfns)]
            self.works[task] = work

    def _cpufree_in(self, column: dict[str, list[int]], row: int, task: int, op: Operation) -> None:
        if self._top(task, "alloc", op.iovad) is None:
            op.kind, op.size, op.end = "offline", column["cpu"][row], op.begin
            self.operations.append(op)

    # Stacks -----------------------------------------------------------------------------------------------------------

    def _top(self, task: int, kind: str, iovad: int) -> Operation | None:
        stack = self.stacks.get(task)
        top: Operation | None = stack[len(stack) - 1] if stack else None
        return top if top is not None and top.kind == kind and top.iovad == iovad else None

    def _pop(self, task: int, kind: str, answer: Operation, size: int, pfn: int | None = None) -> Operation | None:
        """The innermost open call that this return may end; open calls inside it lost their return."""
        stack = self.stacks.get(task, [])
        for depth in range(len(stack) - 1, -1, -1):
            op = stack[depth]
            if op.kind != kind or (answer.iovad not in (op.iovad, ABSENT)):
                continue
            if size in (op.size, ABSENT) and (pfn is None or pfn == op.pfn):
                del stack[depth:]
                return op
        return None

    @staticmethod
    def _return(found: Operation, answer: Operation) -> None:
        if answer is not found:
            found.end = found.moments[len(found.moments) - 1] if found.moments else answer.begin
            found.line = answer.line
            if answer.cpus != found.cpus:
                found.cpus = (*found.cpus, *answer.cpus)
