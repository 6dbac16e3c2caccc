"""What a replay needs of a domain: copies, fingerprints, and adopting an answer that is not ours."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dmakit.iova.domain import IovaDomain

CALLS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40), st.integers(0, 1)), max_size=60)


def drive(domain: IovaDomain, calls: list[tuple[int, int, int]], live: list[tuple[int, int]]) -> list[int]:
    answers = []
    for what, size, cpu in calls:
        if what or not live:
            answers.append(domain.alloc_fast(size, 0xFFFFF, cpu=cpu))
            live.append((answers[-1], size))
        else:
            pfn, freed = live.pop(size % len(live))
            domain.free_fast(pfn, freed, cpu=cpu)
    return answers


@settings(max_examples=40)
@given(CALLS, CALLS)
def test_a_copy_answers_alike_and_shares_nothing(
    before: list[tuple[int, int, int]], after: list[tuple[int, int, int]]
) -> None:
    domain = IovaDomain(cpus=2)
    live: list[tuple[int, int]] = []
    drive(domain, before, live)
    twin = domain.copy()
    print_before = domain.fingerprint()
    assert twin.fingerprint() == print_before
    first = drive(twin, after, list(live))
    assert domain.fingerprint() == print_before
    assert drive(domain, after, list(live)) == first
    assert domain.fingerprint() == twin.fingerprint()
    assert domain.nodes() == twin.nodes()


def test_fingerprints_tell_states_apart() -> None:
    domain = IovaDomain(cpus=2)
    pfns = [domain.alloc_fast(1, 0xFFFFF) for _ in range(3)]
    prints = {domain.fingerprint()}
    twin = domain.copy()
    twin.free_fast(pfns[0], 1, cpu=0)
    twin.free_fast(pfns[1], 1, cpu=0)
    prints.add(twin.fingerprint())
    twin = domain.copy()
    twin.free_fast(pfns[1], 1, cpu=0)
    twin.free_fast(pfns[0], 1, cpu=0)
    prints.add(twin.fingerprint())
    twin = domain.copy()
    twin.free_fast(pfns[0], 1, cpu=1)
    twin.free_fast(pfns[1], 1, cpu=0)
    prints.add(twin.fingerprint())
    twin = domain.copy()
    twin.free(pfns[0])
    prints.add(twin.fingerprint())
    assert len(prints) == 5


def test_adopting_takes_a_range_from_wherever_it_was() -> None:
    domain = IovaDomain(cpus=2)
    pfns = [domain.alloc_fast(4, 0xFFFFF) for _ in range(300)]
    for pfn in pfns:
        domain.free_fast(pfn, 4, cpu=1)
    assert domain.depot_sizes()[2] == 1
    for pfn in (pfns[0], pfns[200], pfns[299]):  # depot, prev, loaded
        assert domain.adopt(pfn, 4) == "cached"
    assert len(domain.cached_pfns()) == 297
    assert domain.adopt(0x1000, 4) == "free"
    assert domain.search.tree.find(0x1003) == (0x1000, 0x1003)
    assert domain.adopt(0x1002, 8) == "overlap"
    assert domain.search.tree.find(0x1000) is None
    assert domain.adopt(pfns[5] - 1, 2) == "overlap"
    assert pfns[5] not in [pfn for pfn, _ in domain.cached_pfns()]
