"""Gating: counted and named on a platform that declares a lack, a failure on the software machine."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

PORTABLE = """
import pytest
from tests.support.gates import gate

@pytest.mark.parametrize("lacking", ["nothing", "type1", "both", "soft"])
@pytest.mark.parametrize("platform", ["soft", "type1", "iommufd"])
def test_it(lacking, platform):
    if platform == lacking or lacking == "both" and platform != "soft":
        gate("it has none")
"""


def test_a_test_may_be_gated_where_something_is_lacking_and_never_on_soft(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(PORTABLE)
    result = pytester.runpytest("-p", "tests.support.gates", "-rf", "-W", "ignore")
    assert result.parseoutcomes() == {"passed": 8, "gated": 3, "failed": 1}
    result.stdout.fnmatch_lines(
        [
            "the software machine has it all, yet test_it*soft-soft* was gated: it has none",
            "gated by a declared capability: it has none",
            "*::test_it (iommufd, type1 x2)",
        ]
    )
