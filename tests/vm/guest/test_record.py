"""``dmakit record`` around fio on the kernel's NVMe driver, and what the other verbs make of it.

The drives' domains are made anew inside the recording (``--fresh``), so that the trace holds the allocator's whole
life and nothing may be adopted. One IOMMU for each kernel in the short set, all of them in the full matrix.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm.guest.record_support import (
    FRESH,
    PHASES,
    dmakit,
    drives_without_driver_and_tracefs_as_it_was,
    left_over,
    record,
    replayed,
    unload,
    workload,
)
from tests.vm.guest.support import FULL, IOMMU, KERNEL, LONG, NVME, TRACE, driver_of, until

REASON = "in the full matrix (--vm full)"
pytestmark = pytest.mark.skipif(not FULL and IOMMU != "vtd-lazy", reason=REASON)
NOT_ON_BOTH = pytest.mark.skipif(not FULL and KERNEL == "iommufd", reason=REASON)


@pytest.fixture(autouse=True)
def everything_is_as_it_was() -> Iterator[None]:
    with drives_without_driver_and_tracefs_as_it_was():
        yield


def record_fresh(tmp_path: Path, *options: str, phases: dict[str, str] = PHASES) -> tuple[Path, dict[str, Any]]:
    return record(tmp_path, *FRESH, *options, phases=phases)


@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=LONG)])
def test_a_recorded_fio_run_replays_address_for_address(tmp_path: Path, stream: bool) -> None:
    trace, told = record_fresh(tmp_path, *["--stream"] * stream)
    assert (told["complete"], told["lost"], told["refused"], told["left"]) == (True, 0, {}, None)
    result = replayed(trace)
    assert result["allocations"] > 200
    assert (result["matched"], result["adopted"], result["diverged"]) == (result["allocations"], 0, 0)
    if stream:
        return
    explained = dmakit("explain", str(trace))
    compared = dmakit("compare", str(trace))
    for phase in PHASES:
        assert f"{phase} " in explained, explained
    kernels = f"IOVAs equal to the kernel's: {result['allocations']} of {result['allocations']}"
    assert kernels in compared and "bytes wrong: 0 of " in compared, compared


@pytest.mark.on(iommu=("vtd-strict", "amd"))
def test_a_recording_for_calls_replays_call_by_call(tmp_path: Path) -> None:
    """Not with flush queues on two CPUs: which order the calls then had, only the allocator's replay searches."""
    trace, told = record_fresh(tmp_path, "--only", "calls", phases={name: PHASES[name] for name in "am"})
    assert told["complete"] and told["left"] is None
    result = replayed(trace, "--calls")
    assert result["equal"], result
    assert result["answers_equal"] == result["calls"] > 500
    assert result["unknown_mappings"] == 0 and result["iovas_adopted"] <= 5  # an interrupt fell into an allocation
    invalidations = result["invalidations"]
    assert invalidations["explained"] == invalidations["descriptors"]
    if IOMMU == "vtd-strict":
        assert invalidations["descriptors"] > 0 and set(invalidations["causes"]) <= {"unmap", "destroy"}
    for name, stream in result["streams"].items():
        assert (stream["equal"], stream["ours"]) == (stream["kernel"], stream["kernel"]), name


@NOT_ON_BOTH
def test_the_script_records_what_dmakit_reads(tmp_path: Path) -> None:
    """Its domains are not fresh: answers may be adopted, none may differ."""
    (tmp_path / "record.sh").write_text(dmakit("record", "--script"))
    command = ["sh", "record.sh", "host", "--", "sh", "-c", workload({"b": PHASES["b"]})]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "refused" not in done.stderr and "lost" not in done.stderr, done.stderr
    trace = tmp_path / done.stdout.split()[-1]
    assert trace.name == "host.trace.txt.xz"
    result = replayed(trace)
    assert result["diverged"] == 0 and result["matched"] > 0, result
    assert result["matched"] + result["adopted"] == result["allocations"]
    assert "b " in dmakit("explain", str(trace))
    assert "bytes wrong: 0 of " in dmakit("compare", str(trace))


@NOT_ON_BOTH
def test_after_kill_9_the_next_recording_starts_and_removes_what_is_left(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "dmakit", "record", "-o", str(tmp_path / "killed.trace.txt"), *FRESH]
    with subprocess.Popen([*words, "--", "sh", "-c", f"{workload({})}; sleep 1000"], start_new_session=True) as victim:
        until(lambda: driver_of(NVME[0]) == "nvme", "the recorded command has loaded the driver", 90)
        assert list((TRACE / "instances").iterdir())
        os.kill(victim.pid, signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
        os.killpg(victim.pid, signal.SIGKILL)  # its command
    unload()
    assert left_over() and not (tmp_path / "killed.trace.txt").exists()
    trace, told = record_fresh(tmp_path, phases={"a": PHASES["a"]})
    assert any("removed what an earlier recording left" in note for note in told["notes"]), told
    assert told["complete"] and told["left"] is None
    result = replayed(trace)
    assert result["matched"] == result["allocations"] > 50


@LONG
def test_events_that_do_not_fit_are_counted_and_the_rest_is_exact(tmp_path: Path) -> None:
    trace, told = tmp_path / "small.trace.txt", tmp_path / "small.json"
    script = workload({"b": PHASES["b"]})
    options = (*FRESH, "--buffer", "64k")
    words = ("record", "-o", str(trace), "--json", str(told), *options, "--", "sh", "-c", script)
    assert "INCOMPLETE" in dmakit(*words, status=1)
    account = json.loads(told.read_text())
    assert not account["complete"] and account["lost"] > 0
    result = replayed(trace)
    assert result["diverged"] == 0 and result["matched"] > 0
    assert any("INCOMPLETE" in note for note in result["notes"])


@LONG
def test_a_mark_into_a_full_buffer_is_refused(tmp_path: Path) -> None:
    """What docs/record.md says of phases: a mark that does not fit is an error for the one who writes it."""
    mark = (
        "import os\n"
        "fd = os.open(os.environ['DMAKIT_TRACE_MARKER'], os.O_WRONLY)\n"
        "found = set()\n"
        "for _ in range(5000):\n"
        "    try:\n"
        "        os.write(fd, b'PHASE ' + b'x' * 60)\n"
        "    except OSError as error:\n"
        "        found.add(error.errno)\n"
        "print('errors', found)\n"
    )
    trace = tmp_path / "full.trace.txt"
    said = dmakit("record", "-o", str(trace), "--buffer", "16k", "--", sys.executable, "-c", mark, status=1)
    assert "INCOMPLETE" in said and f"errors {{{errno.EBADF}}}" in said, said
