"""Block-layer statuses (``blk_status_t``) and the map from errnos to them.

Models ``include/linux/blk_types.h`` and the table in ``block/blk-core.c``: a mapping that fails returns an errno,
the block layer tells its caller one of these. ``RESOURCE`` means "try again later", everything else ends the I/O.
"""

from __future__ import annotations

import errno
from enum import IntEnum


class BlkStatus(IntEnum):
    """``BLK_STS_*``, with the kernel's values."""

    OK = 0
    NOTSUPP = 1
    TIMEOUT = 2
    NOSPC = 3
    TRANSPORT = 4
    TARGET = 5
    RESV_CONFLICT = 6
    MEDIUM = 7
    PROTECTION = 8
    RESOURCE = 9
    IOERR = 10
    DM_REQUEUE = 11
    AGAIN = 12
    DEV_RESOURCE = 13
    OFFLINE = 16
    DURATION_LIMIT = 17
    INVAL = 19


_BY_ERRNO = {
    0: BlkStatus.OK,
    errno.EOPNOTSUPP: BlkStatus.NOTSUPP,
    errno.ETIMEDOUT: BlkStatus.TIMEOUT,
    errno.ENOSPC: BlkStatus.NOSPC,
    errno.ENOLINK: BlkStatus.TRANSPORT,
    errno.EREMOTEIO: BlkStatus.TARGET,
    errno.EBADE: BlkStatus.RESV_CONFLICT,
    errno.ENODATA: BlkStatus.MEDIUM,
    errno.EILSEQ: BlkStatus.PROTECTION,
    errno.ENOMEM: BlkStatus.RESOURCE,
    errno.EAGAIN: BlkStatus.AGAIN,
    errno.ENODEV: BlkStatus.OFFLINE,
    errno.ETIME: BlkStatus.DURATION_LIMIT,
    errno.EINVAL: BlkStatus.INVAL,
}


def errno_to_blk_status(code: int) -> BlkStatus:
    """The status for a positive or negative errno; what the table does not name is an I/O error."""
    return _BY_ERRNO.get(abs(code), BlkStatus.IOERR)
