"""Who drives a device: listing, taking, giving back; refused while somebody uses it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmakit.cli.main import run
from dmakit.errors import DmakitError, HostError
from dmakit.platform.linux import binding, pci
from tests.linux.worlds import EDU, NVME, host
from tests.support.vfio.host import FakeHost

DISK = f"/sys/bus/pci/devices/{NVME}/nvme/nvme0/nvme0n1/block/nvme0n1"


def bound(driver: str = "nvme") -> FakeHost:
    fake = host()
    fake.devices[NVME].driver = driver
    return fake


def test_bind_and_unbind_are_each_others_opposite() -> None:
    fake = bound()
    fake.overrides[NVME] = "(null)"
    assert binding.bind(fake, NVME).driver == "vfio-pci"
    assert fake.overrides[NVME] == "vfio-pci" and fake.notes == {f"/run/dmakit/vfio/{NVME}": "nvme\n\n"}
    assert binding.bind(fake, NVME).driver == "vfio-pci"  # again: nothing happens
    assert binding.unbind(fake, NVME).driver == "nvme"
    assert fake.overrides[NVME] == "(null)" and fake.notes == {}


def test_a_device_without_a_driver_and_with_an_override_goes_back_to_that() -> None:
    fake = bound("")
    fake.overrides[NVME] = "special"
    binding.bind(fake, NVME)
    assert fake.notes == {f"/run/dmakit/vfio/{NVME}": "\nspecial\n"}
    binding.unbind(fake, NVME)
    assert fake.overrides[NVME] == "special"


@pytest.mark.parametrize(
    "files, reason",
    [
        ({f"{DISK}/dev": "259:0", "/proc/self/mountinfo": "1 0 259:0 / /home rw - ext4 /dev/nvme0n1 rw"},
         "nvme0n1 is mounted at /home"),
        ({f"{DISK}/dev": "259:0", f"{DISK}/nvme0n1p2/partition": "2", f"{DISK}/nvme0n1p2/dev": "259:2",
          "/proc/self/mountinfo": "1 0 259:2 / / rw - ext4 /dev/root rw"}, "nvme0n1p2 is mounted at /"),
        ({f"{DISK}/holders/dm-0/x": "", "/sys/class/block/dm-0/dev": "254:0",
          "/proc/self/mountinfo": "1 0 254:0 / /var rw - ext4 /dev/mapper/v rw"}, "dm-0 is mounted at /var"),
        ({f"{DISK}/dev": "259:0", "/proc/swaps": "Filename Type\n/dev/nvme0n1 partition 1 0 -2"}, "nvme0n1 is swap"),
        ({f"/sys/bus/pci/devices/{NVME}/net/eth0/flags": "0x1003"}, "network interface eth0 is up"),
    ],
)  # fmt: skip
def test_what_is_in_use_is_not_taken(files: dict[str, str], reason: str) -> None:
    fake = bound()
    fake.files.update(files)
    with pytest.raises(HostError) as caught:
        binding.bind(fake, NVME)
    assert str(caught.value) == f"{NVME} is in use: {reason}" and caught.value.errno_name == "EBUSY"
    assert fake.devices[NVME].driver == "nvme" and not fake.notes and not fake.overrides


def test_an_interface_that_is_down_and_an_idle_disk_may_be_taken() -> None:
    fake = bound()
    fake.files.update({f"{DISK}/dev": "259:0", f"/sys/bus/pci/devices/{NVME}/net/eth0/flags": "0x1002"})
    assert binding.uses(fake, NVME) == [] and binding.bind(fake, NVME).driver == "vfio-pci"


def test_a_binding_that_fails_puts_the_driver_back() -> None:
    for nth in range(4):
        fake = bound()
        fake.fail.arm(nth)
        with pytest.raises(DmakitError):
            binding.bind(fake, NVME)
        assert fake.devices[NVME].driver == "nvme" and not fake.notes, nth
        assert fake.overrides.get(NVME, "(null)") == "(null)", nth
    fake = bound()
    fake.takes = lambda device: False  # type: ignore[method-assign]
    with pytest.raises(HostError) as caught:
        binding.bind(fake, NVME)
    assert str(caught.value) == f"{NVME}: vfio-pci did not take the device (see dmesg); nvme is back"
    assert fake.devices[NVME].driver == "nvme"


def test_unbind_leaves_other_drivers_alone_and_bind_needs_the_module() -> None:
    fake = bound()
    with pytest.raises(HostError) as caught:
        binding.unbind(fake, NVME)
    assert str(caught.value) == f"{NVME} is not bound to vfio-pci but to nvme"
    fake.drivers = {"nvme": True}
    with pytest.raises(HostError) as missing:
        binding.bind(fake, NVME)
    assert str(missing.value) == "this kernel has no vfio-pci driver: modprobe vfio-pci (as root), or build it in"
    fake.drivers = {"vfio-pci": False}
    assert binding.bind(fake, NVME).driver == "vfio-pci"  # loaded on the way


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fake = bound()
    fake.files[f"{DISK}/dev"] = "259:0"
    fake.files["/proc/self/mountinfo"] = "1 0 259:0 / /home rw - ext4 /dev/nvme0n1 rw"
    monkeypatch.setattr("dmakit.platform.linux.kernel.Kernel", lambda: fake)
    assert run(["vfio", "list", "--json", str(tmp_path / "list.json")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "device        class         ids        group driver       notes",
        "0000:00:04.0  NVMe          1b36:0010      4 nvme         nvme0n1 is mounted at /home",
        "0000:00:05.0  unclassified  1234:11e8      5 vfio-pci",
    ]
    rows = json.loads((tmp_path / "list.json").read_text())
    assert rows[0]["uses"] == ["nvme0n1 is mounted at /home"] and rows[1]["cdev"] == "/dev/vfio/devices/vfio0"
    assert run(["vfio", "bind", "00:04.0"]) == 2
    assert capsys.readouterr().err == f"dmakit: {NVME} is in use: nvme0n1 is mounted at /home\n"
    fake.files.clear()
    assert run(["vfio", "bind", "00:04.0"]) == 0 and run(["vfio", "bind", NVME]) == 0
    assert run(["vfio", "unbind", NVME]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{NVME}: nvme -> vfio-pci",
        f"{NVME}: bound to vfio-pci already",
        f"{NVME}: vfio-pci -> nvme",
    ]
    fake.root = False
    assert run(["vfio", "bind", NVME]) == 2
    assert "EACCES: no permission: run as root" in capsys.readouterr().err
    assert run(["vfio", "unbind", "nonsense"]) == 2
    for device in fake.devices.values():
        device.group = -1
    assert run(["vfio", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("no device is behind an IOMMU:")


def test_ids_and_groups_are_read() -> None:
    fake = host()
    assert [(d.bdf, d.vendor, d.kind, d.group) for d in pci.scan(fake)] == [
        (NVME, 0x1B36, "NVMe", 4), (EDU, 0x1234, "unclassified", 5),
    ]  # fmt: skip
