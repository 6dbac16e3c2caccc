"""Requests, gaps, merging and splitting against plain models."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmakit.block.bio import Bio, split
from dmakit.block.limits import NO_BOUNDARY, UNLIMITED, QueueLimits, nvme_limits
from dmakit.block.request import Op, Request
from dmakit.block.status import BlkStatus, errno_to_blk_status
from dmakit.errors import MisuseError

PAGE = 4096
Piece = tuple[int, int]


def merged(bvecs: list[Piece], limits: QueueLimits) -> list[Piece]:
    """The segment list, byte by byte: a new segment starts where memory jumps, a boundary is met, one is full, or
    where the bvec that begins here would not fit as a whole."""
    segments: list[list[int]] = []
    boundary = limits.seg_boundary_mask + 1
    for phys, length in bvecs:
        done = 0
        while done < length:
            at = phys + done
            room = min(boundary - at % boundary, limits.max_segment_size, length - done)
            last = segments[-1] if segments else None
            whole = done == 0 and last is not None and last[0] + last[1] == at
            fits = last is not None and last[1] + length <= limits.max_segment_size
            same = last is not None and last[0] // boundary == (at + length - 1) // boundary
            if whole and fits and same:
                last[1] += length
                done = length
            else:
                segments.append([at, room])
                done += room
    return [(start, size) for start, size in segments]


pieces = st.lists(
    st.tuples(st.integers(1, 64), st.integers(0, 7), st.integers(1, 32)).map(
        lambda t: (t[0] * PAGE + t[1] * 512, t[2] * 512)
    ),
    min_size=1,
    max_size=20,
)
limit_sets = st.builds(
    QueueLimits,
    max_segment_size=st.sampled_from([512, 4096, 5120, 65536, UNLIMITED]),
    seg_boundary_mask=st.sampled_from([4095, 16383, 65535, NO_BOUNDARY]),
)


def adjacent(start: int, sizes: list[int]) -> list[Piece]:
    out, at = [], start
    for size in sizes:
        out.append((at, size))
        at += size
    return out


class TestSegments:
    @given(pieces, limit_sets)
    @settings(max_examples=150)
    def test_e3_bvecs_merge_when_adjacent_within_max_segment_and_boundary(
        self, bvecs: list[Piece], limits: QueueLimits
    ) -> None:
        assert Request(Op.READ, bvecs, limits=limits).data.vectors == merged(bvecs, limits)

    @given(st.lists(st.integers(1, 40).map(lambda n: n * 512), min_size=1, max_size=12), limit_sets)
    @settings(max_examples=100)
    def test_adjacent_pieces(self, sizes: list[int], limits: QueueLimits) -> None:
        bvecs = adjacent(7 * PAGE + 1024, sizes)
        assert Request(Op.WRITE, bvecs, limits=limits).data.vectors == merged(bvecs, limits)

    def test_count_is_by_bvec_and_vectors_may_be_fewer(self) -> None:
        request = Request(Op.READ, adjacent(1 << 20, [PAGE] * 8))
        assert (request.segments, request.data.vectors) == (8, [(1 << 20, 8 * PAGE)])


class TestGaps:
    @given(pieces)
    @settings(max_examples=150)
    def test_only_the_lowest_bit_is_kept(self, bvecs: list[Piece]) -> None:
        gaps = 0
        for (phys, length), (after, _) in zip(bvecs, bvecs[1:], strict=False):
            gaps |= after % PAGE | (phys % PAGE + length)
        request = Request(Op.READ, bvecs)
        lowest = (gaps & -gaps).bit_length()
        assert request.gap_bit == lowest
        assert request.gap_mask == (((1 << 64) - 1) // (1 << (lowest - 1)) * (1 << (lowest - 1)) if lowest else 0)

    def test_ends_do_not_count(self) -> None:
        assert Request(Op.READ, [(0x1200, 0xE00), (0x9000, 0x1000), (0x5000, 0x200)]).gap_mask & 4095 == 0
        assert Request(Op.READ, [(0x1200, 0x800)]).gap_mask == 0

    def test_merge_back_keeps_the_smaller_bit_and_ignores_a_contiguous_joint(self) -> None:
        left = Request(Op.READ, [(0x1000, 0x1000), (0x3000, 0x600)], sector=0)
        joined = left.merge_back(Request(Op.READ, [(0x3600, 0xA00), (0x8000, 0x1000)], sector=11))
        assert joined.gap_bit == 13 and joined.data.vectors == [(0x1000, 4096), (0x3000, 4096), (0x8000, 4096)]
        apart = left.merge_back(Request(Op.READ, [(0x9000, 0x1000)], sector=11))
        assert apart.gap_bit == 10

    def test_merge_back_refuses_what_the_queue_cannot_take(self) -> None:
        left = Request(Op.READ, [(0x1000, 0x1000)], limits=QueueLimits(max_bytes=4096))
        with pytest.raises(MisuseError, match=r"^merge: 8192 bytes in 2 segments exceed the queue's 4096 bytes in 256"):
            left.merge_back(Request(Op.READ, [(0x5000, 0x1000)], sector=8))
        with pytest.raises(MisuseError, match=r"^merge: sector 9 does not continue a request that starts at 0$"):
            left.merge_back(Request(Op.READ, [(0x5000, 0x1000)], sector=9))
        virt = QueueLimits(virt_boundary_mask=4095)
        with pytest.raises(MisuseError, match=r"^merge: gap 0x200 lies within the virtual boundary 0xfff$"):
            Request(Op.READ, [(0x1000, 0x200)], limits=virt).merge_back(Request(Op.READ, [(0x5000, 512)], sector=1))


class TestSplit:
    def test_512k_becomes_four_requests_of_128k(self) -> None:
        limits = nvme_limits(sgl_supported=True, opt_mapping_size=131072)
        bio = Bio(Op.WRITE, sector=2048).add(0x4F80000, 512 << 10)
        parts = split(bio, limits)
        assert [(r.sector, r.data.vectors) for r in parts] == [
            (2048 + at * 256, [(0x4F80000 + at * 131072, 131072)]) for at in range(4)
        ]

    def test_bio_packs_contiguous_pieces(self) -> None:
        bio = Bio(Op.READ).add(0x1000, 0x1000).add(0x2000, 0x800).add(0x8000, 0x200)
        assert bio.bvecs == [(0x1000, 0x1800), (0x8000, 0x200)]
        assert Bio(Op.READ, pack=False).add(0x1000, 0x1000).add(0x2000, 0x800).bvecs == [(0x1000, 4096), (0x2000, 2048)]

    @given(pieces, st.sampled_from([4096, 12288, 65536]), st.sampled_from([1, 2, 5, 256]), st.sampled_from([0, 4095]))
    @settings(max_examples=150)
    def test_parts_cover_the_bio_and_keep_the_limits(
        self, bvecs: list[Piece], max_bytes: int, max_segments: int, virt: int
    ) -> None:
        limits = QueueLimits(max_bytes=max_bytes, max_segments=max_segments, virt_boundary_mask=virt)
        bio = Bio(Op.READ, sector=100, pack=False)
        for piece in bvecs:
            bio.add(*piece)
        parts = split(bio, limits)
        sector = 100
        memory = []
        for part in parts:
            assert part.sector == sector
            assert 0 < part.payload_bytes <= max_bytes and part.segments <= max_segments
            sector += part.payload_bytes // 512
            memory += [phys + at for phys, length in part.data.bvecs for at in range(0, length, 512)]
            for (phys, length), (after, _) in zip(part.data.bvecs, part.data.bvecs[1:], strict=False):
                assert (after | (phys + length)) & virt == 0
        assert memory == [phys + at for phys, length in bvecs for at in range(0, length, 512)]

    def test_a_split_inside_counts_the_gap_in_front_of_the_bvec_left_out(self) -> None:
        limits = QueueLimits(max_bytes=8192)
        bio = Bio(Op.READ).add(0x1000, 0x2000).add(0x9200, 0x1000)
        front, back = split(bio, limits)
        assert front.data.bvecs == [(0x1000, 0x2000)] and front.gap_bit == 10
        assert back.data.bvecs == [(0x9200, 0x1000)] and back.gap_bit == 0

    def test_bad_bios(self) -> None:
        limits = QueueLimits(dma_alignment=3, logical_block_size=4096, physical_block_size=4096)
        with pytest.raises(MisuseError, match=r"^bio: 512 bytes are not a multiple of the 4096-byte block$"):
            split(Bio(Op.READ).add(0x1000, 512), limits)
        with pytest.raises(MisuseError, match=r"^bio: segment at 0x1002 does not start on the DMA alignment 0x3$"):
            split(Bio(Op.READ).add(0x1002, 4096), limits)
        with pytest.raises(
            MisuseError, match=r"^bio: no block-aligned part from sector 0 fits in 1 segments and 8388608"
        ):
            tight = QueueLimits(max_segments=1, logical_block_size=4096, physical_block_size=4096)
            split(Bio(Op.READ).add(0x1000, 512).add(0x8000, 3584), tight)

    def test_chunks_and_physical_blocks(self) -> None:
        limits = QueueLimits(max_bytes=131072, chunk_bytes=65536, physical_block_size=4096)
        parts = split(Bio(Op.READ, sector=3).add(0x10000, 200 * 512), limits)
        assert [(p.sector, p.payload_bytes // 512) for p in parts] == [(3, 125), (128, 75)]


class TestLimits:
    def test_nvme(self) -> None:
        plain = nvme_limits(sgl_supported=False, opt_mapping_size=131072)
        assert (plain.max_bytes, plain.virt_boundary_mask, plain.max_segments) == (131072, 4095, 256)
        sgl = nvme_limits(sgl_supported=True)
        assert (sgl.max_bytes, sgl.virt_boundary_mask) == (8 << 20, 0)
        assert nvme_limits(sgl_supported=True, admin=True).virt_boundary_mask == 4095
        assert nvme_limits(sgl_supported=True, max_transfer=524288, opt_mapping_size=1 << 40).max_bytes == 524288
        assert nvme_limits(sgl_supported=True, metadata_size=8).integrity_bytes(4096) == 64

    def test_impossible(self) -> None:
        with pytest.raises(MisuseError, match=r"^virt_boundary_mask=0x1000: must be a mask"):
            QueueLimits(virt_boundary_mask=0x1000)
        with pytest.raises(MisuseError, match=r"^logical_block_size=513: must be a power of two of at least 512$"):
            QueueLimits(logical_block_size=513)
        with pytest.raises(MisuseError, match=r"^max_bytes=256: must hold at least one logical block of 512 bytes$"):
            QueueLimits(max_bytes=256)


def test_bad_requests() -> None:
    with pytest.raises(MisuseError, match=r"^segment \(phys=0x1000, length=0\): phys must lie in"):
        Request(Op.READ, [(0x1000, 0)])
    with pytest.raises(MisuseError, match=r"^FLUSH: carries no data, but 1 segments were given$"):
        Request(Op.FLUSH, [(0x1000, 512)])
    with pytest.raises(MisuseError, match=r"^16 integrity segments: the queue takes at most 15$"):
        Request(Op.READ, [(0x1000, 512)], integrity=[(at * 8192, 8) for at in range(16)])


def test_statuses() -> None:
    assert errno_to_blk_status(-12) == BlkStatus.RESOURCE
    assert errno_to_blk_status(22) == BlkStatus.INVAL
    assert errno_to_blk_status(98) == BlkStatus.IOERR
    assert errno_to_blk_status(0) == BlkStatus.OK
