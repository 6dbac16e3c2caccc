"""The yardsticks: the least that this machine can do of each kind of work, measured beside every row.

* E: one empty native call from Python, an integer in and one out.
* F: the bare fill of one 8-byte page-table entry, in a loop over 2 MiB.
* W: the barest four-level page walk, random over 1 GiB of 4 KiB pages.
* M: copying one byte, memcpy of 32 MiB.

Interpreted, F and W are Python loops, over a small part of that: the ratios then compare Python with Python.
"""

from __future__ import annotations

import ctypes
import random
from array import array

from dmakit.bench.native import Empty, _walk_unchecked, fill
from dmakit.bench.row import Bench

NAMES = {
    "E": "an empty native call",
    "F": "the bare fill of a PTE",
    "W": "the barest 4-level walk",
    "M": "memcpy, a byte",
    "own": "its own peer",
}
MIB = 1 << 20
FILLS = 8
WALKED = 1 << 30
ADDRESSES = 1 << 17


def empty_call(bench: Bench) -> float:
    """E."""
    return bench.statement("call(1)", number=100_000, call=bench.once("empty", Empty).call)


def bare_fill(bench: Bench) -> float:
    """F."""
    entries = bench.scaled(2 * MIB // 8)
    words = bench.once("fill", lambda: memoryview(array("Q", bytes(8 * entries))))

    def fills() -> None:
        for _ in range(FILLS):
            fill(words, 3, 4096)

    return bench.timed(fills, FILLS * entries)


def bare_walk(bench: Bench) -> float:
    """W."""
    words, addresses = bench.once("walk", lambda: walked_tables(bench.scaled(ADDRESSES)))
    return bench.timed(lambda: _walk_unchecked(words, 4096, addresses), len(addresses))


def walked_tables(count: int) -> tuple[memoryview[int], memoryview[int]]:
    """Tables that map 1 GiB from 0 by 4 KiB pages, root in page 1; ``count`` random addresses in it."""
    words = array("Q", bytes(4096 * (4 + 512)))
    words[512], words[1024] = 2 << 12, 3 << 12
    for n in range(512):
        words[3 * 512 + n] = (4 + n) << 12
        words[(4 + n) * 512 : (5 + n) * 512] = array("Q", range(n << 21, (n + 1) << 21, 4096))
    seeded = random.Random(1)
    return memoryview(words), memoryview(array("Q", [seeded.randrange(WALKED) for _ in range(count)]))


def memory_copy(bench: Bench) -> float:
    """M."""
    size = 32 * MIB
    there, here = bench.once("memcpy", lambda: (bytearray(b"\1" * size), bytearray(b"\2" * size)))
    to, source = (ctypes.c_char * size).from_buffer(there), (ctypes.c_char * size).from_buffer(here)
    return bench.timed(lambda: ctypes.memmove(to, source, size), size)


MEASURES = {"E": empty_call, "F": bare_fill, "W": bare_walk, "M": memory_copy}
