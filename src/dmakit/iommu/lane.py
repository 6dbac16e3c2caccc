"""The batch's fast lane: many translations of one domain in one loop, with what the loop needs in one place.

``Translator._translate`` is the rule; the lane is the same rule for what nearly every access of a batch is: an IOTLB
entry that permits it, or a walk that ends at a 4 KiB leaf, begins at a cached table of level 1 or 2, and meets nothing
unusual. It looks first and changes caches, table bits and counters only when it is certain, so it can stop in front of
any other access (a fault, a large leaf, a cold cache, a dirty bit behind a cached entry) and leave it to the rule.

Random accesses miss both caches. The time of a miss goes into table entries that are far from the CPU and into jumps
that it guesses wrong, so the loop asks for the leaf entry of the access ``_AHEAD`` places on before it needs it, keeps
at hand the level-2 table that it walked last (``top``, the gigabyte it spans), takes an entry that permits everything
and lacks no bit (``plain``) without taking it apart, and finds ways without a jump that depends on their order.

It works on the arrays of the two caches, which it shares, and counts in itself until the batch ends (``_end``).
Measured: docs/design/performance.md.
"""

from __future__ import annotations

import cython

from dmakit.iova.arguments import words as as_words

if cython.compiled:
    from cython.cimports.dmakit.memory.physical import prefetch
else:
    from dmakit.consts import (
        CTX_ACCESSED,
        CTX_ADDRESS,
        CTX_DIRTY,
        CTX_LEAF,
        CTX_PRESENT,
        CTX_READ,
        CTX_WIDTH,
        CTX_WORDS,
        CTX_WRITE,
        L_IOTLB_HITS,
        L_IOTLB_MISSES,
        L_PSC_HITS,
        L_WALK_READS,
        LANE_BLOCK,
        PAGE_SIZE,
        TR_BOTH,
        TR_DIRTY,
        TR_LEVEL_1,
        TR_LEVEL_MASK,
        TR_LEVEL_SHIFT,
        TR_READ,
        TR_UNDECIDED,
        TR_WRITE,
    )
    from dmakit.iommu.caches import SetCache
    from dmakit.iommu.iotlb import Iotlb
    from dmakit.ledger import Ledger
    from dmakit.memory.physical import PhysicalMemory

_NOWHERE = (1 << 64) - 1  # the gigabyte of no address


@cython.final
@cython.cclass
class BatchLane:
    """The fast lane of one unit: its caches, its memory, the context words of all its domains."""

    def __init__(
        self, iotlb: Iotlb, psc: SetCache, memory: PhysicalMemory, contexts: memoryview[int], ledger: Ledger
    ) -> None:
        self.iotlb, self.psc, self.ledger = iotlb, psc, ledger
        self.words, self.contexts = memory.words, as_words("contexts", contexts, writable=True)
        self.tags, self.values, self.live = iotlb.tags, iotlb.values, iotlb.live
        self.newer, self.oldest = iotlb.newer, iotlb.oldest
        self.psc_tags, self.psc_values, self.psc_live = psc.tags, psc.values, psc.live
        self.psc_newer, self.psc_oldest = psc.newer, psc.oldest
        self.ways, self.set_mask = iotlb.ways, iotlb.set_mask
        self.psc_ways, self.psc_set_mask = psc.ways, psc.set_mask
        self.highest = memory.span - PAGE_SIZE

    def _run(
        self,
        iovas: memoryview[int],
        out: memoryview[int],
        start: cython.Py_ssize_t,
        did: cython.int,
        write: cython.bint,
    ) -> cython.Py_ssize_t:
        """Translate ``iovas[start:]`` of an attached domain into ``out``; where it stopped."""
        i: cython.Py_ssize_t = start
        n: cython.Py_ssize_t = len(iovas)
        end: cython.Py_ssize_t = start
        self._begin(did, write)
        if i < n and iovas[i] <= self.last:
            self._find_top(iovas[i])
        while i < n and i == end:
            end = min(i + LANE_BLOCK, n) if self.full else i + 1
            self._ask(iovas, end, min(end + LANE_BLOCK, n))
            i = self._block(iovas, out, i, end)
        self._end(i - start)
        return i

    def _block(
        self, iovas: memoryview[int], out: memoryview[int], i: cython.Py_ssize_t, end: cython.Py_ssize_t
    ) -> cython.Py_ssize_t:
        """Translate ``iovas[i:end]`` into ``out``; where it stopped. The usual miss is here, in one piece."""
        while i < end:
            iova: cython.ulonglong = iovas[i]
            page: cython.ulonglong = iova >> 12
            span: cython.ulonglong = iova >> 21
            set_: cython.Py_ssize_t = (page ^ self.domain) & self.set_mask
            tag: cython.ulonglong = (page << 19) | self.key
            word: cython.ulonglong = 0
            if iova < self.reach and not _holds_8(self, set_ << 3, tag):
                table_set: cython.Py_ssize_t = (span ^ self.domain) & self.psc_set_mask
                table_tag: cython.ulonglong = (span << 19) | self.psc_key
                if _holds_4(self, table_set << 2, table_tag):
                    word = self._once(page, table_set << 2, table_tag)
                elif iova >> 30 == self.top:
                    entry: cython.ulonglong = self.words[self.top_table + (span & 511)]
                    known: cython.ulonglong = entry & self.address
                    if entry & self.above_mask == self.above and known <= self.highest:
                        entry = self.words[(known >> 3) + (page & 511)]
                        if entry & self.plain == self.plain:
                            word = (entry & self.address) | TR_LEVEL_1 | TR_BOTH | TR_DIRTY
                            _fill_table(self, table_set, table_tag, known | TR_LEVEL_1 | TR_BOTH)
            if word != 0:
                _fill(self, set_, tag, word)
                out[i] = (word >> 12 << 12) | (iova & (PAGE_SIZE - 1))
            else:
                out[i] = self._any(iova)
                if out[i] == _NOWHERE:
                    break
            i += 1
        return i

    def _begin(self, did: cython.int, write: cython.bint) -> cython.void:
        """Take the domain's context out of the table of contexts."""
        base: cython.Py_ssize_t = did * CTX_WORDS
        self.domain = did
        self.key = (self.domain << 3) | 1
        self.psc_key = self.key + 1
        self.last = _NOWHERE >> (64 - self.contexts[base + CTX_WIDTH])
        self.present = self.contexts[base + CTX_PRESENT]
        self.read_bit = self.contexts[base + CTX_READ]
        self.write_bit = self.contexts[base + CTX_WRITE]
        self.large = self.contexts[base + CTX_LEAF]
        self.address = self.contexts[base + CTX_ADDRESS]
        self.accessed = self.contexts[base + CTX_ACCESSED]
        self.dirty = self.contexts[base + CTX_DIRTY]
        self.need = TR_WRITE | TR_DIRTY if write else TR_READ
        self.mark = self.accessed | self.dirty if write else self.accessed
        self.above = self.read_bit | self.write_bit | self.accessed
        self.plain = self.above | self.dirty
        self._look_full()
        self.top = _NOWHERE
        self.top_table = self.top_set = self.top_way = 0
        self.hits = self.once = self.others = self.psc_others = 0

    def _look_full(self) -> cython.void:
        """Find out whether the usual miss may be taken: caches of the usual shape, the IOTLB full of 4 KiB pages."""
        self.full = self.ways == 8 and self.psc_ways == 4 and self.live[1] == self.iotlb.capacity
        self.reach = self.last + 1 if self.full else 0

    def _end(self, done: cython.longlong) -> cython.void:
        """Count what the batch did: ``done`` accesses, ``hits`` of them without a walk, ``once`` with one read."""
        misses: cython.longlong = done - self.hits
        longer: cython.longlong = misses - self.once
        self.ledger.counts[L_IOTLB_HITS] += self.hits
        self.ledger.counts[L_IOTLB_MISSES] += misses
        self.ledger.counts[L_PSC_HITS] += misses
        self.ledger.counts[L_WALK_READS] += misses + longer
        self.iotlb.evictions += misses - self.others
        self.psc.evictions += longer - self.psc_others

    def _ask(self, iovas: memoryview[int], i: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.void:
        """Have the CPU fetch the leaf entries that later accesses will probably read; a wrong guess harms nothing."""
        if cython.compiled:
            while i < end:
                table: cython.ulonglong = self.words[self.top_table + ((iovas[i] >> 21) & 511)] & self.address
                prefetch(cython.address(self.words[(table >> 3) + ((iovas[i] >> 12) & 511)]))
                i += 1

    def _once(self, page: cython.ulonglong, first: cython.Py_ssize_t, tag: cython.ulonglong) -> cython.ulonglong:
        """The word of a plain leaf whose table the set at ``first`` of the paging-structure cache holds, or 0."""
        last: cython.Py_ssize_t = self.psc_tags[first + 3] == tag  # added twice: three times it would become a jump
        way: cython.Py_ssize_t = first + (self.psc_tags[first + 1] == tag) + last
        way += 2 * ((self.psc_tags[first + 2] == tag) + last)
        known: cython.ulonglong = self.psc_values[way]
        leaf: cython.ulonglong = self.words[(known >> 12 << 9) + (page & 511)]
        if leaf & self.plain != self.plain or known & TR_BOTH != TR_BOTH:
            return 0
        self.once += 1
        self._renew_table(way)
        return (leaf & self.address) | TR_LEVEL_1 | TR_BOTH | TR_DIRTY

    def _any(self, iova: cython.ulonglong) -> cython.ulonglong:
        """The physical address of any access that the lane can decide; all ones: leave it to the rule."""
        page: cython.ulonglong = iova >> 12
        word: cython.ulonglong = self._cached(iova)
        if word == 0:
            word = self._walked(iova)
            if word != TR_UNDECIDED:
                self._keep((page ^ self.domain) & self.set_mask, (page << 19) | self.key, word)
        if word == TR_UNDECIDED:
            return _NOWHERE
        size: cython.ulonglong = 1
        size <<= 3 + 9 * ((word & TR_LEVEL_MASK) >> TR_LEVEL_SHIFT)
        return (word >> 12 << 12) | (iova & (size - 1))

    def _cached(self, iova: cython.ulonglong) -> cython.ulonglong:
        """The IOTLB's word for an access, 0 when it has none, TR_UNDECIDED when it does not permit the access."""
        way: cython.Py_ssize_t = -1
        level: cython.int = 1
        while way < 0:
            if level > 3 or iova > self.last:
                return 0
            page: cython.ulonglong = iova >> (3 + 9 * level)
            first: cython.Py_ssize_t = ((page ^ self.domain) & self.set_mask) * self.ways
            way = _way(self.tags, first, self.ways, (page << 19) | (self.domain << 3) | level)
            level += 1
        word: cython.ulonglong = self.values[way]
        if word & self.need != self.need:
            return TR_UNDECIDED
        self.hits += 1
        self.iotlb.hit = way
        if self.iotlb.touch:
            self.iotlb._renew(way)
        return word

    def _walked(self, iova: cython.ulonglong) -> cython.ulonglong:
        """The word that a short walk finds for an access that the IOTLB does not know, or TR_UNDECIDED."""
        if iova > self.last:
            return TR_UNDECIDED
        span: cython.ulonglong = iova >> 21
        set_: cython.Py_ssize_t = (span ^ self.domain) & self.psc_set_mask
        way: cython.Py_ssize_t = _way(self.psc_tags, set_ * self.psc_ways, self.psc_ways, (span << 19) | self.psc_key)
        upper: cython.ulonglong = 0
        if way >= 0:
            known: cython.ulonglong = self.psc_values[way]
        else:
            if iova >> 30 != self.top and not self._find_top(iova):
                return TR_UNDECIDED
            upper = self.top_table + (span & 511)
            known = self._below(self.words[upper])
        at: cython.ulonglong = (known >> 12 << 9) + ((iova >> 12) & 511)
        word: cython.ulonglong = self._leaf(at, known)
        if word == TR_UNDECIDED:
            return TR_UNDECIDED
        if self.mark != 0:
            self.words[at] |= self.mark
        if upper == 0:
            self.once += 1
            self._renew_table(way)
        else:
            if self.accessed != 0:
                self.words[upper] |= self.accessed
            _fill_table(self, set_, (span << 19) | self.psc_key, known)
        return word

    def _find_top(self, iova: cython.ulonglong) -> cython.bint:
        """Take the level-2 table of an address out of the paging-structure cache; whether it knows one."""
        page: cython.ulonglong = iova >> 30
        set_: cython.Py_ssize_t = (page ^ self.domain) & self.psc_set_mask
        way: cython.Py_ssize_t = _way(
            self.psc_tags, set_ * self.psc_ways, self.psc_ways, (page << 19) | (self.psc_key + 1)
        )
        if way < 0:
            return False
        self.top_set, self.top_way, self.top_word, self.top_newest = set_, way, self.psc_values[way], False
        self.top = page if self.full else _NOWHERE
        self.top_table = self.top_word >> 12 << 9
        self.above_mask = self.above | self.large
        if self.top_word & TR_BOTH != TR_BOTH:
            self.above_mask = 0  # nothing below is plain
        return True

    def _below(self, entry: cython.ulonglong) -> cython.ulonglong:
        """The word for the level-1 table that an entry of ``top`` points to; else TR_UNDECIDED, no permission."""
        table: cython.ulonglong = entry & self.address
        if entry & self.present == 0 or entry & self.large != 0 or table > self.highest:
            return TR_UNDECIDED
        return table | TR_LEVEL_1 | self._permitted(entry, self.top_word)

    def _leaf(self, at: cython.ulonglong, known: cython.ulonglong) -> cython.ulonglong:
        """The word of the leaf at word index ``at`` of the table ``known``, its bits as if set, or TR_UNDECIDED."""
        entry: cython.ulonglong = self.words[at]
        permissions: cython.ulonglong = self._permitted(entry, known)
        if entry & self.present == 0 or permissions & self.need & TR_BOTH == 0:
            return TR_UNDECIDED
        entry |= self.mark
        if self.dirty == 0 or entry & self.dirty != 0:
            permissions |= TR_DIRTY
        return (entry & self.address) | TR_LEVEL_1 | permissions

    def _permitted(self, entry: cython.ulonglong, permissions: cython.ulonglong) -> cython.ulonglong:
        """What is left of ``permissions`` below ``entry``."""
        permissions &= TR_BOTH
        if entry & self.read_bit == 0:
            permissions &= TR_WRITE
        if entry & self.write_bit == 0:
            permissions &= TR_READ
        return permissions

    def _renew_table(self, way: cython.Py_ssize_t) -> cython.void:
        """Note the use of a table in the paging-structure cache."""
        if self.psc.touch:
            self.psc._renew(way)
            if way ^ self.top_way < self.psc_ways:  # both stand in one set
                self.top_newest = False

    def _renew_top(self) -> cython.void:
        """Note the use of ``top`` where it may not be the newest of its set."""
        if self.psc.touch:
            self.psc._renew(self.top_way)

    def _keep(self, set_: cython.Py_ssize_t, tag: cython.ulonglong, word: cython.ulonglong) -> cython.void:
        """``_fill`` of an IOTLB that may have empty ways or larger pages."""
        old: cython.ulonglong = self.tags[self.oldest[set_]]
        if old & 7 != 1:
            self.others += 1
            _account(self.iotlb, self.live, old, 1)
            self._look_full()
        _fill(self, set_, tag, word)

    def _replace_table(self, old: cython.ulonglong) -> cython.void:
        """Account for a way of the paging-structure cache that takes a level-1 table and held none."""
        self.psc_others += 1
        _account(self.psc, self.psc_live, old, 2)
        self.top = _NOWHERE  # it may be what gave room


# Steps of the loop that are functions outside the .pxd: nobody else can call them, so the compiler puts them in place.


@cython.cfunc  # type: ignore[operator]
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _holds_8(lane: BatchLane, first: cython.Py_ssize_t, tag: cython.ulonglong) -> cython.bint:
    """Whether the IOTLB's set at ``first``, of 8 ways, holds ``tag``."""
    return (
        lane.tags[first] == tag
        or lane.tags[first + 1] == tag
        or lane.tags[first + 2] == tag
        or lane.tags[first + 3] == tag
        or lane.tags[first + 4] == tag
        or lane.tags[first + 5] == tag
        or lane.tags[first + 6] == tag
        or lane.tags[first + 7] == tag
    )


@cython.cfunc  # type: ignore[operator]
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _holds_4(lane: BatchLane, first: cython.Py_ssize_t, tag: cython.ulonglong) -> cython.bint:
    """Whether the paging-structure cache's set at ``first``, of 4 ways, holds ``tag``."""
    return (
        lane.psc_tags[first] == tag
        or lane.psc_tags[first + 1] == tag
        or lane.psc_tags[first + 2] == tag
        or lane.psc_tags[first + 3] == tag
    )


@cython.cfunc  # type: ignore[operator]
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _fill(lane: BatchLane, set_: cython.Py_ssize_t, tag: cython.ulonglong, word: cython.ulonglong) -> cython.void:
    """Put a translation in place of the oldest of its set in the IOTLB."""
    way: cython.Py_ssize_t = lane.oldest[set_]
    lane.oldest[set_] = lane.newer[way]
    lane.tags[way] = tag
    lane.values[way] = word


@cython.cfunc  # type: ignore[operator]
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _fill_table(
    lane: BatchLane, set_: cython.Py_ssize_t, tag: cython.ulonglong, known: cython.ulonglong
) -> cython.void:
    """Note the use of ``top``, then put a level-1 table that it led to into the paging-structure cache."""
    if not lane.top_newest:
        lane._renew_top()
    lane.top_newest = set_ != lane.top_set
    way: cython.Py_ssize_t = lane.psc_oldest[set_]
    lane.psc_oldest[set_] = lane.psc_newer[way]
    if lane.psc_tags[way] & 7 != 2:
        lane._replace_table(lane.psc_tags[way])
    lane.psc_tags[way] = tag
    lane.psc_values[way] = known


def _way(
    tags: memoryview[int], first: cython.Py_ssize_t, ways: cython.Py_ssize_t, tag: cython.ulonglong
) -> cython.Py_ssize_t:
    """The way from ``first`` that holds ``tag``, or -1; without a jump that depends on which."""
    found: cython.Py_ssize_t = -1
    way: cython.Py_ssize_t
    for way in range(first, first + ways):
        found = way if tags[way] == tag else found
    return found


def _account(cache: SetCache, live: memoryview[int], old: cython.ulonglong, level: cython.int) -> cython.void:
    """Count an entry of ``level`` that takes the place of tag ``old`` (0: an empty way)."""
    if old != 0:
        cache.evictions += 1
        live[old & 7] -= 1
    else:
        cache.used += 1
    live[level] += 1
