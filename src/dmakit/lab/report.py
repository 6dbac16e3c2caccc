"""What a person sees: the tables of ``compare`` and ``explain`` and the lines to take away. All figures are computed.

Figures in the table are per request. Lines that a reader takes away come last: they name what ran, so that a
result can be run again by copying one line.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dmakit import _core
from dmakit.lab.compare import Comparison, StrategyResult, deciding
from dmakit.lab.court import CASES, verdict
from dmakit.lab.explain import Detail, Line
from dmakit.lab.profile import NOT_PRICED, PUBLISHED

COLUMNS = ("strategy", "IOVA m/d/t", "PTEs", "tables", "inval", "waits", "bounced", "descr", "kept B", "modelled ns")
NARROW = {"IOVA m/d/t": "IOVA\nm/d/t", "tables": "ta-\nbles", "bounced": "boun-\nced", "kept B": "kept\nB"}
NARROW["modelled ns"] = "modelled\nns"


class Output(Console):
    """A console that leaves a closed pipe to the command line, which knows the exit status for it."""

    def on_broken_pipe(self) -> None:
        """Called by rich inside its handler of BrokenPipeError."""
        raise  # noqa: PLE0704 - the handler is the caller


def console() -> Console:
    """Standard output; colour only on a terminal, a fixed width otherwise."""
    return Output(width=None if sys.stdout.isatty() else 118, highlight=False, soft_wrap=False)


def say(out: Console, text: str, style: str = "") -> None:
    """A line of text as it is: on a terminal wrapped under its own indent, elsewhere in one piece."""
    if out.is_terminal and len(text) > out.width:
        deeper = " " * (len(text) - len(text.lstrip()) + 4)
        text = textwrap.fill(text, out.width, subsequent_indent=deeper, break_long_words=False, break_on_hyphens=False)
    out.print(text, style=style, markup=False, soft_wrap=True)


def number(value: float) -> str:
    """A figure per request: integers plain, small ones with enough digits to be seen."""
    if value == 0:
        return "0"
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}" if value >= 0.01 else "<.01"


def row_of(result: StrategyResult) -> list[str]:
    """The cells of one strategy, per request."""
    count = max(result.requests, 1)
    ledger = result.ledger

    def each(*rows: str) -> str:
        return number(sum(ledger[row] for row in rows) / count)

    low, high = (value / count for value in result.modelled_ns)
    return [
        result.name,
        "/".join(each(f"iova_{kind}") for kind in ("magazine", "depot", "tree")),
        each(*(f"pte_set_{level}" for level in range(1, 6))),
        each("tables_allocated"),
        each("inv_page", "inv_domain", "inv_global", "inv_devtlb"),
        each("inv_wait"),
        each("bounced_bytes"),
        each("descriptors"),
        each("bookkeeping_bytes"),
        f"{low:,.0f}-{high:,.0f}",
    ]


def print_table(out: Console, make: Callable[[bool], Table]) -> None:
    """The table that ``make(narrow)`` gives, closer together where it would not fit; a figure is never cut."""
    free = out.options.update(max_width=1000)
    table = make(False)
    if out.measure(table, options=free).maximum > out.width:
        table = make(True)
    out.print(table, width=out.measure(table, options=free).maximum, crop=False)


def empty_table(columns: Sequence[str], narrow: dict[str, str] | None) -> Table:
    """The heads of a table, the first column to the left; ``narrow``: heads of two lines, less space between."""
    table = Table(
        title=None, box=None, pad_edge=False, header_style="bold", padding=(0, 1) if narrow is None else (0, 1, 0, 0)
    )
    for number, name in enumerate(columns):
        table.add_column((narrow or {}).get(name, name), justify="right" if number else "left", no_wrap=True)
    return table


def comparison_table(comparison: Comparison, narrow: bool = False) -> Table:
    """One row a strategy, figures per request."""
    table = empty_table(COLUMNS, NARROW if narrow else None)
    best = comparison.cheapest()
    for result in comparison.results:
        if not result.unavailable:
            table.add_row(*row_of(result), style="green" if result.name in best else "")
    return table


def path_lines(comparison: Comparison) -> list[str]:
    """The paths that the requests of each strategy took, with reasons and counts."""
    lines = []
    for result in comparison.results:
        for path, reasons in result.paths.counts().items():
            why = ", ".join(f"{reason.name} {count}" for reason, count in reasons.items())
            mark = " " if path in result.paths.fast else "!"
            lines.append(f"  {mark} {result.name:<11} {path}: {why}")
    return lines


def print_comparison(comparison: Comparison, command: str) -> None:
    """Table, paths, and what to take away."""
    out = console()
    first = next((result for result in comparison.results if result.requests), None)
    options = comparison.options
    where = f"{options.iommu}, {options.mode}" if options.iommu != "none" else "no IOMMU"
    say(out, f"{comparison.input}  ({where}, policy {options.policy}, seed {options.seed})", style="bold")
    if first is not None:
        out.print(f"{first.requests} requests, {first.size:,} bytes; figures per request\n")
    print_table(out, partial(comparison_table, comparison))
    for result in comparison.results:
        if result.unavailable:
            say(out, f"{result.name}: not run: {result.unavailable}", style="dim")
    say(
        out,
        f"IOVA m/d/t: allocations from magazine, depot, tree. modelled ns: profile '{PUBLISHED.name}' "
        f"(docs/profiles.md), without {', '.join(NOT_PRICED)}.",
        style="dim",
    )
    out.print("\npaths taken (! = not a fast path)")
    for line in path_lines(comparison):
        say(out, line)
    print_takeaways(out, comparison, command)


def print_takeaways(out: Console, comparison: Comparison, command: str) -> None:
    """The last lines: bytes, IOVAs, slow paths, who wins and why, dmakit's own time."""
    out.print()
    if comparison.replay is not None:
        matched, allocations = comparison.replay
        out.print(f"IOVAs equal to the kernel's: {matched:,} of {allocations:,}")
    ran = [result for result in comparison.results if not result.unavailable]
    out.print(f"bytes wrong: {comparison.wrong:,} of {sum(result.size for result in ran):,}")
    for result in ran:
        if result.failed:
            out.print(f"{result.name}: {result.failed} requests could not be mapped")
    slow = next((r.paths.slow() for r in ran if r.name == "two-step"), 0)
    say(out, f"requests that left the fast path (two-step): {slow}; explained by: {command}")
    print_winner(out, comparison)
    case = CASES.get(comparison.input.removeprefix("case:"))
    prices = {result.name: result.modelled_ns for result in ran}
    if case is not None and {case.winner or "premap", case.loser or "page", "two-step"} <= set(prices):
        say(out, verdict(case, prices))
    core = _core.status()["running"]
    spent = ", ".join(f"{one.name} {one.simulator_ns / max(one.requests + one.failed, 1):,.0f} ns" for one in ran)
    say(out, f"time of dmakit's own code per request ({core} core), never the kernel's: {spent}", style="dim")
    for note in comparison.notes:
        say(out, f"not knowable from this trace: {note}", style="dim")


def print_winner(out: Console, comparison: Comparison) -> None:
    """Who costs least in modelled time, and the counters that decide against the runner-up."""
    best = comparison.cheapest()
    racing = [r for r in comparison.results if r.requests and r.name != "direct"]
    if not racing:
        return
    if len(best) == len(racing):
        out.print("fewest modelled ns: no difference between the strategies")
        return
    winner = comparison.result(best[0])
    losers = sorted((r for r in racing if r.name not in best), key=lambda r: sum(r.modelled_ns))
    out.print(f"fewest modelled ns: {', '.join(best)}")
    if losers:
        rows = deciding(winner, losers[0])
        why = "; ".join(
            f"{name} {a / winner.requests:.3g} against {b / losers[0].requests:.3g}" for name, a, b, _ in rows
        )
        say(out, f"  against {losers[0].name}, the counters that decide (per request): {why}")


def print_detail(detail: Detail) -> None:
    """One request: what it is made of."""
    out = console()
    request = detail.request
    where = f", phase {request.phase}" if request.phase else ""
    out.print(
        f"request {request.number}: {request.op} of {request.size:,} bytes in {len(request.segments)} segments, "
        f"CPU {request.cpu}{where}",
        markup=False,
    )
    for phys, size in request.segments[:64]:
        ends = "" if phys % 4096 == 0 and (phys + size) % 4096 == 0 else "   starts or ends inside a page"
        out.print(f"    phys {phys:#014x}  {size:>8,} bytes{ends}", markup=False)


def print_explanation(lines: list[Line], total: int, *, examples: bool = False) -> None:
    """One line a (path, reason): count, phases, rule, what would make it fast; ``examples`` adds the details."""
    out = console()
    for line in lines:
        phases = ", ".join(f"{name} {count}" for name, count in line.phases if name)
        kind = "fast path" if line.fast else "SLOW path"
        head = f": {line.reason.name}  {line.count} of {total} requests{f' ({phases})' if phases else ''}, {kind}: "
        fast = "" if line.fast else f"; to be fast: {line.rule.remedy}"
        out.print(Text.assemble((line.path, "bold"), head, line.rule.text, fast), soft_wrap=not out.is_terminal)
        if line.figures:
            say(out, f"    request {line.examples[0]}: {line.figures}")
        if examples:
            say(out, f"    requests: {', '.join(map(str, line.examples))} … (--request N)")
            say(out, f"    source: {line.rule.source or 'a choice of the strategy'}", style="dim")
