"""A new IOMMU domain for a device, while a recording runs: the allocator's whole life is then in the trace.

The kernel makes a group's default domain anew when its type changes (``iommu_group_store_type``), which it allows while
no driver is bound in the group. So the type goes to ``identity`` and back to what it was. Nothing else changes.
"""

from __future__ import annotations

import os
from pathlib import Path

from dmakit.errors import HostError, InputError

_TRANSLATED = ("DMA", "DMA-FQ")


class FreshDomain:
    """The group of ``device``; ``check`` before the recording, ``renew`` in it."""

    def __init__(self, device: str, root: Path = Path("/")) -> None:
        self.device = device
        self.groups = root / "sys/kernel/iommu_groups"
        self.kind = ""
        self.group = Path()

    def check(self) -> None:
        """InputError unless the device has a translated domain and nobody uses it."""
        found = [path.parents[1] for path in self.groups.glob(f"*/devices/{self.device}")]
        if not found or "/" in self.device:
            raise InputError(f"--fresh {self.device}: no device of this name is in an IOMMU group")
        self.group = found[0]
        self.kind = (self.group / "type").read_text().strip()
        if self.kind not in _TRANSLATED:
            raise InputError(f"--fresh {self.device}: its domain is of type {self.kind}: no IOVA is allocated in it")
        for path in sorted((self.group / "devices").iterdir()):
            if (path / "driver").exists():
                driver = (path / "driver").resolve().name
                raise InputError(
                    f"--fresh {self.device}: {path.name} of its group is bound to {driver}: unbind it first, "
                    "and bind it again in the recorded command"
                )

    def renew(self) -> None:
        """Make the domain anew. HostError when the kernel refuses."""
        for kind in ("identity", self.kind):
            try:
                fd = os.open(self.group / "type", os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.write(fd, kind.encode())
                finally:
                    os.close(fd)
            except OSError as error:
                back = f"; put it back: echo {self.kind} > {self.group}/type" if kind == self.kind else ""
                raise HostError(f"{self.group}/type: write {kind}: {error.strerror}{back}", error.errno or 5) from error
