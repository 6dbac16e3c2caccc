"""Allocator replay: every recorded call of a trace on our allocator, IOVA for IOVA.

``replay_file`` tells what kind of file it has (ftrace text, golden vectors) and returns a ``Result``. A trace streams
through in bounded memory: it is scanned (``stream``), its events paired to operations (``operations``), these wait
until everything about them is known (``timeline``), and are replayed domain by domain (``search``).

What is known about a domain's state at the start decides what a difference means (``tally``):

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
from dmakit.trace.archive import first_bytes, is_read_once
from dmakit.trace.boot import chosen_boot
from dmakit.trace.events import missing_events
from dmakit.trace.golden import GoldenReplay, is_golden_file
from dmakit.trace.midlife import MidLife
from dmakit.trace.operation import OPEN, Operation
from dmakit.trace.operations import OperationReader
from dmakit.trace.result import Result
from dmakit.trace.search import OrderSearch
from dmakit.trace.stream import WINDOW, Facts, Progress, Surprise, TraceStream
from dmakit.trace.tally import Counts, Tally
from dmakit.trace.timeline import Timeline

_WHOLE, _PRESUMED, _UNKNOWN = range(3)  # verdicts, and the places of their tallies


def file_kind(path: str | Path) -> str:
    """``trace`` (ftrace text, or anything that can be read only once), ``golden`` (golden vectors) or ``jsonl``
    (another file of JSON lines)."""
    if is_read_once(path) or first_bytes(path, 64).lstrip()[:1] != b"{":
        return "trace"
    return "golden" if is_golden_file(path) else "jsonl"


def replay_file(path: str | Path, *, boot: str | Path | None = None, progress: Progress | None = None) -> Result:
    """Replay a trace (``-``: standard input) or golden vectors. InputError for a file that is neither or cannot be
    read. ``progress`` is told the number of records scanned."""
    kind = file_kind(path)
    if kind == "golden":
        return GoldenReplay(path).run()
    if kind == "jsonl":
        raise InputError(f"{path}: JSON lines, but no golden vectors (no trace line first)")
    return TraceReplay(path, chosen_boot(path, boot), progress=progress).run()


class TraceReplay:
    """Replays one trace behind its boot trace. ``window``: records within which a call must return to be paired."""

    def __init__(
        self, path: str | Path, boot: Path | None = None, *, window: int = WINDOW, progress: Progress | None = None
    ) -> None:
        self.files = [path] if boot is None else [boot, path]
        self.window = window
        self.progress = progress

    def run(self) -> Result:
        """The result. A file that its head did not tell everything about is read again, with its facts known."""
        facts: list[Facts | None] = [None] * len(self.files)
        while True:
            streams: list[TraceStream] = []
            try:
                for path, known in zip(self.files, facts, strict=True):
                    streams.append(TraceStream(path, known, window=self.window, progress=self.progress))
                return _Replay(streams).run()
            except Surprise as news:
                for stream in streams:
                    stream.close()
                which = streams.index(news.args[1])
                facts[which] = streams[which].learn(news)


class _Replay:
    """One pass over the streams of the boot trace, if there is one, and of the trace."""

    def __init__(self, streams: list[TraceStream]) -> None:
        self.streams = streams
        self.stream = streams[len(streams) - 1]
        self.result = Result(str(self.stream.path), "trace")
        self.midlife = MidLife()
        self.timeline = Timeline(self, self.stream.window, self.midlife)
        self.searches = self.timeline.searches
        self.closed: list[tuple[int, Counts, list[Tally]]] = []
        self._number_cpus()

    def _number_cpus(self) -> None:
        """Give the CPUs that act the numbers 0, 1, …, unless the header says that there are all up to them."""
        online = self.stream.facts.online
        seen = sorted(set().union(*(stream.facts.cpus for stream in self.streams)))
        self.cpus = max(len(seen), online)
        self.numbers = {cpu: number for number, cpu in enumerate(seen)}
        if all(cpu < online for cpu in seen):
            self.numbers = {cpu: cpu for cpu in range(online)}
        for stream in self.streams:
            stream.facts.cpus.update(self.numbers)

    def run(self) -> Result:
        """Replay all operations in the order of time."""
        offset = 0
        for stream in self.streams:
            shown = stream.facts.names
            self.timeline.free_returns_recorded = "ff_out" in shown
            reader = OperationReader(self.timeline, shown, self.numbers, offset)
            for batch in stream.batches():
                reader.read(batch)
            end = offset + stream.totals.records
            if stream is self.stream:
                self.timeline.finish(end)
            else:
                offset = self.timeline.limit = end + 1
                self.timeline.advance(end)
                self.timeline.limit = OPEN
        for iovad in list(self.searches):
            self._retire(iovad)
        self._sum()
        self._notes()
        return self.result

    # Domains ---------------------------------------------------------------------------------------------------------

    def begin(self, op: Operation) -> None:
        """The begin of an operation that is not simply one open domain's."""
        if op.kind == "depot" and op.iovad == 0:
            for search in self.searches.values():
                search.begin(op.serial, op)
        elif op.kind == "init":
            self._retire(op.iovad)
            self._open(op)
        elif op.kind not in ("lost", "put"):
            self._open(op)
            self.searches[op.iovad].begin(op.serial, op)

    def end(self, op: Operation) -> None:
        """The end of an operation that is not simply one open domain's."""
        if op.kind == "lost":
            self.midlife.stop()
            for search in self.searches.values():
                search.lose()
        elif op.kind == "put":
            self._retire(op.iovad)
        elif op.kind == "depot" and op.iovad == 0:
            for search in self.searches.values():
                if op.serial in search.pending:
                    search.end(op.serial)

    def _open(self, op: Operation) -> None:
        granule, start = (op.size, op.pfn or 1) if op.kind == "init" else (4096, 1)
        domain = IovaDomain(granule=granule, start_pfn=start, cpus=self.cpus)
        tallies = [Tally(known=False)]
        if op.kind == "init":
            tallies = [Tally(known=True), Tally(known=True, presumed=True), *tallies]
        self.searches[op.iovad] = OrderSearch(domain, tallies)

    def _retire(self, iovad: int) -> None:
        if iovad in self.searches:
            search = self.searches.pop(iovad)
            search.counts.reordered = min(branch.reordered for branch in search.branches)
            self.closed.append((iovad, search.counts, search.tallies))

    # The report ------------------------------------------------------------------------------------------------------

    def _sum(self) -> None:
        result, totals = self.result, self.stream.totals
        result.malformed_lines = totals.malformed
        result.lost_events = self.stream.lost[1]
        if self.timeline.impossible:
            result.notes.append(f"{self.timeline.impossible} calls with impossible numbers left out")
        for iovad, counts, tallies in self.closed:
            middle = totals.overwritten or iovad in self.midlife.found
            verdict = _WHOLE if totals.whole else _UNKNOWN if middle else _PRESUMED
            self._add(counts, tallies[verdict if len(tallies) > 1 else 0])

    def _add(self, counts: Counts, tally: Tally) -> None:
        result = self.result
        result.allocations += counts.allocations
        result.matched += tally.matched
        result.adopted += tally.adopted
        result.diverged += tally.diverged
        result.operations += counts.operations
        result.overlapping += counts.overlapping
        result.reordered += counts.reordered
        result.width = max(result.width, counts.width)
        result.capped = result.capped or counts.capped
        result.domains += counts.operations > 0
        result.divergence = result.divergence or tally.divergence
        if counts.unknown_frees and tally.known:
            result.notes.append(f"{counts.unknown_frees} frees of ranges that were not allocated")

    def _notes(self) -> None:
        totals, notes = self.stream.totals, self.result.notes
        if totals.recording is not None:
            notes += totals.recording.notes()
        if len(self.streams) > 1:
            notes.append(f"set-up of the domains from {self.streams[0].path}")
        if self.result.adopted:
            notes.append("adopted: answers that depend on a state from before the trace or behind lost events")
        if totals.malformed:
            notes.append(totals.malformed_text)
        if self.result.lost_events:
            notes.append(f"{self.result.lost_events} events lost in {self.stream.lost[0]} places")
        if not self.stream.facts.ordered:
            notes.append("the lines were not in the order of time and were sorted by stamp")
        if not self.result.allocations:
            notes.append("no allocator events: nothing to replay (passthrough, or see: dmakit record --help)")
            return
        present: set[str] = set().union(*(stream.facts.names for stream in self.streams))
        notes += [f"without {' or '.join(n.events)} events: {n.lost}" for n in missing_events(present, "replay")]
