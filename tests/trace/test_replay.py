"""Allocator replay: real kernels' traces, IOVA for IOVA, and what happens when a record is cut, changed or lossy."""

from __future__ import annotations

import json
import lzma
import re
from pathlib import Path
from random import Random

import pytest

from dmakit.errors import InputError
from dmakit.trace.replay import file_kind, replay_file
from dmakit.trace.result import Result

DATA = Path(__file__).parent.parent / "data"
TRACES = DATA / "kernel-traces"
MATCHED = {
    "inval-cm-smp1": 752,
    "inval-lazy-smp1": 752,
    "inval-strict-smp1": 752,
    "sg-ahci": 614,
    "smp1-lazy": 3_085,
    "smp1-strict": 3_085,
    "smp2-cm": 3_087,
    "smp2-lazy": 3_087,
    "smp2-lazy-mono": 1_024,
    "untrusted-nvme-smp1": 402,
    "untrusted-nvme-trusted-smp1": 402,
}


def lines_of(name: str) -> list[str]:
    return lzma.decompress((TRACES / f"{name}.trace.txt.xz").read_bytes()).decode().splitlines(keepends=True)


def replay_lines(tmp_path: Path, lines: list[str], name: str = "smp2-lazy", *, boot: bool = True) -> Result:
    """Replay changed lines; the boot trace of ``name`` goes with them."""
    path = tmp_path / "changed.trace.txt"
    path.write_text("".join(lines))
    return replay_file(path, boot=TRACES / f"{name}.boot.txt" if boot else None)


@pytest.mark.parametrize("name", MATCHED)
def test_every_fio_trace_is_matched_to_the_last_iova(name: str) -> None:
    result = replay_file(TRACES / f"{name}.trace.txt.xz")
    assert (result.allocations, result.matched, result.adopted, result.diverged) == (MATCHED[name],) * 2 + (0, 0)
    assert result.divergence is None
    assert not result.capped


def test_the_stress_trace_is_matched_through_magazines_and_depot() -> None:
    result = replay_file(TRACES / "smp4-stress.trace.txt.xz")
    assert (result.allocations, result.matched, result.diverged) == (18_029, 18_029, 0)
    assert result.overlapping > 5_000
    assert 0 < result.reordered < result.operations / 100
    assert 1 < result.width <= 8


def test_the_benchmark_trace_is_matched_through_exhaustion_and_flushes() -> None:
    result = replay_file(TRACES / "smp1-bench-lazy.trace.txt.xz")
    assert (result.allocations, result.matched, result.diverged) == (18_726, 18_726, 0)
    assert result.reordered > 0


def test_the_golden_vectors_are_matched() -> None:
    result = replay_file(DATA / "iova_golden.jsonl.xz")
    assert (result.kind, result.allocations, result.matched, result.diverged) == ("golden", 3_149, 3_149, 0)
    assert result.domains == 4
    assert result.checks > 20


def test_a_trace_without_allocator_events_is_fine_and_says_so() -> None:
    result = replay_file(TRACES / "smp2-pt-swiotlb.trace.txt.xz")
    assert (result.allocations, result.matched, result.divergence) == (0, 0, None)
    assert "no allocator events" in result.render()


def test_without_a_set_up_answers_of_the_tree_are_adopted() -> None:
    result = replay_file(TRACES / "p2p-cmb.trace.txt.xz")
    assert (result.allocations, result.matched + result.adopted, result.diverged) == (42, 42, 0)
    assert result.adopted >= 28


def change(lines: list[str], event: str, nth: int, pattern: str, text: str) -> int:
    """Change the nth line of an event; returns its number in the file."""
    at = [i for i, line in enumerate(lines) if f" {event}: " in line][nth]
    lines[at], count = re.subn(pattern, text, lines[at])
    assert count == 1
    return at + 1


@pytest.mark.parametrize("nth", [0, 40, 2_000, 3_086])
def test_one_changed_answer_is_one_divergence_and_the_rest_still_matches(tmp_path: Path, nth: int) -> None:
    lines = lines_of("smp2-lazy")
    number = change(lines, "af_out", nth, r"pfn=0x\w+", "pfn=0x12345")
    result = replay_lines(tmp_path, lines)
    assert result.divergence is not None
    assert result.divergence["line"] == number
    assert result.divergence["kernel"] == 0x12345
    assert 1 <= result.diverged <= 4
    assert result.matched + result.diverged == 3_087


@pytest.mark.parametrize("cut", [1_000, 14_000, 30_000, 50_000])
@pytest.mark.parametrize("header", [True, False])
def test_a_cut_beginning_is_adopted_and_never_diverges(tmp_path: Path, cut: int, header: bool) -> None:
    lines = lines_of("smp2-lazy")
    result = replay_lines(tmp_path, (lines[:12] if header else []) + lines[cut:])
    assert result.divergence is None
    assert result.adopted > 0
    assert result.matched + result.adopted == result.allocations > 100


def test_a_cut_end_changes_nothing_before_it(tmp_path: Path) -> None:
    result = replay_lines(tmp_path, lines_of("smp2-lazy")[:30_000])
    assert (result.adopted, result.diverged) == (0, 0)
    assert result.matched == result.allocations > 1_000


def test_behind_lost_events_nothing_is_matched_by_luck(tmp_path: Path) -> None:
    lines = lines_of("smp2-lazy")
    lines[30_000:30_400] = ["CPU:1 [LOST 400 EVENTS]\n"]
    result = replay_lines(tmp_path, lines)
    assert result.divergence is None
    assert result.lost_events == 400
    assert result.adopted > 0
    assert result.matched + result.adopted == result.allocations
    whole = replay_lines(tmp_path, lines_of("smp2-lazy")[:30_000])
    assert result.matched >= whole.matched


def test_cpu_numbers_device_names_and_addresses_do_not_matter(tmp_path: Path) -> None:
    lines = [
        line.replace("[000]", "[017]").replace("0000:00:04.0", "0002:81:00.3").replace("+0x4/0x3e0", "+0x0/0x2e0")
        for line in lines_of("smp2-lazy")
    ]
    result = replay_lines(tmp_path, lines)
    assert (result.matched, result.diverged) == (3_087, 0)


def test_shuffled_lines_are_put_in_order(tmp_path: Path) -> None:
    lines = lines_of("smp2-lazy")
    by_cpu = [line for cpu in ("[001]", "[000]") for line in lines[12:] if cpu in line]
    result = replay_lines(tmp_path, lines[:12] + by_cpu)
    assert (result.matched, result.diverged) == (3_087, 0)
    assert any("sorted by stamp" in note for note in result.notes)


@pytest.mark.parametrize("kept", [("af_in", "af_out", "ff_in", "ff_out"), ("af_out", "ff_in"), ("af_out", "ff_out")])
def test_fewer_events_still_replay_what_they_show(tmp_path: Path, kept: tuple[str, ...]) -> None:
    lines = lines_of("smp1-lazy")
    some = lines[:12] + [line for line in lines if any(f" {name}: " in line for name in kept)]
    result = replay_lines(tmp_path, some, "smp1-lazy")
    assert result.allocations == 3_085
    assert result.matched > 3_000
    assert any(note.startswith("without ") for note in result.notes)


def test_malformed_lines_are_counted_and_shown(tmp_path: Path) -> None:
    lines = lines_of("smp2-lazy")
    lines.insert(100, "garbage\n")
    result = replay_lines(tmp_path, lines)
    assert (result.matched, result.malformed_lines) == (3_087, 1)
    assert "1 malformed lines (line 101: 'garbage')" in result.render()


def test_golden_divergences_and_malformed_lines(tmp_path: Path) -> None:
    lines = lzma.decompress((DATA / "iova_golden.jsonl.xz").read_bytes()).decode().splitlines()[:300]
    at = next(i for i, line in enumerate(lines) if '"alloc"' in line)
    step = json.loads(lines[at])
    lines[at] = json.dumps(step | {"pfn": step["pfn"] - 4096})
    lines += ['{"op":"alloc"}', "not json", '{"op":"nonsense"}', '{"op":"free","cpu":0,"len":1,"pfn":77}']
    path = tmp_path / "golden.jsonl"
    path.write_text("\n".join(lines))
    result = replay_file(path)
    assert result.divergence is not None
    assert result.divergence["line"] == at + 1
    assert (result.divergence["kernel"], result.divergence["ours"]) == (step["pfn"] - 4096, step["pfn"])
    assert result.malformed_lines == 4
    assert result.matched + result.diverged == result.allocations


def test_file_kinds_and_refusals(tmp_path: Path) -> None:
    assert file_kind(TRACES / "smp2-lazy.boot.txt") == "trace"
    assert file_kind(DATA / "iova_golden.jsonl.xz") == "golden"
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n')
    assert file_kind(path) == "jsonl"
    with pytest.raises(InputError, match=re.escape(f"{path}: JSON lines, but no golden vectors (no trace line first)")):
        replay_file(path)
    with pytest.raises(InputError, match="--boot /nowhere: no such file"):
        replay_file(TRACES / "smp2-lazy.trace.txt.xz", boot="/nowhere")


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_trace_is_counted_not_crashed_on(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    lines = lines_of("untrusted-nvme-smp1")
    for _ in range(60):
        at = random.randrange(12, len(lines))
        text = list(lines[at])
        text[random.randrange(len(text) - 1)] = random.choice("0123456789abcxf =[]:-")
        lines[at] = "".join(text)
    for _ in range(3):
        at = random.randrange(12, len(lines))
        lines[at : at + 40] = ["CPU:0 [LOST 40 EVENTS]\n"]
    lines = [line for line in lines if random.random() > 0.005]
    lines.append(lines[20].split("]")[0] + "] ...1. 99999999: ff_in: (free_iova_fast+0/1) iovad=0x1 pfn=0x0 size=0\n")
    result = replay_lines(tmp_path, lines, "untrusted-nvme-smp1")
    assert result.matched + result.adopted + result.diverged >= result.allocations > 300
    assert result.lost_events == 120
    assert any("impossible numbers" in note for note in result.notes)
