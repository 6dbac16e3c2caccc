"""A driver that writes anything anywhere: only the declared errors, no hang, and nothing reached that is not mapped.

The truth of configuration space is a model of its own: the bits that may change, written down here by offset.
"""

from __future__ import annotations

import time
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dmakit import soft
from dmakit.errors import MisuseError
from dmakit.nvme.function import NvmeFunction
from dmakit.platform.function import PciFunction
from tests.support.edu import EDU_MASK

PAGE, COMMAND, STATUS = 4096, 0x04, 0x06
WIDTHS = st.sampled_from((1, 2, 4, 8))
VALUES = st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from((0, 1, 5, 7, 0x80, (1 << 32) - 1, (1 << 64) - 1)))
# edu and an NVMe controller have their registers here; everything else is somewhere in the BAR
OFFSETS = st.one_of(st.integers(0, 0x1100 >> 2).map(lambda n: 4 * n), st.integers(-16, (1 << 20) + 16))
MODELS = {"edu": lambda: soft.Edu(), "nvme": lambda: NvmeFunction(queues=2)}

# (offset, width, bits that a driver may change) of edu's configuration space; no other bit of it changes.
CHANGEABLE = (
    (0x04, 2, 0x0546),  # memory, bus master, parity, SERR#, INTx disable
    (0x0C, 2, 0xFFFF),  # cache line size, latency timer
    (0x10, 4, 0xFFF00000),  # BAR 0, 1 MiB
    (0x3C, 1, 0xFF),  # interrupt line
    (0x42, 2, 0x0070),  # MSI: vectors enabled
    (0x44, 4, 0xFFFFFFFC),
    (0x48, 4, 0xFFFFFFFF),
    (0x4C, 2, 0xFFFF),
)


class Truth:
    """Configuration space as one number."""

    def __init__(self, device: PciFunction) -> None:
        config = device.config
        self.size = config.size
        self.value = sum(config.read(at, 1) << 8 * at for at in range(self.size))
        self.mask = sum(bits << 8 * at for at, _, bits in CHANGEABLE)

    def write(self, offset: int, value: int, width: int) -> None:
        mask = self.mask & ((1 << 8 * width) - 1) << 8 * offset
        self.value = self.value & ~mask | value << 8 * offset & mask

    def read(self, offset: int, width: int) -> int:
        return self.value >> 8 * offset & (1 << 8 * width) - 1


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(-1, 260), VALUES, WIDTHS), max_size=30))
def test_hostile_writes_change_only_what_is_a_drivers(writes: list[tuple[int, int, int]]) -> None:
    with soft.Device.open(soft.Edu()) as device:
        truth = Truth(device)
        for offset, value, width in writes:
            value &= (1 << 8 * width) - 1
            try:
                device.config.write(offset, value, width)
            except MisuseError:
                assert offset % width or offset < 0 or offset + width > 256
            else:
                truth.write(offset, value, width)
                assert device.config.read(offset, width) == truth.read(offset, width)
        for at in range(0, 256, 4):
            assert device.config.read(at, 4) == truth.read(at, 4), hex(at)
        device.config.set_memory(True)
        assert device.bar(0).read32(0) == 0x010000ED


def poke(device: PciFunction, actions: list[tuple[Any, ...]]) -> None:
    """Any access to BAR 0 or to configuration space; what is refused is refused as misuse."""
    for space, offset, value, width, write in actions:
        where: Any = device.config if space == "config" else device.bar(0)
        try:
            if write:
                where.write(offset, value & ((1 << 8 * width) - 1), width)
            else:
                assert 0 <= where.read(offset, width) < 1 << 8 * width
        except MisuseError:
            assert offset % width or offset < 0 or offset + width > where.size


ACTIONS = st.lists(
    st.tuples(st.sampled_from(("bar", "bar", "bar", "config")), OFFSETS, VALUES, WIDTHS, st.booleans()), max_size=60
)


@settings(max_examples=150)
@given(st.sampled_from(sorted(MODELS)), ACTIONS, st.sampled_from(("", "intx", "msi", "msix")))
def test_no_access_does_more_than_refuse(name: str, actions: list[tuple[Any, ...]], kind: str) -> None:
    begun = time.monotonic()
    with soft.Machine(ram="32M", swiotlb=0, mode="strict") as machine:
        with soft.Device.open(MODELS[name](), machine=machine, mask=EDU_MASK) as device:
            secret = machine.buffer(PAGE)
            secret.write(0, b"secret" * 600)
            if device.interrupt_counts().get(kind):
                device.interrupts(1, kind)
            device.set_bus_master(True)
            poke(device, actions)
            device.reset()
            device.config.set_memory(True)
            assert device.bar(0).read32(0 if name == "edu" else 8) in (0x010000ED, 0x00010400)
            assert secret.read(0, 3600) == b"secret" * 600, "nothing was mapped"
        assert not any(machine.live().values())
    assert time.monotonic() - begun < 5


@settings(max_examples=60)
@given(st.integers(0, EDU_MASK), st.integers(0, 1 << 20), st.integers(0, 1 << 20), st.sampled_from((1, 3, 5, 7)))
def test_edus_engine_stays_in_its_memory_and_in_what_is_mapped(addr: int, own: int, count: int, command: int) -> None:
    model = soft.Edu()
    with soft.Device.open(model, ram="32M", mask=EDU_MASK) as device:
        memory = device.buffer(2 * PAGE)
        phys = memory.ranges[0][0]
        mapped = device.dma.map_phys(phys, PAGE, 0)
        memory.write(0, b"\x11" * 2 * PAGE)
        model.buffer[:] = b"\x22" * PAGE
        device.set_bus_master(True)
        bar, place = device.bar(0), 0x40000 + own % (2 * PAGE)
        other = (mapped + addr % (2 * PAGE) - PAGE // 2) & EDU_MASK
        count %= 2 * PAGE
        to_memory = bool(command & 2)
        for register, value in ((0x80, place if to_memory else other), (0x88, other if to_memory else place)):
            bar.write(register, value, 8)
        bar.write(0x90, count, 8)
        bar.write(0x98, command, 8)
        at, fits = place - 0x40000, place - 0x40000 + count <= PAGE
        lies = mapped <= other and other + count <= mapped + PAGE
        if not fits:
            assert bytes(model.buffer) == b"\x22" * PAGE and memory.read() == b"\x11" * 2 * PAGE
        elif to_memory:
            assert bytes(model.buffer) == b"\x22" * PAGE
            if lies:
                assert memory.read(other - mapped, count) == b"\x22" * count
            assert memory.read().count(0x22) <= count
        else:
            assert memory.read() == b"\x11" * 2 * PAGE
            got = bytes(model.buffer[at : at + count])
            assert got == (b"\x11" if lies else b"\0") * count
        assert memory.read(PAGE, PAGE) == b"\x11" * PAGE
        assert bar.read(0x98, 8) == command & ~1 and bar.read32(0x24) == (0x100 if command & 4 else 0)
        device.dma.unmap_phys(mapped, PAGE, 0)
