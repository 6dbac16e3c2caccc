"""Mutation tests: break one rule in a copy of the tree, and demand that the tests notice.

A ``Mutation`` names a file, a text that occurs in it exactly once, what it becomes, and the tests that must go red.
``copy_tree`` copies what the tests need to a directory; ``caught`` applies the change there and runs pytest in a
process of its own, interpreted: the tree under test is never touched. A mutation counts as caught only when a test
*failed*: an import error, a collection error or a time-out is an error of the mutation. The same tests
must pass in a copy without any.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("src", "tests", "tools", "stubs", "pyproject.toml")
LEFT_OUT = shutil.ignore_patterns("*.so", "_built.*", "__pycache__", "*.egg-info", ".hypothesis", "*.c")
TIMEOUT_S = 300


@dataclass(frozen=True)
class Mutation:
    """``old`` in ``file`` (path from the root) becomes ``new``; ``tests`` (pytest arguments) must fail then.

    Those that are tried ``always`` stand for the others, which a long run tries.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    always: bool = False


def copy_tree(target: Path) -> Path:
    """A copy of the sources and tests without anything compiled."""
    target.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=LEFT_OUT)
        else:
            shutil.copy2(source, target / name)
    return target


def apply(mutation: Mutation, tree: Path) -> None:
    """Change the one place; AssertionError when the text is not there exactly once."""
    path = tree / mutation.file
    text = path.read_text()
    found = text.count(mutation.old)
    assert found == 1, f"{mutation.name}: {mutation.old!r} occurs {found} times in {mutation.file}, not once"
    path.write_text(text.replace(mutation.old, mutation.new))


def run_tests(tree: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """pytest in the copy, on the interpreted core of the copy, stopping at the first failure."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"DMAKIT_CORE": "python", "PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def origin(tree: Path) -> Path:
    """Where a process that runs in the copy takes dmakit from."""
    run = subprocess.run(
        [sys.executable, "-c", "import dmakit; print(dmakit.__file__)"],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(run.stdout.strip())


def caught(mutation: Mutation, tree: Path) -> str:
    """Apply the mutation to the copy and return the line naming the failed test; AssertionError if none."""
    apply(mutation, tree)
    run = run_tests(tree, mutation.tests)
    assert run.returncode == 1, f"{mutation.name}: pytest ended with {run.returncode}, not 1\n{run.stdout[-3000:]}"
    failed = [line for line in run.stdout.splitlines() if line.startswith("FAILED ")]
    assert failed, f"{mutation.name}: no test failed\n{run.stdout[-3000:]}"
    return failed[0]
