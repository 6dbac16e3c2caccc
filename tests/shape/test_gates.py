"""Gating: counted and named on a platform that declares a lack, a failure on the software machine."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

PORTABLE = """
import pytest
from hypothesis import given, strategies
from tests.support.gates import gate

@pytest.mark.parametrize("lacking", ["nothing", "type1", "both", "soft"])
@pytest.mark.parametrize("platform", ["soft", "type1", "iommufd"])
def test_it(lacking, platform):
    if platform == lacking or lacking == "both" and platform != "soft":
        gate("it has none")

@pytest.mark.parametrize("platform", ["soft", "type1"])
@given(example=strategies.integers(0, 9))
def test_examples(platform, example):
    if example % 2:
        gate("no odd ones")
"""


def test_a_test_may_be_gated_where_something_is_lacking_and_never_on_soft(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(PORTABLE)
    result = pytester.runpytest("-p", "tests.support.gates", "-rf", "-W", "ignore")
    assert result.parseoutcomes() == {"passed": 9, "gated": 3, "failed": 2}
    result.stdout.fnmatch_lines(
        [
            "*AssertionError: the software machine has it all, yet *::test_it?soft-soft? was gated: it has none",
            "*AssertionError: the software machine has it all, yet *::test_examples?soft? was gated: no odd ones",
            "gated by a declared capability: it has none",
            "*::test_it (iommufd, type1 x2)",
        ]
    )
