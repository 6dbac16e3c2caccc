"""The NVMe driver: brings a controller up, turns requests into commands, and undoes their mappings when they end.

One request's way: ``submit`` maps it (``nvme.mapping`` or another of ``nvme.strategies``: path, PRP or SGL), writes the
command and rings the doorbell; ``poll`` takes completions, unmaps, and hands ``Done`` records back. The queue is the
submitting CPU's; the CPU that polls may be another one. ``costs`` counts submission and completion apart; ``paths``
says which way each request took and why.

Nothing leaks when something fails: a request that cannot be mapped or queued leaves nothing behind. Time-outs, resets
with requests in flight, and controllers that lie are ``nvme.recovery``'s. Works on any ``nvme.transport``.

Models ``drivers/nvme/host/pci.c`` and ``core.c``.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext, suppress
from functools import partial
from types import TracebackType
from typing import Any

from dmakit.block.bio import Bio, split
from dmakit.block.dma_iter import GAP_RULE
from dmakit.block.limits import SECTOR_SHIFT, QueueLimits, nvme_limits
from dmakit.block.request import Request
from dmakit.block.status import BlkStatus
from dmakit.errors import DmakitError, HostError, MisuseError, UnsupportedError
from dmakit.nvme.admin_driver import ADMIN_TIMEOUT_NS, AdminDriver, CommandFailed
from dmakit.nvme.commands import Done, Flight, blk_status_of, build
from dmakit.nvme.identify import ControllerFacts, NamespaceFacts
from dmakit.nvme.iod import FAST_PATHS, PATHS, Iod
from dmakit.nvme.listed import Mapper
from dmakit.nvme.mapping import SGL_THRESHOLD, RequestMapper
from dmakit.nvme.phases import PhaseCosts
from dmakit.nvme.pool import LARGE_BYTES, SMALL_BYTES, DescriptorPool
from dmakit.nvme.recovery import DRAIN_NS, Recovery
from dmakit.nvme.rings import Owner, QueuePair
from dmakit.nvme.spec import SGLS_BYTE, SGLS_DWORD, SGLS_METADATA_SGL, Status
from dmakit.nvme.strategies import STRATEGIES
from dmakit.nvme.transport import Transport
from dmakit.reasons import PathLog, Reason

IO_TIMEOUT_NS = 30_000_000_000
WAIT_NS = 10_000_000
LEAVE_NS = 5_000_000_000
RETRIES = 3


class NvmeDriver:
    """Drives a controller; ``start`` before use, ``stop`` after (or use it as a context manager).

    ``queues``, ``entries``: I/O queue pairs and their size, asked for; ``nsid``: where requests go that name no
    namespace (0: they must name one); ``strategy``: how memory is mapped (``nvme.strategies``); ``use_sgl``,
    ``sgl_threshold``: PRP or SGL; ``timeout_ns``: of a command; ``retries``: how often a command is issued again after
    a reset; ``record``: keep ``paths`` and ``costs``, which grow with every request.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        queues: int = 1,
        entries: int = 128,
        nsid: int = 1,
        strategy: str = "two-step",
        sgl_threshold: int = SGL_THRESHOLD,
        use_sgl: bool = True,
        rule: str = GAP_RULE,
        peer: Any = None,
        timeout_ns: int = IO_TIMEOUT_NS,
        admin_timeout_ns: int = ADMIN_TIMEOUT_NS,
        retries: int = RETRIES,
        record: bool = True,
    ) -> None:
        if queues < 1 or entries < 2:
            raise MisuseError(f"queues={queues}, entries={entries}: at least one queue of at least two entries")
        if strategy not in STRATEGIES:
            raise MisuseError(f"strategy={strategy!r}: must be one of {', '.join(STRATEGIES)}")
        self.transport = transport
        self.device = transport.device
        self.wanted = (queues, entries, nsid)
        self.strategy = strategy
        self.options = {"sgl_threshold": sgl_threshold, "rule": rule, "peer": peer}
        self.use_sgl = use_sgl
        self.timeout_ns, self.admin_timeout_ns = timeout_ns, admin_timeout_ns
        self.record = record
        self.paths = PathLog(PATHS, FAST_PATHS)
        self.costs: PhaseCosts = PhaseCosts(self.device.ledger)
        self.submitted = 0
        self.cancelled: list[Done] = []
        self.ended: list[Done] = []
        self.parked: list[Flight] = []
        self.pairs: list[QueuePair] = []
        self.reserved = 0
        self.recovery = Recovery(self, retries)
        self.dead: HostError | None = None
        self.admin: AdminDriver | None = None
        self.mapper: Mapper
        self.facts: ControllerFacts
        self.namespaces: dict[int, NamespaceFacts] = {}
        self.limits: QueueLimits

    # Life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring the controller up and create the I/O queues; on failure everything is undone."""
        if self.admin is not None:
            raise MisuseError("driver: already started")
        self.dead = None
        self.device.set_min_align_mask(4095)
        self.admin = AdminDriver(self.transport, self.admin_timeout_ns)
        ledger, fail = self.device.ledger, self.device.fail
        source = self.transport.pages()
        self.small = DescriptorPool(source, SMALL_BYTES, ledger=ledger, fail=fail)
        self.large = DescriptorPool(source, LARGE_BYTES, ledger=ledger, fail=fail)
        try:
            self.bring_up(self.admin)
        except BaseException:
            self.stop(quiet=True)
            raise

    def bring_up(self, admin: AdminDriver) -> None:
        """Enable, identify, and create the queues; the first time also the mapper and the queues' memory."""
        nsid = self.wanted[2]
        admin.enable()
        self.facts, spaces = admin.facts()
        self.namespaces = {space.nsid: space for space in spaces}
        if nsid and nsid not in self.namespaces:
            raise UnsupportedError(f"namespace {nsid} is not active; active: {list(self.namespaces)}", 19)
        if not hasattr(self, "mapper"):
            self._make_mapper()
        if self.namespaces:
            self.limits = self.limits_of(nsid or min(self.namespaces))
        self._make_queues(admin)
        admin.listen()

    @property
    def _sgl(self) -> bool:
        return self.use_sgl and bool(self.facts.sgls & (SGLS_BYTE | SGLS_DWORD))

    def _make_mapper(self) -> None:
        requests = RequestMapper(
            self.device,
            self.small,
            self.large,
            ledger=self.device.ledger,
            sgl_supported=self._sgl,
            meta_sgl_supported=self._sgl and bool(self.facts.sgls & SGLS_METADATA_SGL),
            **self.options,
        )
        self.mapper = STRATEGIES[self.strategy](requests)

    def limits_of(self, nsid: int) -> QueueLimits:
        """The limits of requests to a namespace."""
        space = self.space(nsid)
        return nvme_limits(
            block_size=space.block_size,
            max_transfer=self.facts.max_transfer,
            sgl_supported=self._sgl,
            opt_mapping_size=self.device.opt_mapping_size(),
            metadata_size=space.metadata_size,
        )

    def space(self, nsid: int | None = None) -> NamespaceFacts:
        """A namespace's facts (None: the one of ``nsid=``); MisuseError when it is not active."""
        wanted = self.wanted[2] if nsid is None else nsid
        if wanted not in self.namespaces:
            raise MisuseError(f"namespace {wanted} is not active; active: {list(self.namespaces)}", 19)
        return self.namespaces[wanted]

    @property
    def namespace(self) -> NamespaceFacts:
        """The namespace of requests that name none."""
        return self.space()

    def _make_queues(self, admin: AdminDriver) -> None:
        """Create what the controller grants; queues that are there keep their memory, surplus ones go."""
        queues, entries, _ = self.wanted
        granted = admin.set_queue_count(queues)
        while len(self.pairs) > granted:
            surplus = self.pairs.pop()
            surplus.retired = True
            surplus.free()
        for qid in range(1, granted + 1):
            if qid > len(self.pairs):
                vector = min(qid, self.transport.vectors - 1) if self.transport.vectors else -1
                pair = QueuePair(self.transport, qid, min(entries, admin.max_entries), admin.stride, vector)
                self.pairs.append(pair)
            admin.create_pair(self.pairs[qid - 1])

    @property
    def shared(self) -> list[QueuePair]:
        """The pairs that requests go to: all that nobody has reserved."""
        return [pair for pair in self.pairs if pair.owner is None] if self.reserved else self.pairs

    def reserve(self, owner: Owner) -> QueuePair:
        """Take the last shared pair for ``owner`` alone, who submits and reaps on it and loses commands to resets."""
        self.started()
        if len(self.shared) < 2:
            raise MisuseError(f"reserve: {len(self.shared)} queue pair is left, and requests need one")
        pair = self.shared[-1]
        pair.owner = owner
        self.reserved += 1
        return pair

    def stop(self, *, quiet: bool = False) -> None:
        """Drain for a moment, delete the queues, shut down, cancel what is left, give all memory back.

        ``quiet``: a dead controller is not an error, nor are descriptors whose request was interrupted. Whatever
        happens, the controller is stopped before memory goes.
        """
        admin = self.admin
        if admin is None:
            return
        try:
            if admin.running and self.dead is None:
                if not quiet:
                    self.drain(DRAIN_NS)
                self.leave(admin)
        except HostError:
            if not quiet:
                raise
        finally:
            self.admin = None
            admin.halt()
            self._cancel()
            for pair in self.pairs:
                pair.free()
            self.pairs.clear()
            admin.free(*(partial(pool.destroy, quiet) for pool in (self.small, self.large)))

    def leave(self, admin: AdminDriver) -> None:
        """Delete the queues and tell the controller that we go."""
        for pair in self.pairs:
            with suppress(CommandFailed):  # the reset that follows deletes it as well
                admin.delete_pair(pair, LEAVE_NS)
        admin.shutdown()

    def reset(self, *, reissue: bool = False) -> list[Done]:
        """Disable and bring up again. What was in flight is returned as cancelled, or with ``reissue`` issued again.

        When that fails the driver is stopped; what was cancelled is in ``cancelled`` either way.
        """
        admin = self.started()
        admin.halt()
        self.withdraw()
        self.cancelled = [] if reissue else self._cancel()
        try:
            self.bring_up(admin)
        except DmakitError:
            self.stop(quiet=True)
            raise
        self.unpark()
        return self.cancelled

    def _cancel(self) -> list[Done]:
        """Unmap everything in flight: the controller was stopped and will complete none of it."""
        self.withdraw()
        flights, self.parked = self.parked, []
        return [self._finish(flight, int(Status.ABORT_REQUESTED), None) for flight in flights]

    def started(self) -> AdminDriver:
        """The admin side; MisuseError before ``start``, the cause of death when the controller is dead."""
        if self.admin is None:
            raise MisuseError("driver: not started")
        if self.dead is not None:
            raise self.dead
        return self.admin

    # What recovery moves ------------------------------------------------------------------------------------

    def withdraw(self) -> None:
        """Take everything in flight back into ``parked``; only when the controller is stopped."""
        for pair in self.pairs:
            if pair.owner is not None:
                pair.owner.lose([pair.core.tag(slot) for slot in pair.core.live()])
            self.parked += [flight for flight in pair.cancel() if isinstance(flight, Flight)]

    def unpark(self) -> None:
        """Issue parked requests again, as far as there is room."""
        while self.parked:
            flight = self.parked[0]
            pair = self.pair_for(flight.iod.request)
            if not pair.room:
                return
            self._push(pair, self.parked.pop(0))
            pair.ring()

    def end(self, flight: Flight, error: HostError) -> None:
        """Finish a request that the controller will not; ``poll`` hands it out."""
        done = self._finish(flight, int(Status.HOST_ABORTED), None)
        done.blk_status = BlkStatus.TIMEOUT if error.errno == 110 else BlkStatus.IOERR
        done.error = error
        self.ended.append(done)

    # Requests -----------------------------------------------------------------------------------------------

    def requests(
        self, op: int, lba: int, memory: Iterable[tuple[int, int]], *, cpu: int = 0, nsid: int | None = None
    ) -> list[Request]:
        """Split I/O on ``memory`` (phys, length pieces) from block ``lba`` into requests of this queue."""
        space = self.space(nsid)
        bio = Bio(op, lba * (space.block_size >> SECTOR_SHIFT))
        for phys, length in memory:
            bio.add(phys, length)
        return split(bio, self.limits if nsid is None else self.limits_of(nsid), cpu=cpu)

    def pair_for(self, request: Request) -> QueuePair:
        """The queue pair of a request: its ``tag`` says which, else its CPU."""
        shared = self.shared
        return shared[(request.tag if request.tag >= 0 else request.cpu) % len(shared)]

    def room(self, request: Request) -> bool:
        """Whether a request can be submitted now."""
        return not self.parked and self.pair_for(request).room > 0

    @property
    def in_flight(self) -> int:
        """Requests that were submitted and not finished."""
        return sum(pair.in_flight for pair in self.shared) + len(self.parked) + len(self.ended)

    def submit(
        self, request: Request, *, nsid: int | None = None, opcode: int | None = None, timeout_ns: int = 0
    ) -> Iod:
        """Map and queue a request. Raises, with nothing left behind, when it cannot be mapped or queued."""
        self.started()
        pair = self.pair_for(request)
        space = self.space(nsid)
        with self.costs.phase("submission") if self.record else nullcontext():
            iod = self.mapper.map(request)
            if self.record:
                self.paths.take(self.submitted, iod.path_name, Reason(iod.reason))
            number, self.submitted = self.submitted, self.submitted + 1
            if iod.status:
                raise self._failure(iod)
            flight = Flight(number, iod, space, timeout_ns or self.timeout_ns)
            try:
                flight.command = build(flight, self.large, opcode)
                self._push(pair, flight)
            except BaseException:
                self._undo(flight, request.cpu)
                raise
            pair.ring()
        return iod

    def _push(self, pair: QueuePair, flight: Flight) -> None:
        pair.push(flight.command, flight, self.transport.now() + flight.timeout_ns)

    def _failure(self, iod: Iod) -> Exception:
        """The exception for a request that could not be mapped."""
        if isinstance(iod.error, Exception):
            return iod.error
        name = BlkStatus(iod.status).name
        if iod.reason == Reason.P2P_NOT_SUPPORTED:
            return UnsupportedError(f"request: peer memory that this device cannot reach (BLK_STS_{name})", 121)
        return MisuseError(f"request: its segments cannot be described by PRPs (BLK_STS_{name})", 5)

    def poll(self, cpu: int | None = None) -> list[Done]:
        """Take the completions that are there (of one CPU's queue, or of all), unmap, return the finished requests."""
        if self.dead is None:
            self.started()
        finished, self.ended = self.ended, []
        for pair in self.shared if cpu is None else [self.shared[cpu % len(self.shared)]]:
            for entry, flight in pair.take():
                assert isinstance(flight, Flight)
                finished.append(self._finish(flight, entry.status, cpu))
            if pair.lie:
                self.recovery.recover(pair.lie)
                break
        return finished

    def _finish(self, flight: Flight, status: int, cpu: int | None) -> Done:
        with self.costs.phase("completion") if self.record else nullcontext():
            self._undo(flight, flight.iod.request.cpu if cpu is None else cpu)
        done = Done(flight.iod.request, flight.iod, status, blk_status_of(status))
        if flight.aborting and status & 0x7FF == Status.ABORT_REQUESTED:
            done.blk_status = BlkStatus.TIMEOUT
            done.error = HostError(f"{flight.text}: no completion within {flight.timeout_ns / 1e9:g} s, aborted", 110)
        return done

    def _undo(self, flight: Flight, cpu: int) -> None:
        self.mapper.unmap(flight.iod, cpu=cpu)
        if flight.ranges is not None:
            self.large.release(flight.ranges)
            flight.ranges = None

    def execute(self, requests: Iterable[Request], *, nsid: int | None = None, opcode: int | None = None) -> list[Done]:
        """Submit requests (polling when a ring is full) and wait for all that is in flight.

        A request that the controller could not finish has ``Done.error``; nothing waits longer than its time-outs.
        """
        finished: list[Done] = []
        for request in requests:
            while not self.room(request):
                finished += self.progress()
            self.submit(request, nsid=nsid, opcode=opcode)
        return finished + self.drain()

    def drain(self, timeout_ns: int | None = None) -> list[Done]:
        """Wait until nothing is in flight, or for ``timeout_ns``; what finished."""
        finished: list[Done] = []
        end = None if timeout_ns is None else self.transport.now() + timeout_ns
        while self.in_flight and (end is None or self.transport.now() < end):
            finished += self.progress()
        return finished

    def progress(self, wait_ns: int = WAIT_NS) -> list[Done]:
        """Completions; when there are none waits up to ``wait_ns`` for some, and sees after the controller's health."""
        finished = self.poll()
        if not finished and self.dead is None:
            self.transport.wait(wait_ns)
            finished = self.poll()
        if self.dead is None and (not finished or self.recovery.due()):
            self.recovery.check()
            self.unpark()
        return finished

    def abort(self, iod: Iod) -> bool:
        """Ask the controller to abort a request in flight; its completion still comes by ``poll``."""
        admin = self.started()
        for pair in self.pairs:
            for slot in pair.core.live():
                flight = pair.contexts[slot]
                if isinstance(flight, Flight) and flight.iod is iod:
                    return admin.abort(pair, slot)
        raise MisuseError("abort: this request is not in flight")

    def __enter__(self) -> NvmeDriver:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(quiet=kind is not None)
