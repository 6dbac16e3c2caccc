"""The controller memory buffer: memory inside the controller, in one of its BARs, that I/O can use in place.

Data that is read into it and written from it never crosses the bus. The CPU reaches it through the BAR (``view``); a
peer device reaches the same BAR (``memory.ranges``: source-space addresses; ``reach``). The controller itself knows it
by the address range that the host gives it (CMBMSC.CBA): an I/O virtual address range that is set aside for it here and
that nothing else is ever mapped at.

Source: NVM Express Base Specification 1.4 and later, CMBLOC, CMBSZ, CMBMSC, CMBSTS. Models ``drivers/nvme/host/pci.c``
(nvme_map_cmb).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dmakit.dma.direction import Direction
from dmakit.errors import MisuseError, UnsupportedError
from dmakit.nvme.registers import Capabilities, failure
from dmakit.nvme.registration import Registration
from dmakit.nvme.spec import CMBMSC_CMSE, CMBMSC_CRE, CMBSZ_RDS, CMBSZ_WDS, Reg
from dmakit.nvme.transport import Transport

_BAD_ADDRESS = 1  # CMBSTS.CBAI


class Place(NamedTuple):
    """Where it is: BAR, first byte in it, bytes; ``flags``: the low bits of CMBSZ (what it may hold)."""

    bar: int
    offset: int
    size: int
    flags: int


class BarMemory:
    """Part of a BAR as ``buffers.HostMemory``."""

    def __init__(self, start: int, size: int) -> None:
        self.size = size
        self.ranges = [(start, size)]

    def slices(self, offset: int = 0, n: int | None = None) -> list[tuple[int, int]]:
        """The (phys, length) piece of ``n`` bytes from ``offset``."""
        length = self.size - offset if n is None else n
        if offset < 0 or length < 0 or offset + length > self.size:
            raise MisuseError(f"[{offset}, {offset + length}) is not inside a memory buffer of {self.size} bytes")
        return [(self.ranges[0][0] + offset, length)] if length else []

    def release(self) -> None:
        """The BAR stays where it is."""


def reach(device: Any, start: int, size: int) -> Registration:
    """Let ``device`` read and write a peer's memory [start, start + size), until the registration is released."""
    addr: int = device.map_resource(start, size, Direction.BIDIRECTIONAL)
    return Registration([(start, size, addr)], lambda: device.unmap_resource(addr, size, Direction.BIDIRECTIONAL))


def locate(transport: Transport, capabilities: Capabilities) -> Place:
    """Make CMBLOC and CMBSZ readable and read them; UnsupportedError when the controller has no buffer for data."""
    if not capabilities.memory_buffer:
        raise UnsupportedError(f"{transport.name}: this controller has no memory buffer (CAP.CMBS)")
    transport.write64(Reg.CMBMSC, CMBMSC_CRE)
    where, size = transport.read32(Reg.CMBLOC), transport.read32(Reg.CMBSZ)
    unit = 1 << (12 + 4 * (size >> 8 & 15))
    place = Place(where & 7, (where >> 12) * unit, (size >> 12) * unit, size & 0x1F)
    if place.size == 0 or place.flags & (CMBSZ_RDS | CMBSZ_WDS) != CMBSZ_RDS | CMBSZ_WDS:
        raise UnsupportedError(f"{transport.name}: its memory buffer does not hold data both ways (CMBSZ={size:#x})")
    return place


def enable(transport: Transport, place: Place) -> tuple[BarMemory, Registration]:
    """Give the buffer its address and switch it on; ``Registration.release`` switches it off."""
    start, length = transport.bar_memory(place.bar)
    if place.offset + place.size > length:
        raise failure(transport, f"CMBLOC: bytes {place.offset:#x} to {place.offset + place.size:#x} lie outside BAR "
                      f"{place.bar} of {length:#x} bytes", 5)  # fmt: skip
    start += place.offset
    device: Any = transport.device
    state = device.try_alloc(0, place.size)
    base: int = state.addr if state else start
    transport.write64(Reg.CMBMSC, base | CMBMSC_CRE | CMBMSC_CMSE)

    def undo() -> None:
        transport.write64(Reg.CMBMSC, 0)
        if state:
            state.free()

    if transport.read32(Reg.CMBSTS) & _BAD_ADDRESS:
        undo()
        raise failure(transport, f"CMBMSC: the controller refuses the address {base:#x}", 5)
    return BarMemory(start, place.size), Registration([(start, place.size, base)], undo)
