"""Twin machines: one gets the batch, the other the loop of scalar calls that it stands for.

After each operation the two must show the same: answers and errors, every byte of the page tables and of memory, the
whole ledger, lock acquisitions by CPU, and what is live. Machines of every mode; pieces of every alignment, as long as
they stay in memory; any allocation may be made to fail on its n-th use.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmakit.dma import batch, report
from dmakit.dma.direction import Attrs, Direction
from dmakit.errors import DmakitError, MisuseError
from dmakit.iommu.gather import Gather
from dmakit.platform.soft import Machine
from tests.dma.world import PAGE

CPUS = 3
PAGES = 16
TABLES = 48
HUGE = 2 << 20
RW = 3
MACHINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "strict": ({"mode": "strict"}, {}),
    "lazy": ({"mode": "lazy"}, {}),
    "lazy, augmented": ({"mode": "lazy", "policy": "augmented"}, {"mask": (1 << 30) - 1}),
    "caching mode, walker not coherent": ({"mode": "strict", "caching_mode": True, "coherent_walker": False}, {}),
    "first stage": ({"mode": "lazy", "iommu": "x86"}, {}),
    "five levels": ({"mode": "strict", "iommu": "x86", "levels": 5}, {}),
    "untrusted": ({"mode": "strict"}, {"trusted": False}),
    "not coherent": ({"mode": "strict", "coherent": False}, {}),
    "not coherent, lazy": ({"mode": "lazy", "coherent": False}, {}),
    "passthrough": ({"mode": "passthrough"}, {}),
    "passthrough, not coherent": ({"mode": "passthrough", "coherent": False}, {}),
    "forced bounce": ({"iommu": "none", "force_bounce": True}, {}),
    "24-bit mask": ({"iommu": "none"}, {"mask": (1 << 24) - 1}),
}
TRANSLATING = [name for name in MACHINES if name.split(",")[0] not in ("passthrough", "forced bounce", "24-bit mask")]


class Twin:
    """One machine and its device; ``seen`` is all that can be seen of it."""

    def __init__(self, name: str) -> None:
        options, device = MACHINES[name]
        self.machine = Machine(ram="24M", cpus=CPUS, seed=1, fragmentation=1.0, swiotlb="1M", **options)
        self.device: Any = self.machine.device("nvme0", **device)
        self.pages = [self.machine.pages.alloc() for _ in range(PAGES)]
        tables = self.machine.table_pages.start
        self.tables = range(tables, tables + TABLES * PAGE, PAGE)  # they are taken in this order, and again
        self.live: list[tuple[int, int, int, int]] = []
        self.window: Any = None

    def run(self, call: Callable[..., Any], *given: Any, fail: int = -1) -> Any:
        """What a call answered, or how it failed."""
        if fail >= 0:
            self.machine.fail.arm(fail)
        try:
            return call(self, *given)
        except DmakitError as error:
            text = str(error).split(": ", 2)[-1] if isinstance(error, MisuseError) else str(error)
            return type(error), text, error.errno
        finally:
            self.machine.fail.disarm()

    def seen(self) -> Any:
        memory, ledger = self.machine.memory, self.machine.ledger
        domain = self.device.domain
        leaves = None if domain is None else [tuple(leaf) for leaf in domain.table.leaves()]
        crc = 0
        for page in [*self.pages, *self.tables]:
            crc = zlib.crc32(memory.view[page : page + PAGE], crc)
        return crc, leaves, ledger.snapshot(), ledger.lock_counts(), self.machine.live(), self.device.why

    def place(self, piece: tuple[int, int, int]) -> tuple[int, int]:
        page, skew, size = piece
        return self.pages[page % PAGES] + skew, size


def words(numbers: Any) -> array[int]:
    return array("Q", numbers)


# The two forms of each operation: what they answer must be equal. ``live`` are (address, size, direction, attrs).


def map_many(twin: Twin, pieces: Any, way: int, how: int, cpu: int) -> Any:
    places = [twin.place(piece) for piece in pieces]
    out = words([0] * len(places))
    batch.map_many(twin.device, words(p for p, _ in places), words(s for _, s in places), out, way, how, cpu=cpu)
    twin.live += [(addr, size, way, how) for addr, (_, size) in zip(out, places, strict=True)]
    return list(out)


def map_each(twin: Twin, pieces: Any, way: int, how: int, cpu: int) -> Any:
    done: list[tuple[int, int, int, int]] = []
    try:
        for phys, size in map(twin.place, pieces):
            done.append((twin.device.map_phys(phys, size, way, how, cpu), size, way, how))
    except DmakitError:
        for addr, size, _, _ in done:
            twin.device.unmap_phys(addr, size, way, how, cpu)
        raise
    twin.live += done
    return [addr for addr, *_ in done]


def taken(twin: Twin, count: int, gaps: Any) -> list[tuple[int, int, int, int]]:
    """Up to ``count`` live mappings of one kind, last first, with addresses of nothing (``gaps``) between.

    Without an IOMMU every address is something: there are no gaps then.
    """
    kind = twin.live[0][2:] if twin.live else (0, 0)
    chosen = [entry for entry in twin.live if entry[2:] == kind][:count][::-1]
    for gap in gaps if twin.device.translating else ():
        chosen.insert(gap % (len(chosen) + 1), (1 << 36 | gap << 20, PAGE, *kind))
    return chosen


def unmap_many(twin: Twin, count: int, gaps: Any, cpu: int) -> Any:
    chosen = taken(twin, count, gaps)
    twin.live = [entry for entry in twin.live if entry not in chosen]
    if chosen:
        way, how = chosen[0][2:]
        addresses, sizes = words(entry[0] for entry in chosen), words(entry[1] for entry in chosen)
        batch.unmap_many(twin.device, addresses, sizes, way, how, cpu=cpu)
    return chosen


def unmap_each(twin: Twin, count: int, gaps: Any, cpu: int) -> Any:
    chosen, first = taken(twin, count, gaps), None
    twin.live = [entry for entry in twin.live if entry not in chosen]
    for addr, size, way, how in chosen:
        try:
            twin.device.unmap_phys(addr, size, way, how, cpu)
        except MisuseError as error:
            first = first or MisuseError(f"x: y: {str(error).split(': ', 1)[1]}", error.errno)
    if first is not None:
        raise first
    return chosen


def sync_many(twin: Twin, count: int, gaps: Any, for_cpu: bool) -> Any:
    chosen = taken(twin, count, gaps)
    if chosen:
        call = batch.sync_many_for_cpu if for_cpu else batch.sync_many_for_device
        call(twin.device, words(entry[0] for entry in chosen), words(entry[1] for entry in chosen), chosen[0][2])
    return chosen


def sync_each(twin: Twin, count: int, gaps: Any, for_cpu: bool) -> Any:
    chosen, first = taken(twin, count, gaps), None
    call = twin.device.sync_single_for_cpu if for_cpu else twin.device.sync_single_for_device
    for addr, size, way, _ in chosen:
        try:
            call(addr, size, way)
        except MisuseError as error:
            first = first or MisuseError(f"x: y: {str(error).split(': ', 1)[1]}", error.errno)
    if first is not None:
        raise first
    return chosen


CLASSIC = [(map_many, map_each), (unmap_many, unmap_each), (sync_many, sync_each)]

PIECE = st.tuples(
    st.integers(0, PAGES - 1),
    st.sampled_from([0, 0, 0, 8, 1024, 4000]),
    st.sampled_from([PAGE, PAGE, PAGE, 64, 100, 2 * PAGE, 5000]),
)
WAY = st.sampled_from([Direction.TO_DEVICE, Direction.FROM_DEVICE, Direction.BIDIRECTIONAL])
HOW = st.sampled_from([0, 0, 0, Attrs.SKIP_CPU_SYNC, Attrs.REQUIRE_COHERENT])
CPU = st.integers(0, CPUS - 1)
FAIL = st.sampled_from([-1, -1, -1, 0, 1, 2, 3, 5, 8])
GAPS = st.lists(st.integers(0, 40), max_size=2)
STEP = st.one_of(
    st.tuples(st.just(0), FAIL, st.tuples(st.lists(PIECE, min_size=1, max_size=9), WAY, HOW, CPU)),
    st.tuples(st.just(0), FAIL, st.tuples(st.lists(PIECE, min_size=1, max_size=9), WAY, HOW, CPU)),
    st.tuples(st.just(1), FAIL, st.tuples(st.integers(0, 12), GAPS, CPU)),
    st.tuples(st.just(2), FAIL, st.tuples(st.integers(0, 12), GAPS, st.booleans())),
)


def compare(name: str, forms: Any, steps: Any) -> tuple[Twin, Twin]:
    """Run a program on both twins, side by side."""
    twins = Twin(name), Twin(name)
    for which, fail, given_to in steps:
        answers = [twin.run(forms[which][i], *given_to, fail=fail) for i, twin in enumerate(twins)]
        assert answers[0] == answers[1], forms[which][0].__name__
        assert twins[0].seen() == twins[1].seen(), forms[which][0].__name__
    return twins


@pytest.mark.parametrize("name", MACHINES)
@settings(max_examples=12)
@given(steps=st.lists(STEP, min_size=1, max_size=8))
def test_the_classic_batches_are_the_scalar_calls(name: str, steps: Any) -> None:
    compare(name, CLASSIC, steps)


# Windows --------------------------------------------------------------------------------------------------------


def linked(window: Any) -> list[tuple[int, int, int, int]]:
    """What a window remembers, neighbours of one kind as one: a batch notes its pieces so, a loop one by one."""
    runs: list[tuple[int, int, int, int]] = []
    for offset, size, way, how in sorted(window.pieces):
        if runs and runs[-1][0] + runs[-1][1] == offset and runs[-1][2:] == (way, how):
            offset, size = runs[-1][0], runs.pop()[1] + size
        runs.append((offset, size, way, how))
    return runs


def open_window(twin: Twin, cpu: int) -> Any:
    if twin.window:
        for piece in linked(twin.window):
            twin.window.unlink(*piece)
        twin.window.free()
    twin.window = twin.device.try_alloc(0, 2 * HUGE, cpu)
    return twin.window.addr


def link_many(twin: Twin, pieces: Any, offset: int, way: int, how: int, cpu: int | None) -> Any:
    if not twin.window:
        return None
    places = [twin.place(piece) for piece in pieces]
    return batch.link_many(
        twin.window, words(p for p, _ in places), words(s for _, s in places), way, how, offset=offset, cpu=cpu
    )


def link_each(twin: Twin, pieces: Any, offset: int, way: int, how: int, cpu: int | None) -> Any:
    if not twin.window:
        return None
    at = offset
    try:
        for phys, size in map(twin.place, pieces):
            twin.window.link(phys, at, size, way, how, cpu)
            at += size
    except DmakitError:
        if at > offset:
            twin.window.unlink(offset, at - offset, way, how, cpu)
        raise
    return at - offset


def link_huge(twin: Twin, way: int) -> Any:
    """A large leaf, when the window's address allows one, from its second half on."""
    if twin.window:
        twin.window.link(0, -twin.window.addr % HUGE, HUGE, way)
    return None


def sync_window(twin: Twin, ranges: Any, cpu: int | None) -> Any:
    if twin.window:
        batch.sync_many(twin.window, words(o for o, _ in ranges), words(s for _, s in ranges), cpu=cpu)


def sync_ranges(twin: Twin, ranges: Any, cpu: int | None) -> Any:
    if twin.window:
        for offset, size in ranges:
            twin.window.sync(offset, size, cpu=cpu)


def unlink_many(twin: Twin, ranges: Any, way: int, cpu: int | None) -> Any:
    if not twin.window:
        return None
    try:
        batch.unlink_many(twin.window, words(o for o, _ in ranges), words(s for _, s in ranges), way, cpu=cpu)
    except DmakitError as error:
        return type(error), str(error).split("[", 1)[1], linked(twin.window)
    return linked(twin.window)


def unlink_each(twin: Twin, ranges: Any, way: int, cpu: int | None) -> Any:
    if not twin.window:
        return None
    first: DmakitError | None = None
    for offset, size in ranges:
        try:
            twin.window.unlink(offset, size, way, 0, cpu)
        except DmakitError as error:
            first = first or error
    if first is not None:
        return type(first), str(first).split("[", 1)[1], linked(twin.window)
    return linked(twin.window)


WINDOWS = [
    (open_window, open_window),
    (link_many, link_each),
    (link_huge, link_huge),
    (sync_window, sync_ranges),
    (unlink_many, unlink_each),
]
WHOLE = st.tuples(st.integers(0, PAGES - 1), st.just(0), st.sampled_from([PAGE, PAGE, 2 * PAGE]))
OFFSET = st.sampled_from([0, 0, PAGE, 8 * PAGE, HUGE - PAGE, HUGE])
RANGES = st.lists(st.tuples(OFFSET, st.sampled_from([PAGE, 2 * PAGE, 12 * PAGE, HUGE])), min_size=1, max_size=5)
ON = st.one_of(st.none(), CPU)
WINDOW_STEP = st.one_of(
    st.tuples(st.just(1), FAIL, st.tuples(st.lists(WHOLE, min_size=1, max_size=9), OFFSET, WAY, HOW, ON)),
    st.tuples(st.just(1), FAIL, st.tuples(st.lists(PIECE, min_size=1, max_size=4), OFFSET, WAY, HOW, ON)),
    st.tuples(st.just(2), FAIL, st.tuples(WAY)),
    st.tuples(st.just(3), FAIL, st.tuples(RANGES, ON)),
    st.tuples(st.just(4), FAIL, st.tuples(RANGES, WAY, ON)),
    st.tuples(st.just(0), FAIL, st.tuples(CPU)),
)


@pytest.mark.parametrize("name", TRANSLATING)
@settings(max_examples=12)
@given(cpu=CPU, steps=st.lists(WINDOW_STEP, min_size=2, max_size=8))
def test_the_window_batches_are_the_scalar_calls(name: str, cpu: int, steps: Any) -> None:
    compare(name, WINDOWS, [(0, -1, (cpu,)), *steps])


# Whole windows --------------------------------------------------------------------------------------------------


def map_windows(twin: Twin, requests: Any, way: int, how: int, cpu: int) -> Any:
    places = [[twin.place(piece) for piece in pieces] for pieces in requests]
    flat = [place for pieces in places for place in pieces]
    bounds = [sum(map(len, places[:i])) for i in range(len(places) + 1)]
    states = words([0] * 2 * len(places))
    twin.device.map_windows(
        words(p for p, _ in flat), words(s for _, s in flat), words(bounds), states, way, how, cpu=cpu
    )
    seen = list(states)
    twin.device.unmap_windows(states, way, how, cpu=cpu)
    return seen


def map_each_window(twin: Twin, requests: Any, way: int, how: int, cpu: int) -> Any:
    done: list[tuple[Any, int]] = []
    seen: list[int] = []
    try:
        for pieces in requests:
            places = [twin.place(piece) for piece in pieces]
            total, linked = sum(size for _, size in places), 0
            state = twin.device.try_alloc(places[0][0], total, cpu)
            if not state:
                raise report.window_error(twin.device, total)  # there is no scalar text for it
            try:
                for phys, size in places:
                    state.link(phys, linked, size, way, how)
                    linked += size
                state.sync(0, linked)
            except DmakitError:
                state.destroy(linked, way, how)
                raise
            done.append((state, total))
            seen += [state.addr, state.size_word]
    finally:
        for state, total in done:
            state.destroy(total, way, how)
    return seen


REQUESTS = st.lists(st.lists(st.one_of(WHOLE, PIECE), min_size=1, max_size=5), min_size=1, max_size=4)


@pytest.mark.parametrize("name", MACHINES)
@settings(max_examples=12)
@given(steps=st.lists(st.tuples(st.just(0), FAIL, st.tuples(REQUESTS, WAY, HOW, CPU)), min_size=1, max_size=4))
def test_whole_windows_are_the_scalar_calls(name: str, steps: Any) -> None:
    compare(name, [(map_windows, map_each_window)], steps)


# The domain itself ------------------------------------------------------------------------------------------------

BASE = 1 << 38


def domain_map_many(twin: Twin, rows: Any, cpu: int) -> Any:
    iovas, phys, sizes = (words(column) for column in zip(*rows, strict=True))
    twin.device.domain.map_many(iovas, phys, sizes, RW, cpu=cpu)


def domain_map_each(twin: Twin, rows: Any, cpu: int) -> Any:
    domain, gather = twin.device.domain, Gather()
    for i, row in enumerate(rows):
        try:
            domain.map(*row, RW, cpu)
        except DmakitError:
            for iova, _, size in rows[:i]:
                domain.unmap_gather(iova, size, gather)
            domain.flush(gather, cpu)
            raise


def domain_unmap_many(twin: Twin, rows: Any, cpu: int) -> Any:
    return twin.device.domain.unmap_many(words(r[0] for r in rows), words(r[2] for r in rows), cpu=cpu)


def domain_unmap_each(twin: Twin, rows: Any, cpu: int) -> Any:
    """One invalidation for all: the calls that gather, and one flush."""
    domain, gather = twin.device.domain, Gather()
    removed = sum(domain.unmap_gather(iova, size, gather) for iova, _, size in rows)
    domain.flush(gather, cpu)
    return removed


def look_many(twin: Twin, rows: Any, write: bool) -> Any:
    unit, domain = twin.machine.unit, twin.device.domain
    addresses = words(row[0] + 24 for row in rows)
    found, reached = words([0] * len(rows)), words([0] * len(rows))
    count = domain.iova_to_phys_many(addresses, found)
    faults = unit.translate_many(domain.did, addresses, reached, write, source=8)
    return count, list(found), faults, list(reached), [record[:] for record in unit.faults], unit.faults_lost


def look_each(twin: Twin, rows: Any, write: bool) -> Any:
    unit, domain = twin.machine.unit, twin.device.domain
    found = [domain.iova_to_phys(row[0] + 24) for row in rows]
    reached = []
    for row in rows:
        try:
            reached.append(unit.translate(domain.did, row[0] + 24, write, source=8))
        except DmakitError:
            reached.append((1 << 64) - 1)
    faults = reached.count((1 << 64) - 1)
    count = len(found) - found.count(0)
    return count, found, faults, reached, [record[:] for record in unit.faults], unit.faults_lost


DOMAIN = [(domain_map_many, domain_map_each), (domain_unmap_many, domain_unmap_each), (look_many, look_each)]
ROW = st.tuples(
    st.sampled_from([BASE + i * PAGE for i in (0, 1, 2, 3, 8, 511, 512, 513, 1024)] + [BASE + 4 * HUGE, BASE + 5]),
    st.sampled_from([0, PAGE, 3 * PAGE, HUGE, 4 * HUGE]),
    st.sampled_from([PAGE, PAGE, 2 * PAGE, HUGE, 2 * HUGE, 0, 16 << 20]),
)
ROWS = st.lists(ROW, min_size=1, max_size=6)
DOMAIN_STEP = st.one_of(
    st.tuples(st.just(0), FAIL, st.tuples(ROWS, CPU)),
    st.tuples(st.just(0), FAIL, st.tuples(ROWS, CPU)),
    st.tuples(st.just(1), FAIL, st.tuples(ROWS, CPU)),
    st.tuples(st.just(2), FAIL, st.tuples(ROWS, st.booleans())),
)


@pytest.mark.parametrize("name", TRANSLATING)
@settings(max_examples=15)
@given(steps=st.lists(DOMAIN_STEP, min_size=1, max_size=8))
def test_the_domains_batches_are_its_scalar_calls(name: str, steps: Any) -> None:
    compare(name, DOMAIN, steps)


@pytest.mark.long
@pytest.mark.parametrize("name", MACHINES)
@settings(max_examples=600)
@given(data=st.data())
def test_twins_for_long(name: str, data: st.DataObject) -> None:
    compare(name, CLASSIC, data.draw(st.lists(STEP, min_size=1, max_size=20)))
    if name in TRANSLATING:
        compare(name, WINDOWS, [(0, -1, (0,)), *data.draw(st.lists(WINDOW_STEP, min_size=1, max_size=20))])
        compare(name, DOMAIN, data.draw(st.lists(DOMAIN_STEP, min_size=1, max_size=20)))
