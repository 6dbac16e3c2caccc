"""The physical address space of a software machine: RAM, MMIO holes and device BARs in one lazy mapping.

One anonymous, lazily committed mapping covers every physical address from 0 to ``span``: byte ``phys`` of the
machine is byte ``phys`` of the mapping, so page tables, buffers and bounce slots are real bytes and a hot loop
reaches a table entry as ``words[phys >> 3]``. Nothing is committed until it is touched: tens of GiB cost
nothing. Regions say what an address *is* (RAM of a NUMA node, a device's BAR, or nothing at all) and guard the
Python-level accessors; hot code that got its address from the page allocator does not ask again.

``page_link`` is one word for every page frame, the machine's ``struct page``: whoever owns a page may chain it
there (free lists of table pages that wait for a flush use it, because the page itself must stay as it was for
as long as hardware may still walk it).

CPU accesses go through ``read``/``write``. On a machine with non-coherent devices a write-back cache model
(``memory.cache``) can stand between CPU and RAM; devices never see it.
"""

from __future__ import annotations

import bisect
import mmap
from array import array
from functools import reduce
from operator import and_, or_
from typing import NamedTuple

import cython

from dmakit.errors import ExhaustedError, MisuseError

if cython.compiled:
    from cython.cimports.libc.string import memmove, memset
else:
    from dmakit.consts import PAGE_SHIFT, PAGE_SIZE

_MAP_NORESERVE = 0x4000
_FILL_BYTES = 1 << 20  # written at a time


class Region(NamedTuple):
    """A range [start, start + size) of the address space: ``kind`` is ``ram`` or ``bar``."""

    start: int
    size: int
    kind: str
    node: int
    name: str

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.start + self.size


def _lazy_mapping(size: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except (OSError, OverflowError, ValueError) as error:
        raise ExhaustedError(f"cannot reserve {size} bytes of address space: {error}") from error


@cython.cclass
class PhysicalMemory:
    """Physical memory of ``span`` bytes (a multiple of the page size), all zero, initially without regions.

    ``backing``: a writable buffer of that size instead of memory of its own (a platform's source space)."""

    def __init__(self, span: int, backing: memoryview | None = None) -> None:
        if span <= 0 or span % PAGE_SIZE or span > 1 << 46:
            raise MisuseError(f"span={span}: must be a positive multiple of {PAGE_SIZE} up to 64 TiB")
        self.span = span
        if backing is not None and (backing.nbytes != span or backing.readonly):
            raise MisuseError(f"backing: must be a writable buffer of {span} bytes")
        mapping = memoryview(_lazy_mapping(span) if backing is None else backing).cast("B")
        links = memoryview(_lazy_mapping(max(PAGE_SIZE, (span >> PAGE_SHIFT) * 8)))
        self.view = mapping
        self.data = mapping
        self.words = mapping.cast("Q")
        self.page_link = links.cast("Q")
        self.regions: list[Region] = []

    def add_region(self, start: int, size: int, kind: str = "ram", node: int = 0, name: str = "") -> Region:
        """Declare [start, start+size) as RAM of a node or as a device BAR; page-aligned, no overlap."""
        region = Region(start, size, kind, node, name)
        if kind not in ("ram", "bar"):
            raise MisuseError(f"kind={kind!r}: must be 'ram' or 'bar'")
        if start < 0 or size <= 0 or start % PAGE_SIZE or size % PAGE_SIZE or region.end > self.span:
            raise MisuseError(f"region [{start:#x}, {region.end:#x}): must be page-aligned inside {self.span:#x} bytes")
        for other in self.regions:
            if start < other.end and other.start < region.end:
                raise MisuseError(f"region [{start:#x}, {region.end:#x}) overlaps {other.kind} at {other.start:#x}")
        bisect.insort(self.regions, region)
        return region

    def remove_region(self, region: Region) -> None:
        """Undo ``add_region``: the addresses are a hole again."""
        self.regions.remove(region)

    def region_at(self, phys: int, size: int = 1) -> Region:
        """The region that holds all of [phys, phys+size); MisuseError (EFAULT) when none does."""
        at = bisect.bisect_right(self.regions, phys, key=lambda region: region.start) - 1
        if at < 0 or phys + size > self.regions[at].end or size < 0:
            raise MisuseError(f"[{phys:#x}, {phys + size:#x}) is not inside one region of physical memory", 14)
        return self.regions[at]

    def is_ram(self, phys: int) -> bool:
        """Whether ``phys`` is RAM (the kernel's pfn_valid)."""
        at = bisect.bisect_right(self.regions, phys, key=lambda region: region.start) - 1
        return at >= 0 and phys < self.regions[at].end and self.regions[at].kind == "ram"

    def read(self, phys: int, size: int) -> bytes:
        """``size`` bytes from ``phys``."""
        self.region_at(phys, size)
        return bytes(self.view[phys : phys + size])

    def write(self, phys: int, payload: bytes | bytearray | memoryview) -> None:
        """Store ``payload`` at ``phys``."""
        size = memoryview(payload).nbytes
        self.region_at(phys, size)
        self.view[phys : phys + size] = payload

    def fill(self, phys: int, size: int, byte: int) -> None:
        """Set ``size`` bytes from ``phys`` to ``byte``."""
        self.region_at(phys, size)
        piece = bytes((byte,)) * min(size, _FILL_BYTES)
        for at in range(phys, phys + size, _FILL_BYTES):
            self.view[at : min(at + _FILL_BYTES, phys + size)] = piece[: phys + size - at]

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy ``size`` bytes between physical ranges (like memmove)."""
        self.region_at(target, size)
        self.region_at(source, size)
        self._copy(target, source, size)

    def _copy(self, target: cython.ulonglong, source: cython.ulonglong, size: cython.ulonglong) -> cython.void:
        """``copy`` without the region check (the caller owns both ranges)."""
        if size == 0:
            return
        if cython.compiled:
            memmove(cython.address(self.data[target]), cython.address(self.data[source]), size)
        else:
            self.data[target : target + size] = bytes(self.data[source : source + size])

    def _zero(self, phys: cython.ulonglong, size: cython.ulonglong) -> cython.void:
        """Clear ``size`` bytes without the region check."""
        if size == 0:
            return
        if cython.compiled:
            memset(cython.address(self.data[phys]), 0, size)
        else:
            self.data[phys : phys + size] = bytes(size)

    def _ascend(
        self, at: cython.ulonglong, count: cython.Py_ssize_t, first: cython.ulonglong, step: cython.ulonglong
    ) -> cython.void:
        """Write ``count`` words from word index ``at``: ``first``, ``first + step``, …"""
        if cython.compiled:
            _fill(cython.address(self.words[at]), count, first, step)
        else:
            self.words[at : at + count] = memoryview(array("Q", range(first, first + step * count, step)))

    def _union(self, at: cython.ulonglong, count: cython.Py_ssize_t) -> cython.ulonglong:
        """The bits that are set in any of ``count`` words from word index ``at``."""
        if cython.compiled:
            return _or(cython.address(self.words[at]), count)
        return reduce(or_, self.words[at : at + count], 0)

    def _common(self, at: cython.ulonglong, count: cython.Py_ssize_t) -> cython.ulonglong:
        """The bits that are set in each of ``count`` words (1 or more) from word index ``at``."""
        if cython.compiled:
            return _and(cython.address(self.words[at]), count)
        return reduce(and_, self.words[at : at + count])


# The loops over words, when compiled: of a shape that the compiler makes vectors of, wide ones where the processor has
# them (``wide_t`` in the .pxd). Looking goes along four streams, because in one each word waits for the one before.


def _fill(
    words: cython.p_ulonglong, count: cython.Py_ssize_t, first: cython.ulonglong, step: cython.ulonglong
) -> cython.ulonglong:
    i: cython.Py_ssize_t
    for i in range(count):
        words[i] = first
        first += step
    return first


def _or(words: cython.p_ulonglong, count: cython.Py_ssize_t) -> cython.ulonglong:
    quarter: cython.Py_ssize_t = count // 4
    a: cython.ulonglong = 0
    b: cython.ulonglong = 0
    c: cython.ulonglong = 0
    d: cython.ulonglong = 0
    i: cython.Py_ssize_t
    for i in range(quarter):
        a |= words[i]
        b |= words[quarter + i]
        c |= words[2 * quarter + i]
        d |= words[3 * quarter + i]
    for i in range(4 * quarter, count):
        a |= words[i]
    return a | b | c | d


def _and(words: cython.p_ulonglong, count: cython.Py_ssize_t) -> cython.ulonglong:
    quarter: cython.Py_ssize_t = count // 4
    a: cython.ulonglong = words[0]
    b: cython.ulonglong = a
    c: cython.ulonglong = a
    d: cython.ulonglong = a
    i: cython.Py_ssize_t
    for i in range(quarter):
        a &= words[i]
        b &= words[quarter + i]
        c &= words[2 * quarter + i]
        d &= words[3 * quarter + i]
    for i in range(4 * quarter, count):
        a &= words[i]
    return a & b & c & d
