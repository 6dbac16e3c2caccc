"""``dmakit record`` around fio on the kernel's NVMe driver: complete, and replayed address for address.

The drives' domains are made anew inside the recording (``--fresh``), so that the trace holds the allocator's whole
life and nothing may be adopted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm.guest.support import FULL, NVME, TRACE, driver_of, modprobe

pytestmark = pytest.mark.on(kernel="debian", iommu="vtd-lazy")  # where it has been run so far
LONG = pytest.mark.skipif(not FULL, reason="in the full matrix (--vm full)")
FRESH = [word for drive in NVME for word in ("--fresh", drive)]  # the driver takes both drives
PHASES = {
    "a": "--rw=randread --bs=4k --iodepth=1 --number_ios=100",
    "b": "--rw=read --bs=128k --iodepth=8 --number_ios=60",
    "m": "--rw=randrw --bsrange=4k-256k --iodepth=16 --numjobs=2 --number_ios=100",
}
WAIT = "i=0; until [ -b /dev/nvme0n1 ] || [ $i -gt 100 ]; do sleep 0.1; i=$((i+1)); done; sleep 0.3"


def workload(phases: dict[str, str]) -> str:
    """A shell script: the driver, and a phase of fio each."""
    lines = ["set -e", "modprobe nvme", WAIT]
    for name, options in phases.items():
        lines += [
            f'echo "PHASE {name}" > "$DMAKIT_TRACE_MARKER"',
            f"fio --name={name} --filename=/dev/nvme0n1 --direct=1 --ioengine=libaio --randseed=7 {options} >/dev/null",
            f'echo "PHASE {name}-end" > "$DMAKIT_TRACE_MARKER"',
        ]
    return "\n".join(lines)


def dmakit(*words: str, status: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "dmakit", *words], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def left_over() -> list[str]:
    """What recordings leave in tracefs: nothing."""
    dynamic = (TRACE / "dynamic_events").read_text().splitlines()
    return [str(path) for path in (TRACE / "instances").iterdir()] + [line for line in dynamic if ":dmakit" in line]


@pytest.fixture(autouse=True)
def drives_without_driver() -> Iterator[None]:
    assert [driver_of(drive) for drive in NVME] == [None, None]
    yield
    modprobe("-r", "nvme")


def record(tmp_path: Path, *options: str, phases: dict[str, str] | None = None) -> tuple[Path, dict[str, Any]]:
    trace, told = tmp_path / "run.trace.txt.zst", tmp_path / "run.json"
    script = workload(PHASES if phases is None else phases)
    dmakit("record", "-o", str(trace), "--json", str(told), *FRESH, *options, "--", "sh", "-c", script)
    return trace, json.loads(told.read_text())


@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=LONG)])
def test_a_recorded_fio_run_replays_address_for_address(tmp_path: Path, stream: bool) -> None:
    trace, told = record(tmp_path, *["--stream"] * stream)
    assert (told["complete"], told["lost"], told["refused"], told["left"]) == (True, 0, {}, None)
    assert left_over() == []
    out = tmp_path / "replay.json"
    shown = dmakit("replay", "--json", str(out), str(trace))
    result = json.loads(out.read_text())[0]
    assert result["allocations"] > 200, shown
    assert (result["matched"], result["adopted"], result["diverged"]) == (result["allocations"], 0, 0), shown
    assert result["malformed_lines"] == 0
    if stream:
        return
    explained = dmakit("explain", str(trace))
    compared = dmakit("compare", str(trace))
    for phase in PHASES:
        assert f"{phase} " in explained, explained
    kernels = f"IOVAs equal to the kernel's: {result['allocations']} of {result['allocations']}"
    assert kernels in compared and "bytes wrong: 0 of " in compared, compared


@LONG
def test_events_that_do_not_fit_are_counted_and_the_rest_is_exact(tmp_path: Path) -> None:
    trace, told = tmp_path / "small.trace.txt", tmp_path / "small.json"
    script = workload({"b": PHASES["b"]})
    options = (*FRESH, "--buffer", "64k")
    words = ("record", "-o", str(trace), "--json", str(told), *options, "--", "sh", "-c", script)
    assert "INCOMPLETE" in dmakit(*words, status=1)
    account = json.loads(told.read_text())
    assert not account["complete"] and account["lost"] > 0
    assert left_over() == []
    result = json.loads(dmakit("replay", "--json", "-", str(trace)))[0]
    assert result["diverged"] == 0 and result["matched"] > 0
    assert any("INCOMPLETE" in note for note in result["notes"])
