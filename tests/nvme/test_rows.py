"""Requests in columns: mapped, described, counted and unmapped as one by one, and without the GIL."""

from __future__ import annotations

import threading
from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.gil import released

from dmakit import _core
from dmakit.block.request import Op, Request
from dmakit.consts import DMA_FROM_DEVICE, DMA_TO_DEVICE
from dmakit.errors import MisuseError, UnsupportedError
from dmakit.nvme.coherent import DeviceSource
from dmakit.nvme.mapping import RequestMapper
from dmakit.nvme.pool import LARGE_BYTES, SMALL_BYTES, DescriptorPool
from dmakit.nvme.rows import FIELDS, ROW, RowMapper
from dmakit.platform.soft import Machine

PAGE = 4096
COMPILED = pytest.mark.skipif(_core.status()["running"] != "compiled", reason="interpreted code keeps the GIL")
Ask = tuple[int, int, list[tuple[int, int]]]  # direction, CPU, segments


class Host:
    """A machine, a device, a mapper."""

    def __init__(self, mode: str = "lazy", *, identity: bool = False, **options: Any) -> None:
        self.machine = Machine(ram="64M", swiotlb=0, cpus=2)
        self.device = self.machine.device("nvme", identity=identity)
        shared: dict[str, Any] = {"ledger": self.machine.ledger, "fail": self.machine.fail}
        self.pools = [DescriptorPool(DeviceSource(self.device), size, **shared) for size in (SMALL_BYTES, LARGE_BYTES)]
        self.mapper = RequestMapper(self.device, *self.pools, ledger=self.machine.ledger, **options)
        self.rows = RowMapper(self.mapper)
        self.base = self.machine.buffer(8 << 20).ranges[0][0]

    def seen(self) -> tuple[object, ...]:
        """Counters, locks by CPU, live table entries, blocks that are out."""
        table = self.device.domain.table if self.device.domain is not None else None
        leaves = [tuple(leaf) for leaf in table.leaves()] if table is not None else []
        used = [pool.used for pool in self.pools]
        return self.machine.ledger.snapshot(), self.machine.ledger.lock_counts(), leaves, used

    def lists(self, chain: int) -> list[bytes]:
        return [bytes(block.words) for block in self.mapper.prp.blocks(chain)]


def columns(asks: list[Ask]) -> tuple[array[int], ...]:
    bounds = array("Q", [0])
    for _, _, segments in asks:
        bounds.append(bounds[-1] + len(segments))
    flat = [piece for _, _, segments in asks for piece in segments]
    ways, cpus = array("Q", [way for way, _, _ in asks]), array("Q", [cpu for _, cpu, _ in asks])
    return ways, cpus, array("Q", [phys for phys, _ in flat]), array("Q", [size for _, size in flat]), bounds


def one_by_one(host: Host, asks: list[Ask], nth: int) -> Any:
    found, iods = [], []
    if nth >= 0:
        host.machine.fail.arm(nth)
    for way, cpu, segments in asks:
        iod = host.mapper.map(Request(Op.READ if way == DMA_FROM_DEVICE else Op.WRITE, segments, cpu=cpu))
        iods.append(iod)
        told = (iod.status, iod.path, iod.reason, iod.psdt, iod.low, iod.high, iod.total, iod.entries)
        found.append(told if iod.status == 0 else told[:3])
    host.machine.fail.disarm()
    lists, mapped = [host.lists(iod.chain) for iod in iods], host.seen()
    for iod, (_, cpu, _) in zip(iods, asks, strict=True):
        host.mapper.unmap(iod, cpu=1 - cpu)
    return found, lists, mapped, host.seen()


def together(host: Host, asks: list[Ask], nth: int) -> Any:
    rows = array("Q", bytes(8 * ROW * len(asks)))
    if nth >= 0:
        host.machine.fail.arm(nth)
    done = host.rows.map_many(*columns(asks), rows)
    host.machine.fail.disarm()
    cut = [rows[ROW * at : ROW * (at + 1)] for at in range(len(asks))]
    found = [tuple(row[:8]) if row[0] == 0 else tuple(row[:3]) for row in cut]
    assert done == sum(row[0] == 0 for row in cut)
    lists, mapped = [host.lists(row[FIELDS.index("chain")]) for row in cut], host.seen()
    host.rows.unmap_many(rows, array("Q", [1 - cpu for _, cpu, _ in asks]))
    assert not any(rows)
    return found, lists, mapped, host.seen()


@st.composite
def asked(draw: st.DrawFn) -> Ask:
    """One request: none, one or many segments, with and without gaps that an IOMMU cannot hide."""
    count = draw(st.sampled_from([0, 1, 1, 2, 3, 17, 40]))
    size, step = draw(st.sampled_from([(PAGE, 2 * PAGE), (512, 2 * PAGE), (3 * PAGE, 3 * PAGE), (PAGE, PAGE + 512)]))
    first = draw(st.integers(0, 100)) * PAGE + draw(st.sampled_from([0, 0, 512]))
    segments = [(first + at * step, size) for at in range(count)]
    return draw(st.sampled_from([DMA_TO_DEVICE, DMA_FROM_DEVICE])), draw(st.integers(0, 1)), segments


@given(
    st.lists(asked(), min_size=1, max_size=6),
    st.integers(-1, 25),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["gap", "virt-boundary"]),
    st.sampled_from([0, 8 * PAGE]),
)
@settings(max_examples=120)
def test_rows_equal_one_by_one(asks: list[Ask], nth: int, identity: bool, sgl: bool, rule: str, threshold: int) -> None:
    """Statuses, paths, reasons, pointers, list bytes, table entries and every count, with each allocation failing."""
    answers = []
    for way in (one_by_one, together):
        host = Host(identity=identity, sgl_supported=sgl, rule=rule, sgl_threshold=threshold)
        placed = [(to, cpu, [(host.base + phys, size) for phys, size in segments]) for to, cpu, segments in asks]
        answers.append(way(host, placed, nth))
    assert answers[1] == answers[0]


def test_vectors_of_many_requests_are_kept_apart() -> None:
    """Without a window PRPs describe pages one by one, and their addresses are kept in the mapper's slots."""
    host = Host(sgl_supported=False, rule="virt-boundary")
    asks: list[Ask] = [
        (DMA_TO_DEVICE, 0, [(host.base + at * 32 * PAGE + i * 2 * PAGE, PAGE) for i in range(9)]) for at in range(9)
    ]
    twin = Host(sgl_supported=False, rule="virt-boundary")
    assert together(host, asks, -1) == one_by_one(twin, asks, -1)
    assert together(host, asks, -1)[0][0][1] == 4  # per-segment


@pytest.mark.parametrize("at", range(ROW))
@pytest.mark.parametrize("number", [(1 << 64) - 1, 1 << 31, 77])
def test_rows_that_were_written_to_do_no_harm(at: int, number: int) -> None:
    host = Host(sgl_supported=True)
    rows = array("Q", bytes(16 * ROW))
    segments = [(host.base + i * 3 * PAGE + 512, 1024) for i in range(5)]
    host.rows.map_many(*columns([(DMA_TO_DEVICE, 0, segments), (DMA_TO_DEVICE, 0, segments[:1])]), rows)
    rows[at] = number
    try:
        host.rows.unmap_many(rows, array("Q", [0, 0]))
    except MisuseError as error:
        assert "row 0" in str(error) or "nothing is mapped" in str(error) or "no list block" in str(error)


def test_what_is_out_of_range_is_refused_before_anything_is_mapped() -> None:
    host = Host(sgl_supported=True)
    good: Ask = (DMA_TO_DEVICE, 0, [(host.base, PAGE)])
    before = host.seen()
    for bad in ((0, 0, good[2]), (DMA_TO_DEVICE, 2, good[2]), (DMA_TO_DEVICE, 0, [(1 << 63, PAGE)]), (1, 0, [(0, 0)])):
        with pytest.raises(MisuseError, match=r"^map_many: request 1: its direction, its CPU, its bounds or a segment"):
            host.rows.map_many(*columns([good, bad]), array("Q", bytes(16 * ROW)))
    with pytest.raises(MisuseError, match=rf"^rows: has 1 words, at least {ROW} are needed$"):
        host.rows.map_many(*columns([good]), array("Q", [0]))
    with pytest.raises(MisuseError, match=r"^cpus: must be below 2$"):
        host.rows.unmap_many(array("Q", bytes(16 * ROW)), array("Q", [0, 2]))
    assert host.seen() == before


def test_a_device_that_is_watched_is_unsupported() -> None:
    host = Host(sgl_supported=True)
    host.device.checker = object()
    with pytest.raises(
        UnsupportedError, match=r"^map_many: the device must be one of dmakit's own, without a contract"
    ):
        host.rows.map_many(*columns([]), array("Q"))


def test_a_batch_that_waits_has_not_touched_the_mapper() -> None:
    """Whoever has the turn may map by the same mapper meanwhile: the one that waits sets it up when it is its turn."""
    host, others, both = Host(sgl_supported=False), array("Q", bytes(8 * ROW)), array("Q", [0])
    asks: list[list[Ask]] = [
        [(DMA_TO_DEVICE, 0, [(host.base + at * PAGE, PAGE) for at in pages])] for pages in ((0, 1, 2, 3), (4, 5, 6, 7))
    ]
    rows = array("Q", bytes(8 * ROW))
    threads = [
        threading.Thread(target=host.rows.map_many, args=(*columns(asks[1]), others), daemon=True),
        threading.Thread(target=host.rows.unmap_many, args=(array("Q", bytes(8 * ROW)), both), daemon=True),
    ]
    with host.machine.ledger.turn:
        for thread in threads:
            thread.start()
        threads[0].join(0.1)
        assert host.rows.map_many(*columns(asks[0]), rows) == 1
    for thread in threads:
        thread.join(30)
    where = FIELDS.index("window_addr")
    for ask, row in zip(asks, (rows, others), strict=True):
        seen = [host.device.iova_to_phys(row[where] + at * PAGE) for at in range(4)]
        assert seen == [phys for phys, _ in ask[0][2]]
        host.rows.unmap_many(row, both)


@COMPILED
def test_other_threads_run_during_a_batch() -> None:
    host = Host(sgl_supported=False)
    asks: list[Ask] = [(DMA_TO_DEVICE, 0, [(host.base + at * PAGE, PAGE)]) for at in range(500)]
    given, rows, cpus = columns(asks), array("Q", bytes(8 * ROW * 500)), array("Q", [0] * 500)
    assert released(lambda: (host.rows.map_many(*given, rows), host.rows.unmap_many(rows, cpus)))
