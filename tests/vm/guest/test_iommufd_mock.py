"""Dirty tracking where no emulated IOMMU has it: on iommufd's own mock devices (CONFIG_IOMMUFD_TEST)."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from dmakit.failpoint import FailPoint
from dmakit.ledger import Ledger
from dmakit.platform.linux.domain import HostDomain
from dmakit.platform.linux.iommufd import Ioas, Iommufd
from dmakit.platform.linux.kernel import Kernel, address_of
from dmakit.platform.linux.limits import PinLedger
from dmakit.platform.linux.space import SourceSpace
from dmakit.platform.linux.uapi import OPTION_HUGE_PAGES, OPTION_SET

PAGE = 4096
TEST_COMMAND = 0x3BA0
MOCK_DOMAIN_REPLACE, MOCK_DOMAIN_FLAGS, DIRTY = 10, 12, 13

pytestmark = pytest.mark.skipif(
    os.environ.get("DMAKIT_VM_KERNEL") != "iommufd" or not Path("/dev/iommu").exists(), reason="needs IOMMUFD_TEST"
)


def command(fd: int, op: int, number: int, body: bytes) -> bytearray:
    """IOMMU_TEST_CMD: a head of 16 bytes, a union of 48, one more word."""
    data = bytearray(struct.pack("=IIII48sII", 72, op, number, 0, body, 0, 0))
    fcntl.ioctl(fd, TEST_COMMAND, data, True)
    return data


def test_hardware_dirty_tracking() -> None:
    kernel = Kernel(FailPoint())
    space = SourceSpace(kernel, 4 << 20, bar_window=1 << 30, user_window=1 << 30)
    iommufd = Iommufd(kernel)
    backend = Ioas(iommufd, PinLedger(kernel), lambda: None)
    # One dirty entry marks its whole size, and contiguous memory gets larger entries: ask for pages.
    iommufd.call("IOMMU_OPTION", "iommu_option", option_id=OPTION_HUGE_PAGES, op=OPTION_SET, object_id=backend.number)
    stdev, _, device = struct.unpack_from("=III", command(iommufd.fd, MOCK_DOMAIN_FLAGS, backend.number, bytes(16)), 16)
    assert iommufd.tracks_dirty(device)
    table = backend.attach_target(device)
    assert table == backend.table and backend.dirty
    command(iommufd.fd, MOCK_DOMAIN_REPLACE, stdev, struct.pack("=I", table))
    domain = HostDomain(backend, space, Ledger(1), frozenset())
    ranges = domain.refresh()
    assert ranges == [(0x1000000, 0x7FFFFFFF)] and domain.capabilities.dirty
    base = 0x2000000
    domain.map(base, 2 << 20, 64 * PAGE, 3)
    domain.map(base + 128 * PAGE, 3 << 20, 64 * PAGE, 3)  # a hole between: the kernel would stop there in silence
    domain.set_dirty_tracking(True)
    for iova, pages in ((base, (0, 3, 63)), (base + 128 * PAGE, (1,))):
        marks = np.zeros(1, np.uint64)
        for page in pages:
            marks[0] |= np.uint64(1 << page)
        body = struct.pack("=IIQQQQQ", 0, 0, iova, 64 * PAGE, PAGE, address_of(marks), 0)
        found = command(iommufd.fd, DIRTY, table, body)
        assert struct.unpack_from("=Q", found, 16 + 40)[0] == len(pages)
    words = np.zeros(3, np.uint64)
    assert domain.read_and_clear_dirty(base, 192 * PAGE, words, flags=1) == 4
    assert [int(word) for word in words] == [1 | 1 << 3 | 1 << 63, 0, 2]
    again = np.zeros(3, np.uint64)
    assert domain.read_and_clear_dirty(base, 192 * PAGE, again) == 4
    assert domain.read_and_clear_dirty(base, 192 * PAGE, np.zeros(3, np.uint64)) == 0
    domain.unmap(base, 64 * PAGE)
    domain.unmap(base + 128 * PAGE, 64 * PAGE)
    iommufd.close()
    space.close()
