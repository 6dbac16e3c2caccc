"""The NVMe driver: brings a controller up, turns requests into commands, and undoes their mappings when they end.

One request's way: ``submit`` maps it (``nvme.mapping``: path, PRP or SGL), writes the command and rings the doorbell;
``poll`` takes completions, unmaps, and hands ``Done`` records back. The queue is the submitting CPU's; the CPU that
polls may be another one. ``costs`` counts submission and completion apart; ``paths`` says which way each request took
and why.

Nothing leaks when something fails: a request that cannot be mapped or queued leaves nothing behind, and ``reset`` (a
dead controller, a timeout) cancels and unmaps everything in flight. Works on any ``nvme.transport``.

Models ``drivers/nvme/host/pci.c`` and ``core.c`` (nvme_setup_cmd, nvme_error_status).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from dmakit.block.bio import Bio, split
from dmakit.block.dma_iter import GAP_RULE
from dmakit.block.limits import SECTOR_SHIFT, QueueLimits, nvme_limits
from dmakit.block.request import Op, Request
from dmakit.block.status import BlkStatus
from dmakit.errors import DmakitError, HostError, MisuseError, UnsupportedError
from dmakit.nvme.admin_driver import AdminDriver
from dmakit.nvme.command import Command
from dmakit.nvme.identify import NamespaceFacts
from dmakit.nvme.iod import FAST_PATHS, PATHS, Iod
from dmakit.nvme.mapping import SGL_THRESHOLD, RequestMapper
from dmakit.nvme.phases import PhaseCosts
from dmakit.nvme.pool import LARGE_BYTES, SMALL_BYTES, Block, DescriptorPool
from dmakit.nvme.rings import QueuePair
from dmakit.nvme.spec import (
    DSM_DEALLOCATE,
    DSM_MAX_RANGES,
    SGLS_BYTE,
    SGLS_DWORD,
    SGLS_METADATA_SGL,
    WRITE_ZEROES_DEALLOCATE,
    Io,
    Status,
    status_name,
)
from dmakit.nvme.transport import Transport
from dmakit.reasons import PathLog, Reason

_OPCODES = {Op.READ: Io.READ, Op.WRITE: Io.WRITE, Op.FLUSH: Io.FLUSH, Op.WRITE_ZEROES: Io.WRITE_ZEROES,
            Op.DISCARD: Io.DSM, Op.DRV_IN: Io.READ, Op.DRV_OUT: Io.WRITE}  # fmt: skip
_STATUS: dict[int, BlkStatus] = {
    Status.SUCCESS: BlkStatus.OK,
    Status.LBA_OUT_OF_RANGE: BlkStatus.TARGET,
    Status.INVALID_OPCODE: BlkStatus.NOTSUPP,
    Status.INVALID_FIELD: BlkStatus.NOTSUPP,
    Status.INVALID_NAMESPACE: BlkStatus.NOTSUPP,
    Status.WRITE_FAULT: BlkStatus.MEDIUM,
    Status.UNRECOVERED_READ_ERROR: BlkStatus.MEDIUM,
}


def blk_status_of(status: int) -> BlkStatus:
    """The block layer's status for an NVMe status field (``nvme_error_status``)."""
    return _STATUS.get(status & 0x7FF, BlkStatus.IOERR)


@dataclass(slots=True)
class Done:
    """A finished request: the controller's status field, and what the block layer makes of it."""

    request: Request
    iod: Iod
    status: int
    blk_status: BlkStatus

    @property
    def text(self) -> str:
        """The status by name."""
        return status_name(self.status)


@dataclass(slots=True)
class _Flight:
    """A request in flight: its number, mapping, and the block that holds DSM ranges."""

    number: int
    iod: Iod
    ranges: Block | None


class NvmeDriver:
    """Drives one namespace of a controller; ``start`` before use, ``stop`` after (or use it as a context manager)."""

    def __init__(
        self,
        transport: Transport,
        *,
        queues: int = 1,
        entries: int = 128,
        nsid: int = 1,
        sgl_threshold: int = SGL_THRESHOLD,
        use_sgl: bool = True,
        rule: str = GAP_RULE,
        peer: Any = None,
    ) -> None:
        if queues < 1 or entries < 2:
            raise MisuseError(f"queues={queues}, entries={entries}: at least one queue of at least two entries")
        self.transport = transport
        self.device = transport.device
        self.wanted = (queues, entries, nsid)
        self.options = {"sgl_threshold": sgl_threshold, "rule": rule, "peer": peer}
        self.use_sgl = use_sgl
        self.paths = PathLog(PATHS, FAST_PATHS)
        self.costs: PhaseCosts = PhaseCosts(self.device.ledger)
        self.submitted = 0
        self.cancelled: list[Done] = []
        self.pairs: list[QueuePair] = []
        self.admin: AdminDriver | None = None
        self.mapper: RequestMapper
        self.limits: QueueLimits
        self.namespace: NamespaceFacts

    # Life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring the controller up and create the I/O queues; on failure everything is undone."""
        if self.admin is not None:
            raise MisuseError("driver: already started")
        self.device.set_min_align_mask(4095)
        self.admin = AdminDriver(self.transport)
        ledger, fail = self.device.ledger, self.device.fail
        source = self.transport.pages()
        self.small = DescriptorPool(source, SMALL_BYTES, ledger=ledger, fail=fail)
        self.large = DescriptorPool(source, LARGE_BYTES, ledger=ledger, fail=fail)
        try:
            self._bring_up(self.admin)
        except DmakitError:
            self.stop(quiet=True)
            raise

    def _bring_up(self, admin: AdminDriver) -> None:
        queues, entries, nsid = self.wanted
        admin.enable()
        facts, spaces = admin.facts()
        found = [space for space in spaces if space.nsid == nsid]
        if not found:
            raise UnsupportedError(f"namespace {nsid} is not active; active: {[space.nsid for space in spaces]}", 19)
        self.namespace = found[0]
        sgl = self.use_sgl and bool(facts.sgls & (SGLS_BYTE | SGLS_DWORD))
        self.mapper = RequestMapper(
            self.device,
            self.small,
            self.large,
            ledger=self.device.ledger,
            sgl_supported=sgl,
            meta_sgl_supported=sgl and bool(facts.sgls & SGLS_METADATA_SGL),
            **self.options,
        )
        self.limits = nvme_limits(
            block_size=self.namespace.block_size,
            max_transfer=facts.max_transfer,
            sgl_supported=sgl,
            opt_mapping_size=self.device.opt_mapping_size(),
            metadata_size=self.namespace.metadata_size,
        )
        for qid in range(1, admin.set_queue_count(queues) + 1):
            pair = QueuePair(self.transport, qid, min(entries, admin.max_entries), admin.stride)
            try:
                admin.create_pair(pair)
            except DmakitError:
                pair.free()
                raise
            self.pairs.append(pair)

    def stop(self, *, quiet: bool = False) -> None:
        """Shut the controller down, cancel what is in flight, give all memory back; ``quiet``: ignore a dead one."""
        admin = self.admin
        if admin is None:
            return
        self.admin = None
        try:
            if not quiet:
                admin.shutdown()
            admin.disable()
        except HostError:
            if not quiet:
                raise
        finally:
            self._cancel()
            for pair in self.pairs:
                pair.free()
            self.pairs.clear()
            admin.free(self.small.destroy, self.large.destroy)

    def reset(self) -> list[Done]:
        """Disable, cancel everything in flight (returned with IOERR), and bring the controller up again.

        When that fails the driver is stopped; what was cancelled is in ``cancelled`` either way.
        """
        admin = self._started()
        admin.disable()
        self.cancelled = self._cancel()
        for pair in self.pairs:
            pair.free()
        self.pairs.clear()
        try:
            self._bring_up(admin)
        except DmakitError:
            self.stop(quiet=True)
            raise
        return self.cancelled

    def _cancel(self) -> list[Done]:
        """Unmap everything in flight: the controller was reset and will complete none of it."""
        flights = [flight for pair in self.pairs for flight in pair.cancel()]
        return [self._finish(flight, int(Status.ABORT_REQUESTED), None) for flight in flights]  # type: ignore[arg-type]

    def _started(self) -> AdminDriver:
        if self.admin is None:
            raise MisuseError("driver: not started")
        return self.admin

    # Requests -----------------------------------------------------------------------------------------------

    def requests(self, op: int, lba: int, memory: Iterable[tuple[int, int]], *, cpu: int = 0) -> list[Request]:
        """Split I/O on ``memory`` (phys, length pieces) from block ``lba`` into requests of this queue."""
        bio = Bio(op, lba * (self.namespace.block_size >> SECTOR_SHIFT))
        for phys, length in memory:
            bio.add(phys, length)
        return split(bio, self.limits, cpu=cpu)

    def submit(self, request: Request) -> Iod:
        """Map and queue a request. Raises, with nothing left behind, when it cannot be mapped or queued."""
        self._started()
        pair = self.pairs[request.cpu % len(self.pairs)]
        with self.costs.phase("submission"):
            iod = self.mapper.map(request)
            self.paths.take(self.submitted, iod.path_name, Reason(iod.reason))
            number, self.submitted = self.submitted, self.submitted + 1
            if iod.status:
                raise self._failure(iod)
            flight = _Flight(number, iod, None)
            try:
                pair.push(self._command(flight), flight)
            except DmakitError:
                self._undo(flight, request.cpu)
                raise
            pair.ring()
        return iod

    def _failure(self, iod: Iod) -> Exception:
        """The exception for a request that could not be mapped."""
        if isinstance(iod.error, Exception):
            return iod.error
        name = BlkStatus(iod.status).name
        if iod.reason == Reason.P2P_NOT_SUPPORTED:
            return UnsupportedError(f"request: peer memory that this device cannot reach (BLK_STS_{name})", 121)
        return MisuseError(f"request: its segments cannot be described by PRPs (BLK_STS_{name})", 5)

    def _command(self, flight: _Flight) -> Command:
        """The submission entry (``nvme_setup_cmd``)."""
        iod = flight.iod
        request: Request = iod.request
        shift = self.namespace.block_size.bit_length() - 1 - SECTOR_SHIFT
        command = Command(_OPCODES[Op(request.op)], self.namespace.nsid, iod.low, iod.high, mptr=iod.mptr)
        command.flags = iod.psdt << 6
        if request.op in (Op.READ, Op.WRITE, Op.DRV_IN, Op.DRV_OUT):
            self._place(command, request.sector >> shift, request.payload_bytes // self.namespace.block_size)
        elif request.op == Op.WRITE_ZEROES:
            ((sector, count),) = request.ranges or ((request.sector, 1 << shift),)
            self._place(command, sector >> shift, count >> shift)
            command.cdw12 |= WRITE_ZEROES_DEALLOCATE
        elif request.op == Op.DISCARD:
            self._write_ranges(command, flight, [(sector >> shift, count >> shift) for sector, count in request.ranges])
        return command

    def _place(self, command: Command, lba: int, count: int) -> None:
        if not 1 <= count <= 0x10000:
            raise MisuseError(f"{count} blocks: one command transfers 1 to 65536")
        command.cdw10, command.cdw11, command.cdw12 = lba & 0xFFFF_FFFF, lba >> 32, count - 1

    def _write_ranges(self, command: Command, flight: _Flight, ranges: Sequence[tuple[int, int]]) -> None:
        """DSM: the range list goes to a page of shared memory."""
        if not 1 <= len(ranges) <= DSM_MAX_RANGES:
            raise MisuseError(f"{len(ranges)} ranges: one Dataset Management command takes 1 to {DSM_MAX_RANGES}")
        flight.ranges = block = self.large.alloc()
        for at, (lba, count) in enumerate(ranges):
            block.words[2 * at] = count << 32
            block.words[2 * at + 1] = lba
        command.low, command.cdw10, command.cdw11 = block.addr, len(ranges) - 1, DSM_DEALLOCATE

    def poll(self, cpu: int | None = None) -> list[Done]:
        """Take the completions that are there (of one CPU's queue, or of all), unmap, return the finished requests."""
        self._started()
        pairs = self.pairs if cpu is None else [self.pairs[cpu % len(self.pairs)]]
        finished = []
        for pair in pairs:
            for entry, flight in pair.take():
                assert isinstance(flight, _Flight)
                finished.append(self._finish(flight, entry.status, cpu))
        return finished

    def _finish(self, flight: _Flight, status: int, cpu: int | None) -> Done:
        with self.costs.phase("completion"):
            self._undo(flight, flight.iod.request.cpu if cpu is None else cpu)
        return Done(flight.iod.request, flight.iod, status, blk_status_of(status))

    def _undo(self, flight: _Flight, cpu: int) -> None:
        self.mapper.unmap(flight.iod, cpu=cpu)
        if flight.ranges is not None:
            self.large.release(flight.ranges)
            flight.ranges = None

    def execute(self, requests: Iterable[Request]) -> list[Done]:
        """Submit requests (polling when a ring is full) and wait for all of them."""
        finished: list[Done] = []
        for request in requests:
            pair = self.pairs[request.cpu % len(self.pairs)]
            while not pair.free_cids:
                finished += self._progress()
            self.submit(request)
        while any(pair.in_flight for pair in self.pairs):
            finished += self._progress()
        return finished

    def _progress(self) -> list[Done]:
        """Completions, waiting for some when there are none; HostError when the controller is dead."""
        moved = self.transport.wait()
        finished = self.poll()
        if not finished and not moved:
            raise HostError("the controller makes no progress: commands are in flight and none completes", 110)
        return finished

    def abort(self, iod: Iod) -> bool:
        """Ask the controller to abort a request in flight; its completion still comes by ``poll``."""
        admin = self._started()
        for pair in self.pairs:
            for cid, flight in pair.commands.items():
                if isinstance(flight, _Flight) and flight.iod is iod:
                    return admin.abort(pair, cid)
        raise MisuseError("abort: this request is not in flight")

    def __enter__(self) -> NvmeDriver:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(quiet=kind is not None)
