"""The scanner: line shapes of trace, trace_pipe and trace-cmd, of old and new kernels, and what is wrong in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmakit.errors import MisuseError
from dmakit.trace.columns import Trace, load
from dmakit.trace.events import ABSENT, EVENTS
from dmakit.trace.scanner import Scanner

TRACES = Path(__file__).parent.parent / "data" / "kernel-traces"
AF_OUT = (
    "af_out: (iommu_dma_alloc_iova+0xf1/0x120 <- alloc_iova_fast) "
    "iovad=0xff1ac38384bb9800 size=4 limit=0xfffff pfn=0xfff32"
)


def scan(tmp_path: Path, *lines: str) -> Trace:
    path = tmp_path / "trace.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return load(path)


@pytest.mark.parametrize(
    ("head", "pid", "cpu", "context", "stamp"),
    [
        ("             fio-201     [003] ...1.       101449: ", 201, 3, ".", 101449),
        ("          <idle>-0       [001] d.h2.     9.063265: ", 0, 1, "h", 9_063_265_000),
        ("     a [7] b-c-17      [012] 12.000000001: ", 17, 12, "", 12_000_000_001),
        ("           fio-201     (  200) [000] d..1   3.5: ", 201, 0, ".", 3_500_000_000),
        ("           fio-201     (-------) [000] 3: ", 201, 0, "", 3),
        ("    we: ird-name-9 [000] .Ns1. 77: ", 9, 0, "s", 77),
        ("fio-201 [000] 101449.000123: iova:", 201, 0, "", 101449_000123000),
    ],
)
def test_headers_of_every_recorder(tmp_path: Path, head: str, pid: int, cpu: int, context: str, stamp: int) -> None:
    trace = scan(tmp_path, head + AF_OUT)
    table = trace.table("af_out")
    assert trace.malformed == 0
    assert (int(table.pid[0]), int(table.cpu[0]), int(table.stamp[0])) == (pid, cpu, stamp)
    assert int(table.context[0]) == (ord(context) if context else 0)
    assert [int(table[name][0]) for name in ("iovad", "size", "limit", "pfn")] == [
        0xFF1AC38384BB9800,
        4,
        0xFFFFF,
        0xFFF32,
    ]


HEAD = "  fio-201     [003] ...1.       7: "


def one(tmp_path: Path, kind: str, payload: str) -> dict[str, object]:
    trace = scan(tmp_path, HEAD + payload)
    assert (trace.malformed, trace.others, trace.records) == (0, 0, 1), trace.malformed_text
    table = trace.table(kind)
    how = {field.column: field.how for field in next(e for e in EVENTS if e.name == kind).fields}
    found: dict[str, object] = {}
    for column in how:
        value = int(table[column][0])
        found[column] = (
            trace.elements(table, column, 0)
            if how[column] == "l"
            else trace.word(value)
            if how[column] in "st"
            else value
        )
    return found


def test_static_events_of_new_and_old_kernels(tmp_path: Path) -> None:
    new = "0000:00:04.0 dir=TO_DEVICE dma_addr=ffdb6000 size=4096 phys_addr=14115000 attrs=MMIO|PRIVILEGED"
    want = {
        "dev": "0000:00:04.0",
        "dir": "TO_DEVICE",
        "dma_addr": 0xFFDB6000,
        "size": 4096,
        "phys_addr": 0x14115000,
        "attrs": "MMIO|PRIVILEGED",
    }
    for name in ("dma_map_phys", "dma_map_page", "dma_map_resource"):
        assert one(tmp_path, "dma_map_phys", f"{name}: {new}") == want
    old = "dma_map_sg: x dir=NONE dma_addrs={0xfff3f900,0x1000} sizes={0x200,0x10} phys_addrs={0x978a900} attrs="
    assert one(tmp_path, "dma_map_sg", old) == {
        "dev": "x", "dir": "NONE", "nents": ABSENT, "ents": ABSENT, "dma_addrs": [0xFFF3F900, 0x1000],
        "sizes": [0x200, 0x10], "phys_addrs": [0x978A900], "attrs": "",
    }  # fmt: skip
    capped = old.replace("dma_addrs", "nents=128/200 ents=2/2 [TRUNCATED] dma_addrs")
    assert one(tmp_path, "dma_map_sg", capped)["nents"] == 128
    assert one(tmp_path, "map", "map: IOMMU: iova=0x1000 - 0x3000 paddr=0xa000 size=8192") == {
        "iova": 0x1000, "end": 0x3000, "paddr": 0xA000, "size": 8192,
    }  # fmt: skip
    assert one(tmp_path, "block_rq_issue", "block_rq_issue: 254,0 RA 15360 () 40706 + 30 be,0,4 [sh]") == {
        "dev": "254,0", "rwbs": "RA", "bytes": 15360, "sector": 40706, "sectors": 30,
    }  # fmt: skip
    done = one(tmp_path, "block_rq_complete", "block_rq_complete: 0,0 N () 18446744073709551615 + 1 none,0,0 [-5]")
    assert (done["sector"], done["error"]) == (2**64 - 1, 2**64 - 5)
    flush = "cache_tag_flush_range: dmar0 dmar0[0] type iotlb did 4 [0x0-0xffffffffffffffff] addr 0x0 mask 0x34"
    assert one(tmp_path, "cache_tag_flush_range", flush) == {
        "iommu": "dmar0", "type": "iotlb", "did": 4, "start": 0, "end": 2**64 - 1, "addr": 0, "mask": 0x34,
    }  # fmt: skip
    assert one(tmp_path, "qi_submit", "qi_submit: iotlb_inv dmar0: 0x400e2 0x5 0x0 0x0")["qw1"] == 5
    bounced = "swiotlb_bounced: dev_name: 0000:00:04.0 dma_mask=ff dev_addr=4cae000 size=8 FORCE"
    assert one(tmp_path, "swiotlb_bounced", bounced)["force"] == "FORCE"


def test_dynamic_events_under_any_name_and_order(tmp_path: Path) -> None:
    assert one(tmp_path, "af_in", "af: (alloc_iova_fast+0x4/0x3e0) iovad=0x10 size=1 limit=0xfffff") == {
        "iovad": 16, "size": 1, "limit": 0xFFFFF, "flush": ABSENT,
    }  # fmt: skip
    by_symbol = "p_alloc_0: (alloc_iova_fast+0x4/0x3e0) limit=0xfffff size=1 iovad=0x10 flush=1"
    assert one(tmp_path, "af_in", by_symbol)["flush"] == 1
    returned = "r_alloc_0: (iommu_dma_alloc_iova+0xf1/0x120 <- alloc_iova_fast) iovad=0x10 size=1 limit=0x5 pfn=0x4"
    assert one(tmp_path, "af_out", returned)["pfn"] == 4
    assert (
        one(tmp_path, "sync_out", 'sync_out: (a+0x1/0x2 <- dma_iova_sync) dev="x y" addr=0x1 off=0 size=4 ret=-22')[
            "ret"
        ]
        == 2**64 - 22
    )
    assert one(tmp_path, "mark", "tracing_mark_write: PHASE a b: c")["text"] == "PHASE a b: c"


def test_every_line_is_in_one_count(tmp_path: Path) -> None:
    trace = scan(
        tmp_path,
        "# tracer: nop",
        "# entries-in-buffer/entries-written: 4/9   #P:2",
        "",
        HEAD + AF_OUT,
        HEAD + "sched_switch: prev_comm=a",
        "CPU:1 [LOST 123 EVENTS]",
        HEAD + "af_out: (x+0x1/0x2 <- alloc_iova_fast) iovad=0x1 size=1",
        "garbage",
        HEAD + "no colon here",
        HEAD + "ff_in: (free_iova_fast+0x4/0x180) iovad=0x1 pfn=0x1ffffffffffffffff size=1",
        HEAD + "ff_in: (free_iova_fast+0x4/0x180) iovad=zz pfn=0x1 size=1",
        "CPU:0 [7 EVENTS DROPPED]",
    )
    assert (trace.lines, trace.records, trace.others, trace.notes, trace.malformed) == (12, 3, 1, 3, 5)
    assert trace.lost["count"].tolist() == [123, 7]
    assert [number for number, _ in trace.bad] == [7, 8, 9, 10, 11]
    assert trace.bad[1][1] == "garbage"
    assert (trace.header, trace.overwritten, trace.whole, trace.cpus) == ((4, 9, 2), True, False, 2)


def test_unsorted_files_are_put_into_the_order_of_stamps(tmp_path: Path) -> None:
    lines = [f"  fio-1 [000] ...1. {stamp}: ff_in: (f+0/0) iovad=0x1 pfn={stamp} size=1" for stamp in (5, 9, 2, 9, 4)]
    trace = scan(tmp_path, *lines)
    table = trace.table("ff_in")
    assert trace.sorted_by_stamp
    assert table["pfn"].tolist() == [2, 4, 5, 9, 9]
    assert table.line.tolist() == [3, 5, 1, 2, 4]
    assert table.seq.tolist() == [0, 1, 2, 3, 4]


def test_a_chunk_boundary_changes_nothing(tmp_path: Path) -> None:
    text = b"".join((HEAD + f"ff_in: (f+0/0) iovad=0x1 pfn={i} size=1\n").encode() for i in range(9))
    whole, half = Scanner(), Scanner()
    assert whole.scan(text) == 9
    cut = text.index(b"\n", len(text) // 2) + 1

    def columns(scanner: Scanner, rows: int) -> list[list[int]]:
        """The fields of every row; words are ids, the same in every chunk."""
        (kind,) = scanner.present()
        block, count = scanner.block(kind)
        assert count == rows
        return [block[i * rows : (i + 1) * rows].tolist() for i in range(6, len(block) // rows)]

    first = half.scan(text[:cut])
    begun = columns(half, first)
    assert first + half.scan(text[cut:], first + 1) == 9
    assert [a + b for a, b in zip(begun, columns(half, 9 - first), strict=True)] == columns(whole, 9)


@pytest.mark.parametrize("kind", [-1, 256, 1 << 31, 1 << 63, 1 << 64])
def test_a_kind_that_no_row_can_have_is_refused(kind: int) -> None:
    scanner = Scanner()
    assert scanner.scan((HEAD + "ff_in: (f+0/0) iovad=0x1 pfn=1 size=1\n").encode()) == 1
    with pytest.raises(MisuseError, match=f"^kind={kind}: must be from 0 to 255$"):
        scanner.block(kind)
    assert (len(scanner.block(255)[0]), scanner.block(255)[1]) == (0, 0)


def test_a_real_trace_is_read_to_the_last_line() -> None:
    trace = load(TRACES / "smp2-lazy.trace.txt.xz")
    assert (trace.lines, trace.records, trace.others, trace.malformed) == (58_897, 58_885, 0, 0)
    assert trace.whole
    counts = {name: len(table) for name, table in trace.tables.items()}
    assert (counts["af_out"], counts["link_out"], counts["map"], counts["mark"]) == (3_087, 8_250, 10_370, 16)
    assert sum(len(table) for table in trace.tables.values()) == trace.records
    seqs = sorted(seq for table in trace.tables.values() for seq in table.seq.tolist())
    assert seqs == list(range(trace.records))


def test_a_trace_that_begins_with_a_marker_of_lost_events(tmp_path: Path) -> None:
    trace = scan(
        tmp_path,
        "CPU:1 [LOST 123 EVENTS]",
        "t-1 [001] d.... 9.000001: map: IOMMU: iova=0x1000 - 0x3000 paddr=0xa000 size=8192",
    )
    assert (trace.marked, trace.lost.cpu.tolist(), trace.lost.stamp.tolist()) == (123, [1], [0])
    assert len(trace.table("map")) == 1
