"""``dmakit replay``: output, JSON file and exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmakit.cli.main import run

TRACES = Path(__file__).parent.parent / "data" / "kernel-traces"
TRACE = str(TRACES / "untrusted-nvme-smp1.trace.txt.xz")


def test_replay_prints_and_writes_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.json"
    assert run(["replay", TRACE, "--json", str(target)]) == 0
    assert f"{TRACE}: 402 allocations: 402 matched (100.00 %), 0 adopted, 0 diverged" in capsys.readouterr().out
    written = json.loads(target.read_text())
    assert run(["replay", TRACE, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == written
    keys = {"file", "kind", "allocations", "matched", "reordered", "adopted", "malformed_lines", "divergence"}
    assert keys <= written[0].keys()
    assert list(tmp_path.iterdir()) == [target]


def test_a_divergence_is_status_1_and_bad_input_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = tmp_path / "g.jsonl"
    golden.write_text(
        '{"trace":"t","granule":4096,"start_pfn":1,"cpus":1}\n'
        '{"op":"alloc","cpu":0,"len":1,"limit":1048575,"flush":1,"pfn":5}\n'
    )
    assert run(["replay", str(golden)]) == 1
    shown = capsys.readouterr().out
    assert "first divergence:" in shown
    assert "ours: 1048575 (0xfffff)" in shown
    target = tmp_path / "out.json"
    assert run(["replay", TRACE, str(tmp_path / "none"), "--json", str(target)]) == 2
    assert capsys.readouterr().err == f"dmakit: {tmp_path}/none: cannot be read: No such file or directory\n"
    assert not target.exists()
    assert run(["replay", TRACE, "--json", str(tmp_path / "no" / "dir")]) == 2
    assert "--json" in capsys.readouterr().err
