"""What a person sees of a comparison on a real controller. All figures are measured there; counts are per request."""

from __future__ import annotations

from functools import partial

from rich.table import Table

from dmakit import _core
from dmakit.lab.hardware import HardwareComparison, HardwareResult
from dmakit.lab.report import console, empty_table, number, print_table, say

COLUMNS = (
    "strategy",
    "host maps",
    "unmaps",
    "IOVA m/d/t",
    "descr",
    "kept B",
    "map us",
    "unmap us",
    "both us",
    "spread",
    "mean us",
)
NARROW = {
    "host maps": "host\nmaps",
    "unmaps": "un-\nmaps",
    "IOVA m/d/t": "IOVA\nm/d/t",
    "kept B": "kept\nB",
    "map us": "map\nus",
    "unmap us": "unmap\nus",
    "both us": "both\nus",
    "mean us": "mean\nus",
}


def row_of(result: HardwareResult) -> list[str]:
    """The cells of one strategy."""
    count = max(result.requests, 1)

    def each(*rows: str) -> str:
        return number(sum(result.ledger[row] or 0 for row in rows) / count)

    return [
        result.name,
        each("domain_maps"),
        each("domain_unmaps"),
        "/".join(each(f"iova_{kind}") for kind in ("magazine", "depot", "tree")),
        each("descriptors"),
        each("bookkeeping_bytes"),
        number(result.map_ns / 1000),
        number(result.unmap_ns / 1000),
        number(result.total_ns / 1000),
        "-".join(number(value / 1000) for value in result.quartiles),
        number(result.mean_ns / 1000),
    ]


def strategies_table(ran: list[HardwareResult], narrow: bool = False) -> Table:
    """One row a strategy; the cheapest is green."""
    table = empty_table(COLUMNS, NARROW if narrow else None)
    best = min((result.total_ns for result in ran), default=0)
    for result in ran:
        table.add_row(*row_of(result), style="green" if result.total_ns == best else "")
    return table


def path_lines(comparison: HardwareComparison) -> list[str]:
    """The paths that requests took, with reasons and counts."""
    lines = []
    for result in comparison.results:
        for path, reasons in result.paths.counts().items():
            why = ", ".join(f"{reason.name} {count}" for reason, count in reasons.items())
            lines.append(f"  {' ' if path in result.paths.fast else '!'} {result.name:<11} {path}: {why}")
    return lines


def print_hardware(comparison: HardwareComparison) -> None:
    """Table, paths, and what to take away."""
    out = console()
    target = comparison.target
    say(out, f"{comparison.input}  (vfio:{target.bdf}, {comparison.backend}, {comparison.controller})", style="bold")
    ran = [result for result in comparison.results if result.requests]
    if ran:
        out.print(f"{ran[0].requests} requests, {ran[0].size:,} bytes; counts per request, times measured here\n")
    print_table(out, partial(strategies_table, ran))
    for result in comparison.results:
        if result.unavailable:
            say(out, f"{result.name}: not run: {result.unavailable}", style="dim")
    say(out, "maps, unmaps: system calls. both: map + unmap of a request, us; spread: its middle half; mean: of all "
        "requests, registrations included.", style="dim")  # fmt: skip
    out.print("\npaths taken (! = not a fast path)")
    for line in path_lines(comparison):
        say(out, line)
    _takeaways(comparison, ran)


def _takeaways(comparison: HardwareComparison, ran: list[HardwareResult]) -> None:
    out = console()
    out.print(f"\nbytes wrong: {sum(r.wrong for r in ran):,} of {sum(r.size for r in ran):,}")
    for result in comparison.results:
        if result.failed:
            out.print(f"{result.name}: {result.failed} requests failed")
    if ran and ran[0].left_out:
        out.print(f"left out: {ran[0].left_out} requests that are no whole blocks")
    say(out, comparison.choice())
    for result in ran:
        if result.costs is not None:
            say(out, f"auto: {result.costs}")
    core = _core.status()["running"]
    say(out, f"measured with the {core} core; the first request of a strategy is left out", style="dim")
    for note in comparison.notes:
        say(out, f"not knowable from this trace: {note}", style="dim")
