"""What a machine says about its DMA mapping: the facts a recording begins with.

Read from below ``root`` (``/`` on a real machine): kernel release, CPUs on line, the kernel parameters and boot
messages that concern DMA, every IOMMU group with its domain type, devices and reserved regions, the IOMMU's capability
registers, the queue limits of block devices (they decide how a request is cut). Nothing is changed, and what cannot be
read is left out: a fact that is absent is unknown.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

_PARAMETER = re.compile(r"^(?:iommu|intel_iommu|amd_iommu|arm-smmu|iommufd|vfio|swiotlb|pci=|nvme)")
_MESSAGE = re.compile(r"^(?!.*command line).*(?:DMAR|AMD-Vi|iommu|SMMU|swiotlb|software IO TLB)", re.IGNORECASE)
_BOUNCE = re.compile(r"mapped \[mem 0x([0-9a-f]+)-0x([0-9a-f]+)\]")
_QUEUE = ("max_sectors_kb", "max_hw_sectors_kb", "max_segments", "max_segment_size", "virt_boundary_mask")
_LAZY = {"DMA-FQ": True, "DMA": False}
_MESSAGES = 200  # boot messages kept


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _entries(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir(), key=lambda entry: (len(entry.name), entry.name))
    except OSError:
        return []


def groups(root: Path) -> list[dict[str, Any]]:
    """Every IOMMU group: id, domain type, devices, reserved regions (first, last address, kind)."""
    found = []
    for group in _entries(root / "sys/kernel/iommu_groups"):
        regions = [line.split() for line in _text(group / "reserved_regions").splitlines()]
        found.append(
            {
                "id": int(group.name),
                "type": _text(group / "type"),
                "devices": [device.name for device in _entries(group / "devices")],
                "reserved": [[int(r[0], 16), int(r[1], 16), r[2]] for r in regions if len(r) == 3],
            }
        )
    return found


def units(root: Path) -> list[dict[str, str]]:
    """Every IOMMU: its name and, for Intel, version and capability registers as the kernel prints them."""
    found = []
    for unit in _entries(root / "sys/class/iommu"):
        registers = {name: _text(unit / "intel-iommu" / name) for name in ("version", "cap", "ecap")}
        found.append({"name": unit.name} | {name: text for name, text in registers.items() if text})
    return found


def messages(root: Path) -> list[str]:
    """The boot messages about DMA mapping; empty where the log may not be read."""
    try:
        fd = os.open(root / "dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return []
    lines: list[str] = []
    try:
        while len(lines) < _MESSAGES:
            try:
                records = os.read(fd, 8192)
            except BrokenPipeError:  # overwritten meanwhile: the next read goes on behind the gap
                continue
            except OSError:
                break
            if not records:
                break
            texts = [line.partition(";")[2] for line in records.decode("utf-8", "replace").splitlines()]
            lines += [text for text in texts if _MESSAGE.search(text)]
    finally:
        os.close(fd)
    return lines


def queues(root: Path) -> dict[str, dict[str, str]]:
    """Queue limits of the disks that are there now."""
    found = {}
    for disk in _entries(root / "sys/block"):
        if not disk.name.startswith(("loop", "ram", "zram")):
            found[disk.name] = {name: text for name in _QUEUE if (text := _text(disk / "queue" / name))}
    return found


def machine_facts(root: Path = Path("/")) -> dict[str, Any]:
    """All of them, ready for JSON."""
    release = _text(root / "proc/sys/kernel/osrelease")
    return {
        "kernel": release,
        "version": _text(root / "proc/sys/kernel/version"),
        "machine": os.uname().machine,
        "online": _text(root / "sys/devices/system/cpu/online"),
        "parameters": [word for word in _text(root / "proc/cmdline").split() if _PARAMETER.match(word)],
        "groups": groups(root),
        "iommus": units(root),
        "queues": queues(root),
        "log": messages(root),
    }


def bounce_pool(facts: dict[str, Any]) -> tuple[int, int] | None:
    """(start, size) of the bounce pool, from the boot messages; None when they do not tell."""
    for line in facts.get("log", ()):
        found = _BOUNCE.search(line) if "software IO TLB" in line else None
        if found:
            return int(found[1], 16), int(found[2], 16) - int(found[1], 16)  # the end is exclusive
    return None


def domain_types(facts: dict[str, Any]) -> dict[str, str]:
    """The domain type of each device's group: ``DMA-FQ`` (lazy), ``DMA`` (strict), ``identity`` …"""
    return {device: group["type"] for group in facts.get("groups", ()) for device in group["devices"]}


def lazy(facts: dict[str, Any], device: str) -> bool | None:
    """Whether a device's unmaps are invalidated later; None when the facts do not tell."""
    return _LAZY.get(domain_types(facts).get(device, ""))
