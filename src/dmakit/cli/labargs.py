"""Arguments that ``compare`` and ``explain`` share, those of a real controller among them, and the progress line."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmakit.lab.hardware import Target
    from dmakit.lab.options import Options
    from dmakit.lab.rig import Source

IOMMUS = ("vtd", "x86", "none")
MODES = ("lazy", "strict", "passthrough")
POLICIES = ("linux", "augmented")
PLATFORMS = ("server", "embedded")


def configure(parser: argparse.ArgumentParser) -> None:
    """The input and the machine."""
    parser.add_argument(
        "input",
        nargs="?",
        metavar="WORKLOAD|TRACE",
        help="a kernel trace, a workload such as bs=128k,iodepth=8,rw=randread,frag=1,n=200, or case:NAME; "
        "without it the bundled trace",
    )
    parser.add_argument("--boot", type=Path, metavar="FILE", help="the trace's domain set-up (default: NAME.boot.txt)")
    parser.add_argument("--iommu", choices=IOMMUS, help="page-table format, or none (default: vtd)")
    parser.add_argument("--mode", choices=MODES, help="invalidation mode (default: lazy)")
    parser.add_argument("--policy", choices=POLICIES, help="IOVA allocator policy (default: linux)")
    parser.add_argument(
        "--defect", action="append", default=[], metavar="NAME", help="switch a Linux defect on (name or version)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of placement and data (default: 0)")
    parser.add_argument("--untrusted", action="store_true", help="the device sits behind an external-facing port")
    parser.add_argument("--no-coherent", action="store_true", help="the device does not snoop CPU caches")
    parser.add_argument(
        "--p2p", nargs="?", const="bus", choices=("bus", "bridge"), help="buffers in a peer device's memory"
    )
    parser.add_argument("--no-sgl", action="store_true", help="the controller understands only PRPs")
    parser.add_argument(
        "--platform",
        default="server",
        metavar="server|embedded|vfio:BDF",
        help="a preset of the above, or a real NVMe controller (its first blocks are lost)",
    )
    parser.add_argument("--checker", action="store_true", help="run with the contract checker on")
    parser.add_argument("--json", metavar="PATH|-", help="write the result as JSON to a file, or - for standard output")
    hardware = parser.add_argument_group("with --platform vfio:BDF")
    hardware.add_argument("--yes", action="store_true", help="overwrite the first blocks of the namespace")
    hardware.add_argument("--backend", choices=("auto", "iommufd", "type1"), default="auto", help="kernel interface")
    hardware.add_argument("--nsid", type=int, default=1, metavar="N", help="namespace (default: 1)")


def base_options(args: argparse.Namespace) -> Options:
    """The options before any flag: those of a case, or the defaults."""
    from dmakit.lab.court import CASES
    from dmakit.lab.options import Options

    case = CASES.get((args.input or "").removeprefix("case:"))
    return case.options if case is not None else Options()


def options_of(args: argparse.Namespace) -> Options:
    """The machine's options; InputError for combinations that no machine has."""
    from dmakit.errors import InputError
    from dmakit.lab.options import EMBEDDED

    base = base_options(args)
    if args.platform not in PLATFORMS:
        raise InputError(f"--platform {args.platform}: must be one of {', '.join(PLATFORMS)}, vfio:BDF")
    if args.iommu == "none" and args.mode == "lazy":
        raise InputError("--iommu none --mode lazy: without an IOMMU there is nothing to invalidate")
    if args.platform == "embedded":
        for flag, given in (("--iommu", args.iommu), ("--mode", args.mode), ("--p2p", args.p2p)):
            if given is not None:
                raise InputError(f"--platform embedded {flag} {given}: the preset has no IOMMU and no peers")
        base = EMBEDDED
    chosen = replace(
        base,
        iommu=args.iommu or base.iommu,
        mode=args.mode or base.mode,
        policy=args.policy or base.policy,
        p2p=args.p2p or base.p2p,
        defects=tuple(args.defect),
        seed=args.seed,
        untrusted=args.untrusted,
        coherent=base.coherent and not args.no_coherent,
        sgl=not args.no_sgl,
        checker=args.checker,
    )
    return chosen.check()


def target_of(args: argparse.Namespace) -> Target:
    """The controller of ``--platform vfio:BDF``; InputError for options that only the software machine has."""
    from dmakit.errors import InputError
    from dmakit.lab.hardware import Target

    where = f"--platform {args.platform}"
    given = {
        "--iommu": args.iommu,
        "--mode": args.mode,
        "--untrusted": args.untrusted,
        "--no-coherent": args.no_coherent,
        "--p2p": args.p2p,
        "--defect": args.defect,
        "--checker": args.checker,
    }
    for flag, value in given.items():
        if value:
            raise InputError(f"{where} {flag}: the host's IOMMU and its device are what they are")
    if not args.yes:
        raise InputError(f"{where}: writes on the controller's namespace {args.nsid}, from block 0 on: add --yes")
    return Target(
        args.platform.removeprefix("vfio:"),
        backend=args.backend,
        nsid=args.nsid,
        sgl=not args.no_sgl,
        seed=args.seed,
        policy=args.policy or "linux",
    )


def explain_command(args: argparse.Namespace, options: Options) -> str:
    """The command that explains the same run, ready to be copied into a shell."""
    words = ["dmakit explain", shlex.quote(args.input) if args.input else ""]
    words += [f"--boot {shlex.quote(str(args.boot))}" if args.boot else "", options.command_line(base_options(args))]
    return " ".join(word for word in words if word)


def source_of(args: argparse.Namespace) -> Source:
    """What is run."""
    from dmakit.lab import inputs, sources

    return sources.source_of(inputs.resolve(args.input, args.seed), args.boot)


def progress(unit: str = "requests") -> Callable[[str, int, int], None]:
    """A line on standard error, at most five times a second on a terminal, once a strategy otherwise."""
    terminal = sys.stderr.isatty()
    shown = ""
    last = 0.0
    started = time.monotonic()

    def show(name: str, done: int, total: int) -> None:
        nonlocal last, shown
        now = time.monotonic()
        if terminal and (now - last > 0.2 or done == total):
            last = now
            sys.stderr.write(f"\r\x1b[K{name}: {done}/{total} {unit}" if done < total else "\r\x1b[K")
            sys.stderr.flush()
        elif not terminal and shown != name and now - started > 2:
            shown = name
            print(f"{name}: {done}/{total} {unit}", file=sys.stderr)

    return show
