"""Controllers that break or lie: every request ends once, none is lost, no memory is given back too early, no hang.

The model's faults are its declared table (``nvme.faults``); time is the machine's, so a time-out of 30 s takes none.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmakit.block.request import Op, Request
from dmakit.block.status import BlkStatus
from dmakit.errors import FaultError, MisuseError
from dmakit.nvme.commands import Done
from dmakit.nvme.driver import NvmeDriver
from dmakit.nvme.faults import FAULTS, Fault, FaultyModel
from dmakit.nvme.namespace import Namespace
from dmakit.nvme.operation import Operation
from dmakit.nvme.registers import ControllerError
from dmakit.nvme.spec import Status
from dmakit.nvme.transport import ModelTransport
from dmakit.platform.soft import Machine

BLOCKS = 4096
SECOND = 1_000_000_000
READY = r"CC=0x00460001 CSTS=0x00000001 \(ready\)"


class Rig:
    """A machine, a faulty controller and its driver; ``blocked`` counts device accesses that the IOMMU stopped."""

    def __init__(self, *faults: Fault, start: bool = True, **driver: object) -> None:
        self.machine = Machine(ram="64M", swiotlb="1M", mode="strict")
        self.device = self.machine.device("nvme0")
        self.space = Namespace(1, BLOCKS)
        self.model = FaultyModel(self.device.port, [self.space], clock=self.machine.clock, faults=list(faults))
        self.driver = NvmeDriver(ModelTransport(self.model, self.device), **driver)
        if start:
            self.driver.start()

    def writes(self, count: int) -> tuple[list[Request], dict[int, bytes]]:
        """``count`` writes of one block each, at blocks 0, 8, …, with their data."""
        requests, expected = [], {}
        for at in range(count):
            buffer = self.machine.buffer(512)
            expected[8 * at] = random.Random(at).randbytes(512)
            buffer.write(0, expected[8 * at])
            requests.append(Request(Op.WRITE, buffer.ranges, sector=8 * at))
        return requests, expected

    def leave(self) -> None:
        """Stop; nothing may be left of anything."""
        self.driver.stop(quiet=True)
        self.device.release()
        self.machine.settle()
        assert {k: v for k, v in self.machine.live().items() if k != "table_pages"} == {
            "iova_ranges": 0, "bounce_slots": 0, "queued": 0,
        }  # fmt: skip
        assert self.machine.ledger.snapshot()["faults"] == 0  # no access after its memory was given back


class TestBringUp:
    def test_never_ready_ends_at_the_controllers_own_time_out(self) -> None:
        rig = Rig(Fault("never-ready", count=99), start=False)
        with pytest.raises(
            ControllerError, match=r"^enable: no answer within 0.5 s; CC=0x00460001 CSTS=0x00000000 \(not ready\)$"
        ) as caught:
            rig.driver.start()
        assert rig.machine.clock.now <= SECOND and caught.value.errno == 110
        assert caught.value.registers["VS"] == 0x10400
        rig.leave()

    def test_slow_ready_is_waited_for(self) -> None:
        rig = Rig(Fault("slow-ready", value=400_000_000))
        assert 400_000_000 <= rig.machine.clock.now < 500_000_000
        rig.leave()

    def test_unplugged_before_it_is_opened(self) -> None:
        rig = Rig(start=False)
        rig.model.unplugged = True
        with pytest.raises(
            ControllerError,
            match=r"^open; every register reads all ones: the device is unplugged or does not answer$",
        ) as caught:
            rig.driver.start()
        assert caught.value.errno == 19 and rig.driver.admin is None
        rig.leave()

    def test_a_controller_that_does_not_stop_is_cut_off_from_memory(self) -> None:
        rig = Rig(Fault("never-disables", count=0))
        rig.driver.submit(rig.writes(1)[0][0])
        rig.model.faults = [Fault("never-disables", count=99)]
        rig.driver.stop(quiet=True)
        assert not rig.model.port.enabled
        rig.model.run()  # it goes on as if nothing had happened, and reaches nothing
        with pytest.raises(FaultError, match=r"bus mastering is off$"):
            rig.model.port.read(0, 4)
        assert rig.machine.ledger.snapshot()["faults"] == 0


class TestOneFault:
    """What each fault of the table leads to, for eight writes of which the third is struck."""

    def run(self, rig: Rig) -> dict[int, Done]:
        requests, self.expected = rig.writes(8)
        done = rig.driver.execute(requests)
        assert sorted(d.request.sector for d in done) == sorted(r.sector for r in requests)
        return {d.request.sector: d for d in done}

    def written(self, rig: Rig, but: tuple[int, ...] = ()) -> None:
        for lba, data in self.expected.items():
            if lba not in but:
                assert rig.space.read(lba, 1) == data

    def test_a_status_is_that_requests_alone(self) -> None:
        rig = Rig(Fault("status", at=2, value=int(Status.WRITE_FAULT)))
        done = self.run(rig)
        assert (done[16].text, done[16].blk_status) == ("WRITE_FAULT", BlkStatus.MEDIUM)
        assert rig.driver.recovery.resets == 0
        self.written(rig, but=(16,))
        rig.leave()

    def test_a_stalled_command_is_aborted_after_its_time(self) -> None:
        rig = Rig(Fault("stall", at=2))
        done = self.run(rig)
        assert str(done[16].error) == "WRITE of 1 blocks at 16 (namespace 1): no completion within 30 s, aborted"
        assert done[16].blk_status == BlkStatus.TIMEOUT
        assert (rig.driver.recovery.aborts, rig.driver.recovery.resets) == (1, 0)
        assert 30 * SECOND <= rig.machine.clock.now < 31 * SECOND
        self.written(rig, but=(16,))
        rig.leave()

    def test_a_deaf_controller_is_reset_and_the_others_are_issued_again(self) -> None:
        rig = Rig(Fault("deaf", at=2))
        done = self.run(rig)
        text = (
            "WRITE of 1 blocks at 16 (namespace 1): no completion within 30 s; Abort: admin command 0x08: no completion"
        )
        assert str(done[16].error).startswith(f"{text} within 5 s; CC=0x00460001 CSTS=0x00000001 (ready); CC=")
        assert isinstance(done[16].error, ControllerError) and done[16].error.registers
        assert (rig.driver.recovery.aborts, rig.driver.recovery.resets) == (1, 1)
        assert rig.machine.clock.now < 37 * SECOND
        self.written(rig, but=(16,))
        rig.leave()

    @pytest.mark.parametrize(
        ("kind", "text"),
        [
            ("fatal", r"the controller stopped working; CC=0x00460001 CSTS=0x00000003 \(ready, fatal status\)"),
            ("bad-command", rf"queue 1: a completion names a command that is not in flight \(queue 1, .*\); {READY}"),
            ("bad-queue", rf"queue 1: a completion names another queue \(queue 2, .*\); {READY}"),
            ("bad-head", rf"queue 1: a completion has a submission head that cannot be \(queue 1, .*\); {READY}"),
            ("twice", rf"queue 1: a completion names a command that is not in flight \(queue 1, .*\); {READY}"),
        ],
    )
    def test_a_lie_or_a_crash_means_a_reset_and_loses_nothing(self, kind: str, text: str) -> None:
        rig = Rig(Fault(kind, at=2))
        done = self.run(rig)
        assert [d.blk_status for d in done.values()] == [BlkStatus.OK] * 8
        (incident,) = rig.driver.recovery.incidents
        with pytest.raises(ControllerError, match=f"^{text}$"):
            raise incident
        self.written(rig)
        rig.leave()

    def test_a_wrong_phase_is_a_completion_that_never_comes(self) -> None:
        rig = Rig(Fault("wrong-phase", at=2))
        done = self.run(rig)
        late = [d for d in done.values() if d.error is not None]
        assert len(late) <= len(done) and all(d.error.errno == 110 for d in late if d.error is not None)
        assert rig.driver.recovery.resets == 1 and rig.machine.clock.now < 40 * SECOND
        rig.leave()

    def test_a_late_completion_within_its_time_is_waited_for(self) -> None:
        rig = Rig(Fault("late", at=2, value=20 * SECOND))
        assert [d.status for d in self.run(rig).values()] == [0] * 8
        assert rig.driver.recovery.aborts == 0
        rig.leave()

    def test_unplugged_in_mid_io_ends_everything_at_once(self) -> None:
        rig = Rig(Fault("unplugged", at=2))
        done = self.run(rig)
        gone = [d for d in done.values() if d.error is not None]
        assert len(gone) >= 6 and rig.machine.clock.now < SECOND
        assert str(gone[0].error) == (
            "the controller stopped working; every register reads all ones: the device is unplugged or does not answer"
        )
        with pytest.raises(ControllerError, match=r"^the controller stopped working; every register reads all ones"):
            rig.driver.submit(Request(Op.FLUSH))
        rig.leave()

    def test_a_controller_that_does_not_come_up_again_is_dead(self) -> None:
        rig = Rig(Fault("fatal", at=2))
        rig.model.faults.append(Fault("never-ready", count=99))
        done = self.run(rig)
        assert any(d.error is not None and "enable: no answer within 0.5 s" in str(d.error) for d in done.values())
        with pytest.raises(ControllerError, match=r"^enable: no answer within 0.5 s; "):
            rig.driver.submit(Request(Op.FLUSH))
        rig.leave()

    def test_one_that_always_crashes_is_given_up_after_the_retries(self) -> None:
        rig = Rig(Fault("fatal", count=99), retries=2)
        (done,) = rig.driver.execute(rig.writes(1)[0])
        assert str(done.error).startswith("the controller stopped working; CC=") and rig.driver.recovery.resets == 3
        rig.leave()

    def test_a_fault_must_be_declared(self) -> None:
        with pytest.raises(MisuseError, match=r"^fault 'fire': must be one of never-ready, "):
            Fault("fire")


fault = st.builds(
    Fault,
    st.sampled_from(sorted(FAULTS)),
    at=st.integers(0, 30),
    count=st.integers(1, 3),
    value=st.sampled_from([1, int(Status.WRITE_FAULT), 10_000_000, 40 * SECOND]),
)


@settings(max_examples=40)
@given(faults=st.lists(fault, max_size=5), entries=st.integers(2, 16), count=st.integers(1, 24))
def test_whatever_happens_every_request_ends_once_and_nothing_leaks(
    faults: list[Fault], entries: int, count: int
) -> None:
    rig = Rig(*(Fault(f.kind, f.at, f.count, f.value & 0x7FF or 1 if f.kind == "status" else f.value) for f in faults),
              start=False, entries=entries, retries=2)  # fmt: skip
    try:
        rig.driver.start()
        requests, expected = rig.writes(count)
        seen: list[Done] = []
        try:
            seen += rig.driver.execute(requests)
        except ControllerError:
            assert rig.driver.dead is not None
            seen += rig.driver.drain()
        sectors = [done.request.sector for done in seen]
        assert len(sectors) == len(set(sectors)), "a request ended twice"
        if rig.driver.dead is None:
            assert len(sectors) == count, "a request was lost"
        for done in seen:
            if done.blk_status == BlkStatus.OK and done.error is None:
                assert rig.space.read(done.request.sector, 1) == expected[done.request.sector]
    except ControllerError as error:
        assert error.registers or "0x" in str(error)
    assert rig.machine.clock.now < 600 * SECOND
    rig.leave()


def test_a_success_with_a_hint_beside_it_is_a_success() -> None:
    """Status code 0 with the More bit (13): there is something in the error log, and the command went well."""
    rig = Rig(Fault("status", value=0x2000))
    (done,) = rig.driver.execute([Request(Op.FLUSH)])
    assert (done.status, done.blk_status, done.error, done.text) == (0x2000, BlkStatus.OK, None, "SUCCESS")
    operation = Operation("flush", 1, [done.request], None)
    operation.settle(done)
    operation.check()
    rig.leave()
