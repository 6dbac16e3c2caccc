"""The command line of the test VM: build, run, shell, status, clean."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.vm import run as runner
from tools.vm.machine import KERNELS, VARIANTS, Machine
from tools.vm.parts import ROOT
from tools.vm.store import PLAIN, Part, VmError, cache_folder, clean, say

COMPILED = "kernel-iommufd"


def parser() -> argparse.ArgumentParser:
    """Verbs and options."""
    top = argparse.ArgumentParser(prog="./dmakit vm", description=__doc__)
    verbs = top.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build", help="build what a boot needs and keep it")
    build.add_argument("--kernel", choices=KERNELS, action="append", help="this kernel only (default: both)")
    build.add_argument("--only", metavar="PART", help="this part only, e.g. kernel-iommufd")
    for name, text in (("run", "boot, run a command in the guest, power off"), ("shell", "boot to a shell")):
        verb = verbs.add_parser(name, help=text)
        add_machine(verb)
        verb.add_argument("--out", type=Path, metavar="DIR", help="a folder that the guest sees as /mnt/out")
        if name == "run":
            verb.add_argument("--timeout", type=float, default=300, metavar="S", help="kill the guest after this (300)")
            verb.add_argument("--console", action="store_true", help="show the kernel's console at the end")
            verb.add_argument("command", nargs="+", metavar="CMD", help="after --: the command")
    verbs.add_parser("status", help="list the parts, built or not")
    verbs.add_parser("clean", help="remove parts that the current recipes do not use")
    return top


def add_machine(verb: argparse.ArgumentParser) -> None:
    """The options that make a Machine."""
    verb.add_argument("--kernel", choices=KERNELS, default="iommufd")
    verb.add_argument("--iommu", choices=list(VARIANTS), default="vtd-lazy")
    verb.add_argument("--nvme", type=int, choices=range(9), default=1, metavar="N", help="NVMe drives, 00:04.0 on (1)")
    verb.add_argument("--nvme-mib", type=int, default=1024, metavar="MIB", help="size of each (1024)")
    verb.add_argument("--nvme-props", default="", metavar="P=V,…", help="more QEMU properties of each, e.g. mdts=5")
    verb.add_argument("--cmb", action="store_true", help="a 64 MiB controller memory buffer on the last of two drives")
    verb.add_argument("--edu", action="store_true", help="QEMU's teaching device at 00:10.0")
    verb.add_argument("--hotplug", action="store_true", help="a port at 00:11.0, into which QMP plugs devices")
    verb.add_argument("--processors", type=int, default=2, metavar="N")
    verb.add_argument("--memory", type=int, default=2048, metavar="MIB")
    verb.add_argument("--append", default="", metavar="PARAMETERS", help="more kernel parameters")
    verb.add_argument("--qemu", action="append", default=[], metavar="ARG", help="one more argument for QEMU (repeat)")


def machine_of(args: argparse.Namespace) -> Machine:
    """The Machine that the options ask for."""
    names = ["kernel", "iommu", "nvme", "nvme_mib", "nvme_props", "cmb", "edu", "hotplug"]
    names += ["processors", "memory", "append"]
    return Machine(**{name: getattr(args, name) for name in names}, extra=tuple(args.qemu))


def every(kernels: Sequence[str]) -> dict[str, Part]:
    """The parts of these kernels' boots by name, in the order in which they need each other."""
    return {part.name: part for name in kernels for part in runner.needed(name)}


def build(kernels: Sequence[str], only: str | None) -> None:
    """Everything for these kernels; the kernel that is compiled in a process beside the one that fetches the rest."""
    wanted = every(kernels)
    if only is not None:
        if only not in wanted:
            raise VmError(f"{only} is no part of the VM; parts: {', '.join(wanted)}")
        wanted[only].ensure()
        return
    beside = None
    if COMPILED in wanted and not wanted[COMPILED].built:
        wanted["toolchain"].ensure()
        command = [sys.executable, "-m", "tools.vm", "build", "--only", COMPILED]
        beside = subprocess.Popen(command, cwd=ROOT, env={**os.environ, PLAIN: "1"})
    try:
        for name, part in wanted.items():
            if name != COMPILED:
                part.ensure()
        if beside and beside.wait():
            raise VmError(f"{COMPILED} was not built: see above")
    finally:
        if beside and beside.poll() is None:
            beside.terminate()
            beside.wait()
    say(f"ready in {cache_folder()}")


def status() -> None:
    """One line a part."""
    for part in every(KERNELS).values():
        print(f"{'built  ' if part.built else 'missing'} {part.path}")


def run(args: argparse.Namespace) -> int:
    """Boot and run; the command's status."""
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    result = runner.boot(machine_of(args), args.command, out=args.out, timeout=args.timeout, sink=runner.to_stdout)
    if args.console or result.verdict():
        print("\n".join(result.console.splitlines()[-40:]), file=sys.stderr)
    if result.verdict():
        say(result.verdict())
    if result.timed_out:
        return runner.TIMED_OUT
    return 125 if result.status is None else result.status


def main() -> int:
    """Parse and act; what the user cannot know is told in one line, status 2."""
    args = parser().parse_args()
    runner.interruptible()
    try:
        if args.verb == "run":
            return run(args)
        if args.verb == "shell":
            print("a shell in the guest; `exit` or Ctrl-D powers off", file=sys.stderr)
            runner.boot(machine_of(args), ["bash", "-i"], out=args.out, terminal=True)
        elif args.verb == "build":
            build(args.kernel or KERNELS, args.only)
        elif args.verb == "status":
            status()
        else:
            kept = {part.path for part in every(KERNELS).values()}
            print("\n".join(f"removed {path}" for path in clean(kept)))
    except VmError as error:
        print(f"dmakit vm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dmakit vm: interrupted", file=sys.stderr)
        return 130
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
