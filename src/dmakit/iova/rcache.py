"""The caches of freed IOVA ranges in front of the tree: two magazines a CPU and size, and a depot for each size.

Sizes of 1, 2, 4 … 32 granules (orders 0 to 5) are cached. Each CPU has for each order a *loaded* magazine, which it
uses, and a *prev* one; both always exist. When both are full, a freed range goes into a new magazine and the full
loaded one to the *depot* of that order, which all CPUs share; when both are empty, a magazine comes back from there.
A depot grows without limit, and its delayed work gives back one magazine a run while there are more of them than
CPUs on line.

A range that is taken out must lie at or below what the caller can address. Only the one magazine that was chosen
is searched for it: when all its pfns are too high the caller goes to the tree, whatever prev or the depot hold.

Per-CPU state is ``loaded`` and ``prev`` (index ``cpu * 6 + order``); shared state, under each depot's lock, is
``depot`` (top magazine, chained through ``link``) and ``depot_size``; the pool of magazine memory stands for the
kernel's slab.

Models ``struct iova_rcache``, ``__iova_rcache_get``, ``__iova_rcache_insert``, ``iova_depot_work_func`` in
``drivers/iommu/iova.c`` (Linux 6.7 and later).
"""

from __future__ import annotations

from typing import SupportsIndex

import cython

from dmakit.errors import ExhaustedError
from dmakit.iova.arguments import within
from dmakit.iova.arrays import zeroed

if not cython.compiled:
    from dmakit.consts import (
        IOVA_MAG_SIZE,
        IOVA_MAG_STRIDE,
        IOVA_RANGE_CACHE_MAX_SIZE,
        L_IOVA_DEPOT,
        L_IOVA_FREE_MAGAZINE,
        L_IOVA_MAGAZINE,
        L_LOCK_DEPOT,
    )
    from dmakit.failpoint import FailPoint
    from dmakit.iova.bits import mix
    from dmakit.iova.magazine import MagazinePool
    from dmakit.ledger import Ledger


@cython.cclass
class IovaRcaches:
    """The magazines of ``cpus`` CPUs and the depots of one domain; ExhaustedError without memory for them."""

    def __init__(self, cpus: SupportsIndex, ledger: Ledger, fail: FailPoint) -> None:
        self.cpus = cpus = within("cpus", cpus, 1, 65536)
        slots = cpus * IOVA_RANGE_CACHE_MAX_SIZE
        self.ledger = ledger
        self.pool = MagazinePool(fail, 2 * slots + 1)
        self.loaded = zeroed("i", slots)
        self.prev = zeroed("i", slots)
        self.depot = zeroed("i", IOVA_RANGE_CACHE_MAX_SIZE)
        self.depot_size = zeroed("i", IOVA_RANGE_CACHE_MAX_SIZE)
        for slot in range(slots):
            self.loaded[slot] = self.pool._new()
            self.prev[slot] = self.pool._new()
            if not self.loaded[slot] or not self.prev[slot]:
                raise ExhaustedError(f"no memory for the {2 * slots} magazines of an IOVA domain with {cpus} CPUs")

    def _become(self, other: IovaRcaches) -> None:
        """Hold what ``other``, of as many CPUs, holds; nothing is shared."""
        self.pool._become(other.pool)
        self.loaded[:] = other.loaded
        self.prev[:] = other.prev
        self.depot[:] = other.depot
        self.depot_size[:] = other.depot_size

    def chained(self, order: SupportsIndex) -> list[int]:
        """The magazines of a depot, the top first."""
        found, magazine = [], self.depot[within("order", order, 0, IOVA_RANGE_CACHE_MAX_SIZE - 1)]
        while magazine:
            found.append(magazine)
            magazine = self.pool.link[magazine]
        return found

    def fingerprint(self) -> int:
        """64 bits of every magazine's content by CPU and order, and of the depots, in order."""
        value: cython.ulonglong = 0
        slot: cython.int
        magazine: cython.int
        for slot in range(self.cpus * IOVA_RANGE_CACHE_MAX_SIZE):
            value = mix(value, self.pool._fingerprint(self.loaded[slot]))
            value = mix(value, self.pool._fingerprint(self.prev[slot]))
        for slot in range(IOVA_RANGE_CACHE_MAX_SIZE):
            value = mix(value, slot)
            magazine = self.depot[slot]
            while magazine:
                value = mix(value, self.pool._fingerprint(magazine))
                magazine = self.pool.link[magazine]
        return value

    def _discard(self, pfn: int) -> bool:
        """Take ``pfn`` out of whatever magazine holds it; false when none does."""
        held = list(self.loaded) + list(self.prev)
        for order in range(IOVA_RANGE_CACHE_MAX_SIZE):
            held += self.chained(order)
        return any(self.pool._discard(magazine, pfn) for magazine in held)

    def contents(self) -> list[tuple[int, int]]:
        """Every cached range as (pfn, order), magazines first by CPU, then depots."""
        found = []
        for slot in range(self.cpus * IOVA_RANGE_CACHE_MAX_SIZE):
            order = slot % IOVA_RANGE_CACHE_MAX_SIZE
            for magazine in (self.loaded[slot], self.prev[slot]):
                found += [(pfn, order) for pfn in self.pool.content(magazine)]
        for order in range(IOVA_RANGE_CACHE_MAX_SIZE):
            for magazine in self.chained(order):
                found += [(pfn, order) for pfn in self.pool.content(magazine)]
        return found

    def _get(self, cpu: cython.int, order: cython.int, highest: cython.ulonglong) -> cython.ulonglong:
        """A cached range of ``2**order`` granules that starts at ``highest`` or below, or 0. Counts its path."""
        slot: cython.int = cpu * IOVA_RANGE_CACHE_MAX_SIZE + order
        magazine: cython.int = self.loaded[slot]
        row: cython.int = L_IOVA_MAGAZINE
        if self.pool.words[magazine * IOVA_MAG_STRIDE] == 0:  # its size, without a call
            if self.pool._size(self.prev[slot]) != 0:
                self.loaded[slot] = self.prev[slot]
                self.prev[slot] = magazine
            else:
                self.ledger._lock(L_LOCK_DEPOT, cpu)
                if self.depot[order] == 0:
                    return 0
                self.pool._release(magazine)
                self.loaded[slot] = self._depot_pop(order)
                row = L_IOVA_DEPOT
            magazine = self.loaded[slot]
        pfn: cython.ulonglong = self.pool._pop(magazine, highest)
        if pfn != 0:
            self.ledger.counts[row] += 1
        return pfn

    def _put(self, cpu: cython.int, order: cython.int, pfn: cython.ulonglong) -> cython.int:
        """Cache a freed range: 0 = no memory for a magazine, 1 = done, 2 = done and a magazine went to the depot."""
        slot: cython.int = cpu * IOVA_RANGE_CACHE_MAX_SIZE + order
        magazine: cython.int = self.loaded[slot]
        answer: cython.int = 1
        if self.pool.words[magazine * IOVA_MAG_STRIDE] == IOVA_MAG_SIZE:
            if self.pool._size(self.prev[slot]) != IOVA_MAG_SIZE:
                self.loaded[slot] = self.prev[slot]
                self.prev[slot] = magazine
            else:
                fresh: cython.int = self.pool._new()
                if fresh == 0:
                    return 0
                self.ledger._lock(L_LOCK_DEPOT, cpu)
                self.pool.link[magazine] = self.depot[order]
                self.depot[order] = magazine
                self.depot_size[order] += 1
                self.loaded[slot] = fresh
                answer = 2
            magazine = self.loaded[slot]
        self.pool._push(magazine, pfn)
        self.ledger.counts[L_IOVA_FREE_MAGAZINE] += 1
        return answer

    def _get_run(
        self,
        cpu: cython.int,
        order: cython.int,
        highest: cython.ulonglong,
        pfns: cython.p_ulonglong,
        first: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
    ) -> cython.Py_ssize_t:
        """Pop into ``pfns[first:end]`` while the loaded magazine lasts, low enough: how many (not yet counted)."""
        magazine: cython.int = self.loaded[cpu * IOVA_RANGE_CACHE_MAX_SIZE + order]
        return self.pool._pop_run(magazine, highest, pfns, first, end)

    def _put_run(
        self,
        cpu: cython.int,
        order: cython.int,
        pfns: cython.p_ulonglong,
        first: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
    ) -> cython.Py_ssize_t:
        """Push ``pfns[first:end]`` on the loaded magazine until it is full: how many (not yet counted)."""
        magazine: cython.int = self.loaded[cpu * IOVA_RANGE_CACHE_MAX_SIZE + order]
        return self.pool._push_run(magazine, pfns, first, end)

    def _depot_pop(self, order: cython.int) -> cython.int:
        """The top magazine of a depot that is not empty; the caller counted the lock."""
        magazine: cython.int = self.depot[order]
        self.depot[order] = self.pool.link[magazine]
        self.depot_size[order] -= 1
        return magazine

    def _depot_excess(self, order: cython.int, online: cython.int, cpu: cython.int) -> cython.int:
        """A magazine of a depot that holds more than one for each CPU on line, else 0."""
        self.ledger._lock(L_LOCK_DEPOT, cpu)
        if self.depot_size[order] > online:
            return self._depot_pop(order)
        return 0
