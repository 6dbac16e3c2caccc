"""What the driver does about a controller that fails: Abort, reset, issue again, or give up, in this order.

``check`` looks at CSTS and at the deadlines:

1. a command whose time is over is aborted (the controller may still be well) and gets one more time;
2. an Abort without an answer, a second deadline, a fatal status, a lost ready bit or a completion that cannot be true
   (``ring.LIES``) means that the controller cannot be trusted: it is halted (``AdminDriver.halt``), which ends its
   access to memory, brought up again, and what was in flight is issued again, on the same mappings;
3. the command whose time was over, and one that was issued ``retries`` times already, end with the error;
4. a controller that is gone, or that does not come up again, is *dead*: everything in flight ends with the error, and
   so does every later call;
5. when the host takes the device away (``transport.notice``), nothing is issued any more. While the controller is well,
   what is in flight may end within a moment, and the queues are deleted in order; then it is stopped and dead.

No request is lost: each is finished once, with a status or with an error that carries the registers. No memory is
given back before the controller was stopped. What happened is kept in ``incidents``.

Models ``drivers/nvme/host/pci.c`` (nvme_timeout, nvme_reset_work) and ``core.c`` (nvme_cancel_request).
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import TYPE_CHECKING

from dmakit.errors import DmakitError, HostError
from dmakit.nvme.admin_driver import CommandFailed
from dmakit.nvme.commands import Flight
from dmakit.nvme.registers import ALL_ONES, ControllerError, failure, gone
from dmakit.nvme.rings import QueuePair
from dmakit.nvme.spec import CSTS_CFS, CSTS_RDY, Reg
from dmakit.nvme.transport import Notice

if TYPE_CHECKING:
    from dmakit.nvme.driver import NvmeDriver

ABORT_TIMEOUT_NS = 5_000_000_000
CHECK_NS = 50_000_000
DRAIN_NS = 1_000_000_000  # for what is in flight when we have to go


class Recovery:
    """Watches over one driver; ``resets`` and ``aborts`` count, ``incidents`` keeps the errors that led to resets."""

    def __init__(self, driver: NvmeDriver, retries: int) -> None:
        self.driver = driver
        self.retries = retries
        self.resets = self.aborts = 0
        self.incidents: list[ControllerError] = []
        self.next_check = 0

    def due(self) -> bool:
        """Whether it is time to look again although completions keep coming."""
        return self.driver.transport.now() >= self.next_check

    def check(self) -> None:
        """Look at the state and at the deadlines; acts on what it finds."""
        driver = self.driver
        self.next_check = driver.transport.now() + CHECK_NS
        if (notice := driver.transport.notice()) is not None:
            self.depart(notice)
            return
        status = driver.transport.read32(Reg.CSTS)
        if status == ALL_ONES or status & (CSTS_CFS | CSTS_RDY) != CSTS_RDY:
            self.recover("the controller stopped working")
            return
        now = driver.transport.now()
        for pair in driver.pairs:
            for slot in pair.core.overdue(now):
                if not self._overdue(pair, slot):
                    return
        try:
            driver.started().attend()
        except ControllerError as error:
            self.recover(f"asynchronous event: {error}")

    def _overdue(self, pair: QueuePair, slot: int) -> bool:
        """Abort the command in a slot, or reset; False when the queues are no longer what they were."""
        flight = pair.contexts[slot]
        if pair.owner is not None:
            self.recover(f"queue {pair.qid}: command {pair.core.tag(slot):#x} of a batch was not completed in time", [])
            return False
        assert isinstance(flight, Flight)
        late = f"{flight.text}: no completion within {flight.timeout_ns / 1e9:g} s"
        if flight.aborting:
            self.recover(f"{late}, nor after Abort", [flight])
            return False
        flight.aborting = True
        admin = self.driver.started()
        self.aborts += 1
        pair.core.extend(slot, self.driver.transport.now() + ABORT_TIMEOUT_NS)
        try:
            admin.abort(pair, slot, ABORT_TIMEOUT_NS)
        except CommandFailed:
            pass  # it did not want to; the second deadline decides
        except ControllerError as error:
            self.recover(f"{late}; Abort: {error}", [flight])
            return False
        return True

    def recover(self, why: str, victims: list[Flight] | None = None) -> None:
        """Halt, bring up again, issue again; never raises for what the controller does."""
        driver = self.driver
        if (notice := driver.transport.notice()) is not None:
            self.depart(notice)
            return
        admin = driver.started()
        error = failure(driver.transport, why, 110 if victims else 5)
        self.incidents.append(error)
        self.resets += 1
        admin.halt()
        driver.withdraw()
        lost = gone(error.registers)
        for flight in list(driver.parked):
            flight.tries += 1
            flight.aborting = False
            if lost or flight.tries > self.retries or (victims is not None and flight in victims):
                driver.parked.remove(flight)
                driver.end(flight, error)
        try:
            if not lost:
                driver.bring_up(admin)
        except DmakitError as broken:
            admin.halt()
            self._die(broken if isinstance(broken, HostError) else error)
            return
        if lost:
            self._die(error)
            return
        driver.unpark()

    def depart(self, notice: Notice) -> None:
        """End in order because the host says so; what can end well does, all else ends with what the host said."""
        driver = self.driver
        admin = driver.started()
        if admin.leaving:
            return  # whatever happens on the way out changes nothing any more
        admin.leaving = True
        error = failure(driver.transport, str(notice.error), notice.error.errno or errno.EIO)
        self.incidents.append(error)
        while driver.parked:
            driver.end(driver.parked.pop(0), error)
        if notice.well and admin.running and not gone(error.registers):
            done = driver.drain(DRAIN_NS)
            driver.ended += done
            with suppress(HostError):  # it is stopped in any case
                driver.leave(admin)
        admin.halt()
        driver.withdraw()
        self._die(error)

    def _die(self, error: HostError) -> None:
        """End everything with ``error``, now and later."""
        driver = self.driver
        driver.dead = error
        driver.transport.stop()
        while driver.parked:
            driver.end(driver.parked.pop(0), error)
