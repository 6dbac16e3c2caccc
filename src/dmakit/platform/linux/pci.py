"""PCI devices as sysfs shows them: who they are, who drives them, which IOMMU group they are in. Read only.

A *group* is the set of devices that the IOMMU cannot keep apart; VFIO gives out a device only when nobody else drives
one of its group. Source: ``Documentation/ABI/testing/sysfs-bus-pci``, ``sysfs-kernel-iommu_groups``.
"""

from __future__ import annotations

from dmakit.errors import HostError
from dmakit.platform.linux.kernel import Kernel
from dmakit.platform.pci import BDF, PciDevice, checked_bdf

DEVICES = "/sys/bus/pci/devices"
DRIVERS = "/sys/bus/pci/drivers"
GROUPS = "/sys/kernel/iommu_groups"
VFIO_DRIVER = "vfio-pci"
_RESOURCE_MEMORY = 0x200  # IORESOURCE_MEM


def _number(kernel: Kernel, path: str) -> int:
    return int(kernel.text(path) or "0", 0)


def find(kernel: Kernel, bdf: str) -> PciDevice:
    """One device; HostError (ENODEV) when this host has none at that address."""
    full = checked_bdf(bdf)
    path = f"{DEVICES}/{full}"
    if not kernel.exists(path):
        raise HostError(f"{full}: this host has no such PCI device; see: dmakit vfio list", 19)
    group = kernel.link(f"{path}/iommu_group")
    cdev = next((name for name in kernel.names(f"{path}/vfio-dev") if name.startswith("vfio")), "")
    return PciDevice(
        full,
        _number(kernel, f"{path}/vendor"),
        _number(kernel, f"{path}/device"),
        _number(kernel, f"{path}/class"),
        kernel.link(f"{path}/driver"),
        int(group) if group.isdigit() else None,
        f"/dev/vfio/devices/{cdev}" if cdev else "",
    )


def scan(kernel: Kernel) -> list[PciDevice]:
    """Every PCI device of this host, in order of address."""
    return [find(kernel, bdf) for bdf in kernel.names(DEVICES)]


def bus_windows(kernel: Kernel) -> list[tuple[int, int]]:
    """(first, last) address of every range that some PCI device or bridge of this host answers to, joined, ascending.

    A device that uses such a number as an IOVA may reach that neighbour, or itself, instead of memory: Linux keeps its
    own DMA API out of the bridges' windows (``iova_reserve_pci_windows``), and QEMU's NVMe refuses its own registers.
    """
    found = []
    for bdf in kernel.names(DEVICES):
        for line in (kernel.text(f"{DEVICES}/{bdf}/resource") or "").splitlines():
            first, last, flags = (int(word, 16) for word in line.split())
            if flags & _RESOURCE_MEMORY and last:
                found.append((first, last))
    joined: list[tuple[int, int]] = []
    for first, last in sorted(found):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((first, last))
    return joined


def group_members(kernel: Kernel, group: int) -> list[PciDevice]:
    """The PCI devices of an IOMMU group."""
    return [find(kernel, name) for name in kernel.names(f"{GROUPS}/{group}/devices") if BDF.fullmatch(name)]


def strangers(kernel: Kernel, found: PciDevice) -> list[PciDevice]:
    """Others of the group that a host driver holds: VFIO gives nothing out until they are free."""
    if found.group is None:
        return []
    return [
        other
        for other in group_members(kernel, found.group)
        if other.bdf != found.bdf and not other.is_bridge and other.driver not in ("", VFIO_DRIVER)
    ]


def check_ready(kernel: Kernel, found: PciDevice) -> None:
    """HostError with the remedy unless VFIO can give ``found`` out."""
    if found.group is None:
        raise HostError(
            f"{found.bdf}: not behind an IOMMU: enable it in the firmware, or boot with intel_iommu=on (Intel)", 19
        )
    if found.driver != VFIO_DRIVER:
        state = f"driven by {found.driver}" if found.driver else "bound to no driver"
        raise HostError(f"{found.bdf} is {state}: bind it first: dmakit vfio bind {found.bdf}", 16)
    others = strangers(kernel, found)
    if others:
        held = ", ".join(f"{other.bdf} ({other.driver})" for other in others)
        raise HostError(f"{found.bdf}: IOMMU group {found.group} also holds {held}: bind them too", 16)
