"""A set-associative cache of translations: what the IOTLB, the paging-structure cache and a device TLB are made of.

An entry remembers something about one *page* of one *domain* at one *level*: level 1 is a 4 KiB page, level 2 a 2 MiB
page, level 3 a 1 GiB page; for the paging-structure cache the levels 2 to 5 name the span of one table entry. The
entry's tag packs the three (page number, domain id, level) into one 64-bit word: 45 + 16 + 3 bits, enough for a
57-bit address. A tag of 0 is an empty way. The low bits of (page number xor domain id) choose the set, ways are
searched in order.

*Replacement* is declared and deterministic: ``lru`` gives up the way that was used longest ago, ``fifo`` the one that
was filled longest ago; an empty way is always taken first, the lowest of several. The ways of a set stand in a ring in
this order: ``oldest`` of the set is the way that gives room next, ``newer`` leads from each way to the one used or
filled next after it, and from the newest back to the oldest (``older`` leads the other way). So filling turns the
ring by one step, whatever the number of ways, and no clock is kept.

Invariant: an entry is only ever removed by replacement or by an explicit drop. Nothing here looks at the tables
again: that is what makes a forgotten invalidation visible.

Vocabulary and rules: Intel VT-d specification, chapter 6 (caching translation information).
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import cython

from dmakit.errors import MisuseError

MOST_ENTRIES = 1 << 20
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
        if not 0 < entries <= MOST_ENTRIES or entries & (entries - 1):
            raise MisuseError(f"entries={entries}: a cache's capacity must be a power of two up to {MOST_ENTRIES}")
        if ways <= 0 or ways & (ways - 1) or ways > entries:
            raise MisuseError(f"ways={ways}: must be a power of two up to the capacity, {entries}")
        if policy not in POLICIES:
            raise MisuseError(f"policy={policy!r}: must be one of {', '.join(POLICIES)}")
        self.capacity = entries
        self.ways = ways
        self.sets = entries // ways
        self.policy = policy
        self.touch = policy == "lru"
        self.evictions = 0
        self.tags = memoryview(array("Q", bytes(8 * entries)))
        self.values = memoryview(array("Q", bytes(8 * entries)))
        self.newer = memoryview(array("i", bytes(4 * entries)))
        self.older = memoryview(array("i", bytes(4 * entries)))
        self.oldest = memoryview(array("i", bytes(4 * self.sets)))
        self.set_mask = self.sets - 1
        self.way_bits = ways.bit_length() - 1
        self.live = memoryview(array("q", bytes(8 * _LEVELS)))
        self._drop_all()

    def _find(self, did: cython.int, level: cython.int, page: cython.ulonglong) -> cython.Py_ssize_t:
        """Index of the entry of ``page`` (a page number at ``level``), or -1. Counts as a use."""
        tag: cython.ulonglong = (page << 19) | (cython.cast(cython.ulonglong, did) << 3) | level
        way: cython.Py_ssize_t = ((page ^ did) & self.set_mask) << self.way_bits
        end: cython.Py_ssize_t = way + self.ways
        while way < end:
            if self.tags[way] == tag:
                if self.touch:
                    self._renew(way)
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
        victim: cython.Py_ssize_t = self.oldest[way >> self.way_bits]
        while way < end:
            if self.tags[way] == tag:
                victim = way
                break
            way += 1
        if self.tags[victim] == 0:
            self.used += 1
        else:
            self.live[self.tags[victim] & 7] -= 1
            if self.tags[victim] != tag:
                self.evictions += 1
        self.tags[victim] = tag
        self.values[victim] = value
        self.live[level] += 1
        self._renew(victim)

    def _renew(self, way: cython.Py_ssize_t) -> cython.void:
        """Make a way the newest of its set: it is used or filled now."""
        first: cython.Py_ssize_t = self.oldest[way >> self.way_bits]
        first = self.newer[way] if first == way else first
        self.oldest[way >> self.way_bits] = first
        self._put_before(way, first)

    def _put_before(self, way: cython.Py_ssize_t, at: cython.Py_ssize_t) -> cython.void:
        """Move a way in its ring to the place just older than ``at`` (before the oldest stands the newest)."""
        after: cython.int = self.newer[way]
        before: cython.int = self.older[way]
        self.newer[before] = after
        self.older[after] = before
        before = self.older[at]
        self.newer[before] = way
        self.older[way] = before
        self.newer[way] = at
        self.older[at] = way

    def _drop(self, way: cython.Py_ssize_t) -> cython.void:
        """Empty one way that holds an entry: it joins the empty ways of its set, which stand oldest, lowest first."""
        self.live[self.tags[way] & 7] -= 1
        self.used -= 1
        self.tags[way] = 0
        self._renew(way)
        at: cython.Py_ssize_t = self.oldest[way >> self.way_bits]
        if self.tags[at] != 0 or at >= way:
            self.oldest[way >> self.way_bits] = way
        while at < way and self.tags[at] == 0:
            at = self.newer[at]
        if at != way:
            self._put_before(way, at)

    def _drop_all(self) -> cython.void:
        """Empty the cache (a global invalidation)."""
        way: cython.Py_ssize_t
        last: cython.Py_ssize_t = self.ways - 1
        for way in range(self.capacity):
            self.tags[way] = 0
            self.newer[way] = way + 1 if way & last != last else way - last
            self.older[way] = way - 1 if way & last != 0 else way + last
            if way & last == 0:
                self.oldest[way >> self.way_bits] = way
        for way in range(_LEVELS):
            self.live[way] = 0
        self.used = 0

    def _drop_domain(self, did: cython.int) -> cython.void:
        """Drop every entry of a domain, from the last way down: each then becomes the oldest of its set at once."""
        way: cython.Py_ssize_t
        for way in range(self.capacity - 1, -1, -1):
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
        for way in range(self.capacity - 1, -1, -1):
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
