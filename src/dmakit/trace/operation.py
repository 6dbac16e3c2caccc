"""One call of the IOVA allocator as a recording shows it: between which two moments, on which CPU, with what answer."""

from __future__ import annotations

from typing import Any, TypeAlias

import cython

Text: TypeAlias = str
Cpus: TypeAlias = tuple[int, ...]
OPEN = -1  # the end of an operation whose return has not been seen
_NONE: list[Any] = []  # of every operation that has none
_HIGHEST = (1 << 52) - 1  # the highest pfn of 4 KiB granules


@cython.cclass
class Operation:
    """One call on one domain. ``pfn`` of an allocation is the recorded answer (0 = it failed, None = not recorded).

    ``cpus``: the CPU at the entry and, when the task migrated, the one at the return. ``searches``: what each tree
    search inside an allocation answered (0 = failed), or None when the trace does not record them; ``moments``: when.
    ``drained``: (seq, number of pfns, the first of them) of each magazine given back. ``retry``: the second search of
    an allocation whose first part is an operation ``miss``. ``to_tree``: whether a free went to the tree, None when
    not recorded. ``line``: of the event that shows the answer. ``serial`` and ``next`` are the timeline's.
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
        self.serial = 0
        self.flush = self.retry = False
        self.pfn: int | None = None
        self.searches: list[int] | None = None
        self.to_tree: bool | None = None
        self.moments: list[int] = _NONE
        self.drained: list[tuple[int, int, list[int]]] = _NONE
        self.next: Operation | None = None

    def part(self, kind: Text, begin: cython.longlong, end: cython.longlong) -> Operation:
        """A failed search of this allocation as an operation of its own."""
        twin = Operation(kind, self.iovad, begin, end, self.cpus, self.line, self.pid)
        twin.size, twin.limit, twin.hi, twin.to_tree = self.size, self.limit, self.hi, self.to_tree
        twin.pfn, twin.searches, twin.retry = 0, [0], self.retry
        return twin

    def possible(self) -> cython.bint:
        """Whether its numbers can be a call's (a damaged line may hold any)."""
        pfn: cython.ulonglong = self.pfn or 0
        if self.kind in ("alloc", "miss", "drain"):
            return 0 < self.size <= _HIGHEST and pfn <= _HIGHEST
        if self.kind == "free":
            return 0 < self.size <= _HIGHEST and 0 < pfn <= _HIGHEST
        if self.kind == "free_node":
            return 0 < pfn <= _HIGHEST
        if self.kind == "reserve":
            return pfn <= self.hi <= _HIGHEST
        if self.kind == "init":
            return 4 <= self.size <= 1 << 30 and self.size & (self.size - 1) == 0 and 0 < pfn < 1 << 34
        return True

    def __str__(self) -> str:
        where = f"cpu {self.cpus[0]}" if len(self.cpus) == 1 else f"cpu {self.cpus[0]} to {self.cpus[1]}"
        if self.kind == "alloc":
            return f"line {self.line}: alloc size={self.size} limit={self.limit:#x} -> {self.pfn or 0:#x} on {where}"
        if self.kind in ("free", "free_node"):
            return f"line {self.line}: {self.kind} pfn={self.pfn or 0:#x} size={self.size} on {where}"
        return f"line {self.line}: {self.kind} on {where}"
