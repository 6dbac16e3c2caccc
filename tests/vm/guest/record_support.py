"""What the guest tests of ``dmakit record`` share: a fio workload, the recording, its replay, what may not be left."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.vm.guest.support import NVME, TRACE, driver_of, until

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
    """What a command that ends with ``status`` says."""
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


@contextmanager
def drives_without_driver_and_tracefs_as_it_was() -> Iterator[None]:
    """Before and after a test that records."""
    assert [driver_of(drive) for drive in NVME] == [None, None]
    before, size = settings(), buffer()
    yield
    unload()
    assert left_over() == []
    assert settings() == before
    assert size <= buffer() < size + 4  # the kernel rounds up to whole pages of events


def record(tmp_path: Path, *options: str, phases: dict[str, str] = PHASES) -> tuple[Path, dict[str, Any]]:
    """The trace of these phases, and what ``dmakit record`` told of it."""
    trace, told = tmp_path / "run.trace.txt.zst", tmp_path / "run.json"
    dmakit("record", "-o", str(trace), "--json", str(told), *options, "--", "sh", "-c", workload(phases))
    return trace, json.loads(told.read_text())


def replayed(trace: Path, *options: str) -> dict[str, Any]:
    """What ``dmakit replay`` says of it in JSON; nothing may differ from the kernel."""
    out = trace.parent / "replay.json"
    shown = dmakit("replay", *options, "--json", str(out), str(trace))
    (result,) = json.loads(out.read_text())
    assert result["malformed_lines"] == 0, shown
    return dict(result)
