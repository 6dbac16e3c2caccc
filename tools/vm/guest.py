"""What one boot does: the second initramfs (init, PID 1 of the guest, the command) and the folders of the job."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.vm import cpio
from tools.vm.machine import Machine

HERE = Path(__file__).parent
ENVIRONMENT = {
    "PYTHONPATH": "/opt/dmakit:/mnt/checkout",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
    "DMAKIT_CORE": "compiled",
}


def initramfs(machine: Machine, command: Sequence[str], environment: Mapping[str, str], terminal: bool) -> bytes:
    """The job's archive: ``command`` run with ``environment`` (and DMAKIT_VM_KERNEL, DMAKIT_VM_IOMMU)."""
    told = {"DMAKIT_VM_KERNEL": machine.kernel, "DMAKIT_VM_IOMMU": machine.iommu}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in {**ENVIRONMENT, **told, **environment}.items()]
    lines += ["stty sane"] if terminal else []
    lines += [f"exec {shlex.join(command)}"]
    return cpio.archive(
        {
            "init": cpio.script((HERE / "init.sh").read_text()),
            "sysroot": cpio.folder(),
            "job": cpio.folder(),
            "job/share": cpio.folder(),
            "job/guest": cpio.script((HERE / "guest.sh").read_text()),
            "job/command": cpio.script("\n".join(lines) + "\n"),
        }
    )
