"""How a process that does I/O ends: killed or interrupted in mid-I/O, it leaves no pin, no bus master, a free drive.

What is pinned is the kernel's own count of pages that somebody pinned for DMA, of all processes together
(``nr_foll_pin_acquired`` less ``nr_foll_pin_released``), so a process that is gone cannot hide any.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dmakit import nvme, vfio
from dmakit.errors import HostError
from tests.vm.guest.support import BACKENDS, FULL, IOMMU, LONG, NVME, PCI, kernel_nvme, modprobe, read_direct, until

REASON = "in the full matrix (--vm full)"
pytestmark = pytest.mark.skipif(not FULL and IOMMU != "vtd-lazy", reason=REASON)
BDF = NVME[0]
WRITER = """
import asyncio, sys
from dmakit import nvme
bdf, backend, strategy = sys.argv[1:]

async def main():
    async with nvme.Controller.open(bdf, backend=backend, ram="128M", strategy=strategy, depth=64) as controller:
        disk = controller.namespaces[1]
        while True:
            await asyncio.gather(*(disk.write(256 * at, b"k" * 131072) for at in range(32)))
            print(controller.sync.driver.strategy, flush=True)

asyncio.run(main())
"""


def pinned() -> int:
    """Pages pinned for DMA on this machine now; each CPU's share of the count is folded in first."""
    Path("/proc/sys/vm/stat_refresh").read_bytes()
    counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counts["nr_foll_pin_acquired"]) - int(counts["nr_foll_pin_released"])


def masters() -> bool:
    """Whether the drive may access memory: its command register's bus master bit."""
    return bool((PCI / BDF / "config").read_bytes()[4] & 4)


def holders() -> list[str]:
    """Processes that have a device of VFIO's or iommufd's open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith(("/dev/vfio/", "/dev/iommu")) or "vfio" in target:
            found.append(f"{link.parts[2]}: {target}")
    return found


@contextmanager
def nothing_left() -> Iterator[None]:
    """The drive is VFIO's meanwhile; afterwards all is as it was, and both drivers can use it."""
    modprobe("vfio-pci")
    vfio.bind(BDF)
    try:
        before = pinned()
        assert holders() == []  # the firmware may have left it a bus master
        yield
        assert not masters(), "the drive may still write to memory that is no longer its own"
        until(lambda: pinned() == before, f"{before} pages are pinned, as at the start: {pinned()}")
        assert holders() == []
        with nvme.Controller.open(BDF, ram="64M") as controller:
            controller.namespaces[1].write(64, b"next" * 1024)
            assert controller.namespaces[1].read(64, 8) == b"next" * 1024
        assert pinned() == before and not masters()
    finally:
        vfio.unbind(BDF)
    with kernel_nvme() as blocks:
        assert read_direct(blocks[BDF], 64 * 512, 4096) == b"next" * 1024


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", ["two-step", pytest.param("premap", marks=LONG), pytest.param("sg", marks=LONG)])
@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=LONG)], ids=["kill", "term"])
def test_a_process_killed_in_mid_io(backend: str, strategy: str, how: signal.Signals) -> None:
    with nothing_left():
        command = [sys.executable, "-c", WRITER, BDF, backend, strategy]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
            assert victim.stdout is not None and victim.stdout.readline() == f"{strategy}\n"
            assert masters() and pinned() > 0 and holders()
            with pytest.raises(HostError):
                nvme.Controller.open(BDF, backend=backend, ram="64M").close()  # it is taken
            victim.send_signal(how)
            assert victim.wait() == -how


COMMANDS = {
    "perf": ["nvme", "perf", "--op", "write", "--seconds", "1000", "--depth", "64"],
    "verify": ["nvme", "verify", "--size", "1G", "--strategy", "two-step"],
    "compare": ["compare", "bs=64k,iodepth=8,frag=1,rw=randrw,n=20000"],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["perf", *(pytest.param(name, marks=LONG) for name in ("verify", "compare"))])
def test_ctrl_c(backend: str, name: str) -> None:
    """What is in flight ends, the queues go, the device is released: status 130, no traceback."""
    with nothing_left():
        before = pinned()
        words = [*COMMANDS[name], "--platform", f"vfio:{BDF}", "--backend", backend, "--yes"]
        command = [sys.executable, "-m", "dmakit", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as victim:
            until(lambda: masters() and pinned() > before, f"{name} does I/O", 60)
            with pytest.raises(subprocess.TimeoutExpired):
                victim.wait(2)
            victim.send_signal(signal.SIGINT)
            out, err = victim.communicate(timeout=60)
        assert victim.returncode == 130, out + err
        assert "Traceback" not in err, err
