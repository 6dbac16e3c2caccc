"""Finding and freeing in O(log n) under ``augmented``: nodes that are touched, counted, not time.

Allocations are counted by the ledger (tests/scale). For the others the tree's arrays are watched: a node counts once
for an operation, however many of its words are read or written. Watching needs the interpreted form; in either form the
depth of the tree bounds the path that a look-up, a free and the unmap that frees follow.
"""

from __future__ import annotations

import random
from array import array
from math import log2
from typing import Any

import pytest

from dmakit import _core
from dmakit.dma.direction import Direction
from dmakit.iova.domain import IovaDomain
from dmakit.platform.soft import Machine

PAGE = 4096
ARRAYS = ("lo", "hi", "fit", "best", "left", "right", "parent", "height", "prev", "next")
SIZE = 33  # granules: beyond the magazines, so that each call reaches the tree
LIMIT = (1 << 36) - 1
DEEPEST = 1.4405  # of a balanced tree of n nodes: times log2(n + 2)
COMPILED = _core.status()["running"] == "compiled"
interpreted = pytest.mark.skipif(COMPILED, reason="compiled arrays are typed: nothing can watch them")


class Watched:
    """An array of a tree that notes which nodes are looked at."""

    def __init__(self, words: Any, seen: set[int]) -> None:
        self.words, self.seen = words, seen

    def __getitem__(self, node: int) -> int:
        self.seen.add(node)
        return int(self.words[node])

    def __setitem__(self, node: int, value: int) -> None:
        self.seen.add(node)
        self.words[node] = value

    def __len__(self) -> int:
        return len(self.words)


def filled(live: int) -> tuple[IovaDomain, list[int]]:
    """A space with ``live`` ranges, a third of those that were there freed again so that gaps are everywhere."""
    domain, count = IovaDomain(policy="augmented"), live * 3 // 2
    pfns = array("Q", bytes(8 * count))
    assert domain.alloc_batch(array("Q", [SIZE]) * count, LIMIT, pfns) == count
    random.Random(live).shuffle(pfns)
    domain.free_batch(pfns[live:], array("Q", [SIZE]) * (count - live))
    return domain, list(pfns[:live])


def watch(domain: IovaDomain) -> set[int]:
    """The nodes touched from now on."""
    seen: set[int] = set()
    tree: Any = domain.search.tree
    for name in ARRAYS:
        setattr(tree, name, Watched(getattr(tree, name), seen))
    return seen


@pytest.mark.parametrize("live", [1_000, 10_000, pytest.param(100_000, marks=() if COMPILED else pytest.mark.long)])
def test_no_path_is_longer_than_the_logarithm(live: int) -> None:
    domain, pfns = filled(live)
    tree = domain.search.tree
    deepest, level = 0, [tree.root]
    while level:
        deepest += 1
        level = [below for node in level for below in (tree.left[node], tree.right[node]) if below != 0]
    assert deepest <= DEEPEST * log2(tree.count + 2) + 1
    assert all(tree.find(pfn) == (pfn, pfn + SIZE - 1) for pfn in random.Random(1).sample(pfns, 100))


@interpreted
@pytest.mark.parametrize("live", [1_000, 10_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_nodes_touched_by_find_and_free(live: int) -> None:
    domain, pfns = filled(live)
    seen, path = watch(domain), DEEPEST * log2(live + 2) + 1
    tree = domain.search.tree
    found, freed = 0, 0
    for pfn in random.Random(2).sample(pfns, 300):
        seen.clear()
        tree.find(pfn)
        found = max(found, len(seen))
        seen.clear()
        domain.free(pfn) if pfn % 2 else domain.free_fast(pfn, SIZE)
        freed = max(freed, len(seen))
    assert 1 < found <= path
    assert found < freed <= 4 * path


@interpreted
@pytest.mark.parametrize("live", [1_000, 10_000])
def test_nodes_touched_by_an_unmap(live: int) -> None:
    machine = Machine(ram="256M", mode="strict", policy="augmented", swiotlb=0)
    device = machine.device("nvme0")
    addresses = [device.map_phys(PAGE, SIZE * PAGE, Direction.TO_DEVICE) for _ in range(live)]
    seen, most = watch(device.iovad), 0
    for addr in random.Random(3).sample(addresses, 200):
        seen.clear()
        device.unmap_phys(addr, SIZE * PAGE, Direction.TO_DEVICE)
        most = max(most, len(seen))
    assert 1 < most <= 4 * (DEEPEST * log2(live + 2) + 1)
