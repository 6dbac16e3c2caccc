"""A set-associative cache of translations: what the IOTLB, the paging-structure cache and a device TLB are made of.

An entry remembers something about one *page* of one *domain* at one *level*: level 1 is a 4 KiB page, level 2 a 2 MiB
page, level 3 a 1 GiB page; for the paging-structure cache the levels 2 to 5 name the span of one table entry. The
entry's tag packs the three (page number, domain id, level) into one 64-bit word: 45 + 16 + 3 bits, enough for a
57-bit address. A tag of 0 is an empty way. The low bits of (page number xor domain id) choose the set, ways are
searched in order.

*Replacement* is declared and deterministic: ``lru`` gives up the way that was used longest ago, ``fifo`` the one that
was filled longest ago; an empty way is always taken first. ``stamps`` holds the time of last use or of filling (0 in an
empty way), counted in lookups and fills of this cache, never a clock; below the time stands the way's number in its
set, so that the lowest stamp of a set names the way that gives room.

Invariant: an entry is only ever removed by replacement or by an explicit drop. Nothing here looks at the tables
again: that is what makes a forgotten invalidation visible.

Vocabulary and rules: Intel VT-d specification, chapter 6 (caching translation information).
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import cython

from dmakit.errors import MisuseError

POLICIES = ("lru", "fifo")
_LEVELS = 8  # level codes 1 to 5 are used


class CacheEntry(NamedTuple):
    """One live entry, for reports and tests: domain id, level, first address (bytes), size (bytes), stored word."""

    did: int
    level: int
    iova: int
    size: int
    value: int


@cython.cclass
class SetCache:
    """``entries`` words in sets of ``ways``; both powers of two. Values are the caller's 64-bit words."""

    def __init__(self, entries: int, ways: int, policy: str = "lru") -> None:
        if entries <= 0 or entries & (entries - 1):
            raise MisuseError(f"entries={entries}: a cache's capacity must be a power of two")
        if ways <= 0 or ways & (ways - 1) or ways > entries:
            raise MisuseError(f"ways={ways}: must be a power of two up to the capacity, {entries}")
        if policy not in POLICIES:
            raise MisuseError(f"policy={policy!r}: must be one of {', '.join(POLICIES)}")
        self.capacity = entries
        self.ways = ways
        self.sets = entries // ways
        self.policy = policy
        self.touch = policy == "lru"
        self.time = 0
        self.used = 0
        self.evictions = 0
        self.tags = memoryview(array("Q", bytes(8 * entries)))
        self.values = memoryview(array("Q", bytes(8 * entries)))
        self.stamps = memoryview(array("Q", (way & (ways - 1) for way in range(entries))))
        self.set_mask = self.sets - 1
        self.way_bits = ways.bit_length() - 1
        self.live = memoryview(array("q", bytes(8 * _LEVELS)))

    def _find(self, did: cython.int, level: cython.int, page: cython.ulonglong) -> cython.Py_ssize_t:
        """Index of the entry of ``page`` (a page number at ``level``), or -1. Counts as a use."""
        tag: cython.ulonglong = (page << 19) | (cython.cast(cython.ulonglong, did) << 3) | level
        way: cython.Py_ssize_t = ((page ^ did) & self.set_mask) << self.way_bits
        end: cython.Py_ssize_t = way + self.ways
        while way < end:
            if self.tags[way] == tag:
                if self.touch:
                    self._stamp(way)
                return way
            way += 1
        return -1

    def _insert(
        self, did: cython.int, level: cython.int, page: cython.ulonglong, value: cython.ulonglong
    ) -> cython.void:
        """Store ``value`` for ``page``: over its old entry, else in an empty way, else over the victim of its set."""
        tag: cython.ulonglong = (page << 19) | (cython.cast(cython.ulonglong, did) << 3) | level
        way: cython.Py_ssize_t = ((page ^ did) & self.set_mask) << self.way_bits
        end: cython.Py_ssize_t = way + self.ways
        victim: cython.Py_ssize_t = way
        while way < end:
            if self.tags[way] == tag:
                victim = way
                break
            if self.stamps[way] < self.stamps[victim]:
                victim = way
            way += 1
        if self.tags[victim] != 0:
            if self.tags[victim] != tag:
                self.evictions += 1
            self._drop(victim)
        self.tags[victim] = tag
        self.values[victim] = value
        self._stamp(victim)
        self.live[level] += 1
        self.used += 1

    def _drop(self, way: cython.Py_ssize_t) -> cython.void:
        """Empty one way that holds an entry."""
        self.live[self.tags[way] & 7] -= 1
        self.used -= 1
        self.tags[way] = 0
        self.stamps[way] = way & (self.ways - 1)

    def _stamp(self, way: cython.Py_ssize_t) -> cython.void:
        """Note that a way is used or filled now."""
        self.time += 1
        self.stamps[way] = (self.time << self.way_bits) | (way & (self.ways - 1))

    def _drop_all(self) -> cython.void:
        """Empty the cache (a global invalidation)."""
        way: cython.Py_ssize_t
        for way in range(self.capacity):
            if self.tags[way] != 0:
                self._drop(way)

    def _drop_domain(self, did: cython.int) -> cython.void:
        """Drop every entry of a domain."""
        way: cython.Py_ssize_t
        for way in range(self.capacity):
            if self.tags[way] != 0 and ((self.tags[way] >> 3) & 0xFFFF) == did:
                self._drop(way)

    def _drop_range(self, did: cython.int, iova: cython.ulonglong, mask: cython.int) -> cython.void:
        """Drop the domain's entries that touch the aligned block of 2^mask 4 KiB pages that holds ``iova``.

        A larger page that only overlaps the block goes as well, as the specification asks of hardware.
        """
        level: cython.int
        shift: cython.int
        page: cython.ulonglong
        last: cython.ulonglong
        way: cython.Py_ssize_t
        if mask >= 45:
            self._drop_domain(did)
            return
        first: cython.ulonglong = (iova >> (12 + mask)) << (12 + mask)
        for level in range(1, 6):
            if self.live[level] == 0:
                continue
            shift = 3 + 9 * level
            page = first >> shift
            last = page
            if 12 + mask > shift:
                last = page + ((cython.cast(cython.ulonglong, 1) << (12 + mask - shift)) - 1)
            if last - page >= cython.cast(cython.ulonglong, self.sets):
                self._scan(did, level, page, last)
                continue
            while page <= last:
                way = self._find(did, level, page)
                if way >= 0:
                    self._drop(way)
                page += 1

    def _scan(self, did: cython.int, level: cython.int, first: cython.ulonglong, last: cython.ulonglong) -> cython.void:
        """Drop the entries of pages ``first`` to ``last`` by looking at every way: cheaper than at every page."""
        way: cython.Py_ssize_t
        tag: cython.ulonglong
        for way in range(self.capacity):
            tag = self.tags[way]
            if (
                tag != 0
                and (tag & 7) == level
                and ((tag >> 3) & 0xFFFF) == did
                and (tag >> 19) >= first
                and (tag >> 19) <= last
            ):
                self._drop(way)

    def entries(self, did: int | None = None) -> list[CacheEntry]:
        """The live entries (of one domain), by level and address."""
        found = []
        for way in range(self.capacity):
            tag = int(self.tags[way])
            if tag and (did is None or (tag >> 3) & 0xFFFF == did):
                shift = 3 + 9 * (tag & 7)
                found.append(
                    CacheEntry((tag >> 3) & 0xFFFF, tag & 7, (tag >> 19) << shift, 1 << shift, int(self.values[way]))
                )
        return sorted(found)
