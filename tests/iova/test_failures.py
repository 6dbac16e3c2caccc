"""Fail-nth: node and magazine memory runs out at every use; nothing leaks, nothing is damaged."""

from __future__ import annotations

from array import array

import pytest
from tests.iova.support import LIMIT32, check_tree
from tests.support.sweep import sweep

from dmakit.errors import ExhaustedError
from dmakit.failpoint import FailPoint
from dmakit.iova.domain import IovaDomain
from dmakit.iova.flush_queue import FlushQueue, FlushTarget

POLICIES = pytest.mark.parametrize("policy", ["linux", "augmented"])


class World:
    """A domain with one live range of every kind and magazines that are nearly full."""

    def __init__(self, policy: str) -> None:
        self.fail = FailPoint()
        self.domain = IovaDomain(policy=policy, fail=self.fail)
        self.domain.reserve(0xFEE00, 0xFEEFF)
        self.live = {self.domain.alloc_fast(size, LIMIT32): size for size in (1, 4, 33)}
        spare = [self.domain.alloc_fast(2, LIMIT32) for _ in range(2 * 127 + 1)]
        self.live[spare.pop()] = 2
        for pfn in spare:
            self.domain.free_fast(pfn, 2)

    def check(self, failed: bool) -> None:
        """What is in the tree is live, cached or reserved; in the end only the reservation is left."""
        check_tree(self.domain)
        cached = {pfn for pfn, _ in self.domain.cached_pfns()}
        assert {lo for lo, _ in self.domain.nodes()} - {0xFEE00, 0x5000} == cached | set(self.live)
        assert not cached & set(self.live)
        pool = self.domain.rcaches.pool
        assert pool.allocated == 12 + sum(self.domain.depot_sizes())
        for pfn, size in self.live.items():
            self.domain.free_fast(pfn, size)
        self.domain.flush_rcaches()
        assert {lo for lo, _ in self.domain.nodes()} - {0x5000} == {0xFEE00}
        assert pool.allocated == 12


def allocate(world: World, flush: bool) -> None:
    pfn = world.domain.alloc_fast(64, LIMIT32, flush)
    world.live[pfn] = 64


def free_into_full_magazines(world: World) -> None:
    pfn = next(pfn for pfn, size in world.live.items() if size == 2)
    world.domain.free_fast(pfn, world.live.pop(pfn))


def batch(world: World) -> None:
    sizes, pfns = array("Q", [64, 64, 1]), array("Q", bytes(24))
    done = world.domain.alloc_batch(sizes, LIMIT32, pfns, flush_rcache=False)
    world.live |= {pfn: size for pfn, size in zip(pfns, sizes, strict=True) if pfn}
    if done < 3:
        raise ExhaustedError("one failed")


OPERATIONS = {
    "alloc": (lambda world: allocate(world, False), 1),
    "free": (free_into_full_magazines, 1),
    "reserve": (lambda world: world.domain.reserve(0x5000, 0x5010), 1),
    "batch": (batch, 3),
    "flush queue": (lambda world: FlushQueue(world.domain, FlushTarget()), 1),
}


@POLICIES
@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_leaks_when_memory_runs_out(policy: str, name: str) -> None:
    operation, uses = OPERATIONS[name]
    assert sweep(lambda: World(policy), lambda world: world.fail, operation, World.check) == uses


@POLICIES
def test_an_allocation_that_may_drain_the_magazines_survives_one_failure(policy: str) -> None:
    world = World(policy)
    world.fail.arm(0)
    allocate(world, True)
    assert world.fail.fired
    assert world.domain.cached_pfns() == []
    world.check(False)


@POLICIES
def test_a_free_without_memory_for_a_magazine_goes_to_the_tree(policy: str) -> None:
    world = World(policy)
    nodes = world.domain.node_count
    world.fail.arm(0)
    free_into_full_magazines(world)
    assert (world.domain.node_count, world.domain.depot_sizes()[1]) == (nodes - 1, 0)
    world.check(False)


@POLICIES
def test_a_domain_without_memory_for_its_magazines_is_refused(policy: str) -> None:
    for nth in range(2 * 2 * 6):
        fail = FailPoint()
        fail.arm(nth)
        with pytest.raises(ExhaustedError, match=r"^no memory for the 24 magazines of an IOVA domain with 2 CPUs$"):
            IovaDomain(cpus=2, policy=policy, fail=fail)
    fail = FailPoint()
    fail.arm(24)
    IovaDomain(cpus=2, policy=policy, fail=fail)
    assert not fail.fired
