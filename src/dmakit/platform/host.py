"""What this host can do for DMA from user space, what is missing, and the exact remedy.

A *probe* is a small function from a ``Host`` (files below a root folder, the system calls of ``host_calls``) to a
``Finding``. Nothing is changed: files are read, calls act on memory of their own, device files are opened and closed.
``survey`` runs them all; the order is that of ``dmakit doctor``.
"""

from __future__ import annotations

import errno
import gzip
import os
import re
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from dmakit.platform.huge_pages import shared_huge

YES, NO, PART = "yes", "no", "partly"
_INTEL_IR, _INTEL_SMTS, _INTEL_SLADS = 3, 43, 45  # bits of VT-d's extended capability register
_AMD_HASUP, _AMD_HDSUP = 49, 52  # bits of AMD-Vi's extended feature register
_CAP_IPC_LOCK = 14
_UNLIMITED = resource.RLIM_INFINITY


class Calls(Protocol):
    """The system calls that probes make (``host_calls.HostCalls``): 0 or more, or ``-errno``."""

    def pagemap_scan(self) -> int: ...
    def dirty_canary(self) -> int: ...
    def io_uring(self) -> int: ...
    def kvm(self, path: Path) -> int: ...
    def type1(self, path: Path) -> int: ...
    def opens(self, path: Path) -> int: ...


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``state``: yes, no, partly; ``remedy`` is empty where there is nothing to do."""

    name: str
    state: str
    detail: str
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        """The object of ``--json``."""
        return asdict(self)


class Host:
    """The files of a machine below ``root``, read once each."""

    def __init__(self, root: Path, calls: Calls, *, memlock: int | None = None) -> None:
        self.root = root
        self.calls = calls
        self.memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if memlock is None else memlock

    def path(self, path: str) -> Path:
        """A path of the machine."""
        return self.root / path

    def text(self, path: str) -> str:
        """A file's text; empty when it cannot be read."""
        try:
            return self.path(path).read_text(errors="replace").strip()
        except OSError:
            return ""

    def entries(self, path: str) -> list[str]:
        """A folder's entries, sorted; empty when it cannot be read."""
        try:
            return sorted(entry.name for entry in self.path(path).iterdir())
        except OSError:
            return []

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        return self.path(path).exists()

    @cached_property
    def release(self) -> str:
        """The kernel's release."""
        return self.text("proc/sys/kernel/osrelease")

    @cached_property
    def _config(self) -> str:
        try:
            return gzip.decompress(self.path("proc/config.gz").read_bytes()).decode("ascii", "replace")
        except (OSError, EOFError):
            return self.text(f"boot/config-{self.release}") or self.text(f"lib/modules/{self.release}/config")

    def option(self, name: str) -> str:
        """``y``, ``m``, ``n`` of a kernel option; empty when the kernel's configuration is not to be had."""
        if not self._config:
            return ""
        found = re.search(rf"^CONFIG_{name}=(.)", self._config, re.MULTILINE)
        return found[1] if found else "n"

    def enable(self, option: str, module: str) -> str:
        """How to get a driver that is not there: load its module, or another kernel."""
        state = self.option(option)
        if state == "n":
            return f"a kernel with CONFIG_{option}"
        if state == "y":
            return f"it is built in (CONFIG_{option}=y) and did not start: see dmesg"
        return f"modprobe {module}" + ("" if state else f" (needs a kernel with CONFIG_{option})")


def _cause(answer: int) -> str:
    return os.strerror(-answer) if answer < 0 else ""


def _open_remedy(answer: int, path: str, group: str) -> str:
    """What helps when a device file is there and does not open."""
    if answer in (-errno.EACCES, -errno.EPERM):
        return f"run as root, or: chgrp {group} {path}; chmod g+rw {path}; usermod -aG {group} $USER"
    return f"see dmesg ({_cause(answer)})"


# IOMMU --------------------------------------------------------------------------------------------------------------


def _units(host: Host) -> list[str]:
    return host.entries("sys/class/iommu")


def iommu(host: Host) -> Finding:
    """Whether the kernel drives an IOMMU."""
    units = _units(host)
    if units:
        return Finding("IOMMU", YES, f"{len(units)}: {', '.join(units[:4])}{', …' if len(units) > 4 else ''}")
    intel, amd = host.exists("sys/firmware/acpi/tables/DMAR"), host.exists("sys/firmware/acpi/tables/IVRS")
    if intel:
        if host.option("INTEL_IOMMU") == "n":
            return Finding("IOMMU", NO, "the firmware offers VT-d", "a kernel with CONFIG_INTEL_IOMMU")
        return Finding("IOMMU", NO, "the firmware offers VT-d, the kernel does not use it", "boot with intel_iommu=on")
    if amd:
        return Finding(
            "IOMMU", NO, "the firmware offers AMD-Vi, the kernel does not use it", "boot without amd_iommu=off"
        )
    return Finding(
        "IOMMU", NO, "the firmware offers none",
        "switch on VT-d or AMD-Vi in the firmware; in a VM give it one (QEMU: -device intel-iommu,intremap=on)",
    )  # fmt: skip


def groups(host: Host) -> Finding:
    """IOMMU groups and their domain types."""
    ids = host.entries("sys/kernel/iommu_groups")
    if not ids:
        return Finding("IOMMU groups", NO, "none", "needs an IOMMU")
    kinds: dict[str, int] = {}
    for number in ids:
        kind = host.text(f"sys/kernel/iommu_groups/{number}/type") or "?"
        kinds[kind] = kinds.get(kind, 0) + 1
    detail = f"{len(ids)}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    if set(kinds) == {"identity"}:
        return Finding("IOMMU groups", PART, f"{detail} (drivers bypass the IOMMU)", "boot with iommu.passthrough=0")
    return Finding("IOMMU groups", YES, detail)


def _intel_extended(host: Host) -> list[int]:
    """The extended capability registers of VT-d units."""
    texts = [host.text(f"sys/class/iommu/{unit}/intel-iommu/ecap") for unit in _units(host)]
    return [int(text, 16) for text in texts if re.fullmatch(r"[0-9a-fA-F]+", text)]


def _amd_features(host: Host) -> list[int]:
    """The extended feature registers of AMD-Vi units."""
    texts = [host.text(f"sys/class/iommu/{unit}/amd-iommu/features").split(":")[0] for unit in _units(host)]
    return [int(text, 16) for text in texts if re.fullmatch(r"[0-9a-fA-F]+", text)]


def interrupt_remapping(host: Host) -> Finding:
    """Whether a device in user space can be kept from forging interrupts."""
    name, registers = "interrupt remapping", _intel_extended(host)
    if registers:
        if all(register >> _INTEL_IR & 1 for register in registers):
            return Finding(name, YES, "VT-d")
        return Finding(name, NO, "this VT-d has none", "vfio_iommu_type1.allow_unsafe_interrupts=1 on the command line")
    if _amd_features(host):
        return Finding(name, YES, "AMD-Vi")
    if not _units(host):
        return Finding(name, NO, "no IOMMU", "needs an IOMMU")
    parameters = ("sys/module/vfio_iommu_type1", "sys/module/iommufd")
    if any(host.text(f"{module}/parameters/allow_unsafe_interrupts") == "Y" for module in parameters):
        return Finding(name, PART, "none is known, and unsafe interrupts are allowed")
    return Finding(
        name, PART, "none is known",
        "if VFIO refuses a device: vfio_iommu_type1.allow_unsafe_interrupts=1 or iommufd.allow_unsafe_interrupts=1",
    )  # fmt: skip


def dirty_tracking(host: Host) -> Finding:
    """Whether the IOMMU keeps dirty bits (``IOMMU_HWPT_GET_DIRTY_BITMAP``)."""
    name = "IOMMU dirty tracking"
    intel, amd = _intel_extended(host), _amd_features(host)
    able = [register >> _INTEL_SMTS & register >> _INTEL_SLADS & 1 for register in intel]
    able += [register >> _AMD_HASUP & register >> _AMD_HDSUP & 1 for register in amd]
    other = "dirty pages from the CPU (PAGEMAP_SCAN below) or from the device (VFIO migration)"
    if not able or not any(able):
        return Finding(name, NO, "this IOMMU keeps none" if able else "no IOMMU that could", other)
    if not host.exists("dev/iommu"):
        return Finding(name, NO, "the IOMMU can, iommufd is missing", host.enable("IOMMUFD", "iommufd"))
    return Finding(name, YES if all(able) else PART, f"{sum(able)} of {len(able)} units")


# VFIO ---------------------------------------------------------------------------------------------------------------


def type1(host: Host) -> Finding:
    """VFIO containers and groups with type1 mappings."""
    if not host.exists("dev/vfio/vfio"):
        return Finding("VFIO type1", NO, "no /dev/vfio/vfio", host.enable("VFIO_PCI", "vfio-pci"))
    answer = host.calls.type1(host.path("dev/vfio/vfio"))
    if answer < 0:
        return Finding(
            "VFIO type1", NO, f"/dev/vfio/vfio: {_cause(answer)}", _open_remedy(answer, "/dev/vfio/vfio", "vfio")
        )
    if not answer:
        return Finding("VFIO type1", NO, "no type1 driver", host.enable("VFIO_IOMMU_TYPE1", "vfio_iommu_type1"))
    return Finding("VFIO type1", YES, "TYPE1v2")


def iommufd(host: Host) -> Finding:
    """``/dev/iommu``."""
    if not host.exists("dev/iommu"):
        return Finding("iommufd", NO, "no /dev/iommu", host.enable("IOMMUFD", "iommufd"))
    answer = host.calls.opens(host.path("dev/iommu"))
    if answer < 0:
        return Finding("iommufd", NO, f"/dev/iommu: {_cause(answer)}", _open_remedy(answer, "/dev/iommu", "vfio"))
    if not host.exists("dev/vfio/devices") and host.option("VFIO_DEVICE_CDEV") == "n":
        return Finding("iommufd", PART, "/dev/iommu, but no VFIO device files", "a kernel with CONFIG_VFIO_DEVICE_CDEV")
    return Finding("iommufd", YES, "/dev/iommu")


def vfio_devices(host: Host) -> Finding:
    """Devices that are bound to vfio-pci."""
    bound = [name for name in host.entries("sys/bus/pci/drivers/vfio-pci") if re.fullmatch(r"\w+:\w\w:\w\w\.\w", name)]
    if bound:
        return Finding("VFIO devices", YES, ", ".join(bound))
    remedy = (
        "dmakit vfio bind BDF" if host.exists("sys/bus/pci/drivers/vfio-pci") else host.enable("VFIO_PCI", "vfio-pci")
    )
    return Finding("VFIO devices", NO, "none is bound to vfio-pci", remedy)


# Memory -------------------------------------------------------------------------------------------------------------


def huge_pages(host: Host) -> Finding:
    """Reserved huge pages, and the transparent ones of shared memory, of which a machine's RAM is."""
    base, found = "sys/kernel/mm/hugepages", []
    for name in host.entries(base):
        total, free = (host.text(f"{base}/{name}/{file}") for file in ("nr_hugepages", "free_hugepages"))
        if total.isdigit() and int(total):
            found.append(f"{free} of {total} x {name.removeprefix('hugepages-')} free")
    shared = shared_huge(host.text)
    transparent = (
        f"transparent, shared memory: {shared.mode}" if shared.mode else "no transparent ones for shared memory"
    )
    remedy = "echo 512 > /proc/sys/vm/nr_hugepages (1 GiB in 2 MiB pages)"
    if found:
        return Finding("huge pages", YES, f"{', '.join(found)}; {transparent}")
    return Finding("huge pages", PART if shared.given else NO, f"none reserved; {transparent}", shared.remedy or remedy)


def memlock(host: Host) -> Finding:
    """How much memory a process may pin."""
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)", host.text("proc/self/status"), re.MULTILINE)
    if effective and int(effective[1], 16) >> _CAP_IPC_LOCK & 1:
        return Finding("locked memory", YES, "no limit for this process (CAP_IPC_LOCK)")
    if host.memlock == _UNLIMITED:
        return Finding("locked memory", YES, "no limit")
    remedy = "ulimit -l unlimited, or a line '* - memlock unlimited' in /etc/security/limits.conf and a new login"
    return Finding("locked memory", PART, f"{host.memlock >> 10} KiB a process (RLIMIT_MEMLOCK)", remedy)


def pagemap_scan(host: Host) -> Finding:
    """The PAGEMAP_SCAN ioctl, tried on a page of our own."""
    answer = host.calls.pagemap_scan()
    if answer >= 0:
        return Finding("PAGEMAP_SCAN", YES, "works")
    if answer == -errno.ENOTTY:
        return Finding(
            "PAGEMAP_SCAN", NO, "this kernel does not have it", "Linux 6.7 or later with CONFIG_PROC_PAGE_MONITOR"
        )
    return Finding("PAGEMAP_SCAN", NO, _cause(answer), "mount /proc, and allow /proc/self/pagemap")


def write_tracking(host: Host) -> Finding:
    """Dirty pages by userfaultfd's asynchronous write protection, tried with a canary."""
    name, answer = "CPU dirty tracking", host.calls.dirty_canary()
    if answer == 0:
        return Finding(name, YES, "userfaultfd write protection and PAGEMAP_SCAN find a written page")
    if answer in (-errno.EPERM, -errno.EACCES):
        return Finding(name, NO, "userfaultfd is not allowed", "sysctl vm.unprivileged_userfaultfd=1, or run as root")
    if answer == -errno.ENOSYS:
        return Finding(name, NO, "no userfaultfd", "a kernel with CONFIG_USERFAULTFD")
    if answer in (-errno.EINVAL, -errno.ENOTTY):
        return Finding(
            name, NO, "no asynchronous write protection", "Linux 6.7 or later with CONFIG_PTE_MARKER_UFFD_WP"
        )
    return Finding(name, NO, f"the canary was not found ({_cause(answer)})", "do not trust it on this host")


# Everything else ----------------------------------------------------------------------------------------------------


def io_uring(host: Host) -> Finding:
    """io_uring, by setting up a ring."""
    answer = host.calls.io_uring()
    if answer >= 0:
        return Finding("io_uring", YES, "works")
    switch = host.text("proc/sys/kernel/io_uring_disabled")
    if answer == -errno.ENOSYS:
        return Finding("io_uring", NO, "this kernel does not have it", "a kernel with CONFIG_IO_URING")
    if switch in ("1", "2"):
        detail = f"switched off (kernel.io_uring_disabled={switch})"
        return Finding("io_uring", NO, detail, "sysctl kernel.io_uring_disabled=0")
    return Finding(
        "io_uring", NO, _cause(answer), "a seccomp filter refuses it: allow io_uring_setup (425) in the container"
    )


def tracefs(host: Host) -> Finding:
    """tracefs and the dynamic events that ``dmakit record`` wants."""
    remedy = "mount -t tracefs tracefs /sys/kernel/tracing"
    places = ("sys/kernel/tracing", "sys/kernel/debug/tracing")
    place = next((place for place in places if host.exists(f"{place}/README")), "")
    if not place:
        if "tracefs" not in host.text("proc/filesystems").split():
            return Finding("tracefs", NO, "this kernel has none", "a kernel with CONFIG_FTRACE")
        return Finding("tracefs", NO, "not mounted, or only root may use it", f"sudo {remedy}")
    manual = host.text(f"{place}/README")
    kinds = [
        name for name, words in (("fprobe", "<func-name>[%return]"), ("kprobe", "place (kretprobe)")) if words in manual
    ]
    if kinds:
        return Finding("tracefs", YES, f"/{place}, {' and '.join(kinds)} events")
    return Finding(
        "tracefs", PART, f"/{place}, no events on kernel functions",
        "for dmakit record: a kernel with CONFIG_FPROBE_EVENTS or CONFIG_KPROBE_EVENTS",
    )  # fmt: skip


def kvm(host: Host) -> Finding:
    """``/dev/kvm``."""
    if not host.exists("dev/kvm"):
        vendor = "kvm_amd" if "AuthenticAMD" in host.text("proc/cpuinfo") else "kvm_intel"
        flags = set(re.findall(r"\b(vmx|svm)\b", host.text("proc/cpuinfo")))
        if not flags:
            return Finding("KVM", NO, "the CPU offers no virtualisation", "switch it on in the firmware (or nested=1)")
        return Finding("KVM", NO, "no /dev/kvm", host.enable(vendor.upper(), vendor))
    answer = host.calls.kvm(host.path("dev/kvm"))
    if answer < 0:
        return Finding("KVM", NO, f"/dev/kvm: {_cause(answer)}", _open_remedy(answer, "/dev/kvm", "kvm"))
    return Finding("KVM", YES, f"API version {answer}")


PROBES: tuple[Callable[[Host], Finding], ...] = (
    iommu, groups, interrupt_remapping, dirty_tracking, type1, iommufd, vfio_devices, huge_pages, memlock, pagemap_scan,
    write_tracking, io_uring, tracefs, kvm,
)  # fmt: skip


def survey(host: Host) -> list[Finding]:
    """All findings, in order."""
    return [probe(host) for probe in PROBES]
