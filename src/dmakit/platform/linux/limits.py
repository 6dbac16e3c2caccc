"""Limits that the host's kernel sets to pinned memory, asked before it refuses.

A device's memory cannot be paged out, so the kernel *pins* what is mapped and charges it, up to RLIMIT_MEMLOCK, unless
the process has CAP_IPC_LOCK. Whom it charges depends on the interface, and each account has the whole limit:

* type1 charges the process (``mm->locked_vm``, VmLck in /proc/self/status), where mlock and every other container of
  the process count as well. That is read each time a pin is wanted under a limit.
* iommufd charges the *user* (``user->locked_vm``; IOMMU_OPTION_RLIMIT_MODE could change that for the whole host). No
  file shows it, and VmPin holds pins of others that are charged elsewhere (RDMA). So what all machines of this process
  pinned is counted (``Kernel.user``): a lower bound. What the user's other processes pinned, and io_uring's registered
  buffers, only the kernel knows, and says it with ENOMEM.

Models ``vfio_lock_acct`` in ``drivers/vfio/vfio_iommu_type1.c`` and ``do_update_pinned`` in
``drivers/iommu/iommufd/pages.c``.
"""

from __future__ import annotations

import errno

from dmakit.errors import ExhaustedError
from dmakit.platform.linux.kernel import Kernel


class PinLedger:
    """Bytes that one machine has pinned, and the limit that applies (None: no limit)."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.limit = kernel.memlock()
        self.pinned = 0


class Pins:
    """What one address space has pinned, charged to the process: given back as a whole at its end."""

    def __init__(self, ledger: PinLedger) -> None:
        self.ledger = ledger
        self.own = 0

    def charged(self) -> int:
        """Bytes on the account that the kernel holds against the limit, as far as they can be known."""
        return self.ledger.kernel.locked()

    def check(self, size: int, call: str) -> None:
        """ExhaustedError (ENOMEM) when ``size`` more bytes would exceed the limit, which may have been raised since."""
        ledger = self.ledger
        if ledger.limit is None or (charged := self.charged()) + size <= ledger.limit:
            return
        ledger.limit = ledger.kernel.memlock()
        if ledger.limit is None or charged + size <= ledger.limit:
            return
        raise ExhaustedError(
            f"{call} of {size:#x} bytes: {charged:#x} bytes are locked and the limit is"
            f" {ledger.limit:#x} (RLIMIT_MEMLOCK): raise it with 'ulimit -l unlimited', memlock in"
            " /etc/security/limits.conf, LimitMEMLOCK= of a systemd service, or run with CAP_IPC_LOCK",
            errno.ENOMEM,
        )

    def add(self, size: int) -> None:
        """``size`` bytes more are pinned (negative: fewer)."""
        self.own += size
        self.ledger.pinned += size

    def close(self) -> None:
        """The address space is gone, and every pin with it."""
        self.add(-self.own)


class UserPins(Pins):
    """The same, charged to the user."""

    def charged(self) -> int:
        """What all machines of this process have on the user's account."""
        return self.ledger.kernel.user.bytes

    def add(self, size: int) -> None:
        """``size`` bytes more are pinned (negative: fewer)."""
        super().add(size)
        self.ledger.kernel.user.add(size)
