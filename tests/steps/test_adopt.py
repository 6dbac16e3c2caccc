"""Adopting the kernel's allocator answers: what was freed is taken back, the wanted IOVA comes next."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmakit.iova.domain import IovaDomain
from dmakit.trace.step_adopt import adopt_frees, make_next, take_back

LIMIT = 0xFFFFF


def twins() -> tuple[IovaDomain, IovaDomain]:
    return IovaDomain(), IovaDomain()


def next_pfns(domain: IovaDomain, sizes: list[int]) -> list[int]:
    return [domain.alloc_fast(size, LIMIT) for size in sizes]


@pytest.mark.parametrize("sizes", [[4, 64, 8], [512, 33, 1], [2, 2, 2, 100]])
def test_after_adopting_the_kernels_frees_the_next_allocations_are_the_kernels(sizes: list[int]) -> None:
    ours, kernel = twins()
    pfns = next_pfns(ours, sizes)
    assert next_pfns(kernel, sizes) == pfns
    hints = ours.search.hints()
    done, wanted = [], []
    for pfn, size in zip(pfns, sizes, strict=True):
        ours.free_fast(pfn, size)
        kernel.free_fast(pfn, max(size // 2, 1))  # the kernel frees half the window
        done.append(("ff_in", pfn, size))
        wanted.append(("ff_in", pfn, max(size // 2, 1)))
    adopt_frees(ours, 0, done, wanted, hints)
    assert ours.nodes() == kernel.nodes()
    assert ours.search.hints() == kernel.search.hints()
    assert sorted(ours.cached_pfns()) == sorted(kernel.cached_pfns())
    again = [1, 2, 4, 8, 16, 64, 512]
    assert next_pfns(ours, again) == next_pfns(kernel, again)


def test_equal_frees_are_left_alone() -> None:
    domain = IovaDomain()
    pfn = domain.alloc_fast(4, LIMIT)
    domain.free_fast(pfn, 4)
    before = (domain.nodes(), domain.cached_pfns())
    events = [("ff_in", pfn, 4)]
    adopt_frees(domain, 0, events, events, (0, 0, 0))
    assert (domain.nodes(), domain.cached_pfns()) == before


@pytest.mark.parametrize("pages", [1, 3, 32, 33, 512])
def test_the_wanted_range_is_handed_out_next_and_the_rest_stays_free(pages: int) -> None:
    domain = IovaDomain()
    other = domain.alloc_fast(8, LIMIT)
    wanted = 0xF0000
    held = make_next(domain, 0, wanted, pages)
    assert domain.alloc_fast(pages, LIMIT) == wanted
    for lo in held:
        domain.free(lo)
    length = pages if pages > 32 else 1 << (pages - 1).bit_length()
    assert domain.nodes() == [(wanted, wanted + length - 1), (other, other + 7)]


def test_a_range_deep_in_a_magazine_comes_to_its_top() -> None:
    domain = IovaDomain()
    pfns = next_pfns(domain, [1, 1, 1, 1])
    for pfn in pfns:
        domain.free_fast(pfn, 1)
    assert make_next(domain, 0, pfns[1], 1) == []
    assert next_pfns(domain, [1, 1, 1, 1]) == [pfns[1], pfns[3], pfns[2], pfns[0]]


def test_a_free_is_taken_back_from_below_others() -> None:
    domain = IovaDomain()
    first, second = next_pfns(domain, [1, 1])
    domain.free_fast(first, 1)
    domain.free_fast(second, 1)
    take_back(domain, 0, first, 1)
    assert domain.cached_pfns() == [(second, 1)]
    assert domain.nodes() == [(second, second), (first, first)]


@pytest.mark.parametrize("frees", [1, 40, 700])
@given(data=st.data())
@settings(max_examples=20)
def test_a_range_comes_from_another_cpus_magazines_or_the_depot(frees: int, data: st.DataObject) -> None:
    domain = IovaDomain(cpus=2)
    pfns = next_pfns(domain, [2] * frees)
    for pfn in pfns:
        domain.free_fast(pfn, 2, cpu=data.draw(st.integers(0, 1)) if frees < 100 else 1)
    wanted = data.draw(st.sampled_from(pfns))
    before = domain.cached_pfns()
    assert make_next(domain, 0, wanted, 2) == []
    assert domain.cached_pfns() == before
    assert domain.alloc_fast(2, LIMIT) == wanted
    assert len(domain.nodes()) == frees


def test_a_cpu_off_line_is_passed_over() -> None:
    domain = IovaDomain(cpus=3)
    pfns = next_pfns(domain, [1, 1])
    for pfn in pfns:
        domain.free_fast(pfn, 1, cpu=2)
    domain.set_online(1, False)
    take_back(domain, 0, pfns[0], 1)
    assert domain.cached_pfns() == [(pfns[1], 1)]
