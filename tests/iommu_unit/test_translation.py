"""Walks over real table words: permissions, leaf sizes, faults, ledger, batches."""

from __future__ import annotations

from array import array

import pytest

from dmakit import consts
from dmakit.errors import ExhaustedError, FaultError, MisuseError
from dmakit.iommu.faults import FaultRecord
from dmakit.iommu.formats.base import PtFormat
from dmakit.iommu.formats.vtdss import VtdSecondStage
from dmakit.iommu.formats.x86_64 import X86_64
from dmakit.iommu.unit import IommuUnit
from dmakit.ledger import Ledger
from dmakit.memory.physical import PhysicalMemory

from .bench import Bench

ALL_ONES = (1 << 64) - 1
FORMATS = pytest.mark.parametrize("fmt", [VtdSecondStage(), X86_64()], ids=lambda f: f.name)


@pytest.mark.parametrize(
    ("fmt", "levels"),
    [(fmt, levels) for fmt in (VtdSecondStage(), X86_64()) for levels in range(fmt.min_levels, 6)],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("level", [1, 2, 3])
def test_every_byte_of_a_leaf_translates(fmt: PtFormat, levels: int, level: int) -> None:
    size = 1 << (3 + 9 * level)
    b = Bench(fmt=fmt, levels=levels, span=4 << 30)
    iova, phys = size * 5, size if level == 3 else size * 7
    b.tables.map(iova, phys, level=level)
    for offset in (0, 1, 4095, size // 2 + 8, size - 1):
        assert b.unit.translate(b.did, iova + offset) == phys + offset
        assert b.unit.translate(b.did, iova + offset, True) == phys + offset
    assert b.counts() == {"walk_reads": levels - level + 1, "iotlb_misses": 1, "iotlb_hits": 9}
    assert [(e.did, e.level, e.iova, e.size) for e in b.unit.iotlb.entries()] == [(b.did, level, iova, size)]
    b.blocked(iova + size)
    b.blocked(iova - 1)


def test_permissions_are_the_conjunction_of_all_levels() -> None:
    b = Bench()
    b.tables.map(0x1000, 0x9000, prot=1)
    b.tables.map(0x2000, 0xA000, prot=2)
    b.tables.map(0x3000, 0xB000)
    assert b.unit.translate(b.did, 0x1000) == 0x9000
    assert b.unit.translate(b.did, 0x2FFF, True) == 0xAFFF
    assert b.blocked(0x1000, write=True) == "device 00:04.0 may not write 0x1000: no write access is set (reason 0x5)"
    assert b.blocked(0x2000) == "device 00:04.0 may not read 0x2000: no read access is set (reason 0x6)"
    slot = b.tables.slot(3, 0x3000)
    b.memory.words[slot] = int(b.memory.words[slot]) & ~2
    b.unit.flush_all(b.did)
    assert b.unit.translate(b.did, 0x3000) == 0xB000
    b.blocked(0x3000, write=True)


def test_an_entry_that_does_not_permit_the_access_is_walked_again() -> None:
    """A leaf that was made writable works at once, as on hardware that re-walks before it faults."""
    b = Bench()
    b.tables.map(0x1000, 0x9000, prot=1)
    b.unit.translate(b.did, 0x1000)
    b.tables.map(0x1000, 0x9000, prot=3)
    assert b.unit.translate(b.did, 0x1000, True) == 0x9000


def test_faults_are_recorded_oldest_first_and_counted_when_the_log_is_full() -> None:
    b = Bench(fault_entries=2)
    b.blocked(0x5123)
    b.blocked(1 << 48, write=True)
    b.blocked(0x7000, did=9)
    assert b.unit.faults == [
        FaultRecord(0x5123, consts.FAULT_READ, False, 0x20, b.did),
        FaultRecord(1 << 48, consts.FAULT_WIDTH, True, 0x20, b.did),
    ]
    assert (b.unit.faults_lost, b.counts()["faults"]) == (1, 3)
    assert str(b.unit.faults[1]) == (
        "device 00:04.0 may not write 0x1000000000000: the address is beyond the domain's width (reason 0x4) (domain 2)"
    )
    b.unit.clear_faults()
    assert (b.unit.faults, b.unit.faults_lost) == ([], 0)
    assert "no domain is attached (reason 0x2)" in b.blocked(0x7000, did=9)


def test_garbage_in_a_table_is_met_as_hardware_meets_it() -> None:
    b = Bench()
    b.tables.map(0x1000, 0x9000)
    b.memory.words[b.tables.slot(2, 0x1000)] = (1 << 45) | 3
    assert "a table pointer leads outside memory (reason 0x7)" in b.blocked(0x1000)
    b.memory.words[b.tables.slot(2, 0x1000)] = 0x201000 | 0x83
    assert "a reserved bit of a table entry is set (reason 0xc)" in b.blocked(0x1000)
    b.memory.words[b.tables.slot(4, 0x1000)] |= 0x80
    b.unit.inv_global()
    assert "(reason 0xc)" in b.blocked(0x1000)


@FORMATS
def test_the_last_address_of_the_aperture_translates_and_the_next_does_not(fmt: PtFormat) -> None:
    b = Bench(fmt=fmt)
    last = fmt.aperture_last(4)
    b.tables.map(last & ~4095, 0x9000)
    assert b.unit.translate(b.did, last) == 0x9FFF
    assert "(reason 0x4)" in b.blocked(last + 1)
    assert "(reason 0x4)" in b.blocked(ALL_ONES)


def test_batches_answer_like_single_calls() -> None:
    b = Bench()
    for i in range(0, 64, 2):
        b.tables.map(i * 4096, 0x100000 + i * 8192)
    iovas = array("Q", [i * 4096 + i for i in range(64)])
    out = array("Q", bytes(8 * 64))
    assert b.unit.translate_many(b.did, iovas, out, True, source=0x20) == 32
    assert list(out) == [0x100000 + i * 8192 + i if i % 2 == 0 else ALL_ONES for i in range(64)]
    assert len(b.unit.faults) == 32
    with pytest.raises(MisuseError, match=r"^out has 3 elements for 64 addresses$"):
        b.unit.translate_many(b.did, iovas, array("Q", [0, 0, 0]))
    with pytest.raises(MisuseError, match=r"^iovas: must be a one-dimensional array of uint64, not of 'i'$"):
        b.unit.translate_many(b.did, array("i", [1]), out)
    with pytest.raises(MisuseError, match=r"^iovas: must be contiguous$"):
        b.unit.translate_many(b.did, memoryview(iovas)[::2], out[:32])
    with pytest.raises(MisuseError, match=r"^out: must be writable$"):
        b.unit.translate_many(
            b.did, array("Q", [1]), bytes(memoryview(array("Q", [1]))) and memoryview(b"8" * 8).cast("Q")
        )


def test_domain_ids_count_up_and_are_used_again() -> None:
    b = Bench(domains=5)
    second, tables = b.domain()
    third, _ = b.domain()
    assert (b.did, second, third) == (2, 3, 4)
    with pytest.raises(ExhaustedError, match=r"^all domain ids from 2 to 4 are taken$"):
        b.domain()
    tables.map(0x1000, 0x9000)
    assert b.unit.translate(second, 0x1000) == 0x9000
    b.unit.detach(second)
    assert "no domain is attached" in b.blocked(0x1000, did=second)
    again, _ = b.domain()
    assert again == second
    b.blocked(0x1000, did=again)
    with pytest.raises(MisuseError, match=r"^did=7: no domain with this id is attached$"):
        b.unit.detach(7)


def test_a_table_may_grow_a_level() -> None:
    b = Bench(levels=3)
    b.tables.map(0x1000, 0x9000)
    top = b.page()
    b.memory.words[top >> 3] = b.tables.root | 3
    assert "(reason 0x4)" in b.blocked(1 << 39)
    b.unit.set_root(b.did, top, 4)
    assert b.unit.translate(b.did, 0x1000) == 0x9000
    assert "(reason 0x6)" in b.blocked(1 << 39)


def test_bad_options_name_value_and_rule() -> None:
    memory, ledger = PhysicalMemory(1 << 20), Ledger(1)
    for options, message in [
        ({"iotlb_entries": 48}, "entries=48: a cache's capacity must be a power of two up to 1048576"),
        ({"iotlb_ways": 1024}, "ways=1024: must be a power of two up to the capacity, 512"),
        ({"policy": "random"}, "policy='random': must be one of lru, fifo"),
        ({"max_mask": 41}, "max_mask=41: must be 0 to 40"),
        ({"domains": 0}, "domains=0: must be 1 to 65536"),
        ({"first_domain_id": 256}, "first_domain_id=256: must be below domains=256"),
        ({"fault_entries": 0}, "fault_entries=0: must be 1 to 1048576"),
    ]:
        with pytest.raises(MisuseError) as caught:
            IommuUnit(memory, ledger=ledger, **options)  # type: ignore[arg-type]
        assert str(caught.value) == message
    unit = IommuUnit(memory, ledger=ledger)
    for root in (0, 0x1001, 1 << 20, -4096):
        with pytest.raises(MisuseError, match=r"must be a page inside 0x100000 bytes of memory"):
            unit.attach(VtdSecondStage(), root, 4)
    with pytest.raises(MisuseError, match=r"^iova=0x10000000000000000: a device's address has 64 bits$"):
        unit.translate(2, 1 << 64)
    with pytest.raises(FaultError, match=r"may not read 0x0: no domain is attached"):
        unit.translate(2, 0)
