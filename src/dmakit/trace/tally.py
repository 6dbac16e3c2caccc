"""What the answers of a domain count as.

A record that the model explains has *matched*; one that it does not has *diverged*, when the domain's state is
*known*. From an unknown state an answer has matched only when it is a range that the trace itself saw freed into the
magazine it came from; every other is *adopted*. When the trace does not prove that it begins at the beginning, a
state is only *presumed*: when already the first answer differs, it was unknown.

Which of these holds may show at the end of the file only (is it whole? does it free what it never allocated?). The
search itself does not depend on it, so a domain has a tally for each possible verdict, and the verdict chooses.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import cython

Text: TypeAlias = str


@cython.cclass
class Tally:
    """The counts under one verdict. ``divergence`` is the first one."""

    def __init__(self, known: bool, presumed: bool = False) -> None:
        self.known, self.presumed = known, presumed
        self.matched = self.adopted = self.diverged = 0
        self.divergence: dict[str, Any] | None = None

    def agree(self, cached: cython.bint) -> cython.void:
        """The model gave an allocation's answer; ``cached``: in every order from a magazine."""
        if self.known:
            self.matched += 1
            self.presumed = False
        elif cached:
            self.matched += 1
        else:
            self.adopted += 1

    def disagree(self, kind: Text) -> cython.bint:
        """No order explains an operation of this kind; whether that is a divergence."""
        if self.presumed and kind in ("alloc", "miss"):
            self.known = False
        if self.known:
            self.diverged += 1
        elif kind == "alloc":
            self.adopted += 1
        return self.known


@cython.cclass
class Counts:
    """What a search counted under any verdict."""

    def __init__(self) -> None:
        self.allocations = self.operations = 0
        self.overlapping = self.reordered = self.unknown_frees = 0
        self.width = 1
        self.capped = False
