"""Recording, with an object in the kernel's place: nothing lost unsaid, nothing left behind, whatever fails."""

from __future__ import annotations

import lzma
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmakit.errors import HostError, InputError, UnsupportedError
from dmakit.failpoint import FailPoint
from dmakit.trace.columns import load
from dmakit.trace.fresh_domain import FreshDomain
from dmakit.trace.probes import ALLOCATOR, MAPPING
from dmakit.trace.recorder import Order, Outcome, Recorder
from dmakit.trace.replay import replay_file
from dmakit.trace.requests import extract
from dmakit.trace.session import NO_PROBES, Session
from tests.support.fake_tracefs import FakeTracefs
from tests.support.sweep import sweep

DATA = Path(__file__).parents[1] / "data" / "kernel-traces"
ALLOC = "af_in: (alloc_iova_fast+0x4/0x3e0) iovad=0x1 size={} limit=0xfffff flush=0x1"
PROBES = (*ALLOCATOR, *MAPPING)


@dataclass
class World:
    """A fake kernel, its time, and what happens in it at each look of the recorder."""

    path: Path
    fs: FakeTracefs = field(default_factory=FakeTracefs)
    happen: Callable[[int], None] = lambda tick: None
    tick: int = 0

    def recorder(self, facts: dict[str, Any] | None = None, **options: Any) -> Recorder:
        if not options.get("command"):
            options.setdefault("duration", 0.2)
        order = Order(**({"output": self.path / "run.trace.txt"} | options))
        recorder = Recorder(self.fs, order, facts or {"kernel": "7.2.12"})
        recorder.now = lambda: self.tick * 0.05
        recorder.pause = self._pause
        return recorder

    def _pause(self, seconds: float) -> None:
        self.happen(self.tick)
        self.tick += 1

    def record(self, **options: Any) -> Outcome:
        return self.recorder(**options).run()


def busy(world: World, count: int = 5) -> World:
    """Events on both CPUs at every look."""

    def happen(tick: int) -> None:
        for n in range(count):
            world.fs.emit(n % world.fs.cpus, ALLOC.format(n + 1))

    world.happen = happen
    return world


def clean(world: World) -> None:
    assert world.fs.state() == ({}, [], [], 0)
    assert not list(world.path.glob(".*"))


def test_a_recording_is_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    world = busy(World(tmp_path))
    seen: list[dict[str, str]] = []
    emit = world.happen

    def happen(tick: int) -> None:
        seen.append(dict(world.fs.dynamic))
        emit(tick)

    world.happen = happen
    outcome = world.record(device="0000:00:04.0")
    assert list(seen[0].values()) == [probe.fprobe("dmakit0") for probe in (*ALLOCATOR, *MAPPING)]
    assert (outcome.account.written, outcome.account.lost, outcome.account.complete) == (20, 0, True)
    assert (outcome.refused, outcome.lost_verbs, outcome.left, outcome.status, outcome.boot) == ([], [], "", 0, None)
    clean(world)
    trace = load(outcome.output)
    assert trace.table("af_in")["size"].tolist() == [1, 2, 3, 4, 5] * 4
    assert trace.table("af_in").cpu.tolist() == [0, 1, 0, 1, 0] * 4
    assert (trace.whole, trace.overwritten, trace.cpus, trace.malformed) == (True, False, 2, 0)
    assert trace.recording is not None and trace.recording.complete
    assert trace.recording.start["clock"] == "counter" and trace.recording.start["device"] == "0000:00:04.0"
    assert trace.recording.cpus == 2
    assert trace.recording.notes() == ["recorded by dmakit  on Linux 7.2.12"]


@pytest.mark.parametrize("suffix", ("", ".xz", ".zst", ".gz"))
def test_the_suffix_says_how_the_file_is_compressed(tmp_path: Path, suffix: str) -> None:
    world = busy(World(tmp_path))
    outcome = world.record(output=tmp_path / f"run.trace.txt{suffix}")
    assert (
        outcome.output.read_bytes()[:2] == {"": b"# ", ".xz": b"\xfd7", ".zst": b"\x28\xb5", ".gz": b"\x1f\x8b"}[suffix]
    )
    assert load(outcome.output).whole


@settings(max_examples=150)
@given(
    bursts=st.lists(st.lists(st.integers(0, 2), max_size=400), min_size=1, max_size=6),
    buffer=st.integers(16, 20),
    stream=st.booleans(),
)
def test_every_event_is_in_the_file_or_counted_as_lost(
    tmp_path_factory: pytest.TempPathFactory, bursts: list[list[int]], buffer: int, stream: bool
) -> None:
    world = World(tmp_path_factory.mktemp("run"), FakeTracefs(cpus=3))
    emitted: list[tuple[int, int]] = []

    def happen(tick: int) -> None:
        for cpu in bursts[tick]:
            emitted.append((cpu, len(emitted) + 1))
            world.fs.emit(cpu, ALLOC.format(len(emitted)))

    world.happen = happen
    outcome = world.record(stream=stream, buffer=buffer * 1024, duration=0.05 * len(bursts))
    account = outcome.account
    assert account.written + account.lost == len(emitted)
    assert account.complete == (account.lost == 0) == (not account.reasons()) == (account.remedy() == "")
    if not account.written:
        return
    trace = load(outcome.output)
    kept = list(zip(trace.table("af_in").cpu.tolist(), trace.table("af_in")["size"].tolist(), strict=True))
    assert len(kept) == account.written and set(kept) <= set(emitted)
    assert int(trace.lost["count"].sum()) == account.lost
    assert trace.whole == account.complete and not trace.overwritten
    if not stream:  # exact up to the first mark
        first = min(trace.lost.seq.tolist(), default=len(kept))
        assert kept[:first] == emitted[:first]
        for cpu in range(3):
            mine = [number for where, number in emitted if where == cpu]
            assert [number for where, number in kept if where == cpu] == mine[: len(mine) - account.by_cpu[cpu].dropped]
    extracted = extract(trace)
    assert any("they were lost in recording" in line for line in extracted.missing) == (account.lost > 0)


def test_an_incomplete_recording_says_so_everywhere(tmp_path: Path) -> None:
    world = busy(World(tmp_path), 300)
    outcome = world.record(buffer=16 << 10)
    assert outcome.account.as_json()["complete"] is False
    assert outcome.account.reasons() == ["CPU 0: 344 dropped", "CPU 1: 344 dropped"]
    assert outcome.account.remedy() == (
        "record again with a larger --buffer, with --stream, or with less: --device, --only, a shorter run"
    )
    trace = load(outcome.output)
    assert trace.recording is not None and not trace.recording.complete and not trace.whole
    note = "INCOMPLETE: 688 events were lost in recording (CPU 0: 344 dropped; CPU 1: 344 dropped)"
    assert note in replay_file(outcome.output).notes


def test_a_file_that_was_cut_off_is_not_whole(tmp_path: Path) -> None:
    outcome = busy(World(tmp_path)).record()
    text = outcome.output.read_text().splitlines(keepends=True)
    (tmp_path / "cut.txt").write_text("".join(text[:-4]))
    cut = load(tmp_path / "cut.txt")
    assert cut.recording is not None and not cut.whole
    assert cut.recording.notes()[1] == "INCOMPLETE: the recording was cut off before its end"


def test_events_that_no_line_accounts_for_are_lost(tmp_path: Path) -> None:
    world = busy(World(tmp_path))
    recorder = world.recorder()
    emit = world.happen

    def happen(tick: int) -> None:
        emit(tick)
        world.fs.instances["dmakit0"].buffers[1].commit = 3
        world.fs.instances["dmakit0"].buffers[0].read = 2  # somebody else read them

    world.happen = happen
    outcome = recorder.run()
    assert outcome.account.reasons() == [
        "CPU 1: 3 nested",
        "2 events that the kernel counted were not in what it printed",
    ]
    assert load(outcome.output).overwritten, "no mark shows where: the whole trace is in doubt"


def test_misses_of_kretprobes_and_a_foreign_hand_on_the_switch_are_losses(tmp_path: Path) -> None:
    world = busy(World(tmp_path, FakeTracefs(kinds="p")))
    world.fs.profile = {"af_out": 2, "other": 9}

    def happen(tick: int) -> None:
        world.fs.profile = {"af_out": 5, "ff_out": 1, "other": 99}
        world.fs.instances["dmakit0"].files["tracing_on"] = "0"

    world.happen = happen
    outcome = world.record()
    assert outcome.account.lost == 4 and outcome.account.switched_off
    assert outcome.account.reasons() == [
        "af_out: 3 calls not followed",
        "ff_out: 1 calls not followed",
        "somebody else switched the recording off before its end",
    ]
    assert outcome.account.remedy() == "look for a traceoff trigger or a kernel warning, and record again"
    clean(world)


# What a kernel allows -----------------------------------------------------------------------------------------------


def test_a_kernel_without_fprobes_gets_kprobes(tmp_path: Path) -> None:
    world = World(tmp_path, FakeTracefs(kinds="p"))
    seen: list[str] = []
    world.happen = lambda tick: seen.extend(world.fs.dynamic.values())
    assert not world.record(duration=0.05).refused
    assert seen == [probe.kprobe("dmakit0") for probe in PROBES]
    clean(world)


def test_refused_events_are_named_with_the_kernels_words_and_what_is_lost(tmp_path: Path) -> None:
    functions = {probe.function for probe in PROBES} - {"alloc_iova", "dma_iova_link"}
    world = World(tmp_path, FakeTracefs(functions=functions, groups={"iommu": ("map",)}))
    outcome = world.record()
    assert [(r.event, r.function, r.reason) for r in outcome.refused] == [
        ("dma", "", "this kernel has no such events"),
        ("swiotlb", "", "this kernel has no such events"),
        ("block/block_rq_issue", "", "this kernel has no such events"),
        ("block/block_rq_complete", "", "this kernel has no such events"),
        ("ai_out", "alloc_iova", "Invalid probed address or symbol"),
        ("link_out", "dma_iova_link", "Invalid probed address or symbol"),
    ]
    assert outcome.lost_verbs == [
        "replay: telling magazine hits from tree searches (only the address is compared)",
        "compare: grouping mappings into block requests (each mapping counts as a request)",
        "compare: the segments of two-step requests",
        "explain: the segments of two-step requests",
    ]
    clean(world)


def test_an_old_kernel_refuses_arguments_at_the_return(tmp_path: Path) -> None:
    world = World(tmp_path, FakeTracefs(kinds="p", old=True))
    outcome = world.record()
    assert {r.event for r in outcome.refused} == {probe.name for probe in PROBES if probe.on_return}
    assert {r.reason for r in outcome.refused} == {"$arg* can be used only on function entry"}
    clean(world)


def test_a_kernel_with_nothing_to_record_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path, FakeTracefs(kinds="", groups={}))
    with pytest.raises(UnsupportedError) as caught:
        world.record()
    assert str(caught.value) == (
        "this kernel has none of the events to record (this kernel has no such events): it needs CONFIG_FPROBE_EVENTS "
        "or CONFIG_KPROBE_EVENTS, and CONFIG_IOMMU_DMA for anything to happen"
    )
    clean(world)
    world = World(tmp_path, FakeTracefs(kinds=""))
    assert {r.reason for r in world.record().refused} == {NO_PROBES}


# Nothing is left behind ---------------------------------------------------------------------------------------------


def test_a_failure_of_any_operation_leaves_nothing_behind(tmp_path: Path) -> None:
    worlds = iter(range(10_000))

    def make() -> World:
        path = tmp_path / str(next(worlds))
        path.mkdir()
        world = busy(World(path, FakeTracefs(kinds="p")))
        world.fs.top_trace = [
            "# tracer: nop\n",
            "  swapper/0-1  [000] .....  1.0: init: (init_iova_domain+0x4/0xc0) x\n",
        ]
        world.fs.marked = lambda text: at_work(world, text)
        return world

    def at_work(world: World, text: str) -> None:
        """The first beginning has to be taken back."""
        assert world.fs.top_trace is not None
        if len(world.fs.top_trace) == 3 and text.rstrip().endswith("begins"):
            world.fs.top_trace.append(f"  x-1  [000] .....  9.0: {FREE}")

    def check(world: World, failed: bool) -> None:
        clean(world)
        assert (world.path / "run.trace.txt").exists() != failed
        if not failed:
            assert load(world.path / "run.trace.txt").whole

    def failpoint(world: World) -> FailPoint:
        return world.fs.fail

    uses = sweep(make, failpoint, lambda world: world.record(duration=0.05), check)
    assert uses > 110


def test_an_exception_in_the_middle_leaves_nothing_behind(tmp_path: Path) -> None:
    world = World(tmp_path)

    def happen(tick: int) -> None:
        raise RuntimeError("a bug")

    world.happen = happen
    with pytest.raises(RuntimeError, match="a bug"):
        world.record()
    clean(world)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_removed_is_said_with_its_remedy(tmp_path: Path) -> None:
    world = busy(World(tmp_path))
    world.happen = lambda tick: world.fs.top_enabled.add("dmakit0/af_in") or world.fs.stuck.add("instances/dmakit0")
    outcome = world.record(duration=0.05)
    assert outcome.left == (
        "/fake/tracing: could not be removed, it is in use: rmdir /fake/tracing/instances/dmakit0; "
        "echo '-:dmakit0/af_in' >> /fake/tracing/dynamic_events"
    )
    assert outcome.output.exists() and list(world.fs.dynamic) == ["dmakit0/af_in"] and not world.fs.locks


def test_what_a_killed_recording_left_is_removed_by_the_next(tmp_path: Path) -> None:
    world = busy(World(tmp_path))
    dead = Session(world.fs, pause=world.recorder().pause)
    dead.__enter__()
    dead.define(ALLOCATOR[:2])
    dead.switch(True)
    dead.drain(1)
    world.fs.locks.clear()  # what the kernel does when a process dies
    world.fs.instances["dmakit0"].opened = 0
    world.fs.dynamic["mine/probe"] = "p:mine/probe vfs_read "
    world.fs.make("instances/mine")
    outcome = world.record()
    assert outcome.notes == [
        f"removed what an earlier recording left: {name}"
        for name in ("instances/dmakit0", "dmakit0/af_in", "dmakit0/af_out")
    ]
    assert world.fs.state() == ({"mine/probe": "p:mine/probe vfs_read "}, ["mine"], [], 0)


def test_two_recordings_at_once_stay_out_of_each_others_way(tmp_path: Path) -> None:
    world = busy(World(tmp_path))
    with Session(world.fs, pause=world.recorder().pause) as other:
        other.define(ALLOCATOR[:1])
        assert other.name == "dmakit0"
        outcome = world.record()
        assert outcome.notes == [] and outcome.account.complete
        assert list(world.fs.dynamic) == ["dmakit0/af_in"] and list(world.fs.instances) == ["dmakit0"]
    clean(world)


def test_a_left_over_event_that_is_in_use_keeps_its_name(tmp_path: Path) -> None:
    world = busy(World(tmp_path))
    world.fs.dynamic["dmakit0/af_in"] = "f:dmakit0/af_in alloc_iova_fast "
    world.fs.top_enabled.add("dmakit0/af_in")
    names: list[str] = []
    world.happen = lambda tick: names.extend(world.fs.instances)
    assert world.record(duration=0.05).notes == []
    assert set(names) == {"dmakit1"}


# Workloads and signals ----------------------------------------------------------------------------------------------


def test_a_commands_status_is_reported_and_its_marker_named(tmp_path: Path) -> None:
    world = busy(World(tmp_path))
    said = tmp_path / "said"
    outcome = world.record(command=("sh", "-c", f'echo "$DMAKIT_TRACE_MARKER" > {said}; exit 3'))
    assert outcome.status == 3
    assert said.read_text() == "/fake/tracing/instances/dmakit0/trace_marker\n"
    clean(world)
    outcome = world.record(command=("sh", "-c", "kill -9 $$"), output=tmp_path / "b.txt")
    assert outcome.status == 137


def test_a_command_that_cannot_be_run_is_an_error(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(InputError) as caught:
        world.record(command=("/nonexistent/program",))
    assert str(caught.value) == "/nonexistent/program: cannot be run: No such file or directory"
    clean(world)
    assert list(tmp_path.iterdir()) == []


def test_time_ends_a_recording_and_not_its_command(tmp_path: Path) -> None:
    world = World(tmp_path)
    recorder = world.recorder(command=("sh", "-c", "sleep 0.2; exit 4"), duration=0.01)
    clock = iter(range(1000))
    recorder.now = lambda: float(next(clock))
    assert recorder.run().status == 4


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
def test_a_signal_ends_the_recording_and_the_file_is_written(tmp_path: Path, number: int) -> None:
    world = World(tmp_path)

    def happen(tick: int) -> None:
        world.fs.emit(0, ALLOC.format(1))
        if tick == 3:
            os.kill(os.getpid(), number)

    world.happen = happen
    before = signal.getsignal(number)
    outcome = world.record(duration=None)
    assert (outcome.signal, outcome.account.written, outcome.account.complete) == (number, 4, True)
    assert load(outcome.output).whole and signal.getsignal(number) is before
    clean(world)


def test_a_signal_while_the_file_is_written_gives_it_up(tmp_path: Path) -> None:
    world = busy(World(tmp_path), 500)
    recorder = world.recorder()
    recorder.progress = lambda what, share: os.kill(os.getpid(), signal.SIGINT) if what == "writing" else None
    with pytest.raises(KeyboardInterrupt):
        recorder.run()
    clean(world)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "number", "status"),
    [
        ("exec sleep 60", signal.SIGTERM, 143),
        ("exec sleep 60", signal.SIGINT, 143),  # Ctrl-C reached only us: the command is asked after a while
        ("trap '' INT TERM; while :; do sleep 0.05; done", signal.SIGINT, 137),
    ],
)
def test_a_command_is_asked_to_end_when_we_are(tmp_path: Path, program: str, number: int, status: int) -> None:
    world = World(tmp_path)
    ready = tmp_path / "ready"
    recorder = world.recorder(command=("sh", "-c", f"touch {ready}; {program}"))
    seconds = iter(range(100_000))
    sent = False

    def now() -> float:
        nonlocal sent
        if ready.exists() and not sent:
            sent = True
            os.kill(os.getpid(), number)
        return float(next(seconds))

    recorder.now = now
    outcome = recorder.run()
    assert (outcome.status, outcome.signal) == (status, number)
    clean(world)


# A fresh domain -------------------------------------------------------------------------------------------------------


def group(root: Path, kind: str = "DMA-FQ", driver: str = "") -> Path:
    path = root / "sys/kernel/iommu_groups/7"
    (path / "devices/0000:00:04.0").mkdir(parents=True)
    (path / "type").write_text(f"{kind}\n")
    if driver:
        (root / "drivers" / driver).mkdir(parents=True)
        (path / "devices/0000:00:04.0/driver").symlink_to(root / "drivers" / driver)
    return path


def test_a_fresh_domain_is_made_inside_the_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = group(tmp_path)
    world = busy(World(tmp_path))
    written: list[tuple[bytes, str]] = []
    write = os.write

    def noted(fd: int, data: bytes) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink() == path / "type":
            written.append((data, world.fs.instances["dmakit0"].files["tracing_on"]))
        return write(fd, data)

    monkeypatch.setattr(os, "write", noted)
    world.record(fresh=(FreshDomain("0000:00:04.0", tmp_path),))
    assert written == [(b"identity", "1"), (b"DMA-FQ", "1")]


@pytest.mark.parametrize(
    ("device", "kind", "driver", "message"),
    [
        ("0000:00:05.0", "DMA", "", "no device of this name is in an IOMMU group"),
        ("../x", "DMA", "", "no device of this name is in an IOMMU group"),
        ("0000:00:04.0", "identity", "", "its domain is of type identity: no IOVA is allocated in it"),
        (
            "0000:00:04.0", "DMA", "nvme",
            "0000:00:04.0 of its group is bound to nvme: unbind it first, and bind it again in the recorded command",
        ),
    ],
)  # fmt: skip
def test_a_domain_that_cannot_be_made_anew_is_refused(
    tmp_path: Path, device: str, kind: str, driver: str, message: str
) -> None:
    group(tmp_path, kind, driver)
    world = World(tmp_path)
    with pytest.raises(InputError) as caught:
        world.record(fresh=(FreshDomain(device, tmp_path),))
    assert str(caught.value) == f"--fresh {device}: {message}"
    clean(world)


def test_a_kernel_that_refuses_the_type_is_quoted(tmp_path: Path) -> None:
    path = group(tmp_path)
    fresh = FreshDomain("0000:00:04.0", tmp_path)
    fresh.check()
    (path / "type").unlink()
    with pytest.raises(HostError) as caught:
        fresh.renew()
    assert str(caught.value) == f"{path}/type: write identity: No such file or directory"


# Input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"duration": 0.0}, "--duration 0: must be more than 0 seconds"),
        ({"duration": float("nan")}, "--duration nan: must be more than 0 seconds"),
        ({"buffer": 4096}, "--buffer 4096: must be at least 16K"),
        ({"device": 'a" || 1'}, "--device 'a\" || 1': is no device name"),
        ({"output": Path("/")}, "-o /: is a directory"),
        ({"output": Path("/nonexistent/x")}, "-o /nonexistent/x: there is no directory /nonexistent"),
    ],
)
def test_bad_orders_are_refused_before_anything_is_touched(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    world = World(tmp_path)
    world.fs.fail.arm(0)
    with pytest.raises(InputError) as caught:
        world.record(**options)
    assert str(caught.value) == message
    assert not world.fs.fail.fired


def test_a_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "run.trace.txt").write_text("mine")
    world = busy(World(tmp_path))
    with pytest.raises(InputError) as caught:
        world.record()
    assert str(caught.value) == f"-o {tmp_path}/run.trace.txt: the file exists (another name, or --force)"
    assert world.record(force=True).account.complete


def test_what_the_kernel_refuses_names_file_errno_and_cause(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.fs.write = lambda path, text: (_ for _ in ()).throw(OSError(12, "x"))  # type: ignore[method-assign]
    with pytest.raises(HostError) as caught:
        world.record()
    assert str(caught.value) == "/fake/tracing: write '0' to tracing_on: Cannot allocate memory (ENOMEM)"


# The whole way ------------------------------------------------------------------------------------------------------


def test_the_boot_part_is_cut_where_the_recording_begins_and_replays(tmp_path: Path) -> None:
    world = World(tmp_path, FakeTracefs(cpus=1))
    with lzma.open(DATA / "smp1-strict.trace.txt.xz", "rt") as text:
        lines = [line for line in text if not line.startswith("#")]
    boot = (DATA / "smp1-strict.boot.txt").read_text()
    world.fs.top_trace = boot.splitlines(keepends=True)

    def happen(tick: int) -> None:
        if tick == 0:
            assert world.fs.top_trace is not None
            world.fs.top_trace.append(
                " x-1 [000] ..... 99.0: af: (alloc_iova_fast+0x4/0x3e0) iovad=0x1 size=1 limit=0x1\n"
            )
        for line in lines[tick * 1000 : (tick + 1) * 1000]:
            world.fs.emit(0, "", line=line)

    world.happen = happen
    outcome = world.record(
        output=tmp_path / "run.trace.txt.zst", buffer=1 << 30, duration=0.05 * (len(lines) // 1000 + 2)
    )
    assert outcome.account.written == len(lines) and outcome.account.complete
    assert outcome.boot == tmp_path / "run.boot.txt" and outcome.boot.read_text() == boot
    result = replay_file(outcome.output)
    assert (result.allocations, result.matched, result.adopted, result.diverged) == (3085, 3085, 0, 0)


INIT = " x-1 [000] ..... 1.0: init: (init_iova_domain+0x4/0x3e0) iovad=0x1 granule=4096 start=1\n"
FREE = "ff: (free_iova_fast+0x4/0x3e0) iovad=0x1 pfn=1 size=1\n"


@pytest.mark.parametrize(("edge", "tries"), [("begins", 0), ("begins", 3), ("began", 3), ("begins", 9), ("begins", 10)])
def test_a_recording_begins_when_no_allocator_is_at_work(tmp_path: Path, edge: str, tries: int) -> None:
    """What is freed while our own buffer takes over from the boot trace would be in neither, or in both."""
    world = busy(World(tmp_path))
    world.fs.top_trace = [INIT]
    freed = 0

    def marked(text: str) -> None:
        nonlocal freed
        if text.rstrip().endswith("begins") and freed < tries:
            freed += 1
            assert world.fs.top_trace is not None
            if edge == "began":
                world.fs.emit(0, FREE.rstrip())
            world.fs.top_trace.append(f" x-1 [000] ..... {freed + 1}.0: {FREE}")

    world.fs.marked = marked
    outcome = world.record()
    assert freed == tries
    assert outcome.account.complete and "free_iova_fast" not in outcome.output.read_text()
    if tries < 10:
        assert outcome.notes == [] and outcome.boot is not None
        boot = outcome.boot.read_text()
        assert (boot.count(" init: "), boot.count(FREE)) == (1, tries)
    else:
        assert outcome.boot is None
        assert outcome.notes == ["the boot trace is left out: 10 tries to begin, and allocators were at work in each"]
    clean(world)


def test_a_boot_trace_that_lost_its_beginning_is_not_used(tmp_path: Path) -> None:
    world = busy(World(tmp_path))
    world.fs.top_trace = [
        "# tracer: nop\n",
        " x-1 [000] ..... 9.0: ff: (free_iova_fast+0x4/0x3e0) iovad=0x1 pfn=1 size=1\n",
    ]
    outcome = world.record()
    assert outcome.boot is None
    assert outcome.notes == ["the boot trace has overwritten its beginning: a larger trace_buf_size= keeps it longer"]
