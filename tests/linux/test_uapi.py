"""The structures and numbers against what a C compiler made of the kernel's headers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dmakit.platform.linux.uapi import IOCTLS, LAYOUTS, capabilities

DUMP = Path(__file__).resolve().parents[1] / "data" / "uapi_layout.txt"
LINES = [line.split() for line in DUMP.read_text().splitlines()]
STRUCTS = {words[1]: words for words in LINES if words[0] == "S"}
NUMBERS = {words[1]: int(words[2], 16) for words in LINES if words[0] == "I"}


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_sizes_and_offsets_are_the_compilers(name: str) -> None:
    words, layout = STRUCTS[name], LAYOUTS[name]
    fields = {
        m[1]: (int(m[2]), int(m[3]))
        for m in (re.fullmatch(r"(\w+)@(\d+)\+(\d+)", word) for word in words[4:])
        if m is not None
    }
    if name == "iommu_hw_info":
        assert fields.pop("in_data_type") == fields["out_data_type"]  # a union
    assert layout.size == int(words[2])
    assert {field: (layout.offsets[field], layout.sizes[field]) for field in layout.fields} == fields


@pytest.mark.parametrize("name", sorted(IOCTLS))
def test_numbers_are_the_headers(name: str) -> None:
    assert IOCTLS[name] == NUMBERS[name]


def test_pack_counts_the_tail_and_unpack_reads_back() -> None:
    layout = LAYOUTS["vfio_irq_set"]
    data = layout.pack(b"\1\2\3\4", flags=36, index=2, start=1, count=1)
    assert len(data) == 24 and data[20:] == b"\1\2\3\4"
    fields = layout.unpack(data)
    assert (fields.argsz, fields.flags, fields.index, fields.start, fields.count) == (24, 36, 2, 1, 1)
    with pytest.raises(TypeError, match="vfio_irq_set has no field 'size'"):
        layout.pack(size=3)


def test_a_capability_chain_that_loops_ends() -> None:
    chain = bytearray(32)
    chain[8:16] = b"\1\0\1\0\x10\0\0\0"
    chain[16:24] = b"\2\0\1\0\x08\0\0\0"
    assert capabilities(chain, 8) == {1: 8, 2: 16}
    assert capabilities(chain, 0) == {} and capabilities(chain, 30) == {}
