"""One device in our hands: registers, DMA through the IOMMU, interrupts, and everything given back."""

from __future__ import annotations

import errno
import threading

import pytest

from dmakit import vfio
from dmakit.errors import HostError, InputError, MisuseError, UnsupportedError
from tests.linux.worlds import BACKENDS, BOTH, EDU, NVME, PAGE, TO, host, machine, taken
from tests.support.sweep import descriptors
from tests.support.vfio.devices import FakeDevice, FakeEdu, FakeRegion
from tests.support.vfio.host import FakeHost


def edu_dma(device: vfio.Device, addr: int, size: int, *, to_device: bool) -> None:
    """Let edu copy between its buffer and ``addr``, and tell it by an interrupt."""
    bar = device.bar(0)
    bar.write(0x80, addr if to_device else 0x40000, 8)
    bar.write(0x88, 0x40000 if to_device else addr, 8)
    bar.write(0x90, size, 8)
    bar.write(0x98, 5 if to_device else 7, 8)


def test_capabilities_are_found_by_their_number() -> None:
    fake = FakeHost([FakeDevice(EDU, 5)])
    with machine("type1", fake) as made, made.open(EDU) as device:
        config = device.config
        assert (config.capability(1), config.capability(5), config.capability(17)) == (0x40, 0x50, 0)
        assert config.extended_capability(13) == 0x140 and config.extended_capability(99) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_reachable_before_mapping_after_unmapping_or_without_mastering(backend: str) -> None:
    fake, made, device = taken(backend)
    edu = fake.devices[EDU]
    with made, device:
        buffer = made.buffer(PAGE)
        addr = device.dma.map_phys(*buffer.ranges[0], BOTH)
        edu_dma(device, addr, 64, to_device=True)
        assert edu.faults == [f"{EDU}: no bus master, or not attached"]
        device.set_bus_master(True)
        edu_dma(device, addr, 64, to_device=True)
        assert len(edu.faults) == 1
        device.dma.unmap_phys(addr, PAGE, BOTH)
        edu_dma(device, addr, 64, to_device=True)
        assert edu.faults[1:] == [f"read of {addr:#x} blocked"]


def test_a_line_interrupt_masks_itself_until_it_is_opened() -> None:
    fake, made, device = taken()
    edu = fake.devices[EDU]
    with made, device:
        assert device.interrupt_counts() == {"intx": 1, "msi": 4, "msix": 0}
        line = device.interrupts(1, "intx")[0]
        device.bar(0).write32(0x60, 1)
        assert line.wait(1) == 1
        device.bar(0).write32(0x60, 2)
        assert line.wait(0) == 0 and edu.masked
        line.unmask()
        assert line.wait(1) == 1
        device.bar(0).write32(0x64, 3)
        line.unmask()
        assert line.wait(0) == 0
        with pytest.raises(UnsupportedError) as caught:
            device.interrupts(5, "msi")
        assert str(caught.value) == "5 msi vectors: the device has 4"
        with pytest.raises(MisuseError) as misused:
            device.interrupts(1, "level")
        assert str(misused.value) == "kind='level': must be one of intx, msi, msix"


def test_eventfds_are_given_back() -> None:
    fake, made, device = taken()
    with made, device:
        before = descriptors()
        for _ in range(3):
            assert len(device.interrupts(4, "msi")) == 4
        device.interrupts(1, "intx")
        assert descriptors() - before <= 2
    assert not fake.devices[EDU].eventfds


@pytest.mark.parametrize("index, number, text", [
    (4, errno.ENODEV, "the host wants the device back (it is being unbound, removed or unplugged)"),
    (3, errno.EIO, "the host reports a fatal error of the device (PCI Express AER)"),
])  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_host_says_is_heard_kept_and_ends_a_wait(backend: str, index: int, number: int, text: str) -> None:
    fake = host()
    with machine(backend, fake) as made, made.open(NVME) as device, made.open(EDU) as other:
        interrupt, quiet = device.interrupts(2)[1], other.interrupts(1)[0]
        assert not device.wanted_back and not device.failed and interrupt.wait(0) == 0
        device.check()
        timer = threading.Timer(0.05, fake.devices[NVME].notify, [index])
        timer.start()
        with pytest.raises(HostError) as caught:
            interrupt.wait()
        timer.join()
        assert (str(caught.value), caught.value.errno) == (f"{NVME}: {text}", number)
        for _ in range(2):
            assert (device.wanted_back, device.failed) == (index == 4, index == 3)
            with pytest.raises(HostError) as caught:
                device.check()
            assert str(caught.value) == f"{NVME}: {text}"
        device.set_bus_master(True)
        fake.devices[NVME].trigger(1)
        assert interrupt.wait(1) == 1, "what the device has said is handed out first"
        assert not other.wanted_back and not other.failed and quiet.wait(0) == 0
    assert device.wanted_back == (index == 4), "also after it was closed"
    assert fake.left() == {"files": 0, "pinned": 0}


def test_a_fatal_error_outweighs_a_request_and_conventional_pci_has_none() -> None:
    fake, made, device = taken()
    with made, device, made.open(NVME) as drive:
        assert not fake.devices[EDU].notify(3) and len(device.notices.descriptors()) == 1
        assert len(drive.notices.descriptors()) == 2
        for index in (4, 3):
            assert fake.devices[NVME].notify(index)
        with pytest.raises(HostError, match="reports a fatal error"):
            drive.check()
        assert drive.wanted_back and drive.failed


def test_registers_refuse_what_hardware_would_not_do() -> None:
    _, made, device = taken()
    with made, device:
        for offset, width in ((2, 4), (0, 3), (1 << 20, 4), (-4, 4)):
            with pytest.raises(MisuseError) as caught:
                device.bar(0).read(offset, width)
            assert str(caught.value) == (
                f"region 0: an access of {width} bytes at {offset:#x} must be aligned, of 1, 2, 4 or 8 bytes,"
                " inside 0x100000 bytes"
            )
        with pytest.raises(MisuseError, match="value=0x100000000 does not fit into 4 bytes"):
            device.bar(0).write32(0, 1 << 32)
        with pytest.raises(UnsupportedError, match=f"{EDU} has no BAR 3"):
            device.bar(3)
        with pytest.raises(UnsupportedError, match="not mapped as a whole"):
            device.bar(0).words()


def mapped_host() -> FakeHost:
    """A device whose BAR 2 may be mapped, and whose BAR 4 only in part."""
    device = FakeDevice("0000:00:07.0", 7)
    device.regions[2] = FakeRegion(4 * PAGE, mapped=True)
    device.regions[4] = FakeRegion(4 * PAGE, mapped=True, areas=[(0, PAGE), (2 * PAGE, 2 * PAGE)])
    return FakeHost([device, FakeEdu(EDU, 5)])


def test_a_mapped_bar_is_memory_of_the_source_space() -> None:
    fake = mapped_host()
    with machine("iommufd", fake) as made, made.open("0000:00:07.0") as device:
        bar, bytes_ = device.bar(2), fake.devices["0000:00:07.0"].regions[2].bytes
        bar.write32(8, 0xCAFE)
        assert bytes_[8:12] == b"\xfe\xca\0\0" and bar.words()[2] == 0xCAFE and bar.read(8, 2) == 0xCAFE
        assert made.memory.region_at(bar.phys).kind == "bar" and made.memory.read(bar.phys + 8, 2) == b"\xfe\xca"
        part = device.bar(4)
        part.write32(PAGE, 7)  # a hole of the mapping: through the file
        assert part.read32(PAGE) == 7 and part.areas == [(0, PAGE), (2 * PAGE, 2 * PAGE)]
    assert [region.kind for region in made.memory.regions] == ["ram"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_peers_bar_is_mapped_and_never_pinned(backend: str) -> None:
    fake = mapped_host()
    with machine(backend, fake) as made, made.open("0000:00:07.0") as peer, made.open(EDU, mask=(1 << 28) - 1) as edu:
        bar = peer.bar(2)
        pinned = made.pins.pinned
        addr = edu.dma.map_resource(bar.phys + PAGE, PAGE, BOTH)
        assert made.pins.pinned == pinned == fake.account.bytes
        edu.set_bus_master(True)
        edu.bar(0).write32(4, 0)
        fake.devices[EDU].model.buffer[:4] = b"peer"  # type: ignore[attr-defined]
        edu_dma(edu, addr, 4, to_device=False)
        assert fake.devices["0000:00:07.0"].regions[2].bytes[PAGE : PAGE + 4] == b"peer"
        edu.dma.unmap_resource(addr, PAGE, BOTH)
    assert fake.left() == {"files": 0, "pinned": 0}


def test_iommufd_without_dma_bufs_says_so() -> None:
    fake = mapped_host()
    fake.dma_bufs = False
    with machine("iommufd", fake) as made, made.open("0000:00:07.0") as peer, made.open(EDU) as edu:
        with pytest.raises(UnsupportedError) as caught:
            edu.dma.map_resource(peer.bar(2).phys, PAGE, BOTH)
        assert str(caught.value) == (
            "this kernel's iommufd cannot map a device's BAR (VFIO_DEVICE_FEATURE: ENOTTY: Inappropriate ioctl for"
            " device): use backend='type1'"
        )
        assert made.live()["mappings"] == 0


def test_closing_keeps_the_order_and_a_killed_process_leaves_nothing() -> None:
    for backend in BACKENDS:
        fake, made, device = taken(backend)
        buffer = made.buffer(PAGE)
        device.dma.map_phys(*buffer.ranges[0], BOTH)
        device.set_bus_master(True)
        device.interrupts()
        assert fake.devices[EDU].master
        fake.kill()
        assert fake.left() == {"files": 0, "pinned": 0}
        edu = fake.devices[EDU]
        assert not edu.master and not edu.opened and edu.space is None
        with machine(backend, fake) as again, again.open(EDU) as taken_again:
            assert taken_again.bar(0).read32(0) == 0x010000ED and not taken_again.config.bus_master
        made.close()


def test_slices_of_registers_that_somebody_holds_do_not_keep_the_device() -> None:
    fake = mapped_host()
    with machine("type1", fake) as made:
        device = made.open("0000:00:07.0")
        held = device.bar(2).words()[2:4]
        device.bar(2).write32(8, 7)
        assert held[0] == 7
    assert fake.left() == {"files": 0, "pinned": 0}
    assert list(held) == [0, 0]  # fresh memory, not registers


def test_an_exception_inside_closes_in_order() -> None:
    fake, made, device = taken()
    with pytest.raises(KeyboardInterrupt), made, device:
        device.dma.map_phys(*made.buffer(PAGE).ranges[0], BOTH)
        device.set_bus_master(True)
        raise KeyboardInterrupt
    assert fake.left() == {"files": 0, "pinned": 0} and not fake.devices[EDU].master


def test_leaving_with_live_mappings_is_told_and_still_cleans_up() -> None:
    fake, made, device = taken()
    with pytest.raises(MisuseError, match="released with live mappings: a window of 0x1000 bytes"), made, device:
        device.dma.try_alloc(0, PAGE)
    assert fake.left() == {"files": 0, "pinned": 0}


@pytest.mark.parametrize(
    "change, backend, message",
    [
        ("driver", "auto", f"{EDU} is driven by edu: bind it first: dmakit vfio bind {EDU}"),
        ("unbound", "auto", f"{EDU} is bound to no driver: bind it first: dmakit vfio bind {EDU}"),
        ("group", "auto", f"{EDU}: not behind an IOMMU: enable it in the firmware, or boot with intel_iommu=on"
         " (Intel)"),
        ("stranger", "auto", f"{EDU}: IOMMU group 5 also holds {NVME} (nvme): bind them too"),
        ("no vfio", "auto", "this kernel has neither iommufd nor VFIO type1: modprobe vfio-pci (CONFIG_VFIO)"),
        ("no iommufd", "iommufd", "backend='iommufd': this kernel does not offer it for 0000:00:05.0 (needs"
         " CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV); use backend='type1'"),
        ("no type1", "type1", "backend='type1': this kernel does not offer it for 0000:00:05.0 (/dev/vfio/vfio is"
         " missing: modprobe vfio)"),
        ("not root", "type1", "open(/dev/vfio/vfio): EACCES: no permission: run as root, or give yourself the file"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_with_its_remedy(change: str, backend: str, message: str) -> None:
    fake = host()
    edu, nvme = fake.devices[EDU], fake.devices[NVME]
    if change == "driver":
        edu.driver = "edu"
    elif change == "unbound":
        edu.driver = ""
    elif change == "group":
        edu.group = -1
    elif change == "stranger":
        nvme.group, nvme.driver = 5, "nvme"
    fake.has_iommufd = change not in ("no vfio", "no iommufd")
    fake.has_type1 = change not in ("no vfio", "no type1")
    fake.root = change != "not root"
    with machine(backend, fake) as made:
        with pytest.raises(HostError) as caught:
            made.open(EDU)
        assert str(caught.value) == message
    assert fake.left() == {"files": 0, "pinned": 0}


def test_addresses_are_checked() -> None:
    with machine() as made:
        with pytest.raises(InputError) as caught:
            made.open("nvme0")
        assert str(caught.value) == ("'nvme0' is no PCI address: write domain:bus:device.function, as in 0000:01:00.0")
        with pytest.raises(HostError, match="0000:00:1f.7: this host has no such PCI device; see: dmakit vfio list"):
            made.open("00:1f.7")
        with made.open("00:05.0"), pytest.raises(MisuseError, match=f"{EDU} is open already"):
            made.open(EDU)


def test_open_makes_a_machine_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = host()
    monkeypatch.setattr("dmakit.platform.linux.machine.Kernel", lambda: fake)
    with vfio.Device.open(EDU, ram="4M", mask=(1 << 28) - 1) as device:
        assert device.buffer("8K").size == 8192 and device.dma.mask == (1 << 28) - 1
        with pytest.raises(UnsupportedError, match="is real: it reads memory when its registers tell it to"):
            device.dma.dma_read(0, 1)
    assert device.machine.closed and fake.left() == {"files": 0, "pinned": 0}


def test_a_device_that_cannot_be_reset_is_taken_all_the_same() -> None:
    fake = FakeHost([FakeDevice(EDU, 5, resets=False)])
    with machine("type1", fake) as made, made.open(EDU) as device, pytest.raises(UnsupportedError) as caught:
        device.reset()
    assert str(caught.value) == f"{EDU} cannot be reset alone (no FLR, no power management, not alone on its bus)"


def test_no_iova_is_an_address_at_which_a_device_answers() -> None:
    """Bridge windows and BARs, as sysfs shows them: else a device might reach its neighbour, or itself."""
    fake = host()
    lines = (
        "0x00000000feb00000 0x00000000febfffff 0x0000000000040200",
        "0x000000000000c000 0x000000000000c03f 0x40101",
    )
    fake.devices[EDU].resource = "\n".join((*lines, "0x0000000000000000 0x0000000000000000 0x0000000000000000")) + "\n"
    fake.devices[NVME].resource = "0x00000000fec00000 0x00000000fffff000 0x0000000000140204\n"
    _, made, device = taken(fake=fake)
    with made, device:
        (space,) = made.spaces
        assert (0xFEB00, 0xFFFFF) in space.reserved and (0xC, 0xC) not in space.reserved
        device.dma.set_mask((1 << 32) - 1)
        assert device.dma.map_phys(*made.buffer(PAGE).ranges[0], TO) == 0xFEAFF000
        device.dma.unmap_phys(0xFEAFF000, PAGE, TO)
