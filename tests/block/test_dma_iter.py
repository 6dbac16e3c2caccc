"""The block DMA iterator: the decision, its reason, what is mapped, and that failures leave nothing behind."""

from __future__ import annotations

import pytest
from tests.support.block_device import BlockDevice

from dmakit.block.dma_iter import VIRT_BOUNDARY_RULE, BlkDmaIter, unmap
from dmakit.block.limits import nvme_limits
from dmakit.block.request import Op, Request
from dmakit.block.sg import SgRequest, table_bytes
from dmakit.block.status import BlkStatus
from dmakit.consts import (
    ATTR_MMIO,
    L_BOOKKEEPING_BYTES,
    L_PASSES,
    P2P_MAP_BUS_ADDR,
    P2P_MAP_NONE,
    P2P_MAP_NOT_SUPPORTED,
    P2P_MAP_THRU_HOST_BRIDGE,
)
from dmakit.errors import ExhaustedError, MisuseError
from dmakit.ledger import Ledger
from dmakit.reasons import Reason

SCATTERED = [(at * 0x3000, 4096) for at in range(1, 9)]
GAPPED = [(0x3000, 4096), (0x9200, 512), (0x20000, 4096)]


def run(request: Request, device: BlockDevice, **options: object) -> tuple[BlkDmaIter, list[tuple[int, int]]]:
    it = BlkDmaIter()
    ranges = []
    more = it.start(request, device, **options)
    while more:
        ranges.append((it.addr, it.len))
        more = it.next()
    return it, ranges


def undo(it: BlkDmaIter, device: BlockDevice, request: Request, ranges: list[tuple[int, int]]) -> None:
    if not unmap(device, it.state, it.mapped, request.direction, it.map_type):
        for addr, length in ranges:
            device.unmap_phys(addr, length, request.direction, it.attrs)


def test_coalesced_is_one_window_many_links_one_sync_one_range() -> None:
    device, request = BlockDevice(), Request(Op.READ, SCATTERED)
    it, ranges = run(request, device)
    assert (it.reason, it.status, len(ranges), ranges[0][1]) == (Reason.COALESCED, BlkStatus.OK, 1, 8 * 4096)
    assert [device.calls(name) for name in ("try_alloc", "link", "sync", "map")] == [1, 8, 1, 0]
    undo(it, device, request, ranges)
    assert device.clean() and device.calls("destroy") == 1 and device.calls("unmap") == 0


def test_links_are_merged_vectors() -> None:
    device = BlockDevice()
    request = Request(Op.READ, [(0x1000, 4096), (0x2000, 4096), (0x9000, 4096)])
    run(request, device)
    assert [entry[1:4] for entry in device.log if entry[0] == "link"] == [(0x1000, 0, 8192), (0x9000, 8192, 4096)]


def test_unaligned_ends_coalesce() -> None:
    device = BlockDevice()
    request = Request(Op.READ, [(0x14DBC200, 3584), (0x14DE6000, 4096), (0x153BC000, 512)])
    it, ranges = run(request, device)
    assert it.reason == Reason.COALESCED and ranges[0][0] % 4096 == 0x200 and ranges[0][1] == 8192


def test_interior_gap_maps_each_segment() -> None:
    device, request = BlockDevice(), Request(Op.READ, GAPPED)
    it, ranges = run(request, device)
    assert it.reason == Reason.GAP_IN_MERGE_BOUNDARY and [n for _, n in ranges] == [4096, 512, 4096]
    assert device.calls("try_alloc") == 0
    undo(it, device, request, ranges)
    assert device.clean()


@pytest.mark.parametrize(
    ("bvecs", "coalesce"),
    [
        (SCATTERED, True),
        ([(0x1E00, 512), (0x9000, 4096), (0x4000, 100)], True),
        ([(0x1000, 4096), (0x9800, 2048)], False),
        ([(0x1000, 2048), (0x9000, 4096)], False),
        ([(0x1800, 2048), (0x9000, 4096)], True),
        ([(0x1000, 4095), (0x9000, 4096)], False),
        ([(0x1000, 4096), (0x9001, 4095)], False),
        ([(0x1000, 12288), (0x9000, 65536)], True),
        ([(0x1234, 8)], True),
    ],
)
def test_e6_one_range_when_the_gap_mask_allows(bvecs: list[tuple[int, int]], coalesce: bool) -> None:
    """The rule table: coalesced exactly when every interior end and start lies on the merge boundary."""
    device = BlockDevice()
    it, ranges = run(Request(Op.WRITE, bvecs), device)
    assert (it.state is not None) == coalesce == (len(ranges) == 1)
    assert it.reason == (Reason.COALESCED if coalesce else Reason.GAP_IN_MERGE_BOUNDARY)


@pytest.mark.parametrize(
    ("sgl", "bvecs", "reason"),
    [
        (True, SCATTERED, Reason.NO_VIRT_BOUNDARY),
        (True, GAPPED, Reason.NO_VIRT_BOUNDARY),
        (False, SCATTERED, Reason.COALESCED),
    ],
)
def test_the_older_rule_asks_the_queue(sgl: bool, bvecs: list[tuple[int, int]], reason: Reason) -> None:
    request = Request(Op.READ, bvecs, limits=nvme_limits(sgl_supported=sgl))
    it, _ = run(request, BlockDevice(), rule=VIRT_BOUNDARY_RULE)
    assert it.reason == reason
    with pytest.raises(MisuseError, match=r"^rule='newest': must be one of gap, virt-boundary$"):
        run(request, BlockDevice(), rule="newest")


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (BlockDevice(translating=False), Reason.NO_IOMMU),
        (BlockDevice(translating=False, identity=True), Reason.IDENTITY_DOMAIN),
        (BlockDevice(windows=False), Reason.IOVA_EXHAUSTED),
    ],
)
def test_why_there_is_no_window(device: BlockDevice, reason: Reason) -> None:
    request = Request(Op.READ, SCATTERED)
    it, ranges = run(request, device)
    assert (it.reason, len(ranges), device.calls("try_alloc")) == (reason, 8, 1)
    undo(it, device, request, ranges)
    assert device.clean()


class Peer:
    def __init__(self, kind: int, offset: int = 0) -> None:
        self.kind, self.bus_offset, self.asked = kind, offset, 0

    def reset(self) -> None:
        self.asked = 0

    def map_type(self, phys: int) -> int:
        self.asked += 1
        return self.kind


class TestPeers:
    def test_bus_addresses_touch_no_iommu(self) -> None:
        device, peer, request = BlockDevice(), Peer(P2P_MAP_BUS_ADDR, 1 << 30), Request(Op.READ, SCATTERED)
        it, ranges = run(request, device, peer=peer)
        assert ranges == [(phys + (1 << 30), length) for phys, length in SCATTERED]
        assert (it.reason, peer.asked, device.log) == (Reason.P2P_BUS, 1, [])
        undo(it, device, request, ranges)
        assert device.log == []

    def test_host_bridge_is_memory_with_mmio(self) -> None:
        device, request = BlockDevice(), Request(Op.READ, SCATTERED)
        it, ranges = run(request, device, peer=Peer(P2P_MAP_THRU_HOST_BRIDGE))
        assert it.reason == Reason.P2P_HOST_BRIDGE and len(ranges) == 1
        assert {entry[4] for entry in device.log if entry[0] == "link"} == {ATTR_MMIO}
        undo(it, device, request, ranges)
        assert device.log[-1] == ("destroy", 8 * 4096, ATTR_MMIO) and device.clean()

    def test_a23_unsupported_peer_is_invalid_and_maps_nothing(self) -> None:
        device = BlockDevice()
        it, ranges = run(Request(Op.READ, SCATTERED), device, peer=Peer(P2P_MAP_NOT_SUPPORTED))
        assert (it.status, it.reason, ranges, device.log) == (BlkStatus.INVAL, Reason.P2P_NOT_SUPPORTED, [], [])

    def test_ordinary_memory_goes_on(self) -> None:
        it, ranges = run(Request(Op.READ, SCATTERED), BlockDevice(), peer=Peer(P2P_MAP_NONE))
        assert it.reason == Reason.COALESCED and len(ranges) == 1


@pytest.mark.parametrize("bvecs", [SCATTERED, GAPPED])
def test_every_failure_is_a_status_and_leaves_nothing(bvecs: list[tuple[int, int]]) -> None:
    for nth in range(20):
        device, request = BlockDevice(), Request(Op.READ, bvecs)
        device.fail.arm(nth)
        it, ranges = run(request, device)
        fired, refused = device.fail.fired, bvecs is SCATTERED and nth == 0
        device.fail.disarm()
        if fired and not refused:
            assert it.status == BlkStatus.RESOURCE
        else:
            assert it.status == BlkStatus.OK
        undo(it, device, request, ranges)
        assert device.clean()
        if not fired:
            return
    raise AssertionError("the sweep did not end")


def test_link_error_is_translated() -> None:
    """A gap mask that hides a misalignment (a caller's lie) meets the link's own check: -EIO, an I/O error."""
    device = BlockDevice()
    it, ranges = run(Request(Op.READ, [(0x1000, 4096), (0x9200, 512)], gap_bit=0), device)
    assert (it.status, ranges, device.clean()) == (BlkStatus.IOERR, [], True)


def test_no_data_is_no_error() -> None:
    it, ranges = run(Request(Op.FLUSH), BlockDevice())
    assert (it.status, ranges) == (BlkStatus.OK, [])


class TestScatterlist:
    def test_e2_three_passes_and_a_table_where_the_iterator_makes_one_and_none(self) -> None:
        ledger, device, request = Ledger(), BlockDevice(), Request(Op.READ, SCATTERED)
        sg = SgRequest(request, device, ledger=ledger)
        assert sg.consume() == sg.ranges and len(sg.ranges) == 8
        assert (sg.passes, sg.bytes_allocated) == (3, 8 * 32)
        assert (ledger.counts[L_PASSES], ledger.counts[L_BOOKKEEPING_BYTES]) == (3, 256)
        sg.unmap()
        assert device.clean()
        with pytest.raises(MisuseError, match=r"^scatterlist request: already unmapped$"):
            sg.unmap()
        it, _ = run(request, device)
        assert it.walk.visited == 8

    def test_table_sizes(self) -> None:
        assert [table_bytes(n) for n in (1, 128, 129, 255, 256)] == [32, 4096, 4096 + 64, 8192, 8192 + 64]

    def test_no_memory_for_the_table(self) -> None:
        device = BlockDevice()
        device.fail.arm(0)
        with pytest.raises(ExhaustedError, match=r"^no memory for a scatterlist of 8 entries$"):
            SgRequest(Request(Op.READ, SCATTERED), device, fail=device.fail)
        assert device.log == []

    @pytest.mark.parametrize(("completing", "freed_on"), [({}, 3), ({"cpu": 5}, 5), ({"cpu": 0}, 0)])
    def test_the_cpu_that_completes_frees(self, completing: dict[str, int], freed_on: int) -> None:
        device = BlockDevice()
        SgRequest(Request(Op.READ, SCATTERED, cpu=3), device).unmap(**completing)
        assert device.clean() and device.log[-1] == ("unmap_sg", freed_on)


def test_a_walk_needs_a_device_and_a_cpu_that_there_may_be() -> None:
    request = Request(Op.WRITE, [(0x100000, 4096)])
    with pytest.raises(MisuseError, match=r"^start: device=None: must be a device$"):
        BlkDmaIter().start(request, None)  # type: ignore[arg-type]
    for cpu in (-1, 1 << 31, 1 << 64):
        with pytest.raises(MisuseError, match=rf"^start: cpu={cpu}: must be 0 to 65535$"):
            BlkDmaIter().start(request, BlockDevice(), cpu=cpu)
