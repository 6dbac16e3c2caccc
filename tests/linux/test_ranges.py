"""The IOVAs that a host allows: read after every attach, and kept out of the allocator, of its caches too."""

from __future__ import annotations

from typing import Any

import pytest

from dmakit.errors import MisuseError
from tests.linux.worlds import BACKENDS, BOTH, EDU, NVME, PAGE, host, machine
from tests.support.vfio.opened import DeviceFile

MIB = 1 << 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_allowed_ranges_feed_the_allocator_and_are_read_again_after_an_attach(backend: str) -> None:
    fake = host(ranges=[(0, 0xFFFFFF), (0x1200000, 0x1FFFFFF)])
    with machine(backend, fake, share=True) as made, made.open(EDU) as device:
        space = device.space
        assert space.domain.aperture_end == 0x1FFFFFF and space.domain.reserved == ((0x1000000, 0x200000),)
        seen = [device.dma.try_alloc(0, MIB) for _ in range(29)]
        for state in seen:
            assert not (state.addr < 0x1200000 and state.addr + MIB > 0x1000000) and state.addr < 1 << 25
        assert not device.dma.try_alloc(0, MIB)
        for state in seen:
            state.free()
        fake.ranges[:] = [(0, 0x7FFFFF), (0x1200000, 0x1FFFFFF)]
        with made.open(NVME):
            assert space.domain.reserved == ((0x800000, 0xA00000),)
            late = [device.dma.try_alloc(0, MIB) for _ in range(22)]
            assert sum(1 for state in late if state) == 21
            assert all(not 0x800000 <= state.addr < 0x1200000 for state in late if state)
            for state in late:
                if state:
                    state.free()


@pytest.mark.parametrize("pages", (1, 8, 32))
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_cached_before_the_ranges_became_narrower_is_not_given_out(backend: str, pages: int) -> None:
    size = pages * PAGE
    fake = host(ranges=[(0, 0x1FFFFFF)])
    with machine(backend, fake, share=True, cpus=2) as made, made.open(EDU) as device:
        phys, space = made.buffer(size, order=5).ranges[0][0], device.space
        kept = device.dma.map_phys(phys, size, BOTH)
        for cpu in (0, 1):
            for addr in [device.dma.map_phys(phys, size, BOTH, 0, cpu) for _ in range(20)]:
                device.dma.unmap_phys(addr, size, BOTH, 0, cpu)
        cached = [first * PAGE for first, _ in space.iovad.cached_pfns()]
        assert len(cached) == 40 and min(cached) >= 1 << 24 and max(cached) < kept
        fake.ranges[:] = [(0, 0xFFFFFF), (kept, kept + size - 1)]
        with made.open(NVME) as second:
            assert space.iovad.cached_pfns() == [] and second.space is space
            late = [device.dma.map_phys(phys, size, BOTH, 0, cpu) for cpu in (0, 1) for _ in range(20)]
            assert max(late) + size <= 1 << 24
            assert device.dma.iova_to_phys(kept) == phys, "what is in use stays"
            for addr in (*late, kept):
                device.dma.unmap_phys(addr, size, BOTH)
            assert made.live()["iova_ranges"] == made.live()["mappings"] == 0
    assert fake.left() == {"files": 0, "pinned": 0}


@pytest.mark.parametrize("narrow", ([(0, 0xFFFFFF)], [(0, 0xFFFFFF), (0x1FFF000, 0x1FFFFFF)]))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_that_does_not_allow_what_is_in_use_is_refused(
    backend: str, narrow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = host(ranges=[(0, 0x1FFFFFF)])
    real = fake.close

    def close(fd: int) -> None:
        if isinstance(fake.open_files.get(fd), DeviceFile):
            fake.ranges[:] = [(0, 0x1FFFFFF)]  # the device that allows less has gone
        real(fd)

    with machine(backend, fake, share=True) as made, made.open(EDU) as device:
        phys = made.buffer(2 * PAGE, order=1).ranges[0][0]
        window = device.dma.try_alloc(phys, 2 * PAGE)  # the kernel knows of no mapping here
        monkeypatch.setattr(fake, "close", close)
        fake.ranges[:] = narrow
        with pytest.raises(MisuseError) as caught:
            made.open(NVME)
        assert str(caught.value) == (
            f"{NVME}: [{window.addr:#x}, {window.addr + 2 * PAGE:#x}) is in use in this address space, and this device"
            " does not allow it: free it first, or open the device in an address space of its own"
        )
        assert caught.value.errno_name == "EADDRINUSE" and [dev.bdf for dev in made.vfio_devices] == [EDU]
        window.link(phys, 0, 2 * PAGE, BOTH)  # as before
        window.destroy(2 * PAGE, BOTH)
        fake.ranges[:] = narrow
        with made.open(NVME):
            addr = device.dma.map_phys(phys, 2 * PAGE, BOTH)
            assert addr < 1 << 24 and made.live()["iova_ranges"] == 1
            device.dma.unmap_phys(addr, 2 * PAGE, BOTH)
    assert fake.left() == {"files": 0, "pinned": 0}


def test_reserved_windows_that_overlap_are_no_ranges_in_use() -> None:
    fake = host(ranges=[(0, 0xFFFFFF), (0x1200000, 0x1FFFFFF)])
    with machine("type1", fake, share=True) as made, made.open(EDU):
        fake.ranges[:] = [(0, 0x10FFFFF), (0x1300000, 0x1FFFFFF)]
        with made.open(NVME):
            assert made.live()["iova_ranges"] == 0


def test_a_first_page_that_is_not_allowed_needs_no_reservation() -> None:
    with machine("type1", host(ranges=[(PAGE, 0xFFFFFF)])) as made, made.open(EDU) as device:
        assert device.space.domain.reserved == ((0, PAGE),) and device.space.iovad.nodes() == []
