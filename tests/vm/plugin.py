"""pytest and the test VM: options, what is left out where no VM is built, and the line that says so.

A test that boots carries the marker ``vm``. Plain pytest runs one boot, ``--vm ci`` those of continuous integration and
``--vm full`` all of them with the long data runs. Without a built VM these tests are deselected and counted at the end;
with ``--require-vm`` they fail instead.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

GUEST = Path(__file__).resolve().parent / "guest"
IN_GUEST = "DMAKIT_VM_KERNEL" in os.environ
BUILD = "./dmakit vm build"
NOT_RUN = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("test VM")
    group.addoption("--require-vm", action="store_true", help="fail where the test VM is not built")
    group.addoption("--vm", choices=("quick", "ci", "full"), default="quick", help="how many boots (default: one)")
    group.addoption("--guest", default="", metavar="ARGS", help="more arguments for pytest in the guest")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vm: boots the test VM")
    config.addinivalue_line("markers", "on(kernel=…, iommu=…): a guest test for these kernels and variants only")
    config.stash[NOT_RUN] = 0


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The guest's tests are for the guest."""
    return True if not IN_GUEST and GUEST in (collection_path, *collection_path.parents) else None


def missing() -> list[str]:
    """Names of the parts that a boot lacks; the core counts only where it could not be made on the way."""
    from tools.vm import kernels, parts
    from tools.vm.store import VmError

    try:
        every = [parts.qemu(), parts.image(), *map(kernels.kernel, ("iommufd", "debian"))]
        every += [parts.toolchain()] if os.geteuid() == 0 else [parts.core()]
    except VmError as error:
        return [str(error)]
    return [part.name for part in every if not part.built]


def require_built() -> None:
    """Fail the test that calls this when a boot lacks something."""
    if lacking := missing():
        pytest.fail(f"the VM is not built ({', '.join(lacking)}); build with: {BUILD}", pytrace=False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    booting = [item for item in items if item.get_closest_marker("vm")]
    if not booting or config.getoption("--require-vm") or not missing():
        return
    config.stash[NOT_RUN] = len(booting)
    config.hook.pytest_deselected(items=booting)
    items[:] = [item for item in items if item not in booting]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of xdist tells its controller, which collects nothing itself."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["vm_not_run"] = session.config.stash[NOT_RUN]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    output = getattr(node, "workeroutput", {})
    node.config.stash[NOT_RUN] = max(node.config.stash[NOT_RUN], output.get("vm_not_run", 0))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if count := config.stash[NOT_RUN]:
        terminalreporter.line(f"not run: {count} VM tests; build with: {BUILD}")
