"""The controller model alone: registers, queues, admin commands, and a status for every kind of bad input."""

from __future__ import annotations

import struct

import pytest

from dmakit.errors import FaultError, MisuseError
from dmakit.nvme.command import Command, Completion
from dmakit.nvme.identify import ControllerFacts, NamespaceFacts
from dmakit.nvme.model import ControllerModel
from dmakit.nvme.namespace import MemoryBacking, Namespace
from dmakit.nvme.spec import (
    CC_EN,
    CC_SHN_NORMAL,
    CSTS_CFS,
    CSTS_RDY,
    CSTS_SHST_COMPLETE,
    FLAG_SGL_METABUF,
    FLAG_SGL_METASEG,
    NSID_ALL,
    Admin,
    Io,
    Reg,
    Status,
    status_name,
)

ASQ, ACQ, SQ, CQ, DATA = 0x10000, 0x11000, 0x12000, 0x13000, 0x20000
DEPTH = 8


class FlatPort:
    """Memory from 0 to ``size``; everything else is blocked."""

    def __init__(self, size: int = 1 << 20) -> None:
        self.bytes = bytearray(size)

    def read(self, iova: int, size: int) -> bytes:
        if iova + size > len(self.bytes):
            raise FaultError("blocked", iova=iova)
        return bytes(self.bytes[iova : iova + size])

    def write(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        if iova + len(data) > len(self.bytes):
            raise FaultError("blocked", iova=iova, write=True)
        self.bytes[iova : iova + len(data)] = data


class Host:
    """The least host that can talk to the model: two rings a queue and a doorbell."""

    def __init__(self, *, io: bool = True, **options: object) -> None:
        self.port = FlatPort()
        self.space = Namespace(1, 1024, metadata_size=8)
        self.controller = ControllerModel(self.port, [self.space], **options)
        self.tails = {0: 0, 1: 0}
        self.heads = {0: 0, 1: 0}
        self.phases = {0: 1, 1: 1}
        self.enable()
        if io:
            assert self.admin(Command(Admin.CREATE_CQ, low=CQ, cdw10=(DEPTH - 1) << 16 | 1, cdw11=1)) == 0
            assert self.admin(Command(Admin.CREATE_SQ, low=SQ, cdw10=(DEPTH - 1) << 16 | 1, cdw11=1 << 16 | 1)) == 0

    def enable(self) -> None:
        self.controller.write32(Reg.AQA, (DEPTH - 1) << 16 | DEPTH - 1)
        self.controller.write64(Reg.ASQ, ASQ)
        self.controller.write64(Reg.ACQ, ACQ)
        self.controller.write32(Reg.CC, CC_EN)

    def push(self, qid: int, command: Command) -> None:
        base = SQ if qid else ASQ
        self.port.write(base + 64 * self.tails[qid], command.pack())
        self.tails[qid] = (self.tails[qid] + 1) % DEPTH
        self.controller.write32(Reg.DOORBELLS + 8 * qid, self.tails[qid])

    def take(self, qid: int) -> Completion | None:
        base = CQ if qid else ACQ
        entry = Completion.unpack(self.port.read(base + 16 * self.heads[qid], 16))
        if entry.phase != self.phases[qid]:
            return None
        self.heads[qid] += 1
        if self.heads[qid] == DEPTH:
            self.heads[qid] = 0
            self.phases[qid] ^= 1
        self.controller.write32(Reg.DOORBELLS + 8 * qid + 4, self.heads[qid])
        return entry

    def run(self, qid: int, command: Command) -> Completion:
        self.push(qid, command)
        self.controller.run()
        entry = self.take(qid)
        assert entry is not None and entry.cid == command.cid
        return entry

    def admin(self, command: Command) -> int:
        return self.run(0, command).status & 0x7FF

    def io(self, command: Command) -> int:
        return self.run(1, command).status & 0x7FF


def rw(op: Io, lba: int, count: int, low: int = DATA, high: int = 0, **fields: int) -> Command:
    return Command(op, fields.pop("nsid", 1), low, high, lba & 0xFFFFFFFF, lba >> 32, count - 1, mptr=0x30000, **fields)


class TestRegisters:
    def test_capabilities_and_version(self) -> None:
        controller = ControllerModel(FlatPort(), entries=256)
        cap = controller.read64(Reg.CAP)
        assert cap & 0xFFFF == 255 and cap >> 16 & 1 and cap >> 37 & 1 and cap >> 32 & 15 == 0
        assert controller.read32(Reg.CAP + 4) == cap >> 32 and controller.read32(Reg.VS) == 0x00010400

    def test_enable_reset_shutdown(self) -> None:
        host = Host()
        controller = host.controller
        assert controller.read32(Reg.CSTS) == CSTS_RDY
        controller.write32(Reg.CC, CC_EN | CC_SHN_NORMAL)
        assert controller.read32(Reg.CSTS) & CSTS_SHST_COMPLETE
        controller.write32(Reg.CC, 0)
        assert controller.read32(Reg.CSTS) == 0 and not controller.admin.sqs
        assert (controller.read64(Reg.ASQ), controller.read64(Reg.ACQ)) == (ASQ, ACQ)

    @pytest.mark.parametrize(("aqa", "cc"), [(0, CC_EN), (7 << 16 | 7, CC_EN | 1 << 7), (7 << 16 | 7, CC_EN | 1 << 4)])
    def test_a_configuration_that_cannot_be_is_fatal(self, aqa: int, cc: int) -> None:
        controller = ControllerModel(FlatPort())
        controller.write32(Reg.AQA, aqa)
        controller.write32(Reg.CC, cc)
        assert controller.read32(Reg.CSTS) == CSTS_CFS

    def test_masks_and_read_only(self) -> None:
        controller = ControllerModel(FlatPort())
        controller.write32(Reg.INTMS, 6)
        controller.write32(Reg.INTMC, 2)
        assert controller.read32(Reg.INTMS) == controller.read32(Reg.INTMC) == 4
        controller.write32(Reg.VS, 0)
        assert controller.read32(Reg.VS) == 0x00010400
        controller.write64(Reg.ASQ, 0x123456789ABC)
        assert controller.read64(Reg.ASQ) == 0x123456789000

    def test_doorbells_outside_a_ring_are_noted_and_ignored(self) -> None:
        host = Host()
        host.controller.write32(Reg.DOORBELLS + 8, DEPTH)
        host.controller.write32(Reg.DOORBELLS + 80, 1)
        assert host.controller.bad_doorbells == [(2, DEPTH), (20, 1)] and host.controller.run() == 0

    def test_a_blocked_ring_stops_the_controller_until_reset(self) -> None:
        host = Host(io=False)
        host.controller.write32(Reg.CC, 0)
        host.controller.write64(Reg.ASQ, 1 << 40)
        host.controller.write32(Reg.CC, CC_EN)
        host.controller.write32(Reg.DOORBELLS, 1)
        assert host.controller.run() == 0 and host.controller.read32(Reg.CSTS) & CSTS_CFS

    def test_bad_options(self) -> None:
        with pytest.raises(MisuseError, match=r"^sgl='bit': must be one of none, byte, dword$"):
            ControllerModel(FlatPort(), sgl="bit")


class TestAdmin:
    def test_identify(self) -> None:
        host = Host(sgl="dword", mdts=5, serial="S1")
        assert host.admin(Command(Admin.IDENTIFY, low=DATA, cdw10=1)) == 0
        facts = ControllerFacts.parse(host.port.read(DATA, 4096))
        assert (facts.serial, facts.max_transfer, facts.namespaces) == ("S1", 131072, 1)
        assert facts.sgls & 3 == 2 and facts.write_zeroes and facts.deallocate
        assert host.admin(Command(Admin.IDENTIFY, 1, DATA)) == 0
        assert NamespaceFacts.parse(1, host.port.read(DATA, 4096)) == NamespaceFacts(1, 1024, 512, 8)
        assert host.admin(Command(Admin.IDENTIFY, 0, DATA, cdw10=2)) == 0
        assert struct.unpack("<1024I", host.port.read(DATA, 4096))[:2] == (1, 0)

    @pytest.mark.parametrize(
        ("command", "status"),
        [
            (Command(0x7F), Status.INVALID_OPCODE),
            (Command(Admin.IDENTIFY, low=DATA, cdw10=0x55), Status.INVALID_FIELD),
            (Command(Admin.IDENTIFY, 9, DATA), Status.INVALID_NAMESPACE),
            (Command(Admin.IDENTIFY, NSID_ALL, DATA, cdw10=2), Status.INVALID_NAMESPACE),
            (Command(Admin.IDENTIFY, low=DATA, cdw10=1, flags=FLAG_SGL_METABUF), Status.INVALID_FIELD),
            (Command(Admin.IDENTIFY, low=DATA, cdw10=1, flags=1), Status.INVALID_FIELD),
            (Command(Admin.IDENTIFY, low=DATA + 2, cdw10=1), Status.PRP_OFFSET_INVALID),
            (Command(Admin.IDENTIFY, low=1 << 40, cdw10=1), Status.DATA_TRANSFER_ERROR),
            (Command(Admin.CREATE_CQ, low=CQ, cdw10=7 << 16 | 1, cdw11=1), Status.INVALID_QUEUE_ID),
            (Command(Admin.CREATE_CQ, low=CQ, cdw10=7 << 16, cdw11=1), Status.INVALID_QUEUE_ID),
            (Command(Admin.CREATE_CQ, low=CQ, cdw10=7 << 16 | 65, cdw11=1), Status.INVALID_QUEUE_ID),
            (Command(Admin.CREATE_CQ, low=CQ, cdw10=0 << 16 | 2, cdw11=1), Status.INVALID_QUEUE_SIZE),
            (Command(Admin.CREATE_CQ, low=CQ, cdw10=1024 << 16 | 2, cdw11=1), Status.INVALID_QUEUE_SIZE),
            (Command(Admin.CREATE_CQ, low=CQ, cdw10=7 << 16 | 2, cdw11=0), Status.INVALID_FIELD),
            (Command(Admin.CREATE_CQ, low=CQ + 8, cdw10=7 << 16 | 2, cdw11=1), Status.PRP_OFFSET_INVALID),
            (Command(Admin.CREATE_CQ, low=CQ, cdw10=7 << 16 | 2, cdw11=65 << 16 | 1), Status.INVALID_INTERRUPT_VECTOR),
            (Command(Admin.CREATE_SQ, low=SQ, cdw10=7 << 16 | 2, cdw11=9 << 16 | 1), Status.CQ_INVALID),
            (Command(Admin.CREATE_SQ, low=SQ, cdw10=7 << 16 | 2, cdw11=99 << 16 | 1), Status.INVALID_QUEUE_ID),
            (Command(Admin.CREATE_SQ, low=SQ, cdw10=7 << 16 | 1, cdw11=1 << 16 | 1), Status.INVALID_QUEUE_ID),
            (Command(Admin.DELETE_CQ, cdw10=1), Status.INVALID_QUEUE_DELETION),
            (Command(Admin.DELETE_CQ, cdw10=0), Status.INVALID_QUEUE_ID),
            (Command(Admin.DELETE_SQ, cdw10=7), Status.INVALID_QUEUE_ID),
            (Command(Admin.SET_FEATURES, cdw10=7, cdw11=3 << 16 | 3), Status.COMMAND_SEQUENCE_ERROR),
            (Command(Admin.SET_FEATURES, cdw10=1 << 31 | 6, cdw11=1), Status.FEATURE_NOT_SAVEABLE),
            (Command(Admin.SET_FEATURES, cdw10=0x7E), Status.INVALID_FIELD),
            (Command(Admin.GET_FEATURES, cdw10=0x7E), Status.INVALID_FIELD),
            (Command(Admin.GET_LOG_PAGE, low=DATA, cdw10=15 << 16 | 0x70), Status.INVALID_LOG_PAGE),
            (Command(Admin.GET_LOG_PAGE, low=DATA, cdw10=15 << 16 | 2, cdw12=2), Status.INVALID_FIELD),
        ],
    )
    def test_every_bad_input_has_its_status(self, command: Command, status: Status) -> None:
        host = Host()
        assert status_name(host.admin(command)) == status.name
        assert sorted(host.controller.admin.sqs) == sorted(host.controller.admin.cqs) == [0, 1]

    def test_queue_count_is_asked_before_the_first_queue(self) -> None:
        host = Host(io=False, queues=4)
        assert host.run(0, Command(Admin.SET_FEATURES, cdw10=7, cdw11=9 << 16 | 9)).result == 3 << 16 | 3
        assert host.admin(Command(Admin.SET_FEATURES, cdw10=7, cdw11=0xFFFF)) == Status.INVALID_FIELD
        assert host.run(0, Command(Admin.GET_FEATURES, cdw10=7)).result == 3 << 16 | 3

    def test_features_hold_their_value_until_reset(self) -> None:
        host = Host()
        assert host.admin(Command(Admin.SET_FEATURES, cdw10=6, cdw11=0)) == 0
        assert host.run(0, Command(Admin.GET_FEATURES, cdw10=6)).result == 0
        assert host.run(0, Command(Admin.GET_FEATURES, cdw10=1 << 8 | 6)).result == 1
        assert host.run(0, Command(Admin.GET_FEATURES, cdw10=3 << 8 | 6)).result == 4

    def test_queues_are_deleted_in_order(self) -> None:
        host = Host()
        assert host.admin(Command(Admin.DELETE_SQ, cdw10=1)) == 0
        assert host.admin(Command(Admin.DELETE_CQ, cdw10=1)) == 0
        assert sorted(host.controller.admin.cqs) == [0]

    def test_smart_log_counts_traffic(self) -> None:
        host = Host()
        assert host.io(rw(Io.WRITE, 0, 8)) == host.io(rw(Io.READ, 0, 8)) == host.io(rw(Io.READ, 0, 8)) == 0
        assert host.admin(Command(Admin.GET_LOG_PAGE, low=DATA, cdw10=127 << 16 | 2)) == 0
        raw = host.port.read(DATA, 512)
        assert [int.from_bytes(raw[at : at + 16], "little") for at in (64, 80)] == [2, 1]


class TestIo:
    @pytest.mark.parametrize(
        ("command", "status"),
        [
            (Command(0x55, 1), Status.INVALID_OPCODE),
            (rw(Io.READ, 0, 8, nsid=2), Status.INVALID_NAMESPACE),
            (rw(Io.READ, 0, 8, nsid=NSID_ALL), Status.INVALID_NAMESPACE),
            (rw(Io.READ, 1020, 8), Status.LBA_OUT_OF_RANGE),
            (rw(Io.WRITE, (1 << 40), 1), Status.LBA_OUT_OF_RANGE),
            (rw(Io.WRITE_ZEROES, 1024, 1), Status.LBA_OUT_OF_RANGE),
            (rw(Io.READ, 0, 257), Status.INVALID_FIELD),
            (rw(Io.READ, 0, 8, flags=3 << 6), Status.INVALID_FIELD),
            (rw(Io.READ, 0, 8, flags=2), Status.INVALID_FIELD),
            (rw(Io.READ, 0, 8, DATA + 1), Status.PRP_OFFSET_INVALID),
            (rw(Io.READ, 0, 16, DATA, DATA + 0x1010), Status.PRP_OFFSET_INVALID),
            (rw(Io.READ, 0, 8, 1 << 40), Status.DATA_TRANSFER_ERROR),
            (rw(Io.READ, 0, 64, DATA, 1 << 40), Status.DATA_TRANSFER_ERROR),
            (rw(Io.READ, 0, 8, DATA, 4095, flags=FLAG_SGL_METABUF), Status.DATA_SGL_LENGTH_INVALID),
            (rw(Io.READ, 0, 8, DATA, 0x50 << 56 | 4096, flags=FLAG_SGL_METABUF), Status.SGL_DESCRIPTOR_TYPE_INVALID),
            (rw(Io.READ, 0, 8, DATA, 0x30 << 56 | 8, flags=FLAG_SGL_METABUF), Status.INVALID_SGL_SEGMENT),
            (rw(Io.WRITE, 0, 8, DATA, 4096, flags=FLAG_SGL_METASEG), Status.METADATA_SGL_LENGTH_INVALID),
            (Command(Io.DSM, 1, DATA, cdw10=255, cdw11=4), Status.LBA_OUT_OF_RANGE),
        ],
    )
    def test_every_bad_input_has_its_status_and_changes_nothing(self, command: Command, status: Status) -> None:
        host = Host(mdts=5)
        host.space.write(0, b"\xa5" * 512 * 1024)
        host.port.bytes[DATA : DATA + 4096] = b"\xff" * 4096
        assert status_name(host.io(command)) == status.name
        assert host.space.read(0, 1024) == b"\xa5" * 512 * 1024

    def test_granularity_of_a_dword_controller(self) -> None:
        host = Host(sgl="dword")
        bad = rw(Io.READ, 0, 8, DATA + 2, 4096, flags=FLAG_SGL_METABUF)
        assert host.io(bad) == Status.SGL_DATA_BLOCK_GRANULARITY_INVALID
        assert Host(sgl="byte").io(bad) == 0
        assert Host(sgl="none").io(bad) == Status.INVALID_FIELD

    def test_read_write_with_a_bit_bucket(self) -> None:
        host = Host()
        host.space.write(0, bytes(range(256)) * 16)
        host.port.write(0x40000, struct.pack("<QQQQ", DATA, 1024, 0, 0x10 << 56 | 3072))
        command = rw(Io.READ, 0, 8, 0x40000, 0x30 << 56 | 32, flags=FLAG_SGL_METABUF)
        assert host.io(command) == 0
        assert host.port.read(DATA, 4096) == bytes(range(256)) * 4 + bytes(3072)

    def test_write_zeroes_and_deallocate(self) -> None:
        host = Host()
        host.space.write(0, b"\x11" * 512 * 64)
        assert host.io(rw(Io.WRITE_ZEROES, 8, 8)) == 0
        host.port.write(DATA, struct.pack("<IIQIIQ", 0, 4, 32, 0, 1, 63))
        assert host.io(Command(Io.DSM, 1, DATA, cdw10=1, cdw11=4)) == 0
        filled = [host.space.read(lba, 1) != bytes(512) for lba in range(64)]
        assert filled == [not (8 <= lba < 16 or 32 <= lba < 36 or lba == 63) for lba in range(64)]

    def test_a_hint_without_deallocate_changes_nothing(self) -> None:
        host = Host()
        host.space.write(0, b"\x11" * 512)
        host.port.write(DATA, struct.pack("<IIQ", 0, 1, 0))
        assert host.io(Command(Io.DSM, 1, DATA)) == 0 and host.space.read(0, 1) == b"\x11" * 512

    def test_flush_of_one_or_all(self) -> None:
        host = Host()
        assert host.io(Command(Io.FLUSH, 1)) == host.io(Command(Io.FLUSH, NSID_ALL)) == 0
        assert host.io(Command(Io.FLUSH, 5)) == Status.INVALID_NAMESPACE

    def test_a_full_completion_queue_waits_for_the_host(self) -> None:
        host = Host()
        for cid in range(DEPTH - 1):
            host.push(1, Command(Io.FLUSH, 1, cid=cid))
        assert host.controller.run() == DEPTH - 1
        host.push(1, Command(Io.FLUSH, 1, cid=50))
        assert host.controller.run() == 0
        assert host.take(1) is not None
        assert host.controller.run() == 1

    def test_interrupts(self) -> None:
        host, seen = Host(io=False), []
        host.controller.on_interrupt = seen.append
        host.admin(Command(Admin.CREATE_CQ, low=CQ, cdw10=(DEPTH - 1) << 16 | 1, cdw11=3 << 16 | 3))
        host.admin(Command(Admin.CREATE_SQ, low=SQ, cdw10=(DEPTH - 1) << 16 | 1, cdw11=1 << 16 | 1))
        host.io(Command(Io.FLUSH, 1))
        assert seen == [0, 0, 3]

    def test_abort_of_a_waiting_command(self) -> None:
        host = Host()
        host.push(1, rw(Io.WRITE, 0, 8, cid=9))
        assert host.run(0, Command(Admin.ABORT, cdw10=9 << 16 | 1)).result == 0
        entry = host.take(1)
        assert entry is not None and (entry.cid, entry.status & 0x7FF) == (9, Status.ABORT_REQUESTED)
        assert host.run(0, Command(Admin.ABORT, cdw10=9 << 16 | 1)).result == 1


class Broken(MemoryBacking):
    def read(self, offset: int, size: int) -> bytes:
        raise OSError(5, "gone")

    def write(self, offset: int, payload: bytes) -> None:
        raise OSError(5, "gone")

    def zero(self, offset: int, size: int) -> None:
        raise OSError(5, "gone")

    def flush(self) -> None:
        raise OSError(5, "gone")


def test_a_failing_medium_is_a_media_error() -> None:
    host = Host()
    host.space.backing = Broken(4096)
    assert host.io(rw(Io.READ, 0, 8)) == Status.UNRECOVERED_READ_ERROR
    assert host.io(rw(Io.WRITE, 0, 8)) == Status.WRITE_FAULT
    assert host.io(rw(Io.WRITE_ZEROES, 0, 8)) == Status.WRITE_FAULT
    assert host.io(Command(Io.FLUSH, 1)) == Status.WRITE_FAULT


def test_records_round_trip() -> None:
    command = Command(2, 3, 4, 5, 6, 7, 8, 9, 10, 11, mptr=12, flags=0x40, cid=13)
    raw = command.pack()
    assert len(raw) == 64 and Command.unpack(raw) == command and (command.psdt, command.fuse) == (1, 0)
    entry = Completion(1, 2, 3, 4, 0x4080, 1)
    assert len(entry.pack()) == 16 and Completion.unpack(entry.pack()) == entry
