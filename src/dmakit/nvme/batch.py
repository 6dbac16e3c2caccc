"""Many small I/Os at once: arrays in, arrays out, on a queue pair of its own.

For memory that is registered already (``DmaBuffer.address``), so that an I/O is an entry in a ring and nothing else:
``submit`` writes the entries and rings once, ``complete`` takes what has ended. Both run without the GIL and without a
Python object an I/O; a 64-bit *tag* says which is which.

A command that a reset ended comes out of ``complete`` with status HOST_ABORTED (0x371); whether to issue it again is
the caller's decision. Commands that are not completed in time lead to a reset (``nvme.recovery``), as everywhere.
"""

from __future__ import annotations

from array import array

from dmakit.errors import ExhaustedError, MisuseError
from dmakit.nvme.driver import NvmeDriver
from dmakit.nvme.pool import words_of
from dmakit.nvme.rings import QueuePair
from dmakit.nvme.spec import PAGE, Io, Status

_OPCODES = {"read": int(Io.READ), "write": int(Io.WRITE), "compare": int(Io.COMPARE)}


def pointers(addresses: memoryview[int] | array[int], size: int) -> tuple[array[int], array[int]]:
    """PRP1 and PRP2 of transfers of ``size`` bytes at device addresses; each must fit into two PRPs."""
    first, second = array("Q", addresses), array("Q", bytes(8 * len(addresses)))
    for at, addr in enumerate(first):
        room = PAGE - addr % PAGE
        if size > room + PAGE or addr & 3:
            raise MisuseError(f"{size} bytes at {addr:#x}: two PRPs reach the end of the next page, from a dword on")
        second[at] = addr + room if size > room else 0
    return first, second


class BatchQueue:
    """A reserved queue pair of ``driver`` for namespace ``nsid``; ``depth`` commands at most in flight."""

    def __init__(self, driver: NvmeDriver, nsid: int) -> None:
        self.driver = driver
        self.space = driver.space(nsid)
        self.lost: list[int] = []
        self.pair: QueuePair = driver.reserve(self)
        self.core = self.pair.core
        self.depth = self.pair.entries - 1
        self._slots = memoryview(array("Q", bytes(8 * self.pair.entries)))
        self._results = memoryview(array("Q", bytes(8 * self.pair.entries)))

    def lose(self, tags: list[int]) -> None:
        """See ``rings.Owner``."""
        self.lost += tags

    @property
    def in_flight(self) -> int:
        """Commands that ``complete`` has not handed out."""
        return self.core.in_flight + len(self.lost)

    def submit(
        self,
        op: str,
        lbas: memoryview[int],
        counts: memoryview[int],
        low: memoryview[int],
        high: memoryview[int],
        tags: memoryview[int],
    ) -> int:
        """Submit ``read``, ``write`` or ``compare`` commands; returns how many found room (the first ones).

        64-bit words: first blocks, numbers of blocks, PRP1, PRP2 (``pointers``), tags. Blocks past the namespace are
        the controller's to refuse.
        """
        driver = self.driver
        if driver.dead is not None or self.pair.retired:
            driver.started()
            raise ExhaustedError("batch: the controller granted fewer queues after a reset, and this one is gone", 19)
        opcode = _OPCODES.get(op)
        if opcode is None:
            raise MisuseError(f"op={op!r}: must be one of {', '.join(_OPCODES)}")
        deadline = driver.transport.now() + driver.timeout_ns
        return self.core.submit(opcode, self.space.nsid, lbas, counts, low, high, tags, deadline=deadline)

    def complete(self, tags: memoryview[int], statuses: memoryview[int], *, wait_ns: int = 0) -> int:
        """Take what has ended: tags and 15-bit status fields (0 = success); returns how many.

        When nothing has, waits once for up to ``wait_ns`` and sees after the controller's health.
        """
        room = len(words_of("tags", tags))
        if self.lost:
            return self._hand_out_lost(words_of("tags", tags), words_of("statuses", statuses, room))
        found = self._reap(tags, statuses)
        if found == 0 and wait_ns:
            self.driver.transport.wait(wait_ns)
            found = self._reap(tags, statuses)
        if found == 0 or self.driver.recovery.due():
            self._look_after()
        return found

    def _reap(self, tags: memoryview[int], statuses: memoryview[int]) -> int:
        n = min(len(tags), len(self._slots))
        return self.core.reap(self._slots[:n], tags, statuses, self._results)

    def _look_after(self) -> None:
        driver = self.driver
        if driver.dead is not None:
            if not self.lost:
                raise driver.dead
        elif self.pair.lie:
            driver.recovery.recover(self.pair.lie)
        else:
            driver.recovery.check()

    def _hand_out_lost(self, tags: memoryview[int], statuses: memoryview[int]) -> int:
        count = min(len(tags), len(self.lost))
        for at in range(count):
            tags[at], statuses[at] = self.lost[at], int(Status.HOST_ABORTED)
        del self.lost[:count]
        return count
