"""What a portable test leaves out, and the list of it at the end of the run.

A portable test runs on every platform as it stands. Where it asks for what a platform declares not to have, ``gate``
ends it there; the run counts it as *gated* and names it at the end with the reason. The software machine lacks
nothing: a test that is gated there fails. A ledger row that a platform cannot observe is None there: ``UNOBSERVED``
stands for it in comparisons, and the end of the run names the rows, too.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any, NoReturn

import pytest
from hypothesis import currently_in_test_context, reject

GATE = "gated: "
ROWS = "unobserved rows"


def gate(reason: str) -> NoReturn:
    """End this test (an example that Hypothesis made: drop it): the platform declares not to have what it needs.

    AssertionError on the software machine.
    """
    test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)").removesuffix(" (setup)")
    if _platform(test) == "soft":
        raise AssertionError(f"the software machine has it all, yet {test} was gated: {reason}")
    if currently_in_test_context():
        reject()
    pytest.skip(GATE + reason)


def _platform(test: str) -> str:
    """The first parameter of a test's id; empty when it has none."""
    return test.partition("[")[2].split("-")[0].rstrip("]")


class _Unobserved:
    """The count that nobody can know: a comparison with it says nothing, so it holds."""

    def _holds(self, _other: object) -> bool:
        return True

    def _spreads(self, _other: object) -> _Unobserved:
        return self

    __eq__ = __ge__ = __le__ = __gt__ = __lt__ = __ne__ = _holds
    __add__ = __radd__ = __sub__ = __rsub__ = _spreads
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "unobserved"


UNOBSERVED: Any = _Unobserved()


def reason_of(report: Any) -> str:
    """Why a skipped test was gated; empty when it was skipped otherwise or not at all."""
    where = getattr(report, "longrepr", None)
    text = str(where[2] if isinstance(where, tuple) else where)
    found = re.match(rf"(?:Skipped: )?{GATE}(.*)", text, re.DOTALL)
    return found[1] if getattr(report, "skipped", False) and found else ""


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    """A gated test is neither passed nor skipped for want of something on this host."""
    return ("gated", "g", "GATED") if reason_of(report) else None


def _named(report: Any) -> tuple[str, str]:
    """The test without its parameters, and the platform among them."""
    context = getattr(report, "context", None)  # a guest test, in the words of tests/vm/test_boots.py
    if context is not None and context.msg:
        boot, _, inner = context.msg.partition(": ")
        return inner.partition("[")[0], f"{boot} {_platform(inner)}"
    return report.nodeid.partition("[")[0], _platform(report.nodeid)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """By reason: which tests were gated where; and which rows were compared nowhere but on the software machine."""
    by_reason: dict[str, Counter[tuple[str, str]]] = {}
    for report in terminalreporter.stats.get("gated", []):
        by_reason.setdefault(reason_of(report), Counter())[_named(report)] += 1
    for reason, names in sorted(by_reason.items()):
        terminalreporter.line(f"gated by a declared capability: {reason}")
        for test in sorted({test for test, _ in names}):
            places = ", ".join(
                f"{place} x{n}" if n > 1 else place for (t, place), n in sorted(names.items()) if t == test
            )
            terminalreporter.line(f"    {test} ({places})")
    rows: dict[str, set[str]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == ROWS:
                    rows.setdefault(_named(report)[0], set()).update(value.split())
    if rows:
        terminalreporter.line("ledger rows that VFIO cannot observe, not compared there:")
        for test, names_ in sorted(rows.items()):
            terminalreporter.line(f"    {test}: {', '.join(sorted(names_))}")
