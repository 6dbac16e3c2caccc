"""``dmakit record --print``: the script that records a trace on your kernel."""

from __future__ import annotations

import argparse

HELP = "print a script that records such a trace on your kernel"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--print", action="store_true", dest="script", help="print the shell script (run it as root)")
    what.add_argument("--boot-line", action="store_true", help="print what to add to the kernel's command line")
    what.add_argument("--needs", metavar="VERB", help="list the events that replay, compare or explain needs, and why")


def run(args: argparse.Namespace) -> int:
    """Print what was asked for."""
    import dmakit
    from dmakit.errors import InputError
    from dmakit.trace.events import NEEDS
    from dmakit.trace.record import BOOT_LINE, script

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
