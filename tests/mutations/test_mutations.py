"""Every rule of the tables beside this file, when broken, turns a test red."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.mutations import block, dma, iova, pci, steps
from tests.mutations.harness import ROOT, Mutation, apply, caught, copy_tree, origin, run_tests

TABLES = {"iova": iova, "dma": dma, "block": block, "pci": pci, "steps": steps}
MUTATIONS = [
    pytest.param(mutation, id=f"{room}-{mutation.name}", marks=() if mutation.always else pytest.mark.long)
    for room, table in TABLES.items()
    for mutation in table.MUTATIONS
]
GOLDEN = ("tests/iova/test_golden.py",)


@pytest.fixture(scope="module")
def passes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], bool]:
    """Whether tests pass in a copy without any mutation, which runs from its own sources."""
    tree = copy_tree(tmp_path_factory.mktemp("sound") / "tree")
    assert origin(tree) == tree / "src" / "dmakit" / "__init__.py"
    return cache(lambda tests: run_tests(tree, tests).returncode == 0)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_rule_turns_a_test_red(
    mutation: Mutation, passes: Callable[[tuple[str, ...]], bool], tmp_path: Path
) -> None:
    assert passes(mutation.tests)
    caught(mutation, copy_tree(tmp_path / "tree"))


@pytest.mark.parametrize("room", TABLES)
def test_every_mutation_still_applies(room: str) -> None:
    for mutation in TABLES[room].MUTATIONS:
        assert (ROOT / mutation.file).read_text().count(mutation.old) == 1, mutation.name
    assert any(mutation.always for mutation in TABLES[room].MUTATIONS)


def test_a_mutation_that_matches_nothing_or_twice_is_refused(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    for old, times in (("no such text", 0), ("import", None)):
        mutation = Mutation("bad", "src/dmakit/iova/bits.py", old, "x", GOLDEN)
        count = (ROOT / mutation.file).read_text().count(old)
        assert times is None or count == times
        with pytest.raises(AssertionError, match=f"occurs {count} times in src/dmakit/iova/bits.py, not once"):
            apply(mutation, tree)


def test_a_mutation_that_no_test_notices_is_reported(tmp_path: Path) -> None:
    harmless = Mutation("harmless", "src/dmakit/iova/bits.py", '"""Arithmetic of', '"""The arithmetic of', GOLDEN)
    with pytest.raises(AssertionError, match=r"^harmless: pytest ended with 0, not 1"):
        caught(harmless, copy_tree(tmp_path / "tree"))
