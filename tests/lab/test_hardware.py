"""``compare`` on a real controller: here the model behind a fake host's VFIO, the same code as on hardware."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console
from tests.support.vfio.devices import FakeNvme
from tests.support.vfio.host import FakeHost

from dmakit.cli import main
from dmakit.errors import InputError
from dmakit.lab import hardware_report
from dmakit.lab.hardware import STRATEGIES, HardwareComparison, Target, compare_on_hardware
from dmakit.lab.hardware_report import COLUMNS
from dmakit.lab.inputs import resolve
from dmakit.lab.relocate import depth_of, memory_needed, moved
from dmakit.lab.request_table import IoRequest, Layout, Requests
from dmakit.lab.schedule import COMPLETE, SUBMIT
from dmakit.lab.sources import source_of
from dmakit.lab.workload import Workload
from dmakit.memory.pages import PageAllocator
from dmakit.memory.physical import PhysicalMemory
from dmakit.nvme import auto
from dmakit.nvme.costs import Costs, Line
from dmakit.nvme.namespace import Namespace
from dmakit.reasons import Reason

BDF = "0000:00:04.0"


def host(**options: Any) -> FakeHost:
    return FakeHost([FakeNvme(BDF, namespaces=[Namespace(1, 16384)])], **options)


def compared(kernel: FakeHost, text: str | None, names: list[str] | None = None, **options: Any) -> HardwareComparison:
    return compare_on_hardware(source_of(resolve(text)), Target(BDF, kernel=kernel, **options), names)


@pytest.mark.parametrize("backend", ["iommufd", "type1"])
@pytest.mark.parametrize("sgl", [True, False])
def test_every_strategy_moves_the_same_bytes(backend: str, sgl: bool) -> None:
    kernel = host()
    found = compared(kernel, "bs=4k+36k,iodepth=4,rw=rw,frag=1,offset=512,n=40", backend=backend, sgl=sgl)
    assert [result.name for result in found.results] == list(STRATEGIES)
    for result in found.results:
        assert (result.wrong, result.failed, result.requests, result.unavailable) == (0, 0, 40, "")
        assert result.size == found.results[0].size
        assert result.ledger["inv_page"] is None
        assert result.ledger["pte_set_1"] is None
    assert found.backend == backend
    assert kernel.left() == {"files": 0, "pinned": 0}


def test_premap_makes_no_system_call_a_request() -> None:
    found = compared(host(), "bs=16k,iodepth=2,frag=1,n=12")
    page, premap, two_step = (found.named(name) for name in ("page", "premap", "two-step"))
    assert page is not None and premap is not None and two_step is not None
    assert (premap.ledger["domain_maps"], premap.ledger["domain_unmaps"]) == (0, 0)
    assert page.ledger["domain_maps"] == 12 * 4
    assert two_step.ledger["domain_maps"] == 12 * 4 + 1  # a page for PRP lists, once
    assert two_step.ledger["iova_free_magazine"] == 12
    assert premap.buffers == 2
    assert list(two_step.paths.counts()) == ["two-step"]
    assert list(premap.paths.counts()) == ["registered"]


def test_bytes_that_differ_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    original = Namespace.read

    def flipped(self: Namespace, *args: Any) -> Any:
        nonlocal reads
        reads += 1
        found = original(self, *args)
        return bytes([found[0] ^ 1]) + found[1:] if reads == 3 else found

    monkeypatch.setattr(Namespace, "read", flipped)
    found = compared(host(), "bs=4k,iodepth=1,rw=read,n=8", ["page"])
    assert found.wrong == 1
    assert found.results[0].wrong == 1


def test_a_recorded_trace_runs_on_pages_of_ours() -> None:
    source = source_of(resolve(None))
    recorded = source.place(None)  # type: ignore[arg-type]
    memory = PhysicalMemory(1 << 30)
    memory.add_region(1 << 20, 1 << 29)
    there = moved(recorded, PageAllocator(memory, 1 << 20, 1 << 29))
    assert memory_needed(recorded) <= 1 << 29
    for old, new in zip(recorded.requests, there.requests, strict=True):
        assert [size for _, size in old.segments] == [size for _, size in new.segments]
        assert [phys % 4096 for phys, _ in old.segments] == [phys % 4096 for phys, _ in new.segments]
        joins = [[a + n == b for (a, n), (b, _) in zip(r.segments, r.segments[1:], strict=False)] for r in (old, new)]
        assert joins[0] == joins[1]
    assert list(there.schedule) == list(recorded.schedule)


def test_neighbours_stay_neighbours_and_strangers_strangers() -> None:
    memory = PhysicalMemory(1 << 26)
    memory.add_region(1 << 20, 1 << 25)
    requests = Requests([IoRequest(0, "read", Layout.of(((0x5000_0200, 0x1E00), (0x7000_0000, 0x1000))))])
    workload = Workload("two runs", requests, [(SUBMIT, 0), (COMPLETE, 0)])
    there = moved(workload, PageAllocator(memory, 1 << 20, 1 << 25))
    assert there.requests[0].segments == ((0x10_0200, 0x1E00), (0x10_3000, 0x1000))
    assert depth_of(workload) == 1


def test_what_a_recorded_driver_mapped_beside_blocks_is_left_out_and_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = source_of(resolve(None))
    sizes = [request.size for request in source.place(None).requests]  # type: ignore[arg-type]
    odd = sum(size % 512 != 0 for size in sizes)
    found = compared(host(), None, ["premap"])
    (result,) = found.results
    assert odd > 0 and (result.left_out, result.requests) == (odd, len(sizes) - odd)
    assert (result.wrong, result.failed) == (0, 0)
    assert result.size == sum(size for size in sizes if size % 512 == 0)
    hardware_report.print_hardware(found)
    assert f"\nleft out: {odd} requests that are no whole blocks\n" in capsys.readouterr().out


def test_a_workload_without_a_whole_block_is_refused() -> None:
    kernel = FakeHost([FakeNvme(BDF, namespaces=[Namespace(1, 16384, block_size=4096)])])
    with pytest.raises(InputError, match=r"^a request of 512 bytes: must be a multiple of the 4096-byte block$"):
        compared(kernel, "bs=512,iodepth=1,n=4", ["page"])


@pytest.mark.parametrize(("width", "lines"), [(80, 2), (130, 1)])
def test_no_figure_is_cut_on_a_narrow_terminal(width: int, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    narrow = Console(file=shown, width=width, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(hardware_report, "console", lambda: narrow)
    comparison = compared(host(), "bs=64k,iodepth=2,rw=randrw,frag=1,n=10")
    for result in comparison.results:  # times as they are on a busy machine
        result.map_ns, result.unmap_ns, result.quartiles = 555e3, 101e3, (609e3, 2354e3)
        result.spent_ns = 1_031_000 * result.requests
    hardware_report.print_hardware(comparison)
    text = shown.getvalue()
    assert "…" not in text and "bytes wrong: 0 of 3,276,800" in text
    head, rows = text.split("here\n\n")[1].split("\npage ")
    assert len(head.splitlines()) == lines
    rows = f"page {rows}".splitlines()[: len(STRATEGIES)]
    assert [row.split()[0] for row in rows] == list(STRATEGIES)
    assert all(len(row.split()) == len(hardware_report.COLUMNS) and len(row) <= width for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--platform", "vfio:" + BDF],
         f"--platform vfio:{BDF}: writes on the controller's namespace 1, from block 0 on: add --yes"),
        (["--platform", "vfio:" + BDF, "--yes", "--mode", "lazy"],
         f"--platform vfio:{BDF} --mode: the host's IOMMU and its device are what they are"),
        (["--platform", "mainframe"], "--platform mainframe: must be one of server, embedded, vfio:BDF"),
        (["--platform", "vfio:" + BDF, "--yes", "--strategy", "direct"],
         "--strategy direct: on hardware it must be one of page, sg, two-step, premap, auto"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["compare", *words]) == 2
    assert capsys.readouterr().err == f"dmakit: {message}\n"


def test_a_namespace_that_is_too_small_is_refused() -> None:
    kernel = FakeHost([FakeNvme(BDF, namespaces=[Namespace(1, 64)])])
    with pytest.raises(
        InputError, match="the namespace has 64 blocks, and 8 requests in flight of 65536 bytes need 1024"
    ):
        compared(kernel, "bs=64k,iodepth=8,n=16")
    assert kernel.left() == {"files": 0, "pinned": 0}


@pytest.mark.parametrize("backend", ["iommufd", "type1"])
def test_auto_chooses_and_says_what_it_measured(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Costs(Line(1000, 500, 0), Line(0, 0, 0), Line(1000, 1500, 0))
    monkeypatch.setattr(auto.AutoMapper, "measured", lambda self: setattr(self, "costs", made) or made)
    found = compared(host(), "bs=16k,iodepth=2,frag=1,n=20", ["auto"], backend=backend)
    (result,) = found.results
    assert (result.wrong, result.failed, result.requests, result.buffers) == (0, 0, 20, 2)
    assert result.paths.counts() == {
        "two-step": {Reason.RENT_BELOW_PRICE: 4},
        "registered": {Reason.RENT_ABOVE_PRICE: 16},
    }
    assert result.ledger["domain_maps"] == 4 * 4 + 2 * 4  # windows, registrations
    assert result.choice == {"costs": made.report(), "unmeasured": None, "evictions": 0}
    assert list(result.commands) == list(range(20))
    assert found.report()["strategies"][0]["auto"] == result.choice  # type: ignore[index]
    assert result.spent_ns > 0 and result.mean_ns == result.spent_ns / 20


def test_explain_says_which_was_chosen_and_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Costs(Line(1100, 500, 0), Line(100, 0, 0), Line(13000, 1500, 0), took_ns=1_500_000, rounds=5)
    monkeypatch.setattr(auto.AutoMapper, "measured", lambda self: setattr(self, "costs", made) or made)
    monkeypatch.setattr("dmakit.platform.linux.machine.Kernel", host)
    words = ["explain", "bs=16k,iodepth=1,frag=1,n=20", "--platform", f"vfio:{BDF}", "--yes"]
    assert main.run(words) == 0
    windows, first, registered, eighth, costs = capsys.readouterr().out.splitlines()
    assert windows.startswith(
        "two-step: RENT_BELOW_PRICE  6 of 20 requests, fast path: auto: the buffer's windows have not"
    )
    assert registered.startswith(
        "registered: RENT_ABOVE_PRICE  14 of 20 requests, fast path: auto: the buffer's windows"
    )
    figures = "window: 3.1 us a request, registered: 0.1 us, registration: 19.0 us once: premapped from use 7 on"
    assert (first, eighth) == (f"    request 0: {figures}", f"    request 6: {figures}")
    assert costs == (
        "us measured here: a window 1.10 + 0.50 a piece + 0.000 a page; a use of registered memory 0.10 + 0.00 a piece "
        "+ 0.000 a page; a registration 13.00 + 1.50 a piece + 0.000 a page (5 rounds, 1.5 ms)"
    )
    assert main.run([*words, "--request", "6", "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["request"]["path"], document["request"]["reason"]) == ("registered", "RENT_ABOVE_PRICE")
    assert document["auto"]["costs"] == made.report() and document["lines"][0]["figures"] == figures
    assert main.run(["explain", "--platform", f"vfio:{BDF}"]) == 2
    assert capsys.readouterr().err == (
        f"dmakit: --platform vfio:{BDF}: writes on the controller's namespace 1, from block 0 on: add --yes\n"
    )


def test_compare_shows_auto_beside_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dmakit.platform.linux.machine.Kernel", host)
    words = ["compare", "bs=16k,iodepth=2,frag=1,n=20", "--platform", f"vfio:{BDF}", "--yes"]
    assert main.run([*words, "--strategy", "auto", "--strategy", "two-step"]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.startswith(("auto ", "two-step "))]
    assert [row[0] for row in rows if len(row) == len(COLUMNS)] == ["auto", "two-step"]
    assert "bytes wrong: 0 of 655,360" in text and "auto: us measured here: a window " in text
