"""A pytest plugin for the guest: one line of JSON a test, written as it happens, so that a guest that dies leaves word.

A line: ``{"id": node id, "outcome": "started"|"passed"|"failed"|"skipped", "text": why, "seconds": duration}``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

REPORT = "report.jsonl"


def write(identity: str, outcome: str, text: str = "", seconds: float = 0.0) -> None:
    """Append one line to the report, if the boot asked for one."""
    if folder := os.environ.get("DMAKIT_VM_REPORT"):
        line = json.dumps({"id": identity, "outcome": outcome, "text": text, "seconds": round(seconds, 3)})
        with Path(folder, REPORT).open("a") as file:
            file.write(f"{line}\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    write(nodeid, "started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        where = report.longrepr
        write(report.nodeid, "skipped", str(where[2] if isinstance(where, tuple) else where))
    elif report.failed:
        write(report.nodeid, "failed", f"{report.longreprtext}\n{report.capstdout}{report.capstderr}", report.duration)
    elif report.when == "call":
        write(report.nodeid, "passed", seconds=report.duration)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        write(report.nodeid, "failed", report.longreprtext)
