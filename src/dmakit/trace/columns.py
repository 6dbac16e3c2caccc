"""A trace as typed columns: one table of NumPy arrays for each kind of event, in one order of time.

``load(path)`` scans a file. ``trace.table("af_in")`` gives a ``Table``: ``seq`` (place in the order of all events of
the trace), ``line``, ``stamp`` (count or nanoseconds), ``cpu``, ``pid``, ``context`` (a byte: ``h``/``H`` hard
interrupt, ``s`` soft interrupt; 0 without the column), and one uint64 array a field (``table["pfn"]``). Words are ids
into ``trace.names``; lists are slices of ``trace.pool``. A kind that does not occur gives an empty table.

Order: the kernel prints events sorted by time; files that are not (per-CPU buffers put one after the other) are
sorted by stamp, and the file's order breaks ties. ``lost`` are the ``[LOST 123 EVENTS]`` markers. ``recording`` is what
``dmakit record`` wrote into the file about itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmakit.consts import SCAN_HEAD, SCAN_LOST
from dmakit.trace.archive import CHUNK, line_chunks
from dmakit.trace.events import ABSENT, EVENTS, KIND
from dmakit.trace.scanner import Scanner
from dmakit.trace.totals import Totals

Words = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
_COMMON = ("line", "stamp", "cpu", "pid", "context")


@dataclass
class Table:
    """All events of one kind, in order of time. Column arrays have one element an event."""

    name: str
    seq: Ints
    common: dict[str, Ints]
    fields: dict[str, Words]

    def __len__(self) -> int:
        return len(self.seq)

    def __getitem__(self, column: str) -> Words:
        return self.fields[column]

    def __getattr__(self, column: str) -> Ints:
        try:
            common: dict[str, Ints] = self.__dict__["common"]
            return common[column]
        except KeyError:
            raise AttributeError(column) from None

    def signed(self, column: str) -> Ints:
        """A column of two's complement numbers (return values)."""
        return self.fields[column].view(np.int64)

    def take(self, index: npt.NDArray[Any]) -> Table:
        """The rows that ``index`` (positions or a mask) selects."""
        return Table(
            self.name,
            self.seq[index],
            {name: column[index] for name, column in self.common.items()},
            {name: column[index] for name, column in self.fields.items()},
        )


@dataclass
class Trace(Totals):
    """A scanned file: tables by event name and the counts of lines."""

    tables: dict[str, Table] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    pool: Words = field(default_factory=lambda: np.empty(0, np.uint64))
    sorted_by_stamp: bool = False
    lost: Table = field(default_factory=lambda: _empty("lost"))

    def table(self, name: str) -> Table:
        """The events of one kind (a name of ``events.EVENTS``)."""
        if name not in KIND:
            raise KeyError(f"{name!r} is not an event that the scanner knows")
        return self.tables.get(name) or _empty(name)

    def present(self) -> list[str]:
        """The kinds that occur."""
        return list(self.tables)

    def word(self, number: int) -> str:
        """The text of a word column's value; an empty string where the line had none."""
        return "" if number == ABSENT else self.names[number]

    def name_id(self, text: str) -> int:
        """The id of a word, ABSENT when it does not occur."""
        return self.names.index(text) if text in self.names else ABSENT

    def elements(self, table: Table, column: str, row: int) -> list[int]:
        """The list of a list column in one row."""
        start, count = int(table[column][row]), int(table[f"{column}.count"][row])
        found: list[int] = self.pool[start : start + count].tolist()
        return found

    @property
    def cpus(self) -> int:
        """CPUs on line: from the header, otherwise the highest CPU seen plus one."""
        if self.header is not None:
            return self.header[2]
        seen = [int(np.max(table.cpu)) for table in self.tables.values() if len(table)]
        return max(seen, default=0) + 1


def _columns(kind: int) -> dict[str, str]:
    columns = {}
    for item in EVENTS[kind].fields:
        columns[item.column] = item.how
        if item.how == "l":
            columns[f"{item.column}.count"] = "n"
    return columns


def _empty(name: str) -> Table:
    columns = _columns(KIND[name]) if name in KIND else {"count": "n"}
    common = {column: np.empty(0, np.int64) for column in _COMMON}
    return Table(name, np.empty(0, np.int64), common, {column: np.empty(0, np.uint64) for column in columns})


class _Builder:
    """Gathers the scanner's columns over chunks: per kind a list of matrices, a row of each for a column."""

    def __init__(self, path: str) -> None:
        self.trace = Trace(path)
        self.scanner = Scanner()
        self.parts: dict[int, list[Words]] = {}
        self.pools: list[Words] = []
        self.pooled = 0

    def add(self, chunk: bytes) -> None:
        """Scan one chunk of whole lines."""
        trace, scanner = self.trace, self.scanner
        first = trace.records
        trace.scan(scanner, chunk)
        for kind in scanner.present():
            block, rows = scanner.block(kind)
            part = np.frombuffer(block, np.uint64).reshape(-1, rows).copy()
            part[0] += np.uint64(first)
            for slot in self._lists(kind) if self.pooled else ():
                part[SCAN_HEAD + slot] += np.uint64(self.pooled)
            self.parts.setdefault(kind, []).append(part)
        self.pools.append(np.frombuffer(scanner.elements(), np.uint64).copy())
        self.pooled += scanner.pooled

    @staticmethod
    def _lists(kind: int) -> list[int]:
        if kind == SCAN_LOST:
            return []
        return [slot for slot, how in enumerate(_columns(kind).values()) if how == "l"]

    def finish(self) -> Trace:
        """The trace, its tables complete and in order of time."""
        trace = self.trace
        trace.names = self.scanner.names
        trace.pool = np.concatenate(self.pools) if self.pools else trace.pool
        joined = {
            kind: parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1) for kind, parts in self.parts.items()
        }
        rank = self._rank(joined)
        for kind, block in sorted(joined.items()):
            table = _table(kind, block)
            if rank is not None:
                table.seq = rank[table.seq]
                table = table.take(np.argsort(table.seq))
            if kind == SCAN_LOST:
                trace.lost = table
                trace.marked = int(table["count"].sum())
            else:
                trace.tables[table.name] = table
        return trace

    def _rank(self, joined: dict[int, Words]) -> Ints | None:
        """The place of each record in the order of stamps, or None when the file has that order."""
        stamps = np.zeros(self.trace.records, np.uint64)
        for block in joined.values():
            stamps[block[0].view(np.int64)] = block[2]
        if len(stamps) < 2 or bool((stamps[1:] >= stamps[:-1]).all()):
            return None
        self.trace.sorted_by_stamp = True
        rank = np.empty(len(stamps), np.int64)
        rank[np.argsort(stamps, kind="stable")] = np.arange(len(stamps))
        return rank


def _table(kind: int, block: Words) -> Table:
    whole = block.view(np.int64)
    common = {name: whole[1 + i] for i, name in enumerate(_COMMON)}
    names = ["count"] if kind == SCAN_LOST else list(_columns(kind))
    columns = {name: block[SCAN_HEAD + slot] for slot, name in enumerate(names)}
    return Table("lost" if kind == SCAN_LOST else EVENTS[kind].name, whole[0], common, columns)


def columns_of(text: bytes) -> Trace:
    """The trace that ``text`` is."""
    builder = _Builder("")
    begin = 0
    while begin < len(text):
        end = text.rfind(b"\n", begin, begin + CHUNK) + 1 or len(text)
        builder.add(text[begin:end])
        begin = end
    return builder.finish()


def load(path: str | Path) -> Trace:
    """Scan a trace file. InputError when it cannot be read or holds no event that dmakit knows."""
    builder = _Builder(str(path))
    for chunk in line_chunks(path):
        builder.add(chunk)
    trace = builder.finish()
    trace.refuse_without_events(len(trace.lost))
    return trace
