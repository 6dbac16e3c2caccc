"""Operations of a program: IOVA spaces of their own, with and without locks, and a flush queue driven directly."""

from __future__ import annotations

from array import array
from typing import Any

from dmakit.iova.domain import IovaDomain
from dmakit.iova.flush_queue import CallbackTarget, FlushQueue
from dmakit.iova.shared import SharedDomain
from dmakit.ledger import Ledger
from tests.pair.held import Held

LOCKED_CPUS = 3


class Spaces(Held):
    """``iovad`` has two CPUs and is used plainly; ``locked`` has three, behind its locks."""

    def set_up(self, config: int) -> None:
        super().set_up(config)
        policy = "linux" if config & 1 else "augmented"
        fail, clock = self.machine.fail, self.machine.clock
        self.plain = IovaDomain(cpus=LOCKED_CPUS, policy=policy, ledger=Ledger(LOCKED_CPUS), fail=fail, clock=clock)
        self.locked = SharedDomain(self.plain)
        self.held: list[tuple[int, int]] = []
        self.flushed: list[tuple[str, int]] = []
        target = CallbackTarget(
            lambda cause: self.flushed.append(("flush", cause)), lambda head: self.flushed.append(("tables", head))
        )
        self.queue = FlushQueue(self.iovad, target, cpus=2, single=config % 3 == 2, clock=clock, ledger=Ledger(2))

    def iova_alloc(self, a: int, b: int, c: int, d: int) -> Any:
        size = a if d % 7 == 0 else 1 + a % 70
        pfn = self.iovad.alloc_fast(size, b if d % 5 == 0 else 0xFFFFF, bool(c & 1), c % 3)
        self.ranges.append((pfn, size))
        return pfn

    def iova_free(self, a: int, b: int, c: int, d: int) -> Any:
        pfn, size = self.pick(self.ranges, a) or (b, c)
        return self.iovad.free_fast(pfn, size, d % 2 if d % 7 else d)

    def iova_batch(self, a: int, b: int, c: int, d: int) -> Any:
        sizes = array("Q", [1 + (a + i * b) % 40 for i in range(c % 300)])
        pfns = array("Q", bytes(8 * len(sizes)))
        done = self.iovad.alloc_batch(sizes, 0xFFFFF if d % 3 else 300, pfns, bool(d & 1), d % 3)
        got = pfns.tolist()
        if a % 5 == 4:
            self.ranges += [pair for pair in zip(got, sizes.tolist(), strict=True) if pair[0]]
        else:
            self.iovad.free_batch(pfns, sizes, d % 2)
        return done, got

    def reserve(self, a: int, b: int, c: int, d: int) -> Any:
        return self.iovad.reserve(a % 0x1000 + 0xFE000, b % 0x2000 + 0xFE000), self.iovad.node_count

    def magazines(self, a: int, b: int, c: int, d: int) -> Any:
        space = self.iovad if d % 2 else self.plain
        if c % 4 == 0:
            return space.flush_rcaches(cpu=a % 3)
        if c % 4 == 1:
            return space.set_online(a % 4, bool(b & 1)), space.online_cpus
        if c % 4 == 2:
            return space.depot_work(a % 7), space.depot_sizes()
        return space.magazines(a % 3, b % 7), space.max32_alloc_size

    # Behind locks --------------------------------------------------------------------------------------------------

    def locked_alloc(self, a: int, b: int, c: int, d: int) -> Any:
        size = a if d % 7 == 0 else 1 + a % 70
        pfn = self.locked.alloc_fast(size, b if d % 5 == 0 else 0xFFFFF, bool(c & 1), c % (LOCKED_CPUS + 1))
        self.held.append((pfn, size))
        return pfn

    def locked_free(self, a: int, b: int, c: int, d: int) -> Any:
        pfn, size = self.pick(self.held, a) or (b, c)
        return self.locked.free_fast(pfn, size, d % LOCKED_CPUS)

    def locked_batch(self, a: int, b: int, c: int, d: int) -> Any:
        sizes = array("Q", [1 + (a + i * b) % 33 for i in range(c % 300)])
        pfns = array("Q", bytes(8 * len(sizes)))
        done = self.locked.alloc_batch(sizes, 0xFFFFF if d % 3 else 300, pfns, bool(d & 1), d % LOCKED_CPUS)
        got = pfns.tolist()
        if a % 5 == 4:
            self.held += [pair for pair in zip(got, sizes.tolist(), strict=True) if pair[0]]
        else:
            self.locked.free_batch(pfns, sizes, a % LOCKED_CPUS)
        return done, got

    def settle(self, a: int, b: int, c: int, d: int) -> Any:
        return self.locked.settle(), self.plain.ledger.snapshot()

    # The flush queue -------------------------------------------------------------------------------------------------

    def defer(self, a: int, b: int, c: int, d: int) -> Any:
        count = 1 + a % 40 if d % 3 == 0 else 1
        for _ in range(count):
            pfn, size = self.pick(self.ranges, b) or (b, c)
            self.queue.queue(pfn, size, (a % 5 == 4) * (c & 0xFFFF) << 12, d % 3 if d % 2 else d % 2)
        return [self.queue.entries(cpu) for cpu in range(2)], self.queue.start_cnt, self.queue.finish_cnt

    def flush_queue(self, a: int, b: int, c: int, d: int) -> Any:
        if d % 3 == 0:
            return self.queue.timeout(cpu=None if a % 3 == 0 else a % 3)
        if d % 3 == 1:
            return self.queue.flush(cpu=a % 3)
        return self.queue.waiting()

    def spaces_end(self) -> dict[str, Any]:
        """What is left to see of them."""
        self.locked.settle()
        found: dict[str, Any] = {"flushed": self.flushed, "queue": self.queue.waiting()}
        for name, space in (("iovad", self.iovad), ("plain", self.plain), ("queue's ledger", self.queue)):
            found[f"{name} ledger"] = space.ledger.snapshot(), space.ledger.lock_counts()
        for name, space in (("iovad", self.iovad), ("plain", self.plain)):
            pairs = [space.magazines(cpu, order) for cpu in range(space.cpus) for order in range(6)]
            found[name] = space.nodes(), space.cached_pfns(), space.depot_sizes(), pairs
        return found
