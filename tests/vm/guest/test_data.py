"""Every byte, every way: dmakit's NVMe driver through VFIO, alone and in turns with the kernel's driver and fio.

Sizes, places, queue depths and numbers in flight are random, derived from the test's name. In the full matrix a
combination moves 64 MiB and, once for each kernel interface, 1 GiB; else 4 MiB.
"""

from __future__ import annotations

import json
import random
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmakit import nvme, vfio
from dmakit.nvme.exercise import Verifier
from tests.vm.guest.support import BACKENDS, FULL, IOMMU, KERNEL, LONG, NVME, SHORT, kernel_nvme, modprobe

STRATEGIES = ("premap", "two-step", "page", "sg")
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 512
SIZE = (64 if FULL else 4) * MIB
backends = pytest.mark.parametrize("backend", BACKENDS)


@contextmanager
def held(bdf: str) -> Iterator[None]:
    """A drive in VFIO's hands."""
    modprobe("vfio-pci")
    vfio.bind(bdf)
    try:
        yield
    finally:
        vfio.unbind(bdf)


def dmakit(*words: str) -> dict[str, Any]:
    """What ``dmakit nvme …`` on the first drive says in JSON."""
    command = ["dmakit", "nvme", *words, "--platform", f"vfio:{NVME[0]}", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def chance(*names: object) -> random.Random:
    """The dice of one combination, the same in every run."""
    return random.Random(" ".join(map(str, (KERNEL, IOMMU, *names))))


@SHORT
@backends
def test_identify_tells_what_the_drive_is(backend: str) -> None:
    with held(NVME[0]):
        told = dmakit("identify", "--backend", backend)
    assert (told["model"], told["serial"]) == ("QEMU NVMe Ctrl", "DMAKIT0")
    assert int(told["sgls"], 16) & 3 and told["registers"].endswith("(ready)")
    (space,) = told["namespaces"]
    with kernel_nvme() as blocks:
        size = int(Path("/sys/block", blocks[NVME[0]].name, "size").read_text())
    assert (space["block_size"], space["blocks"], space["bytes"]) == (BLOCK, size, size * BLOCK)


@backends
@pytest.mark.parametrize(
    "strategy", ["two-step", *(pytest.param(name, marks=LONG) for name in ("premap", "page", "sg"))]
)
def test_verify_finds_every_byte(backend: str, strategy: str) -> None:
    dice = chance("verify", backend, strategy)
    size = (16 if FULL else 4) * MIB  # all of SIZE: test_nvme.py, which needs no process for each
    depth, queues, largest = dice.randint(1, 100), dice.randint(1, 3), dice.choice((4, 64, 512, 1024)) * KIB
    words = shlex.split(f"--backend {backend} --strategy {strategy} --size {size} --seed {dice.getrandbits(20)} --yes")
    words += shlex.split(f"--lba {dice.randrange(1 << 16)} --depth {depth} --queues {queues} --max-io {largest}")
    with held(NVME[0]):
        told = dmakit("verify", *words)
    assert told["strategy"] == strategy and told["sgl"] and told["good"], (words, told)
    assert told["bytes_written"] == told["bytes_compared"] == size // BLOCK * BLOCK
    assert told["prp_commands"] + told["sgl_commands"] == told["commands"]
    assert (told["failed"], told["mismatches"], told["resets"]) == ([], [], 0)


@backends
@pytest.mark.parametrize("sgl", [True, False], ids=["sgl", "prp"])
def test_every_strategy_reads_what_one_wrote(backend: str, sgl: bool) -> None:
    dice = chance("same data", backend, sgl)
    data = {"total": SIZE, "first": dice.randrange(1 << 16), "seed": dice.getrandbits(20)}
    listed = 0
    for number, strategy in enumerate(dice.sample(STRATEGIES, len(STRATEGIES))):
        deep = dice.choice((2, 17, 64, 255))
        options = {"strategy": strategy, "use_sgl": sgl, "queues": dice.randint(1, 3), "depth": deep}
        with held(NVME[0]), nvme.Controller.open(NVME[0], backend=backend, ram="192M", **options) as controller:
            report = Verifier(controller, 1, depth=dice.randint(1, 48), **data).run(write=number == 0)
        assert report.good and report.bytes_compared == SIZE, (options, report)
        assert report.prp_commands > 0 and (sgl or report.sgl_commands == 0), (options, report)
        listed += report.sgl_commands
    assert (listed > 0) == sgl  # page and premap need them for gaps only, which a few MiB may not have


@LONG
@pytest.mark.on(iommu="vtd-lazy")
def test_a_whole_gib() -> None:
    """Once for each kernel interface: iommufd on its kernel, type1 on Debian's."""
    words = shlex.split(f"--size {GIB} --strategy two-step --queues 2 --depth 64 --lba 77 --seed 1")
    with held(NVME[0]):
        told = dmakit("verify", "--backend", BACKENDS[-1], *words, "--yes")
    assert told["good"] and told["bytes_written"] == told["bytes_compared"] == GIB, told
    assert told["prp_commands"] > 0 and told["sgl_commands"] > 0


# With fio ---------------------------------------------------------------------------------------------------------

SALT = "5a17c0ffee0123456789abcdef55aa00ff7e"  # in each 4 KiB block, between two copies of its offset


def expected(first: int, size: int, block: int) -> bytes:
    """What fio's ``verify_pattern=%o0x…%o`` puts there: each block repeats its own byte offset, little endian."""
    lines = []
    for offset in range(first, first + size, block):
        unit = offset.to_bytes(8, "little") + bytes.fromhex(SALT) + offset.to_bytes(8, "little")
        lines.append((unit * (block // len(unit) + 1))[:block])
    return b"".join(lines)


def fio(node: Path, words: str) -> None:
    """A fio job on the kernel's driver that checks with its own rules."""
    pattern = ["--verify=pattern", f"--verify_pattern=%o0x{SALT}%o", "--verify_fatal=1"]
    options = f"--name=x --direct=1 --ioengine=libaio --randseed=5 {words}"
    command = ["fio", f"--filename={node}", *shlex.split(options), *pattern]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def regions(size: int) -> list[tuple[int, int, int]]:
    """(first byte, bytes, fio's block size) of three jobs."""
    quarter = size // 4
    parts = ((0, quarter, 4 * KIB), (quarter, quarter, 64 * KIB), (2 * quarter, 2 * quarter, 256 * KIB))
    return [(8 * MIB + first, length, block) for first, length, block in parts]


@SHORT
@backends
def test_fio_and_we_read_each_others_bytes(backend: str) -> None:
    dice, size = chance("fio", backend), (32 if FULL else 2) * MIB
    with kernel_nvme() as blocks:
        for first, length, block in regions(size):
            where = f"--offset={first} --size={length} --bs={block}"
            fio(blocks[NVME[0]], f"--rw=randwrite --iodepth=16 --do_verify=0 {where}")
    for number, strategy in enumerate(STRATEGIES if FULL else ["two-step"]):
        away = 64 * MIB * (1 + number + len(STRATEGIES) * BACKENDS.index(backend))  # we write where nobody has
        with held(NVME[0]), nvme.Controller.open(NVME[0], backend=backend, ram="192M", strategy=strategy) as controller:
            disk = controller.namespaces[1]
            for first, length, block in regions(size):
                found, truth = bytearray(), expected(first, length, block)
                for at, count in cuts(dice, first, length):
                    found += disk.read(at // BLOCK, count // BLOCK)
                wrong = int(np.count_nonzero(np.frombuffer(found, "u1") != np.frombuffer(truth, "u1")))
                assert wrong == 0, f"{wrong} of {length} bytes of fio's differ, read with {strategy}"
                truth = expected(first + away, length, block)
                for at, count in cuts(dice, first, length):
                    disk.write((at + away) // BLOCK, truth[at - first :][:count])
            disk.flush()
        with kernel_nvme() as nodes:
            for first, length, block in regions(size):
                where = f"--offset={first + away} --size={length} --bs={block}"
                fio(nodes[NVME[0]], f"--rw=randread --iodepth=8 {where}")


def cuts(dice: random.Random, first: int, length: int) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of pieces of random sizes, in order, that cover the region."""
    at, end = first, first + length
    while at < end:
        count = min(dice.randint(1, dice.choice((8, 256, 2048))) * BLOCK, end - at)
        yield at, count
        at += count
