"""Fault records: what the IOMMU writes down when it blocks an access.

Hardware has a few fault recording registers; when all are taken, further faults are lost and only an overflow bit
says so until software has read them (VT-d specification, 7.2). So the log is bounded, keeps the *oldest* records, and
counts what it lost. ``clear`` is what a fault handler does when it has read them.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import cython

from dmakit import consts
from dmakit.errors import FaultError, MisuseError

REASONS = {
    consts.FAULT_NO_CONTEXT: "no domain is attached",
    consts.FAULT_WIDTH: "the address is beyond the domain's width",
    consts.FAULT_WRITE: "no write access is set",
    consts.FAULT_READ: "no read access is set",
    consts.FAULT_TABLE: "a table pointer leads outside memory",
    consts.FAULT_RESERVED: "a reserved bit of a table entry is set",
}


class FaultRecord(NamedTuple):
    """One blocked access: address as the device gave it, reason (consts.FAULT_*), direction, requester, domain id."""

    iova: int
    reason: int
    write: bool
    source: int
    did: int

    def __str__(self) -> str:
        return f"{describe(self.source, self.iova, self.write, self.reason)} (domain {self.did})"


MOST_RECORDS = 1 << 20


def device_name(source: int) -> str:
    """A requester id (bus << 8 | devfn) as bus:device.function."""
    return f"{source >> 8:02x}:{(source >> 3) & 31:02x}.{source & 7}"


def describe(source: int, iova: int, write: bool, reason: int, name: str = "") -> str:
    """The sentence for a blocked access; ``name`` stands for the requester id where the caller knows it."""
    action, why = "write" if write else "read", REASONS.get(reason, "not a reason of this unit")
    return f"device {name or device_name(source)} may not {action} {iova:#x}: {why} (reason {reason:#x})"


def fault_error(source: int, iova: int, write: bool, reason: int, name: str = "") -> FaultError:
    """The FaultError for a blocked access."""
    return FaultError(describe(source, iova, write, reason, name), iova=iova, write=write)


@cython.final
@cython.cclass
class FaultLog:
    """Up to ``capacity`` records; ``lost`` counts the faults that found no room."""

    def __init__(self, capacity: int = 64) -> None:
        if not 0 < capacity <= MOST_RECORDS:
            raise MisuseError(f"fault_entries={capacity}: must be 1 to {MOST_RECORDS}")
        self.capacity = capacity
        self.count = 0
        self.lost = 0
        self.iovas = memoryview(array("Q", bytes(8 * capacity)))
        self.infos = memoryview(array("Q", bytes(8 * capacity)))

    def _add(
        self, did: cython.int, iova: cython.ulonglong, write: cython.bint, source: cython.int, reason: cython.int
    ) -> cython.void:
        """Write one record, or count it as lost."""
        if self.count == self.capacity:
            self.lost += 1
            return
        info: cython.ulonglong = (cython.cast(cython.ulonglong, did) << 32) | (
            cython.cast(cython.ulonglong, source) << 8
        )
        self.iovas[self.count] = iova
        self.infos[self.count] = info | (cython.cast(cython.ulonglong, reason) << 1) | (1 if write else 0)
        self.count += 1

    def records(self) -> list[FaultRecord]:
        """The records, oldest first."""
        found = []
        for i in range(self.count):
            info = int(self.infos[i])
            found.append(
                FaultRecord(int(self.iovas[i]), (info >> 1) & 15, bool(info & 1), (info >> 8) & 0xFFFF, info >> 32)
            )
        return found

    def clear(self) -> None:
        """Forget the records and the overflow."""
        self.count = 0
        self.lost = 0
