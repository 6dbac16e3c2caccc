"""Limits of the host, told before its kernel says them: locked memory of one and of several machines, mappings."""

from __future__ import annotations

import ctypes
import mmap

import pytest

from dmakit.errors import ExhaustedError
from dmakit.platform.linux.kernel import Kernel
from tests.linux.worlds import BOTH, EDU, NVME, PAGE, TO, host, machine, taken

CALL = {"type1": "VFIO_IOMMU_MAP_DMA", "unstaged": "IOMMU_IOAS_MAP", "iommufd": "IOMMU_IOAS_MAP"}
CHUNKS = (("type1", PAGE), ("unstaged", PAGE), ("iommufd", 2 << 20))  # what mapping a page pins


def refusal(call: str, size: int, locked: int, limit: int) -> str:
    return (
        f"{call} of {size:#x} bytes: {locked:#x} bytes are locked and the limit is {limit:#x} (RLIMIT_MEMLOCK): raise"
        " it with 'ulimit -l unlimited', memlock in /etc/security/limits.conf, LimitMEMLOCK= of a systemd service, or"
        " run with CAP_IPC_LOCK"
    )


@pytest.mark.parametrize("backend, chunk", CHUNKS)
def test_the_memlock_limit_is_told_before_the_kernel_says_it(backend: str, chunk: int) -> None:
    fake = host(memlock=4 * chunk)
    _, made, device = taken(backend, fake)
    with made, device:
        pages = [made.pages.alloc(9) for _ in range(5)]
        held = [device.dma.map_phys(phys, PAGE, BOTH) for phys in pages[:4]]
        refused = len(fake.calls)
        with pytest.raises(ExhaustedError) as caught:
            device.dma.map_phys(pages[4], PAGE, BOTH)
        assert str(caught.value) == refusal(CALL[backend], chunk, 4 * chunk, 4 * chunk)
        assert len(fake.calls) == refused and made.live()["mappings"] == 4
        for addr in held:
            device.dma.unmap_phys(addr, PAGE, BOTH)
        assert made.live()["iova_ranges"] == 0


def test_the_containers_limit_is_told_before_the_kernel_says_it() -> None:
    fake = host(entry_limit=3)
    _, made, device = taken("type1", fake)
    with made, device:
        buffer = made.buffer(PAGE)
        held = [device.dma.map_phys(*buffer.ranges[0], TO) for _ in range(3)]
        with pytest.raises(ExhaustedError) as caught:
            device.dma.map_phys(*buffer.ranges[0], TO)
        assert str(caught.value) == (
            "VFIO_IOMMU_MAP_DMA: the container holds 3 mappings, its limit: raise dma_entry_limit of vfio_iommu_type1,"
            " or map larger pieces once (premapped buffers)"
        )
        assert caught.value.errno_name == "ENOSPC" and "VFIO_IOMMU_MAP_DMA" in fake.calls
        device.dma.unmap_phys(held.pop(), PAGE, TO)
        held.append(device.dma.map_phys(*buffer.ranges[0], TO))
        for addr in held:
            device.dma.unmap_phys(addr, PAGE, TO)


@pytest.mark.parametrize("backend, chunk", CHUNKS)
def test_machines_of_one_process_share_the_limit(backend: str, chunk: int) -> None:
    fake = host(memlock=4 * chunk)
    with machine(backend, fake) as one, machine(backend, fake) as two, two.open(NVME) as second:
        first = one.open(EDU)
        for made, device, count in ((one, first, 3), (two, second, 1)):
            for phys in [made.pages.alloc(9) for _ in range(count)]:
                device.dma.map_phys(phys, PAGE, BOTH)
        assert (one.pins.pinned, two.pins.pinned) == (3 * chunk, chunk)
        calls, phys = len(fake.calls), two.pages.alloc(9)
        with pytest.raises(ExhaustedError) as caught:
            second.dma.map_phys(phys, PAGE, BOTH)
        assert str(caught.value) == refusal(CALL[backend], chunk, 4 * chunk, 4 * chunk)
        assert len(fake.calls) == calls and two.pins.pinned == chunk
        one.close()
        second.dma.map_phys(phys, PAGE, BOTH)
        assert two.pins.pinned == fake.account.bytes == 2 * chunk
    assert fake.left() == {"files": 0, "pinned": 0} and fake.user.bytes == 0


def test_type1_charges_the_process_and_iommufd_the_user() -> None:
    fake = host(memlock=2 * PAGE)
    with machine("type1", fake) as one, machine("unstaged", fake) as two, one.open(EDU) as edu, two.open(NVME) as nvme:
        fake.account.process.charge(1)  # mlock of a page, by whoever in this process
        for made, device, room in ((one, edu, 1), (two, nvme, 2)):
            phys = [made.pages.alloc(0) for _ in range(room + 1)]
            held = [device.dma.map_phys(page, PAGE, BOTH) for page in phys[:-1]]
            with pytest.raises(ExhaustedError, match="0x2000 bytes are locked and the limit is 0x2000"):
                device.dma.map_phys(phys[-1], PAGE, BOTH)
            for addr in held:
                device.dma.unmap_phys(addr, PAGE, BOTH)
        fake.account.process.give(1)
    assert fake.left() == {"files": 0, "pinned": 0}


@pytest.mark.parametrize("backend", ("type1", "unstaged"))
def test_a_limit_that_was_raised_counts_at_once(backend: str) -> None:
    fake, made, device = taken(backend, host(memlock=PAGE))
    with made, device:
        first, second = made.pages.alloc(0), made.pages.alloc(0)
        held = [device.dma.map_phys(first, PAGE, TO)]
        with pytest.raises(ExhaustedError):
            device.dma.map_phys(second, PAGE, TO)
        fake.account.limit = 2 * PAGE  # prlimit, from another shell
        held.append(device.dma.map_phys(second, PAGE, TO))
        for addr in held:
            device.dma.unmap_phys(addr, PAGE, TO)


def test_what_is_locked_is_read_from_the_kernel() -> None:
    kernel, libc = Kernel(), ctypes.CDLL(None)
    before = kernel.locked()
    with mmap.mmap(-1, 4 * PAGE) as memory:
        view = ctypes.c_char.from_buffer(memory)
        assert libc.mlock(ctypes.byref(view), ctypes.c_size_t(4 * PAGE)) == 0
        assert kernel.locked() == before + 4 * PAGE
        del view
    assert kernel.locked() == before and Kernel().user is kernel.user
