"""What the verbs write and where: places for JSON, closed and full outputs, narrow terminals, one-line errors."""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dmakit.cli import main
from dmakit.lab import report

DATA = Path(__file__).parent.parent / "data" / "kernel-traces"
TRACE = DATA / "untrusted-nvme-smp1.trace.txt.xz"
SMALL = ["compare", "bs=4k,n=2", "--strategy", "page"]


def test_json_to_a_pipe_a_link_and_places_that_cannot_be(tmp_path: Path, capsys: Any) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen([sys.executable, "-c", f"print(open({str(pipe)!r}).read())"], stdout=subprocess.PIPE)
    assert main.run([*SMALL, "--json", str(pipe)]) == 0
    assert json.loads(reader.communicate()[0])["input"] == "bs=4k,n=2"
    assert stat.S_ISFIFO(pipe.stat().st_mode)

    link = tmp_path / "link"
    link.symlink_to("there.json")
    assert main.run([*SMALL, "--json", str(link)]) == 0
    assert link.is_symlink() and json.loads((tmp_path / "there.json").read_text())

    capsys.readouterr()
    for verb in (SMALL, ["explain", "bs=4k,n=2"], ["replay", str(TRACE)]):
        for place in ("/", str(tmp_path), "", f"{link}/x", str(tmp_path / "no" / "x")):
            assert main.run([*verb, "--json", place]) == 2
            out, err = capsys.readouterr()
            assert (out, err.count("\n")) == ("", 1) and "--json" in err and "cannot write there" in err


def spawn(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dmakit", *argv]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **options)


def test_a_full_or_closed_output_is_one_line_or_none() -> None:
    with Path("/dev/full").open("w") as full:
        if not stat.S_ISCHR(os.fstat(full.fileno()).st_mode):
            pytest.fail("/dev/full is not the device")
        done = spawn("compare", "bs=4k,n=2", stdout=full)
    assert (done.returncode, done.stderr) == (2, "dmakit: [Errno 28] No space left on device\n")
    read, write = os.pipe()
    os.close(read)
    done = spawn("compare", "bs=4k,n=2", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_an_interrupt_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("dmakit.cli.doctor.run", interrupted)
    try:
        assert main.run(["doctor"]) == 130
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "dmakit: interrupted\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compare", "--seed", "abc"], "dmakit compare: argument --seed: invalid int value: 'abc'"),
        (["compare", "--iommu", "x"], "dmakit compare: argument --iommu: invalid choice: 'x'"),
        (["replay"], "dmakit replay: the following arguments are required: FILE"),
        (["nonsense"], "dmakit: argument VERB: invalid choice: 'nonsense'"),
        (["doctor", "--x"], "dmakit: unrecognized arguments: --x"),
    ],
)
def test_wrong_arguments_are_one_line_that_names_the_help(argv: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.run(argv)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(message) and err.endswith("--help\n")


def test_options_without_effect_are_refused(capsys: Any) -> None:
    assert main.run([*SMALL, "--iommu", "none", "--mode", "lazy"]) == 2
    assert "--iommu none --mode lazy" in capsys.readouterr().err
    assert main.run([*SMALL, "--p2p", "bus", "--checker"]) == 2
    assert "--p2p bus --checker" in capsys.readouterr().err
    assert main.run(["replay", str(TRACE), "--defect", "nonsense"]) == 2
    assert "defect 'nonsense' is not known" in capsys.readouterr().err


def test_a_file_name_is_printed_as_it_is_and_quoted_in_the_command(tmp_path: Path, capsys: Any) -> None:
    trace = tmp_path / "a [b] x.trace.txt.xz"
    trace.write_bytes(TRACE.read_bytes())
    boot = tmp_path / "its boot"
    boot.write_bytes((DATA / "untrusted-nvme-smp1.boot.txt").read_bytes())
    assert main.run(["compare", str(trace), "--boot", str(boot), "--strategy", "two-step"]) == 0
    out = capsys.readouterr().out
    assert "a [b] x.trace.txt.xz" in out.splitlines()[0]
    assert f"explained by: dmakit explain '{trace}' --boot '{boot}'" in out


@pytest.mark.parametrize(("width", "lines"), [(80, 2), (130, 1)])
def test_no_figure_is_cut_on_a_narrow_terminal(
    width: int, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(
        report, "console", lambda: Console(file=shown, width=width, force_terminal=True, color_system=None)
    )
    assert main.run(["compare", "case:sg-wins"]) == 0
    text = shown.getvalue()
    assert "…" not in text and "sg-nomerge" in text and max(map(len, text.splitlines())) <= width
    head = text.split("per request\n\n")[1].split("direct")[0]
    assert len(head.splitlines()) == lines
    assert all(len(line.split()) == len(report.COLUMNS) for line in text[text.index("direct ") :].splitlines()[:6])
    capsys.readouterr()


def test_dmakits_own_time_is_told_a_request(tmp_path: Path, capsys: Any) -> None:
    assert main.run(["compare", "bs=4k,n=50", "--json", str(tmp_path / "told.json")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("time of dmakit's own code"))
    strategies = json.loads((tmp_path / "told.json").read_text())["strategies"]
    spent = ", ".join(f"{one['name']} {one['simulator_ns'] / one['requests']:,.0f} ns" for one in strategies)
    assert line.startswith("time of dmakit's own code per request (") and line.endswith(f"never the kernel's: {spent}")
    assert all(one["simulator_ns"] > one["requests"] for one in strategies), "there is something to say"


def test_lines_are_whole_when_nobody_looks(capsys: Any) -> None:
    assert main.run(["explain", "bs=8k,piece=2k,n=20"]) == 0
    assert "cannot be made contiguous: each segment is mapped by itself; to be fast: " in capsys.readouterr().out


@pytest.mark.parametrize("options", [(), ("--untrusted",), ("--platform", "embedded")])
def test_a_comparison_of_correct_strategies_breaks_no_rule(options: tuple[str, ...]) -> None:
    assert main.run(["compare", "bs=64k,offset=512,iodepth=4,n=8", "--checker", *options]) == 0
