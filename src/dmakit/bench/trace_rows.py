"""Rows of the trace room and of whole commands; the peer of each is measured beside it.

13: trace text into columns, against ``re.finditer`` with a pattern made for one kind of line, each on the lines that
it reads (events a second against events a second). 14 and 15: whole commands in a process of their own, bytecode
already compiled as it is for a user, against the least that a process can do of the same kind.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from time import perf_counter_ns

from dmakit.bench.row import Bench, Row
from dmakit.lab.inputs import bundled
from dmakit.trace.archive import read_all
from dmakit.trace.columns import columns_of

STRESS = "smp4-stress.trace.txt.xz"
_LINES = 40_000
_PATTERN = re.compile(
    rb"^ *(.+)-(\d+) +\[(\d+)\] (.{5}) +(\d+): af_out: \(\S+ <- \S+\) "
    rb"iovad=0x([0-9a-f]+) size=(\d+) limit=0x([0-9a-f]+) pfn=0x([0-9a-f]+)$",
    re.MULTILINE,
)
_ALLOCATION = (
    b"             fio-%d     [%03d] ...1. %12d: af_out: (iommu_dma_alloc_iova+0xf1/0x120 <- alloc_iova_fast) "
    b"iovad=0xff1ac38384bb9800 size=%d limit=0xfffff pfn=0x%x\n"
)


def recorded(name: str) -> Path:
    """A recorded trace: of the checkout, otherwise the one that every installation has."""
    path = Path(__file__).resolve().parents[3] / "tests" / "data" / "kernel-traces" / name
    return path if path.exists() else bundled()


def columns(bench: Bench) -> tuple[float, float]:
    """ns a line: the scanner on a recorded trace of every kind of line, and the pattern on allocations alone."""
    text = bench.once("trace text", lambda: read_all(recorded(STRESS))[: 1 << (24 if bench.compiled else 17)])
    lines = bench.once("trace lines", lambda: text.count(b"\n"))
    count = bench.scaled(_LINES)
    plain = bench.once(
        "allocations",
        lambda: b"".join(_ALLOCATION % (200 + i % 4, i % 4, i, 1 << i % 6, 0xFFFFF - i) for i in range(count)),
    )
    ours = bench.timed(lambda: columns_of(text), lines)
    return ours, bench.timed(lambda: _by_pattern(plain), count)


def _by_pattern(text: bytes) -> list[list[int]]:
    """What a script would do: one pattern, numbers into lists."""
    rows: list[list[int]] = [[] for _ in range(7)]
    for found in _PATTERN.finditer(text):
        _, pid, cpu, _, stamp, iovad, size, limit, pfn = found.groups()
        values = (int(pid), int(cpu), int(stamp), int(iovad, 16), int(size), int(limit, 16), int(pfn, 16))
        for row, value in zip(rows, values, strict=True):
            row.append(value)
    return rows


def _command(*words: str, shell: str = "") -> float:
    """ns that a command takes, its output thrown away."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begin = perf_counter_ns()
    subprocess.run(shell or words, shell=bool(shell), env=kept, stdout=subprocess.DEVNULL, check=True)
    return float(perf_counter_ns() - begin)


def _beside(bench: Bench, verb: tuple[str, ...], peer: tuple[str, ...], shell: str = "") -> tuple[float, float]:
    ours = (sys.executable, "-m", "dmakit", *verb)
    bench.once(f"warm {verb}", lambda: _command(*ours) + _command(*peer, shell=shell))
    return _command(*ours), _command(*peer, shell=shell)


def replay(bench: Bench) -> tuple[float, float]:
    """ns: the command, and decompressing the file and counting its lines."""
    path = recorded(STRESS)
    return _beside(bench, ("replay", str(path)), (), f"xz -dc '{path}' | wc -l")


def compare(bench: Bench) -> tuple[float, float]:
    """ns: the command without arguments, and the import of NumPy."""
    return _beside(bench, ("compare",), (sys.executable, "-c", "import numpy"))


def show_help(bench: Bench) -> tuple[float, float]:
    """ns: the command, and an interpreter that does nothing."""
    return _beside(bench, ("--help",), (sys.executable, "-c", "pass"))


ROWS = [
    Row("13", "trace text into columns", "ns/line", 9, "higher", "own", columns),
    Row("14", "dmakit replay of smp4-stress against xz -dc | wc -l", "ns", 6, "lower", "own", replay),
    Row("15a", "dmakit compare against import numpy", "ns", 20, "lower", "own", compare),
    Row("15b", "dmakit --help against an empty interpreter", "ns", 5, "lower", "own", show_help),
]
