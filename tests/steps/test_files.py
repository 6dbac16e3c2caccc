"""Step files are read whole or refused with the line; events become the machine's tuples; timers are taken out."""

import json
import lzma
from collections import Counter
from pathlib import Path

import pytest

from dmakit.errors import InputError
from dmakit.trace.step_events import parse, separate, warning_function
from dmakit.trace.step_file import is_step_record, load_steps

DATA = Path(__file__).parent.parent / "data" / "kernel-steps"
STEPS = {
    "sg-module": 935,
    "unlink-cm": 455,
    "unlink-fuzz1-lazy": 1218,
    "unlink-fuzz1-strict": 1218,
    "unlink-lazy": 455,
    "unlink-lazy-smp2": 455,
    "unlink-strict": 455,
    "untrusted-module": 138,
    "untrusted-module-minalign": 139,
}


@pytest.mark.parametrize("name", STEPS)
def test_every_step_and_every_event_of_every_file_is_read(name: str) -> None:
    file = load_steps(DATA / f"{name}.jsonl.xz")
    assert len(file.steps) == STEPS[name]
    for step in file.steps:
        recorded = separate(step.record.get("events", ()), step.record.get("after", ()))
        assert not recorded.unknown
        for flush in recorded.flushes:
            assert Counter(event[0] for event in flush.events)["qi"] == 1


@pytest.mark.parametrize(
    ("name", "text", "event"),
    [
        ("af_out", "iovad=0xff1 size=4 limit=0xfffff pfn=0xffffc", ("af_out", 4, 0xFFFFF, 0xFFFFC)),
        ("ff_in", "iovad=0xff1 pfn=0xffffc size=4", ("ff_in", 0xFFFFC, 4)),
        (
            "map",
            "IOMMU: iova=0x00000000ffffc000 - 0x0000000100000000 paddr=0x0000000004cac000 size=16384",
            ("map", 0xFFFFC000, 0x4CAC000, 16384),
        ),
        (
            "unmap",
            "IOMMU: iova=0x00000000ffffc000 - 0x0000000100000000 size=16384 unmapped_size=4096",
            ("unmap", 0xFFFFC000, 16384, 4096),
        ),
        ("tlbsync_in", "domain=0x1 start=0xa000 end=0xafff pgsize=0x0 queued=0", ("tlbsync_in", 0xA000, 0xAFFF, 0)),
        (
            "cache_tag_flush_range",
            "dmar0 dmar0[0] type iotlb did 4 [0x0-0xffffffffffffffff] addr 0x0 mask 0x34",
            ("flush_range", 0, 2**64 - 1, 0, 52),
        ),
        ("qi_submit", "iotlb_inv dmar0: 0x400f2 0xfffff040 0x0 0x0", ("qi", 0x400F2, 0xFFFFF040)),
        (
            "swiotlb_bounced",
            "dev_name: 0000:00:04.0 dma_mask=ffffffffffffffff dev_addr=102590200 size=3584 NORMAL",
            ("swiotlb_bounced", 0x102590200, 3584),
        ),
        (
            "tblmap_out",
            'dev="d" phys=0x102590200 size=3584 alignmask=0xfff dir=1 attrs=0x0 ret=0x7bfdd000',
            ("tblmap", 0x102590200, 3584, 0x7BFDD000),
        ),
        ("blink_in", 'dev="d" addr=0xffff8200 phys=0x200 len=3584 dir=1 attrs=0x0', ("blink", 0xFFFF8200, 0x200, 3584)),
        ("fi_in", "iovad=0x1 pfn=0x2", None),
    ],
)
def test_event_text_becomes_the_machines_tuple(name: str, text: str, event: tuple[object, ...] | None) -> None:
    assert parse(name, text) == event


def test_strange_event_text_is_refused() -> None:
    with pytest.raises(InputError, match="^event ff_in: unexpected text 'pfn=oops size=1'$"):
        parse("ff_in", "pfn=oops size=1")


def test_a_timer_inside_a_call_is_taken_out_and_its_place_kept() -> None:
    events = [
        [1, 0, "unmap", "IOMMU: iova=0x1000 - 0x2000 size=4096 unmapped_size=4096"],
        [2, 0, "fqto_in", "timer=0xff00a8"],
        [3, 0, "all_in", "domain=0x1"],
        [4, 0, "qi_submit", "iotlb_inv dmar0: 0x400e2 0x0 0x0 0x0"],
        [5, 0, "ff_in", "iovad=0x1 pfn=0x7 size=2"],
        [6, 0, "fqto_out", "timer=0xff00a8"],
        [7, 0, "ff_in", "iovad=0x1 pfn=0x1 size=1"],
    ]
    recorded = separate(events, [])
    assert recorded.own == [("unmap", 0x1000, 4096, 4096), ("ff_in", 1, 1)]
    (flush,) = recorded.flushes
    assert (flush.position, flush.timer, flush.freed()) == (1, 0xFF00A8, [7])


def test_a_timer_whose_end_was_lost_ends_with_the_next_event_that_is_not_a_flush() -> None:
    events = [
        [1, 0, "fqto_in", "timer=0x1"],
        [2, 0, "ff_in", "iovad=0x1 pfn=0x7 size=2"],
        [3, 0, "map", "IOMMU: iova=0x1000 - 0x2000 paddr=0x5000 size=4096"],
    ]
    recorded = separate(events, [])
    assert recorded.own == [("map", 0x1000, 0x5000, 4096)]
    assert recorded.flushes[0].events == [("ff_in", 7, 2)]


def test_warnings_are_compared_by_function() -> None:
    assert warning_function("WARNING: at dma_iova_link+0x19c/0x350, CPU#0: python3/87") == "dma_iova_link"
    assert warning_function("__iommu_dma_iova_unlink: unmapped size differs") == "__iommu_dma_iova_unlink"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "no step in it: a step file has one JSON object a line"),
        (b'{"n":1}\n', "1: not a step: it needs a number n and a text cmd"),
        (b'{"n":1,"cmd":"buf 0 0"}\n{"n":', "2: not JSON: Expecting value: line 1 column 6 (char 5)"),
        (b'{"n":1,"cmd":"buf 0"}\n', "1: command 'buf 0' needs 3 words"),
        (b'{"n":1,"cmd":"\xff"}\n', "not text: byte 14 is not UTF-8"),
    ],
)
def test_bad_step_files_are_refused_with_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_steps(path)
    assert str(error.value) in (f"{path}: {message}", f"{path}:{message}")


def test_an_unknown_command_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"n":1,"cmd":"fly 0"}\n')
    with pytest.raises(InputError, match="unknown command 'fly 0': one of dev, mask, seg"):
        load_steps(path)


def test_a_truncated_archive_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.xz"
    path.write_bytes(lzma.compress(b'{"n":1,"cmd":"look 0"}\n' * 99)[:-20])
    with pytest.raises(InputError, match="the archive is truncated or broken"):
        load_steps(path)
    with pytest.raises(InputError, match="cannot be read: No such file or directory"):
        load_steps(tmp_path / "none.jsonl")


def test_step_records_are_told_from_other_json_lines() -> None:
    assert is_step_record(json.dumps({"n": 1, "cmd": "look 0"}))
    assert not is_step_record(json.dumps({"trace": "x", "granule": 4096}))
    assert not is_step_record("# tracer: nop")
