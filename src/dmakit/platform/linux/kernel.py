"""The boundary to the host's Linux: every system call of this room goes through one ``Kernel``.

A ``Kernel`` opens, maps, reads and asks; nothing else here imports ``os``. Each call that can fail asks the machine's
fail point first (as if the kernel had said ENOMEM) and turns an ``OSError`` into a ``HostError`` that names the call,
the errno and what most likely causes it. Calls that give something back (``close``, unmapping) never fail: an error on
the way out must not keep the rest from being released.

Tests put another ``Kernel`` in its place, which answers for ``/dev/vfio`` and ``/dev/iommu`` and passes ordinary
memory, memfds and eventfds on to the real one.

Paths are absolute (``/dev/vfio/vfio``, ``/sys/bus/pci/devices/…``).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import stat
import subprocess
import threading
from pathlib import Path
from typing import Any

from dmakit.errors import HostError
from dmakit.failpoint import FailPoint
from dmakit.platform.eventfds import Eventfds
from dmakit.platform.huge_pages import shared_huge
from dmakit.platform.linux.uapi import IOCTLS

MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MFD_CLOEXEC, MFD_HUGETLB = 1, 4
MADV_HUGEPAGE = 14
CAP_IPC_LOCK = 14

_CAUSES = {
    ("VFIO_IOMMU_MAP_DMA", errno.ENOMEM): "the limit on locked memory, most likely: raise it (ulimit -l)",
    ("VFIO_IOMMU_MAP_DMA", errno.ENOSPC): "the container is full: raise dma_entry_limit of vfio_iommu_type1",
    ("VFIO_IOMMU_MAP_DMA", errno.EFAULT): "the memory cannot be pinned",
    ("VFIO_IOMMU_MAP_DMA", errno.EEXIST): "something is mapped at this IOVA",
    ("VFIO_IOMMU_MAP_DMA", errno.EINVAL): "IOVA, address or size is not aligned, or outside the allowed ranges",
    ("VFIO_GROUP_SET_CONTAINER", errno.EPERM): "the platform cannot remap interrupts: intremap=off? load vfio_iommu_"
    "type1 with allow_unsafe_interrupts=1 if you trust the device",
    ("VFIO_SET_IOMMU", errno.EPERM): "interrupts cannot be remapped here: load vfio_iommu_type1 with"
    " allow_unsafe_interrupts=1 if you trust the device",
    ("VFIO_GROUP_GET_DEVICE_FD", errno.EINVAL): "the device is not bound to vfio-pci, or not in this group",
    ("VFIO_DEVICE_BIND_IOMMUFD", errno.EINVAL): "the device is in use by another process",
    ("VFIO_DEVICE_BIND_IOMMUFD", errno.EBUSY): "the device is in use by another process",
    ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", errno.EPERM): "interrupts cannot be remapped here: set"
    " iommufd.allow_unsafe_interrupts=1 if you trust the device",
    ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", errno.EADDRINUSE): "something is mapped where this device has a reserved window",
    ("IOMMU_IOAS_MAP", errno.ENOMEM): "the limit on locked memory, most likely: raise it (ulimit -l)",
    ("IOMMU_IOAS_MAP_FILE", errno.ENOMEM): "the limit on locked memory, most likely: raise it (ulimit -l)",
    ("IOMMU_IOAS_MAP", errno.EEXIST): "something is mapped at this IOVA",
    ("IOMMU_IOAS_COPY", errno.EEXIST): "something is mapped at this IOVA",
    ("IOMMU_IOAS_MAP_FILE", errno.EEXIST): "something is mapped at this IOVA",
    ("IOMMU_IOAS_UNMAP", errno.ENOENT): "nothing is mapped there, or the range cuts a mapping",
    ("open", errno.EACCES): "no permission: run as root, or give yourself the file",
    ("open", errno.EPERM): "no permission: run as root, or give yourself the file",
    ("open", errno.ENOENT): "there is no such file: modprobe vfio-pci; a container must be given /dev/vfio",
    ("open", errno.EBUSY): "another process has it open",
    ("open", errno.ENODEV): "nobody answers behind it: is the module loaded?",
    ("write", errno.EACCES): "no permission: run as root",
    ("write", errno.EROFS): "the file system is read-only (a container?)",
}


def host_error(call: str, number: int, what: str = "") -> HostError:
    """The exception for a system call that the host refused: call, errno, likely cause."""
    name = errno.errorcode.get(number, str(number))
    cause = _CAUSES.get((call, number)) or _CAUSES.get((call.split("(")[0], number)) or os.strerror(number)
    return HostError(f"{call}{what}: {name}: {cause}", number)


def address_of(buffer: Any) -> int:
    """The address of a writable buffer's first byte; the caller keeps the buffer."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class UserAccount:
    """Bytes that this process knows to be charged to its user; all machines of the process count in it."""

    def __init__(self) -> None:
        self.bytes = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        """``size`` bytes more (negative: fewer)."""
        with self._lock:
            self.bytes += size


class Kernel(Eventfds):
    """The host's kernel. ``fail`` is shared with the machine, ``user`` by all machines of the process."""

    user = UserAccount()

    def __init__(self, fail: FailPoint | None = None) -> None:
        super().__init__(fail)
        libc = ctypes.CDLL(None, use_errno=True)
        self._mmap = libc.mmap
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
        self._mremap = libc.mremap
        self._mremap.restype = ctypes.c_void_p
        self._mremap.argtypes = (*(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t), ctypes.c_int, ctypes.c_void_p)
        self._madvise = libc.madvise
        self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def _ask(self, call: str, what: str = "") -> None:
        if self.fail.hit():
            raise host_error(call, errno.ENOMEM, what)

    # Files ---------------------------------------------------------------------------------------------------

    def open(self, path: str, flags: int = os.O_RDWR) -> int:
        """A file descriptor, closed on exec."""
        self._ask("open", f"({path})")
        try:
            return os.open(path, flags | os.O_CLOEXEC)
        except OSError as error:
            raise host_error("open", error.errno or errno.EIO, f"({path})") from error

    def ioctl(self, fd: int, name: str, data: bytearray | int = 0) -> int:
        """One ioctl by name; a bytearray is changed in place. Returns what the kernel returns (≥ 0)."""
        self._ask(name)
        try:
            return int(fcntl.ioctl(fd, IOCTLS[name], data, True) if isinstance(data, bytearray) else
                       fcntl.ioctl(fd, IOCTLS[name], data))  # fmt: skip
        except OSError as error:
            raise host_error(name, error.errno or errno.EIO) from error

    def read_at(self, fd: int, size: int, offset: int) -> bytes:
        """``pread`` of exactly ``size`` bytes."""
        try:
            data = os.pread(fd, size, offset)
        except OSError as error:
            raise host_error("pread", error.errno or errno.EIO, f"(offset {offset:#x})") from error
        if len(data) != size:
            raise HostError(f"pread(offset {offset:#x}): {len(data)} bytes of {size}")
        return data

    def write_at(self, fd: int, data: bytes, offset: int) -> None:
        """``pwrite`` of all of ``data``."""
        try:
            done = os.pwrite(fd, data, offset)
        except OSError as error:
            raise host_error("pwrite", error.errno or errno.EIO, f"(offset {offset:#x})") from error
        if done != len(data):
            raise HostError(f"pwrite(offset {offset:#x}): {done} bytes of {len(data)}")

    # Memory --------------------------------------------------------------------------------------------------

    def memfd(self, name: str, size: int, *, huge: bool = False) -> int:
        """A sparse memory file of ``size`` bytes; ``huge``: of the host's huge pages."""
        self._ask("memfd_create")
        try:
            fd = os.memfd_create(name, MFD_CLOEXEC | (MFD_HUGETLB if huge else 0))
        except OSError as error:
            raise host_error("memfd_create", error.errno or errno.EIO) from error
        try:
            os.ftruncate(fd, size)
        except OSError as error:
            os.close(fd)
            raise host_error("ftruncate", error.errno or errno.EIO, f"({size} bytes)") from error
        return fd

    def map_at(self, address: int, size: int, fd: int, offset: int) -> None:
        """Map [offset, offset + size) of a file, shared, over what is mapped at ``address``."""
        self._ask("mmap")
        flags = MAP_SHARED | MAP_FIXED
        if self._mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset) != address:
            raise host_error("mmap", ctypes.get_errno(), f"({size:#x} bytes at offset {offset:#x})")

    def unmap_at(self, address: int, size: int) -> None:
        """Put fresh lazy memory in the place of whatever is mapped at ``address``."""
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
        self._mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)

    def alias(self, address: int, size: int, target: int) -> bool:
        """Map the shared memory at ``address`` a second time at ``target``; False when it is private memory."""
        return bool(self._mremap(address, 0, size, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target)

    def prefer_huge(self, address: int, size: int) -> bool:
        """Ask for transparent huge pages in shared memory; False when the host gives none."""
        given = shared_huge(lambda path: self.text(f"/{path}")).given
        return bool(self._madvise(address, size, MADV_HUGEPAGE) == 0) and given

    def touch(self, address: int) -> None:
        """Read a byte, so that its page is allocated as this process's mapping asks (huge or not)."""
        ctypes.c_ubyte.from_address(address).value  # noqa: B018

    # sysfs and proc ------------------------------------------------------------------------------------------

    def text(self, path: str) -> str | None:
        """The content of a small file without the newline at its end, None when there is no such file."""
        try:
            return Path(path).read_text(errors="replace").rstrip("\n")
        except OSError:
            return None

    def store(self, path: str, text: str) -> None:
        """Write to a sysfs file."""
        self._ask("write", f"({path})")
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise host_error("write", error.errno or errno.EIO, f"({text.strip()!r} to {path})") from error

    def names(self, path: str) -> list[str]:
        """What a directory holds, sorted; nothing when it is not there."""
        try:
            return sorted(entry.name for entry in Path(path).iterdir())
        except OSError:
            return []

    def target(self, path: str) -> str:
        """What a symbolic link says, not looked at any further; empty when there is none, or it may not be read."""
        try:
            return str(Path(path).readlink())
        except OSError:
            return ""

    def link(self, path: str) -> str:
        """The last part of what a symbolic link points to; empty when there is none."""
        return self.target(path).rsplit("/", 1)[-1]

    def real(self, path: str) -> str:
        """The path with every symbolic link in it followed."""
        return os.path.realpath(path)

    def device_number(self, path: str) -> str:
        """The ``major:minor`` of a block device's node, through links; empty when the path is none."""
        try:
            status = Path(path).stat()
        except OSError:
            return ""
        return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" if stat.S_ISBLK(status.st_mode) else ""

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        return Path(path).exists()

    def remember(self, path: str, text: str) -> None:
        """Keep a note in a file that other processes of this host find."""
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text)
        except OSError as error:
            raise host_error("write", error.errno or errno.EIO, f"({path})") from error

    def forget(self, path: str) -> None:
        """Remove such a note."""
        Path(path).unlink(missing_ok=True)

    def load_module(self, name: str) -> None:
        """Load a kernel module if the host can; no error when it cannot (what needs it says so)."""
        with contextlib.suppress(OSError):
            subprocess.run(["modprobe", name], check=False, capture_output=True)

    # Limits --------------------------------------------------------------------------------------------------

    def memlock(self) -> int | None:
        """Bytes that this process may lock (RLIMIT_MEMLOCK); None when nothing limits it."""
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if limit == resource.RLIM_INFINITY or int(self._status("CapEff"), 16) >> CAP_IPC_LOCK & 1:
            return None
        return limit

    def locked(self) -> int:
        """Bytes that the kernel holds against that limit for this process (VmLck): type1's pins, mlock."""
        return int(self._status("VmLck").split()[0]) * 1024

    def _status(self, field: str) -> str:
        """A field of /proc/self/status, 0 when there is none; nothing else is read: every pin under a limit asks."""
        try:
            fd = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # no /proc here
            return "0"
        try:
            text = os.read(fd, 1 << 14).decode(errors="replace")
        finally:
            os.close(fd)
        at = text.find(f"\n{field}:")
        return text[at + len(field) + 2 : text.find("\n", at + 1)].strip() if at >= 0 else "0"
