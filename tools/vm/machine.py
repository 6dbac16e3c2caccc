"""The virtual machine: a QEMU command line for a kernel, a variant and a set of devices.

Device addresses do not depend on what else is there:

    00:04.0, 00:05.0 …   NVMe drives, each in an IOMMU group of its own; the second may carry a controller memory buffer
    00:10.0              edu, QEMU's teaching device (MMIO, DMA with a 28-bit mask, interrupts)
    00:1a.0 … 00:1e.0    what the guest itself runs on (shares, disks, virtio-iommu): leave them alone

The processor is an EPYC because Linux allows peer-to-peer DMA through the host bridge of AMD Zen. RAM is a shared
memfd, so that a vfio-user device gets file descriptors. KVM is not used: TCG is the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tools.vm import parts

KERNELS = ("iommufd", "debian")


@dataclass(frozen=True)
class Variant:
    """An emulated IOMMU (QEMU arguments) and the kernel parameters that put it into a mode."""

    devices: tuple[str, ...]
    append: str
    what: str


APPEND = "console=ttyS0 quiet panic=-1 random.trust_cpu=on tsc=reliable no_timer_check"
UNSAFE = "iommufd.allow_unsafe_interrupts=1 vfio_iommu_type1.allow_unsafe_interrupts=1"
VTD = ("-device", "intel-iommu,intremap=on,caching-mode=off")
# A port that the guest's pciehp serves, not the firmware's ACPI: a press on its button, five seconds, gone.
PORT = ("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off",
        "-device", "pcie-root-port,id=hotport,chassis=1,slot=1,addr=11")  # fmt: skip
NATIVE = "pcie_ports=native"
VARIANTS = {
    "vtd-lazy": Variant(VTD, "intel_iommu=on", "VT-d, second-stage tables, deferred flushes"),
    "vtd-strict": Variant(VTD, "intel_iommu=on iommu.strict=1", "VT-d, flushes before an unmap returns"),
    "vtd-sm": Variant(
        ("-device", "intel-iommu,intremap=on,scalable-mode=on,fsts=on"),
        "intel_iommu=on,sm_on",
        "VT-d, scalable mode, first-stage tables",
    ),
    "amd": Variant(("-device", "amd-iommu,intremap=on,dma-remap=on"), "", "AMD-Vi"),
    "virtio": Variant(("-device", "virtio-iommu-pci,addr=1e"), UNSAFE, "virtio-iommu, 39-bit, no interrupt remapping"),
    "none": Variant((), "", "no IOMMU"),
}


@dataclass(frozen=True)
class Machine:
    """What is in the machine. Sizes in MiB; ``extra`` are raw QEMU arguments, ``append`` more kernel parameters."""

    kernel: str = "iommufd"
    iommu: str = "vtd-lazy"
    nvme: int = 1
    nvme_mib: int = 1024
    nvme_props: str = ""
    cmb: bool = False
    edu: bool = False
    hotplug: bool = False
    processors: int = 2
    memory: int = 2048
    append: str = ""
    extra: tuple[str, ...] = field(default=())


def command(machine: Machine, kernel: Path, initrd: Path, shares: dict[str, Path], scratch: Path) -> list[str]:
    """The QEMU command; ``shares`` are folders by their 9p tag (a tag that starts with ``ro-`` is read-only)."""
    root = parts.qemu().ensure()
    libraries = root / "usr/lib/x86_64-linux-gnu"
    variant = VARIANTS[machine.iommu]
    argv = [str(root / "lib64/ld-linux-x86-64.so.2"), "--library-path", str(libraries)]
    argv += [
        str(root / "usr/bin/qemu-system-x86_64"),
        "-L",
        str(root / "usr/share/qemu"),
        "-L",
        str(root / "usr/share/seabios"),
    ]
    argv += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none"]
    argv += [
        "-machine",
        "q35,kernel-irqchip=split,memory-backend=ram",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "EPYC,check=off",
    ]
    argv += ["-smp", str(machine.processors), "-m", f"{machine.memory}M"]
    argv += ["-object", f"memory-backend-memfd,id=ram,size={machine.memory}M,share=on"]
    argv += variant.devices
    argv += ["-serial", f"file:{scratch / 'console'}", "-serial", "stdio", *_monitor(scratch / "qmp")]
    for number, (name, image) in enumerate((("root", parts.image()), ("core", parts.core()))):
        file = next(image.ensure().glob("*.ext4"))
        argv += ["-drive", f"if=none,id={name},file={file},format=raw,snapshot=on"]
        argv += ["-device", f"virtio-blk-pci,drive={name},addr={0x1C + number:x}"]
    for number, (tag, folder) in enumerate(shares.items()):
        only = ",readonly=on" if tag.startswith("ro-") else ""
        local = f"local,id={tag},path={folder},security_model=none,multidevs=remap{only}"
        argv += ["-fsdev", local, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag},addr={0x19 + number:x}"]
    argv += _devices(machine, scratch)
    append = f"{APPEND} {variant.append} {NATIVE if machine.hotplug else ''} {machine.append}"
    return [*argv, *machine.extra, "-kernel", str(kernel), "-initrd", str(initrd), "-append", append]


def bad_block(machine: Machine, number: int) -> int:
    """The one sector of the second drive that cannot be read or written, in its last MiB; 0 for other drives."""
    return (machine.nvme_mib << 11) - 1000 if number == 1 else 0


def _file(drive: Path, bad: int) -> str:
    """A drive's backing, with an I/O error at sector ``bad``."""
    cache = "cache=unsafe,discard=unmap"
    if not bad:
        return f"file={drive},format=raw,{cache}"
    errors = "".join(
        f",file.inject-error.{n}.event={event},file.inject-error.{n}.sector={bad},file.inject-error.{n}.errno=5"
        for n, event in enumerate(("read_aio", "write_aio"))
    )
    return f"driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename={drive}{errors},{cache}"


def _monitor(path: Path) -> list[str]:
    """QEMU's monitor (QMP) on the guest's third serial line: QEMU is both ends of the socket between them."""
    server = ["-chardev", f"socket,id=monitor,path={path},server=on,wait=off", "-mon", "chardev=monitor,mode=control"]
    return [*server, "-chardev", f"socket,id=line,path={path}", "-serial", "chardev:line"]


def _devices(machine: Machine, scratch: Path) -> list[str]:
    """The devices under test."""
    argv: list[str] = []
    for number in range(machine.nvme):
        drive = scratch / f"nvme{number}.raw"
        with drive.open("wb") as file:
            file.truncate(machine.nvme_mib << 20)
        props = f",{machine.nvme_props}" if machine.nvme_props else ""
        buffer = ",cmb_size_mb=64" if machine.cmb and number == min(1, machine.nvme - 1) else ""
        argv += ["-drive", f"if=none,id=nvme{number},{_file(drive, bad_block(machine, number))}"]
        argv += ["-device", f"nvme,drive=nvme{number},serial=DMAKIT{number},addr={4 + number:x}{buffer}{props}"]
    argv += ["-device", "edu,addr=10"] if machine.edu else []
    return [*argv, *PORT] if machine.hotplug else argv
