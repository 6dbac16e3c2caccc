"""Real devices behind a real kernel's IOMMU: type1 and iommufd, with QEMU's edu making the accesses."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmakit import vfio
from dmakit.dma.direction import Direction
from dmakit.errors import ExhaustedError, HostError, MisuseError, UnsupportedError
from dmakit.platform.linux.kernel import Kernel
from tests.support.edu import EDU_MASK, Edu, EduPort
from tests.support.sweep import descriptors
from tests.support.vfio.conversation import talk
from tests.vm.guest.support import IOMMU, KERNEL, SHORT, driver_of, kernel_nvme, traced, until
from tests.vm.guest.vfio_support import BACKENDS, EDU, NVME, PAGE, bound, pinned

TO, FROM, BOTH = Direction.TO_DEVICE, Direction.FROM_DEVICE, Direction.BIDIRECTIONAL
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def everything_is_given_back() -> Iterator[None]:
    before = descriptors(), pinned()
    with bound(EDU):
        yield
    assert (descriptors(), pinned()) == before


@contextmanager
def taken(backend: str, **options: Any) -> Iterator[tuple[vfio.Machine, vfio.Device, EduPort]]:
    """A machine with edu, and its accesses."""
    with vfio.Machine(**{"backend": backend, "ram": "16M", **options}) as machine:
        device = machine.open(EDU, mask=EDU_MASK)
        port = EduPort(Edu(device), machine)
        yield machine, device, port
        port.close()
        assert machine.live()["mappings"] == machine.live()["iova_ranges"] == 0


def test_devices_are_found_and_what_is_in_use_is_refused() -> None:
    found = {device.bdf: device for device in vfio.scan()}
    assert (found[EDU].vendor, found[EDU].device, found[EDU].driver) == (0x1234, 0x11E8, "vfio-pci")
    assert found[NVME].kind == "NVMe" and found[NVME].group is not None
    run = subprocess.run([sys.executable, "-m", "dmakit", "vfio", "bind", "0000:00:1c.0"],
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert run.returncode == 2
    if IOMMU == "virtio" or found["0000:00:1c.0"].group is not None:
        assert run.stderr == "dmakit: 0000:00:1c.0 is in use: vda is mounted at /\n"


def test_a_driver_gets_its_device_back() -> None:
    subprocess.run(["modprobe", "nvme"], check=True)
    assert vfio.bind(NVME).driver == "vfio-pci"
    with pytest.raises(HostError, match="is not bound to vfio-pci but to nvme|nothing"):
        vfio.unbind(NVME)
        vfio.unbind(NVME)
    assert {d.bdf: d.driver for d in vfio.scan()}[NVME] == "nvme"
    subprocess.run(["modprobe", "-r", "nvme"], check=True)


def partition(node: Path, *sizes: int) -> None:
    """Write a partition table (or, without sizes, none) and let the kernel read it; sizes in 512-byte blocks."""
    table, start = b"", 2048
    for size in sizes:
        table += struct.pack("<I4B2I", 0, 0x83, 0, 0, 0, start, size)
        start += size
    fd = os.open(node, os.O_RDWR)
    try:
        os.pwrite(fd, (bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa") if sizes else bytes(512), 0)
        os.fsync(fd)
        fcntl.ioctl(fd, 0x125F)  # BLKRRPART
    finally:
        os.close(fd)


def refused(reason: str) -> None:
    """Binding the drive is refused for this reason, and its driver stays."""
    with pytest.raises(HostError) as caught:
        vfio.bind(NVME)
    assert str(caught.value) == f"{NVME} is in use: {reason}" and caught.value.errno_name == "EBUSY"
    assert driver_of(NVME) == "nvme" and not Path("/run/dmakit/vfio", NVME).exists()


def test_a_drive_in_use_is_not_taken_and_one_that_is_not_is() -> None:
    with kernel_nvme() as nodes:
        node = nodes[NVME]
        for partitions, held in (((), ""), ((40960, 40960), ""), ((40960, 40960), "p2")):
            partition(node, *partitions)
            fd = os.open(f"{node}{held}", os.O_RDONLY | os.O_EXCL)
            try:
                refused(f"{node.name}{held} is held open exclusively")
            finally:
                os.close(fd)
        swap = f"{node}p1"
        if Path("/proc/swaps").exists():  # Debian's kernel has swap, the small one has not
            subprocess.run(["mkswap", swap], check=True, capture_output=True)
            subprocess.run(["swapon", swap], check=True)
            refused(f"{node.name}p1 is swap")
            subprocess.run(["swapoff", swap], check=True)
        partition(node)
        assert vfio.bind(NVME).driver == "vfio-pci"
        assert vfio.unbind(NVME).driver == "nvme"
        until(node.exists, "the drive has its name again")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kernel_answers_as_the_fake_host_does(backend: str) -> None:
    recorded = (ROOT / "tests" / "data" / "vfio_conversation.txt").read_text().splitlines()
    expected = [line.split(None, 1)[1] for line in recorded if line.startswith(backend)]
    said = [f"{asked:28} {answer}" for asked, answer in talk(Kernel(), backend, EDU)]
    assert said == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_tutorial(backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "vfio.md").read_text(), re.DOTALL)[0]
    exec(code.replace('ram="4M"', f'ram="4M", backend={backend!r}'), {})  # noqa: S102
    assert capsys.readouterr().out.splitlines() == ["1234:11e8", "edu 1.0", "b'hello, real IOMMU'"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_allowed_ranges_and_the_msi_window(backend: str) -> None:
    with taken(backend) as (_, device, _port):
        ranges = device.space.domain.ranges
        assert ranges[0][0] == 0 and device.space.domain.aperture_end == ranges[-1][1] >= (1 << 32) - 1
        if IOMMU != "virtio":
            assert ranges[0][1] == 0xFEDFFFFF and ranges[1][0] == 0xFEF00000
        with pytest.raises(MisuseError, match="outside what this IOMMU translates"):
            device.space.domain.map(0xFEE00000, device.buffer(PAGE).ranges[0][0], PAGE, 3)


@pytest.mark.skipif(KERNEL != "iommufd", reason="needs iommufd")
def test_links_out_of_staging_pin_nothing() -> None:
    with taken("iommufd") as (machine, device, port):
        assert machine.staging is not None
        buffer = machine.buffer(256 * PAGE, order=8)
        phys = buffer.ranges[0][0]
        device.dma.unmap_phys(device.dma.map_phys(phys, PAGE, BOTH), PAGE, BOTH)
        before = pinned()
        state = device.dma.try_alloc(phys, 64 * PAGE)
        for i in range(64):
            state.link(phys + (63 - i) * PAGE, i * PAGE, PAGE, BOTH)
        assert pinned() == before, "a copy must not pin again"
        buffer.write(63 * PAGE, b"first")
        assert port.read(state.addr, 5) == b"first"
        state.destroy(64 * PAGE, BOTH)
        assert pinned() == before == before // (2 << 20) * (2 << 20)
    with taken("iommufd", staging=False) as (machine, device, port):
        before = pinned()
        addr = device.dma.map_phys(machine.buffer(PAGE).ranges[0][0], PAGE, BOTH)
        assert pinned() == before + PAGE
        device.dma.unmap_phys(addr, PAGE, BOTH)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pins_are_counted_as_the_kernel_counts_them(backend: str) -> None:
    base = pinned()
    with taken(backend) as (machine, device, _port):
        assert pinned() - base == machine.pins.pinned > 0
        addr = device.dma.map_phys(machine.buffer("2M", order=9).ranges[0][0], 2 << 20, BOTH)
        assert pinned() - base == machine.pins.pinned
        device.dma.unmap_phys(addr, 2 << 20, BOTH)
        assert pinned() - base == machine.pins.pinned


AS_A_USER = ("prlimit", "--memlock=4194304", "setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock")
LIMITED = """
import sys
from dmakit import vfio
from dmakit.errors import DmakitError
with vfio.Machine(backend=sys.argv[1], ram="16M", staging=False) as machine:
    device = machine.open("0000:00:10.0", mask=(1 << 28) - 1)
    if sys.argv[2] == "kernel":
        machine.pins.limit = None  # let the kernel say it
    try:
        device.dma.map_phys(machine.buffer("8M", order=11).ranges[0][0], 8 << 20, 0)
    except DmakitError as error:
        print(type(error).__name__, error.errno_name, str(error)[:60])
    assert machine.live()["mappings"] == machine.live()["iova_ranges"] == 0
"""

LIMITED_TWICE = """
import sys
from dmakit import vfio
from dmakit.errors import DmakitError
options = {"backend": sys.argv[1], "ram": "16M", "staging": False}
with vfio.Machine(**options) as one, vfio.Machine(**options) as two:
    edu, nvme = one.open("0000:00:10.0", mask=(1 << 28) - 1), two.open("0000:00:04.0")
    edu.dma.map_phys(one.buffer("1M", order=8).ranges[0][0], 1 << 20, 0)
    edu.dma.map_phys(one.buffer("2M", order=9).ranges[0][0], 2 << 20, 0)
    phys = two.buffer("2M", order=9).ranges[0][0]
    if sys.argv[2] == "kernel":
        two.pins.limit = None
    try:
        nvme.dma.map_phys(phys, 2 << 20, 0)
    except DmakitError as error:
        print(type(error).__name__, error.errno_name, str(error)[:110])
    nvme.dma.map_phys(phys, 1 << 20, 0)
"""


def as_a_user(script: str, *words: str) -> str:
    """What ``script`` prints in a process that may lock 4 MiB."""
    run = subprocess.run(
        [*AS_A_USER, sys.executable, "-c", script, *words], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.on(iommu="vtd-lazy")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_limit_counts_for_two_machines_together(backend: str) -> None:
    call = "VFIO_IOMMU_MAP_DMA" if backend == "type1" else "IOMMU_IOAS_MAP"
    told = f"ExhaustedError ENOMEM {call} of 0x200000 bytes: 0x300000 bytes are locked and the limit is 0x400000"
    with bound(NVME):
        for who, expected in (("dmakit", told), ("kernel", "HostError ENOMEM")):
            assert as_a_user(LIMITED_TWICE, backend, who).startswith(expected)


@SHORT
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_limit_on_locked_memory(backend: str) -> None:
    told = f"ExhaustedError ENOMEM {'VFIO_IOMMU_MAP_DMA' if backend == 'type1' else 'IOMMU_IOAS_MAP'} of 0x800000 bytes"
    for who, expected in (("dmakit", told), ("kernel", "HostError ENOMEM")):
        assert as_a_user(LIMITED, backend, who).startswith(expected)


def test_the_containers_limit() -> None:
    limit = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
    before = limit.read_text()
    limit.write_text("4")
    try:
        with taken("type1") as (machine, device, _port):
            buffer = machine.buffer(PAGE)
            held = [device.dma.map_phys(*buffer.ranges[0], TO) for _ in range(3)]
            with pytest.raises(
                ExhaustedError, match="the container holds 4 mappings, its limit: raise dma_entry_limit"
            ):
                device.dma.map_phys(*buffer.ranges[0], TO)
            for addr in held:
                device.dma.unmap_phys(addr, PAGE, TO)
    finally:
        limit.write_text(before)


@contextmanager
def host_gives(reserved: int, shared: str) -> Iterator[None]:
    """Reserved huge pages, and the transparent ones of shared memory, for the block."""
    pages, mode = Path("/proc/sys/vm/nr_hugepages"), Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    before = re.search(r"\[(\w+)\]", mode.read_text())
    assert before
    pages.write_text(str(reserved))
    mode.write_text(shared)
    try:
        yield
    finally:
        mode.write_text(before[1])
        pages.write_text("0")


def transparent() -> int:
    """Bytes of shared memory that are transparent huge pages, in the whole guest."""
    return int(Path("/proc/meminfo").read_text().split("ShmemHugePages:")[1].split()[0]) << 10


def largest(lines: list[str], iova: int) -> int:
    """The largest page that the IOMMU driver was given in [iova, iova + 2 MiB), as iommu/map tells it."""
    told = [re.search(r"iova=(\w+) - \w+ paddr=\w+ size=(\d+)", line) for line in lines]
    return max(int(one[2]) for one in told if one and iova <= int(one[1], 16) < iova + (2 << 20))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "huge, shared, found", (("none", "never", "none"), ("thp", "never", "none"), ("thp", "advise", "thp"),
                            ("auto", "always", "thp"), ("hugetlb", "never", "hugetlb"))
)  # fmt: skip
def test_huge_pages_are_mapped_as_such(backend: str, huge: str, shared: str, found: str) -> None:
    with (
        host_gives(8 if huge == "hugetlb" else 0, shared),
        traced("iommu/map") as lines,
        taken(backend, huge=huge) as (machine, device, port),
    ):
        assert machine.space.huge == found
        for touched in (True, False):
            block, before = machine.buffer("2M", order=9), transparent()
            if touched:
                block.write(1 << 20, b"in the middle")
            addr = device.dma.map_phys(*block.ranges[0], BOTH)
            assert transparent() - before == (2 << 20 if found == "thp" else 0)
            assert found == "none" or largest(lines(), addr) >= 2 << 20  # small pages may lie side by side
            if touched:
                assert port.read(addr + (1 << 20), 13) == b"in the middle"
            device.dma.unmap_phys(addr, 2 << 20, BOTH)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_callers_memory(backend: str) -> None:
    with taken(backend) as (machine, device, port):
        for memory in (mmap.mmap(-1, 3 * PAGE), np.zeros(9000, np.uint8)):
            with machine.register(memory) as buffer:
                phys, size = buffer.ranges[0]
                addr = device.dma.map_phys(phys, size, BOTH)
                port.write(addr + 4000, b"by the device")
                assert bytes(memoryview(memory)[4000:4013]) == b"by the device"
                device.dma.unmap_phys(addr, size, BOTH)


VICTIM = """
import sys, time
from dmakit import vfio
machine = vfio.Machine(backend=sys.argv[1], ram="16M")
device = machine.open("0000:00:10.0", mask=(1 << 28) - 1)
device.dma.map_phys(machine.buffer("4M", order=10).ranges[0][0], 4 << 20, 0)
device.interrupts()
device.set_bus_master(True)
print("ready", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_process_leaves_nothing(backend: str) -> None:
    config = Path(f"/sys/bus/pci/devices/{EDU}/config")
    victim = subprocess.Popen([sys.executable, "-c", VICTIM, backend], stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None and victim.stdout.readline() == "ready\n"
    assert config.read_bytes()[4] & 4
    with pytest.raises(HostError) as busy, vfio.Device.open(EDU, backend=backend, ram="4M"):
        pass
    assert busy.value.errno_name in ("EBUSY", "EINVAL")
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    assert not config.read_bytes()[4] & 4, "no bus master"
    with taken(backend) as (_, device, port):
        assert device.bar(0).read32(0) >> 16 == 0x0100
        port.write(port.addr, b"works again")
        assert port.page.read(0, 11) == b"works again"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_peers_bar(backend: str) -> None:
    with bound(NVME), taken(backend) as (machine, device, port), machine.open(NVME) as nvme:
        bar = nvme.bar(0)
        assert bar.phys and bar.read32(8) >> 16 == 1  # NVMe 1.x, through the mapped BAR
        before = machine.pins.pinned
        try:
            addr = device.dma.map_resource(bar.phys, PAGE, BOTH)
        except UnsupportedError as error:
            assert backend == "iommufd" and "use backend='type1'" in str(error), error
            print(f"\n{error}")
            return
        print(f"\n{backend}: a peer's BAR is mapped")
        assert machine.pins.pinned == before
        assert port.read(addr + 8, 4) == bar.read32(8).to_bytes(4, "little")
        device.dma.unmap_resource(addr, PAGE, BOTH)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_devices_on_one_machine(backend: str) -> None:
    for share in (False, True):
        with bound(NVME), taken(backend, share=share) as (machine, device, port), machine.open(NVME) as nvme:
            assert (nvme.space is device.space) == share
            buffer = machine.buffer(PAGE)
            addr = nvme.dma.map_phys(*buffer.ranges[0], BOTH)
            assert (device.dma.iova_to_phys(addr) == buffer.ranges[0][0]) == share
            nvme.dma.unmap_phys(addr, PAGE, BOTH)


def test_dirty_pages_of_type1_are_all_that_is_mapped() -> None:
    with taken("type1") as (machine, device, _port):
        domain, words = device.space.domain, np.zeros(1, np.uint64)
        domain.map(1 << 32, machine.buffer(2 * PAGE, order=1).ranges[0][0], 2 * PAGE, 3)
        domain.set_dirty_tracking(True)
        assert domain.read_and_clear_dirty(1 << 32, 8 * PAGE, words) == 2 and int(words[0]) == 3
        domain.set_dirty_tracking(False)
        domain.unmap(1 << 32, 2 * PAGE)
