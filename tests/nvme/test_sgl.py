"""SGLs against an independent model, and every error status of the reader."""

from __future__ import annotations

import struct
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmakit.errors import ExhaustedError, MisuseError
from dmakit.failpoint import FailPoint
from dmakit.ledger import Ledger
from dmakit.nvme.pool import LARGE_BYTES, SMALL_BYTES, DescriptorPool, PlainSource
from dmakit.nvme.sgl import BIT_BUCKET, SglWalker, SglWriter
from dmakit.nvme.spec import Status

Range = tuple[int, int]
DATA, BUCKET, SEGMENT, LAST = 0x00, 0x10, 0x20, 0x30


def pools(fail: FailPoint | None = None) -> tuple[DescriptorPool, DescriptorPool]:
    ledger, fail = Ledger(), fail or FailPoint()
    return tuple(DescriptorPool(PlainSource(start), size, ledger=ledger, fail=fail) for start, size in (
        (1 << 32, SMALL_BYTES), (2 << 32, LARGE_BYTES)))  # fmt: skip


def descriptor(kind: int, addr: int, length: int) -> bytes:
    """The 16 bytes of the specification's figure: address, length, three reserved bytes, identifier."""
    return struct.pack("<QI3xB", addr, length, kind)


def words(raw: bytes) -> tuple[int, int]:
    return struct.unpack("<QQ", raw)


@given(st.lists(st.tuples(st.integers(0, 1 << 48), st.integers(1, 1 << 20)), min_size=1, max_size=256))
@settings(max_examples=60)
def test_e5_sgl_lists_equal_the_reference_and_decode_again(ranges: list[Range]) -> None:
    small, large = pools()
    writer = SglWriter(small, large)
    low, high, chain = writer.build(ranges)
    expected = b"".join(descriptor(DATA, addr, length) for addr, length in ranges)
    command = struct.pack("<QQ", low, high)
    if len(ranges) == 1:
        assert command == expected and chain == 0
    else:
        (block,) = writer.blocks(chain)
        assert block.size == (SMALL_BYTES if len(ranges) <= 16 else LARGE_BYTES)
        assert command == descriptor(LAST, block.addr, len(expected))
        assert bytes(memoryview(block.words).cast("B"))[: len(expected)] == expected
    walker = SglWalker()
    walker.begin(low, high, sum(length for _, length in ranges), to_host=True)
    if walker.segment_bytes:
        walker.segment(expected)
    assert walker.status == 0 and walker.ranges == ranges
    writer.drop(chain)
    assert small.used == large.used == 0


def test_a_coalesced_request_has_one_inline_descriptor() -> None:
    writer = SglWriter(*pools())
    writer.begin(32, coalesced=True)
    writer.feed(0xFFF60000, 131072)
    assert (writer.low, writer.high, writer.chain) == (0xFFF60000, 131072, 0)
    with pytest.raises(MisuseError, match=r"^SGL: more ranges than the 1 announced$"):
        writer.feed(0x1000, 16)


def test_batch_equals_scalar() -> None:
    requests = [[(0x1000, 512)], [(0x2000, 100), (0x9000, 8), (0xB001, 3)], [(at << 16, 4096) for at in range(1, 40)]]
    flat = [r for ranges in requests for r in ranges]
    bounds = [0]
    for ranges in requests:
        bounds.append(bounds[-1] + len(ranges))
    out = memoryview(array("Q", bytes(16 * len(requests))))
    chains = array("Q", bytes(8 * len(requests)))
    batch = SglWriter(*pools())
    batch.build_batch(
        memoryview(array("Q", [a for a, _ in flat])),
        memoryview(array("Q", [n for _, n in flat])),
        memoryview(array("Q", bounds)),
        out,
        chains,
    )
    for at, ranges in enumerate(requests):
        writer = SglWriter(*pools())
        low, high, single = writer.build(ranges)
        assert [out[2 * at], out[2 * at + 1]] == [low, high]
        assert [bytes(b.words[: 2 * len(ranges)]) for b in batch.blocks(chains[at])] == [
            bytes(b.words[: 2 * len(ranges)]) for b in writer.blocks(single)
        ]


def test_batch_gives_every_block_back_on_error() -> None:
    small, large = pools()
    arguments = [
        memoryview(array("Q", [1 << 16, 2 << 16, 3 << 16])),
        memoryview(array("Q", [512, 512, 0])),
        memoryview(array("Q", [0, 2, 3])),
        memoryview(array("Q", bytes(32))),
        array("Q", bytes(16)),
    ]
    rule = r"^SGL: request 1: it must have 1 to 256 ranges of 1 to 2\^32 - 1 bytes below 2\^63$"
    with pytest.raises(MisuseError, match=rule):
        SglWriter(small, large).build_batch(*arguments)
    assert small.used == large.used == 0


@pytest.mark.parametrize("how", ["build", "pool", "batch"])
def test_a_refused_request_leaves_the_one_being_written(how: str) -> None:
    fail = FailPoint()
    small, large = pools(fail)
    writer = SglWriter(small, large)
    ranges = [(at << 16, 512 + at) for at in range(20)]
    writer.begin(len(ranges))
    for addr, length in ranges[:7]:
        writer.feed(addr, length)
    if how == "build":
        with pytest.raises(MisuseError, match=r"^SGL: range \(addr=0x20000, length=0\)"):
            writer.build([(1 << 16, 512), (2 << 16, 0)])
    elif how == "pool":
        fail.arm(0)
        with pytest.raises(ExhaustedError, match=r"no memory$"):
            writer.build(ranges[:3])
    else:
        with pytest.raises(MisuseError, match=r"^SGL: request 1"):
            writer.build_batch(
                *(memoryview(array("Q", a)) for a in ([1, 2, 3], [4, 4, 0], [0, 2, 3], [0] * 4, [0] * 2))
            )
    for addr, length in ranges[7:]:
        writer.feed(addr, length)
    assert list(writer.blocks(writer.chain)[0].words[:40]) == [word for pair in ranges for word in pair]
    assert (small.used, large.used, writer.entries) == (0, 1, 20)


def read(
    command: bytes, size: int, *segments: bytes, to_host: bool = True, metadata: bool = False, **caps: bool
) -> SglWalker:
    """Read a command whose segments are answered in order; an unread segment is a failure of the test."""
    walker = SglWalker(**caps)
    walker.begin(*words(command), size, to_host=to_host, metadata=metadata)
    left = list(segments)
    while walker.segment_bytes:
        payload = left.pop(0)
        assert len(payload) == walker.segment_bytes
        walker.segment(payload)
    if walker.status == 0:
        assert left == []
    return walker


def data(addr: int, length: int) -> bytes:
    return descriptor(DATA, addr, length)


class TestReading:
    def test_chained_segments(self) -> None:
        first = data(0x1000, 512) + data(0x3000, 512) + descriptor(SEGMENT, 0x9000, 32)
        second = data(0x5000, 1024) + descriptor(LAST, 0xA000, 16)
        walker = read(descriptor(SEGMENT, 0x8000, 48), 4096, first, second, data(0x7000, 2048))
        assert walker.status == 0
        assert walker.ranges == [(0x1000, 512), (0x3000, 512), (0x5000, 1024), (0x7000, 2048)]

    def test_empty_data_blocks_are_allowed(self) -> None:
        walker = read(descriptor(LAST, 0x8000, 32), 512, data(0, 0) + data(0x1000, 512))
        assert (walker.status, walker.ranges) == (0, [(0x1000, 512)])

    def test_bit_bucket(self) -> None:
        segment = data(0x1000, 512) + descriptor(BUCKET, 0, 1024) + data(0x2000, 512)
        walker = read(descriptor(LAST, 0x8000, 48), 2048, segment, bit_bucket=True)
        assert walker.ranges == [(0x1000, 512), (BIT_BUCKET, 1024), (0x2000, 512)]
        walker = read(descriptor(LAST, 0x8000, 48), 1024, segment, bit_bucket=True, to_host=False)
        assert (walker.status, walker.ranges) == (0, [(0x1000, 512), (0x2000, 512)])
        walker = read(descriptor(LAST, 0x8000, 48), 2048, segment)
        assert walker.status == int(Status.SGL_DESCRIPTOR_TYPE_INVALID)

    @pytest.mark.parametrize(
        ("command", "segments", "status"),
        [
            (descriptor(0x40, 0x1000, 512), (), Status.SGL_DESCRIPTOR_TYPE_INVALID),
            (descriptor(0x01, 0x1000, 512), (), Status.SGL_DESCRIPTOR_TYPE_INVALID),
            (descriptor(LAST, 0x8000, 0), (), Status.INVALID_SGL_SEGMENT),
            (descriptor(LAST, 0x8000, 24), (), Status.INVALID_SGL_SEGMENT),
            (descriptor(LAST, 0x8004, 16), (), Status.INVALID_SGL_SEGMENT),
            (descriptor(LAST, 0x8000, 16), (descriptor(LAST, 0x9000, 16),), Status.INVALID_SGL_SEGMENT),
            (descriptor(LAST, 0x8000, 16), (descriptor(SEGMENT, 0x9000, 16),), Status.INVALID_SGL_SEGMENT),
            (descriptor(SEGMENT, 0x8000, 16), (data(0x1000, 512),), Status.INVALID_SGL_SEGMENT),
            (
                descriptor(SEGMENT, 0x8000, 32),
                (descriptor(LAST, 0x9000, 16) + data(0x1000, 512),),
                Status.INVALID_NUMBER_OF_SGL_DESCRIPTORS,
            ),
            (data(0x1000, 511), (), Status.DATA_SGL_LENGTH_INVALID),
            (data(0x1000, 513), (), Status.DATA_SGL_LENGTH_INVALID),
            (descriptor(LAST, 0x8000, 32), (data(0x1000, 256) + data(0x2000, 100),), Status.DATA_SGL_LENGTH_INVALID),
        ],
    )
    def test_every_error(self, command: bytes, segments: tuple[bytes, ...], status: Status) -> None:
        walker = read(command, 512, *segments)
        assert walker.status == int(status) and walker.segment_bytes == 0

    def test_metadata_has_its_own_length_status(self) -> None:
        assert read(data(0x1000, 4), 8, metadata=True).status == int(Status.METADATA_SGL_LENGTH_INVALID)

    def test_granularity(self) -> None:
        for raw in (data(0x1002, 512), data(0x1000, 510)):
            assert read(raw, 510, dword=True).status == int(Status.SGL_DATA_BLOCK_GRANULARITY_INVALID)
        assert read(data(0x1002, 510), 510).status == 0

    def test_more_than_the_data_where_the_controller_takes_it(self) -> None:
        assert read(data(0x1000, 4096), 512, longer=True).ranges == [(0x1000, 512)]

    def test_a_loop_of_segments_ends(self) -> None:
        loop = descriptor(SEGMENT, 0x8000, 16)
        walker = SglWalker()
        walker.begin(*words(loop), 512, to_host=True)
        reads = 0
        while walker.segment_bytes:
            walker.segment(loop)
            reads += 1
        assert walker.status == int(Status.INVALID_NUMBER_OF_SGL_DESCRIPTORS)
        assert reads == 65536

    def test_wrong_answer_is_refused(self) -> None:
        walker = SglWalker()
        walker.begin(*words(descriptor(LAST, 0x8000, 32)), 512, to_host=True)
        with pytest.raises(MisuseError, match=r"^SGL segment: 16 bytes given, 32 asked for$"):
            walker.segment(bytes(16))
