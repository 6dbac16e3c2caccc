"""``dmakit replay FILE…``: recorded kernels on our stack, answer for answer."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

HELP = "replay recorded kernel traces, golden vectors or step files on dmakit's stack"


class _Report(Protocol):
    @property
    def explained(self) -> bool: ...

    def as_json(self) -> dict[str, Any]: ...

    def render(self) -> str: ...


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="ftrace text (-: standard input), golden vectors or step files (xz, zstd, gzip)",
    )
    parser.add_argument("--boot", metavar="FILE", help="the boot trace (default: NAME.boot.txt beside NAME.trace.txt)")
    parser.add_argument(
        "--defect",
        action="append",
        default=[],
        metavar="NAME",
        help="step files: switch a known kernel defect on (or: 7.2)",
    )
    parser.add_argument(
        "--calls",
        action="store_true",
        help="traces: run the DMA API calls themselves on the whole stack and compare what they cause"
        " (invalidations, scatterlists, bounce slots) instead of the allocator alone",
    )
    parser.add_argument(
        "--json", metavar="PATH|-", help="write the results as JSON to a file, or - for standard output"
    )


def run(args: argparse.Namespace) -> int:
    """Replay every file; 1 when any answer differs."""
    from dmakit.cli.output import check_json, write_json
    from dmakit.dma.defects import defects_of

    check_json(args.json)
    defects_of(tuple(args.defect))
    reports = []
    for path in args.files:
        report = _replay(path, args)
        reports.append(report)
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[K")
        if args.json != "-":
            print(report.render(), flush=True)
    if args.json is not None:
        write_json([report.as_json() for report in reports], args.json)
    return 0 if all(report.explained for report in reports) else 1


def _replay(path: str, args: argparse.Namespace) -> _Report:
    from dmakit.trace.replay import file_kind, replay_file

    if file_kind(path) == "jsonl":
        from dmakit.trace.steps import is_step_file, replay_steps

        if is_step_file(path):
            return replay_steps(path, boot=args.boot, defects=tuple(args.defect))
    elif args.calls:
        from dmakit.trace.call_replay import replay_calls

        return replay_calls(path, boot=args.boot, defects=tuple(args.defect) or ("7.2",))
    return replay_file(path, boot=args.boot, progress=_progress(path))


def _progress(path: str) -> Callable[[int], None] | None:
    """On a terminal, a line on standard error with the events scanned so far, once it takes longer than a moment."""
    if not sys.stderr.isatty():
        return None
    begun = shown = time.monotonic()

    def show(events: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - begun > 2 and now - shown > 0.2:
            shown = now
            rate = events / (now - begun) / 1e6
            sys.stderr.write(f"\r\x1b[K{path}: {events} events, {rate:.2f} million a second\r")
            sys.stderr.flush()

    return show
