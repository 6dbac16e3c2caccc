"""tracefs as a recording uses it: a handful of operations on named files, so that a test can stand in for the kernel.

Paths are relative to the mount point (``instances/x/tracing_on``). Every operation raises OSError as the kernel gives
it. ``MountedTracefs`` is the real one. Its files want a bare ``open(2)``: Python's mode ``"a"`` seeks, which they
refuse, and ``"w"`` truncates, which in ``dynamic_events`` removes everybody's events.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Protocol

from dmakit.errors import HostError, UnsupportedError

MOUNT_POINTS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")
REMEDY = "mount -t tracefs tracefs /sys/kernel/tracing"


class Pipe(Protocol):
    """The consuming end of a ring buffer (``trace_pipe``)."""

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes of whole lines; empty when the buffer is."""

    def close(self) -> None:
        """Let go of it."""


class Lock(Protocol):
    """An exclusive lock on a directory; the kernel drops it when its holder dies."""

    def release(self) -> None:
        """Give it up."""


class Tracefs(Protocol):
    """What a recording does to tracefs."""

    where: str

    def read(self, path: str) -> str:
        """The whole text of a file."""

    def write(self, path: str, text: str) -> None:
        """One write(2); nothing is truncated."""

    def clear(self, path: str) -> None:
        """Truncate a file; of a ``trace``, that empties the ring buffers."""

    def names(self, path: str) -> list[str]:
        """The entries of a directory, sorted."""

    def exists(self, path: str) -> bool:
        """Whether there is such a file or directory."""

    def make(self, path: str) -> None:
        """Make a directory: an instance."""

    def remove(self, path: str) -> None:
        """Remove an instance; EBUSY while a file of it is open."""

    def lock(self, path: str, *, wait: bool) -> Lock | None:
        """Lock a directory; None when another holds it and ``wait`` is off."""

    def pipe(self, path: str) -> Pipe:
        """Open a ``trace_pipe`` that does not wait for events."""


class _Descriptor:
    """A file descriptor that is closed once."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    release = close

    def read(self, size: int) -> bytes:
        try:
            return os.read(self.fd, size)
        except BlockingIOError:
            return b""


class MountedTracefs:
    """The tracefs mounted at ``where``."""

    def __init__(self, where: str | Path) -> None:
        self.where = str(where)

    def _path(self, path: str) -> str:
        return f"{self.where}/{path}"

    def read(self, path: str) -> str:
        fd = os.open(self._path(path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = []
            while part := os.read(fd, 1 << 16):
                parts.append(part)
        finally:
            os.close(fd)
        return b"".join(parts).decode("utf-8", "replace")

    def write(self, path: str, text: str) -> None:
        fd = os.open(self._path(path), os.O_WRONLY | os.O_CLOEXEC)
        try:
            data = text.encode()
            if os.write(fd, data) != len(data):
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        finally:
            os.close(fd)

    def clear(self, path: str) -> None:
        os.close(os.open(self._path(path), os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC))

    def names(self, path: str) -> list[str]:
        return sorted(os.listdir(self._path(path)))  # noqa: PTH208 (names, not paths)

    def exists(self, path: str) -> bool:
        return Path(self._path(path)).exists()

    def make(self, path: str) -> None:
        os.mkdir(self._path(path))  # noqa: PTH102

    def remove(self, path: str) -> None:
        os.rmdir(self._path(path))  # noqa: PTH106

    def lock(self, path: str, *, wait: bool) -> Lock | None:
        held = _Descriptor(os.open(self._path(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            fcntl.flock(held.fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BaseException as error:
            held.close()
            if isinstance(error, BlockingIOError):
                return None
            raise
        return held

    def pipe(self, path: str) -> Pipe:
        return _Descriptor(os.open(self._path(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))


def find_tracefs(where: str | None = None) -> MountedTracefs:
    """The tracefs at ``where``, or at one of the usual places.

    HostError with the remedy without the right to use it; UnsupportedError when there is none.
    """
    for place in (where,) if where else MOUNT_POINTS:
        try:
            Path(f"{place}/instances").stat()
        except PermissionError as error:
            raise HostError(f"{place}: recording needs root (the owner of tracefs): run it with sudo", 13) from error
        except OSError:
            continue
        if not os.access(f"{place}/instances", os.W_OK) or not os.access(f"{place}/tracing_on", os.W_OK):
            raise HostError(f"{place}: recording needs root (the owner of tracefs): run it with sudo", errno.EACCES)
        return MountedTracefs(place)
    if where:
        raise HostError(f"{where}: no tracefs is mounted there: {REMEDY}", errno.ENOENT)
    raise UnsupportedError(
        f"no tracefs at {' or '.join(MOUNT_POINTS)}: {REMEDY} (needs a kernel with CONFIG_TRACING)", errno.ENOENT
    )
