"""A set of integers kept as sorted, disjoint, non-adjacent half-open ranges; for bookkeeping, not for hot code."""

from __future__ import annotations

import bisect
from collections.abc import Iterator


class Ranges:
    """``add``/``remove`` [start, end); ``covers`` all of it, ``overlaps`` any of it; iteration gives the ranges."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._starts, self._ends, strict=True))

    def __bool__(self) -> bool:
        return bool(self._starts)

    def _span(self, start: int, end: int) -> tuple[int, int]:
        """Indices [low, high) of the ranges that overlap [start, end)."""
        return bisect.bisect_right(self._ends, start), bisect.bisect_left(self._starts, end)

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any integer of [start, end) is in the set."""
        low, high = self._span(start, end)
        return low < high

    def covers(self, start: int, end: int) -> bool:
        """Whether all of a non-empty [start, end) is in the set."""
        low, high = self._span(start, end)
        return high - low == 1 and self._starts[low] <= start and end <= self._ends[low]

    def add(self, start: int, end: int) -> None:
        """Put [start, end) into the set, joining neighbours."""
        low, high = bisect.bisect_left(self._ends, start), bisect.bisect_right(self._starts, end)
        if low < high:
            start, end = min(start, self._starts[low]), max(end, self._ends[high - 1])
        self._starts[low:high], self._ends[low:high] = [start], [end]

    def remove(self, start: int, end: int) -> None:
        """Take [start, end) out of the set."""
        low, high = self._span(start, end)
        if low >= high:
            return
        before, after = (self._starts[low], start), (end, self._ends[high - 1])
        left = [one for one in (before, after) if one[0] < one[1]]
        self._starts[low:high] = [one[0] for one in left]
        self._ends[low:high] = [one[1] for one in left]
