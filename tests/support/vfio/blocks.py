"""A host's block devices as Linux shows them: sysfs with its links, nodes in /dev, exclusive claims.

Where things lie was read off a 6.12 kernel: NVMe disks directly below their controller (a class device, so there is no
``block`` directory between), others below ``block``, multipath heads below ``/sys/devices/virtual/nvme-subsystem``
while their paths, hidden and without number or node, lie below the controllers; partitions below their disk; all of
them linked to from ``/sys/class/block``. A disk and a partition of it cannot be claimed both (``bd_may_claim``).
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from dmakit.platform.linux.kernel import host_error
from tests.support.vfio.files import File

if TYPE_CHECKING:
    from tests.support.vfio.host import FakeHost

CLASS = "/sys/class/block"


class BlockFile(File):
    """An open block device, which may be claimed."""

    def __init__(self, host: FakeHost, claim: str) -> None:
        super().__init__(host)
        self.claim = claim

    def close(self) -> None:
        if self.claim:
            self.host.blocks.claimed.remove(self.claim)


class Blocks:
    """``files``: the host's, by real path; ``links``: path to real path; ``nodes``: path in /dev to number;
    ``claimed``: names of the kernel that something holds exclusively; ``refusals``: node to another errno."""

    def __init__(self, host: FakeHost) -> None:
        self.host = host
        self.links: dict[str, str] = {}
        self.nodes: dict[str, str] = {}
        self.claimed: list[str] = []
        self.refusals: dict[str, int] = {}

    def add(self, path: str, number: str = "") -> str:
        """A disk at its real path, or a partition below its disk; hidden without a number."""
        above, name = path.rsplit("/", 1)
        self.links[f"{CLASS}/{name}"] = path
        self.host.files[f"{path}/hidden"] = str(int(not number))
        if number:
            self.host.files[f"{path}/dev"] = number
            self.nodes[f"/dev/{name}"] = number
        if self.links.get(f"{CLASS}/{above.rsplit('/', 1)[-1]}") == above:
            self.host.files[f"{path}/partition"] = name[-1]
        return path

    def stack(self, name: str, number: str, *below: str) -> None:
        """A device mapper or md device upon others: it claims them and is listed as their holder."""
        path = self.add(f"/sys/devices/virtual/block/{name}", number)
        for under in below:
            self.links[f"{under}/holders/{name}"] = path
            self.claimed.append(under.rsplit("/", 1)[-1])

    def real(self, path: str) -> str:
        """The path with its links followed."""
        done = ""
        for part in path.strip("/").split("/"):
            done = self.links.get(f"{done}/{part}", f"{done}/{part}")
        return done

    def names(self, path: str) -> list[str]:
        """What a directory holds."""
        start = f"{self.real(path)}/"
        below = [name for name in (*self.host.files, *self.links) if name.startswith(start)]
        return sorted({name[len(start) :].split("/")[0] for name in below})

    def _collides(self, name: str, claimed: str) -> bool:
        one, other = (f"{self.links[f'{CLASS}/{each}']}/" for each in (name, claimed))
        return one.startswith(other) or other.startswith(one)

    def open(self, path: str, flags: int) -> BlockFile | None:
        """The file of a node; None when there is none."""
        if path in self.refusals:
            raise host_error("open", self.refusals[path], f"({path})")
        number = self.nodes.get(path)
        if number is None:
            return None
        files = self.host.files
        name = next(name for name in self.names(CLASS) if files.get(f"{self.real(f'{CLASS}/{name}')}/dev") == number)
        if not flags & os.O_EXCL:
            return BlockFile(self.host, "")
        if any(self._collides(name, claimed) for claimed in self.claimed):
            raise host_error("open", errno.EBUSY, f"({path})")
        self.claimed.append(name)
        return BlockFile(self.host, name)
