"""What a build does again: what has changed, and what was made in another way; nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
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

pytestmark = pytest.mark.skipif(not (_core.c_compiler() and _core.python_headers()), reason=_core.why_not_compiled())


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
        text = once(r"EFFORT = \{.*?\n\}", "EFFORT = {}", text).replace('"-O2"', '"-O0"')
        (self.root / "setup.py").write_text(text)
        for ready in ROOT.glob("build/cython-*/_cyutility.c"):  # seconds of Cython's time, always the same text
            (self.root / ready.relative_to(ROOT).parent).mkdir(parents=True)
            shutil.copy(ready, self.root / ready.relative_to(ROOT))
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

    def record(self) -> Path:
        """Where this Python's builds are recorded."""
        return self.package / _core.RECORD.name

    def recorded(self) -> dict[str, str]:
        """The digests of the last build, without that of the way it was done."""
        digests: dict[str, str] = json.loads(self.record().read_text())
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

    def answer(self, name: str, where: Path | None = None) -> int:
        """What a module's number is, in a new interpreter."""
        code = f"from dmakit.{name} import Number; print(Number().get())"
        env = {**os.environ, "PYTHONPATH": str(where or self.package.parent), "DMAKIT_CORE": ""}
        return int(subprocess.check_output([sys.executable, "-c", code], text=True, env=env))

    def wheel(self) -> dict[str, int]:
        """Build a wheel and install it elsewhere; each module's number there."""
        run = self.build("-c", "from setuptools import build_meta; print(build_meta.build_wheel('wheels'))")
        assert run.returncode == 0, run.stderr
        shutil.rmtree(self.root / "installed", ignore_errors=True)
        with zipfile.ZipFile(self.root / "wheels" / run.stdout.split()[-1]) as wheel:
            wheel.extractall(self.root / "installed")
        assert not list((self.root / "installed").rglob("_built*"))
        return {name: self.answer(name, self.root / "installed") for name in ("one", "two")}

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


def test_what_has_not_changed_is_left_alone_and_the_translator_is_not_asked(tree: Tree) -> None:
    digests = tree.recorded()
    shutil.rmtree(tree.root / "cache")
    assert tree.rebuilt() == set()
    assert not (tree.root / "cache").exists()
    assert tree.recorded() == digests


def test_a_changed_module_is_built_whatever_its_time_says(tree: Tree) -> None:
    tree.edit("two.py", "return 1", "return 2")
    assert tree.rebuilt() == {"two"}
    assert tree.answer("two") == 2
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


def test_a_build_that_fails_leaves_nothing_to_believe_of_what_it_was_to_replace(tree: Tree) -> None:
    """Neither the record nor the time of a file: the edit is taken back as if it had never been."""
    compiler, broken = tree.root / "compiler", tree.root / "broken"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *one.c*) ! [ -e {broken} ] || exit 1;; esac\nexec {_core.c_compiler()} "$@"\n'
    )
    compiler.chmod(0o755)
    assert tree.rebuilt(CC=str(compiler)) == {"one", "two", "_cyutility"}
    broken.touch()
    tree.edit("one.py", "return 1", "return 2")
    assert tree.build(CC=str(compiler)).returncode != 0
    assert "return 2" in (tree.root / "build/cython/src/dmakit/one.c").read_text()
    assert tree.recorded().keys() == set(NAMES) - {"dmakit.one"}
    broken.unlink()
    tree.edit("one.py", "return 2", "return 1")
    assert tree.rebuilt(CC=str(compiler)) == {"one"}
    assert tree.answer("one") == 1


def test_a_compiler_that_does_not_know_an_option_is_not_given_it(tree: Tree) -> None:
    """clang (and zig's cc, which is one) ends at gcc's names of passes."""
    setup, compiler = tree.root / "setup.py", tree.root / "compiler"
    setup.write_text(setup.read_text().replace("EFFORT = {}", 'EFFORT = {"-O1": "one two"}'))
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-tree-*) exit 1;; esac\nexec {_core.c_compiler()} "$@"\n')
    compiler.chmod(0o755)
    assert tree.rebuilt(CC=str(compiler)) == {"one", "two", "_cyutility"}
    compiler.write_text(f'#!/bin/sh\necho "$*" >>{tree.root}/said\nexec {_core.c_compiler()} "$@"\n')
    assert "one" in tree.rebuilt(CC=str(compiler), CFLAGS="-DANOTHER")
    (line,) = (line for line in (tree.root / "said").read_text().splitlines() if "/one.c " in line)
    assert line.endswith(" -O1 -fno-tree-dominator-opts -fno-tree-pta")


def test_a_wheel_has_its_own_modules_and_no_record(tree: Tree) -> None:
    """Built in one folder after another, and in the tree between."""
    tree.wheel()
    tree.edit("one.py", "return 1", "return 2")
    assert tree.wheel()["one"] == 2
    tree.edit("one.py", "return 2", "return 1")
    tree.edit("two.py", "return 1", "return 3")
    assert tree.rebuilt() == {"two"}
    assert tree.wheel() == {"one": 1, "two": 3}


def test_what_is_no_hot_module_any_more_runs_from_its_source(tree: Tree) -> None:
    core = tree.package / "_core.py"
    core.write_text(core.read_text().replace("('dmakit.one', 'dmakit.two')", "('dmakit.one',)"))
    tree.edit("two.py", "return 1", "return 7")
    (tree.package / "__init__.py").write_text("from dmakit import _core\n_core.install()\n")
    assert tree.files().keys() == {"one", "two", "_cyutility"}
    assert tree.answer("two") == 7
    assert tree.build().returncode == 0
    assert tree.files().keys() == {"one", "_cyutility"}


def test_a_damaged_record_is_none(tree: Tree) -> None:
    tree.record().write_text("[")
    assert tree.rebuilt() == {"one", "two", "_cyutility"}


def test_force_concerns_all(tree: Tree) -> None:
    before = tree.files()
    assert tree.build("setup.py", "-q", "build_ext", "--inplace", "--force").returncode == 0
    assert not before.items() & tree.files().items()


@pytest.mark.parametrize("without", [{"DMAKIT_BUILD": "python"}, {"DMAKIT_BUILD": "auto", "CC": "/nonexistent"}])
def test_an_editable_install_that_does_not_compile_leaves_nothing_compiled(tree: Tree, without: dict[str, str]) -> None:
    editable = "from setuptools import build_meta; build_meta.build_editable('wheels')"
    assert tree.files()
    run = tree.build("-c", editable, **without)
    assert run.returncode == 0, run.stderr
    assert not tree.files()
    assert not tree.record().exists()
    run = tree.build("-c", editable)
    assert run.returncode == 0, run.stderr
    assert tree.files().keys() == {"one", "two", "_cyutility"}
    assert tree.rebuilt() == set()
