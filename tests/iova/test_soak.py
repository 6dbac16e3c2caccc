"""One long life of a domain: bursts on three CPUs, exact against the model, every path taken."""

from __future__ import annotations

from random import Random

import pytest
from tests.iova.model import ORDERS, HighestFitModel, LinuxModel
from tests.iova.support import LIMIT32, LIMIT64, alloc, check_tree

from dmakit.iova.domain import IovaDomain

MODELS = {"linux": LinuxModel, "augmented": HighestFitModel}
SIZES = (1, 1, 1, 2, 3, 4, 8, 16, 32, 33, 40, 64, 100, 513)
LIMITS = (LIMIT32, LIMIT32, LIMIT32, LIMIT64, LIMIT64, 1000, 3000, 3000)


class Soak:
    """Domain and model side by side; a burst is some hundred allocations or frees of one kind."""

    def __init__(self, policy: str, seed: int) -> None:
        self.random = Random(seed)
        self.domain = IovaDomain(cpus=3, policy=policy)
        self.model = MODELS[policy](1, 3)
        self.live: list[tuple[int, int]] = []
        self.steps = 0
        self.domain.reserve(0xFEE00, 0xFEEFF)
        self.model.reserve(0xFEE00, 0xFEEFF)

    def allocate(self, count: int) -> None:
        size, limit = self.random.choice(SIZES), self.random.choice(LIMITS)
        cpu, flush = self.random.randrange(3), self.random.random() < 0.5
        for _ in range(count):
            pfn = self.model.alloc_fast(cpu, size, limit, flush)
            assert alloc(self.domain, size, limit, flush, cpu) == pfn
            self.steps += 1
            if not pfn:
                break
            self.live.append((pfn, size))

    def release(self, count: int) -> None:
        cpu = self.random.randrange(3)
        if self.random.random() < 0.5:
            self.random.shuffle(self.live)
        for pfn, size in self.live[-count:]:
            self.domain.free_fast(pfn, size, cpu=cpu)
            self.model.free_fast(cpu, pfn, size)
            self.steps += 1
        del self.live[-count:]

    def run(self, steps: int) -> None:
        while self.steps < steps:
            action = self.allocate if len(self.live) < self.random.randrange(3000) else self.release
            action(self.random.choice((3, 50, 300, 900)))
            if self.random.random() < 0.2:
                order = self.random.randrange(ORDERS)
                assert self.domain.depot_work(order) == self.model.depot_work(order)
            assert self.domain.nodes() == self.model.ranges()
            assert self.domain.depot_sizes() == [len(depot) for depot in self.model.depot]

    def finish(self) -> None:
        check_tree(self.domain)
        counts = self.domain.ledger.snapshot()
        assert {path: counts[f"iova_{path}"] for path in self.model.paths} == self.model.paths
        assert min(self.model.paths.values()) > 0
        for pfn, size in self.live:
            self.domain.free_fast(pfn, size)
        self.domain.flush_rcaches()
        assert self.domain.nodes() == [(0xFEE00, 0xFEEFF)]


@pytest.mark.parametrize("policy", MODELS)
def test_a_long_life_takes_every_path(policy: str) -> None:
    soak = Soak(policy, seed=7)
    soak.run(6_000)
    soak.finish()


@pytest.mark.long
@pytest.mark.parametrize("policy", MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_a_life_of_100000_steps(policy: str, seed: int) -> None:
    soak = Soak(policy, seed)
    soak.run(100_000)
    soak.finish()
