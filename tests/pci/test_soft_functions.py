"""The software machine's PCI functions: what only a model shows, and what a hostile driver cannot do to one."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import replace
from typing import Any

import pytest

from dmakit import soft
from dmakit.dma.direction import Direction
from dmakit.errors import DmakitError, ExhaustedError, FaultError, HostError, InputError, MisuseError, UnsupportedError
from dmakit.nvme.controller import Controller
from dmakit.nvme.function import NvmeFunction
from dmakit.platform.eventfds import Eventfds
from tests.support.edu import EDU_MASK, Edu, EduPort
from tests.support.sweep import descriptors

COMMAND, STATUS, EXPRESS, MSIX, MSI = 0x04, 0x06, 0x10, 0x11, 0x05
EDU, NVME, BOTH = "0000:00:10.0", "0000:00:04.0", Direction.BIDIRECTIONAL
PAGE = 4096


class Scratch(soft.Model):
    """Everything a function may have: 16 registers, memory, all kinds of interrupts; it remembers its accesses."""

    identity = soft.Identity(
        0x1234, 0x0001, 0x120000, bars={0: soft.Bar(PAGE), 2: soft.Bar(4 * PAGE, memory=True)}, msi=4, msix=3,
        express=True,
    )  # fmt: skip

    def __init__(self) -> None:
        self.resets = 0
        self.seen: list[tuple[Any, ...]] = []

    def reset(self) -> None:
        self.resets += 1
        self.words = [0] * 16

    def read(self, bar: int, offset: int, width: int) -> int:
        self.seen.append((bar, offset, width))
        return self.words[offset // 4] if offset < 64 else -1

    def write(self, bar: int, offset: int, value: int, width: int) -> None:
        self.seen.append((bar, offset, width, value))
        if offset < 64:
            self.words[offset // 4] = value


def machine(**options: Any) -> soft.Machine:
    """A small strict machine."""
    return soft.Machine(**{"ram": "64M", "swiotlb": 0, "mode": "strict", **options})


def test_accesses_reach_the_model_in_their_width_and_only_while_it_decodes() -> None:
    model = Scratch()
    with soft.Device.open(model) as device:
        bar = device.bar(0)
        bar.write32(8, 7)
        assert bar.read(8, 2) == 7 and bar.read(72, 1) == 0xFF and bar.read(72, 8) == (1 << 64) - 1
        assert model.seen == [(0, 8, 4, 7), (0, 8, 2), (0, 72, 1), (0, 72, 8)]
        device.config.set_memory(False)
        bar.write32(8, 9)
        assert bar.read32(8) == 0xFFFF_FFFF and len(model.seen) == 4
        device.config.set_memory(True)
        assert bar.read32(8) == 7


def test_edus_liveness_register_begins_at_0_and_reads_the_complement_of_what_was_written() -> None:
    with soft.Device.open(soft.Edu(), mask=EDU_MASK) as edu:
        assert edu.bar(0).read32(4) == 0
        edu.bar(0).write32(4, 0x12345678)
        assert edu.bar(0).read32(4) == 0xEDCBA987


def test_a_refused_access_of_64_bits_is_not_half_done() -> None:
    model = Scratch()
    with soft.Device.open(model) as device:
        bar = device.bar(0)
        for offset, value in ((0, 1 << 64), (0, -1), (PAGE - 4, 1), (2, 1), (-4, 1)):
            with pytest.raises(MisuseError, match="^region 0: (an access of 4 bytes at |value=.* does not fit)"):
                bar.write64(offset, value)
        with pytest.raises(MisuseError, match="^region 0: an access of 4 bytes at 0x1000 must be aligned"):
            bar.read64(PAGE - 4)
        assert model.seen == []
        bar.write64(4, 0x1_0000_0002)
        assert bar.read64(4) == 0x1_0000_0002 and model.words[1:3] == [2, 1]


def test_memory_in_a_bar_is_memory_of_the_machine() -> None:
    with machine() as made:
        peer, edu = soft.Device.open(Scratch(), machine=made), soft.Device.open(soft.Edu(), machine=made, mask=EDU_MASK)
        bar = peer.bar(2)
        assert bar.phys == made.functions["0000:00:04.0"].memory(2).start and bar.phys % bar.size == 0
        assert bar.areas == [(0, 4 * PAGE)] and made.memory.region_at(bar.phys).kind == "bar"
        bar.write32(8, 0xCAFE)
        bar.words(2)[0] = 0xF00D
        assert bar.words()[2] == 0xCAFE and made.memory.read(bar.phys, 2) == b"\x0d\xf0"
        addr = edu.dma.map_resource(bar.phys, PAGE, BOTH)
        port = EduPort(Edu(edu), made)
        port.write(addr + 64, b"from a peer")
        assert made.memory.read(bar.phys + 64, 11) == b"from a peer"
        edu.dma.unmap_resource(addr, PAGE, BOTH)
        peer.config.set_memory(False)
        bar.write32(8, 1)
        assert bar.read32(8) == 0xFFFF_FFFF and bar.words()[2] == 0xCAFE
        for region, what in ((peer.bar(0), "phys"), (edu.bar(0), "phys")):
            with pytest.raises(UnsupportedError) as caught:
                getattr(region, what)
            assert str(caught.value) == f"region 0 of {region.owner}: has no part that may be mapped"
        with pytest.raises(UnsupportedError, match="region 0 of .*: not mapped as a whole; use read and write"):
            peer.bar(0).words()
        with pytest.raises(MisuseError, match="BAR 0 is not memory"):
            made.functions["0000:00:04.0"].memory(0)


def test_what_configuration_space_says() -> None:
    with soft.Device.open(Scratch(), bdf="07:03.1") as device:
        config = device.config
        assert device.bdf == "0000:07:03.1" and device.dma.port.source == 0x0719 and config.size == 4096
        msi, express, msix = (config.capability(number) for number in (MSI, EXPRESS, MSIX))
        assert config.read(msi + 2, 2) == 1 << 7 | 2 << 1  # 64-bit addresses, 4 vectors
        assert config.read(express + 4, 4) >> 28 & 1 == 1  # FLR
        assert (config.read(msix + 2, 2), config.read(msix + 4, 4), config.read(msix + 8, 4)) == (2, 4, PAGE | 4)
        assert config.extended_capability(1) == 0
        config.write(0x18, 0xFFFF_FFFF_FFFF_FFFF, 8)
        assert config.read(0x18, 8) == ~(4 * PAGE - 1) & ((1 << 64) - 1) | 0xC  # 64-bit, prefetchable, 16 KiB
        config.write(0x20, 0xFFFF_FFFF, 4)
        assert config.read(0x20, 4) == ~(2 * PAGE - 1) & 0xFFFF_FFFF  # the MSI-X table and the pending bits
        table = device.bar(4)
        table.write32(0, 1)
        assert table.read32(0) == 0xFFFF_FFFF, "the table is the host's"
        assert device.interrupt_counts() == {"intx": 1, "msi": 4, "msix": 3}


def test_enable_bits_tell_what_is_on_and_a_driver_cannot_change_them() -> None:
    with soft.Device.open(Scratch()) as device:
        config = device.config
        msi, msix = config.capability(MSI), config.capability(MSIX)

        def on() -> tuple[int, int]:
            return config.read(msi + 2, 2) & 1, config.read(msix + 2, 2) >> 15

        for count, kind, wanted in ((4, "msi", (1, 0)), (3, "msix", (0, 1)), (1, "intx", (0, 0))):
            device.interrupts(count, kind)
            assert on() == wanted
            config.write(msi, 0xFFFF_FFFF ^ wanted[0] << 16, 4)
            config.write(msix, 0xFFFF_FFFF ^ wanted[1] << 31, 4)
            assert on() == wanted


def test_messages_go_to_their_vector_while_the_function_masters_the_bus() -> None:
    model = Scratch()
    with soft.Device.open(model) as device:
        assert not model.function.message(0), "nothing is on"
        for kind, count in (("msi", 4), ("msix", 3)):
            vectors = device.interrupts(count, kind)
            device.set_bus_master(False)
            assert model.function.message(1) and [entry.take() for entry in vectors] == [0] * count
            device.set_bus_master(True)
            for vector in (1, 1, 2, 7, -1):
                assert model.function.message(vector)
            assert [entry.take() for entry in vectors] == [0, 2, 1, 0][:count]
        assert device.interrupts().kind == "msix" and device.interrupts(4).kind == "msi"
        for count, kind in ((5, "msi"), (4, "msix"), (2, "intx"), (0, "msi")):
            with pytest.raises(UnsupportedError, match=f"{count} {kind} vectors: the device has "):
                device.interrupts(count, kind)


def test_an_interrupt_is_waited_for_whatever_the_number_of_its_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with a thousand files open: select() takes no number above 1023."""

    def high(self: Eventfds) -> int:
        low = plain(self)
        try:
            return fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 1500)
        finally:
            os.close(low)

    plain = Eventfds.eventfd
    monkeypatch.setattr(Eventfds, "eventfd", high)
    model = Scratch()
    with soft.Device.open(model) as device:
        interrupt = device.interrupts()[0]
        device.set_bus_master(True)
        assert interrupt.fileno() >= 1500 and interrupt.wait(0.001) == interrupt.wait(-1) == interrupt.take() == 0
        model.function.message()
        model.function.message()
        assert interrupt.wait() == 2 and interrupt.wait(0) == 0
        assert model.function.notify("req")
        with pytest.raises(HostError, match="the host wants the device back"):
            interrupt.wait()


def test_a_vector_that_is_switched_off_is_nobodys() -> None:
    """The number of its eventfd is given out again, most likely to the vector that comes in its place."""
    model = Scratch()
    with soft.Device.open(model) as device:
        old = device.interrupts(1, "intx")[0]
        new = device.interrupts(1, "intx")[0]
        model.function.set_line(True)
        for call in (old.fileno, old.take, old.wait, old.unmask):
            with pytest.raises(MisuseError) as caught:
                call()
            assert str(caught.value) == "intx vector 0 is switched off"
        assert new.take() == 1


def test_the_line_tells_of_itself_in_the_status_register() -> None:
    model = Scratch()
    with soft.Device.open(model) as device:
        assert not device.config.read(STATUS, 2) & 8
        model.function.set_line(True)
        assert device.config.read(STATUS, 2) & 8
        assert device.interrupts(1, "intx")[0].take() == 1, "it was high before anybody listened"
        device.reset()
        assert not device.config.read(STATUS, 2) & 8


def test_accesses_to_memory_are_blocked_and_counted_without_bus_mastering() -> None:
    model = Scratch()
    with machine() as made:
        function = made.plug(model)
        with pytest.raises(FaultError) as caught:
            function.read(0x1000, 4)
        assert str(caught.value) == "0000:00:04.0: read of 4 bytes at 0x1000: bus mastering is off"
        with made.open(function.bdf) as device:
            addr = device.dma.map_phys(*made.buffer(PAGE).ranges[0], BOTH)
            with pytest.raises(FaultError, match="write of 2 bytes at .*: bus mastering is off") as caught:
                function.write(addr, b"hi")
            assert caught.value.write and caught.value.iova == addr
            device.set_bus_master(True)
            function.write(addr, b"hi")
            assert function.read(addr, 2) == b"hi" and function.blocked == 2
            with pytest.raises(FaultError, match="may not read"):
                function.read(addr + PAGE, 2)
            device.dma.unmap_phys(addr, PAGE, BOTH)
        assert function.blocked == 2, "what the IOMMU blocks is in its own log"
        with pytest.raises(FaultError):
            function.read(addr, 2)


@pytest.mark.parametrize("way", ("call", "flr"))
def test_a_reset_is_a_models_and_configuration_stays(way: str) -> None:
    model = Scratch()
    with soft.Device.open(model) as device:
        vectors = device.interrupts(2, "msi")
        device.set_bus_master(True)
        device.bar(0).write32(0, 5)
        before = model.resets
        if way == "call":
            device.reset()
        else:
            control = device.config.capability(EXPRESS) + 8
            device.config.write(control, 0x8000 | device.config.read(control, 2), 2)
            assert not device.config.read(control, 2) & 0x8000
        assert model.resets == before + 1 and device.bar(0).read32(0) == 0
        assert device.config.bus_master and model.function.message(1) and vectors[1].take() == 1


def test_a_fault_in_a_reset_is_the_models_own_affair() -> None:
    """A model that writes its last word to memory when it is reset; closing resets it when it masters no more."""

    class LastWord(Scratch):
        addr = PAGE

        def reset(self) -> None:
            super().reset()
            self.function.write(self.addr, b"bye")

    model = LastWord()
    with machine() as made:
        function = made.plug(model, EDU)
        with made.open(EDU) as device, device.dma.alloc_coherent(PAGE) as memory:
            model.addr = memory.addr
            device.set_bus_master(True)
            device.reset()
            assert memory.read(0, 3) == b"bye" and function.blocked == 2
        assert function.blocked == model.resets - 1 == 3 and not made.devices and not made.opened


def test_closing_leaves_a_function_as_it_was_found() -> None:
    model = Scratch()
    with machine() as made:
        function = made.plug(model, EDU)
        for _ in range(2):
            files = descriptors()
            with made.open("00:10.0", mask=EDU_MASK) as device:
                with pytest.raises(MisuseError, match=f"{EDU} is open already"):
                    made.open(EDU)
                assert not device.config.bus_master and device.bar(0).read32(0) == 0
                device.interrupts(4, "msi")
                device.set_bus_master(True)
                device.bar(0).write32(0, 5)
            device.close()
            assert descriptors() == files and not made.devices and not made.live()["table_pages"]
            assert not function.message() and function.load_config(COMMAND, 2) == 0
    with made.open(EDU) as device:
        made.close()
        assert device.closed


def test_mappings_go_with_the_function_and_are_told() -> None:
    with machine() as made:
        made.plug(Scratch(), EDU)
        leak = pytest.raises(MisuseError, match="released with live mappings: a window of 0x1000 bytes")
        with leak, made.open(EDU) as device:
            device.dma.try_alloc(0, PAGE)
        assert not any(made.live().values())
        with pytest.raises(KeyboardInterrupt), made.open(EDU) as device:
            device.dma.map_phys(*made.buffer(PAGE).ranges[0], BOTH)
            raise KeyboardInterrupt
        assert not any(made.live().values())


@pytest.mark.parametrize("kind, number, text", [
    ("req", errno.ENODEV, "the host wants the device back (it is being unbound, removed or unplugged)"),
    ("err", errno.EIO, "the host reports a fatal error of the device (PCI Express AER)"),
])  # fmt: skip
def test_notices(kind: str, number: int, text: str) -> None:
    model = Scratch()
    with soft.Device.open(model) as device:
        interrupt = device.interrupts()[0]
        assert model.function.notify(kind)
        for call in (interrupt.wait, device.check):
            with pytest.raises(HostError) as caught:
                call()
            assert (str(caught.value), caught.value.errno) == (f"{device}: {text}", number)
        assert (device.wanted_back, device.failed) == (kind == "req", kind == "err")
        with pytest.raises(MisuseError) as misused:
            model.function.notify("msi")
        assert str(misused.value) == "kind='msi': must be one of err, req"
    assert not model.function.notify(kind), "nobody listens any more"
    with soft.Device.open(soft.Edu()) as device:
        assert not device.machine.functions[device.bdf].notify("err"), "conventional PCI has no such thing"


def test_a_function_that_is_pulled_out_is_all_ones() -> None:
    model = soft.Edu()
    with machine() as made, soft.Device.open(model, machine=made, mask=EDU_MASK) as device:
        interrupt = device.interrupts(1, "msi")[0]
        device.set_bus_master(True)
        model.function.present = False
        assert device.config.read(0, 4) == device.bar(0).read32(0) == 0xFFFF_FFFF
        device.bar(0).write32(0x60, 1)
        device.config.write(COMMAND, 0, 2)
        assert model.function.message() and interrupt.take() == 0 and model.pending == 0
        with pytest.raises(FaultError):
            model.function.read(0, 1)
    with pytest.raises(HostError, match="this machine has no such PCI function"):
        made.open(device.bdf)


def test_slots_and_what_is_wrong_with_them() -> None:
    with machine() as made:
        assert [made.plug(soft.Edu()).bdf for _ in range(2)] == ["0000:00:04.0", "0000:00:05.0"]
        for call, kind, message in (
            (lambda: made.plug(soft.Edu(), "00:04.0"), MisuseError, "0000:00:04.0: the slot is taken"),
            (lambda: made.plug(soft.Edu(), "edu"), InputError, "'edu' is no PCI address: write"),
            (lambda: made.open("00:1f.7"), HostError, "0000:00:1f.7: this machine has no such PCI function; plug one"),
        ):
            with pytest.raises(kind) as caught:
                call()
            assert str(caught.value).startswith(message)
        for _ in range(26):
            made.plug(soft.Edu())
        with pytest.raises(ExhaustedError) as exhausted:
            made.plug(soft.Edu())
        assert str(exhausted.value) == "no free slot on bus 0: name one of another bus"
        big = soft.Model()
        big.identity = soft.Identity(1, 2, 3, bars={0: soft.Bar(1 << 30)})
        with pytest.raises(ExhaustedError, match="no room for a BAR of 1073741824 bytes below 0xfec00000"):
            made.plug(big, "01:00.0")
        assert "0000:01:00.0" not in made.functions


def test_what_no_function_can_be() -> None:
    fine = Scratch.identity
    for change, message in (
        ({"msi": 3}, "msi=3, msix=3: a power of two up to 32, and up to 2048"),
        ({"msi": 64}, "msi=64, msix=3: a power of two up to 32, and up to 2048"),
        ({"msix": 4096}, "msi=4, msix=4096: a power of two up to 32, and up to 2048"),
        ({"vendor": 1 << 16}, "vendor=0x10000: must fit into 16 bits"),
        ({"device": -1}, "device=-0x1: must fit into 16 bits"),
        ({"class_code": 1 << 24}, "class_code=0x1000000: must fit into 24 bits"),
        ({"revision": 256}, "revision=0x100: must fit into 8 bits"),
        ({"subsystem": (0, 1 << 16)}, "subsystem=0x10000: must fit into 16 bits"),
        ({"bars": {4: soft.Bar(PAGE)}}, "msix_bar=4: is a BAR of the model"),
        ({"bars": {3: soft.Bar(PAGE, memory=True)}}, "BARs [3, 4, 4]: must be different, 0 to 5 (memory takes two)"),
        ({"bars": {6: soft.Bar(PAGE)}}, "BARs [6, 4]: must be different, 0 to 5 (memory takes two)"),
    ):
        with pytest.raises(MisuseError) as caught:
            replace(fine, **change)  # type: ignore[arg-type]
        assert str(caught.value) == message
    for size in (0, 2048, 3 * PAGE):
        with pytest.raises(MisuseError, match=f"BAR of {size} bytes: must be a power of two, 4096 or more"):
            soft.Bar(size)


def test_any_failure_while_opening_leaves_nothing() -> None:
    files = descriptors()
    for nth in range(1, 100):
        with machine() as made:
            made.plug(Scratch(), EDU)
            made.fail.arm(nth)
            try:
                with made.open(EDU) as device:
                    device.interrupts(3)
                    device.dma.unmap_phys(device.dma.map_phys(made.buffer(PAGE).ranges[0][0], PAGE, BOTH), PAGE, BOTH)
            except DmakitError:
                made.fail.disarm()
            else:
                break
            assert not made.opened and not made.devices and not any(made.live().values())
            with made.open(EDU) as device:
                assert len(device.interrupts(3)) == 3
    assert nth > 5 and descriptors() == files


def test_a_device_that_cannot_be_opened_is_not_left_in_its_slot() -> None:
    with machine() as made:
        with pytest.raises(MisuseError, match="unknown option 'colour'"):
            soft.Device.open(soft.Edu(), machine=made, bdf=EDU, colour="red")
        assert not made.functions and not made.devices
        with soft.Device.open(soft.Edu(), machine=made, bdf=EDU) as device:
            assert device.bdf == EDU


def test_a_device_of_ones_own_in_a_few_lines() -> None:
    """What docs/vfio.md says."""

    class Doubler(soft.Model):
        identity = soft.Identity(0x1234, 0x0002, 0x120000, bars={0: soft.Bar(4096)}, msi=1)

        def write(self, bar: int, offset: int, value: int, width: int) -> None:
            word = int.from_bytes(self.function.read(value, 4), "little")
            self.function.write(value, (2 * word).to_bytes(4, "little"))
            self.function.message()

    with (
        soft.Device.open(Doubler(), mask=(1 << 32) - 1) as device,
        device.dma.alloc_coherent(PAGE) as memory,
    ):
        memory.write(0, (21).to_bytes(4, "little"))
        done = device.interrupts()[0]
        device.set_bus_master(True)
        device.bar(0).write32(0, memory.addr)
        assert done.wait(1) == 1 and memory.read(0, 1) == b"\x2a"
        device.bar(0).write32(0, memory.addr - PAGE)  # a fault is the device's own affair
        assert done.wait(0) == 0 and device.machine.ledger.snapshot()["faults"] == 1


def test_the_drivers_controller_memory_buffer_lies_in_its_bar() -> None:
    with machine(ram="96M") as made:
        made.plug(NvmeFunction(buffer=1 << 20), NVME)
        with Controller.open(NVME, machine=made) as controller:
            memory = controller.memory_buffer()
            bar = controller.host.device.bar(2)  # type: ignore[attr-defined]
            assert memory.size <= bar.size == 1 << 20
        assert made.ledger.snapshot()["faults"] == 0
