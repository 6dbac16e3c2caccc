"""The two records of a queue: the 64-byte submission entry and the 16-byte completion entry.

Shared by the driver, which packs commands, and the controller model, which unpacks them. Little-endian, as the
specification lays them out: command dword 0 holds opcode, flags (FUSE in bits 1:0, PSDT in bits 7:6) and the
command identifier; a completion's last word holds the phase bit and above it the 15-bit status field.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from dmakit.nvme.spec import CQE_BYTES, SQE_BYTES

_SQE = struct.Struct("<BBHIIIQQQ6I")
_CQE = struct.Struct("<IIHHHH")
assert _SQE.size == SQE_BYTES
assert _CQE.size == CQE_BYTES


@dataclass(slots=True)
class Command:
    """A submission entry. ``low`` and ``high`` are PRP1 and PRP2, or the SGL descriptor; ``mptr``: metadata pointer."""

    opcode: int
    nsid: int = 0
    low: int = 0
    high: int = 0
    cdw10: int = 0
    cdw11: int = 0
    cdw12: int = 0
    cdw13: int = 0
    cdw14: int = 0
    cdw15: int = 0
    mptr: int = 0
    flags: int = 0
    cid: int = 0

    @property
    def psdt(self) -> int:
        """How the data pointer is to be read (``consts.PSDT_*``)."""
        return self.flags >> 6

    @property
    def fuse(self) -> int:
        """Fused-operation bits."""
        return self.flags & 3

    def pack(self) -> bytes:
        """The 64 bytes."""
        dwords = (self.cdw10, self.cdw11, self.cdw12, self.cdw13, self.cdw14, self.cdw15)
        return _SQE.pack(self.opcode, self.flags, self.cid, self.nsid, 0, 0, self.mptr, self.low, self.high, *dwords)

    @classmethod
    def unpack(cls, raw: bytes) -> Command:
        """The command of 64 bytes."""
        opcode, flags, cid, nsid, _, _, mptr, low, high, c10, c11, c12, c13, c14, c15 = _SQE.unpack(raw)
        return cls(opcode, nsid, low, high, c10, c11, c12, c13, c14, c15, mptr, flags, cid)


class Completion(NamedTuple):
    """A completion entry; ``status`` is the 15-bit field without the phase bit (``spec.Status``, perhaps with DNR)."""

    result: int
    sq_head: int
    sq_id: int
    cid: int
    status: int
    phase: int

    def pack(self) -> bytes:
        """The 16 bytes."""
        return _CQE.pack(self.result, 0, self.sq_head, self.sq_id, self.cid, self.status << 1 | self.phase)

    @classmethod
    def unpack(cls, raw: bytes) -> Completion:
        """The completion of 16 bytes."""
        result, _, sq_head, sq_id, cid, field = _CQE.unpack(raw)
        return cls(result, sq_head, sq_id, cid, field >> 1, field & 1)
