"""dmakit's NVMe driver on a real kernel and IOMMU: every byte by every strategy, resets, death in mid-I/O, neighbours.

In the full matrix a combination moves 64 MiB, else 4 MiB: each byte there costs the emulated processor its time.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from typing import Any

import pytest

from dmakit import nvme, vfio
from dmakit.block.request import Op
from dmakit.errors import HostError, UnsupportedError
from dmakit.nvme.command import Command
from dmakit.nvme.exercise import Verifier
from dmakit.nvme.spec import FEATURE_QUEUES, Admin
from tests.vm.guest.support import BACKENDS, EDU, FULL, NVME, bind, kernel_nvme, read_direct, unbind

BDF = NVME[0]
SIZE = (64 if FULL else 4) << 20
backends = pytest.mark.parametrize("backend", BACKENDS)

pytestmark = [
    pytest.mark.on(iommu=("vtd-lazy", "vtd-strict", "vtd-sm", "amd", "virtio")),
    pytest.mark.usefixtures("drive_on_vfio"),
]


def opened(backend: str, **options: Any) -> nvme.Controller:
    """The controller, as a test wants it."""
    return nvme.Controller.open(BDF, backend=backend, ram="128M", **options)


@backends
@pytest.mark.parametrize("strategy", ["premap", "two-step", "page", "sg"])
@pytest.mark.parametrize("sgl", [True, False], ids=["sgl", "prp"])
def test_every_byte_with_every_strategy(backend: str, strategy: str, sgl: bool) -> None:
    with opened(backend, strategy=strategy, use_sgl=sgl, queues=2) as controller:
        assert controller.driver.transport.vectors >= 2
        report = Verifier(controller, 1, total=SIZE, first=32, depth=16, seed=7).run()
    assert report.good and report.bytes_compared == SIZE, report
    assert (report.sgl_commands > 0) == sgl and report.prp_commands > 0 and report.resets == 0


@backends
def test_every_call(backend: str) -> None:
    with opened(backend, queues=2) as controller:
        assert controller.facts.model.startswith("QEMU NVMe") and controller.facts.serial == "DMAKIT0"
        disk = controller.namespaces[1]
        payload = random.Random(1).randbytes(1 << 20)
        disk.write(3, payload)
        assert disk.read(3, 2048) == payload
        assert disk.compare(3, payload[:4096]) and not disk.compare(4, payload[:4096])
        disk.write_zeroes(3, 10)
        disk.deallocate([(100, 8)])
        disk.flush()
        assert disk.read(3, 10) == bytes(5120) and disk.read(13, 10) == payload[5120:10240]


@backends
def test_coroutines_sleep_on_interrupts(backend: str) -> None:
    async def main() -> None:
        async with opened(backend, depth=16, queues=2) as controller:
            disk = controller.namespaces[1]
            await asyncio.gather(*(disk.write(8 * at, bytes([at]) * 4096) for at in range(64)))
            found = await asyncio.gather(*(disk.read(8 * at, 8) for at in range(64)))
            assert found == [bytes([at]) * 4096 for at in range(64)]

    asyncio.run(main())


@backends
def test_the_end_of_a_command_fires_the_vector_of_its_queue(backend: str) -> None:
    """Seen at the eventfds themselves: the driver also looks without being told, so I/O ends with dead interrupts."""
    with opened(backend, queues=2) as controller, controller.buffer(4096) as buffer:
        driver, interrupts = controller.driver, controller.driver.transport.interrupts
        assert (interrupts.kind, len(interrupts), driver.transport.vectors) == ("msix", 3, 3)
        while driver.transport.wait(50_000_000):
            pass  # what is left of the start
        for queue in (1, 2, 1):
            (request,) = driver.requests(Op.READ, 0, buffer.pieces(), nsid=1)
            request.tag = queue - 1
            driver.submit(request, nsid=1)
            assert interrupts[queue].wait(10) == 1, f"vector {queue} is silent"
            assert [entry.take() for entry in interrupts] == [0, 0, 0], "a vector too many"
            assert [(done.status, done.error) for done in driver.poll()] == [(0, None)]
        admin = driver.started()
        command = Command(Admin.GET_FEATURES, cdw10=FEATURE_QUEUES)
        admin.pair.push(command, command)
        admin.pair.ring()
        assert interrupts[0].wait(10) == 1 and [entry.take() for entry in interrupts] == [0, 0, 0]
        assert admin.attend() == []


@backends
def test_polling_needs_no_interrupts(backend: str) -> None:
    with opened(backend, interrupts=False) as controller:
        assert controller.driver.transport.vectors == 0
        controller.namespaces[1].write(0, b"p" * 8192)
        assert controller.namespaces[1].read(0, 16) == b"p" * 8192


@backends
def test_a_reset_in_flight_loses_nothing(backend: str) -> None:
    async def main() -> None:
        async with opened(backend, depth=32) as controller:
            disk = controller.namespaces[1]
            data = [random.Random(at).randbytes(65536) for at in range(40)]
            tasks = [asyncio.create_task(disk.write(128 * at, content)) for at, content in enumerate(data)]
            await asyncio.sleep(0)
            assert controller.sync.driver.in_flight > 0
            controller.sync.reset()
            await asyncio.gather(*tasks)
            for at, content in enumerate(data):
                assert await disk.read(128 * at, 128) == content

    asyncio.run(main())


@backends
def test_what_cannot_be_reset_alone_says_so(backend: str) -> None:
    """QEMU's edu: no FLR, no power management, and others are on its bus."""
    vfio.bind(EDU)
    try:
        with vfio.Device.open(EDU, backend=backend, ram="4M", mask=(1 << 28) - 1) as device:
            assert not device.facts.flags & 1
            with pytest.raises(UnsupportedError) as caught:
                device.reset()
        why = "no FLR, no power management, not alone on its bus"
        assert str(caught.value) == f"{EDU} cannot be reset alone ({why})"
    finally:
        vfio.unbind(EDU)


@backends
def test_after_kill_9_in_mid_io_the_next_start_works(backend: str) -> None:
    code = (
        "import asyncio, sys\n"
        "from dmakit import nvme\n"
        "async def main():\n"
        f"    async with nvme.Controller.open({BDF!r}, backend={backend!r}, ram='128M') as controller:\n"
        "        disk = controller.namespaces[1]\n"
        "        print('up', flush=True)\n"
        "        while True:\n"
        "            await asyncio.gather(*(disk.write(256 * at, b'k' * 131072) for at in range(32)))\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as victim:
        assert victim.stdout is not None and victim.stdout.readline() == b"up\n"
        with pytest.raises(HostError):
            opened(backend).close()  # it is taken
        os.kill(victim.pid, signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
    with opened(backend) as controller:
        controller.namespaces[1].write(0, b"a" * 4096)
        assert controller.namespaces[1].read(0, 8) == b"a" * 4096


@backends
def test_the_kernels_driver_reads_what_we_wrote(backend: str) -> None:
    payload = random.Random(3).randbytes(1 << 20)
    with opened(backend, strategy="two-step") as controller:
        controller.namespaces[1].write(2048, payload)
        controller.namespaces[1].flush()
    unbind(BDF)
    with kernel_nvme() as nodes:
        assert read_direct(nodes[BDF], 2048 * 512, 1 << 20) == payload
    bind(BDF, "vfio-pci")


@backends
def test_data_moves_inside_the_controller(backend: str) -> None:
    """The second drive has a memory buffer: block to block without host memory."""
    unbind(BDF)
    bind(NVME[1], "vfio-pci")
    try:
        with nvme.Controller.open(NVME[1], backend=backend, ram="64M") as controller:
            disk = controller.namespaces[1]
            payload = random.Random(9).randbytes(1 << 20)
            disk.write(0, payload)
            with controller.memory_buffer() as buffer:
                assert buffer.size == 64 << 20
                disk.read_into(0, buffer, size=1 << 20)
                assert bytes(buffer.view[: 1 << 20]) == payload
                disk.write(8192, buffer, size=1 << 20)
            assert disk.read(8192, 2048) == payload
    finally:
        unbind(NVME[1])
