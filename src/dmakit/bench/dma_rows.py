"""Rows 7, 9b and 12: mapping calls of a device, and the descriptors that tell a controller about them.

* **7**: the two-step mapping of 32 scattered pages, lazy mode: allocate a window, 32 links, sync, destroy. In a batch
  of 64 requests (one call maps all, one destroys all), and for one request (one call maps, one destroys). Every
  counter of the ledger is on and counts the 35 calls that each stands for.
* **9b**: from a device address to what is mapped there, with 65,536 mappings alive, in random order.
* **12**: a PRP list for 1 MiB of contiguous memory, an entry; PRP lists and SGLs from 256 scattered segments, a
  segment. 64 requests a call, list blocks from the descriptor pools; giving the blocks back is not in the figure.
"""

from __future__ import annotations

from array import array
from random import Random
from time import perf_counter_ns
from typing import Any

from dmakit.bench.row import Bench, Row
from dmakit.dma.direction import Direction
from dmakit.failpoint import FailPoint
from dmakit.ledger import Ledger
from dmakit.nvme.pool import DescriptorPool, PlainSource
from dmakit.nvme.prp import PrpWriter
from dmakit.nvme.sgl import SglWriter
from dmakit.platform.soft import Machine

_PAGE = 4096
_BASE = 256 << 20
_TO = int(Direction.TO_DEVICE)
_PIECES = 32
_REQUESTS = 64
_SEGMENTS = 256
_TURNS = 10  # builds in one repetition, after one that warms up


def _device(bench: Bench) -> tuple[Machine, Any]:
    def make() -> tuple[Machine, Any]:
        machine = Machine(ram="1G")
        return machine, machine.device("bench")

    return bench.once("dma device", make)


def _scattered(count: int) -> array[int]:
    """``count`` pages of RAM in random order."""
    return array("Q", [_BASE + page * _PAGE for page in Random(1).sample(range(1 << 17), count)])


def window_batch(bench: Bench) -> float:
    """7a: ns a request."""
    _, device = _device(bench)
    phys = bench.once("dma scattered", lambda: _scattered(_PIECES * _REQUESTS))
    sizes, states = array("Q", [_PAGE]) * len(phys), array("Q", [0]) * (2 * _REQUESTS)
    bounds = array("Q", range(0, len(phys) + 1, _PIECES))
    code = "map(phys, sizes, bounds, states, to); unmap(states, to)"
    calls = {"map": device.map_windows, "unmap": device.unmap_windows}
    return bench.statement(code, 100, phys=phys, sizes=sizes, bounds=bounds, states=states, to=_TO, **calls) / _REQUESTS


def window_call(bench: Bench) -> float:
    """7b: ns a request."""
    _, device = _device(bench)
    phys, sizes = bench.once("dma pieces", lambda: _scattered(_PIECES)), array("Q", [_PAGE]) * _PIECES
    code = "map(phys, sizes, to).destroy(size, to)"
    return bench.statement(code, 2000, map=device.map_window, phys=phys, sizes=sizes, size=_PIECES * _PAGE, to=_TO)


def address_to_mapping(bench: Bench) -> float:
    """9b: ns a call."""

    def make() -> list[int]:
        _, device = _device(bench)
        live = [device.map_phys(_BASE + i * _PAGE, _PAGE, _TO) for i in range(bench.scaled(1 << 16))]
        Random(2).shuffle(live)
        return live

    find, live = _device(bench)[1].iova_to_phys, bench.once("dma live", make)

    def calls() -> None:
        for addr in live:
            find(addr)

    return bench.timed(calls, len(live))


def _writers(bench: Bench) -> tuple[PrpWriter, SglWriter]:
    def make() -> tuple[PrpWriter, SglWriter]:
        ledger, fail = Ledger(), FailPoint()
        small = DescriptorPool(PlainSource(), 256, ledger=ledger, fail=fail)
        large = DescriptorPool(PlainSource(1 << 33), _PAGE, ledger=ledger, fail=fail)
        return PrpWriter(small, large), SglWriter(small, large)

    return bench.once("nvme writers", make)


def _lists(writer: Any, addrs: array[int], length: int, ranges: int, entries: int) -> float:
    """ns an entry of building lists for requests of ``ranges`` ranges each."""
    requests = len(addrs) // ranges
    lengths, out = array("Q", [length]) * len(addrs), array("Q", [0]) * (2 * requests)
    bounds, chains = array("Q", range(0, len(addrs) + 1, ranges)), array("Q", [0]) * requests
    spent = 0
    for turn in range(_TURNS + 1):
        begin = perf_counter_ns()
        writer.build_batch(addrs, lengths, bounds, out, chains)
        took = perf_counter_ns() - begin
        writer.drop_batch(chains)
        spent += took if turn else 0
    return spent / (_TURNS * requests * entries)


def prp_contiguous(bench: Bench) -> float:
    """12a: ns an entry."""
    addrs = array("Q", [(1 << 34) + (i << 20) for i in range(_REQUESTS)])
    return _lists(_writers(bench)[0], addrs, 1 << 20, 1, _SEGMENTS)


def prp_scattered(bench: Bench) -> float:
    """12b: ns a segment."""
    addrs = bench.once("nvme scattered", lambda: _scattered(_SEGMENTS * _REQUESTS))
    return _lists(_writers(bench)[0], addrs, _PAGE, _SEGMENTS, _SEGMENTS)


def sgl_scattered(bench: Bench) -> float:
    """12c: ns a segment."""
    addrs = bench.once("nvme scattered", lambda: _scattered(_SEGMENTS * _REQUESTS))
    return _lists(_writers(bench)[1], addrs, _PAGE, _SEGMENTS, _SEGMENTS)


ROWS = [
    Row("7a", "two-step mapping of 32 scattered pages, batch", "ns/request", 14, "lower", "E", window_batch),
    Row("7b", "two-step mapping of 32 scattered pages, one call", "ns/request", 28, "lower", "E", window_call),
    Row("9b", "address to mapping, 65 k live, one call", "ns/call", 9, "lower", "E", address_to_mapping),
    Row("12a", "PRP list for 1 MiB contiguous", "ns/entry", 3, "lower", "F", prp_contiguous),
    Row("12b", "PRP list from 256 scattered segments", "ns/segment", 0.5, "lower", "E", prp_scattered),
    Row("12c", "SGL from 256 scattered segments", "ns/segment", 0.5, "lower", "E", sgl_scattered),
]
