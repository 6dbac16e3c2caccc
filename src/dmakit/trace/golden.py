"""Golden vectors: the kernel allocator's own answers, one JSON object a line, replayed call by call.

``{"trace", granule, start_pfn, cpus}`` starts a new domain; ``alloc`` (cpu, len, limit, flush, pfn; 0 = failed) is
``alloc_iova_fast``, ``free`` (cpu, len, pfn) ``free_iova_fast``, ``reserve`` (lo, hi and the tree afterwards),
``state`` (nodes with the anchor, magazines in depots, max32_alloc_size) a check. Lines that are none of these, or
whose numbers cannot be, are counted as malformed. The recorder had no overlapping calls and no delayed depot work, so
there is nothing to search.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmakit.errors import ExhaustedError, InputError, MisuseError
from dmakit.iova.domain import IovaDomain
from dmakit.trace.archive import first_bytes, line_chunks
from dmakit.trace.result import Result

Line = dict[str, Any]


def is_golden_file(path: str | Path) -> bool:
    """Whether the first line is the head of golden vectors."""
    try:
        head = json.loads(first_bytes(path, 65536).split(b"\n")[0])
    except ValueError:
        return False
    return isinstance(head, dict) and {"trace", "granule", "start_pfn"} <= head.keys()


class GoldenReplay:
    """Replays the lines of one file."""

    def __init__(self, path: str | Path) -> None:
        self.result = Result(str(path), "golden")
        self.domain: IovaDomain | None = None
        self.trace = ""
        self.number = 0
        self.bad: list[str] = []
        self.steps: dict[str, Callable[[IovaDomain, Line], None]] = {
            "alloc": self._alloc,
            "free": self._free,
            "reserve": self._reserve,
            "state": self._state,
        }

    def run(self) -> Result:
        """Replay all lines."""
        for chunk in line_chunks(self.result.file):
            for text in chunk.splitlines():
                self.number += 1
                if text.strip():
                    self._line(text)
        if not self.result.domains:
            raise InputError(f"{self.result.file}: no domain is set up: golden vectors begin with a trace line")
        if self.bad:
            shown = "; ".join(self.bad[:3])
            self.result.notes.append(f"{len(self.bad)} malformed lines ({shown})")
        self.result.malformed_lines = len(self.bad)
        return self.result

    def _line(self, text: bytes) -> None:
        try:
            line = json.loads(text)
            if "trace" in line:
                self._head(line)
            elif self.domain is None:
                raise MisuseError("no trace line before it")
            else:
                self.steps[line["op"]](self.domain, line)
                self.result.operations += 1
        except (ValueError, KeyError, TypeError, AttributeError, MisuseError) as error:
            reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
            self.bad.append(f"line {self.number}: {reason}")

    def _head(self, line: Line) -> None:
        self.domain = None
        self.domain = IovaDomain(granule=line["granule"], start_pfn=line["start_pfn"], cpus=line.get("cpus", 1))
        self.trace = str(line["trace"])
        self.result.domains += 1

    def _differs(self, domain: IovaDomain, what: str, kernel: object, ours: object) -> None:
        self.result.note_divergence(
            {
                "line": self.number,
                "trace": self.trace,
                "operation": what,
                "kernel": kernel,
                "ours": ours,
                "nodes": domain.node_count,
                "depots": domain.depot_sizes(),
                "max32_alloc_size": domain.max32_alloc_size,
            }
        )

    def _alloc(self, domain: IovaDomain, line: Line) -> None:
        size, limit, kernel, cpu = int(line["len"]), int(line["limit"]), int(line["pfn"]), int(line["cpu"])
        try:
            pfn = domain.alloc_fast(size, limit, bool(line["flush"]), cpu=cpu)
        except ExhaustedError:
            pfn = 0
        self.result.allocations += 1
        if pfn == kernel:
            self.result.matched += 1
            return
        self._differs(domain, f"alloc size={size} limit={limit:#x} on cpu {cpu}", kernel, pfn)
        if pfn:
            domain.free_fast(pfn, size, cpu=cpu)
        if kernel:
            domain.adopt(kernel, size if size > 32 else 1 << (size - 1).bit_length())

    def _free(self, domain: IovaDomain, line: Line) -> None:
        domain.free_fast(int(line["pfn"]), int(line["len"]), cpu=int(line["cpu"]))

    def _reserve(self, domain: IovaDomain, line: Line) -> None:
        domain.reserve(int(line["lo"]), int(line["hi"]))
        if "tree" in line:
            self._check(domain, "the tree after reserve", line["tree"], [list(pair) for pair in domain.nodes()])

    def _state(self, domain: IovaDomain, line: Line) -> None:
        ours = {
            "nodes": domain.node_count + 1,  # the kernel's tree counts the anchor
            "depot_mags": sum(domain.depot_sizes()),
            "max32_alloc_size": domain.max32_alloc_size,
        }
        for name, value in ours.items():
            if name in line:
                self._check(domain, name, line[name], value)

    def _check(self, domain: IovaDomain, what: str, kernel: object, ours: object) -> None:
        self.result.checks += 1
        if kernel != ours:
            self._differs(domain, what, kernel, ours)
