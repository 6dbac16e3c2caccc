"""Configuration space of a software function: bytes, and for each bit whether a driver may change it.

A type-0 header, BARs that tell their size (all ones written, the size's mask read back), and a list of capabilities:
MSI (64-bit), MSI-X and PCI Express, as the identity asks. It is what VFIO shows: BARs and message addresses are the
driver's to write without effect, because they are the host's; a driver switches interrupts on with eventfds, and the
enable bits tell that it did. The command register counts: memory decoding, bus mastering, INTx disable.

Source: PCI Local Bus 3.0, chapter 6 (header, MSI, MSI-X); PCI Express Base, chapter 7 (device control, FLR);
``drivers/vfio/pci/vfio_pci_config.c`` (what a driver may write).
"""

from __future__ import annotations

import struct

from dmakit.platform.registers import (
    CAPABILITY_POINTER,
    COMMAND,
    COMMAND_BUS_MASTER,
    COMMAND_MEMORY,
    STATUS,
    STATUS_CAPABILITIES,
)
from dmakit.platform.soft.model import Bar, Identity

COMMAND_INTX_DISABLE = 0x400
_COMMAND_WRITABLE = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE | 0x140  # parity, SERR#
_STATUS_INTERRUPT = 8
_CAP_MSI, _CAP_EXPRESS, _CAP_MSIX = 0x05, 0x10, 0x11
_BAR0 = 0x10
_MEMORY_64_PREFETCHABLE = 0xC
_ROOT_COMPLEX_ENDPOINT, _FLR = 9, 1 << 28
_FIRST_CAPABILITY = 0x40


class Config:
    """The space of one function; ``places``: the address of each BAR."""

    def __init__(self, identity: Identity, places: dict[int, int]) -> None:
        self.size = 4096 if identity.express else 256
        self.bytes = bytearray(self.size)
        self.writable = bytearray(self.size)
        self._next, self._link = _FIRST_CAPABILITY, CAPABILITY_POINTER
        self._device_control = 0
        self._enable: dict[str, tuple[int, int]] = {}  # kind: (byte, bit)
        self._header(identity)
        for index, bar in identity.all_bars().items():
            self._bar(index, bar, places[index])
        self._capabilities(identity)

    # What it holds ------------------------------------------------------------------------------------------

    def _put(self, offset: int, data: bytes, writable: bytes = b"") -> None:
        self.bytes[offset : offset + len(data)] = data
        self.writable[offset : offset + len(writable)] = writable

    def _header(self, identity: Identity) -> None:
        self._put(0, struct.pack("<HH", identity.vendor, identity.device))
        self._put(COMMAND, bytes(2), struct.pack("<H", _COMMAND_WRITABLE))
        self._put(0x08, struct.pack("<I", identity.class_code << 8 | identity.revision))
        self._put(0x0C, bytes(2), b"\xff\xff")  # cache line size, latency timer
        self._put(0x2C, struct.pack("<HH", *identity.subsystem))
        self._put(0x3C, bytes((0, int(identity.line))), b"\xff")

    def _bar(self, index: int, bar: Bar, place: int) -> None:
        form, kind = ("<Q", _MEMORY_64_PREFETCHABLE) if bar.memory else ("<I", 0)
        mask = ~(bar.size - 1) & ((1 << 8 * struct.calcsize(form)) - 1)
        self._put(_BAR0 + 4 * index, struct.pack(form, place | kind), struct.pack(form, mask))

    def _capability(self, number: int, body: bytes, writable: bytes = b"") -> int:
        """Append one to the list; its offset."""
        at = self._next
        self._put(at, bytes((number, 0)) + body, bytes(2) + writable)
        self.bytes[self._link] = at
        self._next, self._link = at + (len(body) + 2 + 3) // 4 * 4, at + 1
        self.bytes[STATUS] |= STATUS_CAPABILITIES
        return at

    def _capabilities(self, identity: Identity) -> None:
        if identity.msi:
            control = 1 << 7 | (identity.msi.bit_length() - 1) << 1  # 64-bit addresses
            writable = struct.pack("<HIIH", 0x70, 0xFFFF_FFFC, 0xFFFF_FFFF, 0xFFFF)
            at = self._capability(_CAP_MSI, struct.pack("<HIIH", control, 0, 0, 0), writable)
            self._enable["msi"] = (at + 2, 0x01)
        if identity.express:
            body = struct.pack("<HIHH", 2 | _ROOT_COMPLEX_ENDPOINT << 4, _FLR | 1 << 15, 0, 0)
            at = self._capability(_CAP_EXPRESS, body + bytes(48), struct.pack("<HIH", 0, 0, 0x7FFF))
            self._device_control = at + 8
        if identity.msix:
            table, bar = identity.msix_table, identity.msix_bar
            at = self._capability(_CAP_MSIX, struct.pack("<HII", identity.msix - 1, bar, table | bar))
            self._enable["msix"] = (at + 3, 0x80)

    # Accesses -----------------------------------------------------------------------------------------------

    def read(self, offset: int, width: int) -> int:
        """``width`` bytes."""
        return int.from_bytes(self.bytes[offset : offset + width], "little")

    def write(self, offset: int, value: int, width: int) -> bool:
        """Change what may be changed; whether the write asks for a reset of the function (FLR)."""
        for at, byte in enumerate(value.to_bytes(width, "little"), offset):
            mask = self.writable[at]
            self.bytes[at] = self.bytes[at] & ~mask | byte & mask
        flr = self._device_control + 1
        return flr > 1 and offset <= flr < offset + width and bool(value >> 8 * (flr - offset) & 0x80)

    # What it says -------------------------------------------------------------------------------------------

    @property
    def _command(self) -> int:
        return self.read(COMMAND, 2)

    @property
    def decodes(self) -> bool:
        """Whether the function answers at its BARs."""
        return bool(self._command & COMMAND_MEMORY)

    @property
    def masters(self) -> bool:
        """Whether the function may read and write memory, which an MSI is too."""
        return bool(self._command & COMMAND_BUS_MASTER)

    @property
    def line_disabled(self) -> bool:
        """Whether the INTx line is cut off."""
        return bool(self._command & COMMAND_INTX_DISABLE)

    def show_line(self, on: bool) -> None:
        """Interrupt Status, which tells of the line whether it is cut off or not."""
        self.bytes[STATUS] = self.bytes[STATUS] & ~_STATUS_INTERRUPT | _STATUS_INTERRUPT * on

    def show_enabled(self, kind: str, on: bool) -> None:
        """The enable bit of MSI or MSI-X; of another kind there is none."""
        if kind in self._enable:
            at, bit = self._enable[kind]
            self.bytes[at] = self.bytes[at] & ~bit | bit * on
