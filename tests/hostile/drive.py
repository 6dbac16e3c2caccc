"""Start children on one core or both, go on after a crash, and put their answers side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def answers(core: str, modules: list[str], seed: int, share: int) -> tuple[list[dict[str, Any]], list[str]]:
    """What every call did, and the calls that killed the process (with the end of its traceback)."""
    found: list[dict[str, Any]] = []
    crashes: list[str] = []
    first = 0
    env = {**os.environ, "DMAKIT_CORE": core, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "note"
        while True:
            note.write_bytes(b"0 (before the first call)".ljust(400))
            command = [
                sys.executable,
                "-m",
                "tests.hostile.child",
                str(note),
                str(seed),
                str(share),
                str(first),
                *modules,
            ]
            run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
            lines = [json.loads(line) for line in run.stdout.splitlines() if line.endswith("}")]
            found += [line for line in lines if "call" in line]
            if run.returncode == 0:
                return found, crashes
            text = note.read_text().strip()
            crashes.append(f"exit {run.returncode} in call {text}\n{run.stderr[-1500:]}")
            first = max(int(text.split()[0]), first + 1)
            if len(crashes) > 60 or text.startswith("0 "):
                return found, crashes
