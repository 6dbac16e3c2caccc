"""Machines on a fake host, for the tests of platform/linux."""

from __future__ import annotations

from typing import Any

from dmakit.dma.direction import Direction
from dmakit.platform.linux.device import Device
from dmakit.platform.linux.machine import Machine
from tests.support.vfio.devices import FakeEdu, FakeNvme
from tests.support.vfio.host import FakeHost

PAGE = 4096
TO, FROM, BOTH = Direction.TO_DEVICE, Direction.FROM_DEVICE, Direction.BIDIRECTIONAL
EDU, NVME = "0000:00:05.0", "0000:00:04.0"
BACKENDS = ("type1", "iommufd", "unstaged")


def host(**options: Any) -> FakeHost:
    """A host with an edu device and an NVMe controller, both bound to vfio-pci."""
    return FakeHost([FakeEdu(EDU, 5), FakeNvme(NVME, 4)], **options)


def machine(backend: str = "iommufd", fake: FakeHost | None = None, **options: Any) -> Machine:
    """A small machine; ``unstaged`` is iommufd without the staging address space."""
    chosen = {"backend": backend} if backend != "unstaged" else {"backend": "iommufd", "staging": False}
    return Machine(**{"ram": "32M", "kernel": fake or host(), **chosen, **options})


def taken(backend: str = "iommufd", fake: FakeHost | None = None, **options: Any) -> tuple[FakeHost, Machine, Device]:
    """Host, machine and the edu device, opened."""
    chosen = fake or host()
    made = machine(backend, chosen, **options)
    return chosen, made, made.open(EDU, mask=(1 << 28) - 1)
