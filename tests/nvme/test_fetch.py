"""The controller's half of data pointers: lists through the device's port, one command or many, the same either way."""

from __future__ import annotations

import threading
from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.gil import released

from dmakit import _core
from dmakit.consts import PSDT_PRP, PSDT_SGL_METABUF
from dmakit.errors import FaultError, MisuseError
from dmakit.nvme.coherent import DeviceSource
from dmakit.nvme.datapath import CommandError, DataPath
from dmakit.nvme.fetch import DescriptorReader
from dmakit.nvme.pool import LARGE_BYTES, SMALL_BYTES, DescriptorPool
from dmakit.nvme.prp import PrpWalker, PrpWriter
from dmakit.nvme.sgl import SglWalker, SglWriter
from dmakit.nvme.spec import Status
from dmakit.platform.soft import Machine

PAGE = 4096
Range = tuple[int, int]
Command = tuple[int, int, int, int]  # form, low, high, bytes
COMPILED = pytest.mark.skipif(_core.status()["running"] != "compiled", reason="interpreted code keeps the GIL")


class Host:
    """A machine whose driver writes lists into coherent memory."""

    def __init__(self, iommu: bool = True) -> None:
        self.machine = Machine(ram="64M", swiotlb=0)
        self.device = self.machine.device("nvme", identity=not iommu)
        options: dict[str, Any] = {"ledger": self.machine.ledger, "fail": self.machine.fail}
        pools = [DescriptorPool(DeviceSource(self.device), size, **options) for size in (SMALL_BYTES, LARGE_BYTES)]
        self.prp, self.sgl = PrpWriter(*pools), SglWriter(*pools)

    def command(self, form: int, ranges: list[Range]) -> Command:
        """A command for device ranges."""
        low, high, _ = (self.prp if form == PSDT_PRP else self.sgl).build(ranges)
        return form, low, high, sum(length for _, length in ranges)

    def seen(self) -> tuple[object, ...]:
        unit = self.machine.unit
        faults = [(fault.iova, fault.write) for fault in unit.faults] if unit is not None else []
        return self.machine.ledger.snapshot(), faults


class ByRead:
    """A port of another kind: the device's own, through ``read``."""

    def __init__(self, port: Any) -> None:
        self.port = port

    def read(self, iova: int, size: int) -> bytes:
        return bytes(self.port.read(iova, size))


def dialogue(host: Host, command: Command) -> tuple[int, list[Range]]:
    """(status, ranges) by the walkers' dialogue with plain reads of the device."""
    form, low, high, size = command
    try:
        if form == PSDT_PRP:
            prp = PrpWalker()
            prp.begin(low, high, size)
            while prp.list_entries and not prp.status:
                prp.list_words(host.device.dma_read(prp.list_addr, 8 * prp.list_entries))
            return prp.status, [] if prp.status else prp.ranges
        sgl = SglWalker()
        sgl.begin(low, high, size, to_host=True)
        while sgl.segment_bytes and not sgl.status:
            sgl.segment(host.device.dma_read(sgl.segment_addr, sgl.segment_bytes))
        return sgl.status, [] if sgl.status else sgl.ranges
    except FaultError:
        return int(Status.DATA_TRANSFER_ERROR), []


def one_by_one(reader: DescriptorReader, commands: list[Command]) -> list[tuple[int, list[Range]]]:
    found = []
    for command in commands:
        status = reader.read(*command, to_host=True)
        found.append((status, [] if status else reader.ranges))
    return found


def together(reader: DescriptorReader, commands: list[Command]) -> list[tuple[int, list[Range]]]:
    count = len(commands)
    forms, sizes = array("Q", [c[0] for c in commands]), array("Q", [c[3] for c in commands])
    pointers = array("Q", [word for c in commands for word in c[1:3]])
    bounds, statuses = array("Q", bytes(8 * count + 8)), array("Q", bytes(8 * count))
    addrs, lengths = reader.read_batch(forms, pointers, sizes, bounds, statuses, to_host=True)
    pairs = list(zip(addrs, lengths, strict=True))
    return [(statuses[at], pairs[bounds[at] : bounds[at + 1]]) for at in range(count)]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[Range], int]:
    """(form, device ranges, what is wrong with the pointer: 0 nothing, 1 bits of PRP1, 2 a list nobody mapped)."""
    form = draw(st.sampled_from([PSDT_PRP, PSDT_SGL_METABUF]))
    count = draw(st.sampled_from([1, 2, 3, 16, 17, 40, 250]))
    size = draw(st.sampled_from([PAGE, 8 * PAGE]))
    first = draw(st.integers(1, 1 << 30)) * PAGE
    return form, [(first + at * 9 * PAGE, size) for at in range(count)], draw(st.sampled_from([0, 0, 0, 1, 2]))


def spoilt(command: Command, how: int) -> Command:
    form, low, high, size = command
    if how == 1:
        return form, low | 2, high, size
    if how == 2:
        return (form, low, 0x7FFF_0000, size) if form == PSDT_PRP else (form, 0x7FFF_0000, high, size)
    return command


@given(st.lists(layouts(), min_size=1, max_size=5), st.booleans(), st.booleans())
@settings(max_examples=40)
def test_every_way_to_read_says_and_counts_the_same(
    requests: list[tuple[int, list[Range], int]], iommu: bool, own: bool
) -> None:
    """Ranges, statuses, faults and every counter, of four machines that did the same before."""
    answers = []
    for way in ("dialogue", "one", "batch"):
        host = Host(iommu)
        commands = [spoilt(host.command(form, ranges), how) for form, ranges, how in requests]
        reader = DescriptorReader(host.device.port if own else ByRead(host.device.port))
        if way == "dialogue":
            found = [dialogue(host, command) for command in commands]
        else:
            found = (one_by_one if way == "one" else together)(reader, commands)
        answers.append((found, host.seen()))
    assert answers[1] == answers[0] and answers[2] == answers[0]
    for (form, ranges, how), (status, found) in zip(requests, answers[0][0], strict=True):
        if how == 0:
            assert (status, sum(length for _, length in found)) == (0, sum(length for _, length in ranges)), form


def test_a_blocked_list_is_told_with_its_fault() -> None:
    reader = DescriptorReader(Host().device.port)
    assert reader.read(PSDT_PRP, 0x1000, 0x7FFF_0000, 4 * PAGE, to_host=True) == int(Status.DATA_TRANSFER_ERROR)
    with pytest.raises(FaultError, match=r"may not read 0x7fff0000"):
        raise reader.fault
    assert reader.read(PSDT_PRP, 0x1000, 0x2000, 2 * PAGE, to_host=True) == 0 and reader.fault is None


def test_what_no_command_says_is_an_invalid_field() -> None:
    reader = DescriptorReader(Host().device.port)
    for command in ((3, 0, 0, 512), (1 << 40, 0, 0, 512), (PSDT_PRP, 0x1000, 0x2000, (1 << 32) + 1)):
        assert together(reader, [command]) == one_by_one(reader, [command]) == [(int(Status.INVALID_FIELD), [])]
    last = (1 << 64) - 16  # an SGL segment that runs over the last address
    assert reader.read(PSDT_SGL_METABUF, last, 3 << 60 | 32, 512, to_host=True) == int(Status.DATA_TRANSFER_ERROR)


@pytest.mark.parametrize(
    ("short", "rule"),
    [(1, "pointers: has 3 words, at least 4"), (2, "sizes: has 1 words, at least 2"), (3, "bounds: has 2 words, at")]
    + [(4, "statuses: has 1 words, at least 2")],
)
def test_columns_that_are_too_short_are_refused(short: int, rule: str) -> None:
    columns = [array("Q", bytes(8 * count)) for count in (2, 4, 2, 3, 2)]
    columns[short].pop()
    with pytest.raises(MisuseError, match=f"^{rule}"):
        DescriptorReader(Host().device.port).read_batch(*columns, to_host=True)


@pytest.mark.parametrize("given", [8 * 4096, 8])
def test_a_port_that_gives_more_or_less_than_was_asked_for_is_refused(given: int) -> None:
    class Odd:
        def read(self, iova: int, size: int) -> bytes:
            return bytes(given)

    for read in (one_by_one, together):
        with pytest.raises(MisuseError, match=rf"^port: read gave {given} bytes, 32 were asked for$"):
            read(DescriptorReader(Odd()), [(PSDT_PRP, 0x1000, 0x8000, 5 * PAGE)])


def test_threads_that_share_a_reader_take_turns_on_any_port() -> None:
    """A port of another kind lets other threads run in the middle of a batch; they do not get into it."""
    host = Host()
    layouts = [[(at * 2 * PAGE + (first << 30), PAGE) for at in range(9)] for first in (1, 2)]
    first, second = ([host.command(PSDT_PRP, ranges)] for ranges in layouts)
    found: list[Any] = []
    inside: list[bool] = []

    class Slow(ByRead):
        def read(self, iova: int, size: int) -> bytes:
            if not inside:
                inside.append(True)
                other.start()
                other.join(0.2)
                assert not found
            return super().read(iova, size)

    reader = DescriptorReader(Slow(host.device.port))
    other = threading.Thread(target=lambda: found.append(together(reader, second)), daemon=True)
    assert together(reader, first) == [(0, layouts[0])]
    other.join(30)
    assert found == [[(0, layouts[1])]]


def test_an_access_over_the_last_address_ends_the_command() -> None:
    """An SGL may say so; on the bus there is no such address, as nobody answers at one that is not mapped."""
    data, last = DataPath(Host().device.port, sgls=1), (1 << 64) - 8
    for move in (lambda: data.fetch(last, 16), lambda: data.store(last, bytes(16)), lambda: data.fetch(last, 8)):
        with pytest.raises(CommandError, match=r"^DATA_TRANSFER_ERROR$"):
            move()


@COMPILED
def test_other_threads_run_during_a_batch() -> None:
    host = Host()
    commands = [host.command(PSDT_PRP, [(at * 2 * PAGE + (1 << 30), PAGE) for at in range(500)])] * 50
    reader = DescriptorReader(host.device.port)
    assert released(lambda: together(reader, commands))
