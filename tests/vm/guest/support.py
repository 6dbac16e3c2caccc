"""What guest tests share: the boot's names, sysfs, drivers, direct I/O, trace events."""

from __future__ import annotations

import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

KERNEL = os.environ.get("DMAKIT_VM_KERNEL", "")
BACKENDS = ("type1", "iommufd") if KERNEL == "iommufd" else ("type1",)  # what this kernel has
IOMMU = os.environ.get("DMAKIT_VM_IOMMU", "")
FULL = os.environ.get("DMAKIT_VM_FULL") == "1"
LONG = pytest.mark.skipif(not FULL, reason="in the full matrix (--vm full)")
# Where a kernel has it in the short set: the others have it in the full matrix.
SHORT = pytest.mark.skipif(not FULL and IOMMU != "vtd-lazy", reason="in the full matrix (--vm full)")
NVME = ("0000:00:04.0", "0000:00:05.0")
EDU = "0000:00:10.0"
PCI = Path("/sys/bus/pci/devices")
HOTPLUG = "yes" if (PCI / "0000:00:11.0").exists() else "no"
TRACED = "yes" if "kprobe_event=" in Path("/proc/cmdline").read_text() else "no"  # booted with probes
TRACE = Path("/sys/kernel/tracing")


def until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Wait for something the kernel does in its own time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still not so after {seconds:.0f} s: {what}"
        time.sleep(0.01)


def modprobe(*words: str) -> None:
    """Load (or with -r remove) modules."""
    subprocess.run(["modprobe", *words], check=True)


def driver_of(bdf: str) -> str | None:
    """The driver that a device is bound to."""
    link = PCI / bdf / "driver"
    return link.resolve().name if link.exists() else None


def bind(bdf: str, driver: str) -> None:
    """Bind a free device to a driver, by its address."""
    (PCI / bdf / "driver_override").write_text(driver)
    Path("/sys/bus/pci/drivers_probe").write_text(bdf)


def unbind(bdf: str) -> None:
    """Free a device and forget the wish for a driver."""
    if driver_of(bdf):
        (PCI / bdf / "driver" / "unbind").write_text(bdf)
    (PCI / bdf / "driver_override").write_text("\n")


def group_of(bdf: str) -> Path:
    """The device's IOMMU group in sysfs."""
    return (PCI / bdf / "iommu_group").resolve()


@contextmanager
def kernel_nvme() -> Iterator[dict[str, Path]]:
    """The kernel's NVMe driver on all drives: block devices by address; unloaded again."""
    modprobe("nvme")
    try:
        until(lambda: set(_blocks()) >= set(NVME), "a block device for each drive")
        yield _blocks()
    finally:
        modprobe("-r", "nvme")


def _blocks() -> dict[str, Path]:
    found = {}
    for block in Path("/sys/block").glob("nvme*n1"):
        bdf = next(part for part in reversed(block.resolve().parts) if part.startswith("0000:"))
        if (node := Path("/dev", block.name)).exists():
            found[bdf] = node
    return found


def write_direct(node: Path, offset: int, data: bytes) -> None:
    """Write around the page cache: the device reads this memory."""
    fd = os.open(node, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, len(data)) as memory:
            memory[:] = data
            assert os.pwritev(fd, [memory], offset) == len(data)
    finally:
        os.close(fd)


def read_direct(node: Path, offset: int, size: int) -> bytes:
    """Read around the page cache."""
    fd = os.open(node, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, size) as memory:
            assert os.preadv(fd, [memory], offset) == size
            return memory[:]
    finally:
        os.close(fd)


@contextmanager
def traced(event: str) -> Iterator[Callable[[], list[str]]]:
    """Record a trace event (``system/name``) while the block runs; the call gives its lines so far."""
    switch = TRACE / "events" / event / "enable"
    (TRACE / "trace").write_text("")
    switch.write_text("1")
    (TRACE / "tracing_on").write_text("1")
    try:
        yield lambda: [line for line in (TRACE / "trace").read_text().splitlines() if not line.startswith("#")]
    finally:
        switch.write_text("0")
        (TRACE / "trace").write_text("")
