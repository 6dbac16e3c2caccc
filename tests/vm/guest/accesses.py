"""A real device's own accesses to memory, byte for byte: made by an NVMe drive with commands of one block or a few.

A write command lets the drive read memory, a read command lets it write memory, through SGLs of the exact bytes; the
rest of a block goes to a scratch page. Queues, lists and scratch pages lie in a window of their own that is mapped past
the machine's books (``WINDOW``), so that what a test counts is the test's.

QEMU's drive reports success for an access that the IOMMU has blocked, and what it read is zeros. So the data decide:
zeros over a whole line of 64 bytes are a blocked read (memory under test holds none), and bytes that did not arrive a
blocked write.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from array import array
from typing import Any

from dmakit import vfio
from dmakit.consts import PAGE_SHIFT, PAGE_SIZE, PROT_READ, PROT_WRITE
from dmakit.errors import FaultError
from dmakit.nvme.admin_driver import AdminDriver
from dmakit.nvme.command import Command
from dmakit.nvme.rings import QueuePair
from dmakit.nvme.spec import FLAG_SGL_METABUF, SGL_DATA, SGL_LAST_SEGMENT
from dmakit.nvme.vfio import VfioTransport
from dmakit.platform.linux.space import MemoryObject, Piece

WINDOW = 1 << 20  # IOVA
SIZE = 64 << 10
LINE = 64
WRITE, READ = 1, 2  # NVM opcodes


class _Part:
    """Pages of the window, as ``nvme.transport.SharedMemory``."""

    def __init__(self, window: _Window, start: int) -> None:
        self.addr = WINDOW + start
        self.words = window.words
        self.pages = memoryview(array("Q", range(start >> 3, SIZE >> 3, PAGE_SIZE >> 3)))

    def free(self) -> None:
        """It goes with the window."""


class _Window:
    """Memory of ours that the device reaches at ``WINDOW``; handed out page by page."""

    def __init__(self, device: vfio.Device) -> None:
        self.bytes = mmap.mmap(-1, SIZE)
        self.words = memoryview(self.bytes).cast("Q")
        self.used = 0
        space = device.space
        place = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))
        memory = MemoryObject(1 << 60, SIZE, "user", place)
        space.domain.backend.map(WINDOW, Piece(place, SIZE, memory, 0), PROT_READ | PROT_WRITE)

    def allocate(self, size: int) -> _Part:
        """The next pages."""
        start, self.used = self.used, self.used + -(-size // PAGE_SIZE) * PAGE_SIZE
        assert self.used <= SIZE
        return _Part(self, start)


class _Transport(VfioTransport):
    """The drive's registers, with queues in the window."""

    def __init__(self, device: vfio.Device) -> None:
        super().__init__(device)
        self.window = _Window(device)

    def allocate(self, size: int) -> Any:
        return self.window.allocate(size)


class DriveAccesses:
    """The port of a ``dma.Device``: what its drive reads and writes. The drive is brought up for the first access."""

    coherent = True

    def __init__(self) -> None:
        self.device: Any = None
        self.up = False

    def of(self, device: vfio.Device) -> None:
        """The drive, just opened: the window is set aside."""
        self.device = device
        gap = (WINDOW >> PAGE_SHIFT, (WINDOW + SIZE - 1) >> PAGE_SHIFT)
        device.space.iovad.reserve(*gap)
        device.space.reserved.add(gap)

    def _start(self) -> None:
        """Bring the drive up with one queue pair, polled."""
        self.up, self.transport = True, _Transport(self.device)
        self.admin = AdminDriver(self.transport)
        self.admin.enable()
        assert self.admin.set_queue_count(1) == 1
        self.pair = QueuePair(self.transport, 1, 8, self.admin.stride)
        self.admin.create_pair(self.pair)
        self.list, self.data, self.scratch = (self.transport.allocate(PAGE_SIZE) for _ in range(3))

    def stop(self) -> None:
        """Disable the drive."""
        if not self.up:
            return
        self.admin.halt()
        self.pair.free()
        self.admin.free()
        self.transport.close()

    def _bytes(self, part: Any, size: int) -> slice:
        return slice(part.addr - WINDOW, part.addr - WINDOW + size)

    def _move(self, opcode: int, addr: int, size: int) -> None:
        """One command between block 0 … and [addr, addr + size), the rest of the last block to or from scratch."""
        blocks = -(-size // 512)
        rest = 512 * blocks - size
        entries = struct.pack("<QI3xB", addr, size, SGL_DATA << 4)
        if rest:
            entries += struct.pack("<QI3xB", self.scratch.addr, rest, SGL_DATA << 4)
        window = self.transport.window.bytes
        window[self._bytes(self.list, len(entries))] = entries
        low, high = struct.unpack("<QQ", struct.pack("<QI3xB", self.list.addr, len(entries), SGL_LAST_SEGMENT << 4))
        command = Command(opcode, 1, low, high, cdw12=blocks - 1, flags=FLAG_SGL_METABUF)
        self.pair.push(command, command)
        self.pair.ring()
        end = self.transport.now() + 20_000_000_000
        while not (found := self.pair.take()):
            assert not self.pair.lie, self.pair.lie
            assert self.transport.now() < end, "the drive does not answer"
            self.transport.wait(0)
        assert found[0][0].status == 0, f"status {found[0][0].status:#x}"

    def _fetch(self, iova: int, size: int) -> bytes:
        """What the drive reads there: inside a page."""
        self._move(WRITE, iova, size)
        self._move(READ, self.data.addr, size)
        return self.transport.window.bytes[self._bytes(self.data, size)]

    def read(self, iova: int, size: int) -> bytes:
        """FaultError where a whole line is zeros."""
        if not self.up:
            self._start()
        found = b""
        while len(found) < size:
            at = iova + len(found)
            part = min(size - len(found), PAGE_SIZE - at % PAGE_SIZE)
            first, last = at // LINE * LINE, -(-(at + part) // LINE) * LINE
            lines = self._fetch(first, last - first)
            if not any(lines):
                raise FaultError(f"read of {at:#x} blocked")
            found += lines[at - first : at - first + part]
        return found

    def write(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        """FaultError where the bytes did not arrive."""
        if not self.up:
            self._start()
        payload, done = bytes(data), 0
        while done < len(payload):
            at = iova + done
            part = payload[done : done + PAGE_SIZE - at % PAGE_SIZE]
            self.transport.window.bytes[self._bytes(self.data, len(part))] = part
            self._move(WRITE, self.data.addr, len(part))
            self._move(READ, at, len(part))
            if not self._arrived(at, part):
                raise FaultError(f"write of {at:#x} blocked")
            done += len(part)

    def _arrived(self, iova: int, data: bytes) -> bool:
        """Seen by the drive itself, or by the CPU: what is mapped for writing only cannot be read back."""
        if self._fetch(iova, len(data)) == data and any(data):
            return True
        phys = self.device.dma.iova_to_phys(iova)
        return bool(phys) and self.device.machine.memory.read(phys, len(data)) == data
