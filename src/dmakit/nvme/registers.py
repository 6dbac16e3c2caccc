"""The controller's properties, decoded, and the error that carries them.

``Capabilities.decode(CAP)`` gives a driver's limits. ``describe`` reads what can be read of a controller that does not
do what it should, in one line; ``ControllerError`` takes that line with it, and the values in ``registers``. A
register that reads all ones is not a value: the device is unplugged, or its bus does not answer.

Source: NVM Express Base Specification, "Property Definitions".
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from dmakit.errors import HostError
from dmakit.nvme.spec import CSTS_CFS, CSTS_RDY, CSTS_SHST_MASK, Reg

ALL_ONES = 0xFFFF_FFFF
_HALF_SECOND = 500_000_000
_CAP_CONTIGUOUS, _CAP_NVM, _CAP_CMB = 1 << 16, 1 << 37, 1 << 57


class Registers(Protocol):
    """Where properties are read."""

    def read32(self, offset: int) -> int:
        """A 32-bit property."""

    def read64(self, offset: int) -> int:
        """A 64-bit property."""


class Capabilities(NamedTuple):
    """CAP: queue entries (MQES + 1), ready time-out (TO) in ns, doorbell stride in bytes, log2 of page sizes."""

    max_entries: int
    contiguous: bool
    timeout_ns: int
    stride: int
    nvm: bool
    min_page_shift: int
    max_page_shift: int
    memory_buffer: bool

    @classmethod
    def decode(cls, raw: int) -> Capabilities:
        """From the 64-bit register."""
        return cls(
            (raw & 0xFFFF) + 1,
            bool(raw & _CAP_CONTIGUOUS),
            max(raw >> 24 & 0xFF, 1) * _HALF_SECOND,
            4 << (raw >> 32 & 15),
            bool(raw & _CAP_NVM),
            12 + (raw >> 48 & 15),
            12 + (raw >> 52 & 15),
            bool(raw & _CAP_CMB),
        )


class ControllerError(HostError):
    """A controller that does not do what the specification says; ``registers`` holds CC, CSTS and others by name."""

    def __init__(self, message: str, errno: int = 5, registers: dict[str, int] | None = None) -> None:
        super().__init__(message, errno)
        self.registers = registers or {}


def snapshot(device: Registers) -> dict[str, int]:
    """CC, CSTS, AQA and VS as they are now."""
    return {reg.name: device.read32(reg) for reg in (Reg.CC, Reg.CSTS, Reg.AQA, Reg.VS)}


def gone(registers: dict[str, int]) -> bool:
    """Whether the device does not answer any more."""
    return registers["CSTS"] == ALL_ONES


def describe(registers: dict[str, int]) -> str:
    """``CC=0x00460001 CSTS=0x00000001 (ready)``."""
    status = registers["CSTS"]
    if status == ALL_ONES:
        return "every register reads all ones: the device is unplugged or does not answer"
    words = ["ready"] if status & CSTS_RDY else ["not ready"]
    words += ["fatal status"] if status & CSTS_CFS else []
    words += [f"shutdown status {(status & CSTS_SHST_MASK) >> 2}"] if status & CSTS_SHST_MASK else []
    return f"CC={registers['CC']:#010x} CSTS={status:#010x} ({', '.join(words)})"


def failure(device: Registers, what: str, errno: int = 110) -> ControllerError:
    """The error ``what``, with the registers as they are; ENODEV when they cannot be read."""
    registers = snapshot(device)
    return ControllerError(f"{what}; {describe(registers)}", 19 if gone(registers) else errno, registers)
