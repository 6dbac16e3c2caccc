"""``dmakit compare``: one workload through every mapping strategy, side by side."""

from __future__ import annotations

import argparse

from dmakit.cli import labargs


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``compare``."""
    labargs.configure(parser)
    parser.add_argument("--strategy", action="append", metavar="NAME", help="run only this strategy (repeatable)")


def run(args: argparse.Namespace) -> int:
    """Compare and print; status 1 when any byte differs."""
    from dmakit.cli.output import check_json, write_json
    from dmakit.errors import InputError
    from dmakit.lab.compare import compare
    from dmakit.lab.report import print_comparison
    from dmakit.lab.strategies import STRATEGIES

    for name in args.strategy or ():
        if name not in STRATEGIES:
            raise InputError(f"--strategy {name}: must be one of {', '.join(STRATEGIES)}")
    check_json(args.json)
    options, source = labargs.options_of(args), labargs.source_of(args)
    comparison = compare(source, options, _once(args.strategy), labargs.progress())
    comparison.replay = source.replay_score()
    if args.json is not None:
        write_json(comparison.report(), args.json)
    if args.json != "-":
        print_comparison(comparison, labargs.explain_command(args, options))
    return 1 if comparison.wrong else 0


def _once(names: list[str] | None) -> list[str] | None:
    """Each name once, in the order given."""
    return list(dict.fromkeys(names)) if names else names
