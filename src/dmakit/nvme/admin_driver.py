"""The driver's admin side: enabling and disabling a controller, and the admin commands it needs.

``enable`` follows the specification's order: wait until not ready, give the admin queues, set CC, wait for CSTS.RDY,
each for at most the time that the controller itself announces (CAP.TO). Every wait ends with ``ControllerError`` when
the controller reports a fatal status, does not answer in time or is gone.

An admin command that is not completed in time leaves its buffer in the controller's hands. So before the error is
raised the controller is halted: disabled, or, when it does not even do that, cut off from memory. After ``halt``
nothing that it was given can be written any more, and whoever catches the error may free or use it again.

One Asynchronous Event Request is kept in flight. An event is noted in ``events``, its log page is read (without that
the controller reports no further event of the kind), and the request goes out again.

Models ``drivers/nvme/host/core.c`` (nvme_enable_ctrl, nvme_disable_ctrl, nvme_shutdown_ctrl, nvme_async_event_work).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from dmakit.errors import HostError, UnsupportedError
from dmakit.nvme.command import Command, Completion
from dmakit.nvme.identify import ControllerFacts, NamespaceFacts
from dmakit.nvme.registers import ALL_ONES, Capabilities, ControllerError, failure
from dmakit.nvme.rings import QueuePair
from dmakit.nvme.spec import (
    CC_EN,
    CC_IOCQES_16,
    CC_IOSQES_64,
    CC_SHN_NORMAL,
    CNS_ACTIVE_NAMESPACES,
    CNS_CONTROLLER,
    CNS_NAMESPACE,
    CSTS_CFS,
    CSTS_RDY,
    CSTS_SHST_COMPLETE,
    CSTS_SHST_MASK,
    FEATURE_QUEUES,
    IDENTIFY_BYTES,
    Admin,
    Reg,
    status_name,
)
from dmakit.nvme.transport import Transport

ADMIN_ENTRIES = 32
ADMIN_TIMEOUT_NS = 60_000_000_000
SHUTDOWN_TIMEOUT_NS = 5_000_000_000
STATUS_NS = 1_000_000  # between looks at CSTS
WAIT_NS = 10_000_000  # for a sign of a command's end
_LOG_BYTES = 512
_BURST_EVENTS = 64


class CommandFailed(HostError):
    """A command that ended with a bad status; ``status`` is its 15-bit field."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class AsyncEvent:
    """An asynchronous event: type (0 error, 1 health, 2 notice, …), information, the log page that tells more."""

    kind: int
    information: int
    log_page: int


class AdminDriver:
    """Admin commands over queue pair 0; each call waits for its completion, at most ``timeout_ns``."""

    def __init__(self, transport: Transport, timeout_ns: int = ADMIN_TIMEOUT_NS) -> None:
        self.transport = transport
        self.timeout_ns = timeout_ns
        if transport.read32(Reg.CSTS) == ALL_ONES:
            raise failure(transport, "open")
        self.capabilities = Capabilities.decode(transport.read64(Reg.CAP))
        self._check()
        self.max_entries = self.capabilities.max_entries
        self.stride = self.capabilities.stride
        self.pair = QueuePair(transport, 0, min(ADMIN_ENTRIES, self.max_entries), self.stride)
        self.events: list[AsyncEvent] = []
        self.running = self.leaving = False
        self._event_request: Command | None = None
        self._unread: list[AsyncEvent] = []

    def _check(self) -> None:
        caps = self.capabilities
        if not caps.nvm:
            raise UnsupportedError("this controller has no NVM command set (CAP.CSS)")
        if caps.min_page_shift > 12:
            raise UnsupportedError(f"this controller needs pages of {1 << caps.min_page_shift} bytes (CAP.MPSMIN)")
        if caps.max_entries < 2:
            raise ControllerError(f"CAP announces queues of {caps.max_entries} entry: at least 2 are the rule")

    # Properties ---------------------------------------------------------------------------------------------

    def _wait_status(self, mask: int, wanted: int, what: str, timeout_ns: int) -> None:
        """Wait for bits of CSTS; CFS ends the wait unless ``mask`` leaves it out."""
        transport = self.transport
        end = transport.now() + timeout_ns
        while True:
            status = transport.read32(Reg.CSTS)
            if status != ALL_ONES and status & mask == wanted:
                return
            if status == ALL_ONES or (status & CSTS_CFS and mask & CSTS_CFS):
                raise failure(transport, what, 5)
            if transport.now() >= end:
                raise failure(transport, f"{what}: no answer within {timeout_ns / 1e9:g} s")
            transport.wait(STATUS_NS)

    def enable(self) -> None:
        """Bring the controller to ready with the admin queues."""
        self.disable()
        self.transport.start()
        depth = self.pair.entries - 1
        self.transport.write32(Reg.AQA, depth << 16 | depth)
        self.transport.write64(Reg.ASQ, self.pair.sq.addr)
        self.transport.write64(Reg.ACQ, self.pair.cq.addr)
        self.transport.write32(Reg.CC, CC_EN | CC_IOSQES_64 | CC_IOCQES_16)
        self._wait_status(CSTS_RDY | CSTS_CFS, CSTS_RDY, "enable", self.capabilities.timeout_ns)
        self.running = True

    def disable(self) -> None:
        """Reset: no queue is left, and no command will complete any more."""
        self.running = False
        control = self.transport.read32(Reg.CC)
        self.transport.write32(Reg.CC, control & ~CC_EN if control != ALL_ONES else 0)
        self._wait_status(CSTS_RDY, 0, "disable", self.capabilities.timeout_ns)
        self.pair.cancel()
        self._event_request = None

    def halt(self) -> None:
        """Stop the controller by whatever works: after this it writes to no memory. Never raises ControllerError."""
        try:
            self.disable()
        except ControllerError:
            self.transport.stop()
            self.pair.cancel()
            self._event_request = None

    def shutdown(self, timeout_ns: int = SHUTDOWN_TIMEOUT_NS) -> None:
        """Normal shutdown notification: caches are flushed."""
        self.transport.write32(Reg.CC, self.transport.read32(Reg.CC) | CC_SHN_NORMAL)
        self._wait_status(CSTS_SHST_MASK, CSTS_SHST_COMPLETE, "shutdown", timeout_ns)

    # Commands -----------------------------------------------------------------------------------------------

    def execute(self, command: Command, timeout_ns: int = 0) -> Completion:
        """Run one command; CommandFailed on a bad status, ControllerError (the controller is halted then) on none."""
        if not self.running:
            raise failure(self.transport, f"admin command {command.opcode:#04x}: the controller is not enabled", 5)
        what = f"admin command {command.opcode:#04x}"
        try:
            self.pair.push(command, command)
            self.pair.ring()
            entry = self._await(command, what, timeout_ns or self.timeout_ns)
        except BaseException:
            if self.running:
                self.halt()  # also when the user interrupts: the command's memory is still the controller's
            raise
        if entry.status & 0x7FF:
            raise CommandFailed(f"{what}: {status_name(entry.status)}", entry.status)
        return entry

    def _await(self, command: Command, what: str, limit: int) -> Completion:
        end = self.transport.now() + limit
        while True:
            entry = self._drain(command)
            if entry is not None:
                return entry
            if self.pair.lie:
                raise failure(self.transport, f"{what}: {self.pair.lie}", 5)
            status = self.transport.read32(Reg.CSTS)
            if status == ALL_ONES or status & (CSTS_CFS | CSTS_RDY) != CSTS_RDY:
                raise failure(self.transport, f"{what}: no completion", 5)
            if not self.leaving and (notice := self.transport.notice()) is not None:
                raise failure(self.transport, f"{what}: {notice.error}", notice.error.errno or 5)
            if self.transport.now() >= end:
                raise failure(self.transport, f"{what}: no completion within {limit / 1e9:g} s")
            self.transport.wait(WAIT_NS)

    def _drain(self, wanted: Command | None) -> Completion | None:
        """Take what is there: the completion of ``wanted`` if it has come, events on the way."""
        found = None
        for entry, context in self.pair.take():
            if context is wanted and wanted is not None:
                found = entry
            elif context is self._event_request and context is not None:
                self._note(entry)
        return found

    # Asynchronous events ------------------------------------------------------------------------------------

    def _note(self, entry: Completion) -> None:
        self._event_request = None
        if entry.status == 0:
            event = AsyncEvent(entry.result & 7, entry.result >> 8 & 0xFF, entry.result >> 16 & 0xFF)
            self.events.append(event)
            self._unread.append(event)

    def listen(self) -> None:
        """Put an Asynchronous Event Request out, unless one is out already."""
        if self._event_request is None:
            self._event_request = Command(Admin.ASYNC_EVENT)
            self.pair.push(self._event_request, self._event_request)
            self.pair.ring()

    def attend(self) -> list[AsyncEvent]:
        """Take the events that have come: read their log pages, listen again; the new ones, oldest first."""
        self._drain(None)
        fresh: list[AsyncEvent] = []
        while self._unread and len(fresh) < _BURST_EVENTS:
            event = self._unread.pop(0)
            fresh.append(event)
            with suppress(CommandFailed):  # a page of the vendor's may not be there: the event is what counts
                self.log_page(event.log_page, _LOG_BYTES)
            self.listen()
            self._drain(None)
        return fresh

    # What the commands say ----------------------------------------------------------------------------------

    def _fetch(self, command: Command, size: int) -> bytes:
        """Run a command that returns ``size`` bytes (at most one page)."""
        memory = self.transport.allocate(IDENTIFY_BYTES)
        try:
            command.low = memory.addr
            self.execute(command)
            return memory.read(0, size)
        finally:
            memory.free()

    def identify(self, cns: int, nsid: int = 0) -> bytes:
        """One Identify data structure."""
        return self._fetch(Command(Admin.IDENTIFY, nsid, cdw10=cns), IDENTIFY_BYTES)

    def log_page(self, page: int, size: int) -> bytes:
        """The first ``size`` bytes (a multiple of 4, at most 4096) of a log page."""
        return self._fetch(Command(Admin.GET_LOG_PAGE, 0xFFFF_FFFF, cdw10=(size // 4 - 1) << 16 | page), size)

    def facts(self) -> tuple[ControllerFacts, list[NamespaceFacts]]:
        """The controller and its active namespaces."""
        controller = ControllerFacts.parse(self.identify(CNS_CONTROLLER))
        nsids = self.active()
        return controller, [NamespaceFacts.parse(nsid, self.identify(CNS_NAMESPACE, nsid)) for nsid in nsids]

    def active(self) -> list[int]:
        """Identifiers of the active namespaces, page by page of 1024."""
        found: list[int] = []
        while True:
            raw = self.identify(CNS_ACTIVE_NAMESPACES, found[-1] if found else 0)
            page = [nsid for nsid in memoryview(raw).cast("I") if nsid]
            if any(nsid <= (found[-1] if found else 0) for nsid in page[:1]):
                raise ControllerError(f"Identify: the list of active namespaces runs backwards at {page[0]}")
            found += page
            if len(page) < IDENTIFY_BYTES // 4:
                return found

    # Queues -------------------------------------------------------------------------------------------------

    def create_pair(self, pair: QueuePair) -> None:
        """Create completion and submission queue of ``pair``; on failure none is left."""
        size = (pair.entries - 1) << 16 | pair.qid
        interrupt = pair.vector << 16 | 2 if pair.vector >= 0 else 0
        self.execute(Command(Admin.CREATE_CQ, low=pair.cq.addr, cdw10=size, cdw11=interrupt | 1))
        try:
            self.execute(Command(Admin.CREATE_SQ, low=pair.sq.addr, cdw10=size, cdw11=pair.qid << 16 | 1))
        except CommandFailed:
            self.execute(Command(Admin.DELETE_CQ, cdw10=pair.qid))
            raise

    def delete_pair(self, pair: QueuePair, timeout_ns: int = 0) -> None:
        """Delete submission and completion queue."""
        self.execute(Command(Admin.DELETE_SQ, cdw10=pair.qid), timeout_ns)
        self.execute(Command(Admin.DELETE_CQ, cdw10=pair.qid), timeout_ns)

    def set_queue_count(self, count: int) -> int:
        """Ask for ``count`` I/O queue pairs; returns how many were granted."""
        asked = (count - 1) << 16 | count - 1
        result = self.execute(Command(Admin.SET_FEATURES, cdw10=FEATURE_QUEUES, cdw11=asked)).result
        return min(count, (result & 0xFFFF) + 1, (result >> 16) + 1)

    def abort(self, pair: QueuePair, slot: int, timeout_ns: int = 0) -> bool:
        """Ask to abort the command in a slot; True when the controller says that it did."""
        cid = pair.core.identifier(slot)
        return self.execute(Command(Admin.ABORT, cdw10=cid << 16 | pair.qid), timeout_ns).result & 1 == 0

    def free(self, *hooks: Callable[[], None]) -> None:
        """Give the admin queue back, after ``hooks``."""
        for hook in hooks:
            hook()
        self.pair.free()
