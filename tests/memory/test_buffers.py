"""Buffers over physical ranges, and the write-back cache model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmakit.errors import ExhaustedError, MisuseError
from dmakit.failpoint import FailPoint
from dmakit.memory.buffers import Buffer, allocate
from dmakit.memory.cache import CpuCache
from dmakit.memory.pages import PageAllocator
from dmakit.memory.physical import PhysicalMemory
from tests.support.sweep import sweep

PAGE = 4096


def machine(pages: int = 4096, **options: object) -> PageAllocator:
    memory = PhysicalMemory(pages * PAGE)
    memory.add_region(0, pages * PAGE)
    return PageAllocator(memory, 0, pages * PAGE, **options)  # type: ignore[arg-type]


def test_a_buffer_on_a_fresh_machine_is_one_range() -> None:
    pages = machine()
    table = pages.alloc()
    buffer = allocate(pages, 10 * PAGE + 5, offset=512)
    assert buffer.ranges == [(table + PAGE + 512, 10 * PAGE + 5)]
    buffer.release()
    buffer.release()
    assert pages.allocated_pages == 1


def test_a_fragmented_buffer_has_a_range_for_each_page() -> None:
    buffer = allocate(machine(fragmentation=1.0), 32 * PAGE, offset=100)
    assert [size for _, size in buffer.ranges] == [PAGE - 100] + [PAGE] * 31 + [100]
    assert [phys % PAGE for phys, _ in buffer.ranges] == [100] + [0] * 32


def test_huge_pages_stay_whole() -> None:
    buffer = allocate(machine(fragmentation=1.0), 4 << 20, order=9)
    assert [(phys % (2 << 20), size) for phys, size in buffer.ranges] == [(0, 2 << 20)] * 2


@settings(max_examples=50)
@given(st.integers(1, 20000), st.integers(0, 4095), st.sampled_from((0.0, 0.6, 1.0)), st.data())
def test_reads_return_what_was_written(size: int, offset: int, fragmentation: float, data: st.DataObject) -> None:
    buffer = allocate(machine(256, fragmentation=fragmentation), size, offset=offset)
    truth = bytearray(size)
    for _ in range(5):
        at = data.draw(st.integers(0, size))
        payload = data.draw(st.binary(max_size=min(300, size - at)))
        buffer.write(at, payload)
        truth[at : at + len(payload)] = payload
    assert buffer.read() == truth
    at = data.draw(st.integers(0, size))
    assert buffer.read(at) == truth[at:]
    buffer.fill(0xA5)
    assert buffer.read() == b"\xa5" * size


def test_bad_requests_name_their_rule() -> None:
    pages = machine(64)
    buffer = Buffer(pages.memory, [(PAGE, 100), (8 * PAGE, 50)])
    assert buffer.slices(90, 20) == [(PAGE + 90, 10), (8 * PAGE, 10)]
    with pytest.raises(MisuseError, match=r"^\[140, 151\) is not inside a buffer of 150 bytes$"):
        buffer.read(140, 11)
    with pytest.raises(MisuseError, match=r"^offset=4096: must lie inside the first block of 4096 bytes$"):
        allocate(pages, 1, offset=PAGE)
    with pytest.raises(ExhaustedError):
        allocate(pages, 100 * PAGE)
    assert pages.allocated_pages == 0


def test_a_failing_allocation_leaks_no_page() -> None:
    def check(pages: PageAllocator, failed: bool) -> None:
        assert pages.allocated_pages == (0 if failed else 16)

    uses = sweep(
        lambda: machine(fail=FailPoint()), lambda pages: pages.fail, lambda pages: allocate(pages, 16 * PAGE), check
    )
    assert uses == 16


def test_the_cache_hides_stores_until_cleaned_and_device_writes_until_invalidated() -> None:
    memory = machine(16).memory
    cache = CpuCache(memory)
    cache.write(PAGE + 10, b"abc")
    assert memory.read(PAGE + 10, 3) == b"\0\0\0"
    assert cache.read(PAGE + 10, 3) == b"abc"
    assert cache.clean(PAGE, 64) == 64
    assert memory.read(PAGE + 10, 3) == b"abc"
    memory.write(PAGE + 10, b"xyz")  # a device
    assert cache.read(PAGE + 10, 3) == b"abc"
    assert cache.invalidate(PAGE, 64) == 64
    assert cache.read(PAGE + 10, 3) == b"xyz"


def test_invalidating_part_of_a_dirty_line_keeps_the_neighbours_bytes() -> None:
    memory = machine(16).memory
    cache = CpuCache(memory)
    cache.write(PAGE, b"N" * 64)
    cache.invalidate(PAGE + 32, 64)
    assert cache.read(PAGE, 64) == b"N" * 64
    cache.write(PAGE, b"L" * 64)
    cache.invalidate(PAGE, 64)
    assert cache.read(PAGE, 64) == b"N" * 64


def test_a_snoop_keeps_a_coherent_device_and_the_cpu_in_step() -> None:
    memory = machine(16).memory
    cache = CpuCache(memory)
    cache.write(PAGE, b"cpu")
    cache.snoop(PAGE, 3, write=False)
    assert memory.read(PAGE, 3) == b"cpu" and cache.dirty_bytes == 0
    cache.snoop(PAGE, 3, write=True)
    memory.write(PAGE, b"dev")
    assert cache.read(PAGE, 3) == b"dev"
    with pytest.raises(MisuseError, match=r"^line=48: must be a power of two from 16 to 4096$"):
        CpuCache(memory, 48)
