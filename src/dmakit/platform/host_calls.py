"""System calls that tell what this host can do: each tries the real thing on memory of its own and undoes it.

``HostCalls`` answers with 0 or more (it works) or ``-errno``. Numbers and layouts are those of the kernel's uAPI:
``linux/fs.h`` (PAGEMAP_SCAN), ``linux/userfaultfd.h``, ``linux/io_uring.h``, ``linux/kvm.h``, ``linux/vfio.h``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import struct
from pathlib import Path

PAGE = mmap.PAGESIZE
_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
_IO_URING_SETUP = 425  # on every architecture
_UFFD_USER_MODE_ONLY = 1
_UFFD_API = 0xAA
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_WRITEPROTECT = 0xC018AA3F, 0xC020AA00, 0xC018AA06
_UFFD_NEW = 0xAA00  # ioctl of /dev/userfaultfd
_WP_UNPOPULATED, _WP_ASYNC = 1 << 13, 1 << 15
_REGISTER_WP = 2
_PAGEMAP_SCAN = 0xC0606610
_PAGE_IS_WRITTEN = 2
_KVM_GET_API_VERSION = 0xAE00
_VFIO_CHECK_EXTENSION = 0x3B65
_VFIO_TYPE1V2 = 3


class HostCalls:
    """The real calls. A test gives another object with the same methods."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long

    def _syscall(self, number: int, *arguments: int | ctypes.c_void_p) -> int:
        given = [
            argument if isinstance(argument, ctypes.c_void_p) else ctypes.c_long(argument) for argument in arguments
        ]
        found = int(self._libc.syscall(ctypes.c_long(number), *given))
        return -ctypes.get_errno() if found < 0 else found

    def pagemap_scan(self) -> int:
        """Run PAGEMAP_SCAN over a page of our own."""
        with mmap.mmap(-1, PAGE) as memory:
            memory[0] = 1
            return self._scan(_address(memory), PAGE)[0]

    @staticmethod
    def _scan(start: int, size: int) -> tuple[int, int]:
        """(ranges found or -errno, first written page) of PAGEMAP_SCAN for written pages."""
        found = (ctypes.c_uint64 * 3)()
        request = struct.pack(
            "12Q",
            96,
            0,
            start,
            start + size,
            0,
            ctypes.addressof(found),
            1,
            0,
            0,
            _PAGE_IS_WRITTEN,
            0,
            _PAGE_IS_WRITTEN,
        )
        try:
            fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            return -(error.errno or errno.EIO), 0
        try:
            count = fcntl.ioctl(fd, _PAGEMAP_SCAN, bytearray(request), True)
        except OSError as error:
            return -(error.errno or errno.EIO), 0
        finally:
            os.close(fd)
        return count, (found[0] - start) // PAGE if count else 0

    def userfaultfd(self) -> int:
        """Open a userfaultfd, by the system call or the device; the descriptor."""
        number = _USERFAULTFD.get(platform.machine())
        answer = -errno.ENOSYS
        for flags in (0, _UFFD_USER_MODE_ONLY):
            answer = self._syscall(number, os.O_CLOEXEC | flags) if number else answer
            if answer >= 0:
                return answer
        try:
            device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return answer
        try:
            return int(fcntl.ioctl(device, _UFFD_NEW, os.O_CLOEXEC))
        except OSError as error:
            return -(error.errno or errno.EIO)
        finally:
            os.close(device)

    def dirty_canary(self) -> int:
        """Write-protect 4 pages asynchronously, write the third, and see that PAGEMAP_SCAN finds exactly that one.

        0 when it does, -EIO when it finds anything else.
        """
        fd = self.userfaultfd()
        if fd < 0:
            return fd
        try:
            with mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
                memory[:] = b"x" * (4 * PAGE)
                start = _address(memory)
                _ioctl(fd, _UFFDIO_API, "3Q", _UFFD_API, _WP_ASYNC | _WP_UNPOPULATED, 0)
                _ioctl(fd, _UFFDIO_REGISTER, "4Q", start, 4 * PAGE, _REGISTER_WP, 0)
                _ioctl(fd, _UFFDIO_WRITEPROTECT, "3Q", start, 4 * PAGE, 1)
                clean, _ = self._scan(start, 4 * PAGE)
                memory[2 * PAGE] = 1
                dirty, page = self._scan(start, 4 * PAGE)
            return 0 if (clean, dirty, page) == (0, 1, 2) else min(clean, dirty, -errno.EIO)
        except OSError as error:
            return -(error.errno or errno.EIO)
        finally:
            os.close(fd)

    def io_uring(self) -> int:
        """Set up a ring of one entry and close it."""
        parameters = ctypes.create_string_buffer(120)
        fd = self._syscall(_IO_URING_SETUP, 1, ctypes.cast(parameters, ctypes.c_void_p))
        if fd >= 0:
            os.close(fd)
        return min(fd, 0)

    def kvm(self, path: Path) -> int:
        """The version of the KVM interface at ``path``."""
        return self._asked(path, _KVM_GET_API_VERSION)

    def type1(self, path: Path) -> int:
        """Whether the VFIO container at ``path`` has TYPE1v2 (1) or not (0)."""
        return self._asked(path, _VFIO_CHECK_EXTENSION, _VFIO_TYPE1V2)

    def opens(self, path: Path) -> int:
        """Whether a device file can be opened for reading and writing."""
        return self._asked(path, None)

    @staticmethod
    def _asked(path: Path, number: int | None, argument: int = 0) -> int:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            return -(error.errno or errno.EIO)
        try:
            return 0 if number is None else int(fcntl.ioctl(fd, number, argument))
        except OSError as error:
            return -(error.errno or errno.EIO)
        finally:
            os.close(fd)


def _address(memory: mmap.mmap) -> int:
    view = ctypes.c_char.from_buffer(memory)
    try:
        return ctypes.addressof(view)
    finally:
        del view  # an exported buffer cannot be closed


def _ioctl(fd: int, number: int, layout: str, *words: int) -> None:
    fcntl.ioctl(fd, number, bytearray(struct.pack(layout, *words)), True)
