"""From allocator events to operations: who did what to which domain between which two moments.

An *operation* is one call of the IOVA allocator. It takes effect at some moment of its interval: after its entry event
(``begin``) and before its return event (``end``); both are places in the order of the trace (``seq``). Intervals that
overlap leave the order open (``search.py`` finds one).

Entries and returns are paired on a stack for each task, so that an interrupt's operations nest in those of the task it
interrupted. A task is its pid, because tasks migrate between CPUs; the idle tasks all have pid 0 and stay on their CPU.

What has no partner: a return without an entry began behind its task's last event, if any in the trace; an entry without
a return is still open (``end`` = OPEN): whether and how it took effect is not known.

Events inside a call narrow its interval: a tree search took effect before its ``ai_out``, a free into the tree after
its ``fi_in``.

Also operations: ``reserve``, ``init`` and ``put`` of a domain, ``free_iova`` outside of a fast free (``free_node``),
one run of a depot's delayed work (``depot``), a CPU's magazines given back (``offline``) and lost events (``lost``,
in every domain).

Operations enter the timeline when they begin and are completed while they wait there. The reader keeps only what may
still change: each task's open calls and its last event, as far back as the timeline's window reaches.
"""

from __future__ import annotations

from array import array
from collections.abc import Set
from typing import TYPE_CHECKING, TypeAlias

import cython
import numpy as np

from dmakit.trace.events import ABSENT, KIND
from dmakit.trace.operation import OPEN
from dmakit.trace.pattern import Pattern
from dmakit.trace.storage import flat, longs

if not cython.compiled:
    from dmakit.consts import SCAN_HEAD, SCAN_LOST
    from dmakit.trace.operation import Operation
    from dmakit.trace.timeline import Timeline

if TYPE_CHECKING:
    from dmakit.trace.batch import Batch

Text: TypeAlias = str
Cpus: TypeAlias = tuple[int, ...]
_COLUMNS = {
    "af_in": ("iovad", "size", "limit", "flush"),
    "af_out": ("iovad", "size", "limit", "pfn"),
    "ff_in": ("iovad", "pfn", "size"),
    "ff_out": ("iovad", "pfn", "size"),
    "ai_out": ("iovad", "ret", "lo"),
    "fi_in": ("iovad", "pfn"),
    "init_in": ("iovad", "granule", "start"),
    "res_in": ("iovad", "lo", "hi"),
    "put_in": ("iovad",),
    "depot_in": ("work",),
    "magfree_in": ("iovad", "n", "pfns", "pfns.count"),
    "cpufree_in": ("iovad", "cpu"),
}
KINDS = tuple(_COLUMNS)
_MOST = 4  # columns of any of them
_NO_SEARCH: list[int] = []  # of every allocation that a magazine answered


@cython.cclass
class OperationReader:
    """Pairs the events of one trace. ``shown``: the kinds of events that it has. ``numbers``: what its CPUs are called.

    ``offset`` shifts its order behind that of an earlier trace (the boot trace) on the same ``timeline``.
    """

    def __init__(self, timeline: Timeline, shown: Set[str], numbers: dict[int, int], offset: int = 0) -> None:
        self.timeline, self.numbers, self.offset = timeline, numbers, offset
        self.searches_recorded, self.frees_recorded = "ai_out" in shown, "fi_in" in shown
        self.entries_recorded, self.free_entries_recorded = "af_in" in shown, "ff_in" in shown
        self.place = offset
        self.tidied = offset
        self.which = np.full(SCAN_LOST + 1, -1, np.int64)
        self.which[SCAN_LOST] = len(KINDS)
        slots = Pattern().slots
        self.slot = memoryview(array("q", bytes(8 * _MOST * len(KINDS))))
        for number, (name, columns) in enumerate(_COLUMNS.items()):
            self.which[KIND[name]] = number
            for i, column in enumerate(columns):
                base, _, more = column.partition(".")
                self.slot[number * _MOST + i] = SCAN_HEAD + slots[KIND[name]][base][0] + bool(more)
        self.rows = self.seqs = self.starts = flat(np.zeros(1, np.int64))
        self.words = self.pool = longs(1)
        self.seq = self.line = self.cpu = self.pid = self.task = 0
        self.at = self.base = 0
        self.iovad, self.absent = 0, ABSENT
        self.alone: dict[int, Cpus] = {}
        self.stacks: dict[int, list[Operation]] = {}
        self.latest: dict[int, int] = {}
        self.works: dict[int, Operation] = {}
        self.last: Operation | None = None

    # Reading ---------------------------------------------------------------------------------------------------------

    def read(self, batch: Batch) -> None:
        """The next records of the trace."""
        i: cython.Py_ssize_t
        seq: cython.longlong
        rows = self.which[batch.kinds]
        index = np.flatnonzero(rows >= 0)
        self.rows, self.seqs, self.starts = flat(rows[index]), flat(index + self.place), flat(batch.starts[index])
        self.words, self.pool = flat(batch.words), flat(batch.pool)
        for i in range(len(index)):
            seq = self.seqs[i]
            if seq >= self.timeline.due:
                self.timeline.follow(seq)
            self._event(self.rows[i], seq, self.starts[i])
        self.place += len(batch)
        if self.place - self.tidied >= self.timeline.window:
            self._tidy()

    def _event(self, which: cython.longlong, seq: cython.longlong, at: cython.Py_ssize_t) -> None:
        self.seq, self.at, self.base = seq, at, which * _MOST
        self.line, self.cpu, self.pid = self.words[at + 1], self.words[at + 3], self.words[at + 4]
        self.task = self.pid if self.pid else -1 - self.cpu
        if which == len(KINDS):
            self._add("lost", 0, seq, seq)
            return
        self.iovad = self._value(0)
        if self.works and self.task in self.works:
            work: Operation = self.works.pop(self.task)
            work.end = seq
        self._read(which)
        self.latest[self.task] = seq

    def _read(self, which: cython.longlong) -> None:
        """One event, by its place in KINDS."""
        if which == 0:
            self._af_in()
        elif which == 1:
            self._af_out()
        elif which == 2:
            self._ff_in()
        elif which == 3:
            self._ff_out()
        elif which == 4:
            self._ai_out()
        elif which == 5:
            self._fi_in()
        elif which <= 8:
            self._domain(which)
        elif which == 9:
            self._depot_in()
        elif which == 10:
            self._magfree_in()
        else:
            self._cpufree_in()

    def _value(self, column: cython.Py_ssize_t) -> cython.ulonglong:
        """A column of the event, by its place in _COLUMNS."""
        return self.words[self.at + self.slot[self.base + column]]

    def _add(self, kind: Text, iovad: cython.ulonglong, begin: cython.longlong, end: cython.longlong) -> Operation:
        """A new operation, by the task and on the CPU of the event."""
        cpus = self.alone.get(self.cpu)
        if cpus is None:
            cpus = self.alone[self.cpu] = (self.numbers[self.cpu],)
        op = Operation(kind, iovad, begin, end, cpus, self.line, self.pid)
        self.timeline.add(op)
        self.last = op
        return op

    def _open(self, kind: Text) -> Operation:
        """A new operation whose return is to come."""
        op = self._add(kind, self.iovad, self.seq, OPEN)
        stack = self.stacks.get(self.task)
        if stack is None:
            self.stacks[self.task] = [op]
        else:
            stack.append(op)
        return op

    def _unseen(self, recorded: cython.bint) -> cython.longlong:
        """Where a call began whose entry is not in the trace: behind its task's last event (or before the trace), or at
        its return when no entries are recorded at all."""
        return self.latest.get(self.task, self.offset - 1) if recorded else self.seq

    def _tidy(self) -> None:
        """Forget what lies before the timeline's window."""
        edge, self.tidied = self.timeline.at, self.place
        self.latest = {task: seq for task, seq in self.latest.items() if seq >= edge}
        self.works = {task: op for task, op in self.works.items() if op.begin >= edge}
        stacks = {task: [op for op in stack if op.begin >= edge] for task, stack in self.stacks.items()}
        self.stacks = {task: stack for task, stack in stacks.items() if stack}

    # Allocations -----------------------------------------------------------------------------------------------------

    def _af_in(self) -> None:
        op = self._open("alloc")
        op.size, op.limit = self._value(1), self._value(2)
        flush: cython.ulonglong = self._value(3)
        op.flush = flush == 1 or flush == self.absent
        op.searches = _NO_SEARCH if self.searches_recorded else None

    def _af_out(self) -> None:
        size: cython.ulonglong = self._value(1)
        found = self._pop("alloc", size, None)
        if found is None:
            if self.iovad == self.absent or size == self.absent:
                return  # a bare return value without its entry says nothing about the allocator
            found = self._add("alloc", self.iovad, self._unseen(self.entries_recorded), self.seq)
            found.size, found.limit, found.flush = size, self._value(2), True
        else:
            self._return(found)
        found.pfn = self._value(3)

    def _ai_out(self) -> None:
        top = self._top("alloc")
        if top is not None and top.searches is not None:
            answer = self._value(2) if self._value(1) else 0
            top.searches = [*top.searches, answer]
            top.moments = [*top.moments, self.seq]
            if len(top.searches) == 2:
                self._split(top)

    def _split(self, op: Operation) -> None:
        """An allocation that searched twice is three operations: the miss, the drain of all magazines, the retry.

        Interrupts and other tasks act between them; ``op`` becomes the retry.
        """
        first, second = op.moments
        seqs = [seq for seq, _, _ in op.drained]
        miss = op.part("miss", op.begin, first)
        drain = op.part("drain", min(seqs, default=first), max(seqs, default=second))
        self.timeline.add(miss)
        self.timeline.add(drain)
        self.last = drain
        op.begin, op.retry = drain.end, True

    # Frees -----------------------------------------------------------------------------------------------------------

    def _ff_in(self) -> None:
        op = self._open("free")
        op.pfn, op.size = self._value(1), self._value(2)
        op.to_tree = False if self.frees_recorded else None

    def _ff_out(self) -> None:
        size: cython.ulonglong = self._value(2)
        pfn = self._value(1)
        found = self._pop("free", size, pfn)
        if found is None:
            found = self._add("free", self.iovad, self._unseen(self.free_entries_recorded), self.seq)
            found.size, found.pfn = size, pfn
        else:
            self._return(found)

    def _fi_in(self) -> None:
        top = self._top("free")
        pfn = self._value(1)
        if top is not None and top.pfn == pfn:
            top.to_tree, top.begin = True, self.seq
            return
        self._add("free_node", self.iovad, self.seq, self.seq).pfn = pfn

    # Everything else --------------------------------------------------------------------------------------------------

    def _domain(self, which: cython.longlong) -> None:
        """``init_in``, ``res_in`` or ``put_in``."""
        op = self._add("init" if which == 6 else "reserve" if which == 7 else "put", self.iovad, self.seq, self.seq)
        if which == 6:
            op.size, op.pfn = self._value(1), self._value(2)
        elif which == 7:
            op.pfn, op.hi = self._value(1), self._value(2)

    def _depot_in(self) -> None:
        op = self._add("depot", 0, self.seq, OPEN)
        op.hi = self._value(0)
        self.works[self.task] = op

    def _magfree_in(self) -> None:
        start: cython.Py_ssize_t = self._value(2)
        end: cython.Py_ssize_t = start + self._value(3)
        drained = (self.seq, self._value(1), list(self.pool[start:end]))
        top = self._top("alloc")
        work = self.last
        if top is not None:
            top.drained = [*top.drained, drained]
        elif work is not None and work.kind == "depot" and work.pid == self.pid:
            work.iovad, work.drained = self.iovad, [drained]
            self.works[self.task] = work

    def _cpufree_in(self) -> None:
        if self._top("alloc") is None:
            op = self._add("offline", self.iovad, self.seq, self.seq)
            op.size = self.numbers.get(self._value(1), 0)

    # Stacks -----------------------------------------------------------------------------------------------------------

    def _top(self, kind: Text) -> Operation | None:
        """The innermost open call of the task, if it is of this kind and on the event's domain."""
        stack = self.stacks.get(self.task)
        if not stack:
            return None
        top: Operation = stack[len(stack) - 1]
        return top if top.kind == kind and top.iovad == self.iovad else None

    def _pop(self, kind: Text, size: cython.ulonglong, pfn: object) -> Operation | None:
        """The innermost open call that this return may end; open calls inside it lost their return. A call from before
        the timeline's window took its place there without a return."""
        stack = self.stacks.get(self.task)
        if not stack:
            return None
        depth: cython.Py_ssize_t = len(stack) - 1
        op: Operation
        while depth >= 0:
            op = stack[depth]
            if op.kind == kind and self._answers(op, size, pfn):
                del stack[depth:]
                return op
            depth -= 1
        return None

    def _answers(self, op: Operation, size: cython.ulonglong, pfn: object) -> cython.bint:
        """Whether the event may be the return of ``op``: what it shows is the same, and ``op`` still waits for it."""
        if self.iovad not in (op.iovad, self.absent) or size not in (op.size, self.absent):
            return False
        return (pfn is None or pfn == op.pfn) and op.begin >= self.timeline.at

    def _return(self, found: Operation) -> None:
        """The event is the return of ``found``."""
        found.end = found.moments[len(found.moments) - 1] if found.moments else self.seq
        found.line = self.line
        cpu = self.numbers[self.cpu]
        if cpu != found.cpus[0]:
            found.cpus = (found.cpus[0], cpu)
