"""The NVM command set of the controller model: Read, Write, Compare, Flush, Write Zeroes, Dataset Management.

Order of the checks: pointer form, namespace, transfer size, block range, data pointer, medium, transfer. Bad input
ends with the specification's status and no change of the namespace.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from dmakit.nvme.command import Command
from dmakit.nvme.datapath import CommandError, DataPath
from dmakit.nvme.namespace import Namespace
from dmakit.nvme.spec import DSM_DEALLOCATE, DSM_RANGE_BYTES, NSID_ALL, Io, Status

_RANGE = struct.Struct("<IIQ")


@dataclass(slots=True)
class Counters:
    """What the SMART log tells."""

    reads: int = 0
    writes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


class NvmCommands:
    """Executes I/O commands on ``namespaces`` (by nsid); ``max_transfer`` bytes (0 = no limit)."""

    def __init__(self, path: DataPath, namespaces: dict[int, Namespace], max_transfer: int) -> None:
        self.path = path
        self.namespaces = namespaces
        self.max_transfer = max_transfer
        self.counters = Counters()
        self.handlers = {
            int(Io.FLUSH): self._flush,
            int(Io.WRITE): self._write,
            int(Io.READ): self._read,
            int(Io.COMPARE): self._compare,
            int(Io.WRITE_ZEROES): self._write_zeroes,
            int(Io.DSM): self._dataset_management,
        }

    def execute(self, command: Command) -> int:
        """Run a command; returns dword 0 of the completion, or raises CommandError."""
        handler = self.handlers.get(command.opcode)
        if handler is None:
            raise CommandError(Status.INVALID_OPCODE)
        if command.fuse:
            raise CommandError(Status.INVALID_FIELD)
        handler(command)
        return 0

    def _namespace(self, command: Command) -> Namespace:
        space = self.namespaces.get(command.nsid)
        if space is None:
            raise CommandError(Status.INVALID_NAMESPACE)
        return space

    def _blocks(self, command: Command, space: Namespace, *, transfer: bool) -> tuple[int, int]:
        """(first block, count) of a command, checked."""
        lba, count = command.cdw10 | command.cdw11 << 32, (command.cdw12 & 0xFFFF) + 1
        if transfer and self.max_transfer and count * space.block_size > self.max_transfer:
            raise CommandError(Status.INVALID_FIELD)
        if not space.holds(lba, count):
            raise CommandError(Status.LBA_OUT_OF_RANGE)
        return lba, count

    def _read(self, command: Command) -> None:
        self.path.check_pointer(command, admin=False)
        space = self._namespace(command)
        lba, count = self._blocks(command, space, transfer=True)
        ranges = self.path.ranges(command, count * space.block_size, to_host=True)
        if space.damaged(lba, count):
            raise CommandError(Status.UNRECOVERED_READ_ERROR)
        try:
            payload, extra = space.read(lba, count), space.read_metadata(lba, count)
        except OSError:
            raise CommandError(Status.UNRECOVERED_READ_ERROR) from None
        self.path.scatter(ranges, payload)
        if extra:
            self.path.scatter(self.path.metadata_ranges(command, len(extra), to_host=True), extra)
        self.counters.reads += 1
        self.counters.bytes_read += len(payload)

    def _write(self, command: Command) -> None:
        self.path.check_pointer(command, admin=False)
        space = self._namespace(command)
        lba, count = self._blocks(command, space, transfer=True)
        payload = self.path.gather(self.path.ranges(command, count * space.block_size, to_host=False))
        extra = b""
        if space.metadata_size:
            extra = self.path.gather(self.path.metadata_ranges(command, count * space.metadata_size, to_host=False))
        if space.damaged(lba, count):
            raise CommandError(Status.WRITE_FAULT)
        try:
            space.write(lba, payload)
            space.write_metadata(lba, extra)
        except OSError:
            raise CommandError(Status.WRITE_FAULT) from None
        self.counters.writes += 1
        self.counters.bytes_written += len(payload)

    def _compare(self, command: Command) -> None:
        self.path.check_pointer(command, admin=False)
        space = self._namespace(command)
        lba, count = self._blocks(command, space, transfer=True)
        payload = self.path.gather(self.path.ranges(command, count * space.block_size, to_host=False))
        if space.damaged(lba, count):
            raise CommandError(Status.UNRECOVERED_READ_ERROR)
        try:
            same = space.read(lba, count) == payload
        except OSError:
            raise CommandError(Status.UNRECOVERED_READ_ERROR) from None
        if not same:
            raise CommandError(Status.COMPARE_FAILURE)

    def _write_zeroes(self, command: Command) -> None:
        space = self._namespace(command)
        lba, count = self._blocks(command, space, transfer=False)
        self._zero(space, [(lba, count)])

    def _flush(self, command: Command) -> None:
        spaces = list(self.namespaces.values()) if command.nsid == NSID_ALL else [self._namespace(command)]
        try:
            for space in spaces:
                space.backing.flush()
        except OSError:
            raise CommandError(Status.WRITE_FAULT) from None

    def _dataset_management(self, command: Command) -> None:
        self.path.check_pointer(command, admin=False)
        space = self._namespace(command)
        count = (command.cdw10 & 0xFF) + 1
        raw = self.path.gather(self.path.ranges(command, count * DSM_RANGE_BYTES, to_host=False))
        ranges = [(lba, blocks) for _, blocks, lba in _RANGE.iter_unpack(raw)]
        if any(not space.holds(lba, blocks) for lba, blocks in ranges):
            raise CommandError(Status.LBA_OUT_OF_RANGE)
        if command.cdw11 & DSM_DEALLOCATE:
            self._zero(space, ranges)

    def _zero(self, space: Namespace, ranges: list[tuple[int, int]]) -> None:
        if any(space.damaged(lba, count) for lba, count in ranges):
            raise CommandError(Status.WRITE_FAULT)
        try:
            for lba, count in ranges:
                space.zero(lba, count)
        except OSError:
            raise CommandError(Status.WRITE_FAULT) from None
