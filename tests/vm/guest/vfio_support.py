"""What the guest's VFIO tests share: the devices bound, what is pinned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmakit import vfio
from tests.vm.guest import support

BACKENDS, NVME, EDU = support.BACKENDS, support.NVME[0], support.EDU
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
