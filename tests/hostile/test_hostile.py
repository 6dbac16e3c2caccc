"""Every public entry point of every compiled module, with hostile arguments, in both forms.

What is held, call by call: the process lives (a crash is reported with the call that made it), nothing hangs, memory is
not taken in absurd amounts, what is refused is refused by a documented exception and changes nothing, and the two forms
answer alike. Where a parameter has a declared type (a class of ours, ``str``, a C integer), Cython's check comes first
and is a TypeError or OverflowError; the interpreted form may look later, or not at all: there only our own errors are
compared. ``pytest -m long`` runs every variant instead of a share of them.
"""

from __future__ import annotations

import importlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dmakit import _core
from tests.hostile import drive
from tests.hostile.recipes import usual
from tests.hostile.surface import MODULES, Entry, entries, unlisted
from tests.hostile.world import World

MISSING = bool(_core.status()["missing"]) and not os.environ.get("CI")  # in CI a missing core is a failure
no_core = pytest.mark.skipif(MISSING, reason="no compiled core here: ./dmakit build")
ROOMS = ("block", "dma", "iommu", "iova", "nvme", "trace", "")
SHARE = 40
DUCK = ("AttributeError", "BufferError", "IndexError", "KeyError")  # what is not of the declared type may raise
SUB_VIEWS = "multi-dimensional sub-views are not implemented"  # Python's words when such a memoryview is iterated


def room(name: str) -> list[str]:
    """The compiled modules of a room; "" is what is left over."""
    named = {module: next((known for known in ROOMS if f".{known}." in module), "") for module in MODULES}
    return [module for module, found in named.items() if found == name]


@pytest.mark.parametrize("module", MODULES)
def test_every_entry_point_has_a_recipe(module: str) -> None:
    assert unlisted(module) == set()
    world = World()
    for entry in entries(module):
        if entry.owner and entry.name != "__init__":
            assert hasattr(world.part(entry.owner), entry.name), entry.key
        for parameter in entry.parameters:
            usual(world, entry, parameter.name)


def faults_of(core: str, answer: dict[str, Any]) -> str:
    """What one form may not do, or an empty text."""
    if "raised" not in answer:
        return ""
    duck = answer["raised"] in DUCK or (core == "python" and answer["message"] == SUB_VIEWS)
    duck = duck and not answer["loose"]
    if not answer["allowed"] and not duck:
        return f"{core}: {answer['raised']}: {answer['message']}"
    if answer["changed"] and not (core == "python" and not answer["own"]):
        return f"{core}: refused ({answer['raised']}), yet something changed"
    return ""


def difference(interpreted: dict[str, Any], compiled: dict[str, Any]) -> str:
    """How the answers of the two forms differ, or an empty text. A fingerprint means something in one process only."""
    if ".fingerprint(" in compiled["call"]:
        return ""
    seen = [
        (one.get("raised"), one.get("text"), one.get("answer"), one.get("words")) for one in (interpreted, compiled)
    ]
    if seen[0] == seen[1]:
        return ""
    if not compiled["loose"] and not (interpreted.get("own") and compiled.get("own") and seen[0][0] != seen[1][0]):
        return ""  # Cython made a C number of it (1.5, -2**64, a NumPy scalar), or refused, before our check saw it
    return f"interpreted {seen[0]}, compiled {seen[1]}"


def check(modules: list[str], seed: int, share: int) -> None:
    """Run both forms side by side and list everything that is wrong."""
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(drive.answers, core, modules, seed, share) for core in ("python", "compiled")]
        (interpreted, dead), (compiled, crashes) = (run.result() for run in runs)
    assert not dead and not crashes, "\n\n".join([*dead, *crashes])
    assert [answer["call"] for answer in interpreted] == [answer["call"] for answer in compiled] != []
    wrong = []
    for one, other in zip(interpreted, compiled, strict=True):
        found = [faults_of("python", one), faults_of("compiled", other), difference(one, other)]
        wrong += [f"{one['call']}: {text}" for text in found if text]
    assert not wrong, f"seed {seed}: {len(wrong)} calls\n" + "\n".join(wrong[:40])


@no_core
@pytest.mark.parametrize("name", ROOMS)
def test_hostile_arguments_are_refused_alike_and_change_nothing(name: str) -> None:
    check(room(name), 1, SHARE)


@no_core
@pytest.mark.long
@pytest.mark.parametrize("name", ROOMS)
def test_hostile_arguments_every_one(name: str) -> None:
    check(room(name), 1, 1)


@no_core
@pytest.mark.long
def test_hostile_arguments_of_another_seed(any_seed: int) -> None:
    for name in ROOMS:
        check(room(name), any_seed, 4)


def classes() -> list[tuple[str, str]]:
    """Every public compiled class: (module, name)."""
    found: dict[tuple[str, str], Entry] = {}
    for module in MODULES:
        found |= {(module, entry.owner): entry for entry in entries(module) if entry.owner}
    return sorted(found)


def test_no_object_is_left_half_made() -> None:
    made = 0
    for module, name in classes():
        loaded = importlib.import_module(module)
        owner = getattr(loaded, name)
        if owner.__flags__ & 1 << 9:  # written by a class statement: what is missing is an AttributeError
            continue
        made += 1
        with pytest.raises(TypeError, match="is not safe"):
            owner.__new__(owner)
    assert made > 50 or str(importlib.import_module("dmakit.ledger").__file__).endswith(".py")
