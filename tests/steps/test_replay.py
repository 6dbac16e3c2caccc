"""Every step of every recorded file on our stack; the comparison has teeth; differences get their defect's name."""

import copy
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmakit.errors import InputError
from dmakit.trace.recorded_machine import FIRST_DOMAIN_ID, first_domain_id
from dmakit.trace.steps import StepsResult, is_step_file, replay_steps

DATA = Path(__file__).parent.parent / "data" / "kernel-steps"
FILES = sorted(path.name.split(".")[0] for path in DATA.glob("*.jsonl.xz"))
#: Which defects of 7.2 a recording shows.
SHOWN = {
    "sg-module": set(),
    "unlink-fuzz1-lazy": {"partial-destroy-frees-wrong-size"},
    "unlink-fuzz1-strict": {"partial-destroy-frees-wrong-size"},
    "untrusted-module": {"unlink-frees-slots-before-unmap"},
    "untrusted-module-minalign": {"unlink-frees-slots-before-unmap"},
}
BOTH = {"partial-destroy-frees-wrong-size", "unlink-cuts-large-leaf"}


def recorded(name: str) -> list[dict[str, Any]]:
    with lzma.open(DATA / f"{name}.jsonl.xz", "rt") as lines:
        return [json.loads(line) for line in lines]


def replayed(tmp_path: Path, records: list[dict[str, Any]], name: str, **options: Any) -> StepsResult:
    path = tmp_path / "changed.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return replay_steps(path, boot=DATA / f"{name}.boot.txt", **options)


@pytest.mark.parametrize("name", FILES)
def test_with_the_defects_of_7_2_every_step_is_the_kernels(name: str) -> None:
    result = replay_steps(DATA / f"{name}.jsonl.xz", defects=("7.2",))
    assert result.differences == []
    assert result.matched == result.steps == len(recorded(name))
    assert result.unknown_events == {}


@pytest.mark.parametrize("name", FILES)
def test_without_defects_every_difference_has_the_name_of_its_defect(name: str) -> None:
    result = replay_steps(DATA / f"{name}.jsonl.xz")
    assert result.explained
    assert result.matched == result.steps - len({difference.line for difference in result.differences})
    names = {part for difference in result.differences for part in str(difference.defect).split(", ")}
    assert names == SHOWN.get(name, BOTH)


@pytest.mark.parametrize("name", FILES)
def test_after_a_difference_the_kernels_answer_is_adopted(name: str) -> None:
    """Then only steps that tear something down (a link that unwinds is one), or a flush after one, differ."""
    result = replay_steps(DATA / f"{name}.jsonl.xz")
    for difference in result.differences:
        unwinds = difference.cmd.startswith("link ") and any(event[0] == "tblunmap" for event in difference.kernel)
        tears_down = difference.cmd.split()[0] in ("destroy", "unlink") or unwinds
        assert difference.field == "after" or tears_down, difference


def change(key: str, value: Callable[[Any], Any]) -> Callable[[dict[str, Any]], bool]:
    """A mutation of the first record that has ``key``."""

    def apply(record: dict[str, Any]) -> bool:
        if not record.get(key):
            return False
        record[key] = value(record[key])
        return True

    return apply


def edit_event(batch: str, event: str, old: str, new: str) -> Callable[[dict[str, Any]], bool]:
    """A mutation of the text of the first recorded event of a name in ``events`` or ``after``."""

    def apply(record: dict[str, Any]) -> bool:
        for row in record.get(batch, ()):
            if row[2] == event and old in row[3]:
                row[3] = row[3].replace(old, new)
                return True
        return False

    return apply


def drop_event(event: str) -> Callable[[dict[str, Any]], bool]:
    """A mutation that loses the first recorded event of a name."""

    def apply(record: dict[str, Any]) -> bool:
        kept = [row for row in record.get("events", ()) if row[2] != event]
        changed = len(kept) != len(record.get("events", ()))
        record["events"] = kept
        return changed

    return apply


def rename_warning(record: dict[str, Any]) -> bool:
    if "warn" not in record:
        return False
    record["warn"] = ["WARNING: at elsewhere+0x1/0x2, CPU#0: python3/1"]
    return True


MUTATIONS: list[tuple[str, str, Callable[[dict[str, Any]], bool], str]] = [
    ("unlink-strict", "ret", change("ret", lambda ret: -98 if ret else 0), "ret"),
    ("unlink-strict", "addr", change("addr", lambda addr: addr + 0x400000), "addr"),
    ("unlink-strict", "size", change("size", lambda size: size + 1), "size"),
    ("unlink-strict", "tr", change("tr", lambda runs: [[o, p + 4096, n] for o, p, n in runs]), "tr"),
    (
        "unlink-strict",
        "leaf",
        change("leaves", lambda rows: [{**row, "level": 1 - row["level"]} for row in rows]),
        "leaves",
    ),
    (
        "unlink-strict",
        "permission",
        change("leaves", lambda rows: [{**row, "first_entry": f"{int(row['first_entry'], 16) ^ 2:x}"} for row in rows]),
        "leaves",
    ),
    ("unlink-strict", "warning", rename_warning, "warn"),
    ("unlink-strict", "IH", edit_event("events", "qi_submit", "040 0x0 0x0", "000 0x0 0x0"), "events"),
    ("unlink-strict", "scope", edit_event("events", "cache_tag_flush_range", "mask 0x2", "mask 0x3"), "events"),
    ("unlink-strict", "no flush", drop_event("qi_submit"), "events"),
    ("unlink-strict", "free", edit_event("events", "ff_in", "size=4", "size=3"), "events"),
    ("unlink-lazy", "timer scope", edit_event("after", "qi_submit", "0x400e2", "0x500e2"), "after"),
    ("unlink-lazy", "timer free", edit_event("after", "ff_in", "size=4", "size=2"), "after"),
    ("unlink-cm", "map-side", drop_event("cache_tag_flush_range_np"), "events"),
    ("sg-module", "segments", change("out", lambda out: [[a, n + 1] for a, n in out]), "out"),
    ("untrusted-module-minalign", "bytes", change("bytes", lambda runs: [[o, n, b ^ 1] for o, n, b in runs]), "bytes"),
    ("untrusted-module-minalign", "slot", edit_event("events", "tblmap_out", "ret=0x7bfde", "ret=0x7bfdf"), "events"),
    ("untrusted-module", "skipped", change("skipped", lambda text: "for another reason"), "skipped"),
]


@pytest.mark.parametrize(("name", "mutation", "apply", "field"), MUTATIONS, ids=[row[1] for row in MUTATIONS])
def test_a_changed_recording_is_found_and_has_no_explanation(
    tmp_path: Path, name: str, mutation: str, apply: Callable[[dict[str, Any]], bool], field: str
) -> None:
    records = recorded(name)
    changed = next(record for record in records if apply(record))
    result = replayed(tmp_path, records, name, defects=("7.2",))
    assert not result.explained
    assert result.divergence is not None
    assert (result.divergence.n, result.divergence.field) == (changed["n"], field)
    assert result.divergence.defect is None


def test_a_flush_that_the_kernel_did_not_have_shows_at_the_pause(tmp_path: Path) -> None:
    records = recorded("unlink-lazy")
    late = next(i for i, record in enumerate(records) if record.get("after"))
    records[late]["after"] = []
    result = replayed(tmp_path, records, "unlink-lazy", defects=("7.2",))
    assert result.divergence is not None
    assert result.divergence.cmd == "wait 50"
    assert [event[0] for event in result.divergence.ours] == ["flush_range", "qi", "ff_in"]


def test_a_freed_size_is_adopted_so_that_one_step_differs(tmp_path: Path) -> None:
    """As if the kernel had freed 4 pages as 3: same order, so nothing else may change afterwards."""
    records = recorded("unlink-strict")
    apply = edit_event("events", "ff_in", "size=4", "size=3")
    assert any(apply(record) for record in records)
    result = replayed(tmp_path, records, "unlink-strict", defects=("7.2",))
    assert len(result.differences) == 1


def test_another_iova_is_adopted_and_the_state_lives_on_there(tmp_path: Path) -> None:
    """A first allocation elsewhere: the IOVA space was in use before. It is adopted, the steps on it match."""
    records = [copy.deepcopy(record) for record in recorded("unlink-strict")[:14]]
    text = json.dumps(records)
    moved = text.replace("4294950912", "4290756608").replace("0x00000000ffffc000", "0x00000000ffbfc000")
    moved = moved.replace("0x0000000100000000", "0x00000000ffc00000").replace("pfn=0xffffc", "pfn=0xffbfc")
    moved = moved.replace("start=0xffffc000 end=0xffffffff", "start=0xffbfc000 end=0xffbfffff")
    moved = moved.replace("iova=0xffffc000", "iova=0xffbfc000").replace(
        "[0xffffc000-0xffffffff]", "[0xffbfc000-0xffbfffff]"
    )
    moved = moved.replace("addr 0xffffc000", "addr 0xffbfc000").replace("0xffffc042", "0xffbfc042")
    result = replayed(tmp_path, json.loads(moved), "unlink-strict", defects=("7.2",))
    assert result.differences == []
    assert (result.matched, result.adopted) == (13, 1)
    assert (
        "  1 steps depend on what came before the recording: adopted, not counted as equal"
        in result.render().splitlines()
    )


def test_the_result_as_json_and_for_people() -> None:
    result = replay_steps(DATA / "unlink-strict.jsonl.xz")
    told = result.as_json()
    assert told["kind"] == "steps"
    assert told["steps"] == 455
    assert told["matched"] == 455 - len({row["line"] for row in told["differences"]})
    assert {"n", "field", "ours", "kernel", "defect"} <= told["differences"][0].keys()
    assert told["divergence"] == told["differences"][0]
    json.dumps(told)
    lines = result.render().splitlines()
    assert lines[0].endswith(f": {result.matched} of 455 steps equal to the kernel's")
    assert any(line.startswith("  unlink-cuts-large-leaf: ") for line in lines)


def test_step_files_are_recognised() -> None:
    assert is_step_file(DATA / "unlink-strict.jsonl.xz")
    assert not is_step_file(DATA / "unlink-strict.boot.txt")
    assert not is_step_file(DATA.parent / "iova_golden.jsonl.xz")


@pytest.mark.parametrize("name", ["unlink-lazy", "unlink-strict", "unlink-fuzz1-lazy", "sg-module"])
@pytest.mark.parametrize("first", [8, 60, 200])
def test_a_file_cut_at_its_beginning_adopts_what_it_cannot_know(tmp_path: Path, name: str, first: int) -> None:
    records = recorded(name)[first:]
    result = replayed(tmp_path, records, name, defects=("7.2",))
    assert result.differences == [], result.render()
    assert result.matched == result.steps - result.adopted
    assert result.adopted < len(records) // 8


def test_a_whole_file_that_uses_what_it_never_set_up_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"n":1,"cmd":"sync 3 0 0x1000"}\n')
    with pytest.raises(InputError) as error:
        replay_steps(path)
    assert str(error.value) == f"{path}:1: 'sync 3 0 0x1000' uses slot 3, which was never set up"
    path.write_text('{"n":1,"cmd":"mask 2 32"}\n')
    with pytest.raises(InputError, match="'mask 2 32' uses device 2, which was never set up$"):
        replay_steps(path)


@pytest.mark.parametrize(
    "name", ["unlink-strict", "unlink-cm", "unlink-lazy", "sg-module", "untrusted-module-minalign"]
)
def test_without_a_boot_file_the_domain_ids_are_those_of_the_recording(name: str, tmp_path: Path) -> None:
    """How many domains were attached before the first device is not an answer: it comes with the recording."""
    path = tmp_path / "alone.jsonl.xz"
    path.write_bytes((DATA / f"{name}.jsonl.xz").read_bytes())
    result = replay_steps(path, defects=("7.2",))
    assert result.differences == [] and result.matched + result.adopted == result.steps
    assert result.adopted == 0


def test_only_invalidations_of_one_domain_tell_its_id() -> None:
    def iotlb(granularity: int, did: int) -> tuple[str, int, int]:
        return ("qi", did << 16 | granularity << 4 | 2, 0)

    words = [iotlb(1, 0), ("qi", 0x3, 0), ("map", 1, 2, 3), iotlb(3, 6), iotlb(2, 5)]
    assert first_domain_id(None, words) == 5
    assert first_domain_id(Path("boot"), words) == first_domain_id(None, words[:3]) == FIRST_DOMAIN_ID
