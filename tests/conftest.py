"""The test run as a whole: the test VM's options and what it did not run (tests/vm/plugin.py)."""

from tests.vm.plugin import (  # noqa: F401  (hooks, found here by pytest)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_ignore_collect,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)
