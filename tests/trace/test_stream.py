"""Replay as a stream: the same results through a small window, in memory that does not grow with the trace."""

from __future__ import annotations

import contextlib
import functools
import lzma
import os
import re
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from dmakit.errors import InputError
from dmakit.trace import replay, stream
from dmakit.trace.archive import line_chunks
from dmakit.trace.recording import head, tail
from dmakit.trace.replay import TraceReplay, replay_file
from dmakit.trace.result import Result
from dmakit.trace.stream import Facts, Surprise, TraceStream
from tests.support.long_trace import long_trace

ROOT = Path(__file__).parents[2]
TRACES = Path(__file__).parent.parent / "data" / "kernel-traces"
PACKED = TRACES / "smp2-lazy.trace.txt.xz"
LINES = lzma.decompress(PACKED.read_bytes()).decode().splitlines(keepends=True)
BOOT = TRACES / "smp2-lazy.boot.txt"
SMALL = 2_000


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks well below the small window, so that there is something to stream."""
    monkeypatch.setattr(stream, "line_chunks", functools.partial(line_chunks, size=1 << 16))


def counted(result: Result) -> dict[str, Any]:
    return {name: value for name, value in result.as_json().items() if name != "file"}


def both_ways(path: Path, boot: Path | None = BOOT, window: int = SMALL) -> Result:
    """Replayed with a window that holds it whole and with a small one: the same result."""
    whole, streamed = TraceReplay(path, boot).run(), TraceReplay(path, boot, window=window).run()
    assert counted(streamed) == counted(whole)
    return streamed


def written(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(lines))
    return path


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["smp2-lazy", "smp1-strict", "sg-ahci", "smp2-lazy-mono"])
def test_a_small_window_changes_nothing(name: str) -> None:
    assert both_ways(TRACES / f"{name}.trace.txt.xz", TRACES / f"{name}.boot.txt").matched > 0


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("cut", [0, 14_000])
def test_neither_do_cuts_losses_and_damage(tmp_path: Path, header: bool, cut: int) -> None:
    lines = LINES[:12] * header + LINES[12 + cut :]
    lines[30_000:30_400] = ["CPU:1 [LOST 400 EVENTS]\n", "garbage\n"]
    result = both_ways(written(tmp_path / "x.txt", lines))
    assert result.adopted > 0
    assert (result.lost_events, result.malformed_lines, result.diverged) == (400, 1, 0)


@pytest.mark.usefixtures("small_chunks")
def test_a_trace_that_is_recorded_over_diverges_the_same(tmp_path: Path) -> None:
    later = [re.sub(r"(?<=[. ])\d+(?=: )", lambda m: str(int(m[0]) + 900_000), line, count=1) for line in LINES[12:]]
    result = both_ways(written(tmp_path / "x.txt", LINES + later), window=80_000)
    assert result.allocations == 2 * 3_087
    assert result.diverged > 100


@pytest.mark.usefixtures("small_chunks")
def test_lines_out_of_order_are_sorted_near_and_far(tmp_path: Path) -> None:
    near = list(LINES)
    for at in range(12, len(near) - 40, 97):
        near[at : at + 20] = near[at : at + 20][::-1]
    by_cpu = LINES[:12] + [line for cpu in ("[001]", "[000]") for line in LINES[12:] if cpu in line]
    for lines in (near, by_cpu):
        result = both_ways(written(tmp_path / "x.txt", lines))
        assert (result.matched, result.diverged) == (3_087, 0)
        assert any("sorted by stamp" in note for note in result.notes)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("late", ["[001]", " ai_out: "])
def test_what_only_the_rest_shows_is_learned_in_a_pass_of_its_own(tmp_path: Path, late: str) -> None:
    lines = [line for at, line in enumerate(LINES[12:]) if at > 20_000 or late not in line]
    assert both_ways(written(tmp_path / "x.txt", lines)).allocations > 1_000


def through_pipe(path: Path, data: bytes) -> threading.Thread:
    os.mkfifo(path)

    def write() -> None:
        with contextlib.suppress(BrokenPipeError):
            path.write_bytes(data)

    writer = threading.Thread(target=write)
    writer.start()
    return writer


@pytest.mark.usefixtures("small_chunks")
def test_a_pipe_cannot_be_read_again(tmp_path: Path) -> None:
    lines = [line for at, line in enumerate(LINES[12:]) if at > 20_000 or "[001]" not in line]
    path = tmp_path / "pipe"
    writer = through_pipe(path, "".join(lines).encode())
    told = re.escape(f"{path}: CPU 1 acts for the first time between lines ") + r"\d+ and \d+"
    told += re.escape(
        ": not to be foreseen from the first 2000 events, and a pipe is read once; write the trace to a file"
    )
    with pytest.raises(InputError, match=f"^{told}$"):
        TraceReplay(path, window=SMALL).run()
    writer.join()


LEGEND = "# tracer: nop\n#\n#   TASK-PID    CPU#  |||||  TIMESTAMP  FUNCTION\n"


def recorded(told: dict[str, int], cpus: int) -> bytes:
    """What ``dmakit record`` would have written: its head tells ``told``, its end of ``cpus`` CPUs on line."""
    events = LINES[12:]
    account = {"complete": True, "events": len(events), "lost": 0}
    return head(LEGEND, told) + "".join(events).encode() + tail(account, cpus)


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What made a replay begin again."""
    found: list[str] = []
    learn = TraceStream.learn

    def noted(self: TraceStream, news: Surprise) -> Facts:
        found.append(re.sub(r"\d+ and \d+", "A and B", news.args[0]))
        return learn(self, news)

    monkeypatch.setattr(TraceStream, "learn", noted)
    return found


@pytest.mark.usefixtures("small_chunks")
def test_a_recording_tells_its_cpus_at_its_head(tmp_path: Path, learned: list[str]) -> None:
    """One pass, so a pipe will do. What the end says is the same, and never in the first window."""
    data = recorded({"cpus": 4}, 4)
    (tmp_path / "x.txt").write_bytes(data)
    result = both_ways(tmp_path / "x.txt")
    writer = through_pipe(tmp_path / "pipe", data)
    assert counted(TraceReplay(tmp_path / "pipe", BOOT, window=SMALL).run()) == counted(result)
    writer.join()
    assert (result.matched, learned) == (3_087, [])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("told", [{}, {"cpus": 2}])
def test_a_recording_whose_end_tells_of_more_cpus_is_begun_again_once(
    tmp_path: Path, learned: list[str], told: dict[str, int]
) -> None:
    (tmp_path / "x.txt").write_bytes(recorded(told, 4))
    assert both_ways(tmp_path / "x.txt").matched == 3_087
    assert learned == ["a header that tells of 4 CPUs between lines A and B"]


@pytest.mark.usefixtures("small_chunks")
def test_from_a_pipe_such_a_recording_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    writer = through_pipe(path, recorded({"cpus": 2}, 4))
    told = re.escape(f"{path}: a header that tells of 4 CPUs between lines ") + r"\d+ and \d+"
    told += re.escape(
        ": not to be foreseen from the first 2000 events, and a pipe is read once; write the trace to a file"
    )
    with pytest.raises(InputError, match=f"^{told}$"):
        TraceReplay(path, BOOT, window=SMALL).run()
    writer.join()


@pytest.mark.parametrize("told", [{}, {"cpus": "2"}, {"cpus": 0}, {"cpus": 3}])
def test_a_recording_without_its_end_has_the_cpus_of_its_head(tmp_path: Path, told: dict[str, Any]) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(head(LEGEND, told) + "".join(LINES[12:]).encode())
    found = TraceStream(path)
    assert found.facts.online == (3 if told == {"cpus": 3} else 1)
    found.close()


def test_a_last_chunk_of_comments_alone_may_surprise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts behind the last event, in a chunk without an event."""
    lines = recorded({"cpus": 2}, 4).splitlines(keepends=True)
    chunks = [b"".join(lines[:3_000]), b"".join(lines[3_000:-1]), lines[-1]]
    monkeypatch.setattr(stream, "line_chunks", lambda path: iter(chunks))
    with pytest.raises(Surprise) as told:
        list(TraceStream(tmp_path, window=SMALL).batches())
    last = len(lines)
    assert told.value.args[0] == f"a header that tells of 4 CPUs between lines {last} and {last}"


@pytest.mark.parametrize("pack", [bytes, lambda _: PACKED.read_bytes(), zstandard.ZstdCompressor().compress])
def test_a_pipe_gives_what_the_file_gives(tmp_path: Path, pack: Any) -> None:
    path = tmp_path / "pipe"
    writer = through_pipe(path, pack("".join(LINES).encode()))
    result = replay_file(path, boot=BOOT)
    writer.join()
    assert counted(result) == counted(replay_file(PACKED))


def test_standard_input(tmp_path: Path) -> None:
    with (TRACES / "untrusted-nvme-smp1.trace.txt.xz").open("rb") as packed:
        words = [sys.executable, "-m", "dmakit", "replay", "-", "--boot", str(TRACES / "untrusted-nvme-smp1.boot.txt")]
        run = subprocess.run(words, stdin=packed, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("-: 402 allocations: 402 matched (100.00 %), 0 adopted, 0 diverged\n")


def event(seq: int, text: str, pid: int = 7) -> str:
    return f" x-{pid} [000] ..... {seq}: {text}\n"


def test_a_domain_may_end_while_a_free_is_open(tmp_path: Path) -> None:
    """A free without a return lasts 512 records, its domain less."""
    lines = [event(0, "init_in: (i+0/1) iovad=0x1 granule=4096 start=0x1")]
    lines += [event(1, "af_in: (a+0/1) iovad=0x1 size=1 limit=0xfffff flush=1")]
    lines += [event(2, "af_out: (b <- a) iovad=0x1 size=1 limit=0xfffff pfn=0xfffff")]
    lines += [event(3, "ff_in: (f+0/1) iovad=0x1 pfn=0xfffff size=1"), event(4, "put_in: (p+0/1) iovad=0x1", 8)]
    lines += [event(5, "ff_out: (g <- f) iovad=0x2 pfn=0x9 size=1", 9)]
    result = replay_file(written(tmp_path / "x.txt", lines))
    assert (result.allocations, result.matched, result.divergence) == (1, 1, None)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("gap", "allocations"), [(SMALL // 2, 1), (4 * SMALL, 0)])
def test_a_call_that_is_open_for_longer_than_the_window_is_open_for_ever(
    tmp_path: Path, gap: int, allocations: int
) -> None:
    lines = [event(0, "init_in: (i+0/1) iovad=0x1 granule=4096 start=0x1")]
    lines += [event(1, "af_in: (a+0/1) iovad=0x1 size=1 limit=0xfffff flush=1")]
    lines += [event(2 + i, "unmap_in: (u+0/1) domain=0x1 iova=0x0 size=0x1000", 8) for i in range(gap)]
    lines += [event(2 + gap, "af_out: (b <- a) pfn=0xfffff")]
    result = TraceReplay(written(tmp_path / "x.txt", lines), window=SMALL).run()
    assert result.allocations == allocations


def test_the_long_trace_is_one_that_a_model_explains(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes(b"".join(long_trace(6_000)))
    result = replay_file(path)
    assert (result.matched, result.diverged) == (result.allocations, 0)
    assert result.allocations > 1_000
    assert result.overlapping > 100


def test_a_branch_forgets_the_operations_that_have_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    retire = replay._Replay._retire

    def watched(self: replay._Replay, iovad: int) -> None:
        left.extend(len(branch.passed) for branch in self.searches[iovad].branches)
        retire(self, iovad)

    path = tmp_path / "long.txt"
    path.write_bytes(b"".join(long_trace(6_000)))
    monkeypatch.setattr(replay._Replay, "_retire", lambda self, iovad: iovad in self.searches and watched(self, iovad))
    replay_file(path)
    assert max(left) <= 2


@pytest.mark.usefixtures("small_chunks")
def test_memory_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    def peak(events: int) -> int:
        path = tmp_path / "long.txt"
        path.write_bytes(b"".join(long_trace(events)))
        tracemalloc.start()
        try:
            result = TraceReplay(path, window=250).run()
            assert result.matched == result.allocations > events // 10
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1_000)  # what is made once
    short = peak(2_000)
    assert peak(16_000) < 1.25 * short


def piped(events: int) -> Iterator[str]:
    """What ``replay -`` says of so many events, and the peak of its memory in MiB (its own: ``ru_maxrss`` would hold
    that of the process it was forked from)."""
    tell = "import re,sys; from dmakit.cli.main import run; status = run(sys.argv[1:]); "
    tell += "print(int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) >> 10); sys.exit(status)"
    maker = subprocess.Popen(
        [sys.executable, "-m", "tests.support.long_trace", str(events)], stdout=subprocess.PIPE, cwd=ROOT
    )
    with maker:
        run = subprocess.run(
            [sys.executable, "-c", tell, "replay", "-"], stdin=maker.stdout, capture_output=True, text=True, check=True
        )
    yield from run.stdout.splitlines()


@pytest.mark.long
def test_ten_million_events_fit_into_200_mib() -> None:
    lines = list(piped(10_000_000))
    assert "(100.00 %), 0 adopted, 0 diverged" in lines[0]
    assert int(lines[-1]) < 200
