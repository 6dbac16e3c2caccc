"""``dmakit record`` on a kernel that was booted with the line of ``dmakit record --boot-line``.

The probes on the command line saw every domain being made, so the drives' domains need not be fresh: the boot part says
how they began, and nothing may be adopted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.guest.record_support import (
    PHASES,
    dmakit,
    drives_without_driver_and_tracefs_as_it_was,
    record,
    replayed,
)

pytestmark = pytest.mark.on(traced="yes")


@pytest.fixture(autouse=True)
def everything_is_as_it_was() -> Iterator[None]:
    with drives_without_driver_and_tracefs_as_it_was():
        yield


def test_the_line_is_the_one_that_dmakit_prints() -> None:
    assert dmakit("record", "--boot-line").strip() in Path("/proc/cmdline").read_text()


def test_a_recording_after_boot_replays_address_for_address(tmp_path: Path) -> None:
    trace, told = record(tmp_path)
    boot = trace.with_name("run.boot.txt")
    assert (told["complete"], told["lost"], told["boot"]) == (True, 0, str(boot)), told
    assert "init: (init_iova_domain" in boot.read_text()
    result = replayed(trace)
    assert result["allocations"] > 200
    assert (result["matched"], result["adopted"], result["diverged"]) == (result["allocations"], 0, 0), result
    assert f"of {result['allocations']}" in dmakit("compare", str(trace))
    for phase in PHASES:
        assert f"{phase} " in dmakit("explain", str(trace))


def test_a_second_recording_of_the_same_boot_replays_too(tmp_path: Path) -> None:
    """What the first one's driver did to the allocators lies between the boot part and this recording."""
    trace, told = record(tmp_path, phases={"a": PHASES["a"]})
    result = replayed(trace)
    assert told["boot"] and result["matched"] == result["allocations"] > 50, result
