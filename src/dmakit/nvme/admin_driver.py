"""The driver's admin side: enabling and disabling a controller, and the admin commands it needs.

``enable`` follows the specification's order: wait until not ready, give the admin queues, set CC, wait for CSTS.RDY.
Every wait ends with HostError when the controller reports a fatal status or makes no progress.
"""

from __future__ import annotations

from collections.abc import Callable

from dmakit.errors import HostError
from dmakit.nvme.command import Command, Completion
from dmakit.nvme.identify import ControllerFacts, NamespaceFacts
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
_PATIENCE = 1000


class AdminDriver:
    """Admin commands over queue pair 0; each call waits for its completion."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        capabilities = transport.read64(Reg.CAP)
        self.max_entries = (capabilities & 0xFFFF) + 1
        self.stride = 4 << (capabilities >> 32 & 15)
        self.pair = QueuePair(transport, 0, min(ADMIN_ENTRIES, self.max_entries), self.stride)

    def _wait_status(self, mask: int, wanted: int, what: str) -> None:
        for _ in range(_PATIENCE):
            status = self.transport.read32(Reg.CSTS)
            if status & mask == wanted:
                return
            if status & CSTS_CFS:
                raise HostError(f"{what}: the controller reports a fatal status (CSTS={status:#x})")
            self.transport.wait()
        raise HostError(f"{what}: the controller does not answer (CSTS={self.transport.read32(Reg.CSTS):#x})")

    def enable(self) -> None:
        """Bring the controller to ready with the admin queues."""
        self.disable()
        depth = self.pair.entries - 1
        self.transport.write32(Reg.AQA, depth << 16 | depth)
        self.transport.write64(Reg.ASQ, self.pair.sq.addr)
        self.transport.write64(Reg.ACQ, self.pair.cq.addr)
        self.transport.write32(Reg.CC, CC_EN | CC_IOSQES_64 | CC_IOCQES_16)
        self._wait_status(CSTS_RDY | CSTS_CFS, CSTS_RDY, "enable")

    def disable(self) -> None:
        """Reset: no queue is left, and no command will complete any more."""
        self.transport.write32(Reg.CC, 0)
        self._wait_status(CSTS_RDY, 0, "disable")
        self.pair.cancel()

    def shutdown(self) -> None:
        """Normal shutdown notification: caches are flushed."""
        self.transport.write32(Reg.CC, self.transport.read32(Reg.CC) | CC_SHN_NORMAL)
        self._wait_status(CSTS_SHST_MASK, CSTS_SHST_COMPLETE, "shutdown")

    def execute(self, command: Command) -> Completion:
        """Run one admin command; HostError when it is not completed or not successful."""
        self.pair.push(command, command)
        self.pair.ring()
        for _ in range(_PATIENCE):
            for entry, context in self.pair.take():
                if context is command:
                    if entry.status:
                        raise HostError(f"admin command {command.opcode:#04x}: {status_name(entry.status)}")
                    return entry
            if not self.transport.wait() and self.transport.read32(Reg.CSTS) & CSTS_CFS:
                break
        raise HostError(f"admin command {command.opcode:#04x}: no completion")

    def identify(self, cns: int, nsid: int = 0) -> bytes:
        """One Identify data structure."""
        memory = self.transport.allocate(IDENTIFY_BYTES)
        try:
            self.execute(Command(Admin.IDENTIFY, nsid, memory.addr, cdw10=cns))
            return memory.read(0, IDENTIFY_BYTES)
        finally:
            memory.free()

    def facts(self) -> tuple[ControllerFacts, list[NamespaceFacts]]:
        """The controller and its active namespaces."""
        controller = ControllerFacts.parse(self.identify(CNS_CONTROLLER))
        raw = self.identify(CNS_ACTIVE_NAMESPACES)
        nsids = [nsid for nsid in memoryview(raw).cast("I") if nsid]
        return controller, [NamespaceFacts.parse(nsid, self.identify(CNS_NAMESPACE, nsid)) for nsid in nsids]

    def create_pair(self, pair: QueuePair) -> None:
        """Create completion and submission queue of ``pair``; on failure none is left."""
        size = (pair.entries - 1) << 16 | pair.qid
        self.execute(Command(Admin.CREATE_CQ, low=pair.cq.addr, cdw10=size, cdw11=1))
        try:
            self.execute(Command(Admin.CREATE_SQ, low=pair.sq.addr, cdw10=size, cdw11=pair.qid << 16 | 1))
        except HostError:
            self.execute(Command(Admin.DELETE_CQ, cdw10=pair.qid))
            raise

    def delete_pair(self, pair: QueuePair) -> None:
        """Delete submission and completion queue."""
        self.execute(Command(Admin.DELETE_SQ, cdw10=pair.qid))
        self.execute(Command(Admin.DELETE_CQ, cdw10=pair.qid))

    def set_queue_count(self, count: int) -> int:
        """Ask for ``count`` I/O queue pairs; returns how many were granted."""
        asked = (count - 1) << 16 | count - 1
        result = self.execute(Command(Admin.SET_FEATURES, cdw10=FEATURE_QUEUES, cdw11=asked)).result
        return min(count, (result & 0xFFFF) + 1, (result >> 16) + 1)

    def abort(self, pair: QueuePair, cid: int) -> bool:
        """Ask to abort a command; True when the controller says that it did."""
        return self.execute(Command(Admin.ABORT, cdw10=cid << 16 | pair.qid)).result & 1 == 0

    def free(self, *hooks: Callable[[], None]) -> None:
        """Give the admin queue back, after ``hooks``."""
        for hook in hooks:
            hook()
        self.pair.free()
