"""Dirty and accessed bits: granularity, clearing, bitmaps, and why a flush must follow."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from dmakit.consts import DIRTY_NO_CLEAR
from dmakit.errors import MisuseError, UnsupportedError
from dmakit.iommu.dirty import LeafBitScan
from dmakit.iommu.formats.x86_64 import X86_64
from dmakit.iommu.gather import Gather
from tests.iommu.world import K4, M2, RW, World, entry, record

BASE = 0x200000000


def bits_of(bitmap: array[int]) -> set[int]:
    return {n for n in range(len(bitmap) * 64) if bitmap[n >> 6] >> (n & 63) & 1}


def tracked() -> tuple[World, object]:
    world = World()
    domain = world.domain()
    domain.map(BASE, BASE, M2, RW)  # one 2 MiB leaf
    domain.map(BASE + M2, 0x5000, 8 * K4, RW)  # eight 4 KiB leaves
    domain.set_dirty_tracking(True)
    return world, domain


def test_a_write_dirties_its_leaf_and_reading_clears_it() -> None:
    world, domain = tracked()
    unit = domain.unit
    unit.translate(domain.did, BASE + M2 + 3 * K4, True)
    unit.translate(domain.did, BASE + M2 + 4 * K4, False)
    bitmap = array("Q", [0] * 16)
    events = record(domain)
    assert domain.read_and_clear_dirty(BASE + M2, 8 * K4, bitmap) == 1
    assert bits_of(bitmap) == {3}
    assert [event[0] for event in events] == ["tlbsync_in", "flush_range", "qi"]
    assert events[0] == ("tlbsync_in", BASE + M2 + 3 * K4, BASE + M2 + 4 * K4 - 1, 0)
    assert domain.read_and_clear_dirty(BASE + M2, 8 * K4, bitmap) == 0
    assert bits_of(bitmap) == {3}  # OR-ed in, never cleared
    unit.translate(domain.did, BASE + M2 + 3 * K4, True)
    assert domain.read_and_clear_dirty(BASE + M2, 8 * K4, bitmap) == 1


def test_bits_join_those_that_are_there() -> None:
    _, domain = tracked()
    for page in (1, 6):
        domain.unit.translate(domain.did, BASE + M2 + page * K4, True)
    bitmap = array("Q", [1 << 40])
    assert domain.read_and_clear_dirty(BASE + M2, 8 * K4, bitmap) == 2
    assert bits_of(bitmap) == {1, 6, 40}


def test_a_large_leaf_dirties_all_its_pages_that_were_asked_for() -> None:
    _, domain = tracked()
    domain.unit.translate(domain.did, BASE + 7 * K4, True)
    bitmap = array("Q", [0] * 9)
    assert domain.read_and_clear_dirty(BASE, M2 + 8 * K4, bitmap, flags=DIRTY_NO_CLEAR) == 1
    assert bits_of(bitmap) == set(range(512))
    part = array("Q", [0])
    assert domain.read_and_clear_dirty(BASE + 16 * K4, 8 * K4, part) == 1
    assert bits_of(part) == set(range(8))
    assert domain.read_and_clear_dirty(BASE, M2, bitmap) == 0


def test_no_clear_leaves_the_bit_and_sends_no_flush() -> None:
    world, domain = tracked()
    domain.unit.translate(domain.did, BASE, True)
    events = record(domain)
    bitmap = array("Q", [0] * 8)
    assert [domain.read_and_clear_dirty(BASE, M2, bitmap, flags=DIRTY_NO_CLEAR) for _ in range(3)] == [1, 1, 1]
    assert events == []
    assert entry(domain.table, BASE, 2) & domain.table.fmt.dirty_bit


def test_without_the_flush_later_writes_go_unseen() -> None:
    _, domain = tracked()
    domain.unit.translate(domain.did, BASE + M2, True)
    bitmap, gather = array("Q", [0]), Gather()
    assert LeafBitScan(domain.table, BASE + M2, K4, bitmap, gather).run() == 1
    domain.unit.translate(domain.did, BASE + M2, True)  # served by the IOTLB, which says D is set already
    assert LeafBitScan(domain.table, BASE + M2, K4, bitmap, Gather()).run() == 0
    domain.flush(gather)
    domain.unit.translate(domain.did, BASE + M2, True)
    assert LeafBitScan(domain.table, BASE + M2, K4, bitmap, Gather()).run() == 1


def test_tracking_starts_clean_and_stops() -> None:
    _, domain = tracked()
    domain.unit.translate(domain.did, BASE, True)
    domain.set_dirty_tracking(False)
    domain.set_dirty_tracking(True)
    bitmap = array("Q", [0] * 8)
    assert domain.read_and_clear_dirty(BASE, M2, bitmap) == 0
    domain.set_dirty_tracking(False)
    domain.unit.translate(domain.did, BASE, True)
    assert domain.read_and_clear_dirty(BASE, M2, bitmap) == 0


def test_bitmap_pages_larger_than_leaves_are_dirty_when_any_leaf_is() -> None:
    _, domain = tracked()
    domain.unit.translate(domain.did, BASE + M2 + 5 * K4, True)
    bitmap = np.zeros(1, dtype=np.uint64)
    assert domain.read_and_clear_dirty(BASE, 2 * M2, bitmap, page_size=M2) == 1
    assert bitmap[0] == 2


def test_accessed_bits_are_read_the_same_way() -> None:
    _, domain = tracked()
    domain.unit.translate(domain.did, BASE + M2 + K4, False)
    bitmap = array("Q", [0])
    assert LeafBitScan(domain.table, BASE + M2, 8 * K4, bitmap, Gather(), accessed=True).run() == 1
    assert bits_of(bitmap) == {1}


def test_the_first_stage_format_does_not_track() -> None:
    world = World()
    domain = world.domain(X86_64())
    assert not domain.capabilities.dirty
    for call in (
        lambda: domain.set_dirty_tracking(True),
        lambda: domain.read_and_clear_dirty(0, K4, array("Q", [0])),
    ):
        with pytest.raises(UnsupportedError, match=r"^x86_64 tables do not track dirty pages; vtdss \(second stage\)"):
            call()


@pytest.mark.parametrize(
    ("iova", "size", "bits", "page", "flags", "message"),
    [
        (K4, K4, 64, 3000, 0, r"^page_size=3000: must be a power of two from 4096$"),
        (K4, M2, 64, M2, 0, r"^iova=0x1000, size=0x200000: must be multiples of page_size=0x200000, size above 0$"),
        (0, 0, 64, K4, 0, r"^iova=0x0, size=0x0: must be multiples of page_size=0x1000, size above 0$"),
        (1 << 48, K4, 64, K4, 0, r"^\[0x1000000000000, 0x1000000001000\): ends above the aperture 0xffffffffffff$"),
        (0, 65 * K4, 64, K4, 0, r"^bitmap of 64 bits: 65 pages need as many bits$"),
        (0, K4, 64, K4, 6, r"^flags=0x6: the only flag is 0x1 \(no clear\)$"),
    ],
)
def test_bad_requests_name_their_rule(iova: int, size: int, bits: int, page: int, flags: int, message: str) -> None:
    table = World().table()
    with pytest.raises(MisuseError, match=message):
        LeafBitScan(table, iova, size, array("Q", [0] * (bits // 64)), Gather(), page_size=page, flags=flags)
    with pytest.raises(MisuseError, match=r"^bitmap: must be a contiguous buffer of unsigned 64-bit words$"):
        LeafBitScan(table, 0, K4, array("I", [0]), Gather())
