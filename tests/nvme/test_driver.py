"""Driver and controller model together on the software machine: bytes, paths, costs, errors, failures."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dmakit.block.request import Op, Request
from dmakit.block.status import BlkStatus
from dmakit.consts import PSDT_SGL_METABUF
from dmakit.errors import DmakitError, ExhaustedError, MisuseError, UnsupportedError
from dmakit.ledger import difference
from dmakit.memory.buffers import Buffer
from dmakit.nvme.driver import Done, NvmeDriver
from dmakit.nvme.model import ControllerModel
from dmakit.nvme.namespace import FileBacking, Namespace
from dmakit.nvme.spec import Status
from dmakit.nvme.transport import ModelTransport
from dmakit.platform.soft import Machine
from dmakit.reasons import Reason

BLOCKS = 16384


class Rig:
    """A machine with one NVMe controller and its driver."""

    def __init__(
        self,
        *,
        machine: dict[str, object] | None = None,
        device: dict[str, object] | None = None,
        controller: dict[str, object] | None = None,
        namespace: dict[str, object] | None = None,
        **driver: object,
    ) -> None:
        self.machine = Machine(**{"ram": "64M", "swiotlb": "1M", **(machine or {})})
        self.device = self.machine.device("nvme0", **(device or {}))
        self.space = Namespace(1, BLOCKS, **(namespace or {}))
        self.controller = ControllerModel(self.device.port, [self.space], **(controller or {}))
        self.driver = NvmeDriver(ModelTransport(self.controller, self.device), **driver)

    def start(self) -> Rig:
        self.driver.start()
        return self

    def buffer(self, size: int, seed: int = 0, offset: int = 0) -> Buffer:
        buffer = self.machine.buffer(size, offset=offset)
        buffer.write(0, random.Random(seed).randbytes(size))
        return buffer

    def io(self, op: Op, lba: int, memory: Buffer | list[tuple[int, int]]) -> list[Done]:
        pieces = memory if isinstance(memory, list) else memory.ranges
        return self.driver.execute(self.driver.requests(op, lba, pieces))

    def left(self) -> dict[str, int]:
        """What is still in use after flush queues ran; tables stay until their whole range is unmapped, as in Linux."""
        self.machine.settle()
        live = self.machine.live()
        del live["table_pages"]
        return live


MACHINES = {
    "lazy": {"machine": {"fragmentation": 1.0}},
    "strict": {"machine": {"fragmentation": 1.0, "mode": "strict"}},
    "x86": {"machine": {"fragmentation": 1.0, "iommu": "x86"}},
    "none": {"machine": {"fragmentation": 1.0, "iommu": "none"}},
    "passthrough": {"machine": {"fragmentation": 1.0, "mode": "passthrough"}},
    "untrusted": {"machine": {"fragmentation": 1.0}, "device": {"trusted": False}},
    "non-coherent": {"machine": {"fragmentation": 1.0, "coherent": False}},
    "no-sgl": {"machine": {"fragmentation": 1.0}, "controller": {"sgl": "none"}},
    "older-rule": {"machine": {"fragmentation": 1.0}, "rule": "virt-boundary"},
    "checked": {"machine": {"fragmentation": 1.0, "checker": True}},
}


@pytest.mark.parametrize("kind", MACHINES)
def test_every_byte_written_is_read_back(kind: str) -> None:
    rig = Rig(**MACHINES[kind]).start()
    for lba, size, offset in ((0, 4096, 0), (8, 131072, 0), (512, 65536, 512), (1024, 512 << 10, 0), (3000, 512, 1536)):
        source = rig.buffer(size, seed=lba, offset=offset)
        wrote = rig.io(Op.WRITE, lba, source)
        assert all(done.blk_status == BlkStatus.OK for done in wrote), [done.text for done in wrote]
        assert rig.space.read(lba, size // 512) == source.read(0, size)
        target = rig.buffer(size, seed=99, offset=offset)
        assert all(done.status == 0 for done in rig.io(Op.READ, lba, target))
        assert target.read(0, size) == source.read(0, size)
    assert rig.device.ledger.snapshot()["faults"] == 0
    rig.driver.stop()
    rig.device.release()
    assert set(rig.left().values()) == {0}


def only(rig: Rig, reason: Reason, path: str, count: int) -> None:
    assert rig.driver.paths.counts() == {path: {reason: count}}


class TestPhases:
    """The phases of the recorded traces: what the kernel did for each, on a controller with SGLs."""

    def test_a_small_random_read_is_one_map(self) -> None:
        rig = Rig(machine={"fragmentation": 1.0}).start()
        before = rig.device.ledger.snapshot()
        for lba in (8, 512, 4096):
            rig.io(Op.READ, lba, rig.buffer(4096))
        delta = difference(rig.device.ledger.snapshot(), before)
        assert (delta["map_calls"], delta["unmap_calls"], delta["try_alloc_calls"]) == (3, 3, 0)
        only(rig, Reason.SINGLE_SEGMENT, "map_phys", 3)

    def test_b_scattered_128k_is_one_window(self) -> None:
        rig = Rig(machine={"fragmentation": 1.0}).start()
        before = rig.device.ledger.snapshot()
        rig.io(Op.READ, 0, rig.buffer(131072))
        delta = difference(rig.device.ledger.snapshot(), before)
        calls = [delta[f"{name}_calls"] for name in ("try_alloc", "link", "sync", "destroy", "map")]
        assert calls == [1, 32, 1, 1, 0] and delta["descriptors"] == 1
        only(rig, Reason.COALESCED, "two-step", 1)

    def test_c_huge_pages_are_one_map(self) -> None:
        rig = Rig().start()
        buffer = rig.machine.buffer(131072, order=5)
        rig.io(Op.READ, 0, buffer)
        only(rig, Reason.SINGLE_SEGMENT, "map_phys", 1)

    def test_c512_is_split_into_four_maps(self) -> None:
        rig = Rig().start()
        done = rig.io(Op.WRITE, 0, rig.machine.buffer(512 << 10, order=7))
        assert [d.request.payload_bytes for d in done] == [131072] * 4
        only(rig, Reason.SINGLE_SEGMENT, "map_phys", 4)

    def test_cunal_is_one_window_with_unaligned_ends(self) -> None:
        rig = Rig(machine={"fragmentation": 1.0}).start()
        before = rig.device.ledger.snapshot()
        (done,) = rig.io(Op.READ, 0, rig.buffer(65536, offset=512))
        delta = difference(rig.device.ledger.snapshot(), before)
        assert delta["link_calls"] == 17
        lengths = [length for _, length in done.request.data.vectors]
        assert (lengths[0], lengths[-1]) == (3584, 512)
        only(rig, Reason.COALESCED, "two-step", 1)

    def test_u_16k_is_one_window_of_four_links(self) -> None:
        rig = Rig(machine={"fragmentation": 1.0}).start()
        before = rig.device.ledger.snapshot()
        rig.io(Op.READ, 0, rig.buffer(16384))
        assert difference(rig.device.ledger.snapshot(), before)["link_calls"] == 4
        only(rig, Reason.COALESCED, "two-step", 1)

    def test_c_without_sgl_needs_a_window(self) -> None:
        rig = Rig(controller={"sgl": "none"}).start()
        rig.io(Op.READ, 0, rig.machine.buffer(131072, order=5))
        only(rig, Reason.SINGLE_SEGMENT_TOO_LONG_FOR_PRP, "two-step", 1)


@pytest.mark.parametrize("mode", ["lazy", "strict"])
@pytest.mark.parametrize("size", [512, 4096, 8192])
def test_a30_one_segment_costs_one_map_and_no_window(mode: str, size: int) -> None:
    """Ledger of the driver's mapping equal to a bare dma_map_phys and dma_unmap_phys of the same memory."""
    ledgers = []
    for through_driver in (True, False):
        rig = Rig(machine={"mode": mode}).start()
        buffer = rig.machine.buffer(size, order=1)
        ((phys, length),) = buffer.ranges
        before = rig.device.ledger.snapshot()
        if through_driver:
            iod = rig.driver.mapper.map(Request(Op.READ, [(phys, length)]))
            rig.driver.mapper.unmap(iod)
        else:
            addr = rig.device.map_phys(phys, length, 2)
            rig.device.unmap_phys(addr, length, 2)
        ledgers.append(difference(rig.device.ledger.snapshot(), before))
    driver, page = ledgers
    assert driver["map_calls"] == driver["unmap_calls"] == 1
    assert driver["try_alloc_calls"] == driver["link_calls"] == driver["bookkeeping_bytes"] == 0
    own = {"descriptors", "passes"}  # what a command has and a bare mapping has not
    assert {k: v for k, v in driver.items() if k not in own} == {k: v for k, v in page.items() if k not in own}
    assert (driver["descriptors"], driver["descriptor_pages"]) == (1 if size <= 4096 else 2, 0)


def test_a31_every_request_has_one_path_and_the_reason_of_the_branch() -> None:
    rig = Rig(machine={"fragmentation": 1.0}).start()
    pages = rig.buffer(65536).ranges
    rig.io(Op.READ, 0, [pages[0]])
    rig.io(Op.READ, 0, pages[:8])
    rig.io(Op.READ, 0, [pages[0], (pages[1][0] + 512, 512), pages[2]])
    rig.driver.execute([Request(Op.FLUSH)])
    assert rig.driver.paths.counts() == {
        "no-data": {Reason.NO_DATA: 1},
        "map_phys": {Reason.SINGLE_SEGMENT: 1},
        "two-step": {Reason.COALESCED: 1},
        "per-segment": {Reason.GAP_IN_MERGE_BOUNDARY: 1},
    }
    assert rig.driver.paths.slow() == 1 and len(rig.driver.paths.requests) == rig.driver.submitted == 4


def test_e5_commands_reach_the_controller_as_prp_or_sgl_without_a_scatterlist() -> None:
    rig = Rig(machine={"fragmentation": 1.0}).start()
    pages = rig.buffer(131072).ranges
    before = rig.device.ledger.snapshot()
    sgl = rig.driver.submit(Request(Op.READ, pages))
    prp = rig.driver.submit(Request(Op.READ, pages[:4]))
    assert (sgl.psdt, prp.psdt) == (PSDT_SGL_METABUF, 0)
    assert difference(rig.device.ledger.snapshot(), before)["sg_calls"] == 0
    rig.driver.transport.wait(0)
    assert [done.status for done in rig.driver.poll()] == [0, 0]


def test_e12_submission_and_completion_are_counted_apart() -> None:
    rig = Rig(machine={"mode": "strict", "fragmentation": 1.0}).start()
    rig.io(Op.READ, 0, rig.buffer(131072))
    report = rig.driver.costs.report()
    assert report["submission"]["link_calls"] == 32 and report["submission"]["pte_set_1"] >= 32
    assert "inv_page" not in report["submission"] and "pte_clear_1" not in report["submission"]
    assert report["completion"]["destroy_calls"] == 1 and report["completion"]["pte_clear_1"] >= 32
    assert report["completion"]["inv_page"] == 1 and "link_calls" not in report["completion"]
    assert rig.driver.costs.entered == {"submission": 1, "completion": 1}


class TestCommands:
    def test_write_zeroes_and_discard(self) -> None:
        rig = Rig().start()
        rig.io(Op.WRITE, 0, rig.buffer(65536, seed=1))
        keep = rig.space.read(32, 96)
        rig.driver.execute([Request(Op.WRITE_ZEROES, ranges=[(0, 16)]), Request(Op.DISCARD, ranges=[(16, 8), (24, 8)])])
        assert rig.space.read(0, 32) == bytes(32 * 512) and rig.space.read(32, 96) == keep
        assert rig.driver.large.used == 0

    def test_flush_reaches_the_file(self, tmp_path: Path) -> None:
        rig = Rig(namespace={"backing": FileBacking(tmp_path / "disk", BLOCKS * 512)}).start()
        source = rig.buffer(8192, seed=4)
        rig.io(Op.WRITE, 16, source)
        rig.driver.execute([Request(Op.FLUSH)])
        assert (tmp_path / "disk").read_bytes()[8192:16384] == source.read(0, 8192)
        rig.driver.stop()
        rig.controller.close()

    def test_metadata_travels_in_its_own_buffer(self) -> None:
        rig = Rig(namespace={"metadata_size": 8}, machine={"fragmentation": 1.0}).start()
        data, meta = rig.buffer(131072, seed=1), rig.buffer(2048, seed=2)
        pieces = meta.slices(0, 2048)
        for integrity in (pieces, [(pieces[0][0], 1024), (pieces[0][0] + 1024, 1024)]):
            request = Request(Op.WRITE, data.ranges, limits=rig.driver.limits, integrity=integrity)
            (done,) = rig.driver.execute([request])
            assert done.status == 0
            assert rig.space.read_metadata(0, 256) == meta.read(0, 2048)
        target, back = rig.buffer(131072, seed=8), rig.buffer(2048, seed=9)
        (done,) = rig.driver.execute([Request(Op.READ, target.ranges, integrity=back.ranges)])
        assert done.status == 0 and back.read(0, 2048) == meta.read(0, 2048) and target.read(0) == data.read(0)

    def test_larger_blocks(self) -> None:
        rig = Rig(namespace={"block_size": 4096}).start()
        source = rig.buffer(65536, seed=3)
        rig.io(Op.WRITE, 5, source)
        assert rig.space.read(5, 16) == source.read(0, 65536)

    def test_statuses_reach_the_block_layer(self) -> None:
        rig = Rig().start()
        buffer = rig.buffer(4096)
        (past,) = rig.io(Op.READ, BLOCKS - 4, buffer)
        assert (past.text, past.blk_status) == ("LBA_OUT_OF_RANGE", BlkStatus.TARGET)
        rig.space.bad_blocks.add(3)
        assert [d.blk_status for d in rig.io(Op.READ, 0, buffer)] == [BlkStatus.MEDIUM]
        assert [d.text for d in rig.io(Op.WRITE, 0, buffer)] == ["WRITE_FAULT"]

    def test_abort_before_the_controller_fetched_it(self) -> None:
        rig = Rig().start()
        keep = rig.driver.submit(Request(Op.FLUSH))
        victim = rig.driver.submit(Request(Op.READ, rig.buffer(4096).ranges))
        assert rig.driver.abort(victim)
        while len(done := rig.driver.poll()) < 2:
            rig.driver.transport.wait(0)
        assert {d.iod is victim: d.status & 0x7FF for d in done} == {True: Status.ABORT_REQUESTED, False: 0}
        with pytest.raises(MisuseError, match=r"^abort: this request is not in flight$"):
            rig.driver.abort(keep)

    def test_ring_wraps_and_full_rings_wait(self) -> None:
        rig = Rig(entries=4).start()
        buffer = rig.buffer(4096)
        done = rig.driver.execute([Request(Op.READ, buffer.ranges, sector=8 * at) for at in range(50)])
        assert [d.status for d in done] == [0] * 50
        for _ in range(3):
            rig.driver.submit(Request(Op.FLUSH))
        with pytest.raises(ExhaustedError, match=r"^queue 1: all 3 commands are in flight$"):
            rig.driver.submit(Request(Op.READ, buffer.ranges))
        rig.driver.execute([])
        rig.driver.stop()
        assert rig.left()["iova_ranges"] == 0

    def test_one_queue_per_cpu(self) -> None:
        rig = Rig(machine={"cpus": 4}, queues=4).start()
        buffer = rig.buffer(4096)
        for cpu in range(4):
            rig.driver.submit(Request(Op.READ, buffer.ranges, cpu=cpu))
        assert [pair.in_flight for pair in rig.driver.pairs] == [1, 1, 1, 1]
        rig.driver.transport.wait(0)
        assert [len(rig.driver.poll(cpu)) for cpu in range(4)] == [1, 1, 1, 1]


class TestFaults:
    def test_a_device_that_reads_unmapped_memory_gets_a_transfer_error(self) -> None:
        rig = Rig(machine={"mode": "strict"}).start()
        iod = rig.driver.submit(Request(Op.READ, rig.buffer(4096).ranges))
        rig.device.unmap_phys(iod.low, 4096, 2)
        rig.driver.transport.wait(0)
        flights = list(rig.driver.pairs[0].take())
        assert flights[0][0].status == int(Status.DATA_TRANSFER_ERROR)
        assert rig.device.ledger.snapshot()["faults"] == 1

    def test_reset_cancels_what_is_in_flight_and_the_driver_goes_on(self) -> None:
        rig = Rig(machine={"fragmentation": 1.0}).start()
        buffer = rig.buffer(131072, seed=5)
        rig.driver.submit(Request(Op.WRITE, buffer.ranges))
        (cancelled,) = rig.driver.reset()
        assert cancelled.text == "ABORT_REQUESTED"
        assert rig.space.read(0, 256) == bytes(131072)
        assert [d.status for d in rig.io(Op.WRITE, 0, buffer)] == [0]
        rig.driver.stop()
        rig.device.release()
        assert set(rig.left().values()) == {0}

    def test_a_blocked_ring_is_fatal_and_said_so(self) -> None:
        rig = Rig(machine={"mode": "strict"}).start()
        rig.driver.pairs[0].sq.free()
        rig.driver.pairs[0].sq.write = lambda offset, data: None  # type: ignore[method-assign]
        rig.driver.submit(Request(Op.FLUSH))
        (done,) = rig.driver.execute([])
        assert str(done.error) == "the controller stopped working; CC=0x00460001 CSTS=0x00000003 (ready, fatal status)"
        assert rig.driver.recovery.resets == 4 and done.blk_status == BlkStatus.IOERR

    def test_not_started_and_missing_namespace(self) -> None:
        rig = Rig(nsid=2)
        with pytest.raises(MisuseError, match=r"^driver: not started$"):
            rig.driver.submit(Request(Op.FLUSH))
        with pytest.raises(UnsupportedError, match=r"^namespace 2 is not active; active: \[1\]$"):
            rig.driver.start()
        rig.device.release()
        assert set(rig.left().values()) == {0}


def sweep_io(rig: Rig, op: Op, size: int, offset: int) -> bool:
    """Start, one I/O, stop; False when any of it raised."""
    try:
        rig.driver.start()
        rig.io(op, 0, rig.machine.buffer(size, offset=offset))
    except DmakitError:
        return False
    finally:
        rig.machine.fail.disarm()
        rig.driver.stop(quiet=True)
    return True


@pytest.mark.parametrize("kind", ["strict", "lazy", "no-sgl", "untrusted"])
@pytest.mark.parametrize(("size", "offset"), [(4096, 0), (49152, 512)])
def test_no_failure_leaks(kind: str, size: int, offset: int) -> None:
    """Fail-nth over bring-up, one write, shut-down: no IOVA, slot, table, page or coherent memory is left."""
    nth, step = 0, 1
    while True:
        rig = Rig(**MACHINES[kind], entries=8)
        pages = rig.machine.pages.free_pages_count
        rig.machine.fail.arm(nth)
        ok = sweep_io(rig, Op.WRITE, size, offset)
        fired = rig.machine.fail.fired
        rig.device.release()
        left = rig.left()
        assert set(left.values()) == {0}, nth
        assert rig.driver.small.used == rig.driver.large.used == 0 if hasattr(rig.driver, "small") else True
        assert pages - rig.machine.pages.free_pages_count <= size // 4096 + 1, nth
        if not fired:
            assert ok
            return
        nth += step
        assert nth < 400


def test_a_reset_that_fails_stops_the_driver_and_leaks_nothing() -> None:
    nth = 0
    while True:
        rig = Rig(machine={"fragmentation": 1.0, "mode": "strict"}, entries=8).start()
        rig.driver.submit(Request(Op.WRITE, rig.buffer(49152).ranges))
        rig.machine.fail.arm(nth)
        try:
            rig.driver.reset()
        except DmakitError:
            assert rig.driver.admin is None
        fired = rig.machine.fail.fired
        rig.machine.fail.disarm()
        assert [done.text for done in rig.driver.cancelled] == ["ABORT_REQUESTED"]
        rig.driver.stop()
        rig.device.release()
        assert set(rig.left().values()) == {0}, nth
        if not fired:
            assert nth > 3
            return
        nth += 1
        assert nth < 200


def test_a_request_interrupted_in_mid_mapping_does_not_hide_the_interrupt() -> None:
    rig = Rig()
    free = rig.machine.pages.free_pages_count
    with pytest.raises(KeyboardInterrupt), rig.driver as driver:
        driver.small.alloc()
        driver.large.alloc()
        raise KeyboardInterrupt
    assert rig.machine.pages.free_pages_count == free


def test_a_descriptor_lost_in_a_run_that_ended_well_is_told() -> None:
    rig = Rig().start()
    rig.driver.small.alloc()
    with pytest.raises(MisuseError, match="descriptor pool: destroyed with 1 blocks of 256 bytes in use"):
        rig.driver.stop()
