"""The command line on a real kernel: a drive's way to VFIO, through every verb and back, and who is not let in."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmakit import vfio
from tests.vm.guest.support import (
    BACKENDS,
    EDU,
    FULL,
    NVME,
    PCI,
    driver_of,
    group_of,
    kernel_nvme,
    modprobe,
    read_direct,
    until,
)

# The verbs are the same behind every IOMMU: AMD's only in the full matrix.
pytestmark = pytest.mark.on(iommu=("vtd-lazy", "amd") if FULL else "vtd-lazy")
BDF = NVME[0]
PLATFORM = ("--platform", f"vfio:{BDF}")
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
WORKLOAD = "bs=16k,iodepth=2,frag=1,n=20"


def dmakit(*words: str, status: int = 0, before: tuple[str, ...] = ()) -> tuple[str, str]:
    """What a command prints on both streams; its status must be ``status``."""
    done = subprocess.run([*before, "dmakit", *words], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout, done.stderr


def row(text: str) -> list[str]:
    """The words of the drive's line in a list."""
    (found,) = [line.split() for line in text.splitlines() if line.startswith(BDF)]
    return found


@pytest.mark.parametrize("backend", BACKENDS if FULL else BACKENDS[-1:])
def test_a_drives_way_to_vfio_and_back(backend: str, tmp_path: Path) -> None:
    """Each verb on its own, as a user types them; the kernel's driver has the last word on the bytes."""
    modprobe("vfio-pci")
    data = random.Random(backend).randbytes(40 * 512)
    (tmp_path / "in").write_bytes(data)
    place = ("--lba", "4096", "--backend", backend, *PLATFORM)
    modprobe("nvme")
    until(lambda: driver_of(BDF) == "nvme", "the kernel's driver has the drive")
    group = group_of(BDF).name
    assert row(dmakit("vfio", "list")[0])[:5] == [BDF, "NVMe", "1b36:0010", group, "nvme"]
    assert row(dmakit("nvme", "list")[0])[:4] == [BDF, "1b36:0010", "nvme", group]
    assert dmakit("vfio", "bind", BDF) == (f"{BDF}: nvme -> vfio-pci\n", "")
    try:
        assert row(dmakit("vfio", "list")[0])[:5] == [BDF, "NVMe", "1b36:0010", group, "vfio-pci"]
        assert row(dmakit("nvme", "list")[0]) == [BDF, "1b36:0010", "vfio-pci", group, *PLATFORM]
        out, _ = dmakit("nvme", "write", str(tmp_path / "in"), "--yes", *place)
        assert out == "20480 bytes written from block 4096 of namespace 1, flushed\n"
        dmakit("nvme", "read", "--blocks", "40", "--out", str(tmp_path / "out"), *place)
        assert (tmp_path / "out").read_bytes() == data
    finally:
        assert dmakit("vfio", "unbind", BDF) == (f"{BDF}: vfio-pci -> nvme\n", "")
    assert driver_of(BDF) == "nvme" and (PCI / BDF / "driver_override").read_text() == "(null)\n"
    with kernel_nvme() as nodes:
        assert read_direct(nodes[BDF], 4096 * 512, len(data)) == data


@pytest.fixture(scope="module")
def bound() -> Iterator[None]:
    """The drive is VFIO's, for root alone."""
    modprobe("vfio-pci")
    vfio.bind(BDF)
    yield
    vfio.unbind(BDF)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unbind_names_the_holder_or_waits_for_it(backend: str) -> None:
    modprobe("vfio-pci")
    vfio.bind(EDU)
    group = f"its group {group_of(EDU).name} " if backend == "type1" else ""
    with vfio.Device.open(EDU, backend=backend) as device:
        held = f"{EDU} {group}is held by process {os.getpid()} ({Path('/proc/self/comm').read_text().strip()})"
        refused = dmakit("vfio", "unbind", EDU, status=2)
        assert refused[1].startswith(f"dmakit: {held}: end it, or ") and driver_of(EDU) == "vfio-pci"
        assert held.removeprefix(EDU).strip() in dmakit("vfio", "list")[0]
        with subprocess.Popen(["dmakit", "vfio", "unbind", "--wait", EDU], stderr=subprocess.PIPE, text=True) as asks:
            assert asks.stderr is not None
            assert asks.stderr.readline() == f"dmakit: {held}: waiting until it is closed\n"
            until(lambda: device.wanted_back, "the kernel asks for the device", 60)
            assert asks.poll() is None
            device.close()
            assert asks.wait(60) == 0
    assert driver_of(EDU) is None


@pytest.mark.usefixtures("bound")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "words",
    [["nvme", "identify"], ["nvme", "verify", "--yes"], ["compare", WORKLOAD, "--yes"], ["explain", WORKLOAD, "--yes"]],
    ids=lambda words: " ".join(words[:2]).split(" bs")[0],
)
def test_an_ordinary_user_is_told_what_to_do(backend: str, words: list[str]) -> None:
    path = f"/dev/vfio/{group_of(BDF).name}" if backend == "type1" else "/dev/iommu"
    out, err = dmakit(*words, *PLATFORM, "--backend", backend, status=2, before=NOBODY)
    assert (out, err) == ("", f"dmakit: open({path}): EACCES: no permission: run as root, or give yourself the file\n")


@pytest.mark.usefixtures("bound")
def test_an_ordinary_user_may_look_and_not_bind() -> None:
    assert row(dmakit("vfio", "list", before=NOBODY)[0]) == row(dmakit("vfio", "list")[0])
    out, err = dmakit("vfio", "bind", NVME[1], status=2, before=NOBODY)
    assert out == "" and err.endswith(": EACCES: no permission: run as root\n") and err.count("\n") == 1, err
    assert driver_of(NVME[1]) is None
