"""The machine is what was asked for: kernel, IOMMU and its mode, devices; and the IOMMU translates."""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
from pathlib import Path

import pytest

from tests.vm.guest.support import (
    EDU,
    IOMMU,
    KERNEL,
    NVME,
    PCI,
    bind,
    driver_of,
    group_of,
    kernel_nvme,
    modprobe,
    read_direct,
    traced,
    unbind,
    until,
    write_direct,
)

GROUP_TYPE = {"vtd-lazy": "DMA-FQ", "vtd-strict": "DMA", "vtd-sm": "DMA-FQ", "amd": "DMA", "virtio": "DMA-FQ"}
UNIT = {"vtd-lazy": "dmar0", "vtd-strict": "dmar0", "vtd-sm": "dmar0", "amd": "ivhd0", "virtio": "0000:00:1e.0"}
MSI_WINDOW = "0x00000000fee00000 0x00000000feefffff msi"


def test_the_compiled_core_runs_and_doctor_says_so() -> None:
    run = subprocess.run(["dmakit", "doctor", "--json"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert (told["core"]["running"], told["core"]["missing"], told["core"]["stale"]) == ("compiled", [], [])
    assert told["python"].startswith("CPython 3.13")


def test_doctor_sees_what_the_machine_has() -> None:
    modprobe("vfio-pci")
    run = subprocess.run(["dmakit", "doctor", "--json"], capture_output=True, text=True, check=True)
    states = {row["name"]: row["state"] for row in json.loads(run.stdout)["host"]}
    expected = {
        "IOMMU": "yes",
        "IOMMU groups": "yes",
        "interrupt remapping": "partly" if IOMMU == "virtio" else "yes",
        "VFIO type1": "yes",
        "iommufd": "yes" if KERNEL == "iommufd" else "no",
        "PAGEMAP_SCAN": "yes",
        "CPU dirty tracking": "yes",
        "io_uring": "yes",
        "tracefs": "yes",
    }
    assert {name: states[name] for name in expected} == expected


def test_the_kernel_is_the_one_asked_for() -> None:
    release = platform.release()
    assert release.endswith("-dmakit" if KERNEL == "iommufd" else "-amd64")
    modprobe("vfio-pci")
    assert Path("/dev/iommu").exists() == (KERNEL == "iommufd")
    assert Path("/dev/vfio/vfio").exists()


def test_the_iommu_is_the_one_asked_for() -> None:
    units = {path.name for path in Path("/sys/class/iommu").iterdir()}
    assert units - {"iommufd_selftest_iommu.0"} == {UNIT[IOMMU]}


@pytest.mark.on(iommu=("vtd-lazy", "vtd-strict", "vtd-sm"))
def test_scalable_mode_is_on_where_asked() -> None:
    extended = int(Path("/sys/class/iommu/dmar0/intel-iommu/ecap").read_text(), 16)
    assert bool(extended >> 43 & 1) == (IOMMU == "vtd-sm")  # ECAP.SMTS


@pytest.mark.parametrize("bdf", [*NVME, EDU])
def test_each_device_has_a_group_of_its_own(bdf: str) -> None:
    group = group_of(bdf)
    assert [path.name for path in (group / "devices").iterdir()] == [bdf]
    assert (group / "type").read_text().strip() == GROUP_TYPE[IOMMU]


@pytest.mark.parametrize("bdf", NVME)
def test_the_msi_window_is_reserved(bdf: str) -> None:
    windows = (group_of(bdf) / "reserved_regions").read_text().splitlines()
    assert any(line.startswith(MSI_WINDOW[:37]) and "msi" in line for line in windows), windows


def test_drives_and_edu_stand_at_their_addresses() -> None:
    def identity(bdf: str) -> tuple[str, str]:
        return (PCI / bdf / "vendor").read_text().strip(), (PCI / bdf / "class").read_text().strip()

    assert [identity(bdf)[1] for bdf in NVME] == ["0x010802", "0x010802"]
    assert identity(EDU)[0] == "0x1234"
    assert [driver_of(bdf) for bdf in (*NVME, EDU)] == [None, None, None]


@pytest.mark.parametrize("size", [512, 4096, 131072, 1 << 20])
def test_the_kernels_driver_moves_bytes_through_the_iommu(size: int) -> None:
    data = random.Random(size).randbytes(size)
    with kernel_nvme() as blocks:
        for bdf, node in blocks.items():
            with traced("iommu/map") as lines:
                write_direct(node, 1 << 20, data)
                assert read_direct(node, 1 << 20, size) == data, bdf
                maps = len(lines())
            assert maps >= 2, f"{bdf}: {maps} mappings for one write and one read: the IOMMU does not translate"


def test_the_second_drive_offers_its_controller_memory_buffer() -> None:
    with kernel_nvme():
        assert not (PCI / NVME[0] / "p2pmem").exists()
        assert (PCI / NVME[1] / "p2pmem" / "size").read_text() == "67108864\n"


def test_a_device_goes_to_vfio_and_back() -> None:
    modprobe("vfio-pci")
    if IOMMU == "virtio" and KERNEL == "debian":
        assert Path("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts").read_text() == "Y\n"
    bind(EDU, "vfio-pci")
    try:
        assert driver_of(EDU) == "vfio-pci"
        group = Path("/dev/vfio", group_of(EDU).name)
        until(group.exists, f"{group} is there")
        os.close(os.open(group, os.O_RDWR))
        device = list((PCI / EDU / "vfio-dev").glob("vfio*")) if KERNEL == "iommufd" else []
        assert [Path("/dev/vfio/devices", path.name).exists() for path in device] == [True] * (KERNEL == "iommufd")
    finally:
        unbind(EDU)
    assert driver_of(EDU) is None
    assert not group.exists()
