"""``dmakit replay`` on step files and, with ``--calls``, on the calls of a trace: text, JSON, exit status."""

import json
import lzma
from pathlib import Path

import pytest

from dmakit.cli.main import run

DATA = Path(__file__).parent.parent / "data"
STEPS = DATA / "kernel-steps" / "unlink-strict.jsonl.xz"
TRACE = DATA / "kernel-traces" / "inval-lazy-smp1.trace.txt.xz"


def test_step_files_with_the_kernels_defects(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", str(STEPS), "--defect", "7.2"]) == 0
    assert capsys.readouterr().out == f"{STEPS}: 455 of 455 steps equal to the kernel's\n"


def test_step_files_without_defects_name_them_and_end_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", str(STEPS), "--json", "-"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert (result["kind"], result["steps"]) == ("steps", 455)
    assert result["matched"] < 455
    assert all(difference["defect"] for difference in result["differences"])


def test_a_difference_without_explanation_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = lzma.decompress(STEPS.read_bytes()).decode().replace('"ret":-22', '"ret":-12').splitlines()
    path = tmp_path / "changed.jsonl"
    path.write_text("\n".join(lines))
    assert run(["replay", str(path), "--boot", str(STEPS.with_name("unlink-strict.boot.txt")), "--defect", "7.2"]) == 1
    assert "  not explained: 2 differences" in capsys.readouterr().out


def test_bad_input_ends_with_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"n":1,"cmd":"fly 1"}\n')
    assert run(["replay", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dmakit: {path}:1: unknown command 'fly 1'")
    assert error.count("\n") == 1
    assert run(["replay", str(STEPS), "--defect", "9.9"]) == 2


def test_the_calls_of_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", "--calls", str(TRACE)]) == 0
    out = capsys.readouterr().out
    assert "3374 of 3374 calls answered as the kernel did" in out
    assert "invalidations: 23 of 23 explained and equal (flush queue timer 23)" in out
