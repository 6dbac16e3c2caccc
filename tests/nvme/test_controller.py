"""The public driver on every platform: calls, buffers, asyncio, arrays, and that nothing is left when it goes."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
from tests.nvme.platforms import PLATFORMS, World, world

from dmakit.errors import MisuseError, UnsupportedError
from dmakit.nvme.batch import pointers
from dmakit.nvme.controller import Controller
from dmakit.nvme.exercise import Verifier, perf
from dmakit.nvme.model import ControllerModel
from dmakit.nvme.operation import IoError
from dmakit.nvme.spec import (
    CC_EN,
    CC_SHN_MASK,
    CC_SHN_NORMAL,
    CSTS_SHST_COMPLETE,
    CSTS_SHST_MASK,
    LOG_SMART,
    Admin,
    Reg,
    Status,
)
from dmakit.nvme.strategies import STRATEGIES


def everywhere(test: Any) -> Any:
    """A test of all platforms."""
    return pytest.mark.portable(pytest.mark.parametrize("platform", PLATFORMS)(test))


@everywhere
def test_every_call_reaches_the_medium_and_comes_back(platform: str) -> None:
    with world(platform) as w, w.open(queues=2) as controller:
        disk = controller.namespaces[1]
        assert (disk.blocks, disk.block_size, controller.queues) == (w.blocks, 512, 2)
        payload = random.Random(1).randbytes(1 << 20)
        disk.write(3, payload)
        assert w.space.read(3, 2048) == payload and disk.read(3, 2048) == payload
        assert disk.compare(3, payload) and not disk.compare(4, payload)
        disk.write_zeroes(3, 10)
        disk.deallocate([(20, 5), (100, 1)])
        disk.flush()
        expected = bytearray(payload)
        for lba, blocks in ((3, 10), (20, 5), (100, 1)):
            expected[(lba - 3) * 512 : (lba - 3 + blocks) * 512] = bytes(512 * blocks)
        assert disk.read(3, 2048) == expected
        controller.reset()
        assert disk.read(3, 8) == bytes(4096)


@everywhere
def test_buffers_are_used_in_place(platform: str) -> None:
    with world(platform) as w, w.open() as controller, controller.buffer(3 << 20) as buffer:
        disk = controller.namespaces[1]
        buffer.view[:] = random.Random(2).randbytes(len(buffer))
        disk.write(0, buffer, offset=4096, size=2 << 20)
        assert w.space.read(0, 4096) == bytes(buffer.view[4096 : 4096 + (2 << 20)])
        disk.read_into(0, buffer, offset=0, size=512)
        assert bytes(buffer.view[:512]) == w.space.read(0, 1)
        numpy = pytest.importorskip("numpy")
        assert numpy.shares_memory(buffer.array(), numpy.frombuffer(buffer.view, "u1"))
        with pytest.raises(MisuseError, match=r"^offset and size belong to a DmaBuffer: slice other data$"):
            disk.write(0, bytes(512), offset=1)


@everywhere
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("sgl", [True, False])
def test_verify_finds_every_byte_right_with_every_strategy(platform: str, strategy: str, sgl: bool) -> None:
    with world(platform) as w, w.open(strategy=strategy, use_sgl=sgl, queues=2, depth=16) as controller:
        report = Verifier(controller, 1, total=1 << 20, first=64, depth=8, seed=5, max_io=256 << 10).run()
    assert report.good and report.bytes_compared == 1 << 20, report
    assert report.commands == report.prp_commands + report.sgl_commands
    assert (report.sgl_commands > 0) == sgl and report.prp_commands > 0


@everywhere
def test_what_one_run_wrote_every_strategy_reads_without_writing(platform: str) -> None:
    run: dict[str, int] = {"total": 512 << 10, "first": 8, "seed": 3, "max_io": 64 << 10}
    with world(platform) as w:
        for number, strategy in enumerate(STRATEGIES):
            with w.open(strategy=strategy) as controller:
                report = Verifier(controller, 1, **run).run(write=number == 0)
                assert report.good and report.bytes_compared == 512 << 10, report
                assert report.bytes_written == (0 if number else 512 << 10)
        with w.open() as controller:
            other = Verifier(controller, 1, **{**run, "seed": 4}).run(write=False)
        assert not other.good and len(other.mismatches) == other.extents


@everywhere
def test_verify_finds_a_byte_that_differs_and_a_status(platform: str) -> None:
    with world(platform) as w, w.open() as controller:
        verifier = Verifier(controller, 1, total=256 << 10, seed=1, max_io=32 << 10)
        disk, flush = controller.namespaces[1], controller.namespaces[1].flush

        def spoil() -> None:
            flush()
            block = bytearray(w.space.read(200, 1))
            block[77] ^= 1
            w.space.write(200, bytes(block))
            w.space.bad_blocks.add(400)

        disk.flush = spoil  # type: ignore[method-assign]
        report = verifier.run()
        assert not report.good and any("UNRECOVERED_READ_ERROR" in text for text in report.failed)
        (found,) = report.mismatches
        assert found.lba * 512 + found.offset == 200 * 512 + 77 and found.expected ^ found.found == 1


@everywhere
def test_statuses_are_errors_of_that_call_alone(platform: str) -> None:
    with world(platform) as w, w.open() as controller:
        disk = controller.namespaces[1]
        end = w.blocks
        with pytest.raises(
            MisuseError,
            match=rf"^blocks \[{end - 2}, {end + 2}\): must be at least one, inside namespace 1 of {end}$",
        ):
            disk.read(end - 2, 4)
        with pytest.raises(MisuseError, match=r"^100 bytes: must be whole blocks of 512 bytes$"):
            disk.write(0, bytes(100))
        w.space.bad_blocks.add(9)
        with pytest.raises(IoError, match=r"^read at block 8: sector 8, 2048 bytes: UNRECOVERED_READ_ERROR$") as caught:
            disk.read(8, 4)
        assert caught.value.status & 0x7FF == Status.UNRECOVERED_READ_ERROR and caught.value.errno == 61
        with pytest.raises(IoError, match=r"WRITE_FAULT$"):
            disk.write(9, bytes(512))
        assert disk.read(0, 1) == bytes(512)


@everywhere
def test_many_at_once_from_coroutines(platform: str) -> None:
    async def main(w: World) -> None:
        async with w.open(depth=8, queues=2) as controller:
            disk = controller.namespaces[1]
            await asyncio.gather(*(disk.write(8 * at, bytes([at]) * 4096) for at in range(100)))
            found = await asyncio.gather(*(disk.read(8 * at, 8) for at in range(100)))
            assert found == [bytes([at]) * 4096 for at in range(100)]
            assert await disk.compare(0, bytes(4096)) and not await disk.compare(0, b"\1" * 512)
            await disk.write_zeroes(8, 8)
            await disk.deallocate([(16, 8)])
            await disk.flush()
            with controller.buffer(8192) as buffer:
                await disk.read_into(8, buffer)
                assert bytes(buffer.view) == bytes(8192)
            w.space.bad_blocks.add(40)
            answers = await asyncio.gather(*(disk.read(at, 1) for at in (39, 40, 41)), return_exceptions=True)
            assert [type(answer) for answer in answers] == [bytes, IoError, bytes]

    with world(platform) as w:
        asyncio.run(main(w))


@everywhere
def test_a_cancelled_coroutine_leaves_its_memory_to_the_controller(platform: str) -> None:
    async def main(w: World) -> None:
        async with w.open(depth=4) as controller:
            disk = controller.namespaces[1]
            tasks = [asyncio.create_task(disk.write(8 * at, bytes([at]) * 4096)) for at in range(12)]
            await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(answer, asyncio.CancelledError) for answer in ended[::2]].count(True) > 0
            assert all(answer is None for answer in ended[1::2])
            assert await disk.read(8, 8) == b"\1" * 4096

    with world(platform) as w:
        asyncio.run(main(w))


@everywhere
def test_an_interrupt_of_the_user_leaves_nothing_behind(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with world(platform) as w, pytest.raises(KeyboardInterrupt), w.open(depth=4) as controller:
        disk, transport, turns = controller.namespaces[1], controller.driver.transport, []
        wait = transport.wait

        def interrupted(timeout_ns: int) -> bool:
            turns.append(timeout_ns)
            if len(turns) == 2:
                raise KeyboardInterrupt
            return wait(timeout_ns)

        monkeypatch.setattr(transport, "wait", interrupted)
        model = w.model(controller)
        run = model.run  # on the software machine, whose time-outs take no time, it stays stuck
        monkeypatch.setattr(model, "run", lambda limit=1: run() if len(turns) > 1 and platform != "soft" else 0)
        disk.write(0, bytes(2 << 20))


class Noting(ControllerModel):
    """A model that notes how it is left: queues deleted, shutdown notifications, and when it is disabled."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.notes: list[tuple[str, int]] = []
        for opcode in (Admin.DELETE_SQ, Admin.DELETE_CQ):
            self.admin.handlers[opcode] = partial(self._note, opcode.name, self.admin.handlers[opcode])

    def _note(self, name: str, handler: Callable[[Any], int], command: Any) -> int:
        self.notes.append((name, command.cdw10))
        return handler(command)

    def write32(self, offset: int, value: int) -> None:
        before = self.read32(Reg.CC)
        if offset == Reg.CC and value & CC_SHN_MASK != before & CC_SHN_MASK:
            self.notes.append(("shutdown", value & CC_SHN_MASK))
        if offset == Reg.CC and before & ~value & CC_EN:
            self.notes.append(("disable", self.read32(Reg.CSTS) & CSTS_SHST_MASK))
        super().write32(offset, value)


@pytest.mark.parametrize("turn", [1, 2, 3])
@everywhere
def test_an_interrupt_of_the_user_deletes_the_queues_and_shuts_down(
    platform: str, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the specification; disabling the controller instead would also free the memory."""
    with world(platform, build=Noting) as w:
        with pytest.raises(KeyboardInterrupt), w.open(depth=4, queues=2) as controller:
            model, transport = cast("Noting", w.model(controller)), controller.driver.transport
            turns, wait, run = [0], transport.wait, model.run

            def interrupted(timeout_ns: int) -> bool:
                turns[0] += 1
                if turns[0] == turn:
                    assert controller.driver.in_flight > 0 and model.notes == []
                    raise KeyboardInterrupt
                return run() > 0 or wait(timeout_ns)

            monkeypatch.setattr(transport, "wait", interrupted)
            monkeypatch.setattr(model, "run", lambda limit=1: run() if turns[0] >= turn else 0)
            controller.namespaces[1].write(0, bytes(4 << 20))
        queues = [(name, qid) for qid in (1, 2) for name in ("DELETE_SQ", "DELETE_CQ")]
        assert model.notes == [*queues, ("shutdown", CC_SHN_NORMAL), ("disable", CSTS_SHST_COMPLETE)]


@everywhere
def test_it_opens_again_after_it_was_left_in_any_state(platform: str) -> None:
    with world(platform) as w:
        for turn in range(3):
            with w.open() as controller:
                controller.namespaces[1].write(turn, bytes([turn]) * 512)
        with w.open() as controller:
            assert [controller.namespaces[1].read(turn, 1)[0] for turn in range(3)] == [0, 1, 2]
        controller.close()
        with pytest.raises(MisuseError, match=r"^controller: closed$"):
            controller.buffer(4096)


@everywhere
def test_arrays_of_commands(platform: str) -> None:
    with world(platform) as w, w.open(queues=2, depth=32) as controller, controller.buffer(64 * 4096) as buffer:
        for at in range(64):
            w.space.write(8 * at, bytes([at]) * 4096)
        queue = controller.batch(1)
        with pytest.raises(MisuseError, match=r"^reserve: 1 queue pair is left, and requests need one$"):
            controller.batch(1)
        addresses = array("Q", [buffer.address(4096 * at) for at in range(64)])
        low, high = pointers(addresses, 4096)
        lbas, counts, tags = array("Q", range(0, 512, 8)), array("Q", [8]) * 64, array("Q", range(1000, 1064))
        assert queue.submit("read", lbas, counts, low, high, tags) == 32  # what there is room for
        found, statuses = array("Q", bytes(8 * 64)), array("Q", bytes(8 * 64))
        ended = finish(queue, found, statuses, 32)
        assert queue.submit("read", lbas[32:], counts[32:], low[32:], high[32:], tags[32:]) == 32
        ended += finish(queue, found, statuses, 32)
        assert sorted(ended) == [(1000 + at, 0) for at in range(64)]
        assert all(bytes(buffer.view[4096 * at : 4096 * at + 4096]) == bytes([at]) * 4096 for at in range(64))
        past = array("Q", [w.blocks])
        assert queue.submit("write", past, counts[:1], low[:1], high[:1], tags[:1]) == 1
        ((_, status),) = finish(queue, found, statuses, 1)
        assert status & 0x7FF == Status.LBA_OUT_OF_RANGE
        with pytest.raises(MisuseError, match=r"^counts\[0\]=0: one command transfers 1 to 65536 blocks$"):
            queue.submit("read", past, array("Q", [0]), low[:1], high[:1], tags[:1])
        assert queue.in_flight == 0
        assert controller.namespaces[1].read(8, 1) == b"\1" * 512


def finish(queue: Any, found: array[int], statuses: array[int], count: int) -> list[tuple[int, int]]:
    """(tag, status) of ``count`` commands."""
    ended: list[tuple[int, int]] = []
    while len(ended) < count:
        n = queue.complete(found, statuses, wait_ns=1_000_000)
        ended += zip(found[:n], statuses[:n], strict=True)
    return ended


@everywhere
def test_a_reset_ends_the_commands_of_a_batch_and_issues_requests_again(platform: str) -> None:
    with world(platform) as w, w.open(queues=2) as controller, controller.buffer(4096) as buffer:
        queue = controller.batch(1)
        model = w.model(controller)
        model.run, run = (lambda limit=0: 0), model.run  # type: ignore[method-assign]
        low, high = pointers(array("Q", [buffer.address()] * 3), 512)
        one = array("Q", [1, 1, 1])
        assert queue.submit("read", one, one, low, high, array("Q", [7, 8, 9])) == 3
        model.run = run  # type: ignore[method-assign]
        controller.reset()
        found, statuses = array("Q", bytes(24)), array("Q", bytes(24))
        assert sorted(finish(queue, found, statuses, 3)) == [(at, Status.HOST_ABORTED) for at in (7, 8, 9)]
        assert queue.submit("read", one, one, low, high, array("Q", [1, 2, 3])) == 3
        assert sorted(finish(queue, found, statuses, 3)) == [(1, 0), (2, 0), (3, 0)]


@everywhere
def test_perf_counts_what_it_did(platform: str) -> None:
    with world(platform) as w, w.open(queues=2, depth=32) as controller:
        figures = perf(controller, 1, depth=4, seconds=0.05)
        reads = w.model(controller).io.counters.reads
    assert figures.ios == reads and figures.errors == 0 and figures.software_ns > 0
    assert figures.latency_p50 <= figures.latency_p99 <= figures.latency_max


@everywhere
def test_events_are_taken_and_their_log_pages_read(platform: str) -> None:
    with world(platform) as w, w.open() as controller:
        model, admin = w.model(controller), controller.driver.admin
        assert admin is not None
        for information in (1, 2):
            model.admin.raise_event(1, information, LOG_SMART)
        for _ in range(30):
            model.run()
            controller.turn()
        assert [(event.kind, event.information) for event in admin.events] == [(1, 1), (1, 2)]
        assert not model.admin.masked and len(model.admin.event_requests) == 1
        assert controller.namespaces[1].read(0, 1) == bytes(512)


def test_what_soft_refuses() -> None:
    with world("soft", sgl="none") as w, w.open(strategy="two-step") as controller:
        with (
            controller.buffer(512) as buffer,
            pytest.raises(
                MisuseError,
                match=r"^buffer: the strategy registers nothing \(premap and auto do\): it has no device address$",
            ),
        ):
            buffer.address()
        assert isinstance(controller, Controller)
    with (
        pytest.raises(MisuseError, match=r"^strategy='guess': must be one of two-step, page, sg, premap, auto$"),
        world("soft") as w,
    ):
        w.open(strategy="guess")


def test_premap_says_what_it_cannot() -> None:
    from dmakit.nvme.software import SoftHost
    from dmakit.platform.soft import Machine

    controller = Controller(SoftHost(machine=Machine(ram="64M", swiotlb="1M", coherent=False)), strategy="premap")
    with controller, pytest.raises(UnsupportedError, match=r"^registered memory is not synced on each use: it needs"):
        controller.buffer(4096)
