"""The ground floor: constants in step with their .pxd, ledger declaration, fail points, clock, sizes."""

from __future__ import annotations

import subprocess
import sys
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmakit import consts
from dmakit.clock import MS, VirtualClock
from dmakit.errors import DmakitError, InputError, MisuseError
from dmakit.failpoint import FailPoint
from dmakit.ledger import ROWS, Ledger, difference
from dmakit.reasons import RULES, PathLog, Reason
from dmakit.units import format_size, parse_size

ROOT = Path(__file__).resolve().parents[2]


def test_consts_pxd_is_written_from_consts_py() -> None:
    run = subprocess.run([sys.executable, "tools/gen_consts.py", "--check"], cwd=ROOT, check=False)
    assert run.returncode == 0


def test_ledger_declares_every_row_once() -> None:
    assert [row.index for row in ROWS] == list(range(consts.N_LEDGER))
    assert len({row.name for row in ROWS}) == consts.N_LEDGER


def test_ledger_counts_and_resets() -> None:
    ledger = Ledger(2)
    before = ledger.snapshot()
    ledger.count(consts.L_IOVA_TREE)
    ledger.count(consts.L_BOUNCED_BYTES, 512)
    delta = {name: n for name, n in difference(ledger.snapshot(), before).items() if n}
    assert delta == {"iova_tree": 1, "bounced_bytes": 512}
    ledger.reset()
    assert not any(ledger.snapshot().values())


def test_failpoint_strikes_once_at_the_nth_use() -> None:
    point = FailPoint()
    assert [point.hit() for _ in range(3)] == [False] * 3
    point.arm(2)
    assert [point.hit() for _ in range(5)] == [False, False, True, False, False]
    assert point.fired


def test_clock_fires_timers_in_order_and_timers_may_arm_timers() -> None:
    clock, seen = VirtualClock(), []
    clock.call_later(2 * MS, lambda: seen.append(("b", clock.now)))
    clock.call_later(1 * MS, lambda: (seen.append(("a", clock.now)), clock.call_later(MS, lambda: seen.append("c"))))
    cancelled = clock.call_later(1, lambda: seen.append("never"))
    clock.cancel(cancelled)
    clock.advance(2 * MS)
    assert seen == [("a", MS), ("b", 2 * MS), "c"]
    assert clock.pending() == 0


def test_sizes_read_and_write() -> None:
    assert [parse_size(t) for t in ("4096", "128k", "2MiB", "0x10", "1G")] == [4096, 131072, 2 << 20, 16, 1 << 30]
    assert [format_size(n) for n in (131072, 5000, 0, 1 << 40)] == ["128K", "5000", "0", "1T"]
    with pytest.raises(InputError, match=r"^'12q' is not a size: write a number with an optional k, m, g or t"):
        parse_size("12q")


def test_every_reason_has_a_rule() -> None:
    assert set(RULES) == set(Reason)


def test_a_request_takes_one_path() -> None:
    log = PathLog(("fast", "slow"), frozenset({"fast"}))
    log.take(1, "fast", Reason.SINGLE_SEGMENT)
    log.take(2, "slow", Reason.NO_IOMMU)
    with pytest.raises(ValueError, match=r"^request 2 already took path 'slow'$"):
        log.take(2, "fast", Reason.COALESCED)
    assert log.counts() == {"fast": {Reason.SINGLE_SEGMENT: 1}, "slow": {Reason.NO_IOMMU: 1}}
    assert log.slow() == 1


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3), (0, 1, 5, 2, 6), (9, 0, 1)])
def test_a_path_log_keeps_the_order_of_requests(numbers: tuple[int, ...]) -> None:
    log = PathLog(("a", "b"), frozenset({"a"}))
    for n in numbers:
        log.take(n, "b" if n % 2 else "a", Reason.COALESCED if n % 3 else Reason.NO_IOMMU)
    expected = {n: (n % 2, Reason.COALESCED if n % 3 else Reason.NO_IOMMU) for n in numbers}
    assert dict(log.requests) == expected and list(log.requests) == list(numbers)
    assert log.slow() == sum(n % 2 for n in numbers)
    for n in numbers:
        with pytest.raises(ValueError, match=rf"^request {n} already took path"):
            log.take(n, "a", Reason.NONE)


@given(st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 40), max_size=30), st.booleans()), max_size=6))
def test_a_path_log_of_many_is_one_of_each(calls: list[tuple[bool, set[int], bool]]) -> None:
    log, expected = PathLog(("a", "b"), frozenset({"a"})), dict[int, tuple[int, Reason]]()
    for together, drawn, backwards in calls:
        numbers = sorted(drawn - set(expected), reverse=backwards)
        codes = [(n % 2) << 8 | (Reason.COALESCED if n % 3 else Reason.NO_IOMMU) for n in numbers]
        if together:
            log.take_all(memoryview(array("Q", numbers)), memoryview(array("Q", codes)))
        else:
            for n, code in zip(numbers, codes, strict=True):
                log.take(n, "ab"[code >> 8], Reason(code & 255))
        expected |= {n: (code >> 8, Reason(code & 255)) for n, code in zip(numbers, codes, strict=True)}
    assert list(log.requests.items()) == list(expected.items())
    assert len(log.requests) == len(expected) and log.slow() == sum(n % 2 for n in expected)
    assert all((n in log.requests) == (n in expected) for n in range(41))


def test_a_path_log_with_a_failed_request_stays_small() -> None:
    log = PathLog(("a",), frozenset({"a"}))
    count = 100_000
    for first in range(0, 10 * count, count):
        numbers = array("Q", (n for n in range(first, first + count) if n != 77))
        log.take_all(memoryview(numbers), memoryview(array("Q", bytes(8 * len(numbers)))))
    assert len(log.requests) == 10 * count - 1 and 77 not in log.requests
    assert not log._others and log._taken.itemsize * len(log._taken) == 2 * 10 * count


def test_the_base_error_is_not_raised_and_errnos_have_names() -> None:
    with pytest.raises(TypeError):
        DmakitError("no")
    assert MisuseError("x", 98).errno_name == "EADDRINUSE"


def test_only_a_timer_is_cancelled() -> None:
    clock, mine = VirtualClock(), [1, 2]
    for handle, kind in ((mine, "list"), ([], "list"), (None, "NoneType"), (memoryview(b"x"), "memoryview")):
        with pytest.raises(MisuseError, match=rf"^cancel: a {kind} is no timer: must be what call_later gave$"):
            clock.cancel(handle)  # type: ignore[arg-type]
    assert mine == [1, 2]
