"""The submission entry of a request (``nvme_setup_cmd``): opcode, blocks, data pointer, DSM ranges.

A ``Flight`` is a request that the driver has mapped and not finished: it keeps the command, so that it can be issued
again after a reset, and everything that must be given back when it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dmakit.block.limits import SECTOR_SHIFT
from dmakit.block.request import Op, Request
from dmakit.block.status import BlkStatus
from dmakit.errors import HostError, MisuseError
from dmakit.nvme.command import Command
from dmakit.nvme.identify import NamespaceFacts
from dmakit.nvme.iod import Iod
from dmakit.nvme.pool import Block, DescriptorPool
from dmakit.nvme.spec import (
    DSM_DEALLOCATE,
    DSM_MAX_RANGES,
    WRITE_ZEROES_DEALLOCATE,
    Io,
    Status,
    status_name,
)

_OPCODES = {Op.READ: Io.READ, Op.WRITE: Io.WRITE, Op.FLUSH: Io.FLUSH, Op.WRITE_ZEROES: Io.WRITE_ZEROES,
            Op.DISCARD: Io.DSM, Op.DRV_IN: Io.READ, Op.DRV_OUT: Io.WRITE}  # fmt: skip
_STATUS: dict[int, BlkStatus] = {
    Status.SUCCESS: BlkStatus.OK,
    Status.LBA_OUT_OF_RANGE: BlkStatus.TARGET,
    Status.INVALID_OPCODE: BlkStatus.NOTSUPP,
    Status.INVALID_FIELD: BlkStatus.NOTSUPP,
    Status.INVALID_NAMESPACE: BlkStatus.NOTSUPP,
    Status.WRITE_FAULT: BlkStatus.MEDIUM,
    Status.UNRECOVERED_READ_ERROR: BlkStatus.MEDIUM,
    Status.COMPARE_FAILURE: BlkStatus.MEDIUM,
}


def blk_status_of(status: int) -> BlkStatus:
    """The block layer's status for an NVMe status field (``nvme_error_status``)."""
    return _STATUS.get(status & 0x7FF, BlkStatus.IOERR)


@dataclass(slots=True)
class Done:
    """A finished request: the controller's status field, what the block layer makes of it, and the controller's
    failure when it ended because of one.
    """

    request: Request
    iod: Iod
    status: int
    blk_status: BlkStatus
    error: HostError | None = None

    @property
    def text(self) -> str:
        """The status by name."""
        return status_name(self.status)


@dataclass(slots=True)
class Flight:
    """A request in flight: its number, mapping, and command; the block that holds DSM ranges; how it fared so far."""

    number: int
    iod: Iod
    space: NamespaceFacts
    timeout_ns: int
    command: Command = field(default_factory=lambda: Command(0))
    ranges: Block | None = None
    tries: int = 0
    aborting: bool = False

    @property
    def text(self) -> str:
        """``READ of 8 blocks at 64 (namespace 1)``."""
        command = self.command
        name = Io(command.opcode).name if command.opcode in Io._value2member_map_ else f"command {command.opcode:#04x}"
        if command.opcode in (Io.READ, Io.WRITE, Io.COMPARE, Io.WRITE_ZEROES):
            lba, count = command.cdw10 | command.cdw11 << 32, (command.cdw12 & 0xFFFF) + 1
            name += f" of {count} blocks at {lba}"
        return f"{name} (namespace {command.nsid})"


def build(flight: Flight, pool: DescriptorPool, opcode: int | None) -> Command:
    """The command of a mapped request; ``opcode`` replaces the usual one (Compare is a write that writes nothing)."""
    iod, space = flight.iod, flight.space
    request: Request = iod.request
    shift = space.block_size.bit_length() - 1 - SECTOR_SHIFT
    command = Command(_OPCODES[Op(request.op)] if opcode is None else opcode, space.nsid, iod.low, iod.high)
    command.mptr, command.flags = iod.mptr, iod.psdt << 6
    if request.op in (Op.READ, Op.WRITE, Op.DRV_IN, Op.DRV_OUT):
        _place(command, request.sector >> shift, request.payload_bytes // space.block_size)
    elif request.op == Op.WRITE_ZEROES:
        ((sector, count),) = request.ranges or ((request.sector, 1 << shift),)
        _place(command, sector >> shift, count >> shift)
        command.cdw12 |= WRITE_ZEROES_DEALLOCATE
    elif request.op == Op.DISCARD:
        ranges = [(sector >> shift, count >> shift) for sector, count in request.ranges]
        flight.ranges = _write_ranges(command, pool, ranges)
    return command


def _place(command: Command, lba: int, count: int) -> None:
    if not 1 <= count <= 0x10000:
        raise MisuseError(f"{count} blocks: one command transfers 1 to 65536")
    command.cdw10, command.cdw11, command.cdw12 = lba & 0xFFFF_FFFF, lba >> 32, count - 1


def _write_ranges(command: Command, pool: DescriptorPool, ranges: Sequence[tuple[int, int]]) -> Block:
    """DSM: the range list goes to a page of shared memory."""
    if not 1 <= len(ranges) <= DSM_MAX_RANGES:
        raise MisuseError(f"{len(ranges)} ranges: one Dataset Management command takes 1 to {DSM_MAX_RANGES}")
    block = pool.alloc()
    for at, (lba, count) in enumerate(ranges):
        block.words[2 * at] = count << 32
        block.words[2 * at + 1] = lba
    command.low, command.cdw10, command.cdw11 = block.addr, len(ranges) - 1, DSM_DEALLOCATE
    return block
