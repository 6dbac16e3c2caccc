"""A caller's own memory as a buffer of the machine: NumPy arrays, mmaps, memoryviews, without a copy.

Whole pages of the memory are made an object of the source space; what shares the first and the last page with it can
be reached by a device too while it is mapped, as always with pages. Shared memory (``mmap.mmap(-1, n)``, a file) has a
second place in the space and works like any buffer. Private memory stays where it is: the CPU side goes to it there,
and bounce slots, which are copied by ``phys``, cannot be used with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dmakit.errors import MisuseError, UnsupportedError
from dmakit.memory.buffers import Buffer

if TYPE_CHECKING:
    from types import TracebackType

    from dmakit.platform.linux.machine import Machine


class _Direct:
    """The CPU's way to private memory: the bytes themselves."""

    def __init__(self, start: int, array: Any) -> None:
        self.start, self.bytes = start, memoryview(array)

    def read(self, phys: int, size: int, /) -> bytes:
        return bytes(self.bytes[phys - self.start : phys - self.start + size])

    def write(self, phys: int, payload: bytes | bytearray | memoryview, /) -> None:
        size = memoryview(payload).nbytes
        self.bytes[phys - self.start : phys - self.start + size] = payload


class UserBuffer(Buffer):
    """``ranges`` holds the one range of the caller's memory; ``release`` (or leaving the ``with``) ends it."""

    def __init__(self, machine: Machine, memory: Any) -> None:
        made, phys = machine.space.add_user(memory)
        shared = made.region is not None
        if not shared and machine.swiotlb is not None:
            machine.space.remove(made)
            raise UnsupportedError(
                "register: private memory cannot be copied to bounce slots (swiotlb): use shared memory"
                " (mmap.mmap(-1, size), a memory file) or a machine without swiotlb"
            )
        self.machine, self.object, self.live = machine, made, True
        cpu = None if shared else _Direct(phys, made.kept)
        super().__init__(machine.memory, [(phys, made.kept.nbytes)], cpu=cpu)

    def release(self) -> None:
        """Let the caller's memory go; MisuseError (EBUSY) while it is mapped for a device."""
        if not self.live:
            return
        for space in self.machine.spaces:
            for iova, phys, size in space.domain.held():
                if phys < self.object.end and self.object.start < phys + size:
                    raise MisuseError(f"release: the memory is mapped at {iova:#x}: unmap it first", 16)
        if self.machine.staging is not None:
            self.machine.staging.forget(self.object)
        self.live = False
        self.machine.space.remove(self.object)
        self.machine.users.remove(self)

    def __enter__(self) -> UserBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
