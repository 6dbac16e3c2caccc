"""The asyncio face of a controller: the same calls as coroutines, many in flight at once.

One task, the *pump*, settles completions while operations are out: it sleeps on the controller's interrupts where there
are any (``transport.descriptors``), else it polls and lets other tasks run in between. A coroutine that is cancelled
leaves its operation to the pump; the memory is let go when the controller is through with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from dmakit.block.request import Op
from dmakit.errors import DmakitError
from dmakit.nvme.buffers import DmaBuffer
from dmakit.nvme.handle import Data, NamespaceBase
from dmakit.nvme.operation import Operation

if TYPE_CHECKING:
    from dmakit.nvme.controller import Controller

_SLEEP = 0.05  # seconds between looks at the deadlines while interrupts are waited for
_BUSY_TURNS = 64  # empty turns before the pump of a controller without interrupts sleeps in between


class AsyncController:
    """``Controller`` for coroutines; ``sync`` is the controller itself (buffers, facts, state)."""

    def __init__(self, controller: Controller) -> None:
        self.sync = controller
        self.namespaces = {nsid: AsyncNamespace(self, nsid) for nsid in controller.namespaces}
        self.waiting: list[Operation] = []
        self.out = 0
        self.pump: asyncio.Task[None] | None = None

    def buffer(self, size: int) -> DmaBuffer:
        """See ``Controller.buffer``."""
        return self.sync.buffer(size)

    async def run(self, operation: Operation) -> None:
        """Submit an operation when its turn comes and wait for its end; raises its error."""
        ended = asyncio.get_running_loop().create_future()

        def wake() -> None:
            self.out -= 1
            if not ended.done():
                ended.set_result(None)

        operation.wake = wake
        self.out += 1
        self.waiting.append(operation)
        self._feed()
        if self.out and (self.pump is None or self.pump.done()):
            self.pump = asyncio.get_running_loop().create_task(self._run_pump())
        try:
            await ended
        except asyncio.CancelledError:
            if operation in self.waiting:
                self.waiting.remove(operation)
                operation.abandon()
            raise
        operation.check()

    def _feed(self) -> None:
        """Submit in order, as far as there is room."""
        while self.waiting and self.sync.submit(self.waiting[0]):
            self.waiting.pop(0)

    async def _run_pump(self) -> None:
        loop = asyncio.get_running_loop()
        descriptors = self.sync.driver.transport.descriptors()
        signal = asyncio.Event()
        for fd in descriptors:
            loop.add_reader(fd, signal.set)
        idle = 0
        try:
            while self.out:
                idle = 0 if self._turn() else idle + 1
                if not descriptors or not idle:
                    await asyncio.sleep(0 if idle < _BUSY_TURNS else 0.0002)
                    continue
                with suppress(TimeoutError):
                    await asyncio.wait_for(signal.wait(), _SLEEP)
                signal.clear()
        finally:
            for fd in descriptors:
                loop.remove_reader(fd)

    def _turn(self) -> int:
        try:
            ended = self.sync.turn(0 if self.sync.driver.transport.descriptors() else None)
        except DmakitError as error:
            while self.waiting:
                self.waiting.pop(0).abandon(error)
            raise
        self._feed()
        return ended


class AsyncNamespace(NamespaceBase):
    """``handle.Namespace`` as coroutines."""

    def __init__(self, owner: AsyncController, nsid: int) -> None:
        super().__init__(owner.sync, nsid)
        self.owner = owner

    async def read(self, lba: int, blocks: int) -> bytes:
        """The data of ``blocks`` blocks."""
        found: list[bytes] = []
        await self.owner.run(self._read(lba, blocks, found))
        return found[0]

    async def read_into(self, lba: int, buffer: DmaBuffer, *, offset: int = 0, size: int | None = None) -> None:
        """Read ``size`` bytes (to the buffer's end) into a ``DmaBuffer``, in place."""
        length = len(buffer) - offset if size is None else size
        await self.owner.run(self._transfer("read", Op.READ, lba, buffer, offset, length))

    async def write(self, lba: int, data: Data, *, offset: int = 0, size: int | None = None) -> None:
        """Write whole blocks: any flat buffer, or part of a ``DmaBuffer`` in place."""
        await self.owner.run(self._write("write", lba, data, offset, size, None))

    async def compare(self, lba: int, data: Data, *, offset: int = 0, size: int | None = None) -> bool:
        """Whether the blocks hold this data (the controller compares)."""
        operation = self._compare(lba, data, offset, size)
        try:
            await self.owner.run(operation)
        except DmakitError:
            if not operation.differs:
                raise
        return not operation.differs

    async def flush(self) -> None:
        """Make written data durable."""
        await self.owner.run(self._flush())

    async def write_zeroes(self, lba: int, blocks: int) -> None:
        """Make blocks read as zero; the controller may deallocate them."""
        await self.owner.run(self._zeroes(lba, blocks))

    async def deallocate(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Tell the controller that (first block, blocks) ranges are not needed any more (DSM)."""
        await self.owner.run(self._deallocate(ranges))
