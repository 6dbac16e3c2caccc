"""The guest: tests marked ``on(kernel=…, iommu=…, hotplug=…, traced=…)`` run only where they apply, and visibly so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.sweep import descriptors
from tests.vm.guest.support import HOTPLUG, IOMMU, KERNEL, NVME, TRACED, bind, driver_of, modprobe, unbind, until
from tests.vm.guest.vfio_support import pinned


@pytest.fixture
def drive_on_vfio() -> Iterator[None]:
    """The first drive is vfio-pci's; the test leaves no descriptor open and no memory pinned."""
    modprobe("vfio-pci")
    if IOMMU == "virtio":
        modprobe("vfio_iommu_type1", "allow_unsafe_interrupts=1")
    bind(NVME[0], "vfio-pci")
    until(lambda: driver_of(NVME[0]) == "vfio-pci", "vfio-pci has the drive")
    before = descriptors(), pinned()
    yield
    assert (descriptors(), pinned()) == before
    unbind(NVME[0])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    elsewhere = [item for item in items if not all(map(applies, item.iter_markers("on")))]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if item not in elsewhere]


def applies(mark: pytest.Mark) -> bool:
    """Whether this boot is one that the marker names."""
    for name, here in (("kernel", KERNEL), ("iommu", IOMMU), ("hotplug", HOTPLUG), ("traced", TRACED)):
        named = mark.kwargs.get(name, here)
        if here not in ((named,) if isinstance(named, str) else named):
            return False
    return True
