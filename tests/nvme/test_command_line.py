"""``dmakit nvme``: what it prints, what it writes, its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dmakit.cli.main import run
from dmakit.nvme import exercise
from dmakit.nvme.discover import controllers


def test_identify_and_list_as_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["nvme", "identify"]) == 0
    text = capsys.readouterr().out
    assert "dmakit NVMe controller model" in text and "262144 blocks of 512 bytes, 128.0 MiB" in text
    assert run(["nvme", "identify", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["namespaces"][0]["bytes"] == 128 << 20 and found["registers"].endswith("(ready)")
    assert run(["nvme", "list"]) == 0
    assert "--platform soft" in capsys.readouterr().out


def test_verify_writes_and_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    where = tmp_path / "report.json"
    command = ["nvme", "verify", "--soft", "--size", "256k", "--strategy", "two-step", "--json", str(where)]
    assert run(command) == 2
    assert capsys.readouterr().err == ("dmakit: nvme verify overwrites soft, namespace 1: say --yes to do it\n")
    assert run([*command, "--yes"]) == 0
    out = capsys.readouterr().out
    assert "262144 bytes written from block 0 (what was there is gone), 262144 read back and compared" in out
    assert out.endswith("every byte is right\n")
    report = json.loads(where.read_text())
    assert report["good"] and report["strategy"] == "two-step" and report["bytes_compared"] == 262144


def test_verify_without_writing_needs_no_yes_and_finds_that_nothing_was_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["nvme", "verify", "--soft", "--size", "64k", "--no-write"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("soft, namespace 1: 65536 bytes of an earlier run read and compared\n")
    assert "WRONG: " in out and "what was there is gone" not in out


def test_a_difference_is_status_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = exercise.Verifier.data
    calls: list[int] = []

    def other(self: Any, lba: int, blocks: int) -> bytes:
        calls.append(lba)
        content = data(self, lba, blocks)
        return content if len(calls) > 1 else bytes([content[0] ^ 0xFF]) + content[1:]

    monkeypatch.setattr(exercise.Verifier, "data", other)
    assert run(["nvme", "verify", "--yes", "--size", "64k"]) == 1
    out = capsys.readouterr().out
    assert "WRONG: 1 extents differ, 0 commands failed" in out and ", byte 0: 0x" in out


def test_write_read_and_perf(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"abc")
    assert run(["nvme", "write", str(tmp_path / "in"), "--yes"]) == 0
    assert capsys.readouterr().out == "512 bytes written from block 0 of namespace 1, flushed\n"
    assert run(["nvme", "read", "--blocks", "2", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_bytes() == bytes(1024)  # each run is another machine
    capsys.readouterr()
    assert run(["nvme", "perf", "--seconds", "0.05", "--depth", "4", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ios"] > 0 and (found["strategy"], found["verdict"]) == ("premap", "")
    assert run(["nvme", "perf", "--seconds", "0.05", "--depth", "4", "--strategy", "auto"]) == 0
    shown = capsys.readouterr().out
    assert "memory registered from the start (auto)" in shown and "\nrequest by request: window: " in shown
    assert run(["nvme", "verify", "--yes", "--size", "256K", "--strategy", "auto", "--max-io", "64K"]) == 0
    shown = capsys.readouterr().out
    assert ", strategy auto, " in shown and "\nauto: us measured here: a window " in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["identify", "--platform", "moon"], "--platform moon: must be soft or vfio:BDF (vfio:0000:01:00.0)"),
        (["identify", "--platform", "vfio:moon"],
         "'moon' is no PCI address: write domain:bus:device.function, as in 0000:01:00.0"),
        (["read", "--nsid", "3"], "--nsid 3: active are 1"),
        (["read", "--lba", "262144"], "blocks [262144, 262145): must be at least one, inside namespace 1 of 262144"),
        (["verify", "--yes", "--size", "1G"],
         "1073741824 bytes from block 0: namespace 1 has 262144 blocks of 512 bytes"),
        (["perf", "--bs", "1000"], "--bs 1000: must be whole blocks of 512 bytes, at most 8192"),
        (["perf", "--op", "write"], "nvme perf overwrites soft, namespace 1: say --yes to do it"),
        (["perf", "--strategy", "sg"], "nvme perf --strategy sg: it works on registered memory: auto or premap"),
        (["identify", "--queues", "0"], "--queues, --depth and --timeout: must be above 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["nvme", *arguments]) == 2
    assert capsys.readouterr().err == f"dmakit: {message}\n"


def test_what_sysfs_shows(tmp_path: Path) -> None:
    for bdf, kind, driver, group in (
        ("0000:01:00.0", "0x010802", "nvme", "7"),
        ("0000:02:00.0", "0x010802", "vfio-pci", "8"),
        ("0000:03:00.0", "0x020000", "e1000", "9"),
        ("0000:04:00.0", "0x010802", "", ""),
    ):
        folder = tmp_path / bdf
        folder.mkdir()
        (folder / "class").write_text(f"{kind}\n")
        (folder / "vendor").write_text("0x144d\n")
        (folder / "device").write_text("0xa808\n")
        for name, target in (("driver", driver), ("iommu_group", group)):
            if target:
                (folder / name).symlink_to(f"../{target}")
    assert [(found.bdf, found.ids, found.driver, found.group, found.how) for found in controllers(tmp_path)] == [
        ("0000:01:00.0", "144d:a808", "nvme", "7", "dmakit vfio bind 0000:01:00.0, then --platform vfio:0000:01:00.0"),
        ("0000:02:00.0", "144d:a808", "vfio-pci", "8", "--platform vfio:0000:02:00.0"),
        ("0000:04:00.0", "144d:a808", "", "", "no IOMMU group: enable the IOMMU (intel_iommu=on, amd_iommu=on)"),
    ]
    assert controllers(tmp_path / "nothing") == []
