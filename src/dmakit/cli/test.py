"""``dmakit test``: hand over to the checkout's own test runner."""

from __future__ import annotations

import argparse
import os
import sys

from dmakit import _core
from dmakit.errors import InputError


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``test``."""
    parser.add_argument("--only", choices=("lint", "python", "compiled", "vm"), help="run one phase")
    parser.add_argument("pytest", nargs="*", metavar="PYTEST_ARG", help="after --: arguments for pytest")


def run(args: argparse.Namespace) -> int:
    """Replace this process by tools/test.py."""
    runner = _core.PACKAGE.parent.parent / "tools" / "test.py"
    if not _core.in_checkout() or not runner.exists():
        raise InputError("dmakit test needs a source checkout (the tests are not installed with the package)")
    options = ["--only", args.only] if args.only else []
    os.execv(sys.executable, [sys.executable, str(runner), *options, "--", *args.pytest])
