"""The platforms of the portable tests of PCI functions, and a function on each.

``soft``: a model on the software machine. ``type1`` and ``iommufd``: in the test VM QEMU's devices behind a real
kernel, elsewhere the same models behind the fake host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from dmakit import soft, vfio
from dmakit.nvme.function import NvmeFunction
from dmakit.platform.function import PciFunction
from tests.support.edu import EDU_MASK, Edu, EduPort
from tests.support.platforms import IN_GUEST, PLATFORMS
from tests.support.sweep import descriptors
from tests.support.vfio.devices import FakeDevice, FakeEdu, FakeNvme
from tests.support.vfio.host import FakeHost

__all__ = ["EDU", "NVME", "PAGE", "PLATFORMS", "bring_up", "is_real", "taken"]
EDU, NVME = "0000:00:10.0", "0000:00:04.0"
PAGE = 4096


def is_real(platform: str) -> bool:
    """Whether a real kernel and QEMU's devices answer."""
    return IN_GUEST and platform != "soft"


def _soft(bdf: str) -> tuple[Any, Any]:
    machine = soft.Machine(ram="64M", swiotlb="1M", mode="strict")
    machine.plug(soft.Edu() if bdf == EDU else NvmeFunction(), bdf)

    def check() -> None:
        live = machine.live()
        assert live["iova_ranges"] == live["bounce_slots"] == live["queued"] == live["table_pages"] == 0
        assert not machine.devices and not machine.opened

    return machine, check


def _fake(platform: str, bdf: str) -> tuple[Any, Any]:
    device: FakeDevice = FakeEdu(EDU, 5) if bdf == EDU else FakeNvme(NVME, 4)
    host = FakeHost([device])

    def check() -> None:
        assert host.left() == {"files": 0, "pinned": 0}

    return vfio.Machine(ram="16M", kernel=host, backend=platform), check


def _real(platform: str, bdf: str, undo: ExitStack) -> tuple[Any, Any]:
    from tests.vm.guest import vfio_support as guest

    if platform not in guest.BACKENDS:
        pytest.skip(f"needs {platform}")
    undo.enter_context(guest.bound(bdf))
    before = descriptors(), guest.pinned()

    def check() -> None:
        assert (descriptors(), guest.pinned()) == before

    return vfio.Machine(ram="16M", backend=platform), check


@contextmanager
def taken(platform: str, bdf: str = EDU, **options: Any) -> Iterator[tuple[Any, PciFunction]]:
    """A machine and the function at ``bdf`` of it, opened; afterwards nothing may be left."""
    with ExitStack() as undo:
        if is_real(platform):
            machine, check = _real(platform, bdf, undo)
        else:
            machine, check = _soft(bdf) if platform == "soft" else _fake(platform, bdf)
        masked = {"mask": EDU_MASK, **options} if bdf == EDU else options
        with machine:
            with machine.open(bdf, **masked) as device:
                yield machine, device
            assert machine.live()["iova_ranges"] == 0
        check()


@contextmanager
def bring_up(platform: str) -> Iterator[tuple[Any, PciFunction, EduPort]]:
    """The same with edu's own accesses."""
    with taken(platform) as (machine, device):
        port = EduPort(Edu(device), machine)
        yield machine, device, port
        port.close()
