"""Stretches of a trace as rows in the order of time: what streams from the scanner to the pairing of events.

A *batch* holds consecutive records. Its words are those of the scanner's rows (``rows.Rows``); ``starts`` says where
the row of each record begins. Batches of a file in order of time are used as they come, without a copy. Those of
another file pass through an ``Ordering``, which sorts by stamp (equal stamps keep the file's order) within a window
of records: a record that has its place further back than that is a ``Disorder``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dmakit.consts import SCAN_HEAD, SCAN_LOST
from dmakit.trace.events import EVENTS, KIND
from dmakit.trace.pattern import Pattern
from dmakit.trace.scanner import Scanner

Words = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
_LINE, _STAMP, _CPU = 1, 2, 3
PATTERN = Pattern(EVENTS)
WIDTH: Ints = np.array(PATTERN.width, np.int64) + SCAN_HEAD
_LISTS = ("magfree_in",)  # kinds whose lists anybody reads from a batch
_PFNS = SCAN_HEAD + PATTERN.slots[KIND["magfree_in"]]["pfns"][0]


class Disorder(Exception):
    """A record belongs before those that have left the window already. ``args[0]``: its line."""


@dataclass(slots=True)
class Batch:
    """Consecutive records: ``kinds`` and ``starts`` have one element a record, ``words`` and ``pool`` are shared."""

    kinds: Ints
    starts: Ints
    words: Words
    pool: Words

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def stamps(self) -> Words:
        """The stamp of each record."""
        return self.words[self.starts + _STAMP]

    def lines(self, index: Ints) -> Words:
        """The line numbers of some records."""
        return self.words[self.starts[index] + _LINE]

    def cpus(self, index: Ints) -> Words:
        """The CPUs of some records."""
        return self.words[self.starts[index] + _CPU]

    def lost(self) -> list[int]:
        """The numbers of events in the markers of lost events."""
        found: list[int] = self.words[self.starts[self.kinds == SCAN_LOST] + SCAN_HEAD].tolist()
        return found

    def copy(self) -> Batch:
        """A batch that outlives the next scan."""
        return Batch(self.kinds.copy(), self.starts, self.words.copy(), self.pool.copy())

    def take(self, index: Ints) -> Batch:
        """Some records, in the order of ``index``, and only their words."""
        kinds, starts = self.kinds[index], self.starts[index]
        width = WIDTH[kinds]
        fresh = np.cumsum(width) - width
        words = self.words[np.repeat(starts - fresh, width) + np.arange(int(width.sum()))]
        lists = fresh[np.isin(kinds, [KIND[name] for name in _LISTS])] + _PFNS
        low = int(words[lists].min()) if len(lists) else len(self.pool)
        words[lists] -= np.uint64(low)
        return Batch(kinds, fresh, words, self.pool[low:])


def scanned(scanner: Scanner) -> Batch:
    """The rows of the last scan; valid until the next one."""
    kinds, words = scanner.rowwise()
    found = np.frombuffer(kinds, np.int64)
    width = WIDTH[found]
    pool = np.frombuffer(scanner.elements(), np.uint64)
    return Batch(found, np.cumsum(width) - width, np.frombuffer(words, np.uint64), pool)


def joined(batches: list[Batch]) -> Batch:
    """One batch of several."""
    at, pooled = 0, 0
    starts, words = [], []
    for batch in batches:
        moved = batch.words
        lists = batch.starts[np.isin(batch.kinds, [KIND[name] for name in _LISTS])] + _PFNS
        if len(lists):
            moved = moved.copy()
            moved[lists] += np.uint64(pooled)
        starts.append(batch.starts + at)
        words.append(moved)
        at, pooled = at + len(moved), pooled + len(batch.pool)
    kinds = np.concatenate([batch.kinds for batch in batches])
    return Batch(kinds, np.concatenate(starts), np.concatenate(words), np.concatenate([b.pool for b in batches]))


class Ordering:
    """Sorts records by stamp. ``window``: how many are held back (None: all of them)."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.held: list[Batch] = []
        self.count = 0
        self.last = 0

    def add(self, batch: Batch) -> Batch | None:
        """The records whose place is certain by now, if it is time to look. Disorder when one came too late."""
        stamps = batch.stamps
        late = np.flatnonzero(stamps < self.last)
        if len(late):
            raise Disorder(int(batch.lines(late[:1])[0]))
        self.held.append(batch.copy())
        self.count += len(batch)
        if self.window is None or self.count < 2 * self.window:
            return None
        return self._sorted(self.count - self.window)

    def rest(self) -> Batch | None:
        """What is held, at the end of the file."""
        return self._sorted(self.count) if self.count else None

    def _sorted(self, count: int) -> Batch:
        every = joined(self.held)
        stamps = every.stamps
        order = np.argsort(stamps, kind="stable")
        self.held = [every.take(order[count:])]
        self.count -= count
        self.last = int(stamps[order[count - 1]])
        return every.take(order[:count])
