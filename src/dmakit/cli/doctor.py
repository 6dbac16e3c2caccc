"""``dmakit doctor``: which core runs and why, the compiler, the versions, and what this host can do for DMA."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import dmakit
from dmakit import _core

if TYPE_CHECKING:
    from dmakit.platform.host import Finding

PACKAGES = ("numpy", "rich", "zstandard", "cython")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``doctor``."""
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--one-line", action="store_true", help="only which core runs, and why")


def compiler() -> str:
    """First line of the C compiler's version, or an empty string."""
    command = _core.c_compiler()
    if not command:
        return ""
    run = subprocess.run([command.split()[0], "--version"], capture_output=True, text=True, check=False)
    return run.stdout.splitlines()[0] if run.returncode == 0 and run.stdout else ""


def version_of(package: str) -> str:
    """The installed version of a package, or 'not installed'."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def host_findings() -> list[Finding]:
    """What this host can do."""
    from dmakit.platform.host import Host, survey
    from dmakit.platform.host_calls import HostCalls

    return survey(Host(Path("/"), HostCalls()))


def report() -> dict[str, object]:
    """What ``doctor`` shows of this installation."""
    return {
        "dmakit": dmakit.__version__,
        "core": _core.status(),
        "python": f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "compiler": compiler() or None,
        "python_headers": _core.python_headers(),
        "packages": {name: version_of(name) for name in PACKAGES},
    }


def run(args: argparse.Namespace) -> int:
    """Print the report; status 2 when the core that was asked for cannot run."""
    facts = report()
    core = _core.status()
    bad = core["stale"] or (core["requested"] == "compiled" and core["missing"])
    if args.one_line:
        print(f"dmakit: {core['running']} core ({core['why']})")
    elif args.json:
        print(json.dumps(facts | {"host": [finding.as_json() for finding in host_findings()]}, indent=2))
    else:
        print_report(facts, core)
        print_host(host_findings())
    return 2 if bad else 0


def print_report(facts: dict[str, object], core: dict[str, object]) -> None:
    """The report for the eye."""
    print(f"dmakit          {facts['dmakit']}")
    print(f"core            {core['running']}: {core['why']}")
    if core["stale"]:
        print(f"  stale         {', '.join(map(str, core['stale']))}: rebuild with {_core.REBUILD}")  # type: ignore[call-overload]
    if core["running"] == "mixed":
        print(f"  interpreted   {', '.join(map(str, core['missing']))}")  # type: ignore[call-overload]
    print(f"python          {facts['python']}")
    headers = "present" if facts["python_headers"] else "missing (Debian: apt install python3-dev)"
    print(f"Python headers  {headers}")
    print(f"C compiler      {facts['compiler'] or 'none (Debian: apt install gcc; or DMAKIT_BUILD=zig)'}")
    print(f"platform        {facts['platform']}, {facts['cpus']} CPUs")
    for name in PACKAGES:
        print(f"{name:<15} {version_of(name)}")


def print_host(findings: list[Finding]) -> None:
    """The host's part: a line a finding, and below it what to do."""
    print()
    for finding in findings:
        print(f"{finding.name:<22} {finding.state:<7} {finding.detail}")
        if finding.remedy:
            print(f"{'':<22} {'':<7} -> {finding.remedy}")
