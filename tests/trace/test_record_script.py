"""The recording script: its events are what the scanner reads, and it leaves a tracefs as it found it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from dmakit.cli.main import run
from dmakit.trace.columns import load
from dmakit.trace.events import EVENTS, NEEDS, missing_events
from dmakit.trace.probes import ALLOCATOR, INVALIDATION, MAPPING, Probe
from dmakit.trace.record_script import script

DYNAMIC = {event.name: event for event in EVENTS}


@pytest.mark.parametrize("probe", (*ALLOCATOR, *MAPPING, *INVALIDATION), ids=lambda probe: probe.name)
def test_every_probe_is_an_event_that_the_scanner_reads(probe: Probe) -> None:
    event = DYNAMIC[probe.name]
    assert event.symbol in (probe.function, "")
    recorded = re.findall(r"(\w+)=", probe.arguments)
    needed = {field.column for field in event.fields if not field.optional}
    assert needed <= set(recorded) <= {field.column for field in event.fields}
    assert probe.fprobe().startswith(f"f:{probe.group}/{probe.name} {probe.function}")
    assert ("%return" in probe.fprobe()) == probe.on_return == probe.kprobe().startswith("r256:")
    assert probe.kprobe("own").split(":")[1].startswith(f"own/{probe.name} {probe.function} ")


def tracefs(path: Path) -> Path:
    """A directory that looks like tracefs to the script."""
    for name in ("iommu", "dma", "swiotlb", "block/block_rq_issue", "block/block_rq_complete", "kp"):
        (path / "events" / name).mkdir(parents=True)
        (path / "events" / name / "enable").write_text("0\n")
    for probe in (*ALLOCATOR, *MAPPING):
        (path / "events" / probe.group / probe.name).mkdir(parents=True)
    (path / "per_cpu" / "cpu0").mkdir(parents=True)
    (path / "per_cpu" / "cpu0" / "stats").write_text("entries: 9\noverrun: 3\ndropped events: 2\n")
    start = {
        "current_tracer": "nop", "trace_clock": "[local] global counter mono", "buffer_size_kb": "7 (expanded: 1408)",
        "tracing_on": "1", "dynamic_events": "", "kprobe_events": "p:kp/init init_iova_domain",
        "trace": "  swapper/0-1 [000] ..... 1.0: init: (init_iova_domain+0x4/0xc0) iovad=0x1 granule=0x1000 start=0x1",
    }  # fmt: skip
    for name, text in start.items():
        (path / name).write_text(text + "\n")
    return path


def record(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "record.sh").write_text(script("test"))
    return subprocess.run(
        ["sh", str(tmp_path / "record.sh"), *arguments],
        cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def test_the_script_records_a_command_and_puts_everything_back(tmp_path: Path) -> None:
    fs = tracefs(tmp_path / "tracefs")
    line = "  fio-1 [000] ...1. 7: af_in: (alloc_iova_fast+0x4/0x3e0) iovad=0x1 size=1 limit=0xfffff flush=0"
    done = record(
        tmp_path, "run", "--", "sh", "-c",
        f'cd "{fs}"; cp dynamic_events ../defined; cat trace_clock tracing_on events/iova/af_in/enable > ../seen; '
        f'echo "{line}" > "{fs}/trace"; exit 3',
        TRACEFS=str(fs), DEVICE="0000:00:04.0",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "seen").read_text().split() == ["counter", "1", "1"]
    defined = (tmp_path / "defined").read_text().split("\n")[1:-1]
    assert defined == [probe.fprobe() for probe in (*ALLOCATOR, *MAPPING)]
    name = done.stdout.strip()
    assert load(tmp_path / name).table("af_in")["limit"].tolist() == [0xFFFFF]
    assert load(tmp_path / "run.boot.txt").table("init_in")["granule"].tolist() == [4096]
    assert "record: 5 events lost" in done.stderr
    after = {key: (fs / key).read_text().strip() for key in ("trace_clock", "buffer_size_kb", "tracing_on")}
    assert after == {"trace_clock": "local", "buffer_size_kb": "1408", "tracing_on": "1"}
    removed = re.findall(r"^-:(\S+)$", (fs / "dynamic_events").read_text(), re.MULTILINE)
    assert len(removed) <= len(ALLOCATOR) + len(MAPPING)
    assert all((fs / "events" / p.group / p.name / "enable").read_text() == "0\n" for p in (*ALLOCATOR, *MAPPING))
    assert (fs / "events" / "dma" / "enable").read_text() == "0\n"


def test_the_script_refuses_what_it_must_not_touch(tmp_path: Path) -> None:
    fs = tracefs(tmp_path / "tracefs")
    assert record(tmp_path, "x").returncode == 2
    assert record(tmp_path, "x", "ten", TRACEFS=str(fs)).returncode == 2
    (tmp_path / "x.trace.txt").write_text("mine")
    assert "x.trace.txt exists" in record(tmp_path, "x", "0", TRACEFS=str(fs)).stderr
    (fs / "current_tracer").write_text("function\n")
    refused = record(tmp_path, "y", "0", TRACEFS=str(fs))
    assert (refused.returncode, refused.stderr) == (2, "record: tracer function is in use\n")
    assert (fs / "tracing_on").read_text() == "1\n"


def test_the_record_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["record", "--script"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#!/bin/sh\n")
    assert subprocess.run(["sh", "-n"], input=printed, text=True, check=False).returncode == 0
    assert run(["record", "--boot-line"]) == 0
    assert capsys.readouterr().out.startswith("kprobe_event=p:kp/init,init_iova_domain,")
    assert run(["record", "--needs", "replay"]) == 0
    assert "af_out: without it, the allocator replay" in capsys.readouterr().out
    assert run(["record", "--needs", "nothing"]) == 2
    assert capsys.readouterr().err == "dmakit: --needs nothing: must be one of replay, compare, explain\n"


def test_missing_events_name_what_a_trace_lacks() -> None:
    every = [name for need in NEEDS["replay"] for name in need.events]
    assert missing_events(every, "replay") == []
    lacking = missing_events(["af_out", "ff_in"], "replay")
    assert [need.events for need in lacking] == [("af_in",), ("init_in", "res_in"), ("ai_out",)]
