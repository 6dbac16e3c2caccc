"""An NVMe controller in software: registers, doorbells, and commands executed against host memory through IOMMU.

The host sees a register file (BAR 0). Writing CC.EN builds the admin queues from AQA, ASQ and ACQ and raises
CSTS.RDY; clearing it resets. Doorbells only move ring positions: ``run`` does the work, one command after the other,
round robin over the queues with the admin queue first, so a test decides when the device acts. A completion queue
without room stops its submission queues until the host takes entries.

The controller reaches memory through its DMA port and in no other way. When a ring's own memory is blocked it
cannot report a status any more: CSTS.CFS rises and it stops until it is reset.

Source: NVM Express Base Specification (Controller Properties, Queues, Initialization).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType

from dmakit.errors import FaultError, MisuseError
from dmakit.nvme.admin import AdminCommands
from dmakit.nvme.busmaster import BusMaster, MemoryBuffer
from dmakit.nvme.command import Command
from dmakit.nvme.datapath import CommandError, DataPath, Port
from dmakit.nvme.identify import VERSION
from dmakit.nvme.namespace import Namespace
from dmakit.nvme.nvm import NvmCommands
from dmakit.nvme.queues import CompletionRing, SubmissionRing
from dmakit.nvme.spec import (
    CC_EN,
    CC_SHN_MASK,
    CSTS_CFS,
    CSTS_RDY,
    CSTS_SHST_COMPLETE,
    DNR,
    PAGE,
    SGLS_BIT_BUCKET,
    SGLS_BYTE,
    SGLS_DWORD,
    SGLS_METADATA_SGL,
    Admin,
    Reg,
    Status,
)

SGL_MODES = {
    "none": 0,
    "byte": SGLS_BYTE | SGLS_BIT_BUCKET | SGLS_METADATA_SGL,
    "dword": SGLS_DWORD | SGLS_METADATA_SGL,
}
_CAP_CONTIGUOUS = 1 << 16
_CAP_NVM = 1 << 37
_CAP_CMB = 1 << 57


class ControllerModel:
    """A controller with its namespaces.

    ``port``: its way to memory; ``sgl``: ``none``, ``byte`` or ``dword`` (granularity); ``mdts``: largest transfer as a
    power of two of 4 KiB pages (0 = no limit); ``queues``: I/O queue pairs; ``entries``: largest queue.
    ``buffer``: its controller memory buffer.
    ``on_interrupt(vector)`` is called when a completion is posted to a queue with interrupts.
    """

    def __init__(
        self,
        port: Port,
        namespaces: Iterable[Namespace] = (),
        *,
        sgl: str = "byte",
        mdts: int = 7,
        queues: int = 64,
        entries: int = 1024,
        serial: str = "dmakit0",
        model: str = "dmakit NVMe controller model",
        buffer: MemoryBuffer | None = None,
    ) -> None:
        if sgl not in SGL_MODES:
            raise MisuseError(f"sgl={sgl!r}: must be one of {', '.join(SGL_MODES)}")
        if not 0 <= mdts <= 20 or not 1 <= queues <= 0xFFFF or not 2 <= entries <= 0x10000:
            raise MisuseError(
                f"mdts={mdts}, queues={queues}, entries={entries}: outside what a controller can announce"
            )
        self.port = BusMaster(port, buffer)
        self.entries = entries
        spaces = {space.nsid: space for space in namespaces}
        self.path = DataPath(self.port, SGL_MODES[sgl])
        self.io = NvmCommands(self.path, spaces, PAGE << mdts if mdts else 0)
        self.admin = AdminCommands(
            self.path, self.io, queues=queues, entries=entries, vectors=queues + 1, identity=(serial, model, mdts)
        )
        self.on_interrupt: Callable[[int], None] | None = None
        self.executed = 0
        self.bad_doorbells: list[tuple[int, int]] = []
        self._registers: dict[int, int] = {}
        self._reset_registers()

    # Registers ----------------------------------------------------------------------------------------------

    def _reset_registers(self) -> None:
        self._registers = {int(reg): self._registers.get(reg, 0) for reg in (Reg.AQA, Reg.ASQ, Reg.ACQ)}
        self._registers |= {int(Reg.CC): 0, int(Reg.CSTS): 0, int(Reg.INTMS): 0}

    def read32(self, offset: int) -> int:
        """A 32-bit property."""
        base = offset & ~7 if offset & ~7 in (Reg.CAP, Reg.ASQ, Reg.ACQ, Reg.CMBMSC) else offset
        return self._value(base) >> (8 * (offset - base)) & 0xFFFF_FFFF

    def read64(self, offset: int) -> int:
        """A 64-bit property."""
        return self.read32(offset) | self.read32(offset + 4) << 32

    def _value(self, offset: int) -> int:
        if offset == Reg.CAP:
            timeout = 1  # in 500 ms
            buffer = _CAP_CMB if self.port.buffer is not None else 0
            return self.entries - 1 | _CAP_CONTIGUOUS | timeout << 24 | _CAP_NVM | buffer
        if offset == Reg.VS:
            return VERSION
        if offset == Reg.INTMC:
            return self._registers[Reg.INTMS]
        if Reg.CMBLOC <= offset <= Reg.CMBSTS and self.port.buffer is not None:
            return self.port.buffer.register(offset)
        return self._registers.get(offset, 0)

    def write64(self, offset: int, value: int) -> None:
        """Write a 64-bit property."""
        self.write32(offset, value & 0xFFFF_FFFF)
        self.write32(offset + 4, value >> 32)

    def write32(self, offset: int, value: int) -> None:
        """Write a 32-bit property or ring a doorbell; read-only properties ignore writes."""
        if offset >= Reg.DOORBELLS:
            self._doorbell((offset - Reg.DOORBELLS) >> 2, value)
        elif offset == Reg.CC:
            self._configure(value)
        elif offset == Reg.AQA:
            self._registers[offset] = value & 0x0FFF_0FFF
        elif offset & ~7 in (Reg.ASQ, Reg.ACQ):
            self._write_half(offset & ~7, offset & 4, value)
        elif offset & ~7 == Reg.CMBMSC and self.port.buffer is not None:
            keep = 0xFFFF_FFFF << (0 if offset & 4 else 32)
            self.port.buffer.control = self.port.buffer.control & keep | value << (8 * (offset & 4))
        elif offset == Reg.INTMS:
            self._registers[Reg.INTMS] |= value
        elif offset == Reg.INTMC:
            self._registers[Reg.INTMS] &= ~value

    def _write_half(self, base: int, upper: int, value: int) -> None:
        keep = 0xFFFF_FFFF if upper else 0xFFFF_FFFF << 32
        self._registers[base] = (self._registers[base] & keep | value << (8 * upper)) & ~(PAGE - 1)

    def _configure(self, value: int) -> None:
        before = self._registers[Reg.CC]
        self._registers[Reg.CC] = value
        if value & CC_EN and not before & CC_EN:
            self._enable(value)
        elif before & CC_EN and not value & CC_EN:
            self.reset()
        if value & CC_SHN_MASK and not before & CC_SHN_MASK:
            for space in self.io.namespaces.values():
                space.backing.flush()
            self._registers[Reg.CSTS] |= CSTS_SHST_COMPLETE

    def _enable(self, value: int) -> None:
        """Build the admin queues; a configuration that this controller lacks (page size, command set) is fatal."""
        if value >> 4 & 7 or value >> 7 & 15:
            self._registers[Reg.CSTS] |= CSTS_CFS
            return
        aqa = self._registers[Reg.AQA]
        cq = CompletionRing(0, self._registers[Reg.ACQ], (aqa >> 16 & 0xFFF) + 1)
        sq = SubmissionRing(0, self._registers[Reg.ASQ], (aqa & 0xFFF) + 1, cq)
        if cq.size < 2 or sq.size < 2:
            self._registers[Reg.CSTS] |= CSTS_CFS
            return
        self.admin.sqs[0], self.admin.cqs[0] = sq, cq
        self._registers[Reg.CSTS] |= CSTS_RDY

    def reset(self) -> None:
        """What clearing CC.EN does: queues and states are gone, AQA, ASQ and ACQ stay."""
        self.admin.reset()
        self._reset_registers()

    @property
    def ready(self) -> bool:
        """CSTS.RDY without CSTS.CFS."""
        return self._registers[Reg.CSTS] & (CSTS_RDY | CSTS_CFS) == CSTS_RDY

    def _doorbell(self, number: int, value: int) -> None:
        """Submission tail (even) or completion head (odd); a value outside the ring is ignored and noted."""
        sq = self.admin.sqs.get(number >> 1) if number & 1 == 0 else None
        cq = self.admin.cqs.get(number >> 1) if number & 1 else None
        if sq is not None and value < sq.size:
            sq.tail = value
        elif cq is not None and value < cq.size:
            cq.head = value
        else:
            self.bad_doorbells.append((number, value))

    # Work ---------------------------------------------------------------------------------------------------

    def run(self, limit: int = 1 << 30) -> int:
        """Execute up to ``limit`` waiting commands and report events; returns how many completions there were."""
        done = self._report_events()
        while done < limit and self.ready:
            progress = 0
            for sq in sorted(self.admin.sqs.values(), key=lambda ring: ring.qid):
                if done < limit and self.ready and sq.waiting and not sq.cq.full and self._step(sq):
                    done += 1
                    progress += 1
            if not progress:
                break
        return done

    def _step(self, sq: SubmissionRing) -> bool:
        """Fetch, execute and complete one command; False when a ring cannot be reached."""
        try:
            command = sq.fetch(self.port)
            answer = self._execute(sq, command)
            if answer is not None and self.admin.sqs.get(sq.qid) is sq:
                self._complete(sq, command.cid, *answer)
        except FaultError:
            self._registers[Reg.CSTS] |= CSTS_CFS
            return False
        self.executed += 1
        return True

    def _complete(self, sq: SubmissionRing, cid: int, status: int, result: int) -> None:
        """Post a completion, interrupt."""
        sq.cq.post(self.port, result, sq.head, sq.qid, cid, status)
        if sq.cq.interrupts and self.on_interrupt is not None:
            self.on_interrupt(sq.cq.vector)

    def _execute(self, sq: SubmissionRing, command: Command) -> tuple[int, int] | None:
        """(status field, dword 0) of a command; None for one that is answered later."""
        if command.cid in sq.aborted:
            sq.aborted.discard(command.cid)
            return int(Status.ABORT_REQUESTED), 0
        try:
            if sq.qid == 0 and command.opcode == Admin.ASYNC_EVENT:
                self.admin.hold_event_request(command.cid)
                return None
            result = self.admin.execute(command) if sq.qid == 0 else self.io.execute(command)
        except CommandError as error:
            retry = error.status in (Status.DATA_TRANSFER_ERROR, Status.INTERNAL_ERROR)
            return int(error.status) | (0 if retry else DNR), 0
        return int(Status.SUCCESS), result

    def _report_events(self) -> int:
        """Answer Asynchronous Event Requests with the events that wait."""
        done = 0
        while self.ready and not self.admin.sqs[0].cq.full and (found := self.admin.next_event()) is not None:
            try:
                self._complete(self.admin.sqs[0], *found)
            except FaultError:
                self._registers[Reg.CSTS] |= CSTS_CFS
                break
            done += 1
        return done

    # End ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the namespaces' backing."""
        for space in self.io.namespaces.values():
            space.close()

    def __enter__(self) -> ControllerModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
