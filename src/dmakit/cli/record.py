"""``dmakit record``: what this kernel does for DMA mapping while a command runs, into a file for the other verbs."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmakit.trace.recorder import Order, Outcome

HELP = "record what this kernel does for DMA mapping, for replay, compare and explain"
DEFAULT = "dmakit.trace.txt.zst"
EPILOG = """
exit status: the command's own; without a command, or when it was 0: 0 when the recording is complete, 1 when events
were lost or something could not be removed; 2 when nothing could be recorded; 143 after SIGTERM.
Phases of the workload: echo "PHASE x" > "$DMAKIT_TRACE_MARKER", and "PHASE x-end" at its end. More: docs/record.md
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "%(prog)s [options] [-- COMMAND ...]"
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="record until it ends (default: until Ctrl-C)")
    parser.add_argument(
        "-o", "--output", metavar="FILE", default=DEFAULT,
        help=f"where to; .zst, .xz or .gz compresses (default: {DEFAULT})",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace FILE when it exists")
    parser.add_argument("--duration", type=float, metavar="S", help="record for at most S seconds")
    parser.add_argument(
        "--buffer", metavar="SIZE", help="ring buffer of each CPU (default: 64M, or what memory allows)"
    )
    parser.add_argument("--stream", action="store_true", help="empty the buffers while recording: for long recordings")
    parser.add_argument("--device", default="", metavar="NAME", help="mapping events of one device only (0000:01:00.0)")
    parser.add_argument(
        "--fresh", metavar="NAME", action="append", default=[],
        help="make this device's IOMMU domain anew inside the recording (it has no driver, the command binds it): "
        "the replay is exact without boot-time probes; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--only", default="all", choices=("all", "replay", "compare", "calls"),
        help="the events for one verb; 'calls': also those that replay --calls looks at (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--clock", default="counter", choices=("counter", "mono", "boot", "global", "local"),
        help="trace clock; counter numbers the events: one exact order over all CPUs (default)",
    )  # fmt: skip
    parser.add_argument("--tracefs", metavar="DIR", help="where tracefs is mounted (default: /sys/kernel/tracing)")
    parser.add_argument("--json", metavar="PATH|-", help="write what was recorded and lost as JSON")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--script", action="store_true", help="print a shell script that records where dmakit cannot be installed"
    )
    what.add_argument("--boot-line", action="store_true", help="print what to add to the kernel's command line")
    what.add_argument("--needs", metavar="VERB", help="list the events that replay, compare or explain needs, and why")


def run(args: argparse.Namespace) -> int:
    """Record, or print what was asked for."""
    if args.script or args.boot_line or args.needs is not None:
        return _print(args)
    import dmakit
    from dmakit.cli.output import check_json, write_json
    from dmakit.trace.facts import machine_facts
    from dmakit.trace.recorder import Recorder
    from dmakit.trace.tracefs import find_tracefs

    check_json(args.json)
    order = _order(args)
    order.check()
    fs = find_tracefs(args.tracefs)
    facts = {"dmakit": dmakit.__version__, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    outcome = Recorder(fs, order, facts | machine_facts(), progress=_progress()).run()
    _report(outcome, args.only, bool(args.fresh))
    if args.json is not None:
        write_json(outcome.as_json(), args.json)
    return _status(outcome)


def _order(args: argparse.Namespace) -> Order:
    from dmakit.trace.fresh_domain import FreshDomain
    from dmakit.trace.recorder import Order
    from dmakit.units import parse_size

    return Order(
        output=Path(args.output),
        command=tuple(args.command),
        duration=args.duration,
        buffer=parse_size(args.buffer) if args.buffer is not None else 0,
        clock=args.clock,
        stream=args.stream,
        device=args.device,
        events=args.only,
        force=args.force,
        fresh=tuple(map(FreshDomain, args.fresh)),
    )


def _status(outcome: Outcome) -> int:
    if outcome.signal and outcome.signal != signal.SIGINT:
        return 128 + outcome.signal
    if outcome.status:
        return outcome.status
    return 0 if outcome.account.complete and not outcome.left else 1


def _progress() -> Callable[[str, float], None]:
    """A line on a terminal's standard error."""
    terminal = sys.stderr.isatty()

    def show(what: str, amount: float) -> None:
        if terminal:
            text = f"{amount:.0f} s" if what == "recording" else f"{100 * min(amount, 1):.0f} %"
            sys.stderr.write(f"\r\x1b[K{what}: {text}\r")
            sys.stderr.flush()

    return show


def _report(outcome: Outcome, only: str, fresh: bool = False) -> None:
    """What was recorded, what is missing and what to do next, on standard error: standard output is the command's."""
    account = outcome.account
    lines = [
        f"dmakit: {account.written} events in {outcome.seconds:.1f} s on {len(account.by_cpu)} CPUs: "
        f"{outcome.output} ({outcome.size} bytes)"
    ]
    if outcome.boot:
        lines.append(f"dmakit: {outcome.boot}: the set-up of the domains, from boot-time probes")
    elif only in ("all", "calls", "replay") and not fresh:
        lines.append(
            "dmakit: neither boot-time probes (dmakit record --boot-line) nor a --fresh domain: "
            "replay adopts what was allocated before"
        )
    lines += [f"dmakit: {note}" for note in outcome.notes]
    lines += _refusals(outcome)
    if not account.complete:
        lines.append(f"dmakit: INCOMPLETE: {account.lost} events lost ({'; '.join(account.reasons())})")
        lines.append(f"dmakit: {account.remedy()}")
    if outcome.left:
        lines.append(f"dmakit: {outcome.left}")
    print("\n".join(lines), file=sys.stderr)


def _refusals(outcome: Outcome) -> list[str]:
    """The refused events by reason, and what is lost by them."""
    by_reason: dict[str, dict[str, None]] = {}
    for refusal in outcome.refused:
        by_reason.setdefault(refusal.reason, {})[refusal.function or refusal.event] = None
    lines = [f"dmakit: not recorded: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return lines + [f"dmakit: without them, {lost}" for lost in outcome.lost_verbs] if lines else []


def _print(args: argparse.Namespace) -> int:
    import dmakit
    from dmakit.errors import InputError
    from dmakit.trace.events import NEEDS
    from dmakit.trace.probes import BOOT_LINE
    from dmakit.trace.record_script import script

    if args.script:
        print(script(dmakit.__version__), end="")
    elif args.boot_line:
        print(BOOT_LINE)
    elif args.needs not in NEEDS:
        raise InputError(f"--needs {args.needs}: must be one of {', '.join(NEEDS)}")
    else:
        for need in NEEDS[args.needs]:
            print(f"{' or '.join(need.events)}: without it, {need.lost}")
    return 0
