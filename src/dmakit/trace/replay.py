"""Allocator replay: every recorded call of a trace on our allocator, IOVA for IOVA.

``replay_file`` tells what kind of file it has (ftrace text, golden vectors) and returns a ``Result``. A trace is
scanned (``columns``), its events paired to operations (``operations``), and these replayed domain by domain
(``search``).

What is known about a domain's state at the start decides what a difference means:

* *known*: its ``init_iova_domain`` is in the trace or the boot trace, and nothing says otherwise. A difference is a
  divergence.
* *unknown*: no set-up was recorded, the ring buffer overwrote its beginning, or ranges are freed that nobody
  allocated (the trace begins mid-life). Answers that depend on the unknown part are adopted, never called matched.
  The same holds from the first ``[LOST n EVENTS]`` on.
* *presumed*: set up, but the file does not prove that it begins at the beginning (no header, or fewer events than the
  header says): when already the first answer differs, the state was unknown.
"""

from __future__ import annotations

from pathlib import Path

from dmakit.errors import InputError
from dmakit.iova.domain import IovaDomain
from dmakit.trace.archive import first_bytes
from dmakit.trace.boot import chosen_boot
from dmakit.trace.columns import load
from dmakit.trace.events import missing_events
from dmakit.trace.golden import GoldenReplay, is_golden_file
from dmakit.trace.operations import FOREVER, Operation, OperationReader
from dmakit.trace.result import Result
from dmakit.trace.search import OrderSearch

_LIVE = ("alloc", "free", "free_node")


def file_kind(path: str | Path) -> str:
    """``trace`` (ftrace text), ``golden`` (golden vectors) or ``jsonl`` (another file of JSON lines)."""
    if first_bytes(path, 64).lstrip()[:1] != b"{":
        return "trace"
    return "golden" if is_golden_file(path) else "jsonl"


def replay_file(path: str | Path, *, boot: str | Path | None = None) -> Result:
    """Replay a trace or golden vectors. InputError for a file that is neither or cannot be read."""
    kind = file_kind(path)
    if kind == "golden":
        return GoldenReplay(path).run()
    if kind == "jsonl":
        raise InputError(f"{path}: JSON lines, but no golden vectors (no trace line first)")
    return TraceReplay(path, chosen_boot(path, boot)).run()


class TraceReplay:
    """Replays one trace behind its boot trace."""

    def __init__(self, path: str | Path, boot: Path | None = None) -> None:
        self.trace = load(path)
        self.boot = load(boot) if boot is not None else None
        self.result = Result(str(path), "trace", malformed_lines=self.trace.malformed)
        self.operations = self._read()
        self.cpus = self._number_cpus()
        self.searches: dict[int, OrderSearch] = {}
        self.unproven = not self.trace.whole

    def _read(self) -> list[Operation]:
        operations: list[Operation] = []
        offset = 0
        if self.boot is not None:
            operations = OperationReader(self.boot).read()
            offset = self.boot.records + 1
            for op in operations:
                op.end = min(op.end, offset)
        operations += OperationReader(self.trace, offset).read()
        possible = [op for op in operations if op.possible]
        if len(possible) < len(operations):
            self.result.notes.append(f"{len(operations) - len(possible)} calls with impossible numbers left out")
        return possible

    def _number_cpus(self) -> int:
        """Give the CPUs that act the numbers 0, 1, …; returns how many CPUs are on line."""
        seen = sorted({cpu for op in self.operations for cpu in op.cpus})
        number = {cpu: i for i, cpu in enumerate(seen)}
        for op in self.operations:
            if len(op.cpus) == 1 and op.kind != "offline" and number[op.cpus[0]] == op.cpus[0]:
                continue
            op.cpus = tuple(dict.fromkeys(number[cpu] for cpu in op.cpus))
            if op.kind == "offline":
                op.size = number.get(op.size, 0)
        return max(len(seen), self.trace.cpus if self.trace.header is not None else 1, 1)

    def run(self) -> Result:
        """Replay all operations in the order of time."""
        unknown = self._mid_life()
        moments = []
        for key, op in enumerate(self.operations):
            if op.end < FOREVER:
                moments += [(op.begin, 0, key), (op.end, 1, key)]
        for _, at_end, key in sorted(moments):
            op = self.operations[key]
            for search in self._searches(op, bool(at_end), unknown):
                if at_end:
                    search.end(key)
                else:
                    search.begin(key, op)
        self._sum()
        self._notes()
        return self.result

    def _searches(self, op: Operation, at_end: bool, unknown: set[int]) -> list[OrderSearch]:
        """The domains that ``op`` acts on."""
        if op.kind in ("lost", "depot") and op.iovad == 0:
            if op.kind == "depot":
                return list(self.searches.values())
            for search in self.searches.values() if at_end else ():
                search.lose()
            return []
        if op.kind == "put" or (op.kind == "init" and not at_end):
            if op.iovad in self.searches and (op.kind == "init" or at_end):
                self._retire(op.iovad)
            if op.kind == "init":
                self._open(op, op.iovad not in unknown)
            return []
        if op.kind == "init":
            return []
        if op.iovad not in self.searches:
            self._open(op, False)
        return [self.searches[op.iovad]]

    def _open(self, op: Operation, known: bool) -> None:
        set_up = op.kind == "init"
        granule, start = (op.size, op.pfn or 1) if set_up else (4096, 1)
        domain = IovaDomain(granule=granule, start_pfn=start, cpus=self.cpus)
        self.searches[op.iovad] = OrderSearch(domain, known=known and set_up, presumed=self.unproven)

    def _mid_life(self) -> set[int]:
        """Domains in which a range is freed that nobody allocated: the trace begins in the middle of their life."""
        if self.trace.whole:
            return set()
        if self.trace.overwritten:
            return {op.iovad for op in self.operations}
        found: set[int] = set()
        given: set[tuple[int, int]] = set()
        for op in sorted(self.operations, key=lambda op: op.begin if op.kind == "alloc" else op.end):
            if op.kind == "lost":
                break
            if op.kind == "alloc" and op.pfn:
                given.add((op.iovad, op.pfn))
            elif op.kind in _LIVE and op.pfn and (op.iovad, op.pfn) not in given:
                found.add(op.iovad)
        return found

    # The report ------------------------------------------------------------------------------------------------------

    def _retire(self, iovad: int) -> None:
        self._add(self.searches.pop(iovad))

    def _sum(self) -> None:
        for iovad in list(self.searches):
            self._retire(iovad)
        self.result.lost_events = int(sum(self.trace.lost["count"].tolist()))

    def _add(self, search: OrderSearch) -> None:
        counts, result = search.counts, self.result
        result.allocations += counts.allocations
        result.matched += counts.matched
        result.adopted += counts.adopted
        result.operations += counts.operations
        result.overlapping += counts.overlapping
        result.reordered += min(branch.reordered for branch in search.branches)
        result.width = max(result.width, counts.width)
        result.capped = result.capped or counts.capped
        result.domains += counts.operations > 0
        for divergence in counts.divergences:
            result.note_divergence(divergence)
        if counts.unknown_frees and search.known:
            result.notes.append(f"{counts.unknown_frees} frees of ranges that were not allocated")

    def _notes(self) -> None:
        trace, notes = self.trace, self.result.notes
        if trace.recording is not None:
            notes += trace.recording.notes()
        if self.boot is not None:
            notes.append(f"set-up of the domains from {self.boot.path}")
        if self.result.adopted:
            notes.append("adopted: answers that depend on a state from before the trace or behind lost events")
        if trace.malformed:
            notes.append(trace.malformed_text)
        if self.result.lost_events:
            notes.append(f"{self.result.lost_events} events lost in {len(trace.lost)} places")
        if trace.sorted_by_stamp:
            notes.append("the lines were not in the order of time and were sorted by stamp")
        if not self.result.allocations:
            notes.append("no allocator events: nothing to replay (passthrough, or see: dmakit record --help)")
            return
        present = set(trace.present()) | set(self.boot.present() if self.boot else ())
        notes += [f"without {' or '.join(n.events)} events: {n.lost}" for n in missing_events(present, "replay")]
