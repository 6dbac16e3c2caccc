"""The test run of a checkout: lint, the whole suite interpreted, the whole suite compiled, then the test VM.

Phases that this machine cannot run are counted and named at the end, with the command that supplies what is
missing; with CI=true a missing thing fails the run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from tests.vm import plugin as vm  # noqa: E402

from dmakit import _core  # noqa: E402

NO_COMPILED = "the compiled core (supply it: apt install gcc python3-dev && ./dmakit build; or DMAKIT_BUILD=zig)"


def call(title: str, command: list[str], **extra: str) -> bool:
    """Run one command with its output shown; True when it succeeded."""
    print(f"\n== {title}: {' '.join(command[2:] if command[1] == '-m' else command)}", flush=True)
    started = time.monotonic()
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, **extra}, check=False).returncode
    print(
        f"== {title}: {'ok' if status == 0 else f'FAILED ({status})'} in {time.monotonic() - started:.0f} s", flush=True
    )
    return status == 0


def lint() -> bool:
    """ruff (lint and format) and mypy strict."""
    python = sys.executable
    return (
        call("lint", [python, "-m", "ruff", "check", "."])
        and call("format", [python, "-m", "ruff", "format", "--check", "."])
        and call("types", [python, "-m", "mypy"])
    )


def suite(core: str, arguments: list[str]) -> bool:
    """The whole test-suite on one core, on all processors."""
    workers = (
        ["-n", str(os.cpu_count() or 1)] if not any(a.startswith(("-n", "-k", "--pdb")) for a in arguments) else []
    )
    chosen = ["-m", "not long and not vm"]
    return call(f"suite, {core}", [sys.executable, "-m", "pytest", *chosen, *workers, *arguments], DMAKIT_CORE=core)


def machines(arguments: list[str]) -> bool:
    """The tests that boot the test VM, two guests at a time; what a boot lacks fails them."""
    command = [sys.executable, "-m", "pytest", "tests/vm", "-m", "vm", "--vm", "ci", "--require-vm", "-n", "2"]
    return call("test VM", [*command, *arguments])


def main() -> int:
    """Parse, run the phases, sum up."""
    parser = argparse.ArgumentParser(prog="./dmakit test")
    parser.add_argument("--only", choices=("lint", "python", "compiled", "vm"))
    parser.add_argument("pytest", nargs="*")
    args = parser.parse_args()
    in_ci = bool(os.environ.get("CI"))
    missing: list[str] = []
    results: dict[str, bool] = {}
    if args.only in (None, "lint"):
        results["lint"] = lint()
    if args.only in (None, "python"):
        results["python"] = suite("python", args.pytest)
    if args.only in (None, "compiled"):
        if _core.status()["missing"]:
            missing.append(NO_COMPILED)
        else:
            results["compiled"] = suite("compiled", args.pytest)
    if args.only in (None, "vm"):
        if lacking := vm.missing():
            missing.append(f"the test VM, which lacks {', '.join(lacking)} (supply it: {vm.BUILD})")
        else:
            results["vm"] = machines(args.pytest if args.only else [])
    failed = [name for name, good in results.items() if not good]
    print(f"\n{len(results) - len(failed)} of {len(results)} phases passed", end="")
    print(f"; failed: {', '.join(failed)}" if failed else "")
    for thing in missing:
        print(f"{'MISSING' if in_ci else 'not run'}: {thing}")
    return 1 if failed or (in_ci and missing) else 0


if __name__ == "__main__":
    sys.exit(main())
