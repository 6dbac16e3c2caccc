"""``dmakit record`` as a user types it: exit status, sentences, and the real tracefs of this host where it has one."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dmakit.cli import record
from dmakit.cli.main import run
from dmakit.errors import HostError
from dmakit.trace.columns import load
from dmakit.trace.facts import bounce_pool, lazy, machine_facts
from dmakit.trace.loss import Account, CpuStats
from dmakit.trace.recorder import Outcome
from dmakit.trace.session import Refusal
from dmakit.trace.tracefs import MountedTracefs, find_tracefs

PLACE = Path("/sys/kernel/tracing")


def host_reason() -> str:
    """Why the real tracefs of this host cannot be used here; empty when it can."""
    try:
        find_tracefs()
    except Exception as error:
        return str(error)
    return ""


@pytest.fixture
def turn() -> Iterator[None]:
    """One test-suite at a time: a machine has one tracefs."""
    with (Path(tempfile.gettempdir()) / "dmakit-tracefs-tests.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def real(test: Any) -> Any:
    """A test on this host's own tracefs."""
    skip = pytest.mark.skipif(bool(host_reason()), reason=f"no tracefs to record with: {host_reason()}")
    return skip(pytest.mark.usefixtures("turn")(test))


def test_without_tracefs_there_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "x.txt")
    assert run(["record", "-o", out, "--tracefs", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"dmakit: {tmp_path}: no tracefs is mounted there: mount -t tracefs tracefs /sys/kernel/tracing\n"
    )


def test_without_rights_there_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "instances").mkdir()
    (tmp_path / "tracing_on").touch()
    (tmp_path / "tracing_on").chmod(0o444)
    tmp_path.chmod(0o755)
    script = (
        "import os, sys\nfrom dmakit.trace.tracefs import find_tracefs\nos.access = lambda path, mode: False\n"
        f"try: find_tracefs({str(tmp_path)!r})\nexcept Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"HostError {tmp_path}: recording needs root (the owner of tracefs): run it with sudo\n"


def test_the_mounted_tracefs_neither_truncates_nor_waits(tmp_path: Path) -> None:
    fs = MountedTracefs(tmp_path)
    (tmp_path / "dynamic_events").write_text("p:mine/probe x\n")
    fs.write("dynamic_events", "-:")
    assert fs.read("dynamic_events") == "-:mine/probe x\n", "a write must not remove what others defined"
    fs.make("instances")
    fs.make("instances/b")
    fs.make("instances/a")
    assert fs.names("instances") == ["a", "b"] and fs.exists("instances/a") and not fs.exists("instances/c")
    held = fs.lock("instances/a", wait=False)
    assert held is not None and fs.lock("instances/a", wait=False) is None
    held.release()
    again = fs.lock("instances/a", wait=True)
    assert again is not None
    again.release()
    fs.remove("instances/a")
    os.mkfifo(tmp_path / "trace_pipe")
    pipe = fs.pipe("trace_pipe")
    writer = os.open(tmp_path / "trace_pipe", os.O_WRONLY)
    assert pipe.read(100) == b"", "an empty buffer is no wait"
    os.write(writer, b"line\n")
    assert pipe.read(100) == b"line\n"
    os.close(writer)
    pipe.close()
    pipe.close()


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 0),
        ({"status": 3}, 3),
        ({"signal": signal.SIGINT}, 0),
        ({"signal": signal.SIGTERM}, 143),
        ({"signal": signal.SIGTERM, "status": 9}, 143),
        ({"left": "something"}, 1),
        ({"account": Account({0: CpuStats(dropped=1)})}, 1),
        ({"account": Account({0: CpuStats(overrun=1)}), "status": 4}, 4),
        ({"account": Account(switched_off=True)}, 1),
    ],
)
def test_the_exit_status(change: dict[str, object], status: int) -> None:
    options: dict[str, object] = {
        "output": Path("x"), "boot": None, "account": Account(), "seconds": 1.0, "status": 0, "signal": 0
    }  # fmt: skip
    assert record._status(Outcome(**(options | change))) == status  # type: ignore[arg-type]


def test_the_report_names_what_was_refused_and_lost(capsys: pytest.CaptureFixture[str]) -> None:
    account = Account({0: CpuStats(dropped=7, read=5), 1: CpuStats()}, written=5)
    outcome = Outcome(Path("x.txt"), None, account, 1.25, 0, 0, size=99, left="left over")
    outcome.refused = [Refusal("af_in", "alloc_iova_fast", "no"), Refusal("af_out", "alloc_iova_fast", "no")]
    outcome.lost_verbs = ["replay: everything"]
    record._report(outcome, "all")
    assert capsys.readouterr().err.splitlines() == [
        "dmakit: 5 events in 1.2 s on 2 CPUs: x.txt (99 bytes)",
        "dmakit: neither boot-time probes (dmakit record --boot-line) nor a --fresh domain: "
        "replay adopts what was allocated before",
        "dmakit: not recorded: alloc_iova_fast: no",
        "dmakit: without them, replay: everything",
        "dmakit: INCOMPLETE: 7 events lost (CPU 0: 7 dropped)",
        "dmakit: record again with a larger --buffer, with --stream, or with less: --device, --only, a shorter run",
        "dmakit: left over",
    ]


def test_facts_of_a_machine(tmp_path: Path) -> None:
    group = tmp_path / "sys/kernel/iommu_groups/10"
    (group / "devices/0000:00:04.0").mkdir(parents=True)
    (tmp_path / "sys/kernel/iommu_groups/9/devices").mkdir(parents=True)
    (group / "type").write_text("DMA-FQ\n")
    (group / "reserved_regions").write_text("0x00000000fee00000 0x00000000feefffff msi\n")
    (tmp_path / "sys/class/iommu/dmar0/intel-iommu").mkdir(parents=True)
    (tmp_path / "sys/class/iommu/dmar0/intel-iommu/cap").write_text("80d2008c222f0606\n")
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/osrelease").write_text("7.2.12\n")
    (tmp_path / "proc/cmdline").write_text("root=/dev/vda password=x intel_iommu=on iommu.strict=1\n")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kmsg").write_text(
        "6,1,1,-;Kernel command line: password=x intel_iommu=on\n"
        "6,2,1,-;software IO TLB: mapped [mem 0x000000007bfdd000-0x000000007ffdd000] (64MB)\n6,3,1,-;usb 1-1: x\n"
    )
    (tmp_path / "sys/block/nvme0n1/queue").mkdir(parents=True)
    (tmp_path / "sys/block/nvme0n1/queue/max_sectors_kb").write_text("128\n")
    (tmp_path / "sys/block/loop0/queue").mkdir(parents=True)
    facts = machine_facts(tmp_path)
    assert facts["kernel"] == "7.2.12"
    assert facts["parameters"] == ["intel_iommu=on", "iommu.strict=1"]
    assert facts["groups"] == [
        {"id": 9, "type": "", "devices": [], "reserved": []},
        {"id": 10, "type": "DMA-FQ", "devices": ["0000:00:04.0"], "reserved": [[0xFEE00000, 0xFEEFFFFF, "msi"]]},
    ]
    assert facts["iommus"] == [{"name": "dmar0", "cap": "80d2008c222f0606"}]
    assert facts["queues"] == {"nvme0n1": {"max_sectors_kb": "128"}}
    assert facts["log"] == ["software IO TLB: mapped [mem 0x000000007bfdd000-0x000000007ffdd000] (64MB)"]
    assert bounce_pool(facts) == (0x7BFDD000, 64 << 20)
    assert [lazy(facts, name) for name in ("0000:00:04.0", "other")] == [True, None]
    empty = machine_facts(tmp_path / "nothing")
    assert (empty["groups"], empty["log"], bounce_pool(empty)) == ([], [], None)
    json.dumps(facts)


# This host's kernel -------------------------------------------------------------------------------------------------


def markers(count: int) -> list[str]:
    text = f'i=0; while [ $i -lt {count} ]; do i=$((i+1)); echo "PHASE $i" > "$DMAKIT_TRACE_MARKER"; done'
    return ["sh", "-c", f"({text}) 2>/dev/null; exit 5"]


def left_over() -> list[str]:
    dynamic = (PLACE / "dynamic_events").read_text() if (PLACE / "dynamic_events").exists() else ""
    return [path.name for path in (PLACE / "instances").glob("dmakit*")] + [
        line for line in dynamic.splitlines() if ":dmakit" in line
    ]


@real
@pytest.mark.parametrize("stream", (False, True))
def test_a_recording_on_this_kernel_accounts_for_every_event(tmp_path: Path, stream: bool) -> None:
    out = tmp_path / "host.trace.txt.zst"
    options = ["--json", str(tmp_path / "r.json"), "-o", str(out)] + ["--stream"] * stream
    assert run(["record", *options, "--", *markers(2000)]) == 5
    told = json.loads((tmp_path / "r.json").read_text())
    assert told["complete"] and told["lost"] == 0 and told["events"] >= 2000
    trace = load(out)
    words = [trace.word(int(word)) for word in trace.table("mark")["text"].tolist()]
    assert [word for word in words if word.startswith("PHASE")] == [f"PHASE {n}" for n in range(1, 2001)]
    assert trace.whole and left_over() == []


@real
def test_a_buffer_that_is_too_small_on_this_kernel_is_never_called_complete(tmp_path: Path) -> None:
    out = tmp_path / "host.trace.txt"
    assert (
        run(["record", "--buffer", "16k", "--json", str(tmp_path / "r.json"), "-o", str(out), "--", *markers(3000)])
        == 5
    )
    told = json.loads((tmp_path / "r.json").read_text())
    assert not told["complete"] and told["events"] + told["lost"] >= 3000
    trace = load(out)
    words = [trace.word(int(word)) for word in trace.table("mark")["text"].tolist()]
    numbers = [int(word.split()[1]) for word in words if word.startswith("PHASE")]
    first = min(trace.lost.seq.tolist())
    before = [n for n, seq in zip(numbers, trace.table("mark").seq.tolist(), strict=False) if seq < first]
    assert before == list(range(1, len(before) + 1)) and not trace.whole
    assert left_over() == []


@real
def test_kill_on_this_kernel_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dmakit", "record", "--duration", "60"]
    killed = subprocess.Popen([*command, "-o", str(tmp_path / "a.txt")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob(".a.txt.*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert left_over() != []
    done = subprocess.run(
        [*command[:-1], "0.1", "-o", str(tmp_path / "b.txt")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "removed what an earlier recording left: instances/dmakit" in done.stderr
    assert left_over() == []


@real
def test_sigterm_on_this_kernel_writes_the_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dmakit", "record", "-o", str(tmp_path / "a.txt")]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob(".a.txt.*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    assert running.wait(20) == 143
    assert (tmp_path / "a.txt").exists() and left_over() == []


def test_find_tracefs_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(HostError):
        find_tracefs(str(tmp_path / "nowhere"))
