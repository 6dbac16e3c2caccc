"""The command line: one module a verb, nothing but argument handling and printing.

A verb module has ``HELP`` (one line), ``configure(parser)`` and ``run(args) -> int``; whatever is heavy it
imports inside ``run``. The verb table below is data, so that ``dmakit --help`` imports nothing but argparse.
Exit status: 0 well, 1 the answer is bad news (a byte differs, a replay diverges), 2 bad input or options,
128 + the signal's number when standard output was closed (SIGPIPE) or the user interrupted (SIGINT).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from importlib import import_module
from typing import NoReturn

import dmakit

VERBS = {
    "compare": "run one workload through every mapping strategy, byte-checked, side by side",
    "explain": "say for every request which path it took, why, and what would make it fast",
    "replay": "replay recorded kernel traces, golden vectors or step files on dmakit's stack",
    "record": "record what this kernel does for DMA mapping while a command runs",
    "nvme": "drive an NVMe controller: list, identify, read, write, verify every byte, measure",
    "bench": "measure this code against the limits of this machine",
    "vfio": "list PCI devices and their IOMMU groups; bind one to VFIO or give it back",
    "doctor": "show which core runs and why, and what this host can do: IOMMU, VFIO, tracing, …",
    "test": "run the test-suite of a checkout, interpreted and compiled",
    "vm": "build, boot and use the test VM of a checkout",
}


class Parser(argparse.ArgumentParser):
    """Errors in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        """Value and rule, and where the options are explained; status 2."""
        self.exit(2, f"{self.prog}: {message}; see: {self.prog} --help\n")


def parser_for(argv: list[str]) -> argparse.ArgumentParser:
    """The parser; only the verb that is called is loaded."""
    parser = Parser(
        prog="dmakit",
        description="The Linux DMA-mapping stack in user space.",
        epilog="'dmakit VERB --help' explains a verb. Start with: dmakit compare",
    )
    parser.add_argument("--version", action="version", version=f"dmakit {dmakit.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    called = next((word for word in argv if not word.startswith("-")), "")
    for name, text in VERBS.items():
        sub = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name == called:
            import_module(f"dmakit.cli.{name}").configure(sub)
    return parser


def run(argv: list[str]) -> int:
    """Parse and run; errors made by the user or the input end in one line on stderr and status 2."""
    from dmakit.errors import DmakitError

    try:
        args = parser_for(argv).parse_args(argv)
        status: int = import_module(f"dmakit.cli.{args.verb}").run(args)
        sys.stdout.flush()
    except DmakitError as error:
        print(f"dmakit: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        if type(error).__name__ != "CoreError":
            raise
        print(f"dmakit: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print("dmakit: memory exhausted: use a smaller workload (fewer requests, smaller blocks)", file=sys.stderr)
        return 2
    except BrokenPipeError:
        _drop_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        _drop_output()
        print(f"dmakit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the status is settled: a second one has nothing to stop
        print("dmakit: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return status


def _drop_output() -> None:
    """What is still buffered goes nowhere: the flush at exit must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
