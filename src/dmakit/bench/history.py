"""What earlier runs measured: each report is kept, so that a later run can show the change.

Reports lie in ``~/.cache/dmakit/bench`` (``XDG_CACHE_HOME``), one file a run. Only runs of the same form of the core
and of the same length are compared. The ratios that continuous integration holds a run to are in the package,
``data/bench_ratios.json``, row by row, those with a goal; a *gross loss* is a ratio that is worse by a factor of 2:
anything less may be the machine that the run shared with others.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).resolve().parents[1] / "data" / "bench_ratios.json"
GROSS = 2.0


def folder() -> Path:
    """Where reports are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmakit" / "bench"


def keep(report: dict[str, object], where: Path | None = None) -> Path | None:
    """Write a report beside the earlier ones; its path, None when the folder cannot be written."""
    path = (where or folder()) / f"{time.strftime('%Y%m%dT%H%M%S')}-{time.time_ns() % 10**9:09d}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    except OSError:
        return None
    return path


def earlier(report: dict[str, object], where: Path | None = None) -> dict[str, float]:
    """The last ratio of each row in the kept reports that can be compared with this one."""
    ratios: dict[str, float] = {}
    for path in sorted((where or folder()).glob("*.json")):
        try:
            old = json.loads(path.read_text())
            if old["core"] == report["core"] and old["short"] == report["short"]:
                ratios |= ratios_of(old)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return ratios


def ratios_of(report: dict[str, object], *, goals: bool = False) -> dict[str, float]:
    """Row id to ratio, of the rows that were measured; ``goals``: without those that only inform."""
    return {row["id"]: float(row["ratio"]) for row in rows_of(report, goals=goals) if row["ratio"] is not None}


def rows_of(report: dict[str, object], *, goals: bool = False) -> list[dict[str, Any]]:
    """A report's rows, those that only inform at the end; ``goals``: without them."""
    rows, more = report["rows"], report.get("informative", [])
    assert isinstance(rows, list) and isinstance(more, list)
    return rows if goals else rows + more


def errors(report: dict[str, object]) -> list[str]:
    """A line for each row that could not be measured."""
    return [f"row {row['id']} ({row['name']}): {row['error']}" for row in rows_of(report) if row["error"]]


def recorded(path: Path = RECORDED) -> dict[str, float]:
    """The ratios that a run is held to; none when nothing was recorded."""
    if not path.exists():
        return {}
    loaded: dict[str, float] = json.loads(path.read_text())
    return loaded


def losses(report: dict[str, object], base: dict[str, float]) -> list[str]:
    """A line for each row of ``base`` that lost more than a factor of GROSS, or was not measured."""
    rows = {row["id"]: row for row in rows_of(report, goals=True)}
    found: list[str] = []
    for name, old in base.items():
        if name not in rows:
            found.append(f"row {name}: recorded, but no such row was measured")
            continue
        row = rows[name]
        if row["ratio"] is None:
            found.append(f"row {row['id']} ({row['name']}): {row['error']}")
        elif (row["ratio"] / old if row["better"] == "lower" else old / row["ratio"]) > GROSS:
            found.append(f"row {row['id']} ({row['name']}): ratio {row['ratio']:.3g}, recorded {old:.3g}")
    return found
