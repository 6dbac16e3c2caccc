"""Descriptor words against those of a real kernel, and what each request does to the caches and the ledger."""

from __future__ import annotations

import json
import lzma
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmakit import consts
from dmakit.errors import MisuseError
from dmakit.iommu.devtlb import DeviceTlb
from dmakit.iommu.formats.vtdss import VtdSecondStage
from dmakit.iommu.formats.x86_64 import X86_64
from dmakit.iommu.invalidation import Descriptor, decode, encode
from dmakit.iommu.unit import IommuUnit
from dmakit.ledger import Ledger
from dmakit.memory.physical import PhysicalMemory

from .bench import Bench

DATA = Path(__file__).resolve().parents[1] / "data"
ALL_ONES = (1 << 64) - 1
FLUSH = re.compile(
    r"cache_tag_flush_range(_np)?:? dmar0 \S+ type iotlb did (\d+) \[0x(\w+)-0x(\w+)\] addr 0x(\w+) mask 0x(\w+)"
)
SUBMIT = re.compile(r"qi_submit:? (\w+)_inv dmar0: 0x(\w+) 0x(\w+)")
Flush = tuple[str, int, int, int, int, int]  # "" or "_np", did, start, end, addr, mask


def lines_of(path: Path) -> Iterator[str]:
    """The event lines of a step file or a trace, in order."""
    with lzma.open(path, "rt") as file:
        for line in file:
            if path.name.endswith(".jsonl.xz"):
                step = json.loads(line)
                for event in [*(step.get("events") or []), *(step.get("after") or [])]:
                    yield f"{event[2]} {event[3]}"
            else:
                yield line


def recorded(path: Path) -> Iterator[tuple[Flush | None, str, int, int]]:
    """Every submitted descriptor: the flush it came from (None for interrupt entries), kind and words."""
    flush: Flush | None = None
    for line in lines_of(path):
        if found := FLUSH.search(line):
            numbers = [int(text, 16) for text in found.groups()[2:]]
            flush = (found[1] or "", int(found[2]), numbers[0], numbers[1], numbers[2], numbers[3])
        elif found := SUBMIT.search(line):
            iotlb = found[1] == "iotlb"
            yield flush if iotlb else None, found[1], int(found[2], 16), int(found[3], 16)
            flush = None if iotlb else flush


def unit_with_domains(caching_mode: bool) -> IommuUnit:
    """A unit with the domain ids 2 to 9."""
    unit = IommuUnit(PhysicalMemory(1 << 20), ledger=Ledger(1), caching_mode=caching_mode)
    for _ in range(8):
        unit.attach(VtdSecondStage(), 0x1000, 4)
    unit.events = []
    return unit


def hint_wanted(high: int) -> bool:
    """Bit 6 as the specification places it, read without our decoder."""
    return bool((high >> 6) & 1)


@pytest.mark.parametrize(
    "name,pages,domains,interrupts",
    [
        ("kernel-steps/sg-module.jsonl.xz", 0, 91, 0),
        ("kernel-steps/unlink-cm.jsonl.xz", 118, 0, 0),
        ("kernel-steps/unlink-fuzz1-lazy.jsonl.xz", 224, 33, 0),
        ("kernel-steps/unlink-fuzz1-strict.jsonl.xz", 264, 0, 0),
        ("kernel-steps/unlink-lazy-smp2.jsonl.xz", 33, 37, 0),
        ("kernel-steps/unlink-lazy.jsonl.xz", 33, 37, 0),
        ("kernel-steps/unlink-strict.jsonl.xz", 82, 0, 0),
        ("kernel-steps/untrusted-module-minalign.jsonl.xz", 32, 1, 0),
        ("kernel-steps/untrusted-module.jsonl.xz", 21, 1, 0),
        ("kernel-traces/inval-cm-smp1.trace.txt.xz", 1497, 0, 11),
        ("kernel-traces/inval-lazy-smp1.trace.txt.xz", 0, 23, 11),
        ("kernel-traces/inval-strict-smp1.trace.txt.xz", 745, 0, 11),
        ("kernel-traces/sg-ahci.trace.txt.xz", 0, 42, 4),
        ("kernel-traces/untrusted-nvme-smp1.trace.txt.xz", 395, 0, 11),
        ("kernel-traces/untrusted-nvme-trusted-smp1.trace.txt.xz", 0, 23, 11),
    ],
)
def test_the_kernels_words_come_out_of_the_kernels_ranges(name: str, pages: int, domains: int, interrupts: int) -> None:
    """From [start, end], did and hint alone: block, mask and both words, for every descriptor of the recording."""
    unit = unit_with_domains("-cm" in name)
    seen: Counter[str] = Counter()
    for flush, kind, low, high in recorded(DATA / name):
        request = decode(low, high)
        seen[request.kind if request.kind != "iotlb" else request.scope] += 1
        assert request.kind == kind
        if flush is None:
            continue
        assert (request.drain_reads, request.drain_writes, encode(request)) == (True, True, (low, high))
        np, did, start, end, addr, mask = flush
        if np:
            unit.sync_range(did, start, end)
        else:
            unit.flush_range(did, start, end, ih=hint_wanted(high))
        assert unit.events == [(f"flush_range{np}", start, end, addr, mask), ("qi", low, high)]
        unit.events.clear()
    assert (seen["page"], seen["domain"], seen["iec"]) == (pages, domains, interrupts)


def test_words_by_hand() -> None:
    assert encode(Descriptor("iotlb", "domain", did=4)) == (0x400E2, 0)
    assert encode(Descriptor("iotlb", "page", did=4, iova=0xFFFFF000, ih=True)) == (0x400F2, 0xFFFFF040)
    assert encode(Descriptor("iotlb", "global")) == (0xD2, 0)
    assert encode(Descriptor("p_iotlb", "page", did=3, iova=0x4000, mask=2)) == (0x30036, 0x4002)
    assert encode(Descriptor("p_iotlb", "domain", did=3)) == (0x30026, 0)
    assert encode(Descriptor("devtlb", "page", iova=0x7000, source=0x20, queue_depth=31)) == (0x20001F0003, 0x7000)
    assert encode(Descriptor("devtlb", "page", iova=0x6000, mask=1, source=0x20)) == (0x2000000003, 0x6001)
    assert encode(Descriptor("devtlb", "page", iova=0x8000, mask=3, source=0x20)) == (0x2000000003, 0xB001)
    assert encode(Descriptor("devtlb", "page", mask=52, source=0x20)) == (0x2000000003, 0x7FFFFFFFFFFFF001)
    assert decode(0x200000025, 0x1000).kind == "wait"
    assert decode(0x1600000014, 0) == Descriptor("iec", "page")


@given(mask=st.integers(0, 51), block=st.integers(0, (1 << 52) - 1), source=st.integers(0, 65535))
def test_device_tlb_ranges_survive_the_encoding(mask: int, block: int, source: int) -> None:
    iova = (block >> mask << mask) << 12
    request = Descriptor("devtlb", "page", iova=iova, mask=mask, source=source, queue_depth=7)
    assert decode(*encode(request)) == request


def test_words_that_mean_nothing_are_refused() -> None:
    with pytest.raises(MisuseError, match=r"^descriptor 0xf 0x0: type 15 is not an invalidation request$"):
        decode(15, 0)
    with pytest.raises(MisuseError, match=r"^descriptor 0x2 0x0: granularity 0 is reserved$"):
        decode(2, 0)
    with pytest.raises(MisuseError, match=r"^kind='wait': only iotlb, p_iotlb and devtlb requests are worded here$"):
        encode(Descriptor("wait"))


@given(first=st.integers(0, (1 << 40) - 1), pages=st.integers(1, 1 << 20))
def test_a_flush_covers_its_range_in_one_aligned_block(first: int, pages: int) -> None:
    unit = unit_with_domains(False)
    start, end = first << 12, ((first + pages) << 12) - 1
    unit.flush_range(2, start, end)
    assert unit.events is not None
    (_, _, _, addr, mask), (_, low, high) = unit.events
    assert isinstance(addr, int) and isinstance(mask, int)
    assert addr % (4096 << mask) == 0 and addr <= start and end < addr + (4096 << mask)
    assert mask == 0 or start >> (11 + mask) != end >> (11 + mask) or (1 << mask) < 2 * pages
    assert decode(low, high) == (
        Descriptor("iotlb", "page", did=2, iova=addr, mask=mask, drain_reads=True, drain_writes=True)
        if mask <= 18
        else Descriptor("iotlb", "domain", did=2, drain_reads=True, drain_writes=True)
    )


def test_a_first_stage_domain_is_invalidated_by_pasid_requests() -> None:
    b = Bench(fmt=X86_64(), caching_mode=True)
    b.unit.events = []
    b.unit.flush_range(b.did, 0x5000, 0x5FFF, ih=True)
    b.unit.flush_all(b.did)
    b.unit.sync_range(b.did, 0x5000, 0x5FFF)
    assert b.unit.events == [
        ("flush_range", 0x5000, 0x5FFF, 0x5000, 0),
        ("qi", 0x20036, 0x5040),
        ("flush_range", 0, ALL_ONES, 0, 52),
        ("qi", 0x20026, 0),
    ]


def test_the_ledger_counts_requests_by_kind_and_cause_waits_and_locks() -> None:
    b = Bench(caching_mode=True)
    b.unit.flush_range(b.did, 0x1000, 0x1FFF, ih=True, cause=consts.CAUSE_UNMAP)
    b.unit.flush_range(b.did, 0, (1 << 31) - 1, cause=consts.CAUSE_TABLE, cpu=1)
    b.unit.flush_all(b.did, cause=consts.CAUSE_FQ_TIMER)
    b.unit.flush_all(b.did, cause=consts.CAUSE_FQ_FULL)
    b.unit.sync_range(b.did, 0x1000, 0x1FFF)
    b.unit.inv_global()
    locks = [cpu["qi"] for cpu in b.ledger.lock_counts()]
    assert locks == [5, 1]
    assert b.counts() == {
        "lock_qi": 6,
        "inv_page": 2,
        "inv_domain": 3,
        "inv_global": 1,
        "inv_wait": 6,
        "inv_cause_unmap": 1,
        "inv_cause_table": 1,
        "inv_cause_fq_timer": 1,
        "inv_cause_fq_full": 1,
        "inv_cause_sync_map": 1,
        "inv_cause_other": 1,
    }


def test_a_batch_is_submitted_when_sixteen_descriptors_are_collected() -> None:
    b = Bench()
    for i in range(20):
        b.unit.attach_devtlb(DeviceTlb(0x100 + i), b.did)
    b.unit.events = []
    b.unit.flush_range(b.did, 0x3000, 0x3FFF)
    assert b.counts() == {
        "lock_qi": 2,
        "inv_wait": 2,
        "inv_page": 1,
        "inv_cause_other": 1,
        "inv_devtlb": 20,
    }
    names = [event[0] for event in b.unit.events]
    assert names == ["flush_range"] + ["flush_range_devtlb"] * 20 + ["qi"] * 21
    assert [tlb.invalidations for tlb in b.unit.devtlbs] == [1] * 20


def test_the_ring_wraps() -> None:
    b = Bench()
    for i in range(300):
        b.tables.map(0x1000, 0x100000 + i * 4096)
        b.unit.flush_range(b.did, 0x1000, 0x1FFF, ih=True)
        assert b.unit.translate(b.did, 0x1000) == 0x100000 + i * 4096
    assert b.unit.queue.head == b.unit.queue.tail == 600 % 256


def test_bad_flushes_name_value_and_rule() -> None:
    b = Bench()
    for call, message in [
        (lambda: b.unit.flush_range(9, 0, 1), "did=9: no domain with this id is attached"),
        (lambda: b.unit.flush_range(2, 5, 4), "[0x5, 0x4]: a flush needs 0 <= start <= end < 2^64"),
        (
            lambda: b.unit.flush_range(2, 0, 1 << 64),
            "[0x0, 0x10000000000000000]: a flush needs 0 <= start <= end < 2^64",
        ),
        (lambda: b.unit.flush_all(2, cause=6), "cause=6: must be from 0 to 5"),
        (lambda: b.unit.inv_global(cpu=2), "cpu=2: must be from 0 to 1"),
        (
            lambda: b.unit.inv_pages(2, 0x1000, 1),
            "addr=0x1000 mask=1: must be an aligned block of 2^mask pages, mask 0 to 51",
        ),
        (lambda: b.unit.sync_range(2, 1, 0), "[0x1, 0x0]: a sync needs 0 <= start <= end < 2^64"),
        (lambda: b.unit.attach_devtlb(DeviceTlb(1), 7), "did=7: no domain with this id is attached"),
        (lambda: b.unit.detach_devtlb(DeviceTlb(1)), "source=0x1: this requester's TLB is not attached"),
        (lambda: DeviceTlb(1 << 16), "source=0x10000: a requester id has 16 bits"),
        (lambda: DeviceTlb(1, queue_depth=33), "queue_depth=33: must be 1 to 32"),
    ]:
        with pytest.raises(MisuseError) as caught:
            call()
        assert str(caught.value) == message
