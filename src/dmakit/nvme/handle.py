"""A namespace as a user holds it: calls in blocks, data in bytes.

``NamespaceBase`` turns a call into an ``Operation``: it checks the range, splits transfers, stages what the device does
not reach. ``Namespace`` runs operations and waits; ``nvme.aio`` awaits them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dmakit.block.limits import SECTOR_SHIFT
from dmakit.block.request import Op, Request
from dmakit.errors import DmakitError, MisuseError, UnsupportedError
from dmakit.nvme.buffers import DmaBuffer
from dmakit.nvme.operation import Operation
from dmakit.nvme.spec import DSM_MAX_RANGES, Io

if TYPE_CHECKING:
    from dmakit.nvme.controller import Controller

MAX_BLOCKS = 0x10000
Data = Any  # bytes, or an object with a flat buffer


class NamespaceBase:
    """What sync and async namespaces have in common: facts, checks, operations."""

    def __init__(self, controller: Controller, nsid: int) -> None:
        self.controller = controller
        self.facts = controller.driver.space(nsid)
        self.nsid = nsid
        self.blocks, self.block_size = self.facts.blocks, self.facts.block_size
        self._shift = self.block_size.bit_length() - 1 - SECTOR_SHIFT

    def _range(self, lba: int, blocks: int) -> None:
        if lba < 0 or blocks < 1 or lba + blocks > self.blocks:
            raise MisuseError(
                f"blocks [{lba}, {lba + blocks}): must be at least one, inside namespace {self.nsid} of {self.blocks}"
            )

    def _count(self, size: int) -> int:
        if size <= 0 or size % self.block_size:
            raise MisuseError(f"{size} bytes: must be whole blocks of {self.block_size} bytes")
        return size // self.block_size

    def _transfer(
        self, what: str, op: Op, lba: int, buffer: DmaBuffer, offset: int, size: int, opcode: int | None = None
    ) -> Operation:
        """An operation on part of a buffer."""
        self._range(lba, self._count(size))
        if self.facts.metadata_size:
            raise UnsupportedError(f"namespace {self.nsid} has {self.facts.metadata_size} bytes of metadata a block")
        requests = self.controller.driver.requests(op, lba, buffer.pieces(offset, size), nsid=self.nsid)
        return Operation(f"{what} at block {lba}", self.nsid, self.controller.spread(requests), buffer, opcode)

    def _staged(
        self, what: str, op: Op, lba: int, size: int, data: Data = None, opcode: int | None = None
    ) -> Operation:
        """An operation on memory of its own, which goes when it ends."""
        self._range(lba, self._count(size))
        buffer = self.controller.buffer(size)
        try:
            if data is not None:
                buffer.view[:] = memoryview(data).cast("B")
            operation = self._transfer(what, op, lba, buffer, 0, size, opcode)
        except BaseException:
            buffer.free()
            raise
        operation.finish = buffer.free
        return operation

    def _write(self, what: str, lba: int, data: Data, offset: int, size: int | None, opcode: int | None) -> Operation:
        if isinstance(data, DmaBuffer):
            length = len(data) - offset if size is None else size
            return self._transfer(what, Op.WRITE, lba, data, offset, length, opcode)
        if offset or size is not None:
            raise MisuseError("offset and size belong to a DmaBuffer: slice other data")
        return self._staged(what, Op.WRITE, lba, memoryview(data).nbytes, data, opcode)

    def _read(self, lba: int, blocks: int, found: list[bytes]) -> Operation:
        operation = self._staged("read", Op.READ, lba, blocks * self.block_size)
        buffer = operation.buffer
        assert buffer is not None

        def finish() -> None:
            if operation.error is None:
                found.append(bytes(buffer.view))
            buffer.free()

        operation.finish = finish
        return operation

    def _simple(self, what: str, requests: list[Request]) -> Operation:
        return Operation(what, self.nsid, self.controller.spread(requests), None)

    def _flush(self) -> Operation:
        return self._simple("flush", [Request(Op.FLUSH)])

    def _zeroes(self, lba: int, blocks: int) -> Operation:
        self._range(lba, blocks)
        if not self.controller.facts.write_zeroes:
            raise UnsupportedError("this controller has no Write Zeroes (ONCS bit 3)")
        pieces = [(at, min(MAX_BLOCKS, lba + blocks - at)) for at in range(lba, lba + blocks, MAX_BLOCKS)]
        shift = self._shift
        requests = [Request(Op.WRITE_ZEROES, ranges=[(at << shift, n << shift)]) for at, n in pieces]
        return self._simple(f"write zeroes at block {lba}", requests)

    def _deallocate(self, ranges: Iterable[tuple[int, int]]) -> Operation:
        wanted = list(ranges)
        if not self.controller.facts.deallocate:
            raise UnsupportedError("this controller has no Dataset Management (ONCS bit 2)")
        if not wanted:
            raise MisuseError("deallocate: no ranges")
        for lba, blocks in wanted:
            self._range(lba, blocks)
        sectors = [(lba << self._shift, blocks << self._shift) for lba, blocks in wanted]
        parts = [sectors[at : at + DSM_MAX_RANGES] for at in range(0, len(sectors), DSM_MAX_RANGES)]
        return self._simple("deallocate", [Request(Op.DISCARD, ranges=part) for part in parts])

    def _compare(self, lba: int, data: Data, offset: int, size: int | None) -> Operation:
        if not self.controller.facts.compare:
            raise UnsupportedError("this controller has no Compare (ONCS bit 0)")
        return self._write("compare", lba, data, offset, size, int(Io.COMPARE))


class Namespace(NamespaceBase):
    """Calls that wait. ``lba`` and ``blocks`` count blocks of ``block_size`` bytes; errors: ``IoError`` for a status of
    the controller, ``ControllerError`` when it fails as a whole.
    """

    def read(self, lba: int, blocks: int) -> bytes:
        """The data of ``blocks`` blocks."""
        found: list[bytes] = []
        self.controller.run(self._read(lba, blocks, found))
        return found[0]

    def read_into(self, lba: int, buffer: DmaBuffer, *, offset: int = 0, size: int | None = None) -> None:
        """Read ``size`` bytes (to the buffer's end) into a ``DmaBuffer``, in place."""
        length = len(buffer) - offset if size is None else size
        self.controller.run(self._transfer("read", Op.READ, lba, buffer, offset, length))

    def write(self, lba: int, data: Data, *, offset: int = 0, size: int | None = None) -> None:
        """Write whole blocks: any flat buffer, or part of a ``DmaBuffer`` in place."""
        self.controller.run(self._write("write", lba, data, offset, size, None))

    def compare(self, lba: int, data: Data, *, offset: int = 0, size: int | None = None) -> bool:
        """Whether the blocks hold this data (the controller compares)."""
        operation = self._compare(lba, data, offset, size)
        try:
            self.controller.run(operation)
        except DmakitError:
            if not operation.differs:
                raise
        return not operation.differs

    def flush(self) -> None:
        """Make written data durable."""
        self.controller.run(self._flush())

    def write_zeroes(self, lba: int, blocks: int) -> None:
        """Make blocks read as zero; the controller may deallocate them."""
        self.controller.run(self._zeroes(lba, blocks))

    def deallocate(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Tell the controller that (first block, blocks) ranges are not needed any more (DSM)."""
        self.controller.run(self._deallocate(ranges))
