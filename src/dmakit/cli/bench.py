"""``dmakit bench``: how far this code is from the limit of this machine, one row a goal."""

from __future__ import annotations

import argparse
import sys

from dmakit.errors import InputError


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``bench``."""
    parser.add_argument("rows", nargs="*", metavar="ROW", help="only these rows (10 takes 10a, 10b, …)")
    parser.add_argument("--json", metavar="PATH", help="write the report as JSON too ('-': only that, to stdout)")
    parser.add_argument(
        "--short", action="store_true", help="less work a row; status 1 when a recorded ratio is lost by 2 times"
    )
    parser.add_argument("--repetitions", type=int, default=9, metavar="N", help="how often each row is measured (9)")
    parser.add_argument("--core", type=int, metavar="N", help="the core to stay on (the last one)")
    parser.add_argument("--record", metavar="PATH", help="write the ratios, as --short compares them")


def run(args: argparse.Namespace) -> int:
    """Measure, print, keep; status 1 for a row that fails, and in the short form for a gross loss."""
    from dmakit.bench import history, suite

    rows = suite.chosen(suite.all_rows(), args.rows)
    if not rows:
        known = ", ".join(row.id for row in suite.all_rows())
        raise InputError(f"bench {' '.join(args.rows)}: no such row (there are {known})")
    if args.repetitions < 1:
        raise InputError(f"--repetitions {args.repetitions}: must be at least 1")
    quiet = args.json == "-"
    try:
        report = suite.run(
            rows,
            short=args.short,
            repetitions=args.repetitions,
            core=args.core,
            progress=lambda figure: print(f"\r{figure.id:>4} measured", end="", file=sys.stderr),
        )
    except OSError as error:
        raise InputError(f"--core {args.core}: {error.strerror}") from None
    print("\r" + " " * 16 + "\r", end="", file=sys.stderr)
    before = history.earlier(report)
    if not quiet:
        print_report(report, before)
    write(report, args)
    history.keep(report)
    bad = [f"not measured: {line}" for line in history.errors(report)]
    if args.short and report["core"] == "compiled":
        base = {name: ratio for name, ratio in history.recorded().items() if suite.asked(name, args.rows)}
        bad += [f"gross loss: {line}" for line in history.losses(report, base)]
    for line in bad:
        print(f"dmakit bench: {line}", file=sys.stderr)
    return 1 if bad else 0


def write(report: dict[str, object], args: argparse.Namespace) -> None:
    """The files that were asked for."""
    from dmakit.bench import history
    from dmakit.cli.output import write_json

    if args.json:
        write_json(report, args.json)
    if args.record:
        write_json(history.ratios_of(report, goals=True), args.record)


def print_report(report: dict[str, object], before: dict[str, float]) -> None:
    """The table for the eye."""
    from dmakit.bench import history
    from dmakit.bench.yardsticks import NAMES

    machine, yardsticks, rows = report["machine"], report["yardsticks"], history.rows_of(report)
    assert isinstance(machine, dict) and isinstance(yardsticks, dict)
    print(f"{machine['processor']}, core {machine['pinned_to']}, {machine['python']}; {report['core']} core")
    if report["core"] != "compiled":
        print("The core runs interpreted: smaller sizes, Python against Python; the goals are for the compiled core.")
    print("; ".join(f"{name} {NAMES[name]} {ns:.3g} ns" for name, ns in yardsticks.items()) + "\n")
    width = max(len(row["name"]) for row in rows)
    print(f"{'row':>4}  {'work':<{width}}  {'value':>19}  {'ratio':>9}  {'middle half':>15}  {'goal':>12}  met  change")
    for row in rows:
        print(line_of(row, width, before.get(row["id"])))
    for row in rows:
        if row["note"]:
            print(f"{row['id']:>4}: {row['note']}")
    goals = [row["met"] for row in rows if row["goal"] is not None]
    print(f"\n{sum(goals)} of {len(goals)} goals met; a ratio is to so many yardsticks (own: its peer)")


def line_of(row: dict[str, object], width: int, before: float | None) -> str:
    """One row of the table."""
    times, ratio = row["times"], row["ratio"]
    measure = f"{row['yardstick']}" if times == 1 else f"{times:g}{row['yardstick']}"
    goal = (
        f"{'≤' if row['better'] == 'lower' else '≥'} {row['goal']:g} {measure}" if row["goal"] is not None else measure
    )
    met = {None: "", True: "yes", False: "no"}[row["met"]]  # type: ignore[index]
    start = f"{row['id']:>4}  {row['name']:<{width}}"
    if not isinstance(ratio, float):
        return f"{start}  {row['error']}"
    spread = row["spread"]
    assert isinstance(spread, tuple)
    change = f"{ratio / before - 1:+.0%}" if before else ""
    value = f"{row['value']:.4g} {row['unit']}"
    middle = f"{spread[0]:.3g}–{spread[1]:.3g}"
    return f"{start}  {value:>19}  {ratio:>9.3g}  {middle:>15}  {goal:>12}  {met:<3}  {change}"
