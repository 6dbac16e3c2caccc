"""Which core runs: the choice, the refusal of a stale module, the build without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dmakit import _core

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, where: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter on the package in ``where``/src."""
    full = {**os.environ, "PYTHONPATH": str(where / "src"), **env}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=full, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the checkout with its compiled modules."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def drop_compiled(checkout: Path) -> None:
    """Remove every compiled module from a copy."""
    for path in (checkout / "src").rglob("*.so"):
        path.unlink()


def test_the_suite_runs_on_the_core_that_was_asked_for() -> None:
    import dmakit.ledger

    asked = os.environ.get("DMAKIT_CORE", "")
    if asked:
        assert dmakit.ledger.__file__ is not None
        assert dmakit.ledger.__file__.endswith(".py") == (asked == "python")


def test_an_unknown_choice_is_refused(checkout: Path) -> None:
    run = python("import dmakit", checkout, DMAKIT_CORE="fast")
    assert "DMAKIT_CORE='fast': must be python, compiled or unset" in run.stderr


def test_python_is_forced_although_the_extension_lies_beside_it(checkout: Path) -> None:
    run = python("import dmakit.ledger as l; print(l.__file__)", checkout, DMAKIT_CORE="python")
    assert run.stdout.strip().endswith("ledger.py")


def test_compiled_is_refused_when_it_was_not_built(checkout: Path) -> None:
    drop_compiled(checkout)
    run = python("import dmakit.ledger", checkout, DMAKIT_CORE="compiled")
    assert "DMAKIT_CORE=compiled, but dmakit.ledger is not compiled; build it with: ./dmakit build" in run.stderr
    assert python("import dmakit.ledger", checkout, DMAKIT_CORE="").returncode == 0


@pytest.mark.skipif(bool(_core.status()["missing"]), reason="no compiled core here: ./dmakit build")
@pytest.mark.parametrize("suffix", [".py", ".pxd"])
def test_a_compiled_module_older_than_its_source_is_refused(checkout: Path, suffix: str) -> None:
    source = (checkout / "src" / "dmakit" / "ledger").with_suffix(suffix)
    source.write_text(source.read_text() + "\n# edited\n")
    run = python("import dmakit.ledger", checkout, DMAKIT_CORE="")
    assert "dmakit.ledger: the compiled module is older than its source; rebuild it with: ./dmakit build" in run.stderr


def test_a_machine_without_a_compiler_installs_the_interpreted_core(checkout: Path) -> None:
    drop_compiled(checkout)
    env = {**os.environ, "CC": "/nonexistent", "DMAKIT_BUILD": "auto"}
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "no C compiler with Python headers here: installing the interpreted core" in run.stderr
    assert not list((checkout / "src").rglob("*.so"))
    assert (
        python("import dmakit.ledger as l; print(l.__file__)", checkout, DMAKIT_CORE="")
        .stdout.strip()
        .endswith("ledger.py")
    )


def test_a_build_that_must_compile_says_why_it_cannot(checkout: Path) -> None:
    env = {**os.environ, "CC": "/nonexistent", "DMAKIT_BUILD": "compiled"}
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "DMAKIT_BUILD=compiled: no working C compiler with the Python headers was found" in run.stderr


@pytest.mark.skipif(find_spec("ziglang") is not None, reason="ziglang is installed here: it need not be asked for")
def test_an_isolated_build_with_zig_asks_for_ziglang(checkout: Path) -> None:
    """pip and uv install what the backend asks for and begin again; without isolation nothing can be added."""
    code = """
from setuptools import build_meta
print("asked for", build_meta.get_requires_for_build_editable())
import setuptools
setuptools._install_setup_requires = lambda attributes: None  # as if it had been fetched to another place
build_meta.build_wheel(".")
"""
    env = {**os.environ, "DMAKIT_BUILD": "zig"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, env=env, capture_output=True, text=True, check=False
    )
    assert "asked for ['ziglang']\n" in run.stdout, run.stderr
    text = "DMAKIT_BUILD=zig: this environment has no ziglang; install it there, or build with isolation"
    assert (run.returncode, run.stderr.strip()) == (1, text)


@pytest.mark.parametrize("lacking", ["CC", "PATH"])
def test_without_a_compiler_the_one_line_says_so_and_how_to_get_one(checkout: Path, lacking: str) -> None:
    drop_compiled(checkout)
    code = "from dmakit.cli.main import run; run(['doctor', '--one-line'])"
    where = {"CC": "/nonexistent"} if lacking == "CC" else {"CC": "", "PATH": "/nonexistent"}
    assert python(code, checkout, DMAKIT_CORE="", **where).stdout == (
        "dmakit: python core (no C compiler with Python headers was found; "
        "get one (apt install gcc python3-dev) or set DMAKIT_BUILD=zig, then: ./dmakit build)\n"
    )


def test_with_a_compiler_the_one_line_names_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "c_compiler", lambda: "cc")
    monkeypatch.setattr(_core, "python_headers", lambda: True)
    assert _core.why_not_compiled() == "no compiled module is installed; build them with: ./dmakit build"
    monkeypatch.setattr(_core, "python_headers", lambda: False)
    assert _core.why_not_compiled().startswith("no C compiler with Python headers was found; get one")
