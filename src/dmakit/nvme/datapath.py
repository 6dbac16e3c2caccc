"""How the controller model moves data: a command's pointer to ranges, ranges through the DMA port.

The model has no other way to memory: an address that the IOMMU does not translate is a blocked access, which ends
the command with Data Transfer Error. Lists are fetched the same way.
"""

from __future__ import annotations

from typing import Protocol

from dmakit.consts import PSDT_PRP, PSDT_SGL_METABUF, PSDT_SGL_METASEG
from dmakit.errors import FaultError
from dmakit.nvme.command import Command
from dmakit.nvme.fetch import DescriptorReader
from dmakit.nvme.sgl import BIT_BUCKET
from dmakit.nvme.spec import (
    SGLS_BIT_BUCKET,
    SGLS_BYTE,
    SGLS_DWORD,
    SGLS_LONGER_THAN_DATA,
    SGLS_METADATA_SGL,
    Status,
)

Ranges = list[tuple[int, int]]


class Port(Protocol):
    """A device's way to memory (``iommu.port``)."""

    def read(self, iova: int, size: int) -> bytes:
        """``size`` bytes; FaultError when the access is blocked."""

    def write(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        """Store bytes; FaultError when the access is blocked."""


class CommandError(Exception):
    """Ends a command with a status."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


def _on_the_bus(addr: int, size: int) -> None:
    """An access over the last address ends the command."""
    if addr + size > 1 << 64:
        raise CommandError(Status.DATA_TRANSFER_ERROR)


class DataPath:
    """Reads pointers and moves bytes for a controller that announces ``sgls`` (Identify Controller, SGLS)."""

    def __init__(self, port: Port, sgls: int) -> None:
        self.port = port
        self.sgls = sgls
        self.reader = DescriptorReader(
            port,
            dword=sgls & 3 == SGLS_DWORD,
            bit_bucket=bool(sgls & SGLS_BIT_BUCKET),
            longer=bool(sgls & SGLS_LONGER_THAN_DATA),
        )

    def fetch(self, addr: int, size: int) -> bytes:
        """Bytes from host memory; a blocked access ends the command."""
        _on_the_bus(addr, size)
        try:
            return self.port.read(addr, size)
        except FaultError:
            raise CommandError(Status.DATA_TRANSFER_ERROR) from None

    def store(self, addr: int, payload: bytes) -> None:
        """Bytes to host memory; a blocked access ends the command."""
        _on_the_bus(addr, len(payload))
        try:
            self.port.write(addr, payload)
        except FaultError:
            raise CommandError(Status.DATA_TRANSFER_ERROR) from None

    def check_pointer(self, command: Command, admin: bool) -> None:
        """Whether this controller reads such a data pointer; SGLs are for I/O queues, PSDT 3 is reserved."""
        if command.psdt == PSDT_PRP:
            return
        if admin or command.psdt not in (PSDT_SGL_METABUF, PSDT_SGL_METASEG):
            raise CommandError(Status.INVALID_FIELD)
        if not self.sgls & (SGLS_BYTE | SGLS_DWORD):
            raise CommandError(Status.INVALID_FIELD)
        if command.psdt == PSDT_SGL_METASEG and not self.sgls & SGLS_METADATA_SGL:
            raise CommandError(Status.INVALID_FIELD)

    def ranges(self, command: Command, size: int, to_host: bool) -> Ranges:
        """Where the command's data is."""
        return self._read(command.psdt, command.low, command.high, size, to_host)

    def metadata_ranges(self, command: Command, size: int, to_host: bool) -> Ranges:
        """Where the command's metadata is: at MPTR, or described by the SGL segment there."""
        if command.psdt != PSDT_SGL_METASEG:
            if command.mptr & 3:
                raise CommandError(Status.INVALID_FIELD)
            return [(command.mptr, size)]
        if command.mptr & 7:
            raise CommandError(Status.INVALID_SGL_SEGMENT)
        raw = self.fetch(command.mptr, 16)
        low, high = int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")
        return self._read(PSDT_SGL_METASEG, low, high, size, to_host, metadata=True)

    def _read(self, form: int, low: int, high: int, size: int, to_host: bool, *, metadata: bool = False) -> Ranges:
        status = self.reader.read(form, low, high, size, to_host=to_host, metadata=metadata)
        if status:
            raise CommandError(Status(status))
        return self.reader.ranges

    def gather(self, ranges: Ranges) -> bytes:
        """The bytes of the ranges, in order."""
        return b"".join(self.fetch(addr, length) for addr, length in ranges)

    def scatter(self, ranges: Ranges, payload: bytes) -> None:
        """Distribute ``payload`` over the ranges; bit buckets swallow their part."""
        at = 0
        for addr, length in ranges:
            if addr != BIT_BUCKET:
                self.store(addr, payload[at : at + length])
            at += length
