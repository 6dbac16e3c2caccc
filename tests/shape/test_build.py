"""What a build does again: what has changed, and what was made in another way; nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dmakit import _core

ROOT = Path(__file__).resolve().parents[2]
PROJECT = """
[project]
name = "dmakit"
version = "0"

[tool.setuptools.packages.find]
where = ["src"]
"""
NAMES = ("dmakit.one", "dmakit.two", "dmakit._cyutility")

pytestmark = [
    pytest.mark.skipif(not (_core.c_compiler() and _core.python_headers()), reason=_core.why_not_compiled()),
    pytest.mark.xdist_group("build"),
]


class Tree:
    """A checkout with two hot modules, the second of which uses the first one's types."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.package = root / "src" / "dmakit"

    def write(self) -> Tree:
        """Lay the sources down."""
        self.package.mkdir(parents=True)
        text = (ROOT / "src" / "dmakit" / "_core.py").read_text()
        (self.package / "_core.py").write_text(
            once(r"COMPILED_MODULES = \(.*?\n\)", f"COMPILED_MODULES = {NAMES[:2]}", text)
        )
        text = (ROOT / "setup.py").read_text()
        (self.root / "setup.py").write_text(once(r"EFFORT = \{.*?\n\}", "EFFORT = {}", text))
        (self.root / "pyproject.toml").write_text(PROJECT)
        (self.package / "__init__.py").touch()
        for name in ("one", "two"):
            (self.package / f"{name}.py").write_text("class Number:\n    def get(self):\n        return 1\n")
        (self.package / "one.pxd").write_text("cdef class Number:\n    cpdef long get(self)\n")
        (self.package / "two.pxd").write_text(
            "from dmakit.one cimport Number as Other\n\ncdef class Number:\n    pass\n"
        )
        return self

    def build(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Build in place."""
        full = {**os.environ, "XDG_CACHE_HOME": str(self.root / "cache"), "DMAKIT_BUILD": "compiled", **env}
        command = command or ("setup.py", "-q", "build_ext", "--inplace")
        return subprocess.run(
            [sys.executable, *command], cwd=self.root, env=full, capture_output=True, text=True, check=False
        )

    def recorded(self) -> dict[str, str]:
        """The digests of the last build, without that of the way it was done."""
        digests: dict[str, str] = json.loads((self.package / "_built.json").read_text())
        assert len(digests.pop("how")) == 64
        return digests

    def rebuilt(self, **env: str) -> set[str]:
        """Build; the modules whose compiled files are others than before."""
        before = self.files()
        run = self.build(**env)
        assert run.returncode == 0, run.stderr
        assert self.recorded().keys() == set(NAMES)
        after = self.files()
        assert after.keys() == {name.partition(".")[2] for name in NAMES}
        return {name for name in after if before.get(name) != after[name]}

    def files(self) -> dict[str, tuple[int, int]]:
        """What tells a compiled file from a later one, by module."""
        found = {path.name.partition(".")[0]: path.stat() for path in self.package.glob("*.so")}
        return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in found.items()}

    def edit(self, name: str, old: str, new: str) -> None:
        """Change a source, in such a way that its time does not tell."""
        path = self.package / name
        times = path.stat()
        path.write_text(once(old, new, path.read_text()))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def once(pattern: str, new: str, text: str) -> str:
    """``text`` with the one match replaced."""
    text, count = re.subn(pattern, lambda match: new, text, flags=re.DOTALL)
    assert count == 1
    return text


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A tree that has been built once."""
    tree = Tree(tmp_path_factory.mktemp("built")).write()
    assert tree.rebuilt() == {"one", "two", "_cyutility"}
    return tree


@pytest.fixture
def tree(built: Tree, tmp_path: Path) -> Tree:
    """A copy of it."""
    return Tree(Path(shutil.copytree(built.root, tmp_path / "tree")))


def test_what_has_not_changed_is_left_alone_and_the_translator_is_not_even_loaded(tree: Tree) -> None:
    digests = tree.recorded()
    shutil.rmtree(tree.root / "cache")
    assert tree.rebuilt() == set()
    assert not (tree.root / "cache").exists()
    assert tree.recorded() == digests


def test_a_changed_module_is_built_whatever_its_time_says(tree: Tree) -> None:
    tree.edit("two.py", "return 1", "return 2")
    assert tree.rebuilt() == {"two"}
    code = "from dmakit.two import Number; print(Number().get())"
    env = {**os.environ, "PYTHONPATH": str(tree.root / "src")}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=env) == "2\n"
    assert tree.rebuilt() == set()


def test_declarations_concern_every_module_that_uses_them(tree: Tree) -> None:
    tree.edit("one.pxd", "long get", "int get")
    assert tree.rebuilt() == {"one", "two"}


@pytest.mark.parametrize("lost", ["src/dmakit/one.*.so", "build/cython/src/dmakit/one.c"])
def test_what_was_lost_is_made_again(tree: Tree, lost: str) -> None:
    (path,) = tree.root.glob(lost)
    path.unlink()
    assert tree.rebuilt() == {"one"}
    assert path.exists()


def test_another_way_to_build_concerns_all(tree: Tree) -> None:
    assert tree.rebuilt(CFLAGS="-DANOTHER") == {"one", "two", "_cyutility"}
    assert tree.rebuilt(CFLAGS="-DANOTHER") == set()
    assert not list(tree.root.glob("build/cython/src/dmakit/*.html"))
    assert tree.rebuilt(DMAKIT_ANNOTATE="1") == {"one", "two", "_cyutility"}
    assert len(list(tree.root.glob("build/cython/src/dmakit/*.html"))) == 2


def test_a_build_that_fails_leaves_what_it_was_to_replace_unrecorded(tree: Tree) -> None:
    """Else an edit that is taken back would be answered with what a half-done build left."""
    text = (tree.package / "one.py").read_text()
    (tree.package / "one.py").write_text("class Number:\n    def get(self:\n")
    assert tree.build().returncode != 0
    assert tree.recorded().keys() == set(NAMES) - {"dmakit.one"}
    (tree.package / "one.py").write_text(text)
    assert tree.rebuilt() == {"one"}


@pytest.mark.parametrize("without", [{"DMAKIT_BUILD": "python"}, {"DMAKIT_BUILD": "auto", "CC": "/nonexistent"}])
def test_an_editable_install_that_does_not_compile_leaves_nothing_compiled(tree: Tree, without: dict[str, str]) -> None:
    editable = "from setuptools import build_meta; build_meta.build_editable('wheels')"
    assert tree.files()
    run = tree.build("-c", editable, **without)
    assert run.returncode == 0, run.stderr
    assert not tree.files()
    assert not (tree.package / "_built.json").exists()
    run = tree.build("-c", editable)
    assert run.returncode == 0, run.stderr
    assert tree.files().keys() == {"one", "two", "_cyutility"}
    assert tree.rebuilt() == set()
