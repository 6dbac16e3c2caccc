"""One queue pair as the driver holds it: both rings in shared memory, the phase, the identifiers in flight.

The driver writes submission entries at ``tail`` and rings the doorbell; it takes completions as long as the phase bit
of the entry at ``head`` is the expected one. A ring of n entries holds at most n − 1 commands; identifiers are slots of
``commands``, so the lowest free one is reused first and none is ever in flight twice.
"""

from __future__ import annotations

from dmakit.errors import DmakitError, ExhaustedError, MisuseError
from dmakit.nvme.command import Command, Completion
from dmakit.nvme.spec import CQE_BYTES, SQE_BYTES, Reg
from dmakit.nvme.transport import Transport


class QueuePair:
    """Submission and completion queue ``qid``, both of ``entries`` entries."""

    def __init__(self, transport: Transport, qid: int, entries: int, doorbell_stride: int) -> None:
        self.transport = transport
        self.qid = qid
        self.entries = entries
        self.sq_doorbell = Reg.DOORBELLS + 2 * qid * doorbell_stride
        self.cq_doorbell = Reg.DOORBELLS + (2 * qid + 1) * doorbell_stride
        self.sq = transport.allocate(entries * SQE_BYTES)
        try:
            self.cq = transport.allocate(entries * CQE_BYTES)
        except DmakitError:
            self.sq.free()
            raise
        self.tail = self.head = 0
        self.phase = 1
        self.commands: dict[int, object] = {}
        self.free_cids = list(range(entries - 2, -1, -1))

    @property
    def in_flight(self) -> int:
        """Commands that were submitted and not completed."""
        return len(self.commands)

    def push(self, command: Command, context: object) -> int:
        """Write a command, without ringing; returns its identifier. ExhaustedError (EAGAIN) when the ring is full."""
        if not self.free_cids:
            raise ExhaustedError(f"queue {self.qid}: all {self.entries - 1} commands are in flight", 11)
        command.cid = self.free_cids.pop()
        self.commands[command.cid] = context
        self.sq.write(self.tail * SQE_BYTES, command.pack())
        self.tail = (self.tail + 1) % self.entries
        return command.cid

    def ring(self) -> None:
        """Tell the controller the new tail."""
        self.transport.write32(self.sq_doorbell, self.tail)

    def take(self) -> list[tuple[Completion, object]]:
        """The completions that are there, with the contexts of their commands; rings the head doorbell once."""
        found: list[tuple[Completion, object]] = []
        while True:
            entry = Completion.unpack(self.cq.read(self.head * CQE_BYTES, CQE_BYTES))
            if entry.phase != self.phase:
                break
            if entry.cid not in self.commands:
                raise MisuseError(f"queue {self.qid}: completion of command {entry.cid}, which is not in flight")
            found.append((entry, self.commands.pop(entry.cid)))
            self.free_cids.append(entry.cid)
            self.head += 1
            if self.head == self.entries:
                self.head = 0
                self.phase ^= 1
        if found:
            self.transport.write32(self.cq_doorbell, self.head)
        return found

    def cancel(self) -> list[object]:
        """Contexts of everything in flight (the controller was reset); the pair starts over."""
        contexts = list(self.commands.values())
        self.commands.clear()
        self.free_cids = list(range(self.entries - 2, -1, -1))
        self.tail = self.head = 0
        self.phase = 1
        self.cq.write(0, bytes(self.entries * CQE_BYTES))
        return contexts

    def free(self) -> None:
        """Give both rings back."""
        self.sq.free()
        self.cq.free()
