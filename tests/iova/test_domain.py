"""The public calls of a domain: errors, counts, events, batches, depots, CPUs on and off line."""

from __future__ import annotations

import re
from array import array

import pytest
from tests.iova.support import LIMIT32, LIMIT64, alloc, check_tree

from dmakit.clock import MS, VirtualClock
from dmakit.errors import ExhaustedError, MisuseError
from dmakit.iova.domain import IovaDomain
from dmakit.ledger import Ledger

TOP = (1 << 52) - 1


def counts(domain: IovaDomain) -> dict[str, int]:
    """The ledger's rows that are not 0."""
    return {name: n for name, n in domain.ledger.snapshot().items() if n}


def test_a8_a_freed_range_comes_back_to_the_next_allocation_of_its_order_on_that_cpu() -> None:
    domain = IovaDomain(cpus=2)
    first = alloc(domain, 7, cpu=1)
    domain.free_fast(first, 7, cpu=1)
    assert alloc(domain, 8, cpu=0) != first
    assert alloc(domain, 4, cpu=1) != first
    assert alloc(domain, 5, cpu=1) == first


def test_a26_up_to_128_kib_hits_the_magazines_and_132_kib_never_does() -> None:
    domain = IovaDomain()
    for size in (1, 2, 3, 4, 8, 16, 31, 32):
        domain.free_fast(alloc(domain, size), size)
        before = counts(domain)
        domain.free_fast(alloc(domain, size), size)
        after = counts(domain)
        assert after["iova_magazine"] - before.get("iova_magazine", 0) == 1
        assert after["lock_rbtree"] == before["lock_rbtree"]
    domain.ledger.reset()
    for _ in range(10):
        domain.free_fast(alloc(domain, 33), 33)
    assert counts(domain) == {"iova_tree": 10, "iova_free_tree": 10, "tree_nodes": 10, "lock_rbtree": 20}


def test_the_first_addresses_of_a_pci_device() -> None:
    domain = IovaDomain(cpus=2)
    domain.reserve(0xFEE00, 0xFEEFF)
    sizes = (1, 1, 2, 3, 33, 32, 31, 64, 512, 1, 513, 256, 100, 16)
    expected = [0xFFFFF, 0xFFFFE, 0xFFFFC, 0xFFFF8, 0xFFFC0, 0xFFFA0, 0xFFF80, 0xFFF40, 0xFFC00, 0xFFBFF]
    expected += [0xFF800, 0xFF700, 0xFF680, 0xFF670]
    assert [alloc(domain, size) for size in sizes] == expected
    domain.free_fast(0xFFFFF, 1)
    domain.free_fast(0xFFFFE, 1)
    assert [alloc(domain, 1), alloc(domain, 1)] == [0xFFFFE, 0xFFFFF]
    domain.free_fast(0xFFFC0, 33)
    assert alloc(domain, 33) == 0xFFFC0
    assert alloc(domain, 3, cpu=1) == 0xFFF3C  # the search resumes where the removal moved the cached node


def test_a_32_bit_failure_leaves_the_upper_space() -> None:
    domain = IovaDomain()
    assert alloc(domain, 1 << 20, LIMIT32, flush=False) == 0
    assert alloc(domain, 1 << 20, LIMIT64) == 0xFFFFFFFF00000
    assert alloc(domain, 1, LIMIT64) == 0xFFFFFFFEFFFFF


def test_a_range_freed_with_a_smaller_size_keeps_its_node() -> None:
    domain = IovaDomain()
    whole = alloc(domain, 16)
    domain.free_fast(whole, 4)
    assert alloc(domain, 4) == whole
    assert domain.nodes() == [(whole, whole + 15)]
    assert alloc(domain, 16) != whole
    domain.free(whole + 3)
    assert len(domain.nodes()) == 1


@pytest.mark.parametrize("policy", ["linux", "augmented"])
def test_reservations_merge_as_in_the_kernel(policy: str) -> None:
    domain = IovaDomain(policy=policy)
    for lo, hi in ((100, 200), (150, 300), (50, 120), (400, 500), (90, 450)):
        domain.reserve(lo, hi)
    assert domain.nodes() == [(50, 200), (201, 300), (301, 500)]
    domain.reserve(0, 3)
    assert (domain.nodes()[0], domain.node_count) == ((0, 3), 4)
    check_tree(domain, fits=policy == "augmented")
    assert alloc(domain, 40, 120) == 0
    assert alloc(domain, 4, 120) == 44


def test_the_retry_pass_finds_space_above_the_cached_node() -> None:
    domain = IovaDomain()
    assert alloc(domain, 1, 100) == 100
    assert alloc(domain, 64, 1023, flush=False) == 960  # below 100 there is no aligned place, above it there is
    assert alloc(domain, 32, 1023, flush=False) == 928  # the next search goes on from there
    assert counts(domain)["tree_nodes"] == 1 + 1 + 3 + 1


def test_the_negative_cache_refuses_without_a_walk() -> None:
    domain = IovaDomain()
    assert alloc(domain, 1 << 20, flush=False) == 0
    assert domain.max32_alloc_size == 1 << 20
    pfns = [alloc(domain, 1 << 18, flush=False) for _ in range(3)]
    assert alloc(domain, 1 << 19, flush=False) == 0
    assert domain.max32_alloc_size == 1 << 19
    nodes = counts(domain)["tree_nodes"]
    assert alloc(domain, 1 << 19, flush=False) == 0
    assert counts(domain)["tree_nodes"] == nodes
    domain.free(pfns[0])
    assert domain.max32_alloc_size == 1 << 20


def test_what_failed_below_a_small_limit_is_refused_below_4_gib_by_policy_linux_alone() -> None:
    linux, augmented = IovaDomain(), IovaDomain(policy="augmented")
    for domain, second in ((linux, 0), (augmented, 0xFFFC0)):
        assert alloc(domain, 64, 50, flush=False) == 0
        assert alloc(domain, 64, flush=False) == second
    alloc(linux, 64, LIMIT64)
    linux.free(alloc(linux, 33, LIMIT64))  # a removal above 4 GiB forgets nothing
    assert alloc(linux, 64, flush=False) == 0
    linux.free(alloc(linux, 33))
    assert alloc(linux, 64, flush=False) == 0xFFFC0


def test_a_failed_search_drains_every_magazine_and_tries_again() -> None:
    domain = IovaDomain(cpus=2)
    singles = [alloc(domain, 1, 63, cpu=i & 1) for i in range(63)]
    for i, pfn in enumerate(singles):
        domain.free_fast(pfn, 1, cpu=i & 1)
    assert (domain.node_count, len(domain.cached_pfns())) == (63, 63)
    assert alloc(domain, 32, 63, flush=False) == 0
    assert alloc(domain, 32, 63, flush=True) == 32
    assert (domain.node_count, domain.cached_pfns()) == (1, [])
    rows = counts(domain)
    assert (rows["rcache_flushes"], rows["iova_failed"], rows["iova_tree"]) == (1, 1, 64)


def test_a_magazine_answers_only_below_the_limit() -> None:
    domain = IovaDomain()
    high, low = alloc(domain, 1, LIMIT64), alloc(domain, 1, LIMIT32)
    domain.free_fast(low, 1)
    domain.free_fast(high, 1)
    assert alloc(domain, 1, LIMIT32) == low
    assert alloc(domain, 1, LIMIT32) == low - 1
    assert alloc(domain, 1, LIMIT64) == high
    domain.free_fast(high, 1)
    assert alloc(domain, 32, 3) == 0


def test_the_depot_gives_one_magazine_back_every_100_ms_while_it_has_more_than_cpus() -> None:
    clock = VirtualClock()
    domain = IovaDomain(cpus=2, clock=clock)
    pfns = [alloc(domain, 1) for _ in range(127 * 7)]
    for pfn in pfns:
        domain.free_fast(pfn, 1)
    assert domain.depot_sizes() == [5, 0, 0, 0, 0, 0]
    assert clock.pending() == 1
    sizes = []
    for _ in range(5):
        clock.advance(100 * MS - 1)
        before = domain.depot_sizes()[0]
        clock.advance(1)
        sizes.append((before, domain.depot_sizes()[0]))
    assert sizes == [(5, 4), (4, 3), (3, 2), (2, 2), (2, 2)]
    assert clock.pending() == 0
    assert domain.node_count == len(domain.cached_pfns()) == 127 * 4


def test_close_takes_the_depot_work_off_the_clock() -> None:
    clock = VirtualClock()
    domain = IovaDomain(clock=clock)
    for pfn in [alloc(domain, 2) for _ in range(127 * 3)]:
        domain.free_fast(pfn, 2)
    assert (domain.depot_sizes()[1], clock.pending()) == (1, 1)
    domain.close()
    assert clock.pending() == 0
    assert not domain.depot_work(1)


def test_a_cpu_that_goes_off_line_gives_its_magazines_back() -> None:
    domain = IovaDomain(cpus=2)
    pfns = [alloc(domain, 1, cpu=1) for _ in range(10)]
    for pfn in pfns:
        domain.free_fast(pfn, 1, cpu=1)
    domain.set_online(1, False)
    assert (domain.nodes(), domain.online_cpus) == ([], 1)
    with pytest.raises(MisuseError, match=r"^cpu=1: is off line$"):
        domain.alloc_fast(1, LIMIT32, cpu=1)
    with pytest.raises(MisuseError, match=r"^cpu=0: is the last CPU on line$"):
        domain.set_online(0, False)
    domain.set_online(1, True)
    domain.set_online(1, True)
    assert (domain.online_cpus, alloc(domain, 1, cpu=1)) == (2, LIMIT32)


def test_locks_are_counted_by_cpu() -> None:
    domain = IovaDomain(cpus=2)
    domain.free_fast(alloc(domain, 64, cpu=1), 64, cpu=1)
    alloc(domain, 1, cpu=0)
    assert domain.ledger.lock_counts() == [
        {"rbtree": 1, "depot": 1, "fq": 0, "qi": 0},
        {"rbtree": 2, "depot": 0, "fq": 0, "qi": 0},
    ]


def test_events_carry_the_arguments_as_given() -> None:
    domain = IovaDomain()
    events: list[tuple[object, ...]] = []
    assert domain.events is None
    domain.events = events
    pfn = alloc(domain, 3)
    domain.free_fast(pfn, 3)
    assert alloc(domain, 40, 30) == 0
    domain.events = None
    alloc(domain, 1)
    assert events == [("af_out", 3, LIMIT32, pfn), ("ff_in", pfn, 3), ("af_out", 40, 30, 0)]


def test_batches_answer_like_single_calls() -> None:
    one, many = IovaDomain(), IovaDomain()
    sizes = array("Q", [1, 5, 33, 1 << 21, 64, 1])
    pfns = array("Q", bytes(8 * len(sizes)))
    assert many.alloc_batch(sizes, LIMIT32, pfns, flush_rcache=False) == 5
    assert list(pfns) == [alloc(one, size, flush=False) for size in sizes]
    many.free_batch(pfns, sizes)
    for pfn, size in zip(pfns, sizes, strict=True):
        if pfn:
            one.free_fast(pfn, size)
    assert (many.nodes(), counts(many)) == (one.nodes(), counts(one))
    assert many.alloc_batch(array("Q"), LIMIT32, array("Q")) == 0


BAD_CALLS = {
    "size=0: must be from 1 to 4503599627370495": lambda d: d.alloc_fast(0, 9),
    "size=-1: must be from 1 to 4503599627370495": lambda d: d.free_fast(9, -1),
    "size='1': must be an integer": lambda d: d.alloc_fast("1", 9),
    "size=1.5: must be an integer": lambda d: d.alloc_fast(1.5, 9),
    f"limit_pfn={TOP + 1}: must be from 0 to {TOP}": lambda d: d.alloc_fast(1, TOP + 1),
    f"limit_pfn={1 << 64}: must be from 0 to {TOP}": lambda d: d.alloc_fast(1, 1 << 64),
    "cpu=1: must be from 0 to 0": lambda d: d.alloc_fast(1, 9, cpu=1),
    f"pfn=0: must be from 1 to {TOP}": lambda d: d.free_fast(0, 1),
    "pfn=0x9: no range is allocated there": lambda d: d.free_fast(9, 1),
    "pfn=0xa: no range is allocated there": lambda d: d.free(10),
    "lo=9: must not be above hi=8": lambda d: d.reserve(9, 8),
    f"hi={TOP + 1}: must be from 0 to {TOP}": lambda d: d.reserve(9, TOP + 1),
    "order=6: must be from 0 to 5": lambda d: d.depot_work(6),
    "sizes[1]=0: must be from 1 to 4503599627370495": lambda d: d.alloc_batch(
        array("Q", [1, 0]), 9, array("Q", [0, 0])
    ),
    "pfns: must have as many items as sizes (2), not 1": lambda d: d.alloc_batch(
        array("Q", [1, 1]), 9, array("Q", [0])
    ),
    "sizes: must have as many items as pfns (1), not 0": lambda d: d.free_batch(array("Q", [1]), array("Q")),
    "sizes: must be a contiguous buffer of unsigned 64-bit words": lambda d: d.alloc_batch([1], 9, array("Q", [0])),
    "pfns: must be a contiguous buffer of unsigned 64-bit words": lambda d: d.free_batch(
        array("I", [1]), array("Q", [1])
    ),
    "pfns: must be writable": lambda d: d.alloc_batch(array("Q", [1]), 9, memoryview(bytes(8)).cast("Q")),
    "granule=3: must be from 4 to 1073741824": lambda d: IovaDomain(granule=3),
    "granule=4097: must be a power of two": lambda d: IovaDomain(granule=4097),
    f"start_pfn=0: must be from 1 to {TOP}": lambda d: IovaDomain(start_pfn=0),
    "cpus=0: must be from 1 to 4096": lambda d: IovaDomain(cpus=0),
    "cpus=2: the ledger counts only 1": lambda d: IovaDomain(cpus=2, ledger=Ledger(1)),
    "policy='best': must be one of linux, augmented": lambda d: IovaDomain(policy="best"),
    "policy=4: must be one of linux, augmented": lambda d: IovaDomain(policy=4),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_are_named_and_change_nothing(message: str) -> None:
    domain = IovaDomain()
    with pytest.raises(MisuseError, match=f"^{re.escape(message)}$"):
        BAD_CALLS[message](domain)
    assert (domain.nodes(), counts(domain)) == ([], {})


def test_an_exhausted_space_is_named() -> None:
    with pytest.raises(ExhaustedError, match=r"^no free range of 64 granules at or below pfn 0x1f$") as caught:
        IovaDomain().alloc_fast(64, 31)
    assert caught.value.errno_name == "ENOMEM"
