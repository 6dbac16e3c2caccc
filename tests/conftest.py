"""The test run as a whole: the test VM's options and what it did not run, and what portable tests left out."""

import os
import random

import pytest
from hypothesis import HealthCheck, settings

from tests.support import gates
from tests.vm import plugin
from tests.vm.plugin import (  # noqa: F401  (hooks, found here by pytest)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_ignore_collect,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

settings.register_profile("dmakit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dmakit")  # timings live in the bench: an example may wait for its turn on a busy machine


def pytest_configure(config: pytest.Config) -> None:
    """The VM's markers, and the list of gated tests."""
    plugin.pytest_configure(config)
    config.pluginmanager.register(gates, "gates")


@pytest.fixture
def any_seed() -> int:
    """A random seed, or that of ``DMAKIT_SEED``; pytest prints it beside a failure."""
    seed = int(os.environ.get("DMAKIT_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"DMAKIT_SEED={seed}")
    return seed
