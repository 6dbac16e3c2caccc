"""What a driver of any PCI device rests on: who it is, registers, interrupts, bus mastering, reset.

edu is the device (for the reset of a function an NVMe controller, which has one): QEMU's in the test VM, the model of
the software machine elsewhere.
"""

from __future__ import annotations

import math
import time

import pytest

from dmakit.errors import MisuseError, UnsupportedError
from tests.pci.world import EDU, NVME, PAGE, PLATFORMS, bring_up, taken
from tests.support.edu import EDU_MASK

everywhere = pytest.mark.parametrize("platform", PLATFORMS)
COMMAND, STATUS, BAR0, MSI, MSIX = 0x04, 0x06, 0x10, 5, 17
INTX_DISABLE = 0x400
QUIET = 0.1  # seconds after which an interrupt that did not come will not


@everywhere
def test_who_it_is(platform: str) -> None:
    with taken(platform) as (_, device):
        config = device.config
        assert (config.read(0, 2), config.read(2, 2), config.read(8, 4) >> 8) == (0x1234, 0x11E8, 0x00FF00)
        assert (device.info.vendor, device.info.device, device.info.class_code) == (0x1234, 0x11E8, 0x00FF00)
        assert (config.read(0x0E, 1), config.read(0x2C, 4), config.read(0x3D, 1)) == (0, 0x11001AF4, 1)
        assert config.capability(MSI) >= 0x40 and config.capability(MSIX) == config.extended_capability(13) == 0
        counts = device.interrupt_counts()
        assert (counts["intx"], counts["msix"]) == (1, 0) and counts["msi"] >= 1
        assert device.bar(0).size == 1 << 20 and device.region(3).size == 0 and str(device) == device.bdf == EDU
        for index in (3, 6, 7):
            with pytest.raises(UnsupportedError) as caught:
                device.bar(index)
            assert str(caught.value) == f"{EDU} has no BAR {index}"
        with pytest.raises(MisuseError) as misused:
            device.region(9)
        assert str(misused.value) == f"region 9: {EDU} has regions 0 to 8"
        assert not device.wanted_back and not device.failed
        device.check()


@everywhere
def test_a_closed_function_is_out_of_reach(platform: str) -> None:
    """Its slot, and the number of its file, may be somebody else's by now."""
    with taken(platform) as (machine, device):
        bar, config = device.bar(0), device.config
        device.close()
        with machine.open(EDU, mask=EDU_MASK) as other:
            other.set_bus_master(True)
            other.bar(0).write32(4, 5)
            for call in (
                lambda: bar.read32(4),
                lambda: bar.write32(4, 1),
                lambda: config.write(COMMAND, 0, 2),
                lambda: device.set_bus_master(False),
                lambda: device.bar(0),
                device.interrupt_counts,
                device.interrupts,
                device.reset,
            ):
                with pytest.raises(MisuseError) as caught:
                    call()
                assert str(caught.value) == f"{EDU} is closed"
            assert other.config.bus_master and other.bar(0).read32(4) == ~5 & 0xFFFF_FFFF


@everywhere
def test_registers(platform: str) -> None:
    with taken(platform) as (_, device):
        bar = device.bar(0)
        assert bar.read32(0) == 0x010000ED
        for word in (0, 0x12345678, 0xFFFF_FFFF):
            bar.write32(4, word)
            assert bar.read32(4) == ~word & 0xFFFF_FFFF
        for n in (0, 1, 5, 12, 13, 33, 34, 100):
            bar.write32(8, n)
            while bar.read32(0x20) & 1:
                time.sleep(0.001)
            assert bar.read32(8) == math.factorial(n) % 2**32
        bar.write(0x80, 0x1234567890, 8)
        assert bar.read(0x80, 8) == 0x1234567890
        assert bar.read32(0x1000) == 0xFFFF_FFFF, "no register is there"
        for offset, width in ((2, 4), (0, 3), (1 << 20, 4), (-4, 4)):
            with pytest.raises(MisuseError, match=rf"region 0: an access of {width} bytes at .* must be aligned"):
                bar.read(offset, width)


@everywhere
def test_configuration_takes_only_what_is_a_drivers(platform: str) -> None:
    with taken(platform) as (_, device):
        config = device.config
        before = [config.read(at, 4) for at in range(0, 64, 4)]
        for at in (0x00, 0x08, 0x28, 0x2C, 0x34):
            config.write(at, 0xFFFF_FFFF, 4)
            assert config.read(at, 4) == before[at >> 2]
        assert config.read(STATUS, 2) & 0x10
        config.write(STATUS, 0xFFFF, 2)
        assert config.read(STATUS, 2) & 0x10, "there is still a list of capabilities"
        config.write(BAR0, 0xFFFF_FFFF, 4)
        assert config.read(BAR0, 4) == 0xFFF0_0000, "the BAR tells its size"
        config.write(BAR0 + 4, 0xFFFF_FFFF, 4)
        assert config.read(BAR0 + 4, 4) == 0, "there is no BAR 1"
        config.write(BAR0, before[BAR0 >> 2], 4)
        assert config.read(BAR0, 4) == before[BAR0 >> 2]
        assert device.bar(0).read32(0) == 0x010000ED, "where the driver sees it, it stays"


@everywhere
def test_a_computation_ends_with_an_interrupt(platform: str) -> None:
    with taken(platform) as (_, device):
        bar, interrupt = device.bar(0), device.interrupts(1, "msi")[0]
        device.set_bus_master(True)
        bar.write32(0x20, 0x80)
        bar.write32(8, 7)
        assert interrupt.wait(10) == 1 and bar.read32(0x24) == 1 and bar.read32(8) == 5040
        bar.write32(0x64, 1)
        assert bar.read32(0x24) == 0


@everywhere
@pytest.mark.parametrize("kind", ("intx", "msi"))
def test_interrupts(platform: str, kind: str) -> None:
    with taken(platform) as (_, device):
        interrupt = device.interrupts(1, kind)[0]
        device.set_bus_master(True)  # an MSI is a write to memory
        bar = device.bar(0)
        for value in (1, 6):
            bar.write32(0x60, value)
            assert interrupt.wait(10) == 1 and bar.read32(0x24) == value
            bar.write32(0x64, value)
            if kind == "intx":
                interrupt.unmask()
        assert interrupt.wait(QUIET) == 0
        if kind == "msi":
            with pytest.raises(UnsupportedError, match="msi vectors do not mask themselves"):
                interrupt.unmask()


@everywhere
def test_a_line_masks_itself_and_fires_again_while_it_is_high(platform: str) -> None:
    with taken(platform) as (_, device):
        line, bar = device.interrupts(1, "intx")[0], device.bar(0)
        bar.write32(0x60, 1)
        assert line.wait(10) == 1
        bar.write32(0x60, 2)
        assert line.wait(QUIET) == 0, "it has masked itself"
        line.unmask()
        assert line.wait(10) == 1, "nobody has served the device"
        bar.write32(0x64, 3)
        line.unmask()
        assert line.wait(QUIET) == 0


@everywhere
def test_a_line_that_is_cut_off_waits(platform: str) -> None:
    with taken(platform) as (_, device):
        line, bar, config = device.interrupts(1, "intx")[0], device.bar(0), device.config
        config.write(COMMAND, config.read(COMMAND, 2) | INTX_DISABLE, 2)
        bar.write32(0x60, 1)
        assert line.wait(QUIET) == 0
        config.write(COMMAND, config.read(COMMAND, 2) & ~INTX_DISABLE, 2)
        assert line.wait(10) == 1
        bar.write32(0x64, 1)


@everywhere
def test_nothing_leaves_a_device_that_does_not_master_the_bus(platform: str) -> None:
    with bring_up(platform) as (machine, device, port):
        target = machine.buffer(PAGE)
        target.write(0, b"untouched")
        addr = device.dma.map_phys(*target.ranges[0], 0)
        port.page.write(0, b"from edu!")
        port.edu.fetch(port.addr, 9)
        device.set_bus_master(False)
        assert not device.config.bus_master
        bar = device.bar(0)
        for register, value in ((0x80, 0x40000), (0x88, addr), (0x90, 9), (0x98, 3)):
            bar.write(register, value, 8)
        while bar.read(0x98, 8) & 1:
            time.sleep(0.001)
        bar.write32(0x60, 4)
        assert port.edu.interrupt.wait(QUIET) == 0, "a message is a write to memory, too"
        assert target.read(0, 9) == b"untouched"
        bar.write32(0x64, bar.read32(0x24))
        device.set_bus_master(True)
        assert port.edu.interrupt.wait(QUIET) == 0, "what was lost is lost"
        port.edu.store(addr, 9)
        assert target.read(0, 9) == b"from edu!"
        device.dma.unmap_phys(addr, PAGE, 0)


@everywhere
def test_a_reset_forgets_registers_and_keeps_configuration(platform: str) -> None:
    aqa, asq, acq, cc, csts = 0x24, 0x28, 0x30, 0x14, 0x1C
    enabled = 0x0046_0001
    with taken(platform, NVME) as (_, device):
        bar, config = device.bar(0), device.config
        assert len(device.interrupts(2, "msix")) == 2
        device.set_bus_master(True)
        for _ in range(2):  # after a reset it can be used again
            for register, value in ((aqa, 0x001F_001F), (asq, 0x10000), (acq, 0x20000), (cc, enabled)):
                bar.write32(register, value)
            end = time.monotonic() + 20
            while bar.read32(csts) != 1:
                assert time.monotonic() < end, "the controller does not get ready"
            assert bar.read32(cc) == enabled
            device.reset()
            assert (bar.read32(cc), bar.read32(csts)) == (0, 0)
            assert config.read(COMMAND, 2) & 6 == 6, "what its owner has set is restored"
