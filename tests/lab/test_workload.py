"""Workloads: deterministic placement, segments as a bio would merge them, schedules that respect depth."""

from __future__ import annotations

import gc
import tracemalloc
from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmakit.errors import InputError
from dmakit.lab.profile import NOT_PRICED, PUBLISHED, cheaper, derived, modelled
from dmakit.lab.request_table import IoRequest, Layout, Requests
from dmakit.lab.schedule import COMPLETE, SUBMIT, QueueSchedule, SplitSchedule
from dmakit.lab.workload import FioSpec, Workload, merge_adjacent, overlapping
from dmakit.ledger import ROWS
from dmakit.memory.pages import PageAllocator
from dmakit.memory.physical import PhysicalMemory
from dmakit.units import KIB, MIB


def place(spec: FioSpec) -> Workload:
    memory = PhysicalMemory(1 << 30)
    memory.add_region(0, 1 << 30)
    return spec.place(PageAllocator(memory, 0, 1 << 30, seed=spec.seed, fragmentation=spec.fragmentation))


def test_the_same_spec_gives_the_same_requests() -> None:
    spec = FioSpec(block_sizes=(4 * KIB, 64 * KIB), iodepth=4, jobs=2, requests=100, read_share=0.5, seed=7)
    one, two = place(spec), place(spec)
    assert one.requests == two.requests
    assert one.schedule == two.schedule
    assert {r.op for r in one.requests} == {"read", "write"}
    assert {r.size for r in one.requests} == {4 * KIB, 64 * KIB}
    assert {r.cpu for r in one.requests} == {0, 1}


def test_fragmentation_decides_the_segments() -> None:
    scattered = place(FioSpec(block_sizes=(128 * KIB,), requests=4, fragmentation=1.0)).requests
    contiguous = place(FioSpec(block_sizes=(128 * KIB,), requests=4, fragmentation=0.0)).requests
    folios = place(FioSpec(block_sizes=(2 * MIB,), requests=2, fragmentation=1.0, folio_order=9)).requests
    assert {len(r.segments) for r in scattered} == {32}
    assert {len(r.segments) for r in contiguous} == {1}
    assert {len(r.segments) for r in folios} == {1}


def test_an_offset_starts_the_first_segment_inside_a_page() -> None:
    request = place(FioSpec(block_sizes=(64 * KIB,), requests=1, offset=512)).requests[0]
    assert request.segments[0][0] % 4096 == 512
    assert request.segments[0][1] == 3584
    assert request.segments[-1][1] == 512
    assert request.size == 64 * KIB


def test_merge_adjacent_joins_only_physical_neighbours() -> None:
    assert merge_adjacent([(0x1000, 0x1000), (0x2000, 0x1000), (0x5000, 0x1000)]) == (
        (0x1000, 0x2000),
        (0x5000, 0x1000),
    )


@pytest.mark.parametrize(("count", "depth"), [(1, 1), (5, 8), (20, 3)])
def test_schedules_never_exceed_the_depth_and_complete_everything(count: int, depth: int) -> None:
    inflight: set[int] = set()
    for kind, number in QueueSchedule(count, depth):
        if kind == SUBMIT:
            inflight.add(number)
            assert len(inflight) <= depth
        else:
            assert kind == COMPLETE
            inflight.remove(number)
    assert not inflight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iodepth": 0}, "iodepth=0: must be between 1 and 4096"),
        ({"block_sizes": (100,)}, r"block sizes \(100,\): each must be a multiple of 512 from 512 to 8M"),
        ({"offset": 2}, "offset=2: NVMe buffers start on a dword"),
        ({"fragmentation": 1.5}, "fragmentation=1.5: must be between 0 and 1"),
    ],
)
def test_a_bad_spec_names_value_and_rule(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        FioSpec(**change)  # type: ignore[arg-type]


def test_the_profile_prices_only_rows_that_exist_and_every_rate_has_a_source() -> None:
    rows = {row.name for row in ROWS} | set(derived({}))
    for rate in PUBLISHED.rates:
        assert set(rate.rows) <= rows
        assert rate.source and rate.low <= rate.high
    assert NOT_PRICED


def test_modelled_time_is_counts_times_rates() -> None:
    low, high = modelled({"domain_maps": 2, "domain_unmaps": 1, "inv_wait": 1})
    assert low == pytest.approx(2 * 53.5 + 68 + 1000)
    assert high == pytest.approx(2 * 55 + 87 + 1236)
    assert cheaper((1, 2), (2, 3)) and not cheaper((1, 4), (2, 3))


ONE, TWO = Layout.of(((0x1000, 4096),)), Layout.of(((0x1000, 4096), (0x9000, 512)), ((0x1000, 4608),))


@pytest.mark.parametrize("numbers", [range(4), (3, 4, 9, 5)])
def test_requests_kept_in_columns_come_out_as_they_went_in(numbers: Sequence[int]) -> None:
    given = [
        IoRequest(number, "read" if number % 2 else "write", (ONE, TWO)[n % 2], n, n + 1, "ab"[n % 2])
        for n, number in enumerate(numbers)
    ]
    kept = Requests(given)
    assert list(kept) == given and kept[-1] == given[-1] and kept[1:3] == given[1:3]
    assert [kept.numbered(number) for number in numbers] == given
    assert kept.layouts == [ONE, TWO] and kept.size == sum(request.size for request in given) == 2 * (4096 + 4608)
    assert kept == Requests(given) and kept != Requests(given[:3])
    for wrong in (-1, 77):
        with pytest.raises(KeyError):
            kept.numbered(wrong)
    moved = kept.replaced([TWO, ONE])
    assert [request.layout for request in moved] == [TWO, ONE, TWO, ONE]
    assert [request.number for request in moved] == list(numbers)


def test_a_schedule_of_cut_requests_names_every_part() -> None:
    whole = Requests([IoRequest(7, "read", ONE), IoRequest(8, "read", TWO)])
    schedule = SplitSchedule([(SUBMIT, 7), (SUBMIT, 8), (COMPLETE, 7), (COMPLETE, 8)], whole, array("Q", [0, 1, 3]))
    once = [(SUBMIT, 0), (SUBMIT, 1), (SUBMIT, 2), (COMPLETE, 0), (COMPLETE, 1), (COMPLETE, 2)]
    assert list(schedule) == list(schedule) == once


def test_a_workload_keeps_no_object_for_a_request() -> None:
    def held(count: int) -> int:
        spec = FioSpec(block_sizes=(4 * KIB, 8 * KIB), iodepth=4, requests=count)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        workload = place(spec)
        gc.collect()
        size = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert len(workload.requests) == count
        return size

    assert held(12_000) - held(2_000) < 10_000 * 16


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3)), min_size=1, max_size=3), min_size=1, max_size=12
    ),
    st.integers(1, 5),
)
def test_requests_that_share_a_page_in_flight_are_found(pages: list[list[tuple[int, int]]], depth: int) -> None:
    layouts = [Layout.of(tuple((4096 * page + 512, 4096 * count - 1024) for page, count in few)) for few in pages]
    requests = Requests(IoRequest(n, "read", layout) for n, layout in enumerate(layouts))
    schedule = QueueSchedule(len(requests), depth)
    inflight: dict[int, set[int]] = {}
    expected: set[int] = set()
    for kind, number in schedule:
        if kind == COMPLETE:
            del inflight[number]
            continue
        mine = {p + i for p, count in pages[number] for i in range(count)}
        for other, theirs in inflight.items():
            if mine & theirs:
                expected |= {other, number}
        inflight[number] = mine
    assert overlapping(Workload("x", requests, schedule)) == expected
