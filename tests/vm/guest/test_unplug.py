"""A drive is taken away while dmakit drives it: the kernel waits, the driver ends in order, the others do not notice.

Where the machine has a port for it (``--hotplug``), a drive is pulled out. ``remove`` and ``unbind`` in sysfs take the
same way through vfio-pci's remove callback, which asks for the device (REQ) and blocks until its file is closed. An
error (ERR) is signalled by the kernel on our request (the interface's loopback): QEMU's drive has no error to report.
"""

from __future__ import annotations

import asyncio
import errno
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dmakit import nvme, vfio
from dmakit.errors import HostError
from dmakit.nvme.registers import ControllerError
from dmakit.platform.linux import uapi
from dmakit.platform.linux.irqs import set_irqs
from tests.support.sweep import descriptors
from tests.vm.guest.qmp import Monitor
from tests.vm.guest.support import FULL, NVME, PCI, driver_of, until
from tests.vm.guest.vfio_support import BACKENDS, EDU, bound, pinned

backends = pytest.mark.parametrize("backend", BACKENDS)
pytestmark = [] if FULL else [pytest.mark.on(kernel="iommufd", iommu="vtd-lazy")]
TAKEN, STAYS = NVME
HOT = "0000:01:00.0"
ASKED = "the host wants the device back (it is being unbound, removed or unplugged)"
LIMIT = 120  # seconds: for an emulated machine on a busy host
TAKE = {
    "remove": f"echo 1 > {PCI}/{{bdf}}/remove",
    "unbind": "echo {bdf} > /sys/bus/pci/drivers/vfio-pci/unbind",
}
hows = pytest.mark.parametrize("how", TAKE)


@pytest.fixture(autouse=True)
def everything_is_given_back() -> Iterator[None]:
    with bound(EDU, *NVME):
        before = descriptors(), pinned()
        yield
        assert (descriptors(), pinned()) == before


class Taken:
    """The administrator takes a device away; the call lasts until its owner has closed it."""

    def __init__(self, bdf: str, how: str) -> None:
        self.bdf, self.how = bdf, how
        self.process = subprocess.Popen(["sh", "-c", TAKE[how].format(bdf=bdf)])

    @property
    def waits(self) -> bool:
        """Whether the kernel still waits for the owner."""
        return self.process.poll() is None

    def done(self) -> None:
        """It ends now, the device has no driver or is gone; then it comes back, for the tests that follow."""
        assert self.process.wait(LIMIT) == 0
        assert not (PCI / self.bdf).exists() if self.how == "remove" else driver_of(self.bdf) is None
        if self.how == "remove":
            Path("/sys/bus/pci/rescan").write_text("1")
            until(lambda: (PCI / self.bdf).exists(), "the device is back", LIMIT)
        vfio.bind(self.bdf)


def opened(bdf: str, backend: str, **options: Any) -> nvme.Controller:
    """A controller, as a test wants it."""
    return nvme.Controller.open(bdf, backend=backend, ram="32M", **options)


class Writer:
    """Writes a drive round and round, eight at a time, and keeps what must be there."""

    def __init__(self, disk: Any) -> None:
        self.disk, self.rng = disk, random.Random(5)
        self.there: dict[int, bytes] = {}
        self.writes = 0
        self.stopped = False

    async def _one(self, lba: int) -> None:
        data = self.rng.randbytes(4096)
        self.there.pop(lba, None)  # until it is told otherwise, old or new
        await self.disk.write(lba, data)
        self.there[lba] = data
        self.writes += 1

    async def run(self) -> None:
        while not self.stopped:
            ended = await asyncio.gather(*(self._one(8 * at) for at in range(8)), return_exceptions=True)
            for error in ended:
                if error is not None:
                    raise error

    async def check(self) -> None:
        assert len(self.there) == 8
        for lba, data in self.there.items():
            assert await self.disk.read(lba, 8) == data


@hows
@backends
def test_a_drive_is_taken_away_under_io_and_the_other_goes_on(backend: str, how: str) -> None:
    async def main() -> None:
        async with opened(STAYS, backend) as other:
            steady = Writer(other.namespaces[1])
            going = asyncio.create_task(steady.run())
            async with opened(TAKEN, backend) as controller:
                writer = Writer(controller.namespaces[1])
                running = asyncio.create_task(writer.run())
                while writer.writes < 40:
                    await asyncio.sleep(0.01)
                taken = Taken(TAKEN, how)
                started = time.monotonic()
                with pytest.raises(ControllerError) as caught:
                    await asyncio.wait_for(running, LIMIT)
                assert time.monotonic() - started < LIMIT / 2
                assert str(caught.value).startswith(f"{TAKEN}: {ASKED}; CC=0x"), caught.value
                assert caught.value.errno == errno.ENODEV and "CSTS=0x00000001 (ready)" in str(caught.value)
                assert taken.waits and (PCI / TAKEN).exists()
                assert not (PCI / TAKEN / "config").read_bytes()[4] & 4, "it masters the bus no more"
                with pytest.raises(ControllerError):
                    await controller.namespaces[1].read(0, 8)
            before = steady.writes
            taken.done()
            while steady.writes < before + 40:
                await asyncio.sleep(0.01)
                assert not going.done()
            steady.stopped = True
            await going
            await steady.check()
        with opened(TAKEN, backend) as again:  # every write that was told as done is there
            for lba, data in writer.there.items():
                assert again.namespaces[1].read(lba, 8) == data

    asyncio.run(main())


@contextmanager
def plugged_in() -> Iterator[Monitor]:
    """A drive in the port; afterwards, when it was pulled out, QEMU has forgotten it."""
    with Monitor() as monitor:
        monitor("blockdev-add", driver="null-co", size=64 << 20, **{"node-name": "plug", "read-zeroes": True})
        monitor("device_add", driver="nvme", id="hot", bus="hotport", drive="plug", serial="HOT")
        until(lambda: (PCI / HOT).exists(), "the drive is there", LIMIT)
        vfio.bind(HOT)
        yield monitor
        until(lambda: not (PCI / HOT).exists(), "the kernel has let the drive go", LIMIT)
        until(lambda: "hot" not in {entry["name"] for entry in monitor("qom-list", path="/machine/peripheral")},
              "QEMU has taken the drive out", LIMIT)  # fmt: skip
        until(lambda: let_go(monitor), "QEMU has let the drive's data go", LIMIT)


def let_go(monitor: Monitor) -> bool:
    """Take the data of the drive away; false while QEMU, which has forgotten the drive, still holds them."""
    try:
        monitor("blockdev-del", **{"node-name": "plug"})
    except AssertionError as error:
        if "is in use" not in str(error):
            raise
        return False
    return True


@pytest.mark.on(hotplug="yes")
@backends
def test_a_drive_is_pulled_out_under_io_and_the_other_goes_on(backend: str) -> None:
    async def main(monitor: Monitor) -> None:
        async with opened(STAYS, backend) as other:
            steady = Writer(other.namespaces[1])
            going = asyncio.create_task(steady.run())
            async with opened(HOT, backend) as controller:
                running = asyncio.create_task(Writer(controller.namespaces[1]).run())
                monitor("device_del", id="hot")
                with pytest.raises(ControllerError) as caught:
                    await asyncio.wait_for(running, LIMIT)
                assert str(caught.value).startswith(f"{HOT}: {ASKED}; CC=0x"), caught.value
                assert (PCI / HOT).exists(), "the kernel waits for us"
            before = steady.writes
            while (PCI / HOT).exists() or steady.writes < before + 40:
                await asyncio.sleep(0.01)
                assert not going.done()
            steady.stopped = True
            await going
            await steady.check()

    with plugged_in() as monitor:
        asyncio.run(asyncio.wait_for(main(monitor), 2 * LIMIT))


@backends
def test_an_idle_drive_is_asked_for(backend: str) -> None:
    with opened(TAKEN, backend) as controller:
        controller.namespaces[1].write(0, b"idle" * 1024)
        taken = Taken(TAKEN, "remove")
        with pytest.raises(ControllerError, match=f"{TAKEN}: the host wants the device back"):
            while taken.waits:
                controller.check()
    taken.done()


@backends
def test_a_fatal_error_ends_that_drive_alone(backend: str) -> None:
    with opened(STAYS, backend) as other, opened(TAKEN, backend) as controller:
        controller.namespaces[1].write(0, b"good" * 1024)
        host: Any = controller.host
        ask = uapi.SET_DATA_NONE | uapi.SET_TRIGGER
        set_irqs(host.machine.kernel, host.device.fd, uapi.IRQ_ERR, ask, 0, 1)
        until(lambda: host.device.failed, "the kernel has signalled it", LIMIT)
        with pytest.raises(ControllerError) as caught:
            for _ in range(100):
                controller.namespaces[1].read(0, 8)
        assert str(caught.value).startswith(
            f"{TAKEN}: the host reports a fatal error of the device (PCI Express AER); "
        )
        assert caught.value.errno == errno.EIO
        other.namespaces[1].write(0, b"else" * 1024)
        assert other.namespaces[1].read(0, 8) == b"else" * 1024


@backends
def test_a_program_that_waits_for_an_interrupt_is_woken(backend: str) -> None:
    with vfio.Device.open(EDU, backend=backend, ram="4M") as device:
        interrupt = device.interrupts()[0]
        assert not device.wanted_back and not device.failed
        taken = Taken(EDU, "unbind")
        with pytest.raises(HostError) as caught:
            interrupt.wait(LIMIT)
        assert str(caught.value) == f"{EDU}: {ASKED}" and device.wanted_back and taken.waits
    taken.done()


def test_the_command_line_says_it_in_one_sentence() -> None:
    words = ["nvme", "perf", "--op", "write", "--seconds", "1000", "--platform", f"vfio:{TAKEN}", "--yes"]
    command = [sys.executable, "-m", "dmakit", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as user:
        until(lambda: bool((PCI / TAKEN / "config").read_bytes()[4] & 4), "perf does I/O", LIMIT)
        time.sleep(2)
        taken = Taken(TAKEN, "remove")
        out, err = user.communicate(timeout=LIMIT)
        taken.done()
    assert user.returncode == 2, out + err
    (line,) = [line for line in err.splitlines() if line.startswith("dmakit: ")]
    assert line.startswith(f"dmakit: {TAKEN}: {ASKED}; CC=0x") and "Traceback" not in err
