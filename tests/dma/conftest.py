"""A portable test of dma/ runs on every platform: ``world`` makes its machine there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dma import world
from tests.support.gates import ROWS
from tests.support.platforms import PLATFORMS, platform


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("portable"):
        metafunc.parametrize("platform_of_the_test", PLATFORMS, indirect=True)


@pytest.fixture(autouse=True)
def platform_of_the_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """``world.here`` is the platform; its last world is closed at the end of the test."""
    world.here = platform(getattr(request, "param", "soft"))
    world.unobserved.clear()
    yield
    if world.unobserved:
        request.node.user_properties.append((ROWS, " ".join(world.unobserved)))
    world.here.close()
