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

from tests.vm.guest.support import FULL, IOMMU, KERNEL, LONG, NVME, TRACE, driver_of, until

REASON = "in the full matrix (--vm full)"
pytestmark = pytest.mark.skipif(not FULL and IOMMU != "vtd-lazy", reason=REASON)
NOT_ON_BOTH = pytest.mark.skipif(not FULL and KERNEL == "iommufd", reason=REASON)
FRESH = [word for drive in NVME for word in ("--fresh", drive)]  # the driver takes both drives
PHASES = {
    "a": "--rw=randread --bs=4k --iodepth=1 --number_ios=100",
    "b": "--rw=read --bs=128k --iodepth=8 --number_ios=60",
    "m": "--rw=randrw --bsrange=4k-256k --iodepth=16 --numjobs=2 --number_ios=100",
}
WAIT = "i=0; until [ -b /dev/nvme0n1 ] || [ $i -gt 100 ]; do sleep 0.1; i=$((i+1)); done; sleep 0.3"
SETTINGS = ("dynamic_events", "trace_clock", "tracing_on", "current_tracer")


def workload(phases: dict[str, str]) -> str:
    """A shell script: the driver, and a phase of fio each."""
    lines = ["set -e", "modprobe nvme", WAIT, f"mark=${{DMAKIT_TRACE_MARKER:-{TRACE}/trace_marker}}"]
    for name, options in phases.items():
        lines += [
            f'echo "PHASE {name}" > "$mark"',
            f"fio --name={name} --filename=/dev/nvme0n1 --direct=1 --ioengine=libaio --randseed=7 {options} >/dev/null",
            f'echo "PHASE {name}-end" > "$mark"',
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


def settings() -> dict[str, str]:
    """The top-level trace's."""
    return {name: (TRACE / name).read_text() for name in SETTINGS}


def buffer() -> int:
    """KiB of its buffer; until its first use it is "7 (expanded: 1408)"."""
    return int((TRACE / "buffer_size_kb").read_text().split()[-1].rstrip(")"))


def unload() -> None:
    """Unload the kernel's driver; for a moment it may still be looking for partitions."""
    until(lambda: subprocess.run(["modprobe", "-r", "nvme"], check=False).returncode == 0, "nvme is unloaded")


@pytest.fixture(autouse=True)
def drives_without_driver_and_tracefs_as_it_was() -> Iterator[None]:
    assert [driver_of(drive) for drive in NVME] == [None, None]
    before, size = settings(), buffer()
    yield
    unload()
    assert left_over() == []
    assert settings() == before
    assert size <= buffer() < size + 4  # the kernel rounds up to whole pages of events


def record(tmp_path: Path, *options: str, phases: dict[str, str] | None = None) -> tuple[Path, dict[str, Any]]:
    trace, told = tmp_path / "run.trace.txt.zst", tmp_path / "run.json"
    script = workload(PHASES if phases is None else phases)
    dmakit("record", "-o", str(trace), "--json", str(told), *FRESH, *options, "--", "sh", "-c", script)
    return trace, json.loads(told.read_text())


def replayed(trace: Path, *options: str) -> dict[str, Any]:
    """What ``dmakit replay`` says of it in JSON; nothing may differ from the kernel."""
    out = trace.parent / "replay.json"
    shown = dmakit("replay", *options, "--json", str(out), str(trace))
    (result,) = json.loads(out.read_text())
    assert result["malformed_lines"] == 0, shown
    return dict(result)


@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=LONG)])
def test_a_recorded_fio_run_replays_address_for_address(tmp_path: Path, stream: bool) -> None:
    trace, told = record(tmp_path, *["--stream"] * stream)
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
    trace, told = record(tmp_path, "--only", "calls", phases={name: PHASES[name] for name in "am"})
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
    trace, told = record(tmp_path, phases={"a": PHASES["a"]})
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
