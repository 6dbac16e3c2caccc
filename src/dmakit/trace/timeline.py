"""The timeline: operations wait until everything about them is known, then act in the order of time.

A moment of the trace is a place in the order of its records. The reader works *ahead*: at the moment ``at`` it has
read at least ``window`` records further, and whatever it adds or changes lies there. Two rings, one slot a moment,
hold what begins and what ends; an operation enters the second when it has begun. So memory is that of a window,
and no sorting is needed: most moments have one operation.

Rules of the window, which only intervals longer than it ever meet: what has not returned by the time its turn
comes takes part as if the trace had no return of it; a begin that would lie in the past lies at ``at``.

Within a moment operations begin in the order in which they were added, then those end that end there, first begun
first. What an operation without a recorded end does: an allocation's effect is not known, it takes no part; a free and
a run of depot work have taken effect within ``_SLACK`` records (a free at once when frees' returns are not recorded);
in a boot trace (``limit``), whatever is open has ended where the trace itself begins.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, Protocol, TypeAlias

import cython

from dmakit.trace.operation import OPEN

if not cython.compiled:
    from dmakit.trace.midlife import MidLife
    from dmakit.trace.operation import Operation
    from dmakit.trace.search import OrderSearch

_SLACK = 512  # records within which an operation without a recorded end has taken effect
_STEP = 8  # parts of a window that the reader may be ahead of it
Ring: TypeAlias = list[Any]  # of Operation or None
_serial = attrgetter("serial")


class Domains(Protocol):
    """Whoever opens and closes domains: gets the operations that are not simply one domain's."""

    def begin(self, op: Operation) -> None:
        """``op`` begins."""

    def end(self, op: Operation) -> None:
        """``op`` ends."""


@cython.cclass
class Timeline:
    """Feeds ``searches`` (by domain). ``impossible``: operations left out because a line was damaged."""

    def __init__(self, domains: Domains, window: int, midlife: MidLife) -> None:
        self.domains, self.window, self.midlife = domains, window, midlife
        self.searches: dict[int, OrderSearch] = {}
        self.step = max(window // _STEP, 1)
        room = 1 << (window + self.step + 2 * _SLACK).bit_length()
        self.mask = room - 1
        self.begins: Ring = [None] * room
        self.ends: Ring = [None] * room
        self.at = -1  # an operation whose entry is older than the trace begins before its first record
        self.due = self.added = self.impossible = 0
        self.limit = OPEN
        self.free_returns_recorded = False

    def add(self, op: Operation) -> None:
        """An operation that begins ahead of ``at`` (or there, if it would have begun before)."""
        op.serial = self.added
        self.added += 1
        if op.begin < self.at:
            op.begin = self.at
        if 0 <= op.end < op.begin:
            op.end = op.begin
        _append(self.begins, op.begin & self.mask, op)

    def follow(self, seq: cython.longlong) -> None:
        """The reader is at the record ``seq``: act on what is a window behind it."""
        self.due = seq + self.step
        if seq - self.window > self.at:
            self.advance(seq - self.window)

    def advance(self, until: cython.longlong) -> None:
        """Act on all moments before ``until``."""
        slot: cython.Py_ssize_t
        op: Operation | None
        following: Operation | None
        while self.at < until:
            slot = self.at & self.mask
            op = self.begins[slot]
            if op is not None:
                self.begins[slot] = None
                if op.next is not None:
                    self._begin_some(op)
                else:
                    self._begin(op)
            op = self.ends[slot]
            if op is not None:
                self.ends[slot] = None
                while op is not None:
                    following, op.next = op.next, None
                    self._end(op)
                    op = following
            self.at += 1

    def finish(self, end: cython.longlong) -> None:
        """Act on everything; the last record was before ``end``."""
        self.advance(end + _SLACK + 1)

    # One moment ------------------------------------------------------------------------------------------------------

    def _begin_some(self, first: Operation) -> None:
        """Several operations of one moment; some may have been moved here by what was learned later."""
        found = []
        op: Operation | None = first
        while op is not None:
            found.append(op)
            following = op.next
            op.next = None
            op = following
        for each in sorted(found, key=_serial):
            self._begin(each)

    def _begin(self, op: Operation) -> None:
        if op.begin > self.at:  # narrowed since it was added
            _append(self.begins, op.begin & self.mask, op)
            return
        if not op.possible():
            self.impossible += 1
            return
        if op.end < 0 and (op.kind == "free" or op.kind == "depot"):
            op.end = op.begin + (_SLACK if op.kind == "depot" or self.free_returns_recorded else 0)
        if self.limit >= 0 and (op.end < 0 or op.end > self.limit):
            op.end = self.limit
        if op.end < 0:
            return
        _append(self.ends, op.end & self.mask, op)
        if op.kind == "alloc" and op.pfn:
            self.midlife.given(self.at, op.iovad, op.pfn)
        search: OrderSearch | None = self.searches.get(op.iovad)
        if search is None or op.kind == "put" or op.kind == "init" or op.kind == "lost":
            self.domains.begin(op)
        else:
            search.begin(op.serial, op)

    def _end(self, op: Operation) -> None:
        if op.kind == "free" or op.kind == "free_node":
            self.midlife.freed(self.at, op.iovad, op.pfn or 0)
        search: OrderSearch | None = self.searches.get(op.iovad)
        if search is None or op.kind == "put" or op.kind == "init" or op.kind == "lost":
            self.domains.end(op)
        elif op.serial in search.pending:
            search.end(op.serial)


def _append(ring: Ring, slot: cython.Py_ssize_t, op: Operation) -> cython.int:
    """Put ``op`` behind what is in the slot."""
    last: Operation | None = ring[slot]
    if last is None:
        ring[slot] = op
        return 0
    while last.next is not None:
        last = last.next
    last.next = op
    return 0
