"""Entries bit for bit as the two formats define them."""

from __future__ import annotations

import pytest

from dmakit.errors import MisuseError, UnsupportedError
from dmakit.iommu.formats.vtdss import VtdSecondStage
from dmakit.iommu.formats.x86_64 import X86_64
from dmakit.iommu.gather import Gather
from tests.iommu.world import G1, K4, M2, RW, R, W, World, entry

BIT = [1 << n for n in range(64)]


@pytest.mark.parametrize(("prot", "bits"), [(R, BIT[0]), (W, BIT[1]), (RW, BIT[0] | BIT[1])])
def test_vtdss_leaves_carry_only_read_and_write(prot: int, bits: int) -> None:
    table = World().table()
    for iova, size, level, large in ((M2 + K4, K4, 1, 0), (4 * M2, M2, 2, BIT[7]), (3 * G1, G1, 3, BIT[7])):
        assert table.map(iova, iova, size, prot, Gather()) == 0
        assert entry(table, iova, level) == iova | bits | large


@pytest.mark.parametrize(
    ("prot", "bits"), [(R, BIT[0] | BIT[2] | BIT[5]), (RW, BIT[0] | BIT[1] | BIT[2] | BIT[5] | BIT[6])]
)
def test_x86_64_leaves_are_written_accessed_and_dirty(prot: int, bits: int) -> None:
    table = World().table(X86_64())
    for iova, size, level, large in ((M2 + K4, K4, 1, 0), (4 * M2, M2, 2, BIT[7]), (3 * G1, G1, 3, BIT[7])):
        assert table.map(iova, iova, size, prot, Gather()) == 0
        assert entry(table, iova, level) == iova | bits | large


@pytest.mark.parametrize(("coherent", "vtdss", "x86"), [(True, 0x003, 0x027), (False, 0x403, 0x827)])
def test_table_entries_and_the_bit_that_remembers_their_flush(coherent: bool, vtdss: int, x86: int) -> None:
    for fmt, low in ((VtdSecondStage(), vtdss), (X86_64(), x86)):
        table = World().table(fmt, coherent=coherent)
        assert table.map(K4, K4, K4, RW, Gather()) == 0
        assert [entry(table, K4, level) & 0xFFF for level in (4, 3, 2)] == [low] * 3


def test_a_domain_that_forces_snooping_sets_it_in_leaves_only() -> None:
    table = World().table(VtdSecondStage(force_snoop=True))
    table.map(K4, K4, K4, R, Gather())
    assert entry(table, K4, 1) == K4 | BIT[0] | BIT[11]
    assert entry(table, K4, 2) & BIT[11] == 0


@pytest.mark.parametrize(("levels", "bits"), [(3, 39), (4, 48), (5, 57)])
def test_apertures(levels: int, bits: int) -> None:
    assert VtdSecondStage().aperture_last(levels) == (1 << bits) - 1
    assert X86_64().aperture_last(levels) == (1 << (bits - 1)) - 1


def test_impossible_formats_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"^levels=6: vtdss tables have 3 to 5 levels$"):
        World().table(levels=6)
    with pytest.raises(MisuseError, match=r"^page_sizes=0x200000: must hold 0x1000 and at most 0x200000 and 0x40"):
        X86_64(page_sizes=M2)
    with pytest.raises(MisuseError, match=r"^output_bits=53: a physical address has 32 to 52 bits$"):
        VtdSecondStage(output_bits=53)
