"""Virtual time: nothing from memory/ to dma/ reads a clock; it is given one of these.

Timers fire only when somebody advances the clock, in order of their time and then of arming, so every run is
the same run. ``now`` is in nanoseconds.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from operator import index
from typing import SupportsIndex

import cython

from dmakit.errors import MisuseError

Timer = list[object]
MS = 1_000_000
END = (1 << 63) - 1
_NEVER = END


@cython.cclass
class VirtualClock:
    """A clock that stands still until ``advance`` is called; it cannot pass ``END`` nanoseconds (292 years)."""

    def __init__(self) -> None:
        self.now = 0
        self.due = _NEVER
        self._sequence = 0
        self._timers: list[tuple[int, int, Timer]] = []

    def call_later(self, delay_ns: SupportsIndex, function: Callable[[], None]) -> Timer:
        """Arm a timer; returns the handle for ``cancel``."""
        handle: Timer = [function]
        self._sequence += 1
        heapq.heappush(self._timers, (int(self.now) + index(delay_ns), self._sequence, handle))
        self._look()
        return handle

    def cancel(self, handle: Timer) -> None:
        """Disarm a timer; harmless when it has fired."""
        if not isinstance(handle, list) or len(handle) != 1:
            raise MisuseError(f"cancel: a {type(handle).__name__} is no timer: must be what call_later gave")
        handle[:] = [None]

    def pending(self) -> int:
        """Number of timers that are armed."""
        return sum(1 for _, _, handle in self._timers if handle[0] is not None)

    def advance(self, delta_ns: SupportsIndex) -> None:
        """Move time forward, firing every timer that falls due on the way (timers may arm timers)."""
        delta = index(delta_ns)
        end = int(self.now) + delta
        if delta < 0:
            raise ValueError(f"delta_ns={delta}: time does not run backwards")
        if end > END:
            raise ValueError(f"delta_ns={delta}: time ends at {END} ns")
        while self._timers and self._timers[0][0] <= end:
            when, _, handle = heapq.heappop(self._timers)
            self.now = max(int(self.now), when)
            self._look()
            function = handle[0]
            handle[:] = [None]
            if callable(function):
                function()
        self.now = end

    def _look(self) -> None:
        """``due``: when the first timer fires."""
        self.due = max(0, min(self._timers[0][0], END)) if self._timers else END

    def _tick(self, delta_ns: cython.longlong) -> cython.int:
        """``advance`` by a moment: two compares when no timer falls due."""
        if self.now + delta_ns < self.due:
            self.now += delta_ns
        else:
            self.advance(delta_ns)
        return 0
