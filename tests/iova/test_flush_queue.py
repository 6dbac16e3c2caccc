"""The flush queue: nothing that waits is reused before a flush that began later."""

from __future__ import annotations

import re

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
from tests.iova.support import LIMIT32, alloc

from dmakit.clock import MS, VirtualClock
from dmakit.consts import CAUSE_FQ_FULL, CAUSE_FQ_TIMER, CAUSE_OTHER
from dmakit.errors import ExhaustedError, MisuseError
from dmakit.failpoint import FailPoint
from dmakit.iova.domain import IovaDomain
from dmakit.iova.flush_queue import CallbackTarget, FlushQueue, FlushTarget


class World:
    """A domain with its flush queue; ``log`` holds flushes (cause) and freed table heads in order."""

    def __init__(self, cpus: int = 1, single: bool = False) -> None:
        self.clock = VirtualClock()
        self.domain = IovaDomain(cpus=cpus, clock=self.clock)
        self.log: list[tuple[str, int]] = []
        target = CallbackTarget(
            lambda cause: self.log.append(("flush", cause)), lambda head: self.log.append(("tables", head))
        )
        self.queue = FlushQueue(self.domain, target, cpus=cpus, single=single, clock=self.clock)

    def unmap(self, count: int, cpu: int = 0, size: int = 1) -> list[int]:
        """Allocate and queue ``count`` ranges."""
        pfns = [alloc(self.domain, size, cpu=cpu) for _ in range(count)]
        for pfn in pfns:
            self.queue.queue(pfn, size, cpu=cpu)
        return pfns

    def counts(self) -> dict[str, int]:
        return {name: n for name, n in self.domain.ledger.snapshot().items() if "fq" in name and n}


def test_a35_lazy_flushes_once_for_255_frees_or_after_10_ms() -> None:
    world = World()
    world.unmap(255)
    assert world.log == []
    assert world.queue.entries(0) == 255
    world.unmap(1)  # the ring is full: one flush of the domain frees the 255 before it
    assert world.log == [("flush", CAUSE_FQ_FULL)]
    assert world.queue.entries(0) == 1
    assert len(world.domain.cached_pfns()) == 255
    world.clock.advance(10 * MS - 1)
    assert len(world.log) == 1
    world.clock.advance(1)
    assert world.log == [("flush", CAUSE_FQ_FULL), ("flush", CAUSE_FQ_TIMER)]
    assert world.queue.entries(0) == 0
    assert world.counts() == {"lock_fq": 257, "fq_entries": 256, "fq_flushes_full": 1, "fq_flushes_timer": 1}


def test_a35_the_window_of_stale_access_is_at_most_10_ms() -> None:
    world = World()
    pfn = world.unmap(1)[0]
    world.clock.advance(10 * MS - 1)
    assert world.queue.waiting() == [(pfn, 1)]
    assert alloc(world.domain, 1) != pfn
    world.clock.advance(1)
    assert alloc(world.domain, 1) == pfn


def test_a35_the_single_queue_holds_32767_entries_for_1_s() -> None:
    world = World(cpus=2, single=True)
    pfns = [alloc(world.domain, 1) for _ in range(32768)]
    for i, pfn in enumerate(pfns[:32767]):
        world.queue.queue(pfn, 1, cpu=i & 1)
    assert world.queue.entries(0) == world.queue.entries(1) == 32767
    assert world.log == []
    world.queue.queue(pfns[-1], 1)
    assert world.log == [("flush", CAUSE_FQ_FULL)]
    world.clock.advance(1000 * MS - 1)
    assert len(world.log) == 1
    world.clock.advance(1)
    assert world.log[1:] == [("flush", CAUSE_FQ_TIMER)]
    assert world.queue.waiting() == []


def test_a_flush_for_one_cpu_covers_what_others_queued_before_it() -> None:
    world = World(cpus=2)
    world.unmap(3, cpu=1)
    world.unmap(256, cpu=0)
    assert (world.queue.entries(0), world.queue.entries(1)) == (1, 3)
    assert len(world.log) == 1
    world.domain.events = events = []
    pfn = world.unmap(1, cpu=1)[0]  # drops the three that the flush of CPU 0 has covered, without another flush
    assert world.queue.entries(1) == 1
    assert len(world.log) == 1
    assert events == [("af_out", 1, LIMIT32, pfn), *(("ff_in", LIMIT32 - i, 1) for i in range(3))]


def test_the_timer_is_armed_once_and_frees_on_the_cpu_that_armed_it() -> None:
    world = World(cpus=2)
    world.unmap(1, cpu=1)
    world.clock.advance(4 * MS)
    world.unmap(1, cpu=0)
    assert world.clock.pending() == 1
    world.clock.advance(6 * MS)
    assert world.counts()["fq_flushes_timer"] == 1
    assert len(world.domain.magazines(1, 0)[0]) == 2
    assert world.clock.pending() == 0
    world.unmap(1)
    assert world.clock.pending() == 1


def test_table_pages_wait_with_their_entry() -> None:
    world = World()
    world.queue.queue(alloc(world.domain, 1), 1, 0x7000)
    world.queue.queue(alloc(world.domain, 1), 1)
    world.queue.queue(alloc(world.domain, 1), 1, 0x9000)
    world.clock.advance(10 * MS)
    assert world.log == [("flush", CAUSE_FQ_TIMER), ("tables", 0x7000), ("tables", 0x9000)]
    world.queue.flush()
    assert world.log[3:] == [("flush", CAUSE_OTHER)]


def test_the_timer_leaves_its_event() -> None:
    world = World()
    events: list[tuple[object, ...]] = []
    world.domain.events = world.queue.events = events
    assert world.queue.events is events
    world.unmap(1)
    world.queue.timeout()
    assert events == [("af_out", 1, LIMIT32, LIMIT32), ("fqto_in",), ("ff_in", LIMIT32, 1)]
    assert world.clock.pending() == 0
    world.queue.events = None
    assert world.queue.events is None


def test_close_leaves_nothing_waiting_and_no_timer() -> None:
    world = World(cpus=2)
    world.unmap(5, cpu=1)
    world.queue.close()
    assert world.queue.waiting() == []
    assert world.clock.pending() == 0
    assert world.log == [("flush", CAUSE_OTHER)]
    world.queue.close()
    assert len(world.log) == 1


def test_without_a_clock_the_owner_runs_the_timer() -> None:
    domain = IovaDomain()
    queue = FlushQueue(domain, FlushTarget())
    queue.queue(alloc(domain, 1), 1, 0x5000)
    assert queue.timer_on
    queue.timeout(cpu=0)
    assert (queue.timer_on, queue.waiting(), queue.start_cnt, queue.finish_cnt) == (False, [], 1, 1)


def test_bad_arguments_are_named() -> None:
    world = World()
    for call, message in (
        (lambda: world.queue.queue(0, 1), f"pfn=0: must be from 1 to {(1 << 52) - 1}"),
        (lambda: world.queue.queue(5, 0), f"pages=0: must be from 1 to {(1 << 52) - 1}"),
        (lambda: world.queue.queue(5, 1, cpu=1), "cpu=1: must be from 0 to 0"),
        (lambda: world.queue.queue(5, 1, "x"), "freelist_head='x': must be an integer"),
        (lambda: world.queue.timeout(cpu=-1), "cpu=-1: must be from 0 to 0"),
        (lambda: FlushQueue(world.domain, FlushTarget(), cpus=2), "cpus=2: must be from 1 to 1"),
    ):
        with pytest.raises(MisuseError, match=f"^{re.escape(message)}$"):
            call()


def test_a_queue_without_memory_is_refused() -> None:
    fail = FailPoint()
    fail.arm(0)
    with pytest.raises(ExhaustedError, match=r"^no memory for 2 flush queue\(s\) of 256 entries$"):
        FlushQueue(IovaDomain(cpus=2), FlushTarget(), cpus=2, fail=fail)


class NothingReusedEarly(RuleBasedStateMachine):
    """A queued range stays allocated and uncached, and its tables unfreed, until a flush begun after it was queued."""

    @initialize(single=st.booleans())
    def begin(self, single: bool) -> None:
        self.world = World(cpus=2, single=single)
        self.world.domain.events = self.events = []
        self.log = self.world.log
        self.fresh: set[int] = set()  # pfns queued after the last flush; a table head is pfn << 12
        self.covered: set[int] = set()
        self.seen = 0

    @rule(cpu=st.integers(0, 1), count=st.sampled_from([1, 2, 30, 130, 260]), size=st.sampled_from([1, 8, 40]))
    def unmap(self, cpu: int, count: int, size: int) -> None:
        for _ in range(count):
            pfn = alloc(self.world.domain, size, LIMIT32, cpu=cpu)
            self.world.queue.queue(pfn, size, pfn << 12, cpu=cpu)
            self.account(queued=pfn)

    @rule(ms=st.integers(0, 1100))
    def wait(self, ms: int) -> None:
        self.world.clock.advance(ms * MS)
        self.account()

    @precondition(lambda self: self.fresh)
    @rule()
    def flush(self) -> None:
        self.world.queue.flush()
        self.account()
        assert not self.fresh and not self.covered

    def account(self, queued: int = 0) -> None:
        """Flushes and frees since the last look, against what was waiting."""
        flushed = False
        for kind, value in self.log[self.seen :]:
            if kind == "flush":
                self.covered |= self.fresh
                self.fresh = set()
                flushed = True
            else:
                assert value >> 12 in self.covered
        freed = [event[1] for event in self.events if event[0] == "ff_in"]
        assert len(set(freed)) == len(freed)
        assert set(freed) <= self.covered
        tables = [value >> 12 for kind, value in self.log[self.seen :] if kind == "tables"]
        assert tables == freed
        self.covered -= set(freed)
        assert flushed or not freed or not self.fresh & set(freed)
        self.seen = len(self.log)
        self.events.clear()
        if queued:
            self.fresh.add(queued)

    @invariant()
    def queue_holds_what_waits(self) -> None:
        waiting = [pfn for pfn, _ in self.world.queue.waiting()]
        assert set(waiting) == self.fresh | self.covered
        assert len(waiting) == len(set(waiting))
        assert not set(waiting) & {pfn for pfn, _ in self.world.domain.cached_pfns()}
        assert not waiting or self.world.clock.pending() > 0


def test_nothing_is_reused_early() -> None:
    short = settings(max_examples=20, stateful_step_count=20)
    run_state_machine_as_test(NothingReusedEarly, settings=short)


@pytest.mark.long
def test_nothing_is_reused_early_for_100000_steps() -> None:
    long = settings(max_examples=1000, stateful_step_count=100)
    run_state_machine_as_test(NothingReusedEarly, settings=long)
