"""Schedules: in which order the requests of a workload are submitted and completed, hence how many are in flight.

A schedule is walked event by event, ``(SUBMIT or COMPLETE, request number)``, or by *stretches*: arrays of kinds and of
positions, at most ``most`` events each, without an object an event. It can be walked more than once. The schedule of a
queue is a rule, that of a recorded workload two arrays.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from dmakit.lab.request_table import Requests

SUBMIT, COMPLETE = 0, 1
Schedule = Iterable[tuple[int, int]]
"""(SUBMIT or COMPLETE, request number), in order; can be walked more than once."""
Stretch = tuple[Any, Any]
"""(kinds, positions): two equally long buffers, of bytes and of 64-bit words."""


def stretches(schedule: Schedule, requests: Requests, most: int) -> Iterator[Stretch]:
    """The schedule in stretches of at most ``most`` events; KeyError for a number that no request has."""
    if isinstance(schedule, QueueSchedule | ListedSchedule | SplitSchedule):
        found = schedule.numbered_stretches(most)
    else:
        found = _collected(schedule, most)
    for kinds, numbers in found:
        yield kinds, requests.positions(numbers)


def _collected(schedule: Schedule, most: int) -> Iterator[Stretch]:
    """From any walk over events."""
    events = iter(schedule)
    while some := list(islice(events, most)):
        yield array("B", [kind for kind, _ in some]), array("Q", [number for _, number in some])


@dataclass(frozen=True, slots=True)
class QueueSchedule:
    """Submit until ``depth`` are in flight, then complete the oldest before each further submission."""

    count: int
    depth: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for number in range(self.count):
            if number >= self.depth:
                yield COMPLETE, number - self.depth
            yield SUBMIT, number
        for number in range(max(0, self.count - self.depth), self.count):
            yield COMPLETE, number

    def numbered_stretches(self, most: int) -> Iterator[Stretch]:
        """The same in arrays of kinds and numbers: event e follows from e alone."""
        depth = min(self.depth, self.count)
        for start in range(0, 2 * self.count, most):
            event = np.arange(start, min(start + most, 2 * self.count))
            later = event - depth
            submits = (later < 0) | ((later % 2 == 1) & (event < 2 * self.count - depth))
            numbers = np.where(later < 0, event, later // 2 + np.where(submits, depth, 0))
            numbers = np.where(event >= 2 * self.count - depth, event - self.count, numbers)
            yield np.where(submits, SUBMIT, COMPLETE).astype(np.uint8), numbers.astype(np.uint64)


class ListedSchedule:
    """Events one by one, kept in two arrays."""

    def __init__(self, events: Iterable[tuple[int, int]]) -> None:
        self.kinds, self.numbers = array("B"), array("Q")
        for kind, number in events:
            self.kinds.append(kind)
            self.numbers.append(number)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.kinds, self.numbers, strict=True)

    def __len__(self) -> int:
        return len(self.kinds)

    def numbered_stretches(self, most: int) -> Iterator[Stretch]:
        """The same in arrays of kinds and numbers."""
        for start in range(0, len(self), most):
            yield self.kinds[start : start + most], self.numbers[start : start + most]


@dataclass(frozen=True, slots=True)
class SplitSchedule:
    """For requests that were cut: the one at position i became those numbered ``first[i]`` to ``first[i+1]`` - 1."""

    schedule: Schedule
    requests: Requests
    first: array[int]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for kind, number in self.schedule:
            at = self.requests.position(number)
            for part in range(self.first[at], self.first[at + 1]):
                yield kind, part

    def numbered_stretches(self, most: int) -> Iterator[Stretch]:
        """The same in arrays of kinds and numbers."""
        first = np.frombuffer(self.first, np.uint64).astype(np.int64)
        for kinds, positions in stretches(self.schedule, self.requests, most):
            at = np.asarray(positions).astype(np.int64)
            each = first[at + 1] - first[at]
            ends = np.cumsum(each)
            numbers = np.repeat(first[at] - ends + each, each) + np.arange(ends[-1])
            all_kinds = np.repeat(np.asarray(kinds), each)
            for start in range(0, len(numbers), most):
                yield all_kinds[start : start + most], numbers[start : start + most].astype(np.uint64)
