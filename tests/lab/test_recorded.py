"""Recorded workloads: requests as the kernel mapped them, and the paths that dmakit's driver gives them."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dmakit import _core
from dmakit.cli.main import run
from dmakit.lab.explain import explain
from dmakit.lab.options import Options
from dmakit.lab.sources import TraceSource
from dmakit.trace.columns import load
from dmakit.trace.requests import extract, schedule

TRACES = Path(__file__).resolve().parents[1] / "data" / "kernel-traces"


def trace(name: str) -> Path:
    return TRACES / f"{name}.trace.txt.xz"


def test_requests_of_a_trace_have_the_bytes_that_were_issued() -> None:
    found = extract(load(trace("smp2-lazy-mono")))
    assert len(found.requests) == 1016 and found.unfinished == 0 and found.cpus == 2
    assert found.missing == [] and list(found.devices()) == ["0000:00:04.0"]
    for request in found.requests:
        assert sum(size for _, size in request.segments) == request.issued_bytes
    phases = {phase: sum(1 for r in found.requests if r.phase == phase) for phase in ("a", "b", "c", "c512", "cunal")}
    assert phases == {"a": 300, "b": 200, "c": 200, "c512": 240, "cunal": 60}
    order = schedule(found.requests)
    assert len(order) == 2 * 1016
    assert all(order.index((0, n)) < order.index((1, n)) for n in (0, 500, 1015))


def test_explain_gives_each_phase_the_path_that_the_kernel_took() -> None:
    found = explain(TraceSource("smp2-lazy", trace("smp2-lazy")), Options())
    paths: dict[str, set[str]] = {}
    for line in found.lines:
        for phase, _ in line.phases:
            paths.setdefault(phase, set()).add(f"{line.path}: {line.reason.name}")
    assert paths["a"] == paths["c"] == paths["c512"] == {"map_phys: SINGLE_SEGMENT"}
    assert paths["b"] == paths["cunal"] == paths["u"] == {"two-step: COALESCED"}


@pytest.mark.parametrize("name", ["smp1-strict", "smp2-lazy-mono", "untrusted-nvme-smp1"])
def test_the_driver_takes_the_kernels_decision_for_every_request(name: str) -> None:
    source = TraceSource(name, trace(name))
    options = Options(untrusted=name == "untrusted-nvme-smp1", mode="strict" if "strict" in name else "lazy").check()
    found = explain(source, options)
    recorded = {"map": "map_phys", "two-step": "two-step", "each": "per-segment"}
    log = found.log
    for request in source.requests:
        path = log.paths[log.requests[request.number][0]]
        assert path == recorded[request.method], (request.number, request.segments, path)


@pytest.mark.parametrize("name", ["smp2-pt-swiotlb", "sg-ahci", "p2p-cmb"])
def test_other_traces_compare_too_and_say_what_they_lack(name: str, capsys: Any) -> None:
    assert run(["compare", str(trace(name)), "--strategy", "two-step", "--strategy", "sg", "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["notes"] and all(s["bytes_wrong"] == 0 for s in document["strategies"])


def broken(tmp_path: Path, kind: str) -> Path:
    text = lzma.decompress(trace("smp2-lazy-mono").read_bytes())
    target = tmp_path / f"{kind}.trace.txt.xz"
    if kind == "empty":
        target.write_bytes(b"")
    elif kind == "truncated":
        target.write_bytes(trace("smp2-lazy-mono").read_bytes()[:5000])
    elif kind == "damaged":
        body = bytearray(trace("smp2-lazy-mono").read_bytes())
        body[3000:3100] = bytes(100)
        target.write_bytes(body)
    elif kind == "prose":
        target = tmp_path / "prose.txt"
        target.write_bytes(b"nothing that a kernel printed\n" * 20)
    elif kind == "no-requests":
        target = tmp_path / "marks.txt"
        target.write_bytes(b"\n".join(line for line in text.split(b"\n") if b"PHASE" in line) + b"\n")
    return target


@pytest.mark.parametrize("verb", ["compare", "explain"])
@pytest.mark.parametrize("kind", ["empty", "truncated", "damaged", "prose", "no-requests"])
def test_unusable_traces_end_in_one_line_and_status_2(verb: str, kind: str, tmp_path: Path, capsys: Any) -> None:
    path = broken(tmp_path, kind)
    assert run([verb, str(path), "--json", str(tmp_path / "out.json")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and path.name in err and err.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def test_a_workload_that_does_not_fit_the_host_is_refused(capsys: Any) -> None:
    assert run(["compare", "bs=8m,iodepth=4096,jobs=256"]) == 2
    assert "use a smaller bs, iodepth or jobs" in capsys.readouterr().err


@pytest.mark.skipif(bool(_core.status()["missing"]), reason="no compiled core here: ./dmakit build")
@pytest.mark.parametrize("argv", [[], ["bs=4k+64k,iodepth=4,n=40,rw=rw,jobs=2,offset=512", "--untrusted"]])
def test_both_cores_give_the_same_ledger_to_the_last_digit(argv: list[str]) -> None:
    documents = []
    for core in ("python", "compiled"):
        command = [sys.executable, "-m", "dmakit", "compare", *argv, "--json", "-"]
        env = {**os.environ, "DMAKIT_CORE": core}
        shown = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
        document = json.loads(shown)
        for strategy in document["strategies"]:
            del strategy["simulator_ns"]
        documents.append(document)
    assert documents[0] == documents[1]
