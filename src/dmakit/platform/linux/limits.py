"""Limits that the host's kernel sets to pinned memory, asked before it refuses.

A device's memory cannot be paged out, so the kernel *pins* what is mapped and charges it to the process, up to
RLIMIT_MEMLOCK, unless it has CAP_IPC_LOCK. What this process pinned before is in /proc/self/status (``VmLck``: type1
charges it as locked memory). ``PinLedger`` counts what this machine pins on top.
"""

from __future__ import annotations

import errno

from dmakit.errors import ExhaustedError
from dmakit.platform.linux.kernel import Kernel


class PinLedger:
    """Bytes that one machine has pinned, and the limit that applies."""

    def __init__(self, kernel: Kernel) -> None:
        self.limit = kernel.memlock()
        self.before = int(kernel.status().get("VmLck", "0 kB").split()[0]) * 1024
        self.pinned = 0

    def check(self, size: int, call: str) -> None:
        """ExhaustedError (ENOMEM) when ``size`` more bytes would exceed the limit."""
        if self.limit is None or self.before + self.pinned + size <= self.limit:
            return
        raise ExhaustedError(
            f"{call} of {size:#x} bytes: {self.before + self.pinned:#x} bytes are locked and the limit is"
            f" {self.limit:#x} (RLIMIT_MEMLOCK): raise it with 'ulimit -l unlimited', memlock in"
            " /etc/security/limits.conf, LimitMEMLOCK= of a systemd service, or run with CAP_IPC_LOCK",
            errno.ENOMEM,
        )


class Pins:
    """What one address space has pinned: its share of the machine's ledger, given back as a whole at its end."""

    def __init__(self, ledger: PinLedger) -> None:
        self.ledger = ledger
        self.check = ledger.check
        self.own = 0

    def add(self, size: int) -> None:
        """``size`` bytes more are pinned (negative: fewer)."""
        self.own += size
        self.ledger.pinned += size

    def close(self) -> None:
        """The address space is gone, and every pin with it."""
        self.add(-self.own)
