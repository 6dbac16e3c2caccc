"""What submission and completion cost, counted apart.

The cost of a mapping falls in two places: mapping and writing descriptors before the doorbell, unmapping after the
completion; in lazy mode the invalidation comes later still. ``PhaseCosts`` adds up the ledger's rows over each phase.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dmakit.ledger import ROWS, Ledger


class PhaseCosts:
    """Sums of ledger rows by phase name; ``entered`` counts how often a phase ran."""

    def __init__(self, ledger: Ledger, names: tuple[str, ...] = ("submission", "completion")) -> None:
        self.ledger = ledger
        self.sums = {name: [0] * len(ROWS) for name in names}
        self.entered = dict.fromkeys(names, 0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything that is counted inside belongs to ``name``; phases do not nest."""
        before = list(self.ledger.counts)
        try:
            yield
        finally:
            self.entered[name] += 1
            sums = self.sums[name]
            for at, value in enumerate(self.ledger.counts):
                sums[at] += value - before[at]

    def report(self) -> dict[str, dict[str, int]]:
        """{phase: {row: amount}}, rows of 0 left out."""
        return {
            name: {row.name: sums[row.index] for row in ROWS if sums[row.index]} for name, sums in self.sums.items()
        }
