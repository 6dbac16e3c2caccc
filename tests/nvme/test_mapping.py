"""Which path a request takes, PRP or SGL, the command's pointers, and that nothing is left behind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.block_device import BlockDevice

from dmakit.block.limits import QueueLimits
from dmakit.block.request import Op, Request
from dmakit.block.status import BlkStatus
from dmakit.consts import (
    L_BOOKKEEPING_BYTES,
    L_DESCRIPTORS,
    L_PASSES,
    P2P_MAP_BUS_ADDR,
    P2P_MAP_NOT_SUPPORTED,
    PSDT_PRP,
    PSDT_SGL_METABUF,
    PSDT_SGL_METASEG,
    SGL_FORCED,
    SGL_SUPPORTED,
    SGL_UNSUPPORTED,
)
from dmakit.dma.device import Device
from dmakit.errors import MisuseError
from dmakit.ledger import Ledger
from dmakit.nvme.iod import FAST_PATHS, PATHS, Iod
from dmakit.nvme.mapping import RequestMapper
from dmakit.nvme.pool import LARGE_BYTES, SMALL_BYTES, DescriptorPool, PlainSource
from dmakit.nvme.prp import PrpWalker
from dmakit.nvme.sgl import SglWalker
from dmakit.platform.soft import Machine
from dmakit.reasons import Reason

PAGES = [(at * 0x3000, 4096) for at in range(1, 33)]
GAPPED = [(0x3000, 4096), (0x9200, 512), (0x20000, 4096)]


class Bench:
    """A mapper on a fake device, with everything needed to look into its lists."""

    def __init__(self, device: BlockDevice | None = None, **options: object) -> None:
        self.device = device or BlockDevice()
        self.ledger = Ledger()
        self.small = DescriptorPool(PlainSource(1 << 32), SMALL_BYTES, ledger=self.ledger, fail=self.device.fail)
        self.large = DescriptorPool(PlainSource(2 << 32), LARGE_BYTES, ledger=self.ledger, fail=self.device.fail)
        self.mapper = RequestMapper(
            self.device, self.small, self.large, ledger=self.ledger, **{"sgl_supported": True, **options}
        )

    def words(self, addr: int, count: int) -> bytes:
        for block in self.small.blocks + self.large.blocks:
            if block.addr <= addr < block.addr + block.size:
                at = (addr - block.addr) >> 3
                return bytes(block.words[at : at + count])
        raise AssertionError(f"{addr:#x} is in no block")

    def ranges(self, iod: Iod) -> list[tuple[int, int]]:
        """What a controller would read from the command."""
        size = iod.request.payload_bytes
        if iod.psdt == PSDT_PRP:
            walker = PrpWalker()
            walker.begin(iod.low, iod.high, size)
            while walker.list_entries:
                walker.list_words(self.words(walker.list_addr, walker.list_entries))
        else:
            walker = SglWalker()
            walker.begin(iod.low, iod.high, size, to_host=True)
            while walker.segment_bytes:
                walker.segment(self.words(walker.segment_addr, walker.segment_bytes >> 3))
        assert walker.status == 0
        return walker.ranges

    def memory(self, iod: Iod) -> list[tuple[int, int]]:
        """The command's ranges in physical terms, through the device's live mappings."""
        table = []
        for addr, (phys, size) in self.device.mapped.items():
            table.append((addr, phys, size))
        for window in self.device.windows:
            table += [(window.addr + offset, phys, size) for offset, phys, size in window.linked]
        found: list[tuple[int, int]] = []
        for addr, length in self.ranges(iod):
            while length:
                start, phys, size = next(t for t in table if t[0] <= addr < t[0] + t[2])
                take = min(length, start + size - addr)
                if found and sum(found[-1]) == phys + addr - start:
                    found[-1] = (found[-1][0], found[-1][1] + take)
                else:
                    found.append((phys + addr - start, take))
                addr, length = addr + take, length - take
        return found

    def done(self) -> bool:
        return self.device.clean() and self.small.used == self.large.used == 0


@pytest.mark.parametrize(
    ("bvecs", "sgl", "psdt", "pointers"),
    [
        ([(0x5000, 4096)], True, PSDT_PRP, 1),
        ([(0x5000, 8192)], True, PSDT_PRP, 2),
        ([(0x5E00, 512)], True, PSDT_PRP, 1),
        ([(0x5E00, 4096)], False, PSDT_PRP, 2),
        ([(0x5E00, 8192)], True, PSDT_SGL_METABUF, 1),
        ([(0x100000, 131072)], True, PSDT_SGL_METABUF, 1),
    ],
)
def test_one_segment_is_one_map(bvecs: list[tuple[int, int]], sgl: bool, psdt: int, pointers: int) -> None:
    bench = Bench(sgl_supported=sgl)
    iod = bench.mapper.map(Request(Op.READ, bvecs))
    assert (iod.path_name, iod.reason, iod.psdt, iod.entries) == ("map_phys", Reason.SINGLE_SEGMENT, psdt, pointers)
    assert [entry[0] for entry in bench.device.log] == ["map"] and iod.bookkeeping_bytes == 0
    assert bench.memory(iod) == bvecs
    if psdt == PSDT_PRP:
        assert (iod.high != 0) == (pointers == 2)
    bench.mapper.unmap(iod)
    assert bench.done() and bench.device.calls("unmap") == 1


def test_one_long_segment_without_sgl_goes_through_a_window() -> None:
    bench = Bench(sgl_supported=False)
    iod = bench.mapper.map(Request(Op.READ, [(0x100000, 131072)]))
    assert (iod.path_name, iod.reason) == ("two-step", Reason.SINGLE_SEGMENT_TOO_LONG_FOR_PRP)
    assert bench.memory(iod) == [(0x100000, 131072)]
    assert [b.size for b in bench.mapper.prp.blocks(iod.chain)] == [SMALL_BYTES]
    bench.mapper.unmap(iod)
    assert bench.done()


def test_scattered_pages_become_one_descriptor() -> None:
    bench = Bench()
    iod = bench.mapper.map(Request(Op.READ, PAGES))
    assert (iod.path_name, iod.reason, iod.psdt, iod.entries) == ("two-step", Reason.COALESCED, PSDT_SGL_METABUF, 1)
    assert bench.memory(iod) == PAGES and iod.bookkeeping_bytes == 16
    assert [bench.ledger.counts[row] for row in (L_DESCRIPTORS, L_BOOKKEEPING_BYTES, L_PASSES)] == [1, 16, 1]
    bench.mapper.unmap(iod)
    assert bench.done()


def test_the_same_pages_on_a_prp_controller() -> None:
    bench = Bench(sgl_supported=False)
    iod = bench.mapper.map(Request(Op.READ, PAGES))
    assert (iod.path_name, iod.psdt, iod.entries) == ("two-step", PSDT_PRP, 32)
    addresses = [addr for addr, _ in bench.ranges(iod)]
    assert len(addresses) == 1 and bench.memory(iod) == PAGES
    bench.mapper.unmap(iod)
    assert bench.done()


class TestChoice:
    def choose(self, request: Request, *, admin: bool = False, **options: object) -> int:
        return Bench(**options).mapper.use_sgls(request, admin=admin)

    def test_forced(self) -> None:
        assert self.choose(Request(Op.READ, GAPPED)) == SGL_FORCED
        assert self.choose(Request(Op.READ, [(0x1000, 512)], user_command=True)) == SGL_FORCED
        integrity = [(0x8000, 8), (0x9008, 8)]
        assert self.choose(Request(Op.READ, [(0x1000, 1024)], integrity=integrity)) == SGL_FORCED

    def test_supported_and_not(self) -> None:
        assert self.choose(Request(Op.READ, PAGES)) == SGL_SUPPORTED
        assert self.choose(Request(Op.READ, GAPPED), admin=True) == SGL_UNSUPPORTED
        assert self.choose(Request(Op.READ, GAPPED), sgl_supported=False) == SGL_UNSUPPORTED

    @pytest.mark.parametrize(
        ("threshold", "bvecs", "coalesced", "psdt"),
        [
            (32768, PAGES[:8], True, PSDT_SGL_METABUF),
            (32768, PAGES[:7], True, PSDT_PRP),
            (0, PAGES, True, PSDT_PRP),
            (32768, PAGES, False, PSDT_PRP),
            (4096, PAGES, False, PSDT_SGL_METABUF),
            (4097, PAGES, False, PSDT_PRP),
        ],
    )
    def test_by_average_range(self, threshold: int, bvecs: list[tuple[int, int]], coalesced: bool, psdt: int) -> None:
        bench = Bench(BlockDevice(windows=coalesced), sgl_threshold=threshold)
        iod = bench.mapper.map(Request(Op.READ, bvecs))
        assert iod.psdt == psdt and bench.memory(iod) == bvecs
        bench.mapper.unmap(iod)
        assert bench.done()


def test_a_gap_is_described_by_sgl_segment_by_segment() -> None:
    bench = Bench()
    iod = bench.mapper.map(Request(Op.READ, GAPPED))
    assert (iod.path_name, iod.reason, iod.psdt) == ("per-segment", Reason.GAP_IN_MERGE_BOUNDARY, PSDT_SGL_METABUF)
    assert bench.memory(iod) == GAPPED and (iod.entries, iod.bookkeeping_bytes) == (3, 0)
    bench.mapper.unmap(iod)
    assert bench.done() and bench.device.calls("unmap") == 3


def test_a_gap_on_a_prp_controller_fails_cleanly() -> None:
    """The queue's virtual boundary keeps such requests away; one that comes anyway is an I/O error."""
    bench = Bench(sgl_supported=False)
    iod = bench.mapper.map(Request(Op.READ, GAPPED))
    assert (iod.status, iod.path_name, iod.reason) == (BlkStatus.IOERR, "failed", Reason.MALFORMED_SEGMENTS)
    assert bench.done()


def test_vectors_are_kept_only_where_unmapping_needs_them() -> None:
    for needs, kept in ((True, 32 * 16), (False, 0)):
        bench = Bench(BlockDevice(translating=False), sgl_supported=False)
        bench.device.needs_unmap = needs
        iod = bench.mapper.map(Request(Op.READ, PAGES))
        assert (iod.path_name, iod.reason, iod.bookkeeping_bytes) == ("per-segment", Reason.NO_IOMMU, kept)
        bench.mapper.unmap(iod)
        assert bench.device.calls("unmap") == (32 if needs else 0) and bench.done()


def test_no_data() -> None:
    bench = Bench()
    iod = bench.mapper.map(Request(Op.FLUSH))
    assert (iod.path_name, iod.reason, bench.device.log) == ("no-data", Reason.NO_DATA, [])
    bench.mapper.unmap(iod)
    assert bench.device.log == []


class Peer:
    def __init__(self, kind: int) -> None:
        self.kind, self.bus_offset = kind, 1 << 36

    def reset(self) -> None:
        pass

    def map_type(self, phys: int) -> int:
        return self.kind


def test_peer_memory_takes_no_short_cut() -> None:
    bench = Bench(peer=Peer(P2P_MAP_BUS_ADDR))
    iod = bench.mapper.map(Request(Op.READ, [(0x5000, 4096)]))
    assert (iod.path_name, iod.reason, bench.device.log) == ("bus", Reason.P2P_BUS, [])
    assert bench.ranges(iod) == [(0x5000 + (1 << 36), 4096)]
    bench.mapper.unmap(iod)
    assert bench.device.log == []


def test_a23_unsupported_peer_is_block_status_invalid_and_nothing_is_mapped() -> None:
    for bvecs in ([(0x5000, 4096)], PAGES):
        bench = Bench(peer=Peer(P2P_MAP_NOT_SUPPORTED))
        iod = bench.mapper.map(Request(Op.READ, bvecs))
        assert (iod.status, iod.path_name, iod.reason) == (BlkStatus.INVAL, "failed", Reason.P2P_NOT_SUPPORTED)
        assert bench.device.log == [] and bench.done()


class TestMetadata:
    def test_one_segment_goes_to_mptr(self) -> None:
        bench = Bench()
        iod = bench.mapper.map(Request(Op.WRITE, [(0x5000, 4096)], integrity=[(0x9040, 64)]))
        assert bench.device.mapped[iod.mptr] == (0x9040, 64) and iod.psdt == PSDT_PRP
        bench.mapper.unmap(iod)
        assert bench.done()

    def test_several_segments_become_a_list(self) -> None:
        bench = Bench(meta_sgl_supported=True)
        pieces = [(0x9040, 64), (0xB000, 8), (0xD010, 8)]
        iod = bench.mapper.map(Request(Op.WRITE, PAGES, integrity=pieces))
        assert iod.psdt == PSDT_SGL_METASEG and iod.mptr == iod.meta_block.addr
        walker = SglWalker()
        walker.begin(iod.meta_block.words[0], iod.meta_block.words[1], 80, to_host=False, metadata=True)
        walker.segment(bench.words(walker.segment_addr, walker.segment_bytes >> 3))
        assert [bench.device.mapped[addr] for addr, _ in walker.ranges] == pieces
        bench.mapper.unmap(iod)
        assert bench.done()

    def test_user_command_gets_an_explicit_length(self) -> None:
        bench = Bench(meta_sgl_supported=True)
        iod = bench.mapper.map(Request(Op.DRV_OUT, [(0x5000, 4096)], integrity=[(0x9040, 8)], user_command=True))
        assert iod.psdt == PSDT_SGL_METASEG and iod.meta_block.words[1] == 8
        bench.mapper.unmap(iod)
        assert bench.done()

    def test_several_segments_without_metadata_sgls_fail(self) -> None:
        bench = Bench()
        iod = bench.mapper.map(Request(Op.WRITE, PAGES, integrity=[(0x9040, 64), (0xB000, 8)]))
        assert (iod.status, bench.done()) == (BlkStatus.IOERR, True)


pieces = st.lists(
    st.tuples(st.integers(1, 4000), st.integers(0, 7), st.integers(1, 40)).map(
        lambda t: (t[0] * 4096 + t[1] * 512, t[2] * 512)
    ),
    min_size=1,
    max_size=40,
)


@given(pieces, st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=200)
def test_whatever_the_path_the_command_describes_the_requests_memory(
    bvecs: list[tuple[int, int]], translating: bool, windows: bool, user: bool
) -> None:
    bench = Bench(BlockDevice(translating=translating, windows=windows))
    request = Request(Op.READ, bvecs, user_command=user)
    iod = bench.mapper.map(request)
    assert iod.status == 0 and iod.path_name in PATHS[:5]
    expected: list[tuple[int, int]] = []
    for phys, length in bvecs:
        if expected and sum(expected[-1]) == phys:
            expected[-1] = (expected[-1][0], expected[-1][1] + length)
        else:
            expected.append((phys, length))
    if translating:
        assert bench.memory(iod) == expected
    else:
        joined: list[tuple[int, int]] = []
        for phys, length in bench.ranges(iod):
            if joined and sum(joined[-1]) == phys:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((phys, length))
        assert joined == expected
    if iod.path_name == "per-segment" and translating and windows:
        assert iod.reason == Reason.GAP_IN_MERGE_BOUNDARY
    assert (iod.path_name in FAST_PATHS) == (iod.path_name != "per-segment")
    bench.mapper.unmap(iod)
    assert bench.done()


@pytest.mark.parametrize("sgl", [True, False])
@pytest.mark.parametrize("windows", [True, False])
@pytest.mark.parametrize("shape", ["single", "pages", "gap"])
def test_no_failure_leaves_anything(sgl: bool, windows: bool, shape: str) -> None:
    bvecs = {"single": [(0x5000, 4096)], "pages": PAGES[:5], "gap": GAPPED}[shape]
    integrity = [(0x90040, 64), (0xB0000, 8)] if sgl else [(0x90040, 64)]
    for nth in range(60):
        bench = Bench(BlockDevice(windows=windows), sgl_supported=sgl, meta_sgl_supported=sgl, sgl_threshold=4096)
        bench.device.fail.arm(nth)
        iod = bench.mapper.map(Request(Op.WRITE, bvecs, integrity=integrity))
        fired = bench.device.fail.fired
        bench.device.fail.disarm()
        if iod.status != 0:
            assert iod.path_name == "failed" and (fired or (shape == "gap" and not sgl))
            assert bench.ledger.counts[L_DESCRIPTORS] == 0
        else:
            bench.mapper.unmap(iod)
        assert bench.done()
        if not fired:
            return
    raise AssertionError("the sweep did not end")


def test_bad_options() -> None:
    with pytest.raises(MisuseError, match=r"^sgl_threshold=-1: must lie in \[0, 2\^32\)$"):
        Bench(sgl_threshold=-1)
    many = Request(Op.READ, [(at << 13, 512) for at in range(1, 300)], limits=QueueLimits(max_segments=512))
    with pytest.raises(MisuseError, match=r"^request of 299 segments: an NVMe queue takes at most 256$"):
        Bench().mapper.map(many)


class Foreign:
    """A device of somebody else's making: the same calls, by their public names only."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def __getattr__(self, name: str) -> object:
        return getattr(self.device, name)


@pytest.mark.parametrize("options", [{}, {"trusted": False}, {"mask": (1 << 24) - 1}, {"identity": True}])
@pytest.mark.parametrize("sgl", [False, True])
def test_typed_calls_answer_and_count_as_the_public_ones(options: dict[str, object], sgl: bool) -> None:
    """The mapper calls a ``Device`` of ours by its internals; a foreign one by the interface."""
    seen = []
    for hide in (False, True):
        machine = Machine(ram="64M", swiotlb="1M", mode="strict", seed=3)
        device = machine.device("nvme0", min_align_mask=4095, **options)
        pages = sorted(machine.pages.alloc() for _ in range(64))
        small, large = (DescriptorPool(PlainSource(n << 40), size, ledger=machine.ledger, fail=machine.fail)
                        for n, size in ((1, SMALL_BYTES), (2, LARGE_BYTES)))  # fmt: skip
        mapper = RequestMapper(
            Foreign(device) if hide else device, small, large, ledger=machine.ledger, sgl_supported=sgl
        )
        answers = []
        for n, pieces in enumerate((
            [(pages[3] + 512, 1024)], [(pages[0], 4096)], [(page, 4096) for page in pages[::2]],
            [(pages[1], 4096), (pages[5] + 512, 512), (pages[9], 4096)], [(pages[7], 4096), (pages[7] + 8192, 4096)],
            [(1 << 50, 4096)], [(1 << 50, 4096), (1 << 51, 512), (1 << 52, 4096)],
        )):  # fmt: skip
            limits = QueueLimits(virt_boundary_mask=0)
            request = Request(Op.READ if n % 2 else Op.WRITE, pieces, limits=limits)
            iod = mapper.map(request)
            answers.append((iod.status, iod.path_name, iod.reason, iod.low, iod.high, iod.entries, str(iod.error)))
            if iod.status == 0:
                mapper.unmap(iod)
        seen.append((answers, machine.ledger.snapshot(), machine.live()))
        machine.close()
    assert seen[0] == seen[1]
    assert {status for status, *_ in seen[0][0]} >= {0}


@pytest.mark.parametrize("entries", [(1 << 31) - 1, SMALL_BYTES // 16 + 1, -1])
def test_a_count_that_the_list_block_cannot_hold_is_refused(entries: int) -> None:
    """``entries`` says how much of the block unmap reads: what a caller wrote there is looked at first."""
    bench = Bench()
    iod = bench.mapper.map(Request(Op.READ, GAPPED))
    assert (iod.path_name, iod.entries) == ("per-segment", 3)
    iod.entries = entries
    with pytest.raises(MisuseError, match=rf"^chain=2, entries={entries}: no list block that holds so many$"):
        bench.mapper.unmap(iod)
    iod.entries = 3
    bench.mapper.unmap(iod)
    assert bench.done()
    iod.path = 1 << 30
    with pytest.raises(MisuseError, match=rf"^path={1 << 30}: must be from 0 to {len(PATHS) - 1}$"):
        assert iod.path_name
