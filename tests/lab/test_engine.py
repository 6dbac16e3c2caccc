"""The engine against a plain model: the same calls in the same order, counted, explained and checked the same."""

from __future__ import annotations

import gc
import tracemalloc
from array import array
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.lab.scalar import Scalar

from dmakit.errors import MisuseError
from dmakit.lab.compare import StrategyResult, _run
from dmakit.lab.engine import MOST_EVENTS, Engine
from dmakit.lab.flight import Columns
from dmakit.lab.options import Options
from dmakit.lab.pattern import Pattern
from dmakit.lab.payload import DataPath
from dmakit.lab.request_table import IoRequest, Layout, Requests
from dmakit.lab.rig import Rig
from dmakit.lab.schedule import COMPLETE, SUBMIT, ListedSchedule, QueueSchedule, SplitSchedule, stretches
from dmakit.lab.sources import FioSource
from dmakit.lab.strategies import STRATEGIES
from dmakit.lab.workload import FioSpec, Workload, overlapping
from dmakit.ledger import ROWS
from dmakit.platform.soft import Machine

KIB = 1024
SIZES = (512, 4 * KIB, 8 * KIB, 20 * KIB, 64 * KIB, 132 * KIB)
specs = st.builds(
    FioSpec,
    block_sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=3, unique=True).map(tuple),
    iodepth=st.integers(1, 5),
    jobs=st.integers(1, 2),
    requests=st.integers(1, 24),
    read_share=st.sampled_from((0.0, 0.5, 1.0)),
    fragmentation=st.sampled_from((0.0, 0.5, 1.0)),
    offset=st.sampled_from((0, 0, 512, 1028)),
    seed=st.integers(0, 99),
) | st.builds(
    FioSpec,
    block_sizes=st.sampled_from(((8 * KIB,), (20 * KIB, 4 * KIB))),
    iodepth=st.integers(1, 3),
    requests=st.integers(1, 12),
    read_share=st.just(0.5),
    piece=st.sampled_from((512, 2048)),
)
options = st.sampled_from(
    [
        Options(),
        Options(mode="strict"),
        Options(mode="passthrough"),
        Options(iommu="x86", policy="augmented"),
        Options(iommu="none"),
        Options(untrusted=True),
        Options(coherent=False),
        Options(sgl=False),
        Options(sgl=False, mode="strict"),
        Options(p2p="bus"),
        Options(p2p="bridge"),
        Options(checker=True),
        Options(mask_bits=24),
        Options(mask_bits=32, iommu="none", coherent=False),
        Options(defects=("6.17",)),
    ]
).map(Options.check)


class Overlapped(FioSource):
    """A job whose buffers lie partly in one another: requests in flight share pages."""

    def place(self, machine: Machine) -> Workload:
        whole = super().place(machine)
        layouts = whole.requests.layouts
        least = min(phys for layout in layouts for phys, _ in layout.segments)
        there = [Layout.of(tuple((least + (phys - least) % 65536, n) for phys, n in x.segments)) for x in layouts]
        whole.requests = whole.requests.replaced(there)
        return whole


def spoil(rig: Rig, at: int, which: int) -> None:
    """At a time (ns), a byte of a buffer changes, or what lies in a page of descriptor lists."""

    def flip() -> None:
        layouts = rig.workload.requests.layouts
        phys, size = layouts[which % len(layouts)].segments[0]
        memory = rig.machine.memory
        memory.write(phys + which % size, bytes((memory.read(phys + which % size, 1)[0] ^ 0x55,)))
        for pool in (rig.mapper.small, rig.mapper.large) if which % 3 == 0 else ():
            for page in pool.pages:
                page.words[:] = memoryview(array("Q", [0x7000_0000_0000 + which % 2] * 512))

    rig.machine.clock.call_later(at, flip)


def made(spec: FioSpec, given: Options, name: str, shared: bool, fail: int, spoiled: list[tuple[int, int]]) -> Rig:
    source = (Overlapped if shared else FioSource)("drawn", spec)
    rig = Rig(source, given, identity=STRATEGIES[name].identity)
    rig.machine.record_events([])
    for at, which in spoiled:
        spoil(rig, at, which)
    if fail >= 0:
        rig.machine.fail.arm(fail)
    return rig


def outcome(rig: Rig, result: Any, log: Any) -> dict[str, Any]:
    names = ("requests", "size", "wrong", "failed", "faults", "setup", "submission", "completion")
    told: dict[str, Any] = {name: getattr(result, name) for name in names}
    locks = np.asarray(rig.ledger.locks).tolist()
    return {**told, "log": log, "locks": locks, "events": rig.machine.events, "now": rig.machine.clock.now}


def by_engine(rig: Rig, name: str) -> dict[str, Any]:
    result = StrategyResult(name)
    _run(rig, STRATEGIES[name], result, None)
    log = [(number, result.paths.paths[path], reason) for number, (path, reason) in result.paths.requests.items()]
    return {**outcome(rig, result, log), "ledger": result.ledger}


def by_scalar(rig: Rig, name: str) -> dict[str, Any]:
    largest = max(layout.size for layout in rig.workload.requests.layouts)
    pattern = Pattern(largest, rig.options.seed)
    scalar = Scalar(rig, name, lambda number, size: bytes(pattern.of(number, size)))
    scalar.run()
    return {**outcome(rig, scalar, scalar.log), "ledger": scalar.counted}


def told_by(run: Any, rig: Rig, name: str) -> dict[str, Any] | str:
    try:
        found: dict[str, Any] = run(rig, name)
        return found
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        rig.close()


@settings(max_examples=120)
@given(
    specs,
    options,
    st.sampled_from(sorted(STRATEGIES)),
    st.booleans(),
    st.just(-1) | st.integers(0, 60),
    st.lists(st.tuples(st.integers(0, 300_000), st.integers(0, 1 << 16)), max_size=3),
)
def test_by_stretches_is_one_by_one(
    spec: FioSpec, given: Options, name: str, shared: bool, fail: int, spoiled: list[tuple[int, int]]
) -> None:
    """Ledger, locks, events (so IOVAs), paths, wrong bytes, faults and failures, under any option and any failure."""
    if given.untrusted and STRATEGIES[name].identity:
        return
    one, two = (told_by(run, made(spec, given, name, shared, fail, spoiled), name) for run in (by_engine, by_scalar))
    assert one == two


def test_what_is_spoiled_is_seen() -> None:
    """The test above would show it: bytes that change and lists that are overwritten are counted, in both forms."""
    spec = FioSpec(block_sizes=(64 * KIB,), iodepth=4, requests=20, read_share=0.5)
    spoiled = [(55_000, 3 * 700), (105_000, 3 * 701), (155_000, 100)]
    found = by_engine(made(spec, Options(), "page", False, -1, spoiled), "page")
    assert found["faults"] > 0 and found["wrong"] > 64 * KIB
    assert found == by_scalar(made(spec, Options(), "page", False, -1, spoiled), "page")


@pytest.mark.parametrize("most", [1, 2, 7, 4096])
@pytest.mark.parametrize(("count", "depth"), [(1, 1), (5, 8), (20, 3), (9, 9), (8, 1)])
def test_a_schedule_by_stretches_is_the_schedule(count: int, depth: int, most: int) -> None:
    def flat(schedule: Any, requests: Requests) -> list[tuple[int, int]]:
        found = list(stretches(schedule, requests, most))
        assert all(0 < len(kinds) == len(positions) <= most for kinds, positions in found)
        return [(int(k), int(p)) for kinds, positions in found for k, p in zip(kinds, positions, strict=True)]

    one = Layout.of(((0x1000, 4096),))
    queue = QueueSchedule(count, depth)
    requests = Requests(IoRequest(number, "read", one) for number in range(count))
    numbered = Requests(IoRequest(3 * number + 1, "read", one) for number in range(count))
    listed = ListedSchedule((kind, 3 * number + 1) for kind, number in queue)
    assert flat(queue, requests) == list(queue) == flat(listed, numbered) == flat(list(listed), numbered)
    parts, first = numbered.cut([[one, one]])
    split = SplitSchedule(listed, numbered, first)
    assert flat(split, parts) == list(split) == [(k, 2 * n + i) for k, n in queue for i in range(2)]


def test_cut_requests_keep_everything_but_their_memory() -> None:
    one, two, half = (Layout.of(((phys, 8192),)) for phys in (0x10000, 0x20000, 0x30000))
    whole = Requests(
        IoRequest(n, "read" if n % 2 else "write", (one, two)[n % 3 == 0], n % 5, n % 7, "ab"[n % 2]) for n in range(50)
    )
    parts, first = whole.cut([[half, one], [two]])
    expected = [(request, part) for request in whole for part in ([half, one] if request.layout == two else [two])]
    assert [r.layout for r in parts] == [part for _, part in expected]
    assert [(r.op, r.cpu, r.complete_cpu, r.phase) for r in parts] == [
        (w.op, w.cpu, w.complete_cpu, w.phase) for w, _ in expected
    ]
    assert [first[i + 1] - first[i] for i in range(50)] == [2 if r.layout == two else 1 for r in whole]


def an_engine(text: FioSpec) -> tuple[Engine, Rig]:
    rig = Rig(FioSource("engine", text), Options())
    columns = Columns(rig.workload.requests, None, 1)
    largest = max(layout.size for layout in rig.workload.requests.layouts)
    data = DataPath(rig.device, None, columns, Pattern(largest))
    return Engine(rig, STRATEGIES["page"](rig), columns, data), rig


def test_a_call_ends_after_32_mib_so_that_progress_shows() -> None:
    engine, rig = an_engine(FioSpec(block_sizes=(4096 * KIB,), iodepth=2, requests=20, fragmentation=0))
    ((kinds, positions),) = stretches(rig.workload.schedule, rig.workload.requests, MOST_EVENTS)
    done = engine.run(kinds, positions)
    assert done < len(kinds) and engine.size == 32 << 20
    while done < len(kinds):
        done += engine.run(kinds, positions, done)
    assert (done, engine.requests, engine.wrong) == (40, 20, 0)


@pytest.mark.parametrize(
    ("kinds", "positions", "message"),
    [
        (b"\0", [4], "position 4: there are 4 requests"),
        (b"\0\0", [1], "stretch of 2, 1 events from 0: as many kinds as positions, at most 4096"),
        (bytes(4097), [0] * 4097, "stretch of 4097, 4097 events from 0: as many kinds as positions, at most 4096"),
    ],
)
def test_a_stretch_that_is_none_is_refused(kinds: bytes, positions: list[int], message: str) -> None:
    engine, _ = an_engine(FioSpec(requests=4))
    with pytest.raises(MisuseError, match=f"^{message}$"):
        engine.run(kinds, array("Q", positions))


def test_a_request_in_flight_is_not_submitted_again() -> None:
    engine, _ = an_engine(FioSpec(requests=4))
    with pytest.raises(MisuseError, match="^request at position 2: is in flight already$"):
        engine.run(b"\0\0\0", array("Q", [2, 3, 2]))
    assert engine.run(b"\1\1\0\1\1", array("Q", [3, 2, 2, 2, 2])) == 5, "again when it has ended; none has no end"
    assert (engine.requests, engine.wrong, engine.failed) == (3, 0, 0)


def test_a_run_makes_no_object_for_a_request() -> None:
    """What a stretch leaves behind: nothing, once as many are in flight as ever will be."""
    engine, rig = an_engine(FioSpec(iodepth=8, requests=6_000, read_share=0.5))
    some = list(stretches(rig.workload.schedule, rig.workload.requests, MOST_EVENTS))
    engine.run(*some[0])
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    engine.run(*some[1])
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert engine.requests > 4_000 and grown < 4096 * 4


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=8), st.data())
def test_requests_that_share_are_found_in_any_order_of_completion(pages: list[tuple[int, int]], data: Any) -> None:
    layouts = [Layout.of(((4096 * page, 4096 * count),)) for page, count in pages]
    requests = Requests(IoRequest(5 * n, "read", layout) for n, layout in enumerate(layouts))
    waiting, inflight, events, expected = list(range(len(pages))), set[int](), [], set[int]()
    while waiting or inflight:
        if waiting and (not inflight or data.draw(st.booleans())):
            new = waiting.pop(0)
            mine = set(range(pages[new][0], sum(pages[new])))
            for other in inflight:
                if mine & set(range(pages[other][0], sum(pages[other]))):
                    expected |= {5 * new, 5 * other}
            inflight.add(new)
            events.append((SUBMIT, 5 * new))
        else:
            old = data.draw(st.sampled_from(sorted(inflight)))
            inflight.remove(old)
            events.append((COMPLETE, 5 * old))
    assert overlapping(Workload("x", requests, events)) == expected


def test_an_end_without_a_beginning_ends_nothing() -> None:
    """As in the engine: what is not in flight gives back no memory."""
    requests = Requests(IoRequest(n, "write", Layout.of(((0x1000, 4096),))) for n in range(2))
    events = [(COMPLETE, 0), (SUBMIT, 1), (COMPLETE, 1), (COMPLETE, 1), (SUBMIT, 0), (COMPLETE, 0)]
    assert overlapping(Workload("x", requests, events)) == set()


def test_the_rows_of_both_phases_are_all_rows() -> None:
    found = by_engine(made(FioSpec(requests=3), Options(), "page", False, -1, []), "page")
    assert set(found["submission"]) == set(found["completion"]) == {row.name for row in ROWS}
