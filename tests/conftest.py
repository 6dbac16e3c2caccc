"""The test run as a whole: the test VM's options and what it did not run, and what portable tests left out."""

import pytest

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


def pytest_configure(config: pytest.Config) -> None:
    """The VM's markers, and the list of gated tests."""
    plugin.pytest_configure(config)
    config.pluginmanager.register(gates, "gates")
