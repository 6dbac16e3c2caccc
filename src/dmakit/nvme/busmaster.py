"""The controller model's way out: its DMA port behind the bus-master switch, and its own memory in front of both.

``enabled`` is the Bus Master Enable bit of the PCI command register: while it is off, every access is blocked.
``MemoryBuffer`` is a controller memory buffer (CMB): device memory in a BAR, which the host finds by CMBLOC and CMBSZ
and places, as the controller sees it, at CMBMSC.CBA. An access of the controller to that range stays in the device.

Source: NVM Express Base Specification 1.4 and later, "Controller Memory Buffer".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmakit.errors import FaultError, MisuseError
from dmakit.nvme.spec import (
    CMBMSC_CMSE,
    CMBMSC_CRE,
    CMBSZ_CQS,
    CMBSZ_LISTS,
    CMBSZ_RDS,
    CMBSZ_SQS,
    CMBSZ_WDS,
    PAGE,
    Reg,
)

if TYPE_CHECKING:
    from dmakit.memory.physical import PhysicalMemory
    from dmakit.nvme.datapath import Port

CMB_BAR = 2


class MemoryBuffer:
    """``size`` bytes of BAR 2 at physical address ``start`` of the machine."""

    def __init__(self, memory: PhysicalMemory, start: int, size: int) -> None:
        if size < PAGE or size % PAGE or start % PAGE:
            raise MisuseError(f"memory buffer [{start:#x}, +{size:#x}): must be whole pages")
        self.memory = memory
        self.start = start
        self.size = size
        self.control = 0

    def register(self, offset: int) -> int:
        """CMBLOC, CMBSZ, CMBMSC and CMBSTS; the first two read 0 until CMBMSC.CRE is set."""
        if offset == Reg.CMBMSC:
            return self.control
        if not self.control & CMBMSC_CRE:
            return 0
        if offset == Reg.CMBLOC:
            return CMB_BAR
        if offset == Reg.CMBSZ:
            kinds = CMBSZ_SQS | CMBSZ_CQS | CMBSZ_LISTS | CMBSZ_RDS | CMBSZ_WDS
            return self.size // PAGE << 12 | kinds
        return 0

    @property
    def base(self) -> int:
        """Where the controller sees it; −1 while it does not."""
        return self.control & ~(PAGE - 1) if self.control & CMBMSC_CMSE else -1

    def phys(self, iova: int, size: int) -> int:
        """The physical address of a range inside it, −1 for any other."""
        base = self.base
        return self.start + iova - base if base >= 0 and base <= iova and iova + size <= base + self.size else -1


class BusMaster:
    """``datapath.Port`` over another port; see the head of the module."""

    def __init__(self, port: Port, buffer: MemoryBuffer | None = None) -> None:
        self.port = port
        self.buffer = buffer
        self.enabled = True

    def read(self, iova: int, size: int) -> bytes:
        """``size`` bytes; FaultError when the access is blocked."""
        if self.buffer is not None and (phys := self.buffer.phys(iova, size)) >= 0:
            return self.buffer.memory.read(phys, size)
        if not self.enabled:
            raise FaultError(f"read of {size} bytes at {iova:#x}: bus mastering is off", iova=iova)
        return self.port.read(iova, size)

    def write(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        """Store bytes; FaultError when the access is blocked."""
        if self.buffer is not None and (phys := self.buffer.phys(iova, len(data))) >= 0:
            self.buffer.memory.write(phys, data)
            return
        if not self.enabled:
            raise FaultError(f"write of {len(data)} bytes at {iova:#x}: bus mastering is off", iova=iova, write=True)
        self.port.write(iova, data)
