"""Virtual time: nothing from memory/ to dma/ reads a clock; it is given one of these.

Timers fire only when somebody advances the clock, in order of their time and then of arming, so every run is
the same run. ``now`` is in nanoseconds.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

Timer = list[object]
MS = 1_000_000


class VirtualClock:
    """A clock that stands still until ``advance`` is called."""

    def __init__(self) -> None:
        self.now = 0
        self._sequence = 0
        self._timers: list[tuple[int, int, Timer]] = []

    def call_later(self, delay_ns: int, function: Callable[[], None]) -> Timer:
        """Arm a timer; returns the handle for ``cancel``."""
        handle: Timer = [function]
        self._sequence += 1
        heapq.heappush(self._timers, (self.now + delay_ns, self._sequence, handle))
        return handle

    def cancel(self, handle: Timer) -> None:
        """Disarm a timer; harmless when it has fired."""
        handle[:] = [None]

    def pending(self) -> int:
        """Number of timers that are armed."""
        return sum(1 for _, _, handle in self._timers if handle[0] is not None)

    def advance(self, delta_ns: int) -> None:
        """Move time forward, firing every timer that falls due on the way (timers may arm timers)."""
        if delta_ns < 0:
            raise ValueError(f"delta_ns={delta_ns}: time does not run backwards")
        end = self.now + delta_ns
        while self._timers and self._timers[0][0] <= end:
            when, _, handle = heapq.heappop(self._timers)
            self.now = max(self.now, when)
            function = handle[0]
            handle[:] = [None]
            if callable(function):
                function()
        self.now = end
