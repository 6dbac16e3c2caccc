"""Wheels with one command: build one for each CPython that is here, install it elsewhere, test it there.

    python tools/wheels.py [--out dist] [--only 3.12 …] [--full] [--zig]

Each wheel is built from the tracked files alone (no leftover of the working tree), in isolation; then it is installed
into an environment of its own, away from the sources, where it must run the compiled core and pass the tests of the
rooms that need no recording (``--full``: the whole suite). ``--zig`` compiles with the ``ziglang`` package instead of
the system's compiler. Versions without an interpreter here are configured all the same; the table at the end names them
as untested. Wheels carry the plain ``linux`` tag: they are for machines like this one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.11", "3.12", "3.13", "3.13t", "3.14", "3.14t")
SMOKE = ["tests/ground", "tests/memory", "tests/iommu", "tests/swiotlb", "tests/block", "tests/nvme"]
TESTED_WITH = ["pytest>=8.4", "hypothesis>=6.130"]
NEEDS_SOURCES = "tests/ground/test_ground.py::test_consts_pxd_is_written_from_consts_py"
ZIG = "ziglang"


class Failed(Exception):
    """A step failed; the text says which."""


def interpreter(version: str) -> str | None:
    """An interpreter of this version with its headers, from PATH or pyenv."""
    name = f"python{version}"
    places = sorted(Path.home().glob(f".pyenv/versions/*/bin/{name}")) + [shutil.which(name)]
    probe = "import sys, sysconfig, pathlib; print(pathlib.Path(sysconfig.get_paths()['include'], 'Python.h').exists())"
    for place in filter(None, places):
        run = subprocess.run([str(place), "-c", probe], capture_output=True, text=True, check=False)
        if run.returncode == 0 and run.stdout.strip() == "True":
            return str(place)
    return None


def uv() -> list[str]:
    """The uv command."""
    found = os.environ.get("DMAKIT_UV") or shutil.which("uv")
    local = ROOT / ".uv" / "uv"
    if found is None and local.exists():
        found = str(local)
    return [found] if found else [sys.executable, "-m", "uv"]


def step(title: str, command: list[str], where: Path, **extra: str) -> str:
    """Run a command; its output, shown only when it fails."""
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "DMAKIT_CORE")}
    run = subprocess.run(command, cwd=where, env={**env, **extra}, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        print((run.stdout + run.stderr)[-4000:], file=sys.stderr)
        raise Failed(title)
    return run.stdout


def sources(target: Path) -> None:
    """Copy the tracked files."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def build(python: str, tree: Path, out: Path, zig: bool) -> Path:
    """One wheel."""
    command = [*uv(), "build", "--wheel", "--python", python, "--out-dir", str(out)]
    if zig:
        step("environment of the build", [*uv(), "venv", "-q", "--python", python, "zig"], tree)
        own = str(tree / "zig" / "bin" / "python")
        step("ziglang", [*uv(), "pip", "install", "-q", "--python", own, ZIG, "setuptools>=77", "cython>=3.3,<4"], tree)
        command = [*uv(), "build", "--wheel", "--python", own, "--no-build-isolation", "--out-dir", str(out)]
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.whl")}
    step("build", command, tree, DMAKIT_BUILD="zig" if zig else "compiled")
    made = [path for path in out.glob("*.whl") if before.get(path) != path.stat().st_mtime_ns]
    if len(made) != 1:
        raise Failed(f"build left {len(made)} wheels")
    return made[0]


def check(python: str, wheel: Path, tree: Path, full: bool) -> str:
    """Install the wheel in a fresh environment away from the sources and test it; the summary of the test run."""
    away = tree.with_name("away")
    shutil.rmtree(away, ignore_errors=True)
    for folder in ("tests", "docs"):
        shutil.copytree(tree / folder, away / folder)
    step("environment", [*uv(), "venv", "-q", "--python", python, ".venv"], away)
    own = str(away / ".venv" / "bin" / "python")
    step("install", [*uv(), "pip", "install", "-q", "--python", own, str(wheel), *TESTED_WITH], away)
    core = json.loads(step("doctor", [own, "-m", "dmakit", "doctor", "--json"], away))["core"]
    if core["running"] != "compiled":
        raise Failed(f"the installed core is {core['running']}: {core['why']}")
    shutil.copy(tree / "pyproject.toml", away / "pyproject.toml")
    chosen = ["tests", "--ignore=tests/shape"] if full else SMOKE
    command = [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--deselect", NEEDS_SOURCES, *chosen]
    return step("tests", command, away, DMAKIT_CORE="compiled").strip().splitlines()[-1]


def one(version: str, args: argparse.Namespace) -> tuple[bool, str]:
    """Build and test one version; (it is well, what to say about it)."""
    python = interpreter(version)
    if python is None:
        return True, "no interpreter with headers here: configured, untested"
    with tempfile.TemporaryDirectory(prefix="dmakit-wheel-") as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        sources(tree)
        try:
            wheel = build(python, tree, args.out, args.zig)
            check(python, wheel, tree, args.full)
        except Failed as failure:
            return False, f"FAILED: {failure}"
    return True, f"built and tested: {wheel.name} ({wheel.stat().st_size / 1e6:.1f} MB)"


def main() -> int:
    """All versions; status 1 when one that is here failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--only", nargs="+", choices=VERSIONS, default=list(VERSIONS), metavar="VERSION")
    parser.add_argument("--full", action="store_true", help="the whole test-suite")
    parser.add_argument("--zig", action="store_true", help="compile with the ziglang package")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    well = True
    for version in args.only:
        fine, text = one(version, args)
        well = well and fine
        print(f"CPython {version:<5}  {text}", flush=True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
