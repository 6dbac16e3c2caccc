"""The batch's fast lane: many translations of one domain in one loop, with what the loop needs in one place.

``Translator._translate`` is the rule; the lane is the same rule for what nearly every access of a batch is: an IOTLB
entry that permits it, or a walk that ends at a 4 KiB leaf, begins at a cached table of level 1 or 2, and meets nothing
unusual. It looks first and changes caches, table bits and counters only when it is certain, so it can stop in front of
any other access (a fault, a large leaf, a cold cache, a dirty bit behind a cached entry) and leave it to the rule.

It works on the arrays of the two caches, which it shares, and counts in itself until the batch ends (``_end``).
"""

from __future__ import annotations

import cython

if cython.compiled:
    from cython.cimports.dmakit.consts import (
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
        PAGE_SIZE,
        TR_DIRTY,
        TR_LEVEL_MASK,
        TR_LEVEL_SHIFT,
        TR_READ,
        TR_WRITE,
    )
    from cython.cimports.dmakit.iommu.caches import SetCache
    from cython.cimports.dmakit.iommu.iotlb import Iotlb
    from cython.cimports.dmakit.ledger import Ledger
    from cython.cimports.dmakit.memory.physical import PhysicalMemory
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
        PAGE_SIZE,
        TR_DIRTY,
        TR_LEVEL_MASK,
        TR_LEVEL_SHIFT,
        TR_READ,
        TR_WRITE,
    )
    from dmakit.iommu.caches import SetCache
    from dmakit.iommu.iotlb import Iotlb
    from dmakit.ledger import Ledger
    from dmakit.memory.physical import PhysicalMemory

_STOP = 8  # a translation word without a level: leave the access to the rule


@cython.final
@cython.cclass
class BatchLane:
    """The fast lane of one unit: its caches, its memory, the context words of all its domains."""

    def __init__(
        self, iotlb: Iotlb, psc: SetCache, memory: PhysicalMemory, contexts: memoryview[int], ledger: Ledger
    ) -> None:
        self.iotlb, self.psc, self.ledger = iotlb, psc, ledger
        self.words, self.contexts = memory.words, contexts
        self.tags, self.values, self.stamps, self.live = iotlb.tags, iotlb.values, iotlb.stamps, iotlb.live
        self.psc_tags, self.psc_values, self.psc_stamps, self.psc_live = psc.tags, psc.values, psc.stamps, psc.live
        self.ways, self.set_mask, self.way_bits = iotlb.ways, iotlb.set_mask, iotlb.way_bits
        self.psc_ways, self.psc_set_mask, self.psc_way_bits = psc.ways, psc.set_mask, psc.way_bits
        self.tick, self.psc_tick = 1 << iotlb.way_bits, 1 << psc.way_bits
        self.touch, self.psc_touch = iotlb.touch, psc.touch
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
        self._begin(did, write)
        while i < n:
            iova: cython.ulonglong = iovas[i]
            word: cython.ulonglong = self._cached(iova)
            if word == 0:
                word = self._walked(iova)
            level: cython.int = (word & TR_LEVEL_MASK) >> TR_LEVEL_SHIFT
            if level == 0:
                break
            size: cython.ulonglong = 1
            size <<= 3 + 9 * level
            out[i] = (word >> 12 << 12) | (iova & (size - 1))
            i += 1
        self._end(i - start)
        return i

    def _begin(self, did: cython.int, write: cython.bint) -> cython.void:
        """Take the domain's context out of the table of contexts."""
        base: cython.Py_ssize_t = did * CTX_WORDS
        self.domain = did
        self.width = self.contexts[base + CTX_WIDTH]
        self.present = self.contexts[base + CTX_PRESENT]
        self.read_bit = self.contexts[base + CTX_READ]
        self.write_bit = self.contexts[base + CTX_WRITE]
        self.large = self.contexts[base + CTX_LEAF]
        self.address = self.contexts[base + CTX_ADDRESS]
        self.accessed = self.contexts[base + CTX_ACCESSED]
        self.dirty = self.contexts[base + CTX_DIRTY]
        self.need = TR_WRITE | TR_DIRTY if write else TR_READ
        self.mark = self.accessed | self.dirty if write else self.accessed
        self.now, self.psc_now = self.iotlb.time << self.way_bits, self.psc.time << self.psc_way_bits
        self.hits = self.longer = self.evicted = self.psc_evicted = 0

    def _end(self, done: cython.longlong) -> cython.void:
        """Count what the batch did: ``done`` accesses, of which ``hits`` needed no walk, ``longer`` a second read."""
        misses: cython.longlong = done - self.hits
        self.ledger.counts[L_IOTLB_HITS] += self.hits
        self.ledger.counts[L_IOTLB_MISSES] += misses
        self.ledger.counts[L_PSC_HITS] += misses
        self.ledger.counts[L_WALK_READS] += misses + self.longer
        self.iotlb.time, self.psc.time = self.now >> self.way_bits, self.psc_now >> self.psc_way_bits
        self.iotlb.evictions += self.evicted
        self.psc.evictions += self.psc_evicted

    def _cached(self, iova: cython.ulonglong) -> cython.ulonglong:
        """The IOTLB's word for an access, 0 when it has none, _STOP when it is the rule's to decide."""
        if iova >> self.width != 0:
            return _STOP
        way: cython.Py_ssize_t = -1
        level: cython.int
        for level in range(1, 4):
            if self.live[level] != 0:
                page: cython.ulonglong = iova >> (3 + 9 * level)
                first: cython.Py_ssize_t = ((page ^ self.domain) & self.set_mask) << self.way_bits
                way = _probe(self.tags, first, self.ways, (page << 19) | (self.domain << 3) | level)
                if way >= 0:
                    break
        if way < 0:
            return 0
        word: cython.ulonglong = self.values[way]
        if word & self.need != self.need:
            return _STOP
        self.hits += 1
        self.iotlb.hit = way
        if self.touch:
            self.now += self.tick
            self.stamps[way] = self.now | (way & (self.ways - 1))
        return word

    def _walked(self, iova: cython.ulonglong) -> cython.ulonglong:
        """The word that a short walk finds for an access that the IOTLB does not know, or _STOP."""
        upper: cython.ulonglong = 0
        span: cython.ulonglong = iova >> 21
        way: cython.Py_ssize_t = self._known(span, 2)
        if way >= 0:
            known: cython.ulonglong = self.psc_values[way]
        else:
            way = self._known(iova >> 30, 3)
            if way < 0:
                return _STOP
            upper = (self.psc_values[way] >> 12 << 9) + (span & 511)
            known = self._below(self.words[upper], self.psc_values[way])
            if known == _STOP:
                return _STOP
        at: cython.ulonglong = (known >> 12 << 9) + ((iova >> 12) & 511)
        entry: cython.ulonglong = self.words[at]
        permissions: cython.ulonglong = self._permitted(entry, known)
        if entry & self.present == 0 or permissions & self.need & (TR_READ | TR_WRITE) == 0:
            return _STOP
        if self.psc_touch:
            self.psc_now += self.psc_tick
            self.psc_stamps[way] = self.psc_now | (way & (self.psc_ways - 1))
        if upper != 0:
            self.longer += 1
            if self.accessed != 0:
                self.words[upper] |= self.accessed
            self._keep_table(span, known)
        entry |= self.mark
        if self.mark != 0:
            self.words[at] = entry
        if self.dirty == 0 or entry & self.dirty != 0:
            permissions |= TR_DIRTY
        word: cython.ulonglong = (entry & self.address) | (1 << TR_LEVEL_SHIFT) | permissions
        self._keep(iova >> 12, word)
        return word

    def _known(self, page: cython.ulonglong, level: cython.int) -> cython.Py_ssize_t:
        """The way of the paging-structure cache that knows the table below ``page`` of ``level``, or -1."""
        if self.psc_live[level] == 0:
            return -1
        first: cython.Py_ssize_t = ((page ^ self.domain) & self.psc_set_mask) << self.psc_way_bits
        return _probe(self.psc_tags, first, self.psc_ways, (page << 19) | (self.domain << 3) | level)

    def _below(self, entry: cython.ulonglong, permissions: cython.ulonglong) -> cython.ulonglong:
        """The word for the level-1 table that a level-2 entry points to; _STOP when it points to none."""
        table: cython.ulonglong = entry & self.address
        if entry & self.present == 0 or entry & self.large != 0 or table > self.highest:
            return _STOP
        return table | (1 << TR_LEVEL_SHIFT) | self._permitted(entry, permissions)

    def _permitted(self, entry: cython.ulonglong, permissions: cython.ulonglong) -> cython.ulonglong:
        """What is left of ``permissions`` below ``entry``."""
        permissions &= TR_READ | TR_WRITE
        if entry & self.read_bit == 0:
            permissions &= TR_WRITE
        if entry & self.write_bit == 0:
            permissions &= TR_READ
        return permissions

    def _keep(self, page: cython.ulonglong, word: cython.ulonglong) -> cython.void:
        """Put a 4 KiB translation into the IOTLB, which does not hold one of that page."""
        first: cython.Py_ssize_t = ((page ^ self.domain) & self.set_mask) << self.way_bits
        way: cython.Py_ssize_t = _oldest(self.stamps, first, self.ways)
        if self.tags[way] & 7 == 1:
            self.evicted += 1
        else:
            _account(self.iotlb, self.live, self.tags[way], 1)
        self.tags[way] = (page << 19) | (self.domain << 3) | 1
        self.values[way] = word
        self.now += self.tick
        self.stamps[way] = self.now | (way - first)

    def _keep_table(self, page: cython.ulonglong, word: cython.ulonglong) -> cython.void:
        """Put a level-1 table into the paging-structure cache, which does not hold one of that span."""
        first: cython.Py_ssize_t = ((page ^ self.domain) & self.psc_set_mask) << self.psc_way_bits
        way: cython.Py_ssize_t = _oldest(self.psc_stamps, first, self.psc_ways)
        if self.psc_tags[way] & 7 == 2:
            self.psc_evicted += 1
        else:
            _account(self.psc, self.psc_live, self.psc_tags[way], 2)
        self.psc_tags[way] = (page << 19) | (self.domain << 3) | 2
        self.psc_values[way] = word
        self.psc_now += self.psc_tick
        self.psc_stamps[way] = self.psc_now | (way - first)


def _probe(
    tags: memoryview[int], first: cython.Py_ssize_t, ways: cython.Py_ssize_t, tag: cython.ulonglong
) -> cython.Py_ssize_t:
    """The way from ``first`` that holds ``tag``, or -1. The usual numbers of ways have loops of fixed length."""
    way: cython.Py_ssize_t
    if ways == 8:
        for way in range(8):
            if tags[first + way] == tag:
                return first + way
    elif ways == 4:
        for way in range(4):
            if tags[first + way] == tag:
                return first + way
    else:
        for way in range(ways):
            if tags[first + way] == tag:
                return first + way
    return -1


def _oldest(stamps: memoryview[int], first: cython.Py_ssize_t, ways: cython.Py_ssize_t) -> cython.Py_ssize_t:
    """The way that gives room: the first empty one, else the one with the lowest stamp. One pass without a jump."""
    lowest: cython.ulonglong = stamps[first]
    way: cython.Py_ssize_t
    if ways == 8:
        for way in range(1, 8):
            lowest = min(lowest, stamps[first + way])
    elif ways == 4:
        for way in range(1, 4):
            lowest = min(lowest, stamps[first + way])
    else:
        for way in range(1, ways):
            lowest = min(lowest, stamps[first + way])
    return first + (lowest & (ways - 1))


def _account(cache: SetCache, live: memoryview[int], old: cython.ulonglong, level: cython.int) -> cython.void:
    """Count an entry of ``level`` that takes the place of tag ``old`` (0: an empty way)."""
    if old != 0:
        cache.evictions += 1
        live[old & 7] -= 1
    else:
        cache.used += 1
    live[level] += 1
