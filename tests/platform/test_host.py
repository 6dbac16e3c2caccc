"""``dmakit doctor``'s probes over made-up machines, and the real calls on this one."""

from __future__ import annotations

import errno
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dmakit.cli.main import run
from dmakit.platform import host
from dmakit.platform.host import NO, PART, YES, Finding, Host, survey
from dmakit.platform.host_calls import HostCalls

INTEL = {"sys/class/iommu/dmar0/intel-iommu/ecap": "f00f4a\n"}
ECAP_ALL = f"{1 << 3 | 1 << 43 | 1 << 45:x}\n"
AMD = {"sys/class/iommu/ivhd0/amd-iommu/features": f"{1 << 49 | 1 << 52:x}:0\n"}
PCI = "sys/bus/pci/drivers/vfio-pci"
THP = "sys/kernel/mm/transparent_hugepage"
RESERVE = "echo 512 > /proc/sys/vm/nr_hugepages (1 GiB in 2 MiB pages)"


@dataclass
class Answers:
    """What the system calls say."""

    answer: int = 0

    def pagemap_scan(self) -> int:
        return self.answer

    def dirty_canary(self) -> int:
        return self.answer

    def io_uring(self) -> int:
        return self.answer

    def kvm(self, path: Path) -> int:
        return self.answer

    def type1(self, path: Path) -> int:
        return self.answer

    def opens(self, path: Path) -> int:
        return self.answer


def machine(root: Path, files: dict[str, str], answer: int = 0, memlock: int = 8 << 20) -> Host:
    (root / "proc/sys/kernel").mkdir(parents=True, exist_ok=True)
    (root / "proc/sys/kernel/osrelease").write_text("7.2.12\n")
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "proc/config.gz":
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text)
    return Host(root, Answers(answer), memlock=memlock)


Probe = Callable[[Host], Finding]
ROWS: list[tuple[Probe, dict[str, str], int, Finding]] = [
    (host.iommu, INTEL, 0, Finding("IOMMU", YES, "1: dmar0")),
    (
        host.iommu,
        {"sys/firmware/acpi/tables/DMAR": ""},
        0,
        Finding("IOMMU", NO, "the firmware offers VT-d, the kernel does not use it", "boot with intel_iommu=on"),
    ),
    (
        host.iommu,
        {"sys/firmware/acpi/tables/DMAR": "", "proc/config.gz": "CONFIG_PCI=y\n"},
        0,
        Finding("IOMMU", NO, "the firmware offers VT-d", "a kernel with CONFIG_INTEL_IOMMU"),
    ),
    (
        host.iommu,
        {"sys/firmware/acpi/tables/IVRS": ""},
        0,
        Finding("IOMMU", NO, "the firmware offers AMD-Vi, the kernel does not use it", "boot without amd_iommu=off"),
    ),
    (
        host.iommu,
        {},
        0,
        Finding(
            "IOMMU",
            NO,
            "the firmware offers none",
            "switch on VT-d or AMD-Vi in the firmware; in a VM give it one (QEMU: -device intel-iommu,intremap=on)",
        ),
    ),
    (host.groups, {}, 0, Finding("IOMMU groups", NO, "none", "needs an IOMMU")),
    (
        host.groups,
        {
            "sys/kernel/iommu_groups/0/type": "DMA-FQ\n",
            "sys/kernel/iommu_groups/1/type": "identity\n",
            "sys/kernel/iommu_groups/2/type": "DMA-FQ\n",
        },
        0,
        Finding("IOMMU groups", YES, "3: 2 DMA-FQ, 1 identity"),
    ),
    (
        host.groups,
        {"sys/kernel/iommu_groups/0/type": "identity\n"},
        0,
        Finding("IOMMU groups", PART, "1: 1 identity (drivers bypass the IOMMU)", "boot with iommu.passthrough=0"),
    ),
    (host.interrupt_remapping, INTEL, 0, Finding("interrupt remapping", YES, "VT-d")),
    (
        host.interrupt_remapping,
        {"sys/class/iommu/dmar0/intel-iommu/ecap": "f00f42\n"},
        0,
        Finding(
            "interrupt remapping",
            NO,
            "this VT-d has none",
            "vfio_iommu_type1.allow_unsafe_interrupts=1 on the command line",
        ),
    ),
    (host.interrupt_remapping, AMD, 0, Finding("interrupt remapping", YES, "AMD-Vi")),
    (host.interrupt_remapping, {}, 0, Finding("interrupt remapping", NO, "no IOMMU", "needs an IOMMU")),
    (
        host.interrupt_remapping,
        {"sys/class/iommu/virtio/x": ""},
        0,
        Finding(
            "interrupt remapping",
            PART,
            "none is known",
            "if VFIO refuses a device: vfio_iommu_type1.allow_unsafe_interrupts=1 or iommufd.allow_unsafe_interrupts=1",
        ),
    ),
    (
        host.interrupt_remapping,
        {"sys/class/iommu/virtio/x": "", "sys/module/iommufd/parameters/allow_unsafe_interrupts": "Y\n"},
        0,
        Finding("interrupt remapping", PART, "none is known, and unsafe interrupts are allowed"),
    ),
    (
        host.dirty_tracking,
        INTEL,
        0,
        Finding(
            "IOMMU dirty tracking",
            NO,
            "this IOMMU keeps none",
            "dirty pages from the CPU (PAGEMAP_SCAN below) or from the device (VFIO migration)",
        ),
    ),
    (
        host.dirty_tracking,
        {"sys/class/iommu/dmar0/intel-iommu/ecap": ECAP_ALL},
        0,
        Finding(
            "IOMMU dirty tracking",
            NO,
            "the IOMMU can, iommufd is missing",
            "modprobe iommufd (needs a kernel with CONFIG_IOMMUFD)",
        ),
    ),
    (host.dirty_tracking, AMD | {"dev/iommu": ""}, 0, Finding("IOMMU dirty tracking", YES, "1 of 1 units")),
    (
        host.dirty_tracking,
        INTEL | {"dev/iommu": "", "sys/class/iommu/dmar1/intel-iommu/ecap": ECAP_ALL},
        0,
        Finding("IOMMU dirty tracking", PART, "1 of 2 units"),
    ),
    (
        host.type1,
        {"proc/config.gz": "CONFIG_VFIO_PCI=m\n"},
        0,
        Finding("VFIO type1", NO, "no /dev/vfio/vfio", "modprobe vfio-pci"),
    ),
    (host.type1, {"dev/vfio/vfio": ""}, 1, Finding("VFIO type1", YES, "TYPE1v2")),
    (
        host.type1,
        {"dev/vfio/vfio": "", "proc/config.gz": "CONFIG_VFIO_IOMMU_TYPE1=y\n"},
        0,
        Finding(
            "VFIO type1",
            NO,
            "no type1 driver",
            "it is built in (CONFIG_VFIO_IOMMU_TYPE1=y) and did not start: see dmesg",
        ),
    ),
    (
        host.type1,
        {"dev/vfio/vfio": ""},
        -errno.EACCES,
        Finding(
            "VFIO type1",
            NO,
            "/dev/vfio/vfio: Permission denied",
            "run as root, or: chgrp vfio /dev/vfio/vfio; chmod g+rw /dev/vfio/vfio; usermod -aG vfio $USER",
        ),
    ),
    (
        host.iommufd,
        {"boot/config-7.2.12": "# CONFIG_IOMMUFD is not set\n"},
        0,
        Finding("iommufd", NO, "no /dev/iommu", "a kernel with CONFIG_IOMMUFD"),
    ),
    (host.iommufd, {"dev/iommu": ""}, 0, Finding("iommufd", YES, "/dev/iommu")),
    (
        host.iommufd,
        {"dev/iommu": ""},
        -errno.ENODEV,
        Finding("iommufd", NO, "/dev/iommu: No such device", "see dmesg (No such device)"),
    ),
    (
        host.iommufd,
        {"dev/iommu": "", "proc/config.gz": "CONFIG_IOMMUFD=y\n"},
        0,
        Finding("iommufd", PART, "/dev/iommu, but no VFIO device files", "a kernel with CONFIG_VFIO_DEVICE_CDEV"),
    ),
    (
        host.vfio_devices,
        {f"{PCI}/0000:01:00.0": "", f"{PCI}/new_id": "", f"{PCI}/bind": ""},
        0,
        Finding("VFIO devices", YES, "0000:01:00.0"),
    ),
    (
        host.vfio_devices,
        {f"{PCI}/bind": ""},
        0,
        Finding("VFIO devices", NO, "none is bound to vfio-pci", "dmakit vfio bind BDF"),
    ),
    (
        host.huge_pages,
        {
            "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "8\n",
            "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "3\n",
            "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages": "0\n",
            f"{THP}/shmem_enabled": "always within_size [advise] never deny force\n",
        },
        0,
        Finding("huge pages", YES, "3 of 8 x 2048kB free; transparent, shared memory: advise"),
    ),
    (
        host.huge_pages,
        {
            f"{THP}/enabled": "[always] madvise never\n",
            f"{THP}/shmem_enabled": "always within_size advise [never] deny force\n",
            f"{THP}/hugepages-2048kB/shmem_enabled": "always [inherit] within_size advise never\n",
        },
        0,
        Finding(
            "huge pages", NO, "none reserved; transparent, shared memory: never", f"echo advise > /{THP}/shmem_enabled"
        ),
    ),
    (
        host.huge_pages,
        {
            f"{THP}/enabled": "always madvise [never]\n",
            f"{THP}/shmem_enabled": "always within_size advise [never] deny force\n",
            f"{THP}/hugepages-2048kB/shmem_enabled": "always inherit within_size [advise] never\n",
        },
        0,
        Finding("huge pages", PART, "none reserved; transparent, shared memory: advise", RESERVE),
    ),
    (
        host.huge_pages,
        {f"{THP}/enabled": "[always] madvise never\n"},
        0,
        Finding("huge pages", NO, "none reserved; no transparent ones for shared memory", RESERVE),
    ),
    (
        host.memlock,
        {"proc/self/status": "CapEff:\t0000000000004000\n"},
        0,
        Finding("locked memory", YES, "no limit for this process (CAP_IPC_LOCK)"),
    ),
    (
        host.memlock,
        {"proc/self/status": "CapEff:\t0000000000003fff\n"},
        0,
        Finding(
            "locked memory",
            PART,
            "8192 KiB a process (RLIMIT_MEMLOCK)",
            "ulimit -l unlimited, or a line '* - memlock unlimited' in /etc/security/limits.conf and a new login",
        ),
    ),
    (host.pagemap_scan, {}, 1, Finding("PAGEMAP_SCAN", YES, "works")),
    (
        host.pagemap_scan,
        {},
        -errno.ENOTTY,
        Finding("PAGEMAP_SCAN", NO, "this kernel does not have it", "Linux 6.7 or later with CONFIG_PROC_PAGE_MONITOR"),
    ),
    (
        host.pagemap_scan,
        {},
        -errno.EACCES,
        Finding("PAGEMAP_SCAN", NO, "Permission denied", "mount /proc, and allow /proc/self/pagemap"),
    ),
    (
        host.write_tracking,
        {},
        0,
        Finding("CPU dirty tracking", YES, "userfaultfd write protection and PAGEMAP_SCAN find a written page"),
    ),
    (
        host.write_tracking,
        {},
        -errno.EPERM,
        Finding(
            "CPU dirty tracking",
            NO,
            "userfaultfd is not allowed",
            "sysctl vm.unprivileged_userfaultfd=1, or run as root",
        ),
    ),
    (
        host.write_tracking,
        {},
        -errno.ENOSYS,
        Finding("CPU dirty tracking", NO, "no userfaultfd", "a kernel with CONFIG_USERFAULTFD"),
    ),
    (
        host.write_tracking,
        {},
        -errno.EINVAL,
        Finding(
            "CPU dirty tracking",
            NO,
            "no asynchronous write protection",
            "Linux 6.7 or later with CONFIG_PTE_MARKER_UFFD_WP",
        ),
    ),
    (
        host.write_tracking,
        {},
        -errno.EIO,
        Finding(
            "CPU dirty tracking", NO, "the canary was not found (Input/output error)", "do not trust it on this host"
        ),
    ),
    (host.io_uring, {}, 0, Finding("io_uring", YES, "works")),
    (
        host.io_uring,
        {},
        -errno.ENOSYS,
        Finding("io_uring", NO, "this kernel does not have it", "a kernel with CONFIG_IO_URING"),
    ),
    (
        host.io_uring,
        {"proc/sys/kernel/io_uring_disabled": "2\n"},
        -errno.EPERM,
        Finding("io_uring", NO, "switched off (kernel.io_uring_disabled=2)", "sysctl kernel.io_uring_disabled=0"),
    ),
    (
        host.io_uring,
        {"proc/sys/kernel/io_uring_disabled": "0\n"},
        -errno.EPERM,
        Finding(
            "io_uring",
            NO,
            "Operation not permitted",
            "a seccomp filter refuses it: allow io_uring_setup (425) in the container",
        ),
    ),
    (
        host.tracefs,
        {"sys/kernel/tracing/README": "\tf[:[<group>/][<event>]] <func-name>[%return]\n place (kretprobe): x\n"},
        0,
        Finding("tracefs", YES, "/sys/kernel/tracing, fprobe and kprobe events"),
    ),
    (
        host.tracefs,
        {"sys/kernel/debug/tracing/README": "place (uprobe)\n"},
        0,
        Finding(
            "tracefs",
            PART,
            "/sys/kernel/debug/tracing, no events on kernel functions",
            "for dmakit record: a kernel with CONFIG_FPROBE_EVENTS or CONFIG_KPROBE_EVENTS",
        ),
    ),
    (host.tracefs, {}, 0, Finding("tracefs", NO, "this kernel has none", "a kernel with CONFIG_FTRACE")),
    (
        host.tracefs,
        {"proc/filesystems": "nodev\ttracefs\n", "sys/kernel/tracing/.x": ""},
        0,
        Finding(
            "tracefs", NO, "not mounted, or only root may use it", "sudo mount -t tracefs tracefs /sys/kernel/tracing"
        ),
    ),
    (host.kvm, {"dev/kvm": ""}, 12, Finding("KVM", YES, "API version 12")),
    (
        host.kvm,
        {"dev/kvm": ""},
        -errno.EACCES,
        Finding(
            "KVM",
            NO,
            "/dev/kvm: Permission denied",
            "run as root, or: chgrp kvm /dev/kvm; chmod g+rw /dev/kvm; usermod -aG kvm $USER",
        ),
    ),
    (
        host.kvm,
        {"proc/cpuinfo": "vendor_id : AuthenticAMD\nflags : fpu svm\n"},
        0,
        Finding("KVM", NO, "no /dev/kvm", "modprobe kvm_amd (needs a kernel with CONFIG_KVM_AMD)"),
    ),
    (
        host.kvm,
        {"proc/cpuinfo": "vendor_id : GenuineIntel\nflags : fpu\n"},
        0,
        Finding("KVM", NO, "the CPU offers no virtualisation", "switch it on in the firmware (or nested=1)"),
    ),
]


@pytest.mark.parametrize(("probe", "files", "answer", "finding"), ROWS)
def test_a_probe_says_what_is_there_and_what_helps(
    tmp_path: Path, probe: Probe, files: dict[str, str], answer: int, finding: Finding
) -> None:
    assert probe(machine(tmp_path, files, answer)) == finding


def test_every_probe_has_rows() -> None:
    assert {row[0] for row in ROWS} == set(host.PROBES)


def test_an_empty_machine_has_a_remedy_for_everything(tmp_path: Path) -> None:
    findings = survey(Host(tmp_path, Answers(-errno.ENOSYS), memlock=1024))
    assert all(finding.remedy and finding.state != YES for finding in findings)
    assert len({finding.name for finding in findings}) == len(host.PROBES)


def test_a_broken_configuration_is_unknown(tmp_path: Path) -> None:
    there = machine(tmp_path, {})
    (tmp_path / "proc/config.gz").write_bytes(b"\x1f\x8bno")
    assert there.option("VFIO_PCI") == ""


def test_the_real_calls_on_this_host(tmp_path: Path) -> None:
    calls = HostCalls()
    for answer in (calls.pagemap_scan(), calls.io_uring(), calls.dirty_canary()):
        assert answer >= 0 or -answer in errno.errorcode
    assert calls.opens(tmp_path / "none") == -errno.ENOENT
    (tmp_path / "file").touch()
    assert calls.opens(tmp_path / "file") == 0
    assert calls.kvm(tmp_path / "file") == calls.type1(tmp_path / "file") == -errno.ENOTTY
    if calls.dirty_canary() == 0:
        assert calls.pagemap_scan() == 1, "an unprotected page that was touched counts as written"


def test_the_doctor_shows_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in shown["host"]] == [finding.name for finding in survey(Host(Path("/"), HostCalls()))]
    assert run(["doctor"]) == 0
    assert "\nPAGEMAP_SCAN " in capsys.readouterr().out
