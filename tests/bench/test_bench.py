"""The benchmark suite: shapes, arithmetic and history; no timing is asserted."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmakit import _core
from dmakit.bench import bitmap_rows, history, iommu_rows, machine_rows, suite, thread_rows, threads, yardsticks
from dmakit.bench.iommu_rows import map_pages, small_pages, unmap_pages
from dmakit.bench.native import _walk_unchecked
from dmakit.bench.row import Bench, Row
from dmakit.cli.main import run
from dmakit.iommu.bitmap import Bitmap
from dmakit.iova.domain import IovaDomain
from dmakit.platform.soft import Machine


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dmakit" / "bench"


@pytest.fixture
def two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        Row("10", "slow peer", "ns", 3.0, "higher", "own", lambda bench: (2.0, 8.0)),
        Row("2a", "half of it", "ns", 0.5, "lower", "own", lambda bench: (3.0, 4.0), times=2.0),
    ]
    monkeypatch.setattr(suite, "all_rows", lambda: sorted(rows, key=suite.order))


GOALS = """
1   <= 0.45 E    2   <= 2.3 2E    3a >= 1500 own  3b  <= 150 E    4   <= 2.8 F    5   <= 2.2 F    6a  <= 1.1 E
6b  <= 6.5 2E    7a  <= 14 E      7b <= 28 E      8   <= 1.6 W    9a  <= 9 E      9b  <= 9 E      10a >= 0.9 M
10b >= 0.9 own   10c >= 2 own     11a >= 18 own   11b >= 0.35 M   12a <= 3 F      12b <= 0.5 E    12c <= 0.5 E
13  >= 9 own     14  <= 6 own     15a <= 20 own   15b <= 5 own    16  <= 40 E
"""


def test_the_rows_are_the_table_of_goals() -> None:
    words = GOALS.split()
    wanted = [" ".join(words[at : at + 4]) for at in range(0, len(words), 4)]
    rows = suite.all_rows()
    found = []
    for row in (row for row in rows if row.goal is not None):
        sign = {"lower": "<=", "higher": ">="}[row.better]
        measure = row.yardstick if row.times == 1 else f"{row.times:g}{row.yardstick}"
        found.append(f"{row.id} {sign} {row.goal:g} {measure}")
    assert found == wanted
    assert [row.id for row in rows if row.goal is None] == [
        "D1", "T0", "T1", "T1d", "T1m", "T1p", "T2", "T2d", "T2m", "T2p", "T4", "T4d", "T4m", "T4p"
    ]  # fmt: skip
    assert all(row.yardstick in yardsticks.NAMES and row.unit and row.name for row in rows)
    assert set(history.recorded()) == {text.split()[0] for text in wanted}


def test_every_module_of_rows_is_in_the_suite() -> None:
    folder = Path(suite.__file__).parent
    assert {module.__name__.rpartition(".")[2] for module in suite.MODULES} == {
        p.stem for p in folder.glob("*_rows.py")
    }


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("module", [bitmap_rows, iommu_rows])
def test_every_row_over_pages_can_be_measured_interpreted(module: Any, short: bool) -> None:
    """Interpreted a row does less, so its numbers of pages are no round ones."""
    bench = Bench(short=short, compiled=False)
    for row in module.ROWS:
        figure = suite.measured(row, bench, 1)
        assert figure.error is None, row.id
        assert figure.ratio is not None and figure.ratio > 0


def test_rows_4_and_5_make_and_free_the_tables() -> None:
    bench = Bench(short=True, compiled=False)
    domain = small_pages(bench, "runs")
    map_pages(bench)  # the tables above stay
    before = int(domain.tables.in_use)
    for measure in (map_pages, unmap_pages):
        made = domain.ledger.snapshot()["tables_allocated"]
        assert measure(bench) > 0
        assert domain.ledger.snapshot()["tables_allocated"] > made
        assert int(domain.tables.in_use) == before


def test_thread_rows_count_pairs_and_name_the_cores() -> None:
    bench = Bench(short=True, compiled=False, cores=tuple(os.sched_getaffinity(0))[:1])
    for row in thread_rows.ROWS:
        figure = suite.measured(row, bench, 1)
        assert (figure.error, figure.met) == (None, None)
        assert figure.note is not None and "M pairs/s in all" in figure.note
        assert ("threads on 1 cores" in figure.note) == (int(row.id[1]) > 1)
    plain = bench.once("threads alone", IovaDomain).ledger.snapshot()
    assert plain["iova_failed"] == 0
    assert plain["iova_magazine"] + plain["iova_tree"] == plain["iova_free_magazine"] > 0


def test_machine_rows_map_and_unmap_everything_on_as_many_devices_as_they_say() -> None:
    for row in machine_rows.ROWS:
        bench = Bench(short=True, compiled=False)
        figure = suite.measured(row, bench, 1)
        assert (figure.error, figure.met) == (None, None)
        assert figure.note is not None and figure.note.endswith(" M requests/s in all")
        counts = [made.ledger.snapshot() for key, made in bench.kept.items() if isinstance(made, Machine)]
        threads_of = int(row.id[1])
        assert len(counts) == (1 if row.id.endswith("d") else threads_of)
        rounds = (
            2 * 3 * (threads_of + 1)
        )  # measured twice: two that warm up and one, of all threads and of the one beside
        assert sum(count["link_calls"] for count in counts) == rounds * 8 * 32
        assert all(count["pte_set_1"] == count["pte_clear_1"] > 0 for count in counts)


def test_a_thread_that_fails_is_an_error_not_a_hang() -> None:
    def broken(cpu: int) -> threads.Rounds:
        if cpu == 1:
            raise ValueError("cpu 1")
        return lambda rounds: None

    with pytest.raises(ValueError, match=r"^cpu 1$"):
        threads.elapsed(Bench(), 3, 1, broken)


def test_a_thread_that_cannot_start_is_an_error_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of three threads may not go to its core: the two at the barrier are let go."""

    def refuse(pid: int, cores: set[int]) -> None:
        if cores == {2}:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    released = threading.Timer(10, os._exit, (3,))  # a hang ends the run rather than the patience
    released.start()
    with pytest.raises(OSError, match=r"^\[Errno 22\] Invalid argument$"):
        threads.elapsed(Bench(cores=(0, 1, 2)), 3, 1, lambda number: lambda rounds: None)
    released.cancel()


def test_yardsticks_are_positive_and_the_walk_translates() -> None:
    bench = Bench(short=True, compiled=False)
    assert all(measure(bench) > 0 for measure in yardsticks.MEASURES.values())
    words, addresses = yardsticks.walked_tables(50)
    for n in range(50):
        assert _walk_unchecked(words, 4096, addresses[n : n + 1]) == addresses[n]


def test_numpy_peers_do_the_same_work() -> None:
    bitmap = Bitmap(64 * 500)
    bitmap.set_many(np.random.default_rng(5).integers(0, bitmap.bits, 300, dtype=np.uint64))
    words = np.frombuffer(bitmap.words, np.uint64)
    assert bitmap_rows.numpy_count(words) == bitmap.count()
    assert bitmap_rows.numpy_by_bytes(words).tolist() == list(bitmap.pages())
    assert bitmap_rows.numpy_by_words(words).tolist() == list(bitmap.pages())


def test_ratio_and_goal() -> None:
    bench = Bench(short=True, compiled=False)
    low = suite.measured(Row("1", "x", "ns", 0.4, "lower", "own", lambda b: (3.0, 4.0), times=2.0), bench)
    assert (low.ratio, low.met, low.spread) == (0.375, True, (0.375, 0.375))
    high = suite.measured(Row("1", "x", "ns", 1.4, "higher", "own", lambda b: (3.0, 4.0)), bench)
    assert high.ratio == pytest.approx(4 / 3)
    assert not high.met
    empty = suite.measured(Row("1", "x", "ns", 9.0, "lower", "E", lambda b: b.yardsticks["E"] * 2), bench)
    assert empty.ratio is not None and empty.ratio > 0


def test_a_row_that_fails_says_why() -> None:
    figure = suite.measured(Row("1", "x", "ns", 1.0, "lower", "E", lambda b: 1 / 0), Bench(True, False))
    assert (figure.ratio, figure.met, figure.error) == (None, False, "ZeroDivisionError: division by zero")


def test_choosing_rows() -> None:
    rows = [Row(i, "x", "ns", 1.0, "lower", "E", lambda b: 1.0) for i in ("1", "10a", "10b", "2")]
    assert [row.id for row in suite.chosen(rows, ["10"])] == ["10a", "10b"]
    assert [row.id for row in suite.chosen(rows, ["1", "10b"])] == ["1", "10b"]
    assert len(suite.chosen(rows, [])) == 4
    two = [row.id for row in suite.chosen(suite.all_rows(), ["T2"])]
    assert two == ["T2", "T2d", "T2m", "T2p"]
    assert [row.id for row in suite.chosen(suite.all_rows(), ["T"])][:2] == ["T0", "T1"]


def test_a_statement_is_executed_that_often() -> None:
    seen: list[int] = []
    assert Bench().statement("add(1)", number=30, add=seen.append) > 0
    assert seen == [1] * 30


def test_the_report_and_the_change(
    two_rows: None, own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(history, "recorded", dict)
    assert run(["bench", "--short", "--repetitions", "1", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["machine", "core", "short", "yardsticks", "rows", "informative"]
    assert set(report["yardsticks"]) == {"E", "F", "W", "M"}
    names = ["id", "name", "value", "unit", "ratio", "yardstick", "goal", "better", "met"]
    assert all(list(row) == [*names, "spread", "times", "error", "note"] for row in report["rows"])
    text = (Path(__file__).parents[2] / "docs" / "bench.md").read_text()
    assert all(f"`{key}`" in text for key in [*report, *report["rows"][0]])
    assert [(row["id"], row["ratio"], row["met"]) for row in report["rows"]] == [("2a", 0.375, True), ("10", 4.0, True)]
    assert len(list(own_cache.glob("*.json"))) == 1
    assert run(["bench", "--short", "--repetitions", "1", "2"]) == 0
    shown = capsys.readouterr().out
    assert "half of it" in shown and "slow peer" not in shown
    assert "≤ 0.5 2own" in shown and "+0%" in shown
    assert ("runs interpreted" in shown) == (report["core"] != "compiled")


def test_gross_losses() -> None:
    row = {"id": "1", "name": "x", "ratio": 5.0, "better": "lower", "error": None}
    report: dict[str, object] = {"rows": [row]}
    assert history.losses(report, {"1": 2.6}) == []
    assert history.losses(report, {"1": 2.6, "2": 0.1}) == ["row 2: recorded, but no such row was measured"]
    assert history.losses(report, {}) == []
    assert history.losses(report, {"1": 2.4}) == ["row 1 (x): ratio 5, recorded 2.4"]
    row["better"] = "higher"
    assert history.losses(report, {"1": 9.0}) == []
    assert history.losses(report, {"1": 11.0}) == ["row 1 (x): ratio 5, recorded 11"]
    row |= {"ratio": None, "error": "no memory"}
    assert history.losses(report, {"1": 1.0}) == ["row 1 (x): no memory"]


def test_a_row_without_a_goal_is_shown_and_kept_but_not_held_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row(
        "T9", "tells", "ns", None, "lower", "own", lambda b: (2.0, 1.0), note=lambda b, value: f"{value:g} is two"
    )
    held = Row("1", "holds", "ns", 3.0, "lower", "own", lambda b: (2.0, 1.0))
    monkeypatch.setattr(suite, "all_rows", lambda: [held, row])
    monkeypatch.setattr(history, "recorded", lambda: {"1": 2.0})
    assert run(["bench", "--short", "--repetitions", "1", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [[row["id"] for row in report[part]] for part in ("rows", "informative")] == [["1"], ["T9"]]
    assert history.earlier(report) == {"1": 2.0, "T9": 2.0}
    path = tmp_path / "ratios.json"
    assert run(["bench", "--short", "--repetitions", "1", "--record", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "1 of 1 goals met" in shown and "T9: 2 is two" in shown
    assert json.loads(path.read_text()) == {"1": 2.0}


@pytest.mark.parametrize("form", [[], ["--short"]])
@pytest.mark.parametrize("goal", [1.0, None])
def test_a_row_that_fails_makes_status_1(
    form: list[str], goal: float | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        Row("1", "works", "ns", 3.0, "lower", "own", lambda b: (2.0, 1.0)),
        Row("T5", "breaks", "ns", goal, "lower", "own", lambda b: (1 / 0, 1.0)),
    ]
    monkeypatch.setattr(suite, "all_rows", lambda: rows)
    monkeypatch.setattr(history, "recorded", lambda: {"1": 2.0})
    assert run(["bench", "--repetitions", "1", *form]) == 1
    line = "dmakit bench: not measured: row T5 (breaks): ZeroDivisionError: division by zero\n"
    assert capsys.readouterr().err.endswith(line)
    assert run(["bench", "--repetitions", "1", *form, "1"]) == 0


def test_a_recorded_row_that_is_gone_is_a_loss_of_the_short_form(
    two_rows: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(history, "recorded", lambda: {"2a": 0.4, "2b": 0.4, "10": 4.0})
    compiled = _core.status()["running"] == "compiled"
    line = "dmakit bench: gross loss: row 2b: recorded, but no such row was measured\n"
    for argv, status in (([], 1), (["2"], 1), (["10"], 0)):
        assert run(["bench", "--short", "--repetitions", "1", *argv]) == (status if compiled else 0)
        assert capsys.readouterr().err.endswith(line) == (compiled and status == 1)


def test_broken_reports_are_passed_over(own_cache: Path) -> None:
    own_cache.mkdir(parents=True)
    (own_cache / "1.json").write_text("{")
    (own_cache / "2.json").write_text('{"core": "compiled"}')
    report: dict[str, object] = {"core": "compiled", "short": False, "rows": [{"id": "1", "ratio": 2.0}]}
    assert history.earlier(report) == {}
    history.keep(report)
    assert history.earlier(report) == {"1": 2.0}
    assert history.earlier({**report, "short": True}) == {}


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["99"], "bench 99: no such row"),
        (["--repetitions", "0"], "--repetitions 0: must be at least 1"),
        (["10", "--core", "4000"], "--core 4000: Invalid argument"),
        (
            ["10", "--short", "--repetitions", "1", "--json", "/nonexistent/x"],
            "--json /nonexistent/x: cannot write there",
        ),
    ],
)
def test_bad_options(two_rows: None, argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *argv]) == 2
    assert text in capsys.readouterr().err
