"""Rules of the IOVA allocator: each, when broken, turns a test red."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations.harness import ROOT, Mutation, apply, caught, copy_tree, origin, run_tests

GOLDEN = ("tests/iova/test_golden.py",)
DEPOT = ("tests/iova/test_domain.py", "-k", "depot")
FLUSH = ("tests/iova/test_flush_queue.py",)
DOMAIN = ("tests/iova/test_domain.py",)

STRESS = ("tests/trace/test_replay.py", "-k", "stress")

MUTATIONS = (
    Mutation("magazine-size-on-a-trace", "src/dmakit/consts.py", "IOVA_MAG_SIZE = 127", "IOVA_MAG_SIZE = 128", STRESS),
    Mutation(
        "depot-rule-on-a-trace",
        "src/dmakit/iova/rcache.py",
        "if self.depot_size[order] > online:",
        "if self.depot_size[order] > 32:",
        STRESS,
    ),
    Mutation(
        "depot-forgets-its-chain-on-a-trace",
        "src/dmakit/iova/rcache.py",
        "self.pool.link[magazine] = self.depot[order]\n",
        "self.pool.link[magazine] = 0\n",
        STRESS,
    ),
    Mutation("magazine-size", "src/dmakit/consts.py", "IOVA_MAG_SIZE = 127", "IOVA_MAG_SIZE = 128", GOLDEN),
    Mutation(
        "depot-rule",
        "src/dmakit/iova/rcache.py",
        "if self.depot_size[order] > online:",
        "if self.depot_size[order] > 32:",
        DEPOT,
    ),
    Mutation(
        "depot-keeps-one-less",
        "src/dmakit/iova/rcache.py",
        "if self.depot_size[order] > online:",
        "if self.depot_size[order] >= online:",
        DEPOT,
    ),
    Mutation(
        "magazine-first-in-first-out",
        "src/dmakit/iova/magazine.py",
        "at: cython.Py_ssize_t = self._look(magazine, highest)",
        "at: cython.Py_ssize_t = header + 1 if self._size(magazine) and self.words[header + 1] <= highest else 0",
        GOLDEN,
    ),
    Mutation(
        "watermark-never-reset",
        "src/dmakit/iova/search.py",
        "if lo < self.dma_32bit_pfn:\n            self.max32_alloc_size = self.dma_32bit_pfn",
        "if lo < self.dma_32bit_pfn:\n            pass",
        GOLDEN,
    ),
    Mutation(
        "no-retry-pass",
        "src/dmakit/iova/search.py",
        "if pfn == 0 and retry_pfn < limit:",
        "if pfn == 0 and retry_pfn > limit:",
        GOLDEN,
    ),
    Mutation(
        "cached-node-stays",
        "src/dmakit/iova/search.py",
        "if lo >= self.tree.lo[self.cached_node]:\n            self.cached_node = above",
        "if lo == self.tree.lo[self.cached_node]:\n            self.cached_node = above",
        GOLDEN,
    ),
    Mutation(
        "small-sizes-not-rounded",
        "src/dmakit/iova/allocator.py",
        "one << order if order < IOVA_RANGE_CACHE_MAX_SIZE else size",
        "size",
        GOLDEN,
    ),
    Mutation(
        "free-before-the-flush",
        "src/dmakit/iova/flush_queue.py",
        "if self.counter[at] >= self.finish_cnt:",
        "if self.counter[at] > self.finish_cnt:",
        FLUSH,
    ),
    Mutation(
        "table-left-with-its-entry",
        "src/dmakit/iova/flush_queue.py",
        "if self.tables[at] != 0:",
        "if self.tables[at] == 1:",
        FLUSH,
    ),
    Mutation(
        "drains-only-one-cpu",
        "src/dmakit/iova/allocator.py",
        "if self._online[other]:\n                self._drain_cpu(other, cpu)",
        "if other == cpu:\n                self._drain_cpu(other, cpu)",
        DOMAIN,
    ),
)
ALWAYS = (
    "magazine-size",
    "depot-rule",
    "magazine-size-on-a-trace",
    "depot-rule-on-a-trace",
    "free-before-the-flush",
)  # the others run with -m long


@pytest.fixture(scope="module")
def sound_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without any mutation: it runs from its own sources, and its tests pass."""
    tree = copy_tree(tmp_path_factory.mktemp("sound") / "tree")
    assert origin(tree) == tree / "src" / "dmakit" / "__init__.py"
    run = run_tests(tree, (*GOLDEN, *FLUSH, *DOMAIN))
    assert run.returncode == 0, run.stdout[-3000:]
    run = run_tests(tree, STRESS)
    assert run.returncode == 0, run.stdout[-3000:]
    return tree


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.name in ALWAYS], ids=lambda mutation: mutation.name)
def test_a_broken_rule_turns_a_test_red(mutation: Mutation, sound_copy: Path, tmp_path: Path) -> None:
    assert sound_copy.exists()
    caught(mutation, copy_tree(tmp_path / "tree"))


@pytest.mark.long
@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.name not in ALWAYS], ids=lambda mutation: mutation.name)
def test_another_broken_rule_turns_a_test_red(mutation: Mutation, sound_copy: Path, tmp_path: Path) -> None:
    assert sound_copy.exists()
    caught(mutation, copy_tree(tmp_path / "tree"))


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
