"""The pages about this room say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from dmakit.dma.defects import DEFECTS
from dmakit.dma.iova_state import IovaState

DOCS = Path(__file__).parents[2] / "docs"


def test_a36_every_call_and_errno_of_the_two_step_api_is_documented() -> None:
    page = (DOCS / "two_step.md").read_text()
    for call in ("try_alloc", "link", "sync", "unlink", "destroy", "free"):
        assert f"dma_iova_{call}" in page
        assert call == "try_alloc" or hasattr(IovaState, call)
    for errno in ("EIO", "EADDRINUSE", "ENXIO", "EINVAL", "ERANGE", "EOVERFLOW", "EOPNOTSUPP", "EPERM", "ENOMEM"):
        assert re.search(rf"\| .*{errno}.* \|", page), errno


def test_the_table_of_defects_is_the_one_in_the_code() -> None:
    rows = re.findall(r"^\| (\S+) \| `(\S+)` \| (.*?) \| (.*?) \| (.*?) \|$", (DOCS / "fidelity.md").read_text(), re.M)
    assert rows == [(d.number, d.name, ", ".join(d.versions), d.text, d.instead) for d in DEFECTS]
