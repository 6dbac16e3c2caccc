"""The source space of this process: what the host's IOMMU maps from, as one range of ``phys`` addresses.

The space is one lazy mapping of this process's virtual memory, and ``phys`` is an offset in it: the byte at ``phys`` is
the byte at virtual address ``base + phys``. Pages, buffers, bounce slots and coherent memory of the rooms below
therefore work here as they do on the software machine. What lies in the space:

* *RAM*: one memory file (memfd) from 2 MiB on, so that iommufd can map it as a file; of huge pages when the host has
  them (``huge``). A page is committed when it is touched or pinned.
* *BARs* of devices, mapped into a window above RAM. Parts that the device driver does not let anybody map (an MSI-X
  table) are a hole.
* *User memory* registered by the caller (NumPy arrays, mmaps, memoryviews), above that. Shared memory is mapped a
  second time at its place in the space. Private memory cannot be: then its ``phys`` only names it, and ``resolve``
  leads to where it really is.

``resolve`` gives the pieces of a range: each lies in one object. Models nothing in Linux: there, physical memory is
what it is; ``drivers/vfio`` and iommufd take the process's addresses instead.
"""

from __future__ import annotations

import bisect
import mmap
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dmakit.consts import PAGE_SIZE
from dmakit.errors import DmakitError, ExhaustedError, InputError, MisuseError
from dmakit.memory.physical import PhysicalMemory, Region
from dmakit.platform.linux.kernel import MAP_ANONYMOUS, MAP_NORESERVE, MAP_PRIVATE, Kernel, address_of
from dmakit.units import GIB, MIB

HUGE_PAGE = 2 * MIB
RAM_START = HUGE_PAGE
EFAULT = 14


@dataclass(eq=False)
class MemoryObject:
    """Memory at a stable place [start, start + size) of the space, at ``va`` in this process.

    ``kind``: ram, bar or user; ``fd``, ``fd_offset``: the memory file behind it, −1 when there is none; ``device``: who
    shares a BAR (``dma_buf()`` gives a file of it); ``readonly``: devices must not write; ``kept``: what must live on.
    """

    start: int
    size: int
    kind: str
    va: int
    fd: int = -1
    fd_offset: int = 0
    readonly: bool = False
    device: Any = None
    kept: Any = None
    region: Region | None = None
    areas: list[tuple[int, int]] = field(default_factory=list)

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.start + self.size


class Piece(NamedTuple):
    """``size`` bytes at ``va``: ``offset`` bytes into ``memory``."""

    va: int
    size: int
    memory: MemoryObject
    offset: int

    @property
    def phys(self) -> int:
        """Where it lies in the space."""
        return self.memory.start + self.offset


class Window:
    """Addresses from ``start`` to ``end`` that objects come into and leave."""

    def __init__(self, start: int, end: int, what: str) -> None:
        self.start, self.end, self.what = start, end, what
        self.taken: list[tuple[int, int]] = []

    def take(self, size: int, align: int) -> int:
        """The lowest free place for ``size`` bytes; ExhaustedError when there is none."""
        at = -(-self.start // align) * align
        for low, high in self.taken:
            if at + size <= low:
                break
            at = max(at, -(-high // align) * align)
        if at + size > self.end:
            raise ExhaustedError(
                f"no room for {size:#x} bytes in the window for {self.what} ({self.end - self.start:#x} bytes):"
                f" make the machine with a larger {self.what.split()[0].lower()}_window"
            )
        bisect.insort(self.taken, (at, at + size))
        return at

    def give(self, start: int, size: int) -> None:
        """Undo ``take``."""
        self.taken.remove((start, start + size))


class SourceSpace:
    """The space of one machine: ``memory`` (as the rooms below know it) and its objects.

    ``ram``: bytes of RAM, a multiple of 2 MiB; ``huge``: ``hugetlb`` (the host's reserved huge pages), ``thp``
    (transparent ones), ``none``, or ``auto`` (hugetlb when the host has enough of them free, else thp). The attribute
    ``huge`` says what RAM may get: ``none`` also where the host gives shared memory no transparent ones.
    """

    def __init__(self, kernel: Kernel, ram: int, *, huge: str = "auto", bar_window: int, user_window: int) -> None:
        if ram <= 0 or ram % HUGE_PAGE:
            raise InputError(f"ram={ram}: must be a multiple of {HUGE_PAGE} bytes")
        self.kernel = kernel
        bars = -(-(RAM_START + ram) // GIB) * GIB
        self.bars = Window(bars, bars + bar_window, "BARs")
        self.users = Window(self.bars.end, self.bars.end + user_window, "user memory")
        span = self.users.end
        try:
            whole = mmap.mmap(-1, span + HUGE_PAGE, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
        except (OSError, OverflowError, ValueError) as error:
            raise ExhaustedError(f"cannot reserve {span} bytes of address space: {error}") from error
        address = address_of(whole)
        self.base = -(-address // HUGE_PAGE) * HUGE_PAGE
        self.memory = PhysicalMemory(span, memoryview(whole)[self.base - address : self.base - address + span])
        self.objects: list[MemoryObject] = []
        self._last: MemoryObject | None = None
        self.ram_fd, self.huge = self._make_ram(ram, huge)
        self._add(MemoryObject(RAM_START, ram, "ram", self.base + RAM_START, self.ram_fd))
        self.memory.add_region(RAM_START, ram, "ram", 0, "RAM")

    def _make_ram(self, ram: int, huge: str) -> tuple[int, str]:
        """The memory file behind RAM, mapped; and which huge pages it has."""
        if huge not in ("auto", "hugetlb", "thp", "none"):
            raise InputError(f"huge={huge!r}: must be one of auto, hugetlb, thp, none")
        free = int(self.kernel.text("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages") or 0)
        if huge == "hugetlb" and free * HUGE_PAGE < ram:
            raise InputError(
                f"huge='hugetlb': {ram // HUGE_PAGE} huge pages are needed, {free} are free:"
                f" echo {ram // HUGE_PAGE} > /proc/sys/vm/nr_hugepages"
            )
        reserved = huge == "hugetlb" or (huge == "auto" and free * HUGE_PAGE >= ram)
        fd = self.kernel.memfd("dmakit-ram", ram, huge=reserved)
        try:
            self.kernel.map_at(self.base + RAM_START, ram, fd, 0)
        except DmakitError:
            self.kernel.close(fd)
            raise
        if reserved:
            return fd, "hugetlb"
        if huge != "none" and self.kernel.prefer_huge(self.base + RAM_START, ram):
            return fd, "thp"
        return fd, "none"

    # Objects -------------------------------------------------------------------------------------------------

    def _add(self, made: MemoryObject) -> MemoryObject:
        bisect.insort(self.objects, made, key=lambda entry: entry.start)
        return made

    def object_at(self, phys: int) -> MemoryObject | None:
        """The object that holds ``phys``."""
        if self._last is not None and self._last.start <= phys < self._last.end:
            return self._last
        at = bisect.bisect_right(self.objects, phys, key=lambda entry: entry.start) - 1
        self._last = self.objects[at] if at >= 0 and phys < self.objects[at].end else None
        return self._last

    def resolve(self, phys: int, size: int) -> list[Piece]:
        """The pieces of [phys, phys + size), in order; MisuseError (EFAULT) where no object lies."""
        pieces: list[Piece] = []
        end = phys + size
        while phys < end:
            found = self.object_at(phys)
            if found is None:
                raise MisuseError(f"phys={phys:#x}: no memory of this machine lies there", EFAULT)
            take = min(end, found.end) - phys
            pieces.append(Piece(found.va + phys - found.start, take, found, phys - found.start))
            phys += take
        return pieces

    def add_bar(self, device: Any, fd: int, offset: int, size: int, areas: list[tuple[int, int]]) -> MemoryObject:
        """Map the ``areas`` (offset, size) of a device's BAR that begins at ``offset`` of its file."""
        length = -(-size // PAGE_SIZE) * PAGE_SIZE
        start = self.bars.take(length, max(PAGE_SIZE, 1 << (length - 1).bit_length()))
        made = MemoryObject(start, length, "bar", self.base + start, device=device, areas=areas)
        try:
            for at, part in areas:
                self.kernel.map_at(made.va + at, part, fd, offset + at)
        except DmakitError:
            self.kernel.unmap_at(made.va, length)
            self.bars.give(start, length)
            raise
        made.region = self.memory.add_region(start, length, "bar", 0, f"BAR of {device}")
        return self._add(made)

    def add_user(self, memory: Any) -> tuple[MemoryObject, int]:
        """Register a caller's buffer: its object (whole pages) and the ``phys`` of its first byte."""
        array = np.frombuffer(memory, np.uint8)
        if array.nbytes == 0:
            raise MisuseError("register: the buffer is empty")
        va, size = array.ctypes.data, array.nbytes
        first = va // PAGE_SIZE * PAGE_SIZE
        length = -(-(va + size - first) // PAGE_SIZE) * PAGE_SIZE
        inside = 0 if first % HUGE_PAGE or length < HUGE_PAGE else HUGE_PAGE
        start = self.users.take(length, inside or PAGE_SIZE)
        shared = self.kernel.alias(first, length, self.base + start)
        made = MemoryObject(start, length, "user", self.base + start if shared else first, kept=array)
        made.readonly = not array.flags.writeable
        made.region = self.memory.add_region(start, length, "ram", 0, "user memory") if shared else None
        return self._add(made), start + va - first

    def remove(self, gone: MemoryObject) -> None:
        """Take a BAR or a caller's memory out of the space."""
        self.objects.remove(gone)
        self._last = None
        if gone.region is not None:
            self.memory.remove_region(gone.region)
            self.kernel.unmap_at(self.base + gone.start, gone.size)
        (self.bars if gone.kind == "bar" else self.users).give(gone.start, gone.size)

    def close(self) -> None:
        """Give RAM back to the host; its addresses stay readable as zeros while somebody holds ``memory``."""
        if self.ram_fd >= 0:
            ram = self.objects[0]
            self.kernel.unmap_at(ram.va, ram.size)
            self.kernel.close(self.ram_fd)
            self.ram_fd = -1
