"""Both cores side by side: the same program of calls on the interpreted and the compiled core, and no difference.

One source, two forms: what may differ is speed alone. Hypothesis draws programs over the whole mapping stack
(``program``) and shrinks one that tells the cores apart. Two children stay alive over all examples.
"""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmakit import _core
from tests.pair.held import CONFIGS
from tests.pair.program import OPERATIONS

ROOT = Path(__file__).resolve().parents[2]
MISSING = bool(_core.status()["missing"]) and not os.environ.get("CI")  # in CI a missing core is a failure
pytestmark = pytest.mark.skipif(MISSING, reason="no compiled core here: ./dmakit build")

EDGES = (-1, 0, 1, 4095, 4096, 4097, (1 << 32) - 1, 1 << 32, 1 << 48, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64)
NUMBERS = st.one_of(
    st.integers(0, 40), st.integers(0, 1 << 18), st.integers(0, 60).map(lambda n: n * 4096), st.sampled_from(EDGES)
)
STEPS = st.tuples(st.sampled_from(OPERATIONS), NUMBERS, NUMBERS, NUMBERS, NUMBERS)
PROGRAMS = st.tuples(st.integers(0, len(CONFIGS) - 1), st.lists(STEPS, min_size=1, max_size=40))


class Core:
    """One child and the pipe to it."""

    def __init__(self, core: str) -> None:
        env = {**os.environ, "DMAKIT_CORE": core, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        command = [sys.executable, "-m", "tests.pair.child"]
        self.process = subprocess.Popen(command, env=env, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def send(self, program: Any) -> None:
        assert self.process.stdin is not None
        pickle.dump(program, self.process.stdin)
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        try:
            return pickle.load(self.process.stdout)
        except EOFError:
            return ["killed", f"exit {self.process.wait()}"]

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture(scope="module")
def cores() -> Iterator[tuple[Core, Core]]:
    both = Core("python"), Core("compiled")
    yield both
    for core in both:
        core.close()


def compare(cores: tuple[Core, Core], program: Any) -> None:
    """Run a program on both; the first step that differs is the message."""
    for core in cores:
        core.send(program)
    interpreted, compiled = (core.answer() for core in cores)
    assert interpreted[0] != "died" and compiled[0] not in ("died", "killed"), (interpreted, compiled)
    if interpreted == compiled:
        return
    for at, (one, other) in enumerate(zip(interpreted[:-1], compiled[:-1], strict=True)):
        step = program[1][at // 2]
        assert one == other, f"config {program[0]}, step {at // 2} {step}: interpreted {one!r}, compiled {other!r}"
    for name, seen in interpreted[-1].items():
        assert seen == compiled[-1][name], f"config {program[0]}: {name} differ after {program[1]}"


def test_the_two_children_run_different_cores(cores: tuple[Core, Core]) -> None:
    compare(cores, (0, [("map_phys", 0, 4096, 0, 1), ("unmap_phys", 0, 0, 0, 0)]))
    for core, wanted in zip(cores, ("python", "compiled"), strict=True):
        environment = Path(f"/proc/{core.process.pid}/environ").read_bytes()
        assert f"DMAKIT_CORE={wanted}".encode() in environment


ALIKE = {"print_blob": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=60, derandomize=True, **ALIKE)
@given(program=PROGRAMS)
def test_the_cores_answer_alike(cores: tuple[Core, Core], program: Any) -> None:
    compare(cores, program)


@pytest.mark.long
@settings(max_examples=3000, **ALIKE)
@given(program=PROGRAMS)
def test_the_cores_answer_alike_to_thousands(cores: tuple[Core, Core], program: Any) -> None:
    compare(cores, program)


def test_a_size_that_no_64_bits_hold_once_rounded_up(cores: tuple[Core, Core]) -> None:
    compare(
        cores,
        (0, [("map_phys", 0, (1 << 64) - 1, 0, 0), ("map_phys", 0, 1 << 63, 0, 0), ("map_phys", 0, 1 << 64, 0, 0)]),
    )


@pytest.mark.parametrize("config", [5, 8])  # with a model of the cache, and without
def test_cache_lines_of_memory_that_is_not_there_are_not_counted(cores: tuple[Core, Core], config: int) -> None:
    huge = [("map_phys", 0x39000, size, 0, 0) for size in (1 << 63, 1 << 62, 1 << 62, 1 << 40)]
    compare(cores, (config, huge))


@pytest.mark.parametrize("cpu", [-1, 1 << 31, (1 << 32) - 1, 1 << 64])
def test_a_cpu_that_no_machine_has(cores: tuple[Core, Core], cpu: int) -> None:
    mapped = [("nvme_map", 1, 3, 1, 4), ("nvme_unmap", 0, cpu, 0, 0), ("nvme_map", 1, cpu, 1, 4)]
    compare(cores, (7, [*mapped, ("bounce", 0, 512, 0, cpu), ("map_phys", 0, 512, cpu, 1)]))


def test_peer_memory_is_asked_for_beyond_64_bits(cores: tuple[Core, Core]) -> None:
    compare(cores, (9, [("decide", number, 1, 0, 0) for number in (5, 1 << 64, -1, (1 << 64) - 1)]))


def test_a_text_that_begins_with_a_marker_of_lost_events(cores: tuple[Core, Core]) -> None:
    compare(cores, (0, [("scan_text", 11, 0, 0, 1), ("scan_text", 0, 0, 12, 1)]))


def drawn(seed: int) -> Any:
    """A long program from a seed: weights that keep things live, edges now and then."""
    rng = random.Random(seed)

    def number() -> int:
        kind = rng.random()
        if kind < 0.03:
            return rng.choice(EDGES)
        return rng.randrange(40) if kind < 0.4 else rng.randrange(1 << 18) if kind < 0.7 else rng.randrange(60) * 4096

    steps = [(rng.choice(OPERATIONS), number(), number(), number(), number()) for _ in range(400)]
    return seed % len(CONFIGS), steps


@pytest.mark.parametrize("seed", range(len(CONFIGS)))
def test_a_long_program_of_each_machine(cores: tuple[Core, Core], seed: int) -> None:
    compare(cores, drawn(seed))


@pytest.mark.long
def test_thousands_of_long_programs(cores: tuple[Core, Core], any_seed: int) -> None:
    for seed in range(any_seed, any_seed + 1500):
        compare(cores, drawn(seed))
