"""Slow and failing drives, blocked DMA and peers under dmakit's driver, as far as QEMU can play them.

The monitor slows a drive down until commands time out; the second drive has a bad block; a mapping that is taken away
under I/O blocks DMA, which QEMU's drive does not tell. (What QEMU cannot play, a wrong phase, a lying completion or a
drive that is gone at once, is the model's: tests/nvme.)
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dmakit import nvme
from dmakit.consts import PROT_READ, PROT_WRITE
from dmakit.nvme import recovery
from dmakit.nvme.exercise import Verifier
from dmakit.nvme.operation import IoError
from dmakit.platform.linux.machine import Machine
from tests.support.sweep import descriptors
from tests.vm.guest.qmp import Monitor
from tests.vm.guest.support import FULL, NVME
from tests.vm.guest.vfio_support import BACKENDS, bound, pinned

backends = pytest.mark.parametrize("backend", BACKENDS)
pytestmark = [] if FULL else [pytest.mark.on(kernel="iommufd", iommu="vtd-lazy")]
SLOW, BAD = NVME
MIB = 1 << 20


@pytest.fixture(autouse=True)
def everything_is_given_back() -> Iterator[None]:
    with bound(*NVME):
        before = descriptors(), pinned()
        yield
        assert (descriptors(), pinned()) == before


def opened(bdf: str, backend: str, **options: Any) -> nvme.Controller:
    """A controller, as a test wants it."""
    return nvme.Controller.open(bdf, backend=backend, ram="32M", **options)


@backends
def test_a_stuck_command_is_aborted_then_the_controller_is_reset_and_no_other_is_lost(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "ABORT_TIMEOUT_NS", 1_000_000_000)
    data = [random.Random(at).randbytes(4096) for at in range(6)]

    async def main() -> list[BaseException | None]:
        async with opened(SLOW, backend, timeout=0.5, depth=8) as controller:
            disk, told = controller.namespaces[1], controller.sync.driver.recovery
            monitor.throttle("nvme0", bytes_a_second=1)
            tasks = [asyncio.create_task(disk.write(8 * at, content)) for at, content in enumerate(data)]
            while not told.resets and not all(task.done() for task in tasks):
                await asyncio.sleep(0.05)
            monitor.throttle("nvme0", bytes_a_second=0)
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert told.aborts >= 1 and told.resets >= 1
            for at, content in enumerate(data):
                if ended[at] is None:
                    assert await disk.read(8 * at, 8) == content
            return ended

    started = time.monotonic()
    with Monitor() as monitor:
        try:
            ended = asyncio.run(main())
        finally:
            monitor.throttle("nvme0", bytes_a_second=0)
    late = [str(error) for error in ended if error is not None]
    assert len(late) == 1, ended
    assert late[0].startswith("WRITE of 8 blocks at ") and "no completion within 0.5 s, nor after Abort; CC=" in late[0]
    assert "CSTS=0x00000001 (ready)" in late[0] and time.monotonic() - started < 15


@backends
def test_a_bad_block_is_that_commands_error_alone(backend: str) -> None:
    with opened(BAD, backend) as controller:
        disk = controller.namespaces[1]
        bad = disk.blocks - 1000
        payload = random.Random(1).randbytes(4096)
        disk.write(bad - 8, payload)
        for call, status in (
            (lambda: disk.read(bad - 2, 4), "UNRECOVERED_READ_ERROR"),
            (lambda: disk.write(bad, bytes(512)), "WRITE_FAULT"),
        ):
            with pytest.raises(IoError, match=rf"{status}$"):
                call()
        assert disk.read(bad - 8, 8) == payload
        assert controller.driver.recovery.resets == 0


@backends
def test_a_blocked_dma_is_found_by_the_data(backend: str) -> None:
    """The drive reports success; ``verify`` compares bytes."""
    with opened(SLOW, backend, strategy="premap") as controller:
        verifier = Verifier(controller, 1, total=MIB, depth=8, seed=3, max_io=64 << 10)
        domain: Any = controller.driver.device.domain
        buffer, flush, free = verifier.arena[0], controller.namespaces[1].flush, verifier.arena[0].free
        ((start, size),) = buffer.pieces()
        taken: list[tuple[int, int, int]] = []

        def cut() -> None:
            flush()  # everything is written: now the reads
            taken.extend(entry for entry in domain.held() if start <= entry[1] < start + size)
            assert all(domain.unmap(iova, length) == length for iova, _, length in taken)

        def put_back() -> None:
            for iova, phys, length in taken:
                domain.map(iova, phys, length, PROT_READ | PROT_WRITE)
            free()

        verifier.space.flush, buffer.free = cut, put_back  # type: ignore[method-assign]
        report = verifier.run()
    assert taken and not report.good and report.failed == [] and report.mismatches, report


@backends
def test_one_drive_reads_into_the_memory_of_the_other(backend: str) -> None:
    """Peer to peer: type1 maps the BAR's address, iommufd its dma-buf."""
    payload = random.Random(4).randbytes(MIB)
    with Machine(backend=backend, ram="64M") as machine:
        with (
            nvme.Controller.open(SLOW, machine=machine) as peer,
            nvme.Controller.open(BAD, machine=machine) as owner,
            owner.memory_buffer() as buffer,
        ):
            disk, own = peer.namespaces[1], owner.namespaces[1]
            disk.write(0, payload)
            before = machine.pins.pinned
            with peer.peer_buffer(buffer) as seen:
                assert machine.pins.pinned == before
                disk.read_into(0, seen, size=MIB)
                assert bytes(buffer.view[:MIB]) == payload
                own.write(4096, buffer, size=MIB)
                assert own.read(4096, MIB // 512) == payload
                buffer.view[:MIB] = payload[::-1]
                disk.write(8192, seen, size=MIB)
            assert disk.read(8192, MIB // 512) == payload[::-1]
        assert machine.live()["mappings"] == machine.live()["iova_ranges"] == 0
