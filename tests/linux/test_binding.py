"""Who drives a device: listing, taking, giving back; refused while somebody uses it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from dmakit.cli.main import run
from dmakit.errors import DmakitError, HostError
from dmakit.platform.linux import binding, pci
from dmakit.platform.linux.holders import open_nodes
from dmakit.platform.linux.kernel import Kernel
from tests.linux.worlds import EDU, NVME, host
from tests.support.vfio.host import FakeHost

CONTROLLER = f"/sys/devices/pci0000:00/{NVME}/nvme/nvme0"
DISK = f"{CONTROLLER}/nvme0n1"  # the controller is a class device: no directory named block between
ENOMEDIUM = 123


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


def world() -> FakeHost:
    """The controller with two namespaces, the first one partitioned."""
    fake = bound()
    for path, number in ((DISK, "259:0"), (f"{DISK}/nvme0n1p1", "259:1"), (f"{DISK}/nvme0n1p2", "259:2")):
        fake.blocks.add(path, number)
    fake.blocks.add(f"{CONTROLLER}/nvme0n2", "259:3")
    return fake


def refused(fake: FakeHost, bdf: str = NVME) -> str:
    """What ``bind`` says; nothing has changed, and nothing is kept."""
    claimed = list(fake.blocks.claimed)
    with pytest.raises(HostError) as caught:
        binding.bind(fake, bdf)
    assert caught.value.errno_name == "EBUSY" and str(caught.value).startswith(f"{bdf} is in use: ")
    assert fake.devices[bdf].driver == "nvme" and not fake.notes and not fake.overrides
    assert fake.blocks.claimed == claimed and not fake.open_files
    return str(caught.value).removeprefix(f"{bdf} is in use: ")


def mount(fake: FakeHost, number: str, where: str, source: str, kind: str = "ext4", *options: str) -> None:
    """A line of mountinfo."""
    extra = "".join(f" {option}" for option in options)
    before = fake.files.get("/proc/self/mountinfo", "21 2 0:18 / /run rw,relatime - tmpfs none rw\n")
    fake.files["/proc/self/mountinfo"] = f"{before}22 21 {number} / {where} rw,relatime{extra} - {kind} {source} rw\n"


@pytest.mark.parametrize("claims", (True, False), ids=("root", "claims nothing"))
@pytest.mark.parametrize(
    "number, name, source, kind",
    [
        ("259:0", "nvme0n1", "/dev/nvme0n1", "ext4"),
        ("259:2", "nvme0n1p2", "/dev/root", "ext4"),
        ("259:3", "nvme0n2", "/dev/nvme0n2", "xfs"),
        ("0:41", "nvme0n1p2", "/dev/nvme0n1p2", "btrfs"),
        ("0:41", "nvme0n1p1", "/dev/disk/by-label/home", "btrfs"),  # a link: the node's number counts
    ],
)
def test_what_is_mounted_is_not_taken(number: str, name: str, source: str, kind: str, claims: bool) -> None:
    fake = world()
    fake.blocks.nodes["/dev/disk/by-label/home"] = "259:1"
    mount(fake, number, "/home", source, kind, "shared:1", "master:2")
    if claims:
        fake.blocks.claimed.append(name)
    assert refused(fake) == f"{name} is mounted at /home"
    fake.files["/proc/self/mountinfo"] = ""
    fake.blocks.claimed.clear()
    assert binding.bind(fake, NVME).driver == "vfio-pci" and not fake.open_files


def test_a_source_without_a_node_is_known_by_its_name_and_other_sources_are_not() -> None:
    fake = world()
    fake.blocks.nodes.clear()
    mount(fake, "0:50", "/net", "nvme0n1", "nfs")
    mount(fake, "0:41", "/home", "/dev/nvme0n1p1", "btrfs")
    assert refused(fake) == "nvme0n1p1 is mounted at /home"


def test_disks_of_other_buses_and_interfaces_are_found() -> None:
    above = f"/sys/devices/pci0000:00/{NVME}"
    for path in (
        f"{above}/virtio3/block/vda",
        f"{above}/host0/port-0:0/expander-0:0/port-0:0:1/expander-0:1/port-0:1:2/end_device-0:1:2"
        "/target0:0:1/0:0:1:0/block/sda",
        f"{above}/cciss0/c0d0/block/cciss!c0d0",
    ):
        fake = bound()
        fake.blocks.add(path, "8:0")
        name = path.rsplit("/", 1)[-1]
        fake.blocks.nodes = {f"/dev/{name.replace('!', '/')}": "8:0"}
        assert binding.uses(fake, NVME) == []
        fake.blocks.claimed.append(name)
        assert refused(fake) == f"{name} is held open exclusively"
    fake = bound()
    fake.blocks.links["/sys/class/net/eth0"] = f"{above}/net/eth0"
    fake.blocks.links["/sys/class/net/lo"] = "/sys/devices/virtual/net/lo"
    fake.files.update({f"{above}/net/eth0/flags": "0x1003", "/sys/devices/virtual/net/lo/flags": "0x9"})
    assert refused(fake) == "network interface eth0 is up"
    fake.files[f"{above}/net/eth0/flags"] = "0x1002"
    assert binding.bind(fake, NVME).driver == "vfio-pci"


def test_swap_and_what_is_stacked_on_a_disk_are_seen() -> None:
    fake = world()
    fake.files["/proc/swaps"] = "Filename Type Size Used Priority\n/dev/nvme0n1p1 partition 1 0 -2\n/swap file 1 0 -3"
    assert refused(fake) == "nvme0n1p1 is swap"
    fake.files["/proc/swaps"] = "Filename Type Size Used Priority\n"
    fake.blocks.stack("dm-0", "254:0", f"{DISK}/nvme0n1p1", f"{DISK}/nvme0n1p2")
    assert refused(fake) == "nvme0n1p1 is held by dm-0; nvme0n1p2 is held by dm-0"
    fake.blocks.stack("md0", "9:0", "/sys/devices/virtual/block/dm-0")
    mount(fake, "9:0", "/var", "/dev/md0")
    assert refused(fake) == "md0 is mounted at /var"


def test_a_multipath_disk_is_its_head() -> None:
    head = "/sys/devices/virtual/nvme-subsystem/nvme-subsys3/nvme3n1"
    fake = bound()
    fake.blocks.add(f"{CONTROLLER}/nvme3c0n1")  # hidden: no number, no node
    fake.blocks.add(f"/sys/devices/pci0000:00/{EDU}/nvme/nvme1/nvme3c1n1")
    fake.blocks.add(head, "259:1")
    fake.blocks.add(f"{head}/nvme3n1p1", "259:2")
    fake.blocks.add("/sys/devices/virtual/nvme-subsystem/nvme-subsys2/nvme2n1", "259:5")
    mount(fake, "259:5", "/other", "/dev/nvme2n1")
    fake.blocks.claimed.append("nvme2n1")
    assert binding.uses(fake, NVME) == []
    mount(fake, "259:2", "/srv", "/dev/nvme3n1p1")
    assert refused(fake) == "nvme3n1p1 is mounted at /srv"
    del fake.files["/proc/self/mountinfo"]
    fake.blocks.claimed.append("nvme3n1p1")
    assert refused(fake) == "nvme3n1 is held open exclusively"
    fake.blocks.claimed.remove("nvme3n1p1")
    assert binding.bind(fake, NVME).driver == "vfio-pci"


@pytest.mark.parametrize("held", ("nvme0n1", "nvme0n1p2", "nvme0n2"))
def test_what_is_held_open_exclusively_is_not_taken(held: str) -> None:
    fake = world()
    fake.blocks.claimed.append(held)
    assert binding.uses(fake, NVME) == []  # which only reads
    assert refused(fake) == f"{held} is held open exclusively"


def test_the_disks_are_claimed_until_their_driver_is_gone() -> None:
    fake, store, claimed = world(), FakeHost.store, {}

    def watched(path: str, text: str) -> None:
        claimed[path.rsplit("/", 1)[-1]] = list(fake.blocks.claimed)
        store(fake, path, text)

    fake.store = watched  # type: ignore[method-assign]
    binding.bind(fake, NVME)
    assert claimed["unbind"] == claimed["driver_override"] == ["nvme0n1", "nvme0n2"] and claimed["drivers_probe"] == []


@pytest.mark.parametrize("number", (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV, ENOMEDIUM))
def test_a_node_that_cannot_be_opened_is_not_in_use(number: int) -> None:
    fake = world()
    fake.blocks.refusals["/dev/nvme0n1"] = number
    assert binding.bind(fake, NVME).driver == "vfio-pci"


def test_links_and_nodes_of_the_real_kernel(tmp_path: Path) -> None:
    kernel, link = Kernel(), tmp_path / "link"
    link.symlink_to("/dev")
    assert kernel.real(f"{link}/null") == "/dev/null"
    assert [kernel.device_number(path) for path in (f"{link}/null", "/dev/not-there", str(tmp_path))] == ["", "", ""]
    for name in kernel.names("/sys/class/block"):
        assert kernel.device_number(f"/dev/{name}") in ("", kernel.text(f"/sys/class/block/{name}/dev"))


def test_a_shortage_is_no_answer() -> None:
    fake = world()
    fake.blocks.refusals["/dev/nvme0n2"] = errno.EMFILE
    with pytest.raises(HostError, match="^open"):
        binding.bind(fake, NVME)
    assert fake.devices[NVME].driver == "nvme" and not fake.notes and not fake.overrides and not fake.open_files


def test_a_binding_that_fails_puts_the_driver_back() -> None:
    for nth in range(6):  # two disks to claim, a note, three files of sysfs
        fake = world()
        fake.fail.arm(nth)
        with pytest.raises(DmakitError):
            binding.bind(fake, NVME)
        assert fake.devices[NVME].driver == "nvme" and not fake.notes, nth
        assert fake.overrides.get(NVME, "(null)") == "(null)", nth
        assert not fake.open_files and not fake.blocks.claimed, nth
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


def holding(fake: FakeHost, node: str) -> None:
    """Process 77 has a node open, beside other things; so has a process that is gone when its name is read."""
    fake.files["/proc/77/comm"] = "qemu"
    for at, (pid, where) in enumerate(((77, "/dev/null"), (77, node), (77, node), (9, node), (78, "/dev/vfio/vfio"))):
        fake.blocks.links[f"/proc/{pid}/fd/{at}"] = where


def test_holders_are_read_from_the_links_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is not followed (its server may be dead); what may not be seen, or is closed by now, is nobody's."""
    plain, look = os.readlink, os.lstat

    def readlink(path: Any) -> str:
        if str(path) in unseen:
            raise unseen[str(path)]
        return "/dev/vfio/7" if plain(path) == str(node) else plain(path)

    def lstat(path: Any, **options: Any) -> os.stat_result:
        assert not str(path).startswith((str(tmp_path), "/dev/vfio/")), f"{path}: followed"
        return look(path, **options)

    node, *others = (tmp_path / name for name in ("node", "secret", "shut"))
    with node.open("w"), others[0].open("w") as secret, others[1].open("w") as shut:
        own = f"/proc/{os.getpid()}/fd"
        unseen = {
            f"{own}/{secret.fileno()}": PermissionError(errno.EACCES, "Permission denied"),
            f"{own}/{shut.fileno()}": FileNotFoundError(errno.ENOENT, "No such file or directory"),
        }
        monkeypatch.setattr(os, "readlink", readlink)
        monkeypatch.setattr(os, "lstat", lstat)
        found = open_nodes(Kernel())
        monkeypatch.undo()
    assert found["/dev/vfio/7"] == [f"process {os.getpid()} ({Path('/proc/self/comm').read_text().strip()})"]


@pytest.mark.parametrize(
    ("node", "how"),
    [("/dev/vfio/devices/vfio1", "is held by"), ("/dev/vfio/4", "its group 4 is held by")],
    ids=["iommufd", "type1"],
)
def test_unbind_names_who_holds_the_device_and_waits_when_told(
    node: str, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = bound("vfio-pci")
    fake.has_iommufd = True
    holding(fake, node)
    held = f"{how} process 77 (qemu); {how} process 9 (gone)"
    with pytest.raises(HostError) as caught:
        binding.unbind(fake, NVME)
    assert caught.value.errno == errno.EBUSY and str(caught.value) == (
        f"{NVME} {held}: end it, or have the kernel ask for the device and wait until it is closed (unbind --wait)"
    )
    assert fake.devices[NVME].driver == "vfio-pci"
    monkeypatch.setattr("dmakit.platform.linux.kernel.Kernel", lambda: fake)
    assert run(["vfio", "list"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith(held)]
    assert run(["vfio", "unbind", EDU]) == 0  # nobody holds that one
    capsys.readouterr()
    assert run(["vfio", "unbind", "--wait", NVME]) == 0
    assert capsys.readouterr().err == f"dmakit: {NVME} {held}: waiting until it is closed\n"
    assert fake.devices[NVME].driver == "nvme"


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fake = world()
    mount(fake, "259:0", "/home", "/dev/nvme0n1")
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
    del fake.files["/proc/self/mountinfo"]
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
