"""What a replay reports about one file: the counts, the first divergence, and how to read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """One file's replay. ``allocations`` = ``matched`` + ``adopted`` + ``diverged``.

    ``reordered``: operations that took effect after a conflicting one that began later. ``width``: the largest number
    of orders that were possible at once; ``capped``: whether it met the search's limit.
    """

    file: str
    kind: str
    allocations: int = 0
    matched: int = 0
    reordered: int = 0
    adopted: int = 0
    malformed_lines: int = 0
    divergence: dict[str, Any] | None = None
    diverged: int = 0
    checks: int = 0
    operations: int = 0
    overlapping: int = 0
    width: int = 1
    capped: bool = False
    domains: int = 0
    lost_events: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def explained(self) -> bool:
        """Whether nothing diverged."""
        return self.divergence is None

    def note_divergence(self, found: dict[str, Any]) -> None:
        """Count a divergence; the first is kept."""
        self.diverged += 1
        if self.divergence is None:
            self.divergence = found

    def as_json(self) -> dict[str, Any]:
        """The object of ``--json``."""
        names = ("file", "kind", "allocations", "matched", "reordered", "adopted", "malformed_lines", "divergence")
        more = ("diverged", "checks", "operations", "overlapping", "width", "capped", "domains", "lost_events", "notes")
        return {name: getattr(self, name) for name in names + more}

    def render(self) -> str:
        """A few lines for people."""
        head = f"{self.file}: {self.allocations} allocations"
        if self.allocations:
            share = 100 * self.matched / self.allocations
            head += f": {self.matched} matched ({share:.2f} %), {self.adopted} adopted, {self.diverged} diverged"
        lines = [head]
        if self.kind == "trace" and self.operations:
            share = 100 * self.reordered / self.operations
            lines.append(
                f"  {self.operations} operations on {self.domains} domains, {self.overlapping} overlapping, "
                f"{self.reordered} reordered ({share:.3f} %), search width {self.width}"
                + (" (met its limit: an order may have been missed)" if self.capped else "")
            )
        if self.checks:
            lines.append(f"  {self.checks} states of the allocator compared")
        lines += [f"  {note}" for note in self.notes]
        if self.divergence is not None:
            lines.append("  first divergence:")
            lines += [f"    {key}: {_shown(value)}" for key, value in self.divergence.items()]
        return "\n".join(lines)


def _shown(value: object) -> str:
    """Numbers that are addresses in hexadecimal too."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 9:
        return f"{value} ({value:#x})"
    return str(value)
