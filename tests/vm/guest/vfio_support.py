"""What the guest's VFIO tests share: the devices bound, what is pinned."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmakit import vfio

KERNEL = os.environ.get("DMAKIT_VM_KERNEL", "")
IOMMU = os.environ.get("DMAKIT_VM_IOMMU", "")
BACKENDS = ("type1", "iommufd") if KERNEL == "iommufd" else ("type1",)
NVME, EDU = "0000:00:04.0", "0000:00:10.0"
PAGE = 4096


@contextmanager
def bound(*devices: str) -> Iterator[None]:
    """The devices are VFIO's meanwhile."""
    for bdf in devices:
        vfio.bind(bdf)
    try:
        yield
    finally:
        for bdf in devices:
            vfio.unbind(bdf)


def pinned() -> int:
    """Bytes that the kernel has charged to this process: pinned (iommufd) and locked (type1)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return 1024 * (int(fields["VmPin"].split()[0]) + int(fields["VmLck"].split()[0]))
