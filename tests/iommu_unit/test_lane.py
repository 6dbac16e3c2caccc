"""The batch's fast lane does what one access after the other does: same answers, caches, table bits, ledger, faults."""

from __future__ import annotations

import random
from array import array

import pytest

from dmakit.errors import FaultError
from dmakit.iommu.formats.vtdss import VtdSecondStage
from dmakit.iommu.formats.x86_64 import X86_64
from dmakit.iommu.unit import IommuUnit
from tests.iommu_unit.bench import Bench, Tables

GONE = (1 << 64) - 1


def _machine(seed: int, options: dict[str, object], first_stage: bool, tracked: bool) -> tuple[Bench, list[int]]:
    """A bench with the same tables for the same seed: 4 KiB, 2 MiB and 1 GiB leaves, holes, all permissions."""
    rng = random.Random(seed)
    fmt = X86_64() if first_stage else VtdSecondStage()
    bench = Bench(fmt=fmt, levels=rng.choice((3, 4, 5)), **options)
    other, more = bench.domain(4)
    pages = []
    for region in rng.sample(range(64), 12):
        base = region << 21
        if rng.random() < 0.2:
            _map(bench.tables, base, 2)
            pages.append(base)
            continue
        for page in rng.sample(range(512), 12):
            bench.tables.map(base + page * 4096, bench.page(), prot=rng.choice((1, 2, 3, 3, 3)))
            pages.append(base + page * 4096)
        more.map(base, bench.page())
    _map(bench.tables, 5 << 30, 3)
    pages += [5 << 30, 63 << 21, 7 << 30, 1 << 60]
    if tracked and not first_stage:
        bench.unit.set_dirty_tracking(bench.did, True)
    bench.counts()
    return bench, pages


def _map(tables: Tables, iova: int, level: int) -> None:
    tables.map(iova, 0, level=level)


def _state(unit: IommuUnit, bench: Bench) -> tuple[object, ...]:
    caches = [(c.entries(), c.used, c.evictions) for c in (unit.iotlb, unit.psc)]
    return caches, bench.ledger.snapshot(), unit.faults, unit.faults_lost, bytes(bench.memory.view)


def _full_machine(seed: int) -> tuple[Bench, list[int]]:
    """A bench with 4 KiB leaves in three gigabytes, few of them not plain, and an IOTLB of 64 that is full of such."""
    rng = random.Random(seed)
    options: dict[str, object] = {
        "iotlb_entries": 64,
        "psc_entries": rng.choice((4, 16)),
        "policy": rng.choice(("lru", "fifo")),
    }
    bench = Bench(fmt=X86_64() if rng.random() < 0.3 else VtdSecondStage(), **options)
    pages = []
    for region in rng.sample(range(3 * 512), 24):
        for page in rng.sample(range(512), 40):
            pages.append((region << 21) + page * 4096)
            bench.tables.map(pages[-1], bench.page(), prot=rng.choice((1, 2, *[3] * 30)))
    _answers(bench, array("Q", pages), False)
    _answers(bench, array("Q", pages), True)
    assert bench.unit.iotlb.used == 64
    return bench, [*pages, 3 << 30, 1 << 60]


def _answers(bench: Bench, iovas: array[int], write: bool) -> array[int]:
    """What a batch answers."""
    out = array("Q", bytes(8 * len(iovas)))
    faults = bench.unit.translate_many(bench.did, iovas, out, write, source=0x20)
    assert faults == sum(answer == GONE for answer in out)
    return out


def _single(bench: Bench, iova: int, write: bool) -> int:
    """What one access answers, all ones for a fault."""
    try:
        return bench.unit.translate(bench.did, iova, write, source=0x20)
    except FaultError:
        return GONE


@pytest.mark.parametrize("seed", range(24))
def test_a_batch_leaves_what_single_accesses_leave(seed: int) -> None:
    rng = random.Random(seed)
    entries, ways = rng.choice(((8, 2), (16, 4), (64, 8), (64, 16), (512, 8)))
    options: dict[str, object] = {
        "iotlb_entries": entries,
        "iotlb_ways": ways,
        "psc_entries": rng.choice((1, 4, 8, 64)),
        "policy": rng.choice(("lru", "fifo")),
        "caching_mode": rng.random() < 0.3,
    }
    shape = (rng.random() < 0.4, rng.random() < 0.5)
    one, pages = _machine(seed, options, *shape)
    batch, _ = _machine(seed, options, *shape)
    for _ in range(6):
        write = rng.random() < 0.5
        few = rng.sample(pages, min(len(pages), rng.choice((3, 20, 200))))
        iovas = array("Q", ((rng.choice(few) + rng.randrange(4096)) & GONE for _ in range(150)))
        assert list(_answers(batch, iovas, write)) == [_single(one, iova, write) for iova in iovas]
        assert _state(one.unit, one) == _state(batch.unit, batch)
        for bench in (one, batch):
            bench.unit.inv_pages(bench.did, few[0] >> 12 << 12, 0)


@pytest.mark.parametrize("seed", range(8))
def test_a_batch_in_full_caches_leaves_what_single_accesses_leave(seed: int) -> None:
    one, pages = _full_machine(seed)
    batch, _ = _full_machine(seed)
    rng = random.Random(seed)
    for _ in range(8):
        write = rng.random() < 0.5
        few = rng.sample(pages, rng.choice((30, 300, len(pages))))
        iovas = array("Q", (rng.choice(few) + rng.randrange(4096) for _ in range(400)))
        assert list(_answers(batch, iovas, write)) == [_single(one, iova, write) for iova in iovas]
        assert _state(one.unit, one) == _state(batch.unit, batch)
