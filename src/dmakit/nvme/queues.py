"""Queues as the controller model holds them: rings in host memory, reached through the DMA port.

A submission queue is read at ``head``, which chases the ``tail`` that the host's doorbell gives. A completion queue is
written at ``tail`` with the current phase bit, which flips at each wrap; it is full when one more entry would make
tail equal to the host's ``head``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dmakit.nvme.command import Command, Completion
from dmakit.nvme.datapath import Port
from dmakit.nvme.spec import CQE_BYTES, SQE_BYTES


@dataclass(slots=True)
class CompletionRing:
    """Completion queue ``qid`` of ``size`` entries at DMA address ``base``."""

    qid: int
    base: int
    size: int
    vector: int = 0
    interrupts: bool = True
    head: int = 0
    tail: int = 0
    phase: int = 1
    users: set[int] = field(default_factory=set)

    @property
    def full(self) -> bool:
        """Whether the host has to take entries first."""
        return (self.tail + 1) % self.size == self.head

    def post(self, port: Port, result: int, sq_head: int, sq_id: int, cid: int, status: int) -> None:
        """Write one entry; FaultError when the ring's memory is blocked."""
        entry = Completion(result, sq_head, sq_id, cid, status, self.phase)
        port.write(self.base + self.tail * CQE_BYTES, entry.pack())
        self.tail += 1
        if self.tail == self.size:
            self.tail = 0
            self.phase ^= 1


@dataclass(slots=True)
class SubmissionRing:
    """Submission queue ``qid`` of ``size`` entries at DMA address ``base``, completing to ``cq``."""

    qid: int
    base: int
    size: int
    cq: CompletionRing
    head: int = 0
    tail: int = 0
    aborted: set[int] = field(default_factory=set)

    @property
    def waiting(self) -> int:
        """Entries that the host has submitted and the controller has not fetched."""
        return (self.tail - self.head) % self.size

    def fetch(self, port: Port) -> Command:
        """The next command; FaultError when the ring's memory is blocked."""
        raw = port.read(self.base + self.head * SQE_BYTES, SQE_BYTES)
        self.head = (self.head + 1) % self.size
        return Command.unpack(raw)

    def abort(self, port: Port, cid: int) -> bool:
        """Mark a command that was not fetched yet; False when there is none with this identifier."""
        for at in range(self.waiting):
            slot = (self.head + at) % self.size
            if Command.unpack(port.read(self.base + slot * SQE_BYTES, SQE_BYTES)).cid == cid:
                self.aborted.add(cid)
                return True
        return False
