"""The shape of the house: imports run downward, the lower rooms touch no outside world, files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dmakit import _core

SRC = Path(__file__).resolve().parents[2] / "src" / "dmakit"
FLOORS = (
    ("_core", "_later", "_seal"),
    ("errors", "consts", "clock", "failpoint", "reasons", "ledger", "turn", "units"),
    ("memory",),
    ("iova",),
    ("iommu",),
    ("swiotlb",),
    ("p2p",),
    ("dma",),
    ("platform",),
    ("block",),
    ("nvme",),
    ("trace",),
    ("lab",),
    ("bench",),
    ("cli",),
    ("__main__", "__init__"),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
OUTSIDE = {"os", "io", "socket", "time", "pathlib", "subprocess", "shutil", "tempfile", "datetime", "random", "secrets"}
SEALED = ("memory", "iova", "iommu", "swiotlb", "p2p", "dma")
FILES = sorted(path for path in SRC.rglob("*.py"))


def room_of(module: str) -> str:
    """The room of a dotted dmakit module ('dmakit.iova.tree' → 'iova')."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(path: Path) -> list[str]:
    """Dotted names that a file imports, with cython.cimports spelled as the module itself."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" if node.module == "dmakit" else node.module for alias in node.names]
    return [name.removeprefix("cython.cimports.") for name in names]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_run_downward(path: Path) -> None:
    relative = path.relative_to(SRC)
    own = relative.parts[0].removesuffix(".py")
    for name in imports_of(path):
        if name == "dmakit" or not name.startswith("dmakit."):
            continue
        room = room_of(name)
        assert room in LEVEL, f"{relative} imports {name}: {room} is on no floor"
        assert room == own or LEVEL[room] <= LEVEL[own], f"{relative} imports {name}, a room above its own"


@pytest.mark.parametrize("room", SEALED)
def test_mechanisms_touch_no_outside_world(room: str) -> None:
    for path in (SRC / room).rglob("*.py"):
        used = {name.split(".")[0] for name in imports_of(path)} & OUTSIDE
        assert not used, f"{path.relative_to(SRC)} imports {sorted(used)}: it must be passed in"
        calls = [
            n.func.id
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        ]
        assert "open" not in calls, f"{path.relative_to(SRC)} opens a file"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    tree = ast.parse(text)
    if text.strip():
        assert ast.get_docstring(tree), "a file opens with its theory"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            length = (node.end_lineno or 0) - first.lineno + 1
            assert length <= 40, f"{node.name} has {length} lines"


def test_listed_hot_modules_have_both_files() -> None:
    for module in _core.COMPILED_MODULES:
        assert _core.source_of(module).exists(), module
        assert _core.source_of(module).with_suffix(".pxd").exists(), module


def test_every_pxd_belongs_to_a_listed_module() -> None:
    listed = {_core.source_of(module).with_suffix(".pxd") for module in _core.COMPILED_MODULES}
    others = {p for p in SRC.rglob("*.pxd") if p not in listed and p.name not in ("__init__.pxd", "consts.pxd")}
    assert not others
