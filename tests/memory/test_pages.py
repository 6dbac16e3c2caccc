"""The page allocator against a set of pages; fragmentation; fail points."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmakit.errors import ExhaustedError, MisuseError
from dmakit.failpoint import FailPoint
from dmakit.memory.pages import PageAllocator
from dmakit.memory.physical import PhysicalMemory

PAGE = 4096


def allocator(pages: int = 1024, *, start: int = 0, **options: object) -> PageAllocator:
    memory = PhysicalMemory(max(start + pages * PAGE, PAGE))
    return PageAllocator(memory, start, pages * PAGE, **options)  # type: ignore[arg-type]


def test_a_fresh_machine_hands_out_ascending_pages_and_never_page_zero() -> None:
    pages = allocator()
    assert [pages.alloc() for _ in range(1023)] == [PAGE * n for n in range(1, 1024)]
    with pytest.raises(ExhaustedError, match=r"^no free block of order 0 \(4096 bytes\) on node 0$"):
        pages.alloc()


def test_at_fragmentation_one_no_page_follows_its_neighbour() -> None:
    pages = allocator(4096, seed=7, fragmentation=1.0)
    got = [pages.alloc() for _ in range(3000)]
    assert len(set(got)) == 3000
    assert not [n for n in range(1, 3000) if abs(got[n] - got[n - 1]) == PAGE]


def test_run_length_follows_the_degree_of_fragmentation() -> None:
    pages = allocator(1 << 16, seed=3, fragmentation=0.25)
    got = [pages.alloc() for _ in range(4000)]
    breaks = sum(got[n] != got[n - 1] + PAGE for n in range(1, 4000))
    assert 700 < breaks < 1400  # every fourth page, and a few where a run met pages in use


def test_fragmented_small_pages_leave_free_huge_pages() -> None:
    pages = allocator(1 << 16, seed=5, fragmentation=1.0)
    for _ in range(2000):
        pages.alloc()
    assert len({pages.alloc(9) for _ in range(64)}) == 64


def test_same_seed_same_addresses() -> None:
    first, again, other = (allocator(seed=s, fragmentation=0.7) for s in (1, 1, 2))
    run = [first.alloc() for _ in range(200)]
    assert run == [again.alloc() for _ in range(200)]
    assert run != [other.alloc() for _ in range(200)]


def test_bad_frees_and_takes_are_refused() -> None:
    pages = allocator()
    phys = pages.alloc(2)
    for bad in ((phys, 1), (phys + PAGE, 0), (phys + 1, 2), (1 << 40, 0)):
        with pytest.raises(MisuseError, match=r"^phys=0x[0-9a-f]+, order=[0-9]: no such block is allocated on node 0$"):
            pages.free(*bad)
    pages.free(phys, 2)
    with pytest.raises(MisuseError, match="no such block"):
        pages.free(phys, 2)
    pages.take(PAGE * 17)
    with pytest.raises(MisuseError, match=r"^phys=0x11000, order=0: is not free$"):
        pages.take(PAGE * 17)
    with pytest.raises(MisuseError, match=r"^order=19: must be 0 to 18$"):
        pages.alloc(19)


def test_a_fail_point_makes_it_run_out_once() -> None:
    fail = FailPoint()
    pages = allocator(fail=fail)
    fail.arm(1)
    first = pages.alloc()
    with pytest.raises(ExhaustedError):
        pages.alloc()
    assert pages.alloc() == first + PAGE
    assert pages.allocated_pages == 2


def test_everything_merges_again() -> None:
    pages = allocator(1 << 12, start=1 << 24, fragmentation=1.0)
    taken = [pages.alloc() for _ in range(1 << 12)]
    for phys in taken:
        pages.free(phys)
    assert pages.free_pages_count == 1 << 12
    assert pages.alloc(12) == 1 << 24


@settings(max_examples=60)
@given(st.data(), st.integers(0, 300), st.sampled_from((0.0, 0.5, 1.0)))
def test_blocks_are_aligned_disjoint_and_come_back(data: st.DataObject, start: int, fragmentation: float) -> None:
    pages = allocator(257, start=start * PAGE, fragmentation=fragmentation)
    live: dict[int, int] = {}
    used: set[int] = set()
    for _ in range(data.draw(st.integers(0, 60))):
        if live and data.draw(st.booleans()):
            phys = data.draw(st.sampled_from(sorted(live)))
            order = live.pop(phys)
            pages.free(phys, order)
            used -= set(range(phys, phys + (PAGE << order), PAGE))
        else:
            order = data.draw(st.integers(0, 4))
            try:
                phys = pages.alloc(order)
            except ExhaustedError:
                continue
            block = set(range(phys, phys + (PAGE << order), PAGE))
            assert phys % (PAGE << order) == 0 and phys and not block & used
            assert start * PAGE <= phys and phys + (PAGE << order) <= (start + 257) * PAGE
            used |= block
            live[phys] = order
        assert pages.allocated_pages == len(used)
    for phys, order in live.items():
        pages.free(phys, order)
    total = 257 - (start == 0)
    assert pages.free_pages_count == total
    for _ in range(total):
        pages.alloc()
