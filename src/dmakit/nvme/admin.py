"""The admin command set of the controller model: queues, Identify, features, log pages, Abort.

Every rule about a queue's identifier, size, memory or vector ends with the specification's own status. Admin data
always uses PRPs. Set Features (number of queues) answers with what the host may create and is only taken before the
first I/O queue exists.
"""

from __future__ import annotations

from dmakit.nvme import identify
from dmakit.nvme.command import Command
from dmakit.nvme.datapath import CommandError, DataPath
from dmakit.nvme.namespace import Namespace
from dmakit.nvme.nvm import NvmCommands
from dmakit.nvme.queues import CompletionRing, SubmissionRing
from dmakit.nvme.spec import (
    CNS_ACTIVE_NAMESPACES,
    CNS_CONTROLLER,
    CNS_NAMESPACE,
    FEATURE_ARBITRATION,
    FEATURE_ASYNC_EVENTS,
    FEATURE_ERROR_RECOVERY,
    FEATURE_INTERRUPT_COALESCING,
    FEATURE_POWER,
    FEATURE_QUEUES,
    FEATURE_TEMPERATURE,
    FEATURE_WRITE_CACHE,
    LOG_ERROR,
    LOG_FIRMWARE,
    LOG_SMART,
    NSID_ALL,
    PAGE,
    Admin,
    Status,
)

_DEFAULTS = {
    FEATURE_ARBITRATION: 7,
    FEATURE_POWER: 0,
    FEATURE_TEMPERATURE: 343,
    FEATURE_ERROR_RECOVERY: 0,
    FEATURE_WRITE_CACHE: 1,
    FEATURE_INTERRUPT_COALESCING: 0,
    FEATURE_ASYNC_EVENTS: 0,
}


class AdminCommands:
    """Executes admin commands; owns the I/O queues it creates (``sqs``, ``cqs`` by identifier, admin pair at 0)."""

    def __init__(
        self,
        path: DataPath,
        io: NvmCommands,
        *,
        queues: int,
        entries: int,
        vectors: int,
        identity: tuple[str, str, int],
    ) -> None:
        self.path = path
        self.io = io
        self.queues = queues
        self.entries = entries
        self.vectors = vectors
        self.identity = identity
        self.sqs: dict[int, SubmissionRing] = {}
        self.cqs: dict[int, CompletionRing] = {}
        self.features = dict(_DEFAULTS)
        self.event_requests: list[int] = []
        self.events: list[tuple[int, int, int]] = []
        self.masked: set[int] = set()
        self.handlers = {
            int(Admin.DELETE_SQ): self._delete_sq,
            int(Admin.CREATE_SQ): self._create_sq,
            int(Admin.GET_LOG_PAGE): self._get_log_page,
            int(Admin.DELETE_CQ): self._delete_cq,
            int(Admin.CREATE_CQ): self._create_cq,
            int(Admin.IDENTIFY): self._identify,
            int(Admin.ABORT): self._abort,
            int(Admin.SET_FEATURES): self._set_features,
            int(Admin.GET_FEATURES): self._get_features,
        }

    def execute(self, command: Command) -> int:
        """Run a command; returns dword 0 of the completion, or raises CommandError."""
        handler = self.handlers.get(command.opcode)
        if handler is None:
            raise CommandError(Status.INVALID_OPCODE)
        if command.fuse:
            raise CommandError(Status.INVALID_FIELD)
        self.path.check_pointer(command, admin=True)
        return handler(command)

    def reset(self) -> None:
        """A controller reset: every queue is gone, features have their defaults."""
        self.sqs.clear()
        self.cqs.clear()
        self.features = dict(_DEFAULTS)
        self.event_requests.clear()
        self.masked.clear()

    # Events -------------------------------------------------------------------------------------------------

    def hold_event_request(self, cid: int) -> None:
        """Keep an Asynchronous Event Request until there is something to report."""
        if len(self.event_requests) > identify.EVENT_LIMIT:
            raise CommandError(Status.ASYNC_EVENT_LIMIT_EXCEEDED)
        self.event_requests.append(cid)

    def raise_event(self, kind: int, information: int, log_page: int) -> None:
        """Something happened: type (0 error, 1 health, 2 notice), information, the log page that tells more."""
        self.events.append((kind, information, log_page))

    def next_event(self) -> tuple[int, int, int] | None:
        """(CID, status, dword 0) of the next event to report; a kind stays masked until its log page is read."""
        for at, (kind, information, log_page) in enumerate(self.events):
            if self.event_requests and log_page not in self.masked:
                del self.events[at]
                self.masked.add(log_page)
                return self.event_requests.pop(0), 0, log_page << 16 | information << 8 | kind
        return None

    # Queues -------------------------------------------------------------------------------------------------

    def _ring(self, command: Command, known: dict[int, SubmissionRing] | dict[int, CompletionRing]) -> tuple[int, int]:
        """(identifier, entries) of a queue to create, checked."""
        qid, size = command.cdw10 & 0xFFFF, (command.cdw10 >> 16) + 1
        if not 0 < qid <= self.queues or qid in known:
            raise CommandError(Status.INVALID_QUEUE_ID)
        if not 2 <= size <= self.entries:
            raise CommandError(Status.INVALID_QUEUE_SIZE)
        if not command.cdw11 & 1:
            raise CommandError(Status.INVALID_FIELD)
        if command.low % PAGE:
            raise CommandError(Status.PRP_OFFSET_INVALID)
        return qid, size

    def _create_cq(self, command: Command) -> int:
        qid, size = self._ring(command, self.cqs)
        vector = command.cdw11 >> 16
        if vector >= self.vectors:
            raise CommandError(Status.INVALID_INTERRUPT_VECTOR)
        self.cqs[qid] = CompletionRing(qid, command.low, size, vector, bool(command.cdw11 & 2))
        return 0

    def _create_sq(self, command: Command) -> int:
        cqid = command.cdw11 >> 16
        if cqid == 0 or cqid not in self.cqs:
            raise CommandError(Status.CQ_INVALID if 0 < cqid <= self.queues else Status.INVALID_QUEUE_ID)
        qid, size = self._ring(command, self.sqs)
        self.sqs[qid] = SubmissionRing(qid, command.low, size, self.cqs[cqid])
        self.cqs[cqid].users.add(qid)
        return 0

    def _delete_sq(self, command: Command) -> int:
        qid = command.cdw10 & 0xFFFF
        if qid == 0 or qid not in self.sqs:
            raise CommandError(Status.INVALID_QUEUE_ID)
        self.sqs.pop(qid).cq.users.discard(qid)
        return 0

    def _delete_cq(self, command: Command) -> int:
        qid = command.cdw10 & 0xFFFF
        if qid == 0 or qid not in self.cqs:
            raise CommandError(Status.INVALID_QUEUE_ID)
        if self.cqs[qid].users:
            raise CommandError(Status.INVALID_QUEUE_DELETION)
        del self.cqs[qid]
        return 0

    def _abort(self, command: Command) -> int:
        """0 when a command that was not fetched yet was found, 1 otherwise."""
        ring = self.sqs.get(command.cdw10 & 0xFFFF)
        return int(ring is None or not ring.abort(self.path.port, command.cdw10 >> 16))

    # Facts --------------------------------------------------------------------------------------------------

    def _return(self, command: Command, payload: bytes) -> int:
        self.path.scatter(self.path.ranges(command, len(payload), to_host=True), payload)
        return 0

    def _identify(self, command: Command) -> int:
        cns = command.cdw10 & 0xFF
        spaces: dict[int, Namespace] = self.io.namespaces
        if cns == CNS_CONTROLLER:
            serial, model, mdts = self.identity
            return self._return(
                command, identify.controller(serial, model, mdts, max(spaces, default=1), self.path.sgls)
            )
        if cns == CNS_NAMESPACE:
            if not 1 <= command.nsid <= max(spaces, default=1):
                raise CommandError(Status.INVALID_NAMESPACE)
            space = spaces.get(command.nsid)
            return self._return(command, identify.namespace(space) if space else bytes(PAGE))
        if cns == CNS_ACTIVE_NAMESPACES:
            if command.nsid >= NSID_ALL - 1:
                raise CommandError(Status.INVALID_NAMESPACE)
            return self._return(command, identify.active_namespaces(list(spaces), command.nsid))
        raise CommandError(Status.INVALID_FIELD)

    def _get_log_page(self, command: Command) -> int:
        pages = {LOG_ERROR: bytes(64), LOG_SMART: identify.smart_log(self.io.counters), LOG_FIRMWARE: bytes(512)}
        page = pages.get(command.cdw10 & 0xFF)
        if page is None:
            raise CommandError(Status.INVALID_LOG_PAGE)
        self.masked.discard(command.cdw10 & 0xFF)
        size = ((command.cdw10 >> 16 | (command.cdw11 & 0xFFFF) << 16) + 1) * 4
        offset = command.cdw12 | command.cdw13 << 32
        if offset & 3 or offset > len(page) or size > 1 << 20:
            raise CommandError(Status.INVALID_FIELD)
        return self._return(command, page[offset : offset + size].ljust(size, b"\0"))

    # Features -----------------------------------------------------------------------------------------------

    def _set_features(self, command: Command) -> int:
        feature = command.cdw10 & 0xFF
        if command.cdw10 >> 31:
            raise CommandError(Status.FEATURE_NOT_SAVEABLE)
        if feature == FEATURE_QUEUES:
            return self._set_queues(command.cdw11)
        if feature not in self.features:
            raise CommandError(Status.INVALID_FIELD)
        self.features[feature] = command.cdw11
        return 0

    def _set_queues(self, asked: int) -> int:
        if any(self.sqs.keys() - {0}) or any(self.cqs.keys() - {0}):
            raise CommandError(Status.COMMAND_SEQUENCE_ERROR)
        if asked & 0xFFFF == 0xFFFF or asked >> 16 == 0xFFFF:
            raise CommandError(Status.INVALID_FIELD)
        return self._granted()

    def _granted(self) -> int:
        return (self.queues - 1) << 16 | self.queues - 1

    def _get_features(self, command: Command) -> int:
        feature, select = command.cdw10 & 0xFF, command.cdw10 >> 8 & 7
        if feature != FEATURE_QUEUES and feature not in self.features:
            raise CommandError(Status.INVALID_FIELD)
        if select == 3:
            return 4  # changeable, not saveable
        if select > 1:
            raise CommandError(Status.INVALID_FIELD)
        if feature == FEATURE_QUEUES:
            return self._granted()
        return self.features[feature] if select == 0 else _DEFAULTS[feature]
