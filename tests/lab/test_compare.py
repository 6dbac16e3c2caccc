"""Compare: every byte right under every option, the same ledger twice, one path a request, honest winners."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dmakit.cli.main import run
from dmakit.lab.compare import Comparison, compare, run_strategy
from dmakit.lab.court import CASES, verdict
from dmakit.lab.inputs import Input, parse_spec, resolve
from dmakit.lab.options import EMBEDDED, Options
from dmakit.lab.rig import Rig
from dmakit.lab.sources import FioSource, source_of
from dmakit.lab.strategies import STRATEGIES
from dmakit.ledger import ROWS

SMALL = "bs=4k+64k,iodepth=4,n=24,rw=rw,jobs=2"


def fio(text: str) -> FioSource:
    source = source_of(Input(text, spec=parse_spec(text)))
    assert isinstance(source, FioSource)
    return source


def check(comparison: Comparison) -> None:
    """What holds of every comparison."""
    assert comparison.wrong == 0
    for result in comparison.results:
        if result.unavailable:
            continue
        assert result.faults == 0 and result.failed == 0
        assert len(result.paths.requests) == result.requests
        low, high = result.modelled_ns
        assert 0 <= low <= high


@pytest.mark.parametrize("iommu", ["vtd", "x86"])
@pytest.mark.parametrize("mode", ["lazy", "strict", "passthrough"])
@pytest.mark.parametrize("policy", ["linux", "augmented"])
def test_every_byte_is_right_in_every_mode(iommu: str, mode: str, policy: str) -> None:
    check(compare(fio(SMALL), Options(iommu=iommu, mode=mode, policy=policy).check()))


@pytest.mark.parametrize(
    "options",
    [
        Options(iommu="none"),
        Options(untrusted=True),
        Options(coherent=False),
        Options(coherent=False, mode="strict"),
        Options(sgl=False),
        Options(p2p="bus"),
        Options(p2p="bridge"),
        Options(checker=True),
        Options(defects=("7.2",)),
        EMBEDDED,
    ],
    ids=str,
)
@pytest.mark.parametrize("text", [SMALL, "bs=16k,offset=512,iodepth=3,n=12,rw=rw", "bs=8k,piece=2k,n=6,rw=rw"])
def test_every_byte_is_right_on_every_machine(options: Options, text: str) -> None:
    check(compare(fio(text), options.check()))


def test_buffers_of_less_than_a_page_fit_into_a_peers_memory() -> None:
    check(compare(fio("bs=512,n=2,frag=0"), Options(p2p="bus"), ["page", "two-step"]))


def test_the_same_input_options_and_seed_give_the_same_ledger() -> None:
    first, second = (compare(fio(SMALL), Options(mode="lazy", seed=3)) for _ in range(2))
    for one, two in zip(first.results, second.results, strict=True):
        assert one.ledger == two.ledger and one.setup == two.setup
        assert one.submission == two.submission and one.completion == two.completion


def test_the_requests_of_a_comparison_are_kept_once() -> None:
    results = compare(fio(SMALL), Options(untrusted=True).check()).results
    assert results[0].unavailable and len(results[-1].workload) == 24
    assert all(result.workload is results[-1].workload for result in results[1:])


def test_two_step_pays_one_window_and_one_sync_for_a_scattered_request() -> None:
    result = run_strategy("two-step", fio("bs=128k,n=16"), Options())
    assert result.ledger["try_alloc_calls"] == result.ledger["sync_calls"] == result.ledger["destroy_calls"] == 16
    assert result.ledger["link_calls"] == 16 * 32
    assert result.ledger["bookkeeping_bytes"] == 16 * 16


def test_a25_the_loop_is_measured_beside_the_others_and_can_win() -> None:
    case = CASES["loop-wins"]
    result = compare(FioSource("case", case.spec), case.options, ["page", "two-step"])
    check(result)
    prices = {r.name: r.modelled_ns for r in result.results}
    assert verdict(case, prices).startswith("page beats two-step: ")
    rows = ("iova_magazine", "iova_depot", "iova_tree", "pte_set_1", "inv_wait", "bookkeeping_bytes")
    assert all(row in r.ledger for r in result.results for row in rows)


@pytest.mark.parametrize("name", list(CASES))
def test_each_case_of_the_court_shows_what_it_is_there_for(name: str) -> None:
    case = CASES[name]
    names = [n for n in (case.winner, case.loser) if n] or ["page", "two-step", "premap"]
    result = compare(FioSource(f"case:{name}", case.spec), case.options, names)
    check(result)
    line = verdict(case, {r.name: r.modelled_ns for r in result.results})
    assert " NOT " not in line


def test_a30_one_segment_is_one_map_and_no_window_as_cheap_as_the_loop() -> None:
    options = Options()
    two_step = run_strategy("two-step", fio("bs=4k,n=40,iodepth=4"), options)
    page = run_strategy("page", fio("bs=4k,n=40,iodepth=4"), options)
    assert two_step.ledger["map_calls"] == 40 and two_step.ledger["try_alloc_calls"] == 0
    ignored = {"bookkeeping_bytes"}  # the driver keeps the address in the command, the loop in a list
    assert {k: v for k, v in two_step.ledger.items() if k not in ignored} == {
        k: v for k, v in page.ledger.items() if k not in ignored
    }


def test_e12_submission_and_completion_are_counted_apart() -> None:
    result = run_strategy("two-step", fio("bs=128k,n=8"), Options(mode="strict"))
    assert result.submission["link_calls"] == 8 * 32 and result.completion["link_calls"] == 0
    assert result.completion["inv_page"] == 8 and result.submission["inv_page"] == 0
    for row in ROWS:
        assert result.submission[row.name] + result.completion[row.name] <= result.ledger[row.name] or (
            row.name in ("walk_reads",)
        )


def test_premap_counts_its_registration_apart() -> None:
    result = run_strategy("premap", fio("bs=64k,iodepth=2,n=20"), Options())
    assert result.setup["link_calls"] == 2 * 16
    assert result.ledger["link_calls"] == result.ledger["map_calls"] == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compare", "nothing-here"], "there is no such file, and it is not a workload"),
        (["compare", "case:unknown"], "case:unknown: the cases are loop-wins"),
        (["compare", "bs=4q"], "'4q' is not a size"),
        (["compare", "bs=4k,bs=8k"], "bs is given twice"),
        (["compare", "bs=4k", "--iommu", "none", "--mode", "strict"], "--iommu none --mode strict: without an IOMMU"),
        (["compare", "bs=4k", "--untrusted", "--mode", "passthrough"], "--untrusted --mode passthrough: Linux gives"),
        (["compare", "bs=4k", "--p2p", "--no-coherent"], "--p2p bus --no-coherent: peer memory has no CPU caches"),
        (["compare", "bs=4k", "--platform", "embedded", "--iommu", "vtd"], "--platform embedded --iommu vtd"),
        (["compare", "bs=4k", "--defect", "nonsense"], "defect 'nonsense' is not known"),
        (["compare", "bs=4k", "--strategy", "best"], "--strategy best: must be one of direct, page"),
        (["compare", "bs=4k", "--boot", "x"], "--boot x: the input is a workload, not a trace"),
        (["explain", "bs=4k,n=4", "--request", "9"], "--request 9: requests here are numbered 0 to 3"),
        (["explain", "bs=4k,n=4", "--reason", "GAP"], "--reason GAP: no request has it"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv: list[str], message: str, capsys: Any) -> None:
    assert run(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_json_is_whole_or_absent(tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "result.json"
    assert run(["compare", "bs=8k,n=4", "--json", str(target)]) == 0
    document = json.loads(target.read_text())
    assert set(document) >= {"input", "platform", "options", "strategies"}
    assert [s["name"] for s in document["strategies"]] == list(STRATEGIES)
    for strategy in document["strategies"]:
        assert set(strategy) >= {"name", "requests", "bytes", "bytes_wrong", "ledger", "paths", "modelled_ns"}
        assert strategy["bytes_wrong"] == 0 and strategy["requests"] == 4
        assert set(strategy["modelled_ns"]) == {"low", "high", "profile"}
    assert run(["compare", "bs=8k,n=4", "--json", str(tmp_path / "no" / "where.json")]) == 2
    assert list(tmp_path.iterdir()) == [target]
    capsys.readouterr()


def test_a_trace_that_does_not_exist_and_the_bundled_one(tmp_path: Path) -> None:
    assert resolve(None).trace is not None and resolve(None).trace.exists()  # type: ignore[union-attr]
    assert resolve("bs=4k").spec is not None


def test_status_1_when_a_byte_differs(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A byte of the first request's buffer changes before the device reads it."""
    whole = Rig._make_device

    def with_a_flipped_byte(rig: Rig) -> Any:
        ((phys, _),) = rig.workload.requests[0].segments
        memory = rig.machine.memory
        rig.machine.clock.call_later(5_000, lambda: memory.write(phys + 77, bytes([memory.read(phys + 77, 1)[0] ^ 1])))
        return whole(rig)

    monkeypatch.setattr(Rig, "_make_device", with_a_flipped_byte)
    assert run(["compare", "bs=4k,n=2,rw=write", "--strategy", "page"]) == 1
    assert "bytes wrong: 1 of" in capsys.readouterr().out


def test_a31_every_slow_request_is_explained(capsys: Any) -> None:
    assert run(["explain", "bs=8k,piece=2k,n=3"]) == 0
    out = capsys.readouterr().out
    assert "per-segment: GAP_IN_MERGE_BOUNDARY  3 of 3 requests, SLOW path" in out
    assert "SLOW path: a segment starts or ends inside an IOMMU granule" in out
    assert "; to be fast: buffers whose interior segments start and end on the granule" in out
    assert out.count("\n") == 1
    assert run(["explain", "bs=8k,piece=2k,n=3", "--request", "1", "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["request"]["reason"] == "GAP_IN_MERGE_BOUNDARY" and len(document["request"]["segments"]) == 4


@pytest.mark.parametrize("mode", ["lazy", "strict"])
def test_every_strategy_frees_on_the_cpu_that_completes(mode: str) -> None:
    """One 4 KiB piece a request: each way takes and frees the same IOVAs, from and to the same per-CPU caches."""
    source, options = fio("bs=4k,iodepth=8,n=1200,rw=rw,jobs=2"), Options(mode=mode)
    page, sg, two_step = (run_strategy(name, source, options).ledger for name in ("page", "sg", "two-step"))
    assert page["iova_magazine"] > 100
    for row in (name for name in page if name.startswith("iova_")):
        assert (row, sg[row]) == (row, page[row]) == (row, two_step[row])
