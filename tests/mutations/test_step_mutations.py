"""Rules that a recorded kernel shows: each, when broken, makes a step differ from the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations.harness import ROOT, Mutation, caught, copy_tree

SAME = "tests/steps/test_replay.py::test_with_the_defects_of_7_2_every_step_is_the_kernels"
DOMAIN = "src/dmakit/iommu/domain.py"

MUTATIONS = (
    Mutation(
        "IH-is-always-set",
        DOMAIN,
        "gather.freelist == 0, cause, cpu)",
        "True, cause, cpu)",
        (f"{SAME}[unlink-strict]",),
    ),
    Mutation(
        "replaced-table-waits-for-the-next-flush",
        DOMAIN,
        "if self.scratch.freelist != 0:",
        "if self.scratch.freelist == 1:",
        (f"{SAME}[unlink-strict]",),
    ),
    Mutation(
        "timer-frees-without-a-flush",
        "src/dmakit/iova/flush_queue.py",
        "        self._flush_iotlb(cause)\n        for ring",
        "        self.finish_cnt += 1\n        for ring",
        (f"{SAME}[unlink-lazy]",),
    ),
    Mutation(
        "sg-merges-over-a-piece-that-ends-inside-a-granule",
        "src/dmakit/dma/scatter.py",
        "if size + offset < self.span[i]:",
        "if self.span[i] == 0:",
        (f"{SAME}[sg-module]",),
    ),
)
ALWAYS = ("IH-is-always-set",)  # the others run with -m long


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_still_applies(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.name in ALWAYS], ids=lambda mutation: mutation.name)
def test_a_broken_rule_is_seen_in_a_step(mutation: Mutation, tmp_path: Path) -> None:
    caught(mutation, copy_tree(tmp_path / "tree"))


@pytest.mark.long
@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.name not in ALWAYS], ids=lambda mutation: mutation.name)
def test_another_broken_rule_is_seen_in_a_step(mutation: Mutation, tmp_path: Path) -> None:
    caught(mutation, copy_tree(tmp_path / "tree"))
