"""Eventfds: the counters through which a PCI function's interrupts reach its driver.

The software machine needs no more of the host than this; ``linux.kernel.Kernel`` adds the rest. Each asks the machine's
fail point before it takes something (as if the kernel had said ENOMEM); giving back never fails.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
from collections.abc import Sequence

from dmakit.errors import HostError
from dmakit.failpoint import FailPoint


class Eventfds:
    """Makes, waits for and closes them; ``fail`` is shared with the machine."""

    def __init__(self, fail: FailPoint | None = None) -> None:
        self.fail = FailPoint() if fail is None else fail

    def eventfd(self) -> int:
        """A counter that a device's interrupt adds to."""
        try:
            if self.fail.hit():
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            number = error.errno or errno.EIO
            raise HostError(f"eventfd: {errno.errorcode[number]}: {os.strerror(number)}", number) from error

    def take_events(self, fd: int, timeout: float | None, others: Sequence[int] = ()) -> int:
        """Events since the last call, waiting up to ``timeout`` seconds (None: for ever) for the first; 0 = none.

        The wait also ends when one of the ``others`` can be read. (Not by select(), which knows no number above 1023.)
        """
        if timeout is None or timeout > 0:
            ready = select.poll()
            for one in (fd, *others):
                ready.register(one, select.POLLIN)
            ready.poll(None if timeout is None else 1000 * timeout)
        try:
            return os.eventfd_read(fd)
        except BlockingIOError:
            return 0

    def close(self, fd: int) -> None:
        """Give a file descriptor back."""
        with contextlib.suppress(OSError):
            os.close(fd)
