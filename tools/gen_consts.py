"""Write src/dmakit/consts.pxd from src/dmakit/consts.py (``--check`` only compares)."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "dmakit"


def rendered() -> str:
    """The text of consts.pxd that belongs to today's consts.py."""
    names = runpy.run_path(str(PACKAGE / "consts.py"))
    lines = ["# Written by tools/gen_consts.py from consts.py; do not edit.", "", "cdef enum:"]
    for name, value in names.items():
        if name.isupper() and isinstance(value, int):
            if not 0 <= value < 1 << 31:
                raise SystemExit(f"{name} = {value}: a constant must fit in 31 bits")
            lines.append(f"    {name} = {value}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    target = PACKAGE / "consts.pxd"
    if "--check" in sys.argv[1:]:
        sys.exit(0 if target.read_text() == rendered() else f"{target} is out of date: run {sys.argv[0]}")
    target.write_text(rendered())
