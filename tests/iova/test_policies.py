"""Both policies under random use: exact against a model of lists, and against the plain truth of intervals."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.iova.model import ORDERS, HighestFitModel, LinuxModel
from tests.iova.support import LIMIT32, LIMIT64, alloc, check_tree

from dmakit.iova.domain import IovaDomain

CPUS = 2
SIZES = st.one_of(st.sampled_from([1, 1, 2, 3, 4, 8, 16, 31, 32, 33]), st.integers(1, 200))
LIMITS = st.sampled_from([63, 500, 700, 5000, LIMIT32, LIMIT32 + 1, LIMIT32 + 300, LIMIT64])
CPU = st.integers(0, CPUS - 1)


class ExactAddresses(RuleBasedStateMachine):
    """Every address, cached range, depot and tree node equals the model's, and so do the counts of paths."""

    policy = "linux"
    model_class: type[LinuxModel] = LinuxModel

    @initialize(start=st.sampled_from([1, 16, 300]))
    def begin(self, start: int) -> None:
        self.domain = IovaDomain(start_pfn=start, cpus=CPUS, policy=self.policy)
        self.model = self.model_class(start, CPUS)
        self.live: list[tuple[int, int]] = []

    @rule(size=SIZES, limit=LIMITS, flush=st.booleans(), cpu=CPU, count=st.sampled_from([1, 1, 1, 5, 40, 300]))
    def allocate(self, size: int, limit: int, flush: bool, cpu: int, count: int) -> None:
        if cpu not in self.model.online:
            return
        for _ in range(count):
            pfn = self.model.alloc_fast(cpu, size, limit, flush)
            assert alloc(self.domain, size, limit, flush, cpu) == pfn
            if not pfn:
                return
            self.live.append((pfn, size))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), cpu=CPU, count=st.sampled_from([1, 1, 5, 40, 400]))
    def release(self, data: st.DataObject, cpu: int, count: int) -> None:
        if cpu not in self.model.online:
            return
        at = data.draw(st.integers(0, len(self.live) - 1))
        for pfn, size in self.live[at : at + count]:
            self.domain.free_fast(pfn, size, cpu=cpu)
            self.model.free_fast(cpu, pfn, size)
        del self.live[at : at + count]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release_node(self, data: st.DataObject) -> None:
        pfn, _ = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.domain.free(pfn)
        self.model.free(pfn)

    @rule(
        size=st.sampled_from([1, 2, 32]),
        count=st.integers(1, 700),
        keep=st.integers(0, 40),
        cpu=CPU,
        seed=st.integers(),
    )
    def churn(self, size: int, count: int, keep: int, cpu: int, seed: int) -> None:
        """Fill magazines and depots: allocate on one CPU, free most of it, in any order, on another."""
        other = CPUS - 1 - cpu
        if {cpu, other} - self.model.online:
            return
        before = len(self.live)
        self.allocate(size, LIMIT32, False, cpu, count)
        fresh = self.live[before:]
        Random(seed).shuffle(fresh)
        self.live[before:] = fresh[:keep]
        for pfn, length in fresh[keep:]:
            self.domain.free_fast(pfn, length, cpu=other)
            self.model.free_fast(other, pfn, length)

    @precondition(lambda self: not self.live)
    @rule(lo=st.sampled_from([0, 5, 40, 600, LIMIT32 - 5]), length=st.integers(1, 40))
    def reserve(self, lo: int, length: int) -> None:
        self.domain.reserve(lo, lo + length - 1)
        self.model.reserve(lo, lo + length - 1)

    @rule(order=st.integers(0, ORDERS - 1))
    def depot_work(self, order: int) -> None:
        assert self.domain.depot_work(order) == self.model.depot_work(order)

    @rule(online=st.booleans())
    def hotplug(self, online: bool) -> None:
        self.domain.set_online(1, online)
        if online:
            self.model.online.add(1)
        elif 1 in self.model.online:
            self.model.online.remove(1)
            self.model.drain_cpu(1)

    @invariant()
    def same_state(self) -> None:
        assert self.domain.nodes() == self.model.ranges()
        assert self.domain.depot_sizes() == [len(depot) for depot in self.model.depot]
        for cpu in range(CPUS):
            for order in range(ORDERS):
                pair = (self.model.loaded[cpu][order], self.model.prev[cpu][order])
                assert self.domain.magazines(cpu, order) == pair
        counts = self.domain.ledger.snapshot()
        assert {path: counts[f"iova_{path}"] for path in self.model.paths} == self.model.paths
        check_tree(self.domain)

    @invariant()
    def same_watermark(self) -> None:
        if self.policy == "linux":
            assert self.domain.max32_alloc_size == self.model.max32


class ExactHighestFit(ExactAddresses):
    """The same for policy ``augmented``: the highest place that fits."""

    policy = "augmented"
    model_class = HighestFitModel


class IntervalTruth(RuleBasedStateMachine):
    """What a caller may rely on, whatever the policy: aligned, in bounds, never twice; a free space is found again."""

    policy = "linux"

    @initialize(start=st.integers(1, 40))
    def begin(self, start: int) -> None:
        self.start = start
        self.domain = IovaDomain(start_pfn=start, cpus=CPUS, policy=self.policy)
        self.reserved = set(range(200, 230))
        self.domain.reserve(200, 229)
        self.live: dict[int, int] = {}

    @rule(sizes=st.lists(st.integers(1, 90), min_size=1), limit=st.integers(10, 2000), cpu=CPU, flush=st.booleans())
    def allocate(self, sizes: list[int], limit: int, cpu: int, flush: bool) -> None:
        for size in sizes:
            pfn = alloc(self.domain, size, limit, flush, cpu)
            if pfn:
                self.accept(pfn, size, limit)

    def accept(self, pfn: int, size: int, limit: int) -> None:
        assert self.start <= pfn
        assert pfn + size - 1 <= limit
        assert pfn % (1 << (size - 1).bit_length()) == 0
        taken = {p for first, length in self.live.items() for p in range(first, first + length)}
        assert not (taken | self.reserved) & set(range(pfn, pfn + size))
        self.live[pfn] = size

    @precondition(lambda self: self.live)
    @rule(data=st.data(), cpu=CPU, count=st.sampled_from([1, 5, 60]))
    def release(self, data: st.DataObject, cpu: int, count: int) -> None:
        at = data.draw(st.integers(0, len(self.live) - 1))
        for pfn in sorted(self.live)[at : at + count]:
            self.domain.free_fast(pfn, self.live.pop(pfn), cpu=cpu)

    @rule()
    def drain(self) -> None:
        self.domain.flush_rcaches()
        assert self.domain.cached_pfns() == []

    def teardown(self) -> None:
        for pfn, size in self.live.items():
            self.domain.free_fast(pfn, size)
        self.domain.flush_rcaches()
        assert self.domain.nodes() == [(200, 229)]


class IntervalTruthAugmented(IntervalTruth):
    """As IntervalTruth; also, its gap sizes are right, and it fails only when nothing fits."""

    policy = "augmented"

    @rule(size=st.integers(1, 90), limit=st.integers(10, 1000))
    def fails_only_without_room(self, size: int, limit: int) -> None:
        rounded = 1 << (size - 1).bit_length() if size < 32 else size
        align = 1 << (size - 1).bit_length()
        pfn = alloc(self.domain, size, limit)  # it may flush the magazines, so the tree is looked at afterwards
        if pfn:
            self.accept(pfn, size, limit)
            return
        used = {p for lo, hi in self.domain.nodes() for p in range(lo, hi + 1)}
        for first in range(0, limit + 2 - rounded, align):
            assert first < self.start or used & set(range(first, first + rounded))

    @invariant()
    def gap_sizes(self) -> None:
        check_tree(self.domain, fits=self.domain.node_count < 12)


MACHINES = (ExactAddresses, ExactHighestFit, IntervalTruth, IntervalTruthAugmented)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.__name__)
def test_random_use(machine: type[RuleBasedStateMachine]) -> None:
    short = settings(max_examples=25, stateful_step_count=30)
    run_state_machine_as_test(machine, settings=short)


@pytest.mark.long
@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.__name__)
def test_random_use_at_length(machine: type[RuleBasedStateMachine]) -> None:
    # The exact models compare the whole state after each step; the interval truths run the full 10^5 steps.
    examples = 200 if machine.__name__.startswith("Exact") else 1000
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=100))
