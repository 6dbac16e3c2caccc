"""Fail-nth: make the n-th use of a fallible resource fail.

Every allocator and platform call of a machine asks one shared FailPoint before it succeeds. Disarmed (the
default) the question costs one compare. A sweep runs an operation with n = 0, 1, 2 … until it completes
without the failure having fired, and checks after each that nothing leaked (``tests/support/sweep.py``).
"""

from __future__ import annotations

import cython


@cython.cclass
class FailPoint:
    """A countdown shared by the resources of one machine; ``fired`` tells whether it has struck."""

    def __init__(self) -> None:
        self.countdown = -1
        self.fired = False
        self.uses = 0

    def arm(self, nth: int) -> None:
        """Let the ``nth`` next use (0 = the very next) fail, once."""
        if nth < 0:
            raise ValueError(f"nth={nth}: must be 0 or more")
        self.countdown = nth
        self.fired = False

    def disarm(self) -> None:
        """Let every use succeed again."""
        self.countdown = -1

    def _hit(self) -> cython.bint:
        """True when this use must fail (the resource then returns its out-of-memory answer)."""
        if self.countdown < 0:
            return False
        self.uses += 1
        if self.countdown > 0:
            self.countdown -= 1
            return False
        self.countdown = -1
        self.fired = True
        return True

    def hit(self) -> bool:
        """As ``_hit``, for callers that are not compiled."""
        return bool(self._hit())
