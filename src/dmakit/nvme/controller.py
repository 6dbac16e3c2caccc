"""The public face of the NVMe driver: ``Controller.open`` a controller, take a namespace, read and write.

    with Controller.open("soft") as controller:  # or "0000:01:00.0": VFIO               # or "0000:01:00.0": VFIO
        disk = controller.namespaces[1]
        disk.write(0, b"hello".ljust(512))
        data = disk.read(0, 1)

    async with Controller.open("0000:01:00.0", queues=2) as controller:
        disk = controller.namespaces[1]
        await asyncio.gather(*(disk.read(lba, 8) for lba in range(0, 4096, 8)))

``with`` gives namespaces whose calls wait; ``async with`` gives the same calls as coroutines (``nvme.aio``), as many at
once as the queues hold. Data are bytes or anything with a flat buffer (copied through memory that the device reaches),
or parts of a ``DmaBuffer`` (``controller.buffer``), which are used in place.

Leaving the block, by whatever exception, drains or aborts what is in flight, deletes the queues, shuts the controller
down and lets go of the device. One thread at a time.
"""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dmakit.block.request import Request
from dmakit.errors import DmakitError, MisuseError, UnsupportedError
from dmakit.nvme.batch import BatchQueue
from dmakit.nvme.buffers import DmaBuffer
from dmakit.nvme.cmb import BarMemory, enable, locate, reach
from dmakit.nvme.driver import NvmeDriver
from dmakit.nvme.handle import Namespace
from dmakit.nvme.identify import ControllerFacts
from dmakit.nvme.operation import Operation
from dmakit.nvme.premap import PremapMapper
from dmakit.nvme.registers import describe, snapshot
from dmakit.nvme.software import Host, SoftHost

if TYPE_CHECKING:
    from dmakit.nvme.aio import AsyncController

DEPTH = 128


class Controller:
    """A controller that is up; made by ``open`` or ``on``. ``namespaces``: handles by identifier."""

    def __init__(self, host: Host, **options: Any) -> None:
        self.host = host
        self.name = host.name
        self.driver = NvmeDriver(host.transport, nsid=0, **options)
        self.buffers: set[DmaBuffer] = set()
        self._turned = 0
        self._open = True
        try:
            self.driver.start()
        except BaseException:
            self.driver.transport.close()
            host.close()
            raise
        self.namespaces = {nsid: Namespace(self, nsid) for nsid in self.driver.namespaces}

    @classmethod
    def open(
        cls,
        where: str = "soft",
        *,
        queues: int = 1,
        depth: int = DEPTH,
        strategy: str | None = None,
        use_sgl: bool = True,
        timeout: float = 30.0,
        record: bool = False,
        **host: Any,
    ) -> Controller:
        """Open ``"soft"`` (a software machine with a controller model) or a PCI address and bring it up.

        A PCI address is this host's (VFIO), or, with ``machine=soft.Machine(…)``, that of an ``NvmeFunction`` there.

        ``queues`` I/O queue pairs of ``depth`` commands; ``strategy``: how memory is mapped (``nvme.strategies``; None:
        ``auto`` on VFIO, where a mapping is a system call; ``premap`` on the software machine, whose runs must not
        depend on how fast our own code is); ``use_sgl``: SGLs where the controller has them; ``timeout``: seconds for a
        command; ``record``: keep each request's path; further options are the host's (``software.SoftHost``,
        ``vfio.VfioHost``).
        """
        if depth < 1:
            raise MisuseError(f"depth={depth}: at least one command")
        made: Host
        if where == "soft":
            made = SoftHost(**host)
        else:
            from dmakit.nvme.vfio import VfioHost

            made = VfioHost(where, vectors=queues + 1, **host)
        return cls(
            made,
            queues=queues,
            entries=depth + 1,
            strategy=strategy or ("premap" if where == "soft" else "auto"),
            use_sgl=use_sgl,
            timeout_ns=int(timeout * 1e9),
            record=record,
        )

    # What it is ---------------------------------------------------------------------------------------------

    @property
    def facts(self) -> ControllerFacts:
        """From Identify Controller."""
        return self.driver.facts

    @property
    def state(self) -> str:
        """The registers in words."""
        return describe(snapshot(self.driver.transport))

    @property
    def queues(self) -> int:
        """I/O queue pairs that the controller granted."""
        return len(self.driver.pairs)

    # Memory -------------------------------------------------------------------------------------------------

    def buffer(self, size: int) -> DmaBuffer:
        """Memory that I/O uses in place; ``premap`` registers it now, ``auto`` when that is worth it."""
        self._check()
        memory, view = self.host.memory(size)
        offer = None
        mapper = self.driver.mapper
        if isinstance(mapper, PremapMapper):
            try:
                offer = mapper.offer(memory.slices(0, size))
            except DmakitError:
                memory.release()
                raise
        buffer = DmaBuffer(memory, view, offer, self._forget)
        self.buffers.add(buffer)
        return buffer

    def memory_buffer(self) -> DmaBuffer:
        """The controller's own memory (CMB) as a buffer: I/O on it stays inside. Strategies ``premap`` and ``auto``.

        UnsupportedError when there is none. Free it before another is made; a reset switches it off: free it then.
        """
        mapper, transport = self._premap("memory buffer"), self.driver.transport
        memory, registration = enable(transport, locate(transport, self.driver.started().capabilities))
        offer = mapper.add(registration)
        ((start, size),) = memory.ranges
        view = memoryview(self.driver.device.memory.data)[start : start + size]
        buffer = DmaBuffer(memory, view, offer, self._forget)
        self.buffers.add(buffer)
        return buffer

    def peer_buffer(self, buffer: DmaBuffer) -> DmaBuffer:
        """Another controller's memory buffer as a buffer of this one: I/O on it goes from device to device.

        Strategies ``premap`` and ``auto``; both controllers are on one machine. UnsupportedError where the host cannot
        let a device reach another's memory. Free it before ``buffer``.
        """
        mapper = self._premap("peer buffer")
        ((start, size),) = buffer.pieces()
        offer = mapper.add(reach(self.driver.device, start, size))
        made = DmaBuffer(BarMemory(start, size), memoryview(buffer.view), offer, self._forget)
        self.buffers.add(made)
        return made

    def _premap(self, what: str) -> PremapMapper:
        self._check()
        if not isinstance(self.driver.mapper, PremapMapper):
            raise UnsupportedError(f"{what}: is registered memory, and the strategy is {self.driver.strategy}")
        return self.driver.mapper

    def _forget(self, buffer: DmaBuffer) -> None:
        self.buffers.discard(buffer)
        mapper = self.driver.mapper
        if buffer.offer is not None and isinstance(mapper, PremapMapper):
            mapper.withdraw(buffer.offer)
        with suppress(BufferError):  # somebody still holds a part of it: that stays his business
            buffer.view.release()
        buffer.memory.release()

    # Running operations -------------------------------------------------------------------------------------

    def submit(self, operation: Operation) -> bool:
        """Submit what there is room for; True when all of it is out (or it has failed)."""
        driver = self.driver
        try:
            self._check()
            while operation.next < len(operation.requests):
                request = operation.requests[operation.next]
                driver.started()
                if not driver.room(request):
                    return False
                operation.next += 1
                try:
                    driver.submit(request, nsid=operation.nsid, opcode=operation.opcode)
                except BaseException:
                    operation.next -= 1
                    raise
        except DmakitError as error:
            operation.abandon(error)
        return True

    def turn(self, wait_ns: int | None = None) -> int:
        """Let the controller work, settle what has ended; how many requests did."""
        ended = self.driver.progress() if wait_ns is None else self.driver.progress(wait_ns)
        for done in ended:
            operation = done.request.context
            if isinstance(operation, Operation):
                operation.settle(done)
        return len(ended)

    def run(self, operation: Operation) -> None:
        """Submit an operation and wait for its end; raises its error."""
        try:
            while not self.submit(operation):
                self.turn()
            while not operation.finished:
                self.turn()
        except BaseException:
            operation.abandon()
            raise
        operation.check()

    def spread(self, requests: list[Request]) -> list[Request]:
        """Give the requests of one operation to a queue: one queue after the other."""
        self._turned = (self._turned + 1) % max(len(self.driver.shared), 1)
        for request in requests:
            request.tag = self._turned
        return requests

    def batch(self, nsid: int) -> BatchQueue:
        """A queue pair for arrays of commands on registered memory; takes one of ``queues`` away from requests."""
        self._check()
        return BatchQueue(self.driver, nsid)

    # Life ---------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if not self._open:
            raise MisuseError("controller: closed")

    def check(self) -> None:
        """Look after the controller, for a program that does no I/O for a while; raises what has ended it.

        On VFIO that is also the host that wants the device back: it waits until the ``with`` block is left.
        """
        self._check()
        self.turn(0)
        self.driver.started()

    def reset(self) -> None:
        """Reset the controller; what is in flight is issued again."""
        self._check()
        self.driver.reset(reissue=True)

    def close(self, *, quiet: bool = False) -> None:
        """Drain or abort, delete the queues, shut down, let go; a second call does nothing."""
        if not self._open:
            return
        self._open = False
        try:
            self._drain()
            self.driver.stop(quiet=quiet)
        finally:
            self.driver.stop(quiet=True)
            for buffer in list(self.buffers):
                buffer.busy = 0  # the controller is stopped: nothing is in flight any more
                buffer.free()
            self.driver.transport.close()
            self.host.close()

    def _drain(self) -> None:
        """Settle what ends within a moment."""
        driver = self.driver
        end = driver.transport.now() + 1_000_000_000
        while driver.dead is None and driver.admin is not None and driver.in_flight and driver.transport.now() < end:
            self.turn()

    def __enter__(self) -> Controller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(quiet=kind is not None)

    async def __aenter__(self) -> AsyncController:
        from dmakit.nvme.aio import AsyncController

        return AsyncController(self)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(quiet=kind is not None)
