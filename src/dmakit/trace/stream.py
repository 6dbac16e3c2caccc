"""A trace as a stream: batches of records in the order of time, memory bounded however long the file is.

Some facts belong to the whole file and are needed from its first event on: which CPUs act (their numbers, and how
large a depot may grow), which kinds of events were recorded (whether an allocation without a tree search was a
magazine hit, or searches were not recorded), whether the lines are in order of time. They are taken from the
*head*, the first ``WINDOW`` records, which are held: a file that fits in has no other. In a longer one the rest is
held against them while it streams by. What contradicts them is a ``Surprise``: all facts are learned in a pass
that only scans, and the stream starts again. A pipe cannot: there a surprise is an InputError.

Lines out of order are sorted within a window of ``WINDOW`` records; only a file that needs more is held whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dmakit.consts import SCAN_LOST
from dmakit.errors import InputError
from dmakit.trace.archive import is_read_once, line_chunks
from dmakit.trace.batch import Batch, Disorder, Ordering, scanned
from dmakit.trace.events import EVENTS, KIND
from dmakit.trace.operations import KINDS
from dmakit.trace.scanner import Scanner
from dmakit.trace.totals import Totals

WINDOW = 1 << 18  # records
_NAMES = 1 << 16  # words that a scanner is let to remember: nothing here looks at them
_TELLING = frozenset(("af_in", "ff_in", "ff_out", "ai_out", "fi_in"))  # kinds whose absence means something
_ACTS = np.zeros(SCAN_LOST + 1, np.bool_)
_ACTS[[*(KIND[name] for name in KINDS), SCAN_LOST]] = True
Progress = Callable[[int], None]


class Surprise(Exception):
    """The trace shows what its head did not. ``args``: what, and the stream that shows it."""


@dataclass
class Facts:
    """What holds for a whole trace. ``window``: how many records an ordering has to hold back (None: all).
    ``online``: CPUs on line (``Totals.online``)."""

    cpus: set[int] = field(default_factory=set)
    kinds: set[int] = field(default_factory=set)
    ordered: bool = True
    window: int | None = WINDOW
    whole: bool = False
    online: int = 1
    last: int = 0

    def add(self, batch: Batch) -> list[str]:
        """Take in what ``batch`` shows; returns what of that is new and matters."""
        if not len(batch):
            return []
        news = []
        acting = np.flatnonzero(_ACTS[batch.kinds])
        cpus = set(np.unique(batch.cpus(acting)).tolist()) - self.cpus
        news += [f"CPU {cpu} acts for the first time" for cpu in sorted(cpus)]
        kinds = set(np.flatnonzero(np.bincount(batch.kinds)).tolist()) - self.kinds
        news += [f"the first {EVENTS[k].name} event" for k in kinds if k < len(EVENTS) and EVENTS[k].name in _TELLING]
        stamps = batch.stamps
        if self.ordered and (int(stamps[0]) < self.last or bool((stamps[1:] < stamps[:-1]).any())):
            self.ordered = False
            news.append("a line out of the order of time")
        self.last = int(stamps[-1])
        self.cpus |= cpus
        self.kinds |= kinds
        return news

    @property
    def names(self) -> set[str]:
        """The names of the kinds of events that occur."""
        return {EVENTS[kind].name for kind in self.kinds if kind < len(EVENTS)}


class TraceStream:
    """One pass over a trace. ``facts`` are complete for the records given out so far; ``totals`` for those scanned."""

    def __init__(
        self, path: str | Path, facts: Facts | None = None, *, window: int = WINDOW, progress: Progress | None = None
    ) -> None:
        self.path = path
        self.window = window
        self.progress = progress
        self.totals = Totals(str(path))
        self.lost: list[int] = [0, 0]  # markers, events
        self._scans = self._scan()
        self._head: deque[Batch] = deque()
        if facts is None:
            facts = self._read_head()
        self.facts = facts

    def _read_head(self) -> Facts:
        facts = Facts(window=self.window)
        for batch in self._scans:
            facts.add(batch)
            self._head.append(batch.copy())
            facts.online = self.totals.online
            if self.totals.records >= self.window:
                return facts
        facts.whole, facts.window = True, None
        return facts

    def _scan(self) -> Generator[Batch, None, None]:
        """The file's batches, as they are. InputError at the end when none held an event."""
        scanner = Scanner()
        for chunk in line_chunks(self.path):
            self.totals.scan(scanner, chunk)
            batch = scanned(scanner)
            if len(lost := batch.lost()):
                self.lost = [self.lost[0] + len(lost), self.lost[1] + sum(lost)]
                self.totals.marked = self.lost[1]
            yield batch
            if len(scanner.names) > _NAMES:
                scanner = Scanner()
            if self.progress is not None:
                self.progress(self.totals.records)
        self.totals.refuse_without_events(self.lost[0])

    def _records(self) -> Iterator[Batch]:
        while self._head:
            yield self._head.popleft()
        begin = self.totals.lines + 1
        for batch in self._scans:
            news = [] if self.facts.whole else self.facts.add(batch)
            if self.totals.online > self.facts.online:
                news.append(f"a header that tells of {self.totals.online} CPUs")
            if news:
                raise Surprise(f"{news[0]} between lines {begin} and {self.totals.lines}", self)
            yield batch
            begin = self.totals.lines + 1

    def batches(self) -> Iterator[Batch]:
        """All records in the order of time. A batch is valid until the next one is asked for. Raises Surprise."""
        if self.facts.ordered:
            yield from self._records()
            return
        ordering = Ordering(self.facts.window)
        try:
            for batch in self._records():
                if (found := ordering.add(batch)) is not None:
                    yield found
        except Disorder as error:
            self.facts.window = None
            raise Surprise(f"line {error.args[0]} is {self.window} records or more behind its time", self) from error
        if (found := ordering.rest()) is not None:
            yield found

    def close(self) -> None:
        """Let go of the file."""
        self._scans.close()

    def learn(self, news: Surprise) -> Facts:
        """The facts of the whole file, for another pass over it; InputError when there can be none."""
        if is_read_once(self.path):
            raise InputError(
                f"{self.path}: {news.args[0]}: not to be foreseen from the first {self.window} events, and a pipe "
                f"is read once; write the trace to a file"
            )
        if self.facts.whole:
            return self.facts
        facts = Facts(window=self.window, whole=True)
        scan = TraceStream(self.path, Facts(), window=self.window, progress=self.progress)
        for batch in scan._scans:
            facts.add(batch)
        facts.online = scan.totals.online
        return facts
