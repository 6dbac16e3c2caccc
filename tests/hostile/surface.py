"""The public entry points of the compiled modules, found by introspection: nothing is listed by hand.

Names and parameters come from the sources (``ast``), because a compiled ``__init__`` has no signature; whether a name
can be called from Python is asked of the loaded module. So a class, method or function that is added tomorrow is found
tomorrow, and the test fails until ``recipes`` says how to make its object and its arguments.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from dataclasses import dataclass
from typing import Any

from dmakit import _core

SPECIAL = ("__init__", "__bool__", "__enter__", "__exit__", "__eq__", "__str__", "__repr__", "__len__")
_TYPED = re.compile(r"^\s*(?:c(?:p)?def)\s[^\n(]*?\b(\w+)\(", re.M)


@dataclass(frozen=True)
class Parameter:
    """One parameter; ``keyword``: by keyword only; ``optional``: has a default.

    ``loose``: any integer, any buffer or any sequence may come, and the method itself looks; else Cython's own check of
    the declared type comes first, where the interpreted form would look later.
    """

    name: str
    keyword: bool
    optional: bool
    loose: bool


@dataclass(frozen=True)
class Entry:
    """One public callable: a function (``owner`` empty), a method, or a constructor (``name`` is ``__init__``)."""

    module: str
    owner: str
    name: str
    parameters: tuple[Parameter, ...]

    @property
    def key(self) -> str:
        """Readable and unique."""
        return ".".join(part for part in (self.module.removeprefix("dmakit."), self.owner, self.name) if part)


# Stages of a replay, each made and fed by the one before it: what a caller can give them is a trace.
_STAGES = ("branch", "midlife", "operation", "operations", "search", "tally", "timeline")
# Parts of a comparison, likewise: what a caller can give them is a workload.
_PARTS = ("descriptors", "engine", "flight", "payload", "sharing", "strategies")
STAGES = {f"dmakit.trace.{name}" for name in _STAGES} | {f"dmakit.lab.{name}" for name in _PARTS}
MODULES = [module for module in _core.COMPILED_MODULES if module not in STAGES]


def entries(module: str) -> list[Entry]:
    """Every public entry point of a compiled module, in the order of its source."""
    tree = ast.parse(_core.source_of(module).read_text())
    loaded = importlib.import_module(module)
    found: list[Entry] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and _callable(module, node.name):
            found.append(Entry(module, "", node.name, _parameters(node)))
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += _methods(module, node, getattr(loaded, node.name))
    return found


def unlisted(module: str) -> set[str]:
    """What the loaded module offers to callers and the sources do not show: must be empty."""
    loaded = importlib.import_module(module)
    known = {(entry.owner, entry.name) for entry in entries(module)}
    missing = set()
    for name, thing in vars(loaded).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module or not callable(thing):
            continue
        if not inspect.isclass(thing):
            missing |= {name} if ("", name) not in known and _callable(module, name) else set()
            continue
        if _is_data(thing):
            continue
        methods = {member for member in vars(thing) if not member.startswith("_")}
        calls = {member for member in methods if inspect.isroutine(vars(thing)[member])}
        missing |= {f"{name}.{member}" for member in calls if (name, member) not in known}
    return missing


def _methods(module: str, node: ast.ClassDef, owner: Any) -> list[Entry]:
    if _is_data(owner):
        return []
    found = []
    for item in node.body:
        if not isinstance(item, ast.FunctionDef) or (item.name.startswith("_") and item.name not in SPECIAL):
            continue
        if any("property" in ast.unparse(decorator) for decorator in item.decorator_list):
            continue
        if not any("setter" in ast.unparse(decorator) for decorator in item.decorator_list):
            found.append(Entry(module, node.name, item.name, _parameters(item)))
    return found


def _is_data(owner: Any) -> bool:
    """Tuples, enums, dataclasses and protocols: made by the interpreter's own code, or never made."""
    return issubclass(owner, (tuple, int)) or hasattr(owner, "__dataclass_fields__") or hasattr(owner, "_is_protocol")


def _parameters(node: ast.FunctionDef) -> tuple[Parameter, ...]:
    positional = [argument for argument in node.args.args if argument.arg != "self"]
    required = len(positional) - len(node.args.defaults)
    found = [Parameter(item.arg, False, at >= required, _loose(item)) for at, item in enumerate(positional)]
    pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return (*found, *(Parameter(item.arg, True, default is not None, _loose(item)) for item, default in pairs))


def _loose(argument: ast.arg) -> bool:
    text = "" if argument.annotation is None else ast.unparse(argument.annotation)
    return text.startswith(("SupportsIndex", "object", "Sequence", "Iterable"))


def _callable(module: str, name: str) -> bool:
    """Whether a function is there for Python in both forms: not one that the .pxd makes a C function."""
    pxd = _core.source_of(module).with_suffix(".pxd")
    return not pxd.exists() or name not in {
        line.group(1) for line in _TYPED.finditer(pxd.read_text()) if not line.group(0).strip().startswith("cpdef")
    }
