"""The kernel's own answers: golden vectors taken from drivers/iommu/iova.c, call by call."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dmakit.iova.domain import IovaDomain
from dmakit.ledger import Ledger

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "iova_golden.jsonl.xz"
PCI_LIMIT, WIDE_LIMIT = (1 << 20) - 1, (1 << 52) - 1


def steps(name: str) -> Iterator[dict[str, Any]]:
    """The lines of one golden trace, its head first."""
    current = None
    with lzma.open(GOLDEN, "rt") as lines:
        for line in lines:
            step = json.loads(line)
            current = step.get("trace", current)
            if current == name:
                yield step


def allocate(domain: IovaDomain, step: dict[str, Any]) -> int:
    """alloc_iova_fast through the batch call, which answers 0 instead of raising."""
    sizes, pfns = memoryview(bytearray(8)).cast("Q"), memoryview(bytearray(8)).cast("Q")
    sizes[0] = step["len"]
    domain.alloc_batch(sizes, step["limit"], pfns, flush_rcache=bool(step["flush"]), cpu=step["cpu"])
    return pfns[0]


ALLOCATIONS = {"mixed32_then_64": 409, "rcache_depot": 2100, "small_space_exhaustion": 518, "reserve_overlaps": 122}


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_every_recorded_answer_of_the_kernel_is_reproduced(name: str) -> None:
    lines = steps(name)
    head = next(lines)
    ledger = Ledger(head["cpus"])
    domain = IovaDomain(granule=head["granule"], start_pfn=head["start_pfn"], cpus=head["cpus"], ledger=ledger)
    allocations = failures = states = 0
    for step in lines:
        if step["op"] == "alloc":
            assert allocate(domain, step) == step["pfn"], step
            allocations += 1
            failures += step["pfn"] == 0
        elif step["op"] == "free":
            domain.free_fast(step["pfn"], step["len"], cpu=step["cpu"])
        elif step["op"] == "reserve":
            domain.reserve(step["lo"], step["hi"])
            assert "tree" not in step or [list(pair) for pair in domain.nodes()] == step["tree"]
        else:
            assert domain.node_count + 1 == step["nodes"]  # the kernel's tree counts the anchor
            assert sum(domain.depot_sizes()) == step["depot_mags"]
            assert domain.max32_alloc_size == step["max32_alloc_size"]
            states += 1
    counts = ledger.snapshot()
    assert counts["iova_magazine"] + counts["iova_depot"] + counts["iova_tree"] == allocations - failures
    assert counts["iova_failed"] == failures
    assert (allocations, states > 0) == (ALLOCATIONS[name], True)


def test_the_golden_file_has_3149_allocations() -> None:
    assert sum(ALLOCATIONS.values()) == 3149
