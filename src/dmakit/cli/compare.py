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
    return _run_on_hardware(args) if args.platform.startswith("vfio:") else _run(args)


def _run_on_hardware(args: argparse.Namespace) -> int:
    from dmakit.cli.output import check_json, write_json
    from dmakit.lab.hardware import compare_on_hardware
    from dmakit.lab.hardware_report import print_hardware

    check_json(args.json)
    target, source = labargs.target_of(args), labargs.source_of(args)
    comparison = compare_on_hardware(source, target, _once(args.strategy), labargs.progress())
    if args.json is not None:
        write_json(comparison.report(), args.json)
    if args.json != "-":
        print_hardware(comparison)
    return 1 if comparison.wrong else 0


def _run(args: argparse.Namespace) -> int:
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
