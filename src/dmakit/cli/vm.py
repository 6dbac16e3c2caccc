"""``dmakit vm``: hand over to the checkout's test VM."""

from __future__ import annotations

import argparse
import os
import sys

from dmakit import _core
from dmakit.errors import InputError


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``vm``: all of them belong to the VM's own command line."""
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="ARG", help="build, run, shell, status or clean")


def run(args: argparse.Namespace) -> int:
    """Replace this process by tools/vm."""
    root = _core.PACKAGE.parent.parent
    if not _core.in_checkout() or not (root / "tools" / "vm").exists():
        raise InputError("dmakit vm needs a source checkout (the VM is not installed with the package)")
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "tools.vm", *args.words]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})
