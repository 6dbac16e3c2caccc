"""A controller model that breaks or lies on order, for tests of drivers: ``FaultyModel`` and its declared ``FAULTS``.

A ``Fault`` strikes the I/O command with number ``at`` (from 0, counted over resets) and the ``count − 1`` after it, or,
for those that concern registers, from that command on. It is spent after that: a driver that resets and tries again
succeeds. Time is the machine's virtual clock.

Two things make a fault realistic: a controller that is gone or fatal fetches nothing more, and a stalled command is
*held*: Abort finds it, a reset forgets it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dmakit.clock import VirtualClock
from dmakit.errors import MisuseError
from dmakit.nvme.command import Command, Completion
from dmakit.nvme.model import ControllerModel
from dmakit.nvme.queues import SubmissionRing
from dmakit.nvme.spec import CQE_BYTES, CSTS_CFS, CSTS_RDY, Admin, Reg, Status

FAULTS = {
    "never-ready": "CC.EN is set and CSTS.RDY stays 0 (``count`` times)",
    "slow-ready": "CSTS.RDY comes after ``value`` ns",
    "never-disables": "CC.EN is cleared and CSTS.RDY stays 1 (``count`` times)",
    "fatal": "CSTS.CFS rises instead of a completion; nothing is executed until a reset",
    "unplugged": "every register reads all ones from then on, nothing is executed any more",
    "stall": "the command is fetched and never completed; Abort ends it",
    "deaf": "the command is never completed, and neither is any Abort until a reset",
    "late": "the completion comes ``value`` ns later",
    "status": "the command is not executed and ends with status ``value``",
    "wrong-phase": "the completion is written with the phase of the last round",
    "bad-command": "the completion names a command that is not in flight",
    "bad-queue": "the completion names another submission queue",
    "bad-head": "the completion's submission head lies outside what was submitted",
    "twice": "the completion is posted twice",
}
REGISTER_FAULTS = ("never-ready", "slow-ready", "never-disables")


@dataclass
class Fault:
    """``kind`` of ``FAULTS``, the I/O command ``at`` which it strikes, for ``count`` commands, with ``value``."""

    kind: str
    at: int = 0
    count: int = 1
    value: int = 0

    def __post_init__(self) -> None:
        if self.kind not in FAULTS:
            raise MisuseError(f"fault {self.kind!r}: must be one of {', '.join(FAULTS)}")


class FaultyModel(ControllerModel):
    """``ControllerModel`` with ``faults``; ``struck`` notes (kind, command number) of each that happened."""

    def __init__(self, *args: Any, clock: VirtualClock, faults: list[Fault], **options: Any) -> None:
        self.clock = clock
        self.faults = faults
        self.struck: list[tuple[str, int]] = []
        self.number = 0
        self.unplugged = self.deaf = False
        self.held: dict[tuple[int, int], SubmissionRing] = {}
        super().__init__(*args, **options)

    def _fault(self, kinds: tuple[str, ...], number: int) -> Fault | None:
        """The fault that strikes I/O command ``number`` (or a register, then), counted down."""
        for fault in self.faults:
            if fault.kind in kinds and fault.count > 0 and (fault.kind in REGISTER_FAULTS or fault.at <= number):
                fault.count -= 1
                self.struck.append((fault.kind, number))
                return fault
        return None

    # Registers ----------------------------------------------------------------------------------------------

    def read32(self, offset: int) -> int:
        """All ones once it is unplugged."""
        return 0xFFFF_FFFF if self.unplugged else super().read32(offset)

    def write32(self, offset: int, value: int) -> None:
        """Lost once it is unplugged."""
        if not self.unplugged:
            super().write32(offset, value)

    def _enable(self, value: int) -> None:
        if self._fault(("never-ready",), self.number):
            return
        late = self._fault(("slow-ready",), self.number)
        super()._enable(value)
        if late is not None and self._registers[Reg.CSTS] & CSTS_RDY:
            self._registers[Reg.CSTS] &= ~CSTS_RDY
            self.clock.call_later(late.value, self._become_ready)

    def _become_ready(self) -> None:
        if 0 in self.admin.sqs:
            self._registers[Reg.CSTS] |= CSTS_RDY

    def reset(self) -> None:
        """A reset forgets what is held; one that is refused leaves everything as it is."""
        if self._fault(("never-disables",), self.number):
            self._registers[Reg.CC] |= 1
            return
        self.held.clear()
        self.deaf = False
        super().reset()

    # Work ---------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Not once it is unplugged."""
        return super().ready and not self.unplugged

    def _execute(self, sq: SubmissionRing, command: Command) -> tuple[int, int] | None:
        if sq.qid == 0:
            return self._admin(sq, command)
        fault = self._fault(("fatal", "unplugged", "stall", "deaf", "late", "status"), self.number)
        self.number += 1
        if fault is None:
            return super()._execute(sq, command)
        if fault.kind == "status":
            return fault.value, 0
        if fault.kind == "fatal":
            self._registers[Reg.CSTS] |= CSTS_CFS
        elif fault.kind == "unplugged":
            self.unplugged = True
        elif fault.kind == "late":
            answer = super()._execute(sq, command)
            assert answer is not None
            self.clock.call_later(fault.value, lambda: self._late(sq, command.cid, answer))
        else:
            self.deaf = self.deaf or fault.kind == "deaf"
            self.held[sq.qid, command.cid] = sq
        return None

    def _admin(self, sq: SubmissionRing, command: Command) -> tuple[int, int] | None:
        if command.opcode != Admin.ABORT:
            return super()._execute(sq, command)
        if self.deaf:
            return None
        held = self.held.pop((command.cdw10 & 0xFFFF, command.cdw10 >> 16), None)
        if held is None:
            return super()._execute(sq, command)
        super()._complete(held, command.cdw10 >> 16, int(Status.ABORT_REQUESTED), 0)
        return 0, 0

    def _late(self, sq: SubmissionRing, cid: int, answer: tuple[int, int]) -> None:
        if self.admin.sqs.get(sq.qid) is sq and self.ready and not sq.cq.full:
            super()._complete(sq, cid, *answer)

    def _complete(self, sq: SubmissionRing, cid: int, status: int, result: int) -> None:
        lies = ("wrong-phase", "bad-command", "bad-queue", "bad-head", "twice")
        fault = self._fault(lies, self.number - 1) if sq.qid else None  # it was counted when it was fetched
        if fault is None:
            super()._complete(sq, cid, status, result)
            return
        if fault.kind == "twice":
            super()._complete(sq, cid, status, result)
            if not sq.cq.full:
                super()._complete(sq, cid, status, result)
            return
        entry = Completion(result, sq.head, sq.qid, cid, status, sq.cq.phase)
        lie = {
            "wrong-phase": entry._replace(phase=sq.cq.phase ^ 1),
            "bad-command": entry._replace(cid=cid ^ 0x800),
            "bad-queue": entry._replace(sq_id=sq.qid + 1),
            "bad-head": entry._replace(sq_head=(sq.tail + 1) % sq.size),
        }[fault.kind]
        self.port.write(sq.cq.base + sq.cq.tail * CQE_BYTES, lie.pack())
        sq.cq.tail += 1
        if sq.cq.tail == sq.cq.size:
            sq.cq.tail = 0
            sq.cq.phase ^= 1
