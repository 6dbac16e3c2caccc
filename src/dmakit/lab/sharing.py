"""Which requests share memory with another one while both are in flight.

Memory is told apart in *atoms*: pages that the same layouts have are one. A request takes its atoms when it is
submitted and gives them back when it completes. Who takes an atom that somebody holds shares it, and so does its
holder. When several hold an atom, all of them are known to share it already, so one holder an atom is remembered.
"""

from __future__ import annotations

from array import array
from itertools import accumulate
from typing import Any

import cython
import numpy as np

from dmakit.errors import MisuseError

_COMPLETE = 1


@cython.cclass
class Sharing:
    """Follows a schedule. ``which``: the layout of each request; ``atoms``: those of each layout."""

    def __init__(self, which: Any, atoms: list[list[int]]) -> None:
        flat = [atom for held in atoms for atom in held]
        self.count = len(which)
        self.which = memoryview(which or array("I", [0]))
        self.atoms = memoryview(array("Q", flat or [0]))
        self.bounds = memoryview(array("Q", accumulate((len(held) for held in atoms), initial=0)))
        self.held = memoryview(array("Q", bytes(8 * (max(flat, default=0) + 1))))
        self.holder = memoryview(array("Q", bytes(8 * (max(flat, default=0) + 1))))
        self.flags = memoryview(bytearray(1))
        self.shared: bytearray | None = None

    def follow(self, kinds: Any, positions: Any) -> None:
        """A stretch of the schedule; ``shared`` has a byte a request as soon as one shares its memory."""
        if len(positions) and int(np.max(positions)) >= self.count:
            raise MisuseError(f"position {int(np.max(positions))}: there are {int(self.count)} requests")
        at = 0
        while at < len(kinds):
            at = int(self._follow(kinds, positions, at, self.shared is not None))
            if at < len(kinds):
                self.shared = bytearray(int(self.count))
                self.flags = memoryview(self.shared)

    def _follow(
        self, kinds: memoryview[int], positions: memoryview[int], start: cython.Py_ssize_t, flagging: cython.bint
    ) -> cython.Py_ssize_t:
        """From event ``start`` on; stops before the first that shares while there is nowhere to say so."""
        at: cython.Py_ssize_t
        i: cython.Py_ssize_t
        atom: cython.ulonglong
        position: cython.ulonglong
        layout: cython.Py_ssize_t
        for at in range(start, len(kinds)):
            position = positions[at]
            layout = self.which[position]
            if kinds[at] == _COMPLETE:
                for i in range(self.bounds[layout], self.bounds[layout + 1]):
                    atom = self.atoms[i]
                    if self.held[atom] > 0:  # an end without a beginning gives nothing back
                        self.held[atom] -= 1
                continue
            if not flagging and self._taken(layout):
                return at
            for i in range(self.bounds[layout], self.bounds[layout + 1]):
                atom = self.atoms[i]
                if self.held[atom] > 0:
                    self.flags[self.holder[atom]] = 1
                    self.flags[position] = 1
                self.held[atom] += 1
                self.holder[atom] = position
        return len(kinds)

    def _taken(self, layout: cython.Py_ssize_t) -> cython.bint:
        """Whether somebody holds an atom of this layout."""
        i: cython.Py_ssize_t
        for i in range(self.bounds[layout], self.bounds[layout + 1]):  # noqa: SIM110 - no objects here
            if self.held[self.atoms[i]] > 0:
                return True
        return False
