"""What an IOVA domain does: magazines in front, a tree search behind; typed, without checks.

The rules are in ``domain``, whose public calls check their arguments and come here. An order of work for each call:

* ``_alloc_fast``: the magazines of the CPU; else the tree; else, when the caller allows it, the tree once more after
  every magazine and depot was drained into it.
* ``_free_fast``: into the loaded magazine; a size that is not cached, or no memory for a magazine: out of the tree.
* Batches: a run of equal sizes moves in one go between the array and the loaded magazine (``_get_run``, ``_put_run``);
  one item goes through ``_alloc_fast`` or ``_free_fast`` whenever the magazine has to change, so a batch leaves the
  same state, counts and events as its items would one by one.

In the signatures a ``p_ulonglong`` is an address when compiled, a flat view of 64-bit words when interpreted.
"""

from __future__ import annotations

from array import array
from functools import partial
from typing import SupportsIndex

import cython

from dmakit.clock import MS, Timer, VirtualClock
from dmakit.errors import MisuseError
from dmakit.iova.arguments import Text, within

if not cython.compiled:
    from dmakit.consts import (
        ENOMEM,
        IOVA_ANCHOR,
        IOVA_MAG_STRIDE,
        IOVA_NIL,
        IOVA_RANGE_CACHE_MAX_SIZE,
        L_IOVA_FAILED,
        L_IOVA_FREE_MAGAZINE,
        L_IOVA_FREE_TREE,
        L_IOVA_MAGAZINE,
        L_IOVA_TREE,
        L_LOCK_DEPOT,
        L_LOCK_RBTREE,
        L_RCACHE_FLUSHES,
        L_TREE_NODES,
    )
    from dmakit.failpoint import FailPoint
    from dmakit.iova.bits import ceil_log2
    from dmakit.iova.rcache import IovaRcaches
    from dmakit.iova.search import AugmentedSearch, LinuxSearch
    from dmakit.ledger import Ledger

POLICIES = ("linux", "augmented")
_DEPOT_DELAY_NS = 100 * MS
_LARGEST_GRANULE = 1 << 30


def _length(size: cython.ulonglong, order: cython.int) -> cython.ulonglong:
    """Granules that a request takes: what the caches may hold is rounded up to its power of two."""
    one: cython.ulonglong = 1
    return one << order if order < IOVA_RANGE_CACHE_MAX_SIZE else size


@cython.cclass
class IovaAllocator:
    """State and internals of ``domain.IovaDomain``, which documents them."""

    def __init__(
        self,
        *,
        granule: SupportsIndex = 4096,
        start_pfn: SupportsIndex = 1,
        cpus: SupportsIndex = 1,
        policy: Text = "linux",
        ledger: Ledger | None = None,
        fail: FailPoint | None = None,
        clock: VirtualClock | None = None,
    ) -> None:
        self.granule = within("granule", granule, 4, _LARGEST_GRANULE)
        if self.granule & (self.granule - 1):
            raise MisuseError(f"granule={granule}: must be a power of two")
        self.granule_shift = self.granule.bit_length() - 1
        self.highest_pfn = ((1 << 64) - 1) >> self.granule_shift
        self.start_pfn = within("start_pfn", start_pfn, 1, self.highest_pfn)
        self.dma_32bit_pfn = 1 << (32 - self.granule_shift)
        self.cpus = within("cpus", cpus, 1, 4096)
        if policy not in POLICIES:
            raise MisuseError(f"policy={policy!r}: must be one of {', '.join(POLICIES)}")
        self.policy = policy
        self.ledger = Ledger(self.cpus) if ledger is None else ledger
        if self.ledger.cpus < self.cpus:
            raise MisuseError(f"cpus={self.cpus}: the ledger counts only {self.ledger.cpus}")
        self.fail = FailPoint() if fail is None else fail
        self.clock = clock
        self.search = (LinuxSearch if policy == "linux" else AugmentedSearch)(self.start_pfn, self.dma_32bit_pfn)
        self.rcaches = IovaRcaches(self.cpus, self.ledger, self.fail)
        self._online = memoryview(array("b", b"\1" * self.cpus))
        self.online_cpus = self.cpus
        self.depot_delay_ns = _DEPOT_DELAY_NS
        self._work: list[Timer | None] = [None] * IOVA_RANGE_CACHE_MAX_SIZE
        self._work_cpu: list[int] = [0] * IOVA_RANGE_CACHE_MAX_SIZE
        self._events: list[tuple[object, ...]] = []
        self._recording = False

    def _on_cpu(self, cpu: SupportsIndex) -> int:
        cpu = within("cpu", cpu, 0, self.cpus - 1)
        if not self._online[cpu]:
            raise MisuseError(f"cpu={cpu}: is off line")
        return cpu

    def depot_work(self, order: SupportsIndex) -> bool:
        """One run of the delayed work of a depot; true when it gave a magazine back (and armed itself again)."""
        order = within("order", order, 0, IOVA_RANGE_CACHE_MAX_SIZE - 1)
        self._disarm(order)
        self.ledger._alone()
        cpu = self._work_cpu[order]
        magazine = self.rcaches._depot_excess(order, self.online_cpus, cpu)
        if not magazine:
            return False
        self._drain(magazine, cpu)
        self.rcaches.pool._release(magazine)
        self._schedule_depot_work(order, cpu)
        return True

    def close(self) -> None:
        """Stop the depots' delayed work (``put_iova_domain``): no timer is left on the clock."""
        for order in range(IOVA_RANGE_CACHE_MAX_SIZE):
            self._disarm(order)

    def _disarm(self, order: int) -> None:
        """Take a depot's delayed work off the clock, if it is there."""
        timer = self._work[order]
        if self.clock is not None and timer is not None:
            self.clock.cancel(timer)
        self._work[order] = None

    def _depot_timeout(self, order: int) -> None:
        self.depot_work(order)

    # Internals ---------------------------------------------------------------------------------------------------

    def _alloc_fast(
        self, cpu: cython.int, size: cython.ulonglong, limit_pfn: cython.ulonglong, flush_rcache: cython.bint
    ) -> cython.ulonglong:
        """First pfn, or 0."""
        pfn: cython.ulonglong = self._alloc_near(cpu, size, limit_pfn)
        if pfn == 0:
            pfn = self._alloc_far(cpu, size, limit_pfn, flush_rcache)
        if self._recording:
            self._emit_alloc(size, limit_pfn, pfn)
        return pfn

    def _alloc_near(self, cpu: cython.int, size: cython.ulonglong, limit_pfn: cython.ulonglong) -> cython.ulonglong:
        """From the magazines of ``cpu``, the depot or the tree; touches no other CPU's magazines. 0: not there."""
        order: cython.int = ceil_log2(size)
        length: cython.ulonglong = _length(size, order)
        pfn: cython.ulonglong = 0
        if order < IOVA_RANGE_CACHE_MAX_SIZE and length <= limit_pfn:
            pfn = self.rcaches._get(cpu, order, limit_pfn + 1 - length)
        if pfn == 0:
            pfn = self._alloc(cpu, length, limit_pfn)
            if pfn != 0:
                self.ledger.counts[L_IOVA_TREE] += 1
        return pfn

    def _alloc_far(
        self, cpu: cython.int, size: cython.ulonglong, limit_pfn: cython.ulonglong, flush_rcache: cython.bint
    ) -> cython.ulonglong:
        """After ``_alloc_near`` found nothing: empty every magazine into the tree, if wanted, and search once more."""
        pfn: cython.ulonglong = 0
        if flush_rcache:
            self._flush_rcaches(cpu)
            pfn = self._alloc(cpu, _length(size, ceil_log2(size)), limit_pfn)
        self.ledger.counts[L_IOVA_TREE if pfn else L_IOVA_FAILED] += 1
        return pfn

    def _alloc(self, cpu: cython.int, size: cython.ulonglong, limit_pfn: cython.ulonglong) -> cython.ulonglong:
        """``alloc_iova``: search the tree once, size-aligned; first pfn, or 0. Does not count the path."""
        if self.fail._hit():
            return 0
        before: cython.longlong = self.search.tree.visited
        self.ledger._lock(L_LOCK_RBTREE, cpu)
        pfn: cython.ulonglong = self.search._alloc(size, limit_pfn + 1)
        self.ledger.counts[L_TREE_NODES] += self.search.tree.visited - before
        return pfn

    def _free_fast(self, cpu: cython.int, pfn: cython.ulonglong, size: cython.ulonglong) -> cython.void:
        """Into a magazine of ``cpu``, or the whole node out of the tree."""
        order: cython.int = ceil_log2(size)
        done: cython.int = 0
        if self._recording:
            self._emit_free(pfn, size)
        if order < IOVA_RANGE_CACHE_MAX_SIZE:
            done = self.rcaches._put(cpu, order, pfn)
            if done == 2:
                self._schedule_depot_work(order, cpu)
        if done == 0:
            self._free(cpu, pfn)

    def _free(self, cpu: cython.int, pfn: cython.ulonglong) -> cython.bint:
        """Remove the node that holds ``pfn``; false when there is none."""
        self.ledger._lock(L_LOCK_RBTREE, cpu)
        node: cython.int = self.search.tree._find(pfn)
        if node <= IOVA_ANCHOR:
            return False
        self.search._remove(node)
        self.ledger.counts[L_IOVA_FREE_TREE] += 1
        return True

    def _reserve(self, lo: cython.ulonglong, hi: cython.ulonglong) -> cython.int:
        """0, or -ENOMEM."""
        self.ledger._lock(L_LOCK_RBTREE, 0)
        first: cython.ulonglong = self.search._cover(lo, hi)
        if first > hi:
            return 0
        if self.fail._hit() or self.search.tree._insert_before(self.search.above, first, hi) == IOVA_NIL:
            return -ENOMEM
        return 0

    def _drain(self, magazine: cython.int, cpu: cython.int) -> cython.void:
        """Remove from the tree every range of a magazine, and empty it."""
        first: cython.Py_ssize_t = magazine * IOVA_MAG_STRIDE + 1
        i: cython.int
        node: cython.int
        self.ledger._lock(L_LOCK_RBTREE, cpu)
        for i in range(self.rcaches.pool._size(magazine)):
            node = self.search.tree._find(self.rcaches.pool.words[first + i])
            if node != IOVA_NIL:
                self.search._remove(node)
        self.rcaches.pool._clear(magazine)

    def _drain_cpu(self, owner: cython.int, cpu: cython.int) -> cython.void:
        """Drain all magazines of CPU ``owner`` (the locks are taken by ``cpu``)."""
        slot: cython.int
        for slot in range(owner * IOVA_RANGE_CACHE_MAX_SIZE, (owner + 1) * IOVA_RANGE_CACHE_MAX_SIZE):
            self._drain(self.rcaches.loaded[slot], cpu)
            self._drain(self.rcaches.prev[slot], cpu)

    def _flush_rcaches(self, cpu: cython.int) -> cython.void:
        """Drain the magazines of every CPU on line, then all depots."""
        other: cython.int
        order: cython.int
        magazine: cython.int
        self.ledger.counts[L_RCACHE_FLUSHES] += 1
        for other in range(self.cpus):
            if self._online[other]:
                self._drain_cpu(other, cpu)
        for order in range(IOVA_RANGE_CACHE_MAX_SIZE):
            self.ledger._lock(L_LOCK_DEPOT, cpu)
            while self.rcaches.depot[order] != 0:
                magazine = self.rcaches._depot_pop(order)
                self._drain(magazine, cpu)
                self.rcaches.pool._release(magazine)

    def _schedule_depot_work(self, order: cython.int, cpu: cython.int) -> cython.void:
        """Arm the delayed work of a depot, unless it is armed or there is no clock."""
        if self.clock is not None and self._work[order] is None:
            self._work_cpu[order] = cpu
            self._work[order] = self.clock.call_later(self.depot_delay_ns, partial(self._depot_timeout, order))

    def _emit_alloc(self, size: cython.ulonglong, limit: cython.ulonglong, pfn: cython.ulonglong) -> cython.void:
        self._events.append(("af_out", size, limit, pfn))

    def _emit_free(self, pfn: cython.ulonglong, size: cython.ulonglong) -> cython.void:
        self._events.append(("ff_in", pfn, size))

    def _alloc_many(
        self,
        cpu: cython.int,
        sizes: cython.p_ulonglong,
        n: cython.Py_ssize_t,
        limit_pfn: cython.ulonglong,
        flush_rcache: cython.bint,
        pfns: cython.p_ulonglong,
    ) -> cython.longlong:
        """``_alloc_fast`` for each of ``n`` sizes; the number of successes."""
        i: cython.Py_ssize_t = 0
        end: cython.Py_ssize_t
        run: cython.Py_ssize_t
        done: cython.longlong = n
        size: cython.ulonglong
        while i < n:
            size = sizes[i]
            end = i + 1
            while end < n and sizes[end] == size:
                end += 1
            while i < end:
                if end - i > 1 and not self._recording:
                    run = self._cached_run(cpu, size, limit_pfn, pfns, i, end)
                    self.ledger.counts[L_IOVA_MAGAZINE] += run
                    i += run
                    if i == end:
                        break
                pfns[i] = self._alloc_fast(cpu, size, limit_pfn, flush_rcache)
                if pfns[i] == 0:
                    done -= 1
                i += 1
        return done

    def _cached_run(
        self,
        cpu: cython.int,
        size: cython.ulonglong,
        limit_pfn: cython.ulonglong,
        pfns: cython.p_ulonglong,
        first: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
    ) -> cython.Py_ssize_t:
        """What the loaded magazine can give for items ``first`` to ``end`` of ``pfns``: how many (not yet counted)."""
        one: cython.ulonglong = 1
        order: cython.int = ceil_log2(size)
        if order >= IOVA_RANGE_CACHE_MAX_SIZE or one << order > limit_pfn:
            return 0
        return self.rcaches._get_run(cpu, order, limit_pfn + 1 - (one << order), pfns, first, end)

    def _free_many(
        self, cpu: cython.int, pfns: cython.p_ulonglong, sizes: cython.p_ulonglong, n: cython.Py_ssize_t
    ) -> cython.void:
        """``_free_fast`` for each of ``n`` pairs whose pfn is not 0."""
        i: cython.Py_ssize_t = 0
        end: cython.Py_ssize_t
        run: cython.Py_ssize_t
        size: cython.ulonglong
        order: cython.int
        while i < n:
            if pfns[i] == 0:
                i += 1
                continue
            size = sizes[i]
            end = i + 1
            while end < n and sizes[end] == size and pfns[end] != 0:
                end += 1
            order = ceil_log2(size)
            while i < end:
                if order < IOVA_RANGE_CACHE_MAX_SIZE and end - i > 1 and not self._recording:
                    run = self.rcaches._put_run(cpu, order, pfns, i, end)
                    self.ledger.counts[L_IOVA_FREE_MAGAZINE] += run
                    i += run
                    if i == end:
                        break
                self._free_fast(cpu, pfns[i], size)
                i += 1
