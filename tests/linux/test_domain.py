"""HostDomain against a dict of pages, and against what the fake kernel really holds."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dmakit.consts import PROT_READ, PROT_WRITE
from dmakit.errors import DmakitError, MisuseError, UnsupportedError
from dmakit.iommu.gather import Gather
from tests.linux.worlds import BACKENDS, BOTH, EDU, FROM, NVME, PAGE, TO, host, machine, taken
from tests.support.vfio.container import ContainerFile
from tests.support.vfio.files import IommuFile

RW = PROT_READ | PROT_WRITE
BASE = 1 << 32


def kernel_areas(fake: Any, domain: Any) -> list[tuple[int, int, int, int]]:
    """What the fake kernel holds for a domain: (iova, size, va, prot)."""
    backend = domain.backend
    if backend.name == "type1":
        file = fake.open_files[backend.fd]
        assert isinstance(file, ContainerFile) and file.space is not None
        space = file.space
    else:
        iommu = fake.open_files[backend.iommufd.fd]
        assert isinstance(iommu, IommuFile)
        space = iommu.space(backend.number)
    return sorted((a.iova, a.size, a.pages.va + a.offset, a.prot) for a in space.areas.values())


def reads(fake: Any, iova: int, size: int) -> bytes:
    """What the device would read there."""
    space = fake.devices[EDU].space
    return bytes(space.read(iova, size))


class HostDomainMachine(RuleBasedStateMachine):
    """Truth: IOVA page to source page, and the extents that were mapped as one."""

    @initialize(backend=st.sampled_from(BACKENDS))
    def start(self, backend: str) -> None:
        self.fake, self.machine, self.device = taken(backend)
        self.domain = self.device.space.domain
        self.buffer = self.machine.buffer(64 * PAGE, order=6)
        self.base = self.buffer.ranges[0][0]
        for page in range(64):
            self.buffer.write(page * PAGE, bytes([page + 1]) * PAGE)
        self.pages: dict[int, int] = {}
        self.extents: dict[int, int] = {}  # first page to pages

    @rule(iova=st.integers(0, 40), source=st.integers(0, 63), pages=st.integers(1, 9), prot=st.sampled_from((1, 2, 3)))
    def map(self, iova: int, source: int, pages: int, prot: int) -> None:
        pages = min(pages, 64 - source)
        wanted = range(iova, iova + pages)
        taken_ = any(page in self.pages for page in wanted)
        before = kernel_areas(self.fake, self.domain)
        try:
            self.domain.map(BASE + iova * PAGE, self.base + source * PAGE, pages * PAGE, prot)
        except MisuseError as error:
            first = min(page for page in wanted if page in self.pages)
            assert taken_ and error.errno_name == "EADDRINUSE"
            assert str(error).endswith(f"something is mapped at {BASE + first * PAGE:#x}")
            assert kernel_areas(self.fake, self.domain) == before
            return
        assert not taken_
        self.pages.update({page: source + page - iova for page in wanted})
        self.extents[iova] = pages

    @rule(iova=st.integers(0, 50), pages=st.integers(1, 12))
    def unmap(self, iova: int, pages: int) -> None:
        gone = 0
        while iova + gone in self.extents and gone + self.extents[iova + gone] <= pages:
            extent = self.extents.pop(iova + gone)
            for page in range(iova + gone, iova + gone + extent):
                del self.pages[page]
            gone += extent
        gather = Gather()
        assert self.domain.unmap_gather(BASE + iova * PAGE, pages * PAGE, gather) == gone * PAGE
        assert gather.is_empty

    @rule(iova=st.integers(0, 50), byte=st.integers(0, PAGE - 1))
    def ask(self, iova: int, byte: int) -> None:
        source = self.pages.get(iova)
        expected = 0 if source is None else self.base + source * PAGE + byte
        assert self.domain.iova_to_phys(BASE + iova * PAGE + byte) == expected
        inside = any(first < iova < first + pages for first, pages in self.extents.items())
        assert self.device.dma.leaf_across(BASE + iova * PAGE) == inside

    @invariant()
    def the_kernel_holds_what_we_say(self) -> None:
        if not hasattr(self, "domain"):
            return
        held = self.domain.held()
        assert [(iova, size) for iova, _, size in held] == sorted(
            (BASE + first * PAGE, pages * PAGE) for first, pages in self.extents.items()
        )
        assert self.domain.mappings == len(self.extents)
        covered = {page for iova, size, _, _ in kernel_areas(self.fake, self.domain)
                   for page in range((iova - BASE) // PAGE, (iova - BASE + size) // PAGE)}  # fmt: skip
        assert covered == set(self.pages)
        space = self.fake.devices[EDU].space
        for page, source in self.pages.items():
            area = next(a for a in space.areas.values() if a.iova <= BASE + page * PAGE < a.end)
            if area.prot & 1:
                assert reads(self.fake, BASE + page * PAGE, 1) == bytes([source + 1])

    def teardown(self) -> None:
        if hasattr(self, "machine"):
            self.machine.close()
            assert self.fake.left() == {"files": 0, "pinned": 0}


HostDomainMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestHostDomain = HostDomainMachine.TestCase


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_domain_refuses_before_the_kernel_is_asked(backend: str) -> None:
    fake, made, device = taken(backend)
    with made:
        domain, phys = device.space.domain, made.buffer(PAGE).ranges[0][0]
        calls = len(fake.calls)
        allowed = "0x0 to 0xfedfffff, 0xfef00000 to 0xffffffffffff"
        end = (1 << 64) - PAGE
        for arguments, errno, tail in (
            ((BASE, phys, PAGE, 0), "EINVAL", "prot=0x0 permits neither reading nor writing"),
            ((BASE, phys, 0, RW), "EINVAL", "the size must not be 0"),
            ((BASE + 1, phys, PAGE, RW), "ENXIO", "addresses and size must be multiples of 4096"),
            ((end, phys, 2 * PAGE, RW), "EOVERFLOW", "wraps around the end of the 64-bit address space"),
            ((0xFEE00000, phys, PAGE, RW), "ERANGE", f"outside what this IOMMU translates ({allowed})"),
            ((1 << 48, phys, PAGE, RW), "ERANGE", f"outside what this IOMMU translates ({allowed})"),
        ):
            with pytest.raises(MisuseError) as caught:
                domain.map(*arguments)
            iova, place, size, _ = arguments
            assert str(caught.value) == f"map [{iova:#x}, {iova + size:#x}) to {place:#x}: {tail}"
            assert caught.value.errno_name == errno
        with pytest.raises(MisuseError) as nowhere:
            domain.map(BASE, 1 << 20, PAGE, RW)
        assert str(nowhere.value) == "phys=0x100000: no memory of this machine lies there"
        assert len(fake.calls) == calls and domain.mappings == 0


def test_capabilities_say_what_a_host_domain_is() -> None:
    with machine("type1") as made, made.open(EDU) as device:
        can = device.space.domain.capabilities
        assert (can.unmap_unit, can.deferred_flush, can.cost_per_call) == ("mapping", False, "syscall")
        assert "domain_maps" in can.observes and "pte_set_1" not in can.observes and "inv_page" not in can.observes
        rows = made.snapshot()
        assert rows["pte_set_1"] is None and rows["iotlb_hits"] is None and rows["domain_maps"] == 0
        hidden = {row for row, count in rows.items() if count is None}  # portable tests compare none of these
        kinds = {row.split("_")[0] for row in hidden - {"lock_qi"}}
        assert kinds == {"devtlb", "faults", "inv", "iotlb", "psc", "pte", "table", "tables", "walk"}
        with pytest.raises(UnsupportedError) as caught:
            machine("type1", mode="lazy")
        assert str(caught.value) == "mode='lazy': VFIO flushes before an unmap returns; use mode='strict'"


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_step_on_a_host_domain(backend: str) -> None:
    fake, made, device = taken(backend)
    with made, device:
        buffer = made.buffer(8 * PAGE)
        pieces = [(buffer.slices(i * PAGE, PAGE)[0]) for i in (3, 0, 7, 5)]
        state = device.dma.try_alloc(pieces[0][0], 4 * PAGE)
        for i, (phys, size) in enumerate(pieces):
            buffer.write({0: 3, 1: 0, 2: 7, 3: 5}[i] * PAGE, bytes([65 + i]) * PAGE)
            state.link(phys, i * PAGE, size, BOTH)
        state.sync()
        assert reads(fake, state.addr, 4 * PAGE) == b"".join(bytes([65 + i]) * PAGE for i in range(4))
        with pytest.raises(MisuseError) as caught:
            state.link(pieces[0][0], 2 * PAGE, PAGE, BOTH)
        assert caught.value.errno_name == "EADDRINUSE"
        state.unlink(2 * PAGE, PAGE, BOTH)
        assert device.dma.iova_to_phys(state.addr + 2 * PAGE) == 0
        state.link(pieces[1][0], 2 * PAGE, PAGE, BOTH)
        assert reads(fake, state.addr + 2 * PAGE, 1) == b"B"
        state.destroy(4 * PAGE, BOTH)
        assert made.live()["mappings"] == 0 and made.live()["iova_ranges"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_of_a_linked_piece_cannot_be_unlinked(backend: str) -> None:
    _, made, device = taken(backend)
    with made, device:
        phys = made.buffer(4 * PAGE, order=2).ranges[0][0]
        state = device.dma.try_alloc(phys, 4 * PAGE)
        state.link(phys, 0, 4 * PAGE, TO)
        with pytest.raises(UnsupportedError) as caught:
            state.unlink(PAGE, PAGE, TO)
        assert str(caught.value) == (
            "unlink: [0x1000, 0x2000) cuts a piece, and this domain unmaps only what was mapped as one: unlink whole"
            " pieces"
        )
        assert device.dma.iova_to_phys(state.addr + PAGE) == phys + PAGE
        state.destroy(4 * PAGE, TO)
        assert made.live()["mappings"] == 0


def test_staging_pins_once_and_links_are_copies() -> None:
    fake, made, device = taken("iommufd")
    with made, device:
        buffer = made.buffer(64 * PAGE, order=6)
        phys = buffer.ranges[0][0]
        first = device.dma.map_phys(phys, PAGE, BOTH)
        pinned = fake.account.bytes
        assert pinned == made.pins.pinned == 2 << 20  # the chunk
        fake.calls.clear()
        state = device.dma.try_alloc(phys, 32 * PAGE)
        for i in range(32):
            state.link(phys + (31 - i) * PAGE, i * PAGE, PAGE, BOTH)
        assert set(fake.calls) == {"IOMMU_IOAS_COPY"} and len(fake.calls) == 32
        assert fake.account.bytes == made.pins.pinned == pinned
        state.destroy(32 * PAGE, BOTH)
        device.dma.unmap_phys(first, PAGE, BOTH)
        assert fake.account.bytes == pinned, "memory stays pinned for the next link"
    assert fake.left() == {"files": 0, "pinned": 0}


@pytest.mark.parametrize("options", ({"extra_tables": False}, {"maps_files": False}, {"ranges": [(0, (1 << 24) - 1)]}))
def test_hosts_without_staging_or_files_map_straight(options: dict[str, Any]) -> None:
    fake = host(**options)
    with machine("iommufd", fake, ram="64M") as made, made.open(EDU) as device:
        buffer = made.buffer(2 * PAGE)
        buffer.write(0, b"x" * 2 * PAGE)
        addr = device.dma.map_phys(buffer.ranges[0][0], 2 * PAGE, BOTH)
        assert reads(fake, addr, 2 * PAGE) == b"x" * 2 * PAGE
        assert made.pins.pinned == fake.account.bytes > 0
        device.dma.unmap_phys(addr, 2 * PAGE, BOTH)
        if not options.get("maps_files", True):
            assert "IOMMU_IOAS_MAP" in fake.calls
        else:
            assert made.pins.pinned == fake.account.bytes == 0
    assert fake.left() == {"files": 0, "pinned": 0}


def test_devices_of_one_group_share_an_address_space_on_type1() -> None:
    fake = host()
    fake.devices[NVME].group = 5
    with machine("type1", fake) as made, made.open(EDU) as edu, made.open(NVME) as nvme:
        assert edu.space is nvme.space and len(made.spaces) == 1
        buffer = made.buffer(PAGE)
        addr = nvme.dma.map_phys(*buffer.ranges[0], BOTH)
        assert edu.dma.iova_to_phys(addr) == buffer.ranges[0][0]
        nvme.dma.unmap_phys(addr, PAGE, BOTH)
    with machine("iommufd", fake) as made, made.open(EDU) as edu, made.open(NVME) as nvme:
        assert edu.space is not nvme.space
    assert fake.left() == {"files": 0, "pinned": 0}


def test_huge_blocks_are_one_mapping() -> None:
    _, made, device = taken("type1")
    with made, device:
        phys = made.buffer("4M", order=9).ranges[0][0]
        addr = device.dma.map_phys(phys, 4 << 20, BOTH)
        assert device.space.domain.held() == [(addr, phys, 4 << 20)]
        assert (made.space.base + phys) % (2 << 20) == 0
        device.dma.unmap_phys(addr, 4 << 20, BOTH)


# Dirty pages -------------------------------------------------------------------------------------------------------


def bits(words: Any) -> list[int]:
    return [i for i in range(64 * len(words)) if int(words[i // 64]) >> i % 64 & 1]


def test_hardware_dirty_tracking() -> None:
    fake = host(dirty=True)
    _, made, device = taken("iommufd", fake)
    with made, device:
        domain, phys = device.space.domain, made.buffer(16 * PAGE, order=4).ranges[0][0]
        assert domain.capabilities.dirty
        for iova, pages in ((BASE, 4), (BASE + 8 * PAGE, 4)):  # a hole between
            domain.map(iova, phys, pages * PAGE, RW)
        domain.set_dirty_tracking(True)
        device.set_bus_master(True)
        for page in (0, 3, 9):
            fake.devices[EDU].dma_write(BASE + page * PAGE + 5, b"dirt")
        words = np.array([1 << 20], np.uint64)
        assert domain.read_and_clear_dirty(BASE, 16 * PAGE, words, flags=1) == 3 and bits(words) == [0, 3, 9, 20]
        assert domain.read_and_clear_dirty(BASE, 16 * PAGE, words) == 0
        coarse = np.zeros(1, np.uint64)
        fake.devices[EDU].dma_write(BASE + 10 * PAGE, b"x")
        assert domain.read_and_clear_dirty(BASE, 16 * PAGE, coarse, page_size=4 * PAGE) == 1 and bits(coarse) == [2]
        assert domain.read_and_clear_dirty(BASE, 16 * PAGE, coarse) == 0
        with pytest.raises(MisuseError, match="page_size=12288: must be a power of two from 4096"):
            domain.read_and_clear_dirty(BASE, 12 * PAGE, coarse, page_size=3 * PAGE)
        with pytest.raises(MisuseError, match=r"^bitmap of 64 bits: 65 pages need as many bits$"):
            domain.read_and_clear_dirty(BASE, 65 * PAGE, coarse)
        with pytest.raises(MisuseError, match=r"^flags=0x6: the only flag is 0x1 \(no clear\)$"):
            domain.read_and_clear_dirty(BASE, PAGE, coarse, flags=6)
        fake.devices[EDU].dma_write(BASE + 11 * PAGE, b"x")
        assert domain.read_and_clear_dirty(BASE, 16 * PAGE, None) == 1  # counted, not recorded
        domain.set_dirty_tracking(False)
        with pytest.raises(MisuseError, match="dirty tracking is off; call set_dirty_tracking"):
            domain.read_and_clear_dirty(BASE, PAGE, coarse)


def test_type1_calls_everything_dirty_and_iommufd_without_hardware_refuses() -> None:
    fake, made, device = taken("type1")
    with made, device:
        domain, phys = device.space.domain, made.buffer(16 * PAGE, order=4).ranges[0][0]
        domain.map(BASE + PAGE, phys, 2 * PAGE, RW)
        domain.set_dirty_tracking(True)
        words = np.zeros(1, np.uint64)
        assert domain.read_and_clear_dirty(BASE, 16 * PAGE, words) == 2 and bits(words) == [1, 2]
        assert domain.backend.dirty_source == "pinned"
    _, made, device = taken("iommufd")
    with made, device, pytest.raises(UnsupportedError) as caught:
        device.space.domain.set_dirty_tracking(True)
    assert str(caught.value) == "this host's IOMMU does not track dirty pages"


# A caller's memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_callers_memory_is_mapped_where_it_is(backend: str) -> None:
    import mmap

    fake, made, device = taken(backend)
    with made, device:
        shared = mmap.mmap(-1, 3 * PAGE)
        private = np.arange(5000, dtype=np.uint16)
        for memory, where in ((shared, "space"), (private, "elsewhere")):
            raw = memoryview(memory).cast("B")
            raw[:5] = b"bytes"
            with made.register(memory) as buffer:
                inside = made.space.base <= buffer.object.va < made.space.base + made.memory.span
                assert inside == (where == "space") and buffer.read(0, 5) == b"bytes"
                phys, size = buffer.ranges[0]
                addr = device.dma.map_phys(phys, size, BOTH)
                device.set_bus_master(True)
                assert fake.devices[EDU].dma_read(addr, 5) == b"bytes"
                fake.devices[EDU].dma_write(addr + size - 3, b"end")
                assert bytes(raw[-3:]) == b"end" and buffer.read(size - 3) == b"end"
                buffer.write(0, b"again")
                assert bytes(raw[:5]) == b"again"
                with pytest.raises(MisuseError, match="the memory is mapped at"):
                    buffer.release()
                device.dma.unmap_phys(addr, size, BOTH)
            raw.release()
        assert made.space.users.taken == []
    assert fake.left() == {"files": 0, "pinned": 0}


def test_readonly_memory_is_not_for_devices_to_write() -> None:
    fake, made, device = taken()
    with made, device, made.register(b"constant" * 1024) as buffer:
        phys, size = buffer.ranges[0]
        with pytest.raises(MisuseError) as caught:
            device.dma.map_phys(phys, size, FROM)
        assert str(caught.value) == "a device may not write to memory that is read-only for this process"
        addr = device.dma.map_phys(phys, size, TO)
        assert reads(fake, addr, 8) == b"constant"
        device.dma.unmap_phys(addr, size, TO)


def test_bounce_slots_and_private_memory_do_not_go_together() -> None:
    with machine(swiotlb="2M") as made:
        with pytest.raises(UnsupportedError, match="private memory cannot be copied to bounce slots"):
            made.register(np.zeros(PAGE, np.uint8))
        with made.open(EDU, trusted=False) as device:
            buffer = made.buffer(PAGE, offset=512)
            addr = device.dma.map_phys(*buffer.ranges[0], BOTH)
            assert made.live()["bounce_slots"] == 2
            device.dma.unmap_phys(addr, buffer.ranges[0][1], BOTH)


# Failure -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unmap_that_the_kernel_refuses_keeps_the_iova_taken(backend: str) -> None:
    fake, made, device = taken(backend)
    with made, device:
        buffer = made.buffer(PAGE)
        addr = device.dma.map_phys(*buffer.ranges[0], BOTH)
        made.fail.arm(0)
        device.dma.unmap_phys(addr, PAGE, BOTH)
        assert made.fail.fired and device.space.domain.mappings == 1
        with pytest.raises(MisuseError, match="something is mapped at"):
            device.space.domain.map(addr, buffer.ranges[0][0], PAGE, RW)
        assert device.space.domain.unmap(addr, PAGE) == PAGE
    assert fake.left() == {"files": 0, "pinned": 0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_control_c_in_a_mapping_is_delivered_after_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, made, device = taken(backend)
    with made, device:
        buffer = made.buffer(PAGE)
        real = type(device.space.domain.backend).map

        def interrupted(self: Any, *arguments: Any) -> None:
            real(self, *arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(type(device.space.domain.backend), "map", interrupted)
        with pytest.raises((KeyboardInterrupt, DmakitError)):  # which one depends on when the signal is looked at
            try:
                device.dma.map_phys(*buffer.ranges[0], BOTH)
            except DmakitError:
                for _ in range(1000):  # let the interpreter see it
                    pass
                raise
        assert kernel_areas(fake, device.space.domain) == [] and made.live()["mappings"] == 0
        monkeypatch.undo()
        addr = device.dma.map_phys(*buffer.ranges[0], BOTH)
        device.dma.unmap_phys(addr, PAGE, BOTH)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_undo_that_the_kernel_refuses_does_not_hide_why_the_link_failed(backend: str) -> None:
    fake, made, device = taken(backend)
    with made:
        phys = made.buffer(PAGE).ranges[0][0]
        device.dma.unmap_phys(device.dma.map_phys(phys, PAGE, TO), PAGE, TO)  # staged from here on
        calls = len(fake.calls)
        with pytest.raises(MisuseError) as caught:
            device.dma.map_window(np.array([phys, 0], np.uint64), np.array([PAGE, PAGE], np.uint64), TO)
        assert str(caught.value) == "phys=0x0: no memory of this machine lies there" and len(fake.calls) == calls + 2
        made.fail.arm(1)  # map, and the unmap that takes it back
        with pytest.raises(MisuseError) as again:
            device.dma.map_window(np.array([phys, 0], np.uint64), np.array([PAGE, PAGE], np.uint64), TO)
        assert made.fail.fired and str(again.value) == str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_address_space_ends_when_nobody_maps_in_it(backend: str) -> None:
    """A batch of another thread works on the shadow without the GIL."""
    fake, made, device = taken(backend)
    with made:
        domain, phys = device.space.domain, made.buffer(PAGE).ranges[0][0]
        domain.map(BASE, phys, PAGE, RW)
        ending = threading.Thread(target=domain.detach, daemon=True)
        with made.ledger.turn:
            ending.start()
            ending.join(0.2)
            assert domain.mappings == 1
        ending.join(20)
        assert domain.mappings == 0
