"""Pinned pages and I/O page tables as plain dicts: the independent truth of the fake host."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections import Counter

from dmakit.errors import FaultError

PAGE = 4096


def refuse(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Accounts:
    """Pinned bytes: type1's, charged to the process, and iommufd's, charged to its user; each may be ``limit``."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.process, self.user = Account(self), Account(self)

    @property
    def bytes(self) -> int:
        """All together."""
        return self.process.bytes + self.user.bytes


class Account:
    """Pinned bytes that one limit counts."""

    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts
        self.bytes = 0

    def charge(self, pages: int) -> None:
        limit = self.accounts.limit
        if limit is not None and self.bytes + pages * PAGE > limit:
            raise refuse(errno.ENOMEM)
        self.bytes += pages * PAGE

    def give(self, pages: int) -> None:
        self.bytes -= pages * PAGE
        assert self.bytes >= 0


class Pages:
    """What one map call named: ``va`` in this process, pinned page by page, charged once however often it is used."""

    def __init__(self, va: int, size: int, account: Account | None, kept: object = None) -> None:
        self.va, self.size, self.account, self.kept = va, size, account, kept
        self.pins: Counter[int] = Counter()

    def pin(self, offset: int, size: int) -> None:
        span = range(offset // PAGE, (offset + size) // PAGE)
        fresh = sum(1 for page in span if not self.pins[page])
        if self.account is not None:
            self.account.charge(fresh)
        self.pins.update(span)

    def unpin(self, offset: int, size: int) -> None:
        span = range(offset // PAGE, (offset + size) // PAGE)
        for page in span:
            assert self.pins[page] > 0
            self.pins[page] -= 1
        if self.account is not None:
            self.account.give(sum(1 for page in span if not self.pins[page]))


def map_file(fd: int, offset: int, size: int, account: Account | None) -> Pages:
    """Pages of a memory file."""
    shared = mmap.mmap(fd, size, offset=offset)
    return Pages(ctypes.addressof(ctypes.c_char.from_buffer(shared)), size, account, shared)


class Area:
    """One mapping of an address space."""

    def __init__(self, iova: int, size: int, prot: int, pages: Pages, offset: int) -> None:
        self.iova, self.size, self.prot, self.pages, self.offset = iova, size, prot, pages, offset
        self.pinned = False

    @property
    def end(self) -> int:
        return self.iova + self.size


class Space:
    """An I/O address space: areas by IOVA. ``ranges``: what may be mapped; ``tables``: its page tables."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        self.ranges = ranges
        self.areas: dict[int, Area] = {}
        self.tables = 0
        self.dirty: set[int] = set()
        self.tracking = False

    def check(self, iova: int, size: int) -> None:
        if (iova | size) % PAGE or not any(low <= iova and iova + size - 1 <= high for low, high in self.ranges):
            raise refuse(errno.EINVAL)
        if any(iova < area.end and area.iova < iova + size for area in self.areas.values()):
            raise refuse(errno.EEXIST)

    def add(self, area: Area) -> None:
        if self.tables:
            area.pages.pin(area.offset, area.size)
            area.pinned = True
        self.areas[area.iova] = area

    def drop(self, area: Area) -> None:
        del self.areas[area.iova]
        if area.pinned:
            area.pages.unpin(area.offset, area.size)

    def add_table(self) -> None:
        """A page table follows this space: everything mapped must be pinned."""
        if self.tables == 0:
            done: list[Area] = []
            try:
                for area in self.areas.values():
                    area.pages.pin(area.offset, area.size)
                    area.pinned = True
                    done.append(area)
            except OSError:
                for area in done:
                    area.pages.unpin(area.offset, area.size)
                    area.pinned = False
                raise
        self.tables += 1

    def drop_table(self) -> None:
        self.tables -= 1
        if self.tables == 0:
            for area in self.areas.values():
                if area.pinned:
                    area.pages.unpin(area.offset, area.size)
                    area.pinned = False

    def inside(self, iova: int, size: int) -> list[Area]:
        """Areas that touch [iova, iova + size), ascending."""
        return sorted(
            (area for area in self.areas.values() if iova < area.end and area.iova < iova + size),
            key=lambda area: area.iova,
        )

    def locate(self, iova: int, write: bool) -> tuple[int, int]:
        """(va, bytes from there on in the area); FaultError when a device may not."""
        for area in self.areas.values():
            if area.iova <= iova < area.end and area.prot & (2 if write else 1):
                if write and self.tracking:
                    self.dirty.add(iova // PAGE)
                return area.pages.va + area.offset + iova - area.iova, area.end - iova
        raise FaultError(f"{'write' if write else 'read'} of {iova:#x} blocked", iova=iova, write=write)

    def read(self, iova: int, size: int) -> bytes:
        found = b""
        while len(found) < size:
            va, room = self.locate(iova + len(found), False)
            found += ctypes.string_at(va, min(room, size - len(found)))
        return found

    def write(self, iova: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            va, room = self.locate(iova + done, True)
            part = data[done : done + min(room, PAGE - (iova + done) % PAGE)]
            ctypes.memmove(va, part, len(part))
            done += len(part)
