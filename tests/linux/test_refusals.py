"""Every command that takes a real controller, on a host that does not give it: one sentence, the remedy, status 2."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dmakit.cli.main import run
from dmakit.platform.linux.kernel import host_error
from tests.support.vfio.devices import FakeNvme
from tests.support.vfio.host import FakeHost

BDF = "0000:00:04.0"
WORKLOAD = "bs=16k,iodepth=2,frag=1,n=20"
COMMANDS = {
    "identify": ["nvme", "identify"],
    "read": ["nvme", "read"],
    "write": ["nvme", "write", "INPUT", "--yes"],
    "verify": ["nvme", "verify", "--size", "64K", "--yes"],
    "perf": ["nvme", "perf", "--seconds", "0.05"],
    "compare": ["compare", WORKLOAD, "--yes"],
    "explain": ["explain", WORKLOAD, "--yes"],
}
DENIED = "EACCES: no permission: run as root, or give yourself the file"
MISSING = "ENOENT: there is no such file: modprobe vfio-pci; a container must be given /dev/vfio"
NEITHER = "this kernel has neither iommufd nor VFIO type1: modprobe vfio-pci (CONFIG_VFIO)"


class Host(FakeHost):
    """A host that answers ``refused`` (an errno) to who opens ``path``, or anything when ``path`` is empty."""

    def __init__(self, path: str = "", refused: int = 0, **options: bool) -> None:
        super().__init__([FakeNvme(BDF, 4)], **options)
        self.path, self.refused = path, refused

    def open(self, path: str, flags: int = os.O_RDWR) -> int:
        if path == self.path:
            raise host_error("open", self.refused, f"({path})")
        return super().open(path, flags)


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """A command's words, up to the backend."""
    (tmp_path / "in").write_bytes(b"abc")
    words = [str(tmp_path / "in") if word == "INPUT" else word for word in COMMANDS[request.param]]
    return [*words, "--platform", f"vfio:{BDF}"]


@pytest.mark.parametrize(
    ("fake", "backend", "message"),
    [
        (Host(root=False), "type1", f"open(/dev/vfio/vfio): {DENIED}"),
        (Host(root=False), "iommufd", f"open(/dev/iommu): {DENIED}"),
        (Host("/dev/vfio/4", errno.EACCES), "type1", f"open(/dev/vfio/4): {DENIED}"),
        (Host("/dev/vfio/4", errno.ENOENT), "type1", f"open(/dev/vfio/4): {MISSING}"),
        (Host("/dev/vfio/devices/vfio0", errno.EACCES), "auto", f"open(/dev/vfio/devices/vfio0): {DENIED}"),
        (Host("/dev/vfio/devices/vfio0", errno.ENOENT), "auto", f"open(/dev/vfio/devices/vfio0): {MISSING}"),
        (Host(type1=False, iommufd=False), "auto", NEITHER),
        (Host(type1=False), "type1", f"backend='type1': this kernel does not offer it for {BDF} (/dev/vfio/vfio is"
         " missing: modprobe vfio)"),
        (Host(iommufd=False), "iommufd", f"backend='iommufd': this kernel does not offer it for {BDF} (needs"
         " CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV); use backend='type1'"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)  # fmt: skip
def test_a_host_that_does_not_give_the_device(
    command: list[str],
    fake: Host,
    backend: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dmakit.platform.linux.machine.Kernel", lambda: fake)
    assert run([*command, "--backend", backend]) == 2
    assert capsys.readouterr() == ("", f"dmakit: {message}\n")
    assert fake.left() == {"files": 0, "pinned": 0}


@pytest.mark.parametrize(
    ("driver", "group", "message"),
    [
        ("nvme", 4, f"{BDF} is driven by nvme: bind it first: dmakit vfio bind {BDF}"),
        ("vfio-pci", -1, f"{BDF}: not behind an IOMMU: enable it in the firmware, or boot with intel_iommu=on (Intel)"),
        (None, 4, f"{BDF}: this host has no such PCI device; see: dmakit vfio list"),
    ],
)
def test_a_device_that_is_not_vfios(
    command: list[str],
    driver: str | None,
    group: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = Host()
    fake.devices[BDF].group = group
    if driver is None:
        fake.devices.clear()
    else:
        fake.devices[BDF].driver = driver
    monkeypatch.setattr("dmakit.platform.linux.machine.Kernel", lambda: fake)
    assert run(command) == 2
    assert capsys.readouterr() == ("", f"dmakit: {message}\n")
    assert fake.left() == {"files": 0, "pinned": 0}
