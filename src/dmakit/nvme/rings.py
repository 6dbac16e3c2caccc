"""One queue pair as the driver holds it: ``ring.Ring`` on shared memory, and what each command in flight belongs to.

A ring of n entries holds at most n − 1 commands. Identifiers, doorbells and the checks of what the controller says are
the ring's; this class adds the memory and the contexts.
"""

from __future__ import annotations

from array import array
from typing import Protocol

from dmakit.errors import DmakitError, MisuseError
from dmakit.nvme.command import Command, Completion
from dmakit.nvme.ring import LIES, MAX_ENTRIES, NEVER, Ring
from dmakit.nvme.spec import CQE_BYTES, SQE_BYTES, Reg
from dmakit.nvme.transport import Transport


class Owner(Protocol):
    """Who uses a pair for itself, by tags (``nvme.batch``)."""

    def lose(self, tags: list[int]) -> None:
        """A reset has ended these commands."""


class QueuePair:
    """Submission and completion queue ``qid``, both of ``entries`` entries; ``vector``: its interrupt, −1 = polled."""

    def __init__(self, transport: Transport, qid: int, entries: int, doorbell_stride: int, vector: int = -1) -> None:
        self.transport = transport
        self.qid = qid
        self.entries = entries = min(entries, MAX_ENTRIES)
        self.vector = vector
        self.sq = transport.allocate(entries * SQE_BYTES)
        try:
            self.cq = transport.allocate(entries * CQE_BYTES)
        except DmakitError:
            self.sq.free()
            raise
        self.core = Ring(
            qid,
            entries,
            (self.sq.words, self.sq.pages),
            (self.cq.words, self.cq.pages),
            sq_doorbell=Reg.DOORBELLS + 2 * qid * doorbell_stride,
            cq_doorbell=Reg.DOORBELLS + (2 * qid + 1) * doorbell_stride,
            bar=transport.bar,
            write32=transport.write32,
        )
        self.contexts: list[object] = [None] * entries
        self.owner: Owner | None = None
        self.retired = self.closed = False
        self._found = [memoryview(array("Q", bytes(8 * entries))) for _ in range(4)]

    @property
    def in_flight(self) -> int:
        """Commands that were submitted and not completed."""
        return self.core.in_flight

    @property
    def room(self) -> int:
        """How many commands can be pushed now."""
        return self.core.free_count

    def push(self, command: Command, context: object, deadline: int = NEVER) -> int:
        """Write a command, without ringing; its slot. ExhaustedError (EAGAIN) when the ring is full."""
        slot = self.core.push(command.pack(), 0, deadline)
        command.cid = self.core.identifier(slot)
        self.contexts[slot] = context
        return slot

    def ring(self) -> None:
        """Tell the controller the new tail."""
        self.core.ring()

    def take(self) -> list[tuple[Completion, object]]:
        """The completions that are there, with the contexts of their commands; stops at a lie (see ``lie``)."""
        slots, tags, statuses, results = self._found
        count = self.core.reap(slots, tags, statuses, results)
        found: list[tuple[Completion, object]] = []
        for at in range(count):
            slot = slots[at]
            entry = Completion(results[at] & 0xFFFF_FFFF, self.core.sq_head, self.qid, slot, statuses[at], 1)
            found.append((entry, self.contexts[slot]))
            self.contexts[slot] = None
        return found

    @property
    def lie(self) -> str:
        """What the controller said that cannot be, in words; empty when it did not."""
        if not self.core.lie:
            return ""
        high = self.core.lie_high
        return (
            f"queue {self.qid}: a completion {LIES[self.core.lie]} "
            f"(queue {high >> 16 & 0xFFFF}, head {high & 0xFFFF}, command {high >> 32 & 0xFFFF:#x}, "
            f"status {high >> 49:#x})"
        )

    def cancel(self) -> list[object]:
        """Contexts of everything in flight (the controller was stopped); the pair starts over."""
        contexts = [self.contexts[slot] for slot in self.core.live()]
        self.contexts = [None] * self.entries
        self.core.restart()
        return contexts

    def slot_of(self, context: object) -> int:
        """The slot of a context in flight; MisuseError when it is not."""
        for slot in self.core.live():
            if self.contexts[slot] is context:
                return slot
        raise MisuseError(f"queue {self.qid}: this command is not in flight")

    def free(self) -> None:
        """Give both rings back; a second call does nothing."""
        if self.closed:
            return
        self.closed = True
        self.core.close()
        self.sq.free()
        self.cq.free()
