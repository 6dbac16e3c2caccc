"""The guest: tests marked ``on(kernel=…, iommu=…, hotplug=…)`` run only where they apply, in sight of a reader."""

from __future__ import annotations

import pytest

from tests.vm.guest.support import HOTPLUG, IOMMU, KERNEL


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    elsewhere = [item for item in items if not all(map(applies, item.iter_markers("on")))]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if item not in elsewhere]


def applies(mark: pytest.Mark) -> bool:
    """Whether this boot is one that the marker names."""
    for name, here in (("kernel", KERNEL), ("iommu", IOMMU), ("hotplug", HOTPLUG)):
        named = mark.kwargs.get(name, here)
        if here not in ((named,) if isinstance(named, str) else named):
            return False
    return True
