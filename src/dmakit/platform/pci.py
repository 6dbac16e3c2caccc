"""PCI functions: their addresses, and who they are.

A *BDF* is the address ``domain:bus:device.function`` in hexadecimal (``0000:01:00.0``; the domain may be left out).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from dmakit.errors import InputError

BDF = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])", re.IGNORECASE)
_CLASSES = {
    0x0100: "SCSI", 0x0101: "IDE", 0x0104: "RAID", 0x0106: "SATA", 0x0107: "SAS", 0x0108: "NVMe",
    0x0200: "Ethernet", 0x0280: "network", 0x0300: "VGA", 0x0302: "3D", 0x0403: "audio", 0x0500: "memory",
    0x0580: "memory", 0x0600: "host bridge", 0x0601: "ISA bridge", 0x0604: "PCI bridge", 0x0680: "bridge",
    0x0880: "system", 0x0C03: "USB", 0x0C05: "SMBus", 0x00FF: "unclassified", 0x1200: "accelerator",
}  # fmt: skip


@dataclass(frozen=True)
class PciDevice:
    """One function: ids, class (24 bits), driver and group ('' / None when there is none), VFIO's character device."""

    bdf: str
    vendor: int
    device: int
    class_code: int
    driver: str
    group: int | None
    cdev: str

    @property
    def kind(self) -> str:
        """The class in a word."""
        return _CLASSES.get(self.class_code >> 8, f"class {self.class_code:06x}")

    @property
    def is_bridge(self) -> bool:
        """Whether it is a bridge, which does not count against a group."""
        return self.class_code >> 16 == 0x06

    def as_json(self) -> dict[str, Any]:
        """For machines; ids as numbers."""
        return {**asdict(self), "kind": self.kind}


def checked_bdf(text: str) -> str:
    """The full form of a BDF; InputError when it is none."""
    match = BDF.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{text!r} is no PCI address: write domain:bus:device.function, as in 0000:01:00.0")
    return f"{match[1] or '0000'}:{match[2]}:{match[3]}.{match[4]}".lower()


def requester_id(bdf: str) -> int:
    """bus << 8 | device << 3 | function of a full BDF: how the IOMMU knows the function."""
    _, bus, slot = bdf.split(":")
    device, function = slot.split(".")
    return int(bus, 16) << 8 | int(device, 16) << 3 | int(function)
