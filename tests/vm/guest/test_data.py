"""Every byte, every way: dmakit's NVMe driver through VFIO, alone and in turns with the kernel's on one drive."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dmakit import nvme, vfio
from tests.vm.guest.support import FULL, KERNEL, NVME, kernel_nvme, modprobe, read_direct, write_direct

BACKENDS = ("type1", "iommufd") if KERNEL == "iommufd" else ("type1",)
SIZE = "64M" if FULL else "4M"
MIB = 1 << 20


@contextmanager
def held(bdf: str) -> Iterator[None]:
    """A drive in VFIO's hands."""
    modprobe("vfio-pci")
    vfio.bind(bdf)
    try:
        yield
    finally:
        vfio.unbind(bdf)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", ["premap", "two-step", "page", "sg"])
def test_verify_finds_every_byte(backend: str, strategy: str) -> None:
    words = ["--backend", backend, "--strategy", strategy, "--size", SIZE, "--seed", "5", "--yes", "--json", "-"]
    with held(NVME[0]):
        command = ["dmakit", "nvme", "verify", "--platform", f"vfio:{NVME[0]}", *words]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    told = json.loads(run.stdout)
    assert told["strategy"] == strategy


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kernels_driver_and_ours_read_each_other(backend: str) -> None:
    theirs, ours = (random.Random(f"{backend} {n}").randbytes(MIB) for n in range(2))
    with kernel_nvme() as blocks:
        write_direct(blocks[NVME[0]], 8 * MIB, theirs)
    with held(NVME[0]), nvme.Controller.open(NVME[0], backend=backend) as controller:
        disk = controller.namespaces[1]
        assert bytes(disk.read(8 * MIB // 512, MIB // 512)) == theirs
        disk.write(16 * MIB // 512, ours)
        disk.flush()
    with kernel_nvme() as blocks:
        assert read_direct(blocks[NVME[0]], 16 * MIB, MIB) == ours
        assert read_direct(blocks[NVME[0]], 8 * MIB, MIB) == theirs
