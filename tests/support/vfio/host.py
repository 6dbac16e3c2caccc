"""``FakeHost``: the kernel boundary of platform/linux, answered by models in this process."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Any

from dmakit.errors import HostError
from dmakit.platform.linux.kernel import Kernel, UserAccount, host_error
from dmakit.platform.linux.uapi import IOCTLS
from tests.support.vfio.blocks import Blocks
from tests.support.vfio.container import ContainerFile
from tests.support.vfio.devices import FakeDevice
from tests.support.vfio.files import File, IommuFile
from tests.support.vfio.opened import DeviceFile, GroupFile
from tests.support.vfio.pages import Accounts

VTD_RANGES = [(0, 0xFEDFFFFF), (0xFEF00000, (1 << 48) - 1)]
PCI = "/sys/bus/pci"


class FakeHost(Kernel):
    """A host with these devices. ``type1``/``iommufd``: what its kernel has; ``memlock``: bytes that may be pinned.

    ``ranges``: IOVAs that the IOMMU allows; ``entry_limit`` of a container; ``dirty``: hardware dirty tracking;
    ``extra_tables``: page tables without devices can be made (staging); ``maps_files``; ``dma_bufs``."""

    def __init__(
        self, devices: Iterable[FakeDevice] = (), *, type1: bool = True, iommufd: bool = True,
        memlock: int | None = None, ranges: list[tuple[int, int]] | None = None, entry_limit: int = 65535,
        dirty: bool = False, extra_tables: bool = True, maps_files: bool = True, dma_bufs: bool = True,
        root: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.devices = {device.bdf: device for device in devices}
        self.has_type1, self.has_iommufd, self.root = type1, iommufd, root
        self.ranges = VTD_RANGES if ranges is None else ranges
        self.account = Accounts(memlock)
        self.user = UserAccount()
        self.entry_limit, self.dirty, self.extra_tables = entry_limit, dirty, extra_tables
        self.maps_files, self.dma_bufs = maps_files, dma_bufs
        self.open_files: dict[int, File] = {}
        self.drivers = {"vfio-pci": True, "nvme": True}
        self.overrides: dict[str, str] = {}
        self.files: dict[str, str] = {}
        self.blocks = Blocks(self)
        self.notes: dict[str, str] = {}
        self.next_fd = 1_000_000
        self.calls: list[str] = []
        self.bars: list[tuple[int, int]] = []

    # descriptors

    def new_fd(self, file: File) -> int:
        self.next_fd += 1
        self.open_files[self.next_fd] = file
        return self.next_fd

    def viable(self, group: int) -> bool:
        return all(
            d.driver in ("vfio-pci", "") or d.class_code >> 16 == 6 for d in self.devices.values() if d.group == group
        )

    def is_device_memory(self, va: int) -> bool:
        return any(low <= va < high for low, high in self.bars)

    def _open(self, path: str, flags: int) -> File | None:
        if path == "/dev/iommu" and self.has_iommufd:
            return IommuFile(self)
        if path == "/dev/vfio/vfio" and self.has_type1:
            return ContainerFile(self)
        name = path.rsplit("/", 1)[-1]
        if path.startswith("/dev/vfio/devices/") and self.has_iommufd:
            number = int(name.removeprefix("vfio"))
            return DeviceFile(self, list(self.devices.values())[number], cdev=True)
        if path.startswith("/dev/vfio/") and name.isdigit() and self.has_type1:
            if any(isinstance(f, GroupFile) and f.number == int(name) for f in self.open_files.values()):
                raise host_error("open", errno.EBUSY, f"({path})")
            return GroupFile(self, int(name))
        return self.blocks.open(path, flags)

    def open(self, path: str, flags: int = os.O_RDWR) -> int:
        if not path.startswith("/dev/"):
            return super().open(path, flags)
        self._ask("open", f"({path})")
        if not self.root:
            raise host_error("open", errno.EACCES, f"({path})")
        file = self._open(path, flags)
        if file is None:
            raise host_error("open", errno.ENOENT, f"({path})")
        return self.new_fd(file)

    def close(self, fd: int) -> None:
        file = self.open_files.pop(fd, None)
        if file is None:
            super().close(fd)
        else:
            file.release()

    def kill(self) -> None:
        """What the kernel does when the process dies: every descriptor is closed, in order of number."""
        for fd in sorted(self.open_files):
            self.close(fd)

    def ioctl(self, fd: int, name: str, data: bytearray | int = 0) -> int:
        file = self.open_files.get(fd)
        if file is None:
            return super().ioctl(fd, name, data)
        self._ask(name)
        self.calls.append(name)
        try:
            return file.ioctl(IOCTLS[name], data)
        except OSError as error:
            raise host_error(name, error.errno or errno.EIO) from error

    def _device(self, fd: int) -> FakeDevice:
        file = self.open_files[fd]
        assert isinstance(file, DeviceFile)
        return file.device

    def read_at(self, fd: int, size: int, offset: int) -> bytes:
        if fd not in self.open_files:
            return super().read_at(fd, size, offset)
        return self._device(fd).read(offset >> 40, offset & (1 << 40) - 1, size).to_bytes(size, "little")

    def write_at(self, fd: int, data: bytes, offset: int) -> None:
        if fd not in self.open_files:
            super().write_at(fd, data, offset)
            return
        device, at = self._device(fd), offset & (1 << 40) - 1
        device.write(offset >> 40, at, int.from_bytes(data, "little"), len(data))

    def map_at(self, address: int, size: int, fd: int, offset: int) -> None:
        if fd not in self.open_files:
            super().map_at(address, size, fd, offset)
            return
        region = self._device(fd).regions[offset >> 40]
        super().map_at(address, size, region.fd, offset & (1 << 40) - 1)
        self.bars.append((address, address + size))

    # sysfs

    def _pci(self, path: str) -> tuple[FakeDevice | None, str]:
        parts = path.removeprefix(f"{PCI}/devices/").split("/", 1)
        return self.devices.get(parts[0]), parts[1] if len(parts) > 1 else ""

    def real(self, path: str) -> str:
        return self.blocks.real(path)

    def target(self, path: str) -> str:
        return self.blocks.links.get(path, "")

    def device_number(self, path: str) -> str:
        return self.blocks.nodes.get(path, "")

    def text(self, path: str) -> str | None:
        path = self.real(path)
        if path in self.files or path in self.notes:
            return self.files.get(path, self.notes.get(path))
        if path == "/proc/self/status" or not path.startswith(("/sys/", "/proc/", "/run/")):
            return super().text(path)
        device, what = self._pci(path)
        if device is None:
            return None
        return {
            "vendor": f"{device.ids[0]:#06x}",
            "device": f"{device.ids[1]:#06x}",
            "class": f"{device.class_code:#08x}",
            "resource": device.resource,
            "driver_override": self.overrides.get(device.bdf, "(null)"),
        }.get(what)

    def link(self, path: str) -> str:
        device, what = self._pci(path)
        if device is not None and what == "driver":
            return device.driver
        if device is not None and what == "iommu_group":
            return str(device.group) if device.group >= 0 else ""
        return ""

    def names(self, path: str) -> list[str]:
        if path == f"{PCI}/devices":
            return sorted(self.devices)
        if path.startswith("/sys/kernel/iommu_groups/"):
            group = int(path.split("/")[4])
            return sorted(bdf for bdf, device in self.devices.items() if device.group == group)
        device, what = self._pci(path)
        if device is not None and what == "vfio-dev":
            here = self.has_iommufd and device.driver == "vfio-pci"
            return [f"vfio{list(self.devices).index(device.bdf)}"] if here else []
        return self.blocks.names(path)

    def exists(self, path: str) -> bool:
        if path.startswith("/dev/"):
            here = {"/dev/iommu": self.has_iommufd, "/dev/vfio/vfio": self.has_type1}
            return here.get(path, False)
        if path.startswith(f"{PCI}/drivers/"):
            return self.drivers.get(path.split("/")[5], False)
        device, what = self._pci(path)
        return (device is not None and not what) or self.real(path) in self.files

    def store(self, path: str, text: str) -> None:
        self._ask("write", f"({path})")
        if not self.root:
            raise host_error("write", errno.EACCES, f"({text.strip()!r} to {path})")
        device, what = self._pci(path)
        if device is not None and what == "driver_override":
            self.overrides[device.bdf] = text.strip() or "(null)"
        elif device is not None and what == "driver/unbind":
            device.driver = ""
        elif path == f"{PCI}/drivers_probe":
            found = self.devices[text]
            wanted = self.overrides.get(text, "(null)")
            if not found.driver:
                found.driver = self.natural(found) if wanted == "(null)" else wanted if self.takes(found) else ""
        elif path.startswith(f"{PCI}/drivers/"):
            self.devices[text].driver = path.split("/")[5]
        else:
            raise HostError(f"write({path}): no such file", errno.ENOENT)

    def natural(self, device: FakeDevice) -> str:
        return "nvme" if device.class_code == 0x010802 else ""

    def takes(self, device: FakeDevice) -> bool:
        return True

    def remember(self, path: str, text: str) -> None:
        self._ask("write", f"({path})")
        self.notes[path] = text

    def forget(self, path: str) -> None:
        self.notes.pop(path, None)

    def load_module(self, name: str) -> None:
        if name in self.drivers:
            self.drivers[name] = True

    def memlock(self) -> int | None:
        return self.account.limit

    def locked(self) -> int:
        return self.account.process.bytes

    # what tests ask

    def left(self) -> dict[str, Any]:
        """Descriptors open, bytes pinned: nothing, when all was given back."""
        return {"files": len(self.open_files), "pinned": self.account.bytes}
