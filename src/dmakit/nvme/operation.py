"""One call of a user: the requests that it became, how many are still out, and how it ended.

A transfer larger than a command may be (MDTS, the mapping's limit, the PRP boundary) becomes several requests; the
operation ends when all have, well or with the first error. What it holds (a staging buffer, the user's buffer) is
let go then and not before, also when nobody waits any more: an interrupted wait or a cancelled task leaves the
controller's memory alone.
"""

from __future__ import annotations

from collections.abc import Callable

from dmakit.block.request import Request
from dmakit.block.status import BlkStatus
from dmakit.errors import DmakitError, HostError
from dmakit.nvme.buffers import DmaBuffer
from dmakit.nvme.commands import Done
from dmakit.nvme.spec import Status, status_name

_ERRNO = {
    BlkStatus.NOTSUPP: 95,
    BlkStatus.TIMEOUT: 110,
    BlkStatus.TARGET: 121,
    BlkStatus.MEDIUM: 61,
    BlkStatus.RESOURCE: 12,
    BlkStatus.INVAL: 22,
}


class IoError(HostError):
    """The controller ended a command with a bad ``status`` (15-bit field; ``name`` in words)."""

    def __init__(self, message: str, status: int, errno: int) -> None:
        super().__init__(message, errno)
        self.status = status
        self.name = status_name(status)


class Operation:
    """See the head of the module. ``finish`` runs once, when the last request has ended; ``wake`` after it."""

    def __init__(
        self, what: str, nsid: int, requests: list[Request], buffer: DmaBuffer | None, opcode: int | None = None
    ) -> None:
        self.what = what
        self.nsid = nsid
        self.requests = requests
        self.opcode = opcode
        self.left = len(requests)
        self.next = 0
        self.error: DmakitError | None = None
        self.buffer = buffer
        self.finish: Callable[[], None] | None = None
        self.wake: Callable[[], None] | None = None
        if buffer is not None:
            buffer.busy += 1
        for request in requests:
            request.context = self

    @property
    def finished(self) -> bool:
        """Whether nothing of it is out any more."""
        return self.left == 0

    def settle(self, done: Done) -> None:
        """One request has ended."""
        if self.error is None and (done.error is not None or done.status & 0x7FF):
            self.error = done.error or self._refused(done)
        self._ended(1)

    def _refused(self, done: Done) -> IoError:
        request = done.request
        code = _ERRNO.get(done.blk_status, 5)
        where = f"sector {request.sector}, {request.payload_bytes} bytes" if request.payload_bytes else request.op.name
        return IoError(f"{self.what}: {where}: {done.text}", done.status, code)

    def abandon(self, error: DmakitError | None = None) -> None:
        """The requests that were not submitted yet never will be."""
        if error is not None and self.error is None:
            self.error = error
        rest = len(self.requests) - self.next
        self.next = len(self.requests)
        if rest:
            self._ended(rest)

    def _ended(self, count: int) -> None:
        self.left -= count
        if self.left:
            return
        if self.buffer is not None:
            self.buffer.busy -= 1
        if self.finish is not None:
            self.finish()
        if self.wake is not None:
            self.wake()

    @property
    def differs(self) -> bool:
        """Whether it ended because Compare found a difference."""
        return isinstance(self.error, IoError) and self.error.status & 0x7FF == Status.COMPARE_FAILURE

    def check(self) -> None:
        """Raise what went wrong."""
        if self.error is not None:
            raise self.error
