"""The guest's tests on every kernel and every emulated IOMMU; a failure names the guest's test."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tools.vm import run
from tools.vm.machine import VARIANTS, Machine

from dmakit.trace.probes import BOOT_LINE
from tests.support.gates import GATE
from tests.vm.plugin import require_built
from tests.vm.reporter import REPORT

PYTEST = ["python3", "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.vm.reporter"]
EVERYTHING = Machine(nvme=2, nvme_mib=1280, cmb=True, edu=True)
IOMMUS = [name for name in VARIANTS if name != "none"]


@dataclass(frozen=True)
class Boot:
    """A machine, the tests it runs, and the smallest ``--vm`` set it belongs to."""

    machine: Machine
    paths: tuple[str, ...]
    level: str
    timeout: float = 900.0

    @property
    def name(self) -> str:
        """Kernel, variant and what runs."""
        what = {GUEST: "", HOTPLUG: "-hotplug", SOFTWARE: "-software"}.get(self.paths, "-portable")
        return f"{self.machine.kernel}-{self.machine.iommu}{what}"

    @property
    def portable(self) -> bool:
        """Whether it runs portable tests, which a declared capability may gate; nothing else may be gated."""
        return self.paths not in (GUEST, HOTPLUG, SOFTWARE)


GUEST = ("tests/vm/guest", "tests/pci/test_functions.py", "tests/pci/test_accesses.py")
# With a port to pull a drive out of, and probes from the start.
HOTPLUG = ("tests/vm/guest/test_unplug.py", "tests/vm/guest/test_boot_line.py")
# The contract of dma/ and of the driver: on the software machine, type1 and iommufd.
CONTRACT = ("tests/dma", "tests/nvme/test_controller.py", "-m", "portable")
ON_VFIO = (*CONTRACT, "-k", "type1 or iommufd")
# What must hold on the guest's Python and processor as well.
SOFTWARE = ("tests/memory", "tests/dma", "--ignore=tests/dma/test_twins.py", "tests/nvme/test_controller.py",
            "-m", "not portable and not long")  # fmt: skip
LEVELS = ("quick", "ci", "full")
LONGER = 6  # times that a boot of the full matrix may take
CI_ON_DEBIAN = ("vtd-lazy",)


def boots() -> list[Boot]:
    """All boots, the quick one first; longer ones before shorter ones, so that two at a time end together.

    A worker of pytest-xdist begins with two neighbours of the list and holds one more in reserve ever after.
    """
    levels = {"vtd-lazy": "quick", "vtd-strict": "full"}  # to VFIO, which flushes by itself, strict is lazy
    iommufd = [Boot(replace(EVERYTHING, iommu=name), GUEST, levels.get(name, "ci")) for name in IOMMUS]
    debian = [
        Boot(replace(EVERYTHING, kernel="debian", iommu=name), GUEST, "ci" if name in CI_ON_DEBIAN else "full")
        for name in IOMMUS
    ]
    portable = [Boot(replace(EVERYTHING, iommu=name), ON_VFIO, "full") for name in IOMMUS[1:]]
    portable += [Boot(replace(EVERYTHING, kernel="debian", iommu=name), ON_VFIO, "full") for name in IOMMUS]
    portable += [Boot(EVERYTHING, SOFTWARE, "full")]
    plugged = replace(EVERYTHING, hotplug=True, append=BOOT_LINE)
    hotplug = [Boot(plugged, HOTPLUG, "ci"), Boot(replace(plugged, kernel="debian"), HOTPLUG, "full")]
    return [iommufd[0], debian[0], Boot(EVERYTHING, CONTRACT, "ci"), *iommufd[1:], *debian[1:], *hotplug, *portable]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "boot" not in metafunc.fixturenames:
        return
    chosen = LEVELS.index(metafunc.config.getoption("--vm"))
    wanted = [boot for boot in boots() if LEVELS.index(boot.level) <= chosen]
    metafunc.parametrize("boot", wanted, ids=lambda boot: boot.name)


@pytest.mark.vm
def test_guest(boot: Boot, subtests: pytest.Subtests, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    require_built()
    command = [*PYTEST, *boot.paths, *shlex.split(pytestconfig.getoption("--guest"))]
    full = pytestconfig.getoption("--vm") == "full"
    told = {"DMAKIT_VM_REPORT": "/mnt/out", "DMAKIT_VM_FULL": str(int(full))}
    limit = boot.timeout * (LONGER if full else 1)
    result = run.boot(boot.machine, command, out=tmp_path, environment=told, timeout=limit)
    states = outcomes(tmp_path / REPORT)
    for name, (outcome, text) in states.items():
        with subtests.test(msg=f"{boot.name}: {name}"):
            reason = text.removeprefix("Skipped: ")
            if outcome == "skipped" and may_be_skipped(reason, boot, full=full):
                pytest.skip(reason)
            assert outcome == "passed", f"{outcome}\n{text}"
    tail = "\n".join([*result.output.splitlines()[-30:], *result.console.splitlines()[-30:]])
    assert not result.verdict(), f"{result.verdict()}\n{tail}"
    assert result.status == 0, f"pytest ended with {result.status} in the guest\n{tail}"
    assert any(outcome == "passed" for outcome, _ in states.values()), f"no test ran in the guest\n{tail}"


def may_be_skipped(reason: str, boot: Boot, *, full: bool) -> bool:
    """Whether a guest test may be left out of this boot for that reason; any other skip is a failure."""
    if reason.startswith(GATE):
        return boot.portable
    if reason in ("needs iommufd", "needs IOMMUFD_TEST"):
        return boot.machine.kernel == "debian"
    return reason == "in the full matrix (--vm full)" and not full


def test_a_guest_test_is_left_out_only_where_its_reason_holds() -> None:
    by_name = {boot.name: boot for boot in boots()}

    def where(reason: str, *, full: bool) -> set[str]:
        return {name for name, boot in by_name.items() if may_be_skipped(reason, boot, full=full)}

    portable = {name for name in by_name if name.endswith("-portable")}
    debian = {name for name in by_name if name.startswith("debian-")}
    assert portable and debian and portable | debian < set(by_name)
    for full in (False, True):
        assert where("gated: unmap_unit='map'", full=full) == portable
        assert where("needs iommufd", full=full) == where("needs IOMMUFD_TEST", full=full) == debian
        assert where("", full=full) == where("could not import 'numpy'", full=full) == set()
    assert where("in the full matrix (--vm full)", full=False) == set(by_name)
    assert where("in the full matrix (--vm full)", full=True) == set()


def outcomes(report: Path) -> dict[str, tuple[str, str]]:
    """The last word on each test; ``started`` means that the guest died in it."""
    last: dict[str, tuple[str, str]] = {}
    for line in report.read_text().splitlines() if report.exists() else []:
        entry = json.loads(line)
        if last.get(entry["id"], ("",))[0] != "failed":  # a failed test whose teardown passes has failed
            last[entry["id"]] = (entry["outcome"], entry["text"])
    return last
