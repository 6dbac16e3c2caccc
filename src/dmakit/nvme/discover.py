"""The NVMe controllers that this host's sysfs shows, and how each can be opened. Reads only.

Source: ``Documentation/ABI/testing/sysfs-bus-pci``; class code 01.08 (NVM subsystem).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SYSFS = Path("/sys/bus/pci/devices")
_CLASS = 0x0108


@dataclass(frozen=True)
class Found:
    """A controller: PCI address, vendor:device, the kernel driver that has it, IOMMU group (empty: none)."""

    bdf: str
    ids: str
    driver: str
    group: str

    @property
    def how(self) -> str:
        """The option that opens it, or what is in the way."""
        if self.driver == "vfio-pci":
            return f"--platform vfio:{self.bdf}"
        if not self.group:
            return "no IOMMU group: enable the IOMMU (intel_iommu=on, amd_iommu=on)"
        return f"dmakit vfio bind {self.bdf}, then --platform vfio:{self.bdf}"

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "how": self.how}


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _target(path: Path) -> str:
    try:
        return path.readlink().name
    except OSError:
        return ""


def controllers(root: Path = SYSFS) -> list[Found]:
    """All of them, by address; empty where there is no PCI bus."""
    found = []
    for entry in sorted(root.iterdir()) if root.is_dir() else []:
        kind = _text(entry / "class")
        if kind and int(kind, 16) >> 8 == _CLASS:
            ids = f"{_text(entry / 'vendor')[2:]}:{_text(entry / 'device')[2:]}"
            found.append(Found(entry.name, ids, _target(entry / "driver"), _target(entry / "iommu_group")))
    return found
