"""The IOVA allocator of one domain: magazines in front, a tree search behind.

Vocabulary. A *pfn* is an IOVA divided by the granule (the smallest page of the IOMMU); sizes are in granules, limits
are the highest pfn that may be used (inclusive, as in the kernel's calls). pfn 0 is never given out and means failure.
The *fast* calls go through the magazines (``rcache``) for up to 32 granules; the plain ones act on the tree. A size
below 32 is rounded up to a power of two, so every cacheable range is one. A range in a magazine is still allocated
in the tree: tree nodes only go when a magazine is drained or a larger range is freed.

Slow path of an allocation: search; on failure (also of node memory), when the caller allows it, drain the magazines
of every CPU on line and all depots into the tree and search once more.

``free`` and the tree's share of ``free_fast`` remove the whole node that holds the pfn, whatever size was said.

The policy (``search``) is chosen by name: ``linux`` answers address for address like Linux 7.2, ``augmented`` searches
by gap size in O(log n). Magazines are the same for both.

Where this differs from the kernel on purpose: an allocation whose limit is smaller than its size fails (the
kernel's subtraction wraps there, and a magazine could answer above the limit); an unknown pfn given to a public
call is refused.

Locks, in the sense of the ledger: ``iova_rbtree_lock`` over ``search`` and the tree, one lock for each order's depot
(``rcaches``); a CPU's own magazines are its own.

Models ``struct iova_domain`` and ``alloc_iova_fast``, ``free_iova_fast``, ``alloc_iova``, ``free_iova``,
``reserve_iova``, ``free_cpu_cached_iovas``, ``free_global_cached_iovas`` in ``drivers/iommu/iova.c``.
"""

from __future__ import annotations

from array import array
from functools import partial
from typing import SupportsIndex

import cython

from dmakit.clock import MS, Timer, VirtualClock
from dmakit.errors import ExhaustedError, MisuseError
from dmakit.iova.arguments import Text, within, words

if cython.compiled:
    from cython.cimports.dmakit.consts import (
        ENOMEM,
        IOVA_ANCHOR,
        IOVA_MAG_STRIDE,
        IOVA_NIL,
        IOVA_RANGE_CACHE_MAX_SIZE,
        L_IOVA_FAILED,
        L_IOVA_FREE_TREE,
        L_IOVA_TREE,
        L_LOCK_DEPOT,
        L_LOCK_RBTREE,
        L_RCACHE_FLUSHES,
        L_TREE_NODES,
    )
    from cython.cimports.dmakit.failpoint import FailPoint
    from cython.cimports.dmakit.iova.bits import ceil_log2
    from cython.cimports.dmakit.iova.rcache import IovaRcaches
    from cython.cimports.dmakit.iova.search import AugmentedSearch, LinuxSearch
    from cython.cimports.dmakit.ledger import Ledger
else:
    from dmakit.consts import (
        ENOMEM,
        IOVA_ANCHOR,
        IOVA_MAG_STRIDE,
        IOVA_NIL,
        IOVA_RANGE_CACHE_MAX_SIZE,
        L_IOVA_FAILED,
        L_IOVA_FREE_TREE,
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


@cython.cclass
class IovaDomain:
    """One IOVA space of ``granule``-sized pages from ``start_pfn``, shared by ``cpus`` CPUs.

    ``ledger``, ``fail`` and ``clock`` are the machine's; without a clock the depot's delayed work runs only when
    ``depot_work`` is called. ExhaustedError when there is no memory for the magazines.
    """

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

    # Public calls: validate, call the internal, raise ------------------------------------------------------------

    def alloc_fast(
        self, size: SupportsIndex, limit_pfn: SupportsIndex, flush_rcache: object = True, *, cpu: SupportsIndex = 0
    ) -> int:
        """First pfn of ``size`` granules that end at ``limit_pfn`` or below (``alloc_iova_fast``).

        ``flush_rcache``: when nothing fits, give all cached ranges back to the tree and search again.
        ExhaustedError when the space (or memory for a node) is used up.
        """
        cpu, size = self._on_cpu(cpu), within("size", size, 1, self.highest_pfn)
        limit_pfn = within("limit_pfn", limit_pfn, 0, self.highest_pfn)
        pfn = self._alloc_fast(cpu, size, limit_pfn, bool(flush_rcache))
        if pfn == 0:
            raise ExhaustedError(f"no free range of {size} granules at or below pfn {limit_pfn:#x}")
        return pfn

    def alloc(self, size: SupportsIndex, limit_pfn: SupportsIndex, *, cpu: SupportsIndex = 0) -> int:
        """``alloc_fast`` without magazines and without rounding: one search of the tree (``alloc_iova``)."""
        cpu, size = self._on_cpu(cpu), within("size", size, 1, self.highest_pfn)
        limit = within("limit_pfn", limit_pfn, 0, self.highest_pfn)
        pfn = self._alloc(cpu, size, limit)
        self.ledger.count(L_IOVA_TREE if pfn else L_IOVA_FAILED)
        if pfn == 0:
            raise ExhaustedError(f"no free range of {size} granules at or below pfn {limit:#x}")
        return pfn

    def free_fast(self, pfn: SupportsIndex, size: SupportsIndex, *, cpu: SupportsIndex = 0) -> None:
        """Free the range at ``pfn`` through the magazines of ``cpu`` (``free_iova_fast``)."""
        cpu, size = self._on_cpu(cpu), within("size", size, 1, self.highest_pfn)
        self._free_fast(cpu, self._allocated(pfn), size)

    def free(self, pfn: SupportsIndex, *, cpu: SupportsIndex = 0) -> None:
        """Remove the whole tree node that holds ``pfn`` (``free_iova``)."""
        self._free(self._on_cpu(cpu), self._allocated(pfn))

    def reserve(self, lo: SupportsIndex, hi: SupportsIndex) -> None:
        """Make pfns ``lo`` to ``hi`` (inclusive) unavailable, over whatever is allocated there (``reserve_iova``).

        ExhaustedError without memory for a node; nodes that overlapped stay extended then, as in the kernel.
        """
        lo, hi = within("lo", lo, 0, self.highest_pfn), within("hi", hi, 0, self.highest_pfn)
        if lo > hi:
            raise MisuseError(f"lo={lo}: must not be above hi={hi}")
        if self._reserve(lo, hi) < 0:
            raise ExhaustedError(f"no memory for the reservation of pfns [{lo:#x}, {hi:#x}]")

    @cython.locals(wanted="unsigned long long[::1]", found="unsigned long long[::1]")
    @cython.locals(limit=cython.ulonglong, on=cython.int, flush=cython.bint, done=cython.longlong)
    def alloc_batch(
        self,
        sizes: object,
        limit_pfn: SupportsIndex,
        pfns: object,
        *,
        flush_rcache: object = True,
        cpu: SupportsIndex = 0,
    ) -> int:
        """``alloc_fast`` for each of ``sizes`` into ``pfns`` (64-bit words; 0 = failed); returns the successes.

        Compiled, it runs without the GIL; no other thread may use the domain meanwhile.
        """
        on, limit = self._on_cpu(cpu), within("limit_pfn", limit_pfn, 0, self.highest_pfn)
        wanted, found = self._sizes(sizes), words("pfns", pfns, writable=True)
        if len(wanted) != len(found):
            raise MisuseError(f"pfns: must have as many items as sizes ({len(wanted)}), not {len(found)}")
        flush = bool(flush_rcache)
        with cython.nogil:
            done = self._alloc_many(on, wanted, limit, flush, found)
        return done  # noqa: RET504 (it takes the GIL)

    @cython.locals(ranges="unsigned long long[::1]", spans="unsigned long long[::1]", on=cython.int)
    def free_batch(self, pfns: object, sizes: object, *, cpu: SupportsIndex = 0) -> None:
        """``free_fast`` for each pair of ``pfns`` and ``sizes`` (64-bit words); a pfn of 0 is skipped."""
        on = self._on_cpu(cpu)
        ranges, spans = words("pfns", pfns), self._sizes(sizes)
        if len(ranges) != len(spans):
            raise MisuseError(f"sizes: must have as many items as pfns ({len(ranges)}), not {len(spans)}")
        with cython.nogil:
            self._free_many(on, ranges, spans)

    def flush_rcaches(self, *, cpu: SupportsIndex = 0) -> None:
        """Give every cached range back to the tree, as an allocation does that found nothing."""
        self._flush_rcaches(self._on_cpu(cpu))

    def set_online(self, cpu: SupportsIndex, online: object) -> None:
        """Take a CPU off line (its magazines go back to the tree) or on line again."""
        cpu = within("cpu", cpu, 0, self.cpus - 1)
        if bool(self._online[cpu]) == bool(online):
            return
        if not online and self.online_cpus == 1:
            raise MisuseError(f"cpu={cpu}: is the last CPU on line")
        self._online[cpu] = bool(online)
        self.online_cpus += 1 if online else -1
        if not online:
            self._drain_cpu(cpu, cpu)

    def depot_work(self, order: SupportsIndex) -> bool:
        """One run of the delayed work of a depot; true when it gave a magazine back (and armed itself again)."""
        order = within("order", order, 0, IOVA_RANGE_CACHE_MAX_SIZE - 1)
        self._disarm(order)
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

    # What a replay needs -----------------------------------------------------------------------------------------

    def copy(self) -> IovaDomain:
        """An equal domain that shares only ledger and fail point; no work of its depots is on a clock."""
        twin = IovaDomain(
            granule=self.granule,
            start_pfn=self.start_pfn,
            cpus=self.cpus,
            policy=self.policy,
            ledger=self.ledger,
            fail=self.fail,
        )
        twin.search.become(self.search)
        twin.rcaches.become(self.rcaches)
        twin._online[:] = self._online
        twin.online_cpus = self.online_cpus
        return twin

    def fingerprint(self) -> int:
        """A hash of the whole state, for comparisons in this process: equal domains answer every later call alike."""
        return hash((self.search.fingerprint(), self.rcaches.fingerprint(), bytes(self._online)))

    def adopt(self, pfn: int, size: int) -> str:
        """Make the range at ``pfn`` allocated because a recording says so; returns how it was free before.

        ``cached``: it lay in a magazine and was taken out; ``free``: a node was inserted; ``overlap``: allocated
        ranges stood in the way and were dropped first.
        """
        pfn, size = within("pfn", pfn, 1, self.highest_pfn), within("size", size, 1, self.highest_pfn)
        if self.rcaches.discard(pfn) and self.search.tree.find(pfn) is not None:
            return "cached"
        dropped = self.search.adopt(pfn, pfn + size - 1)
        for lost in dropped:
            self.rcaches.discard(lost)
        return "overlap" if dropped else "free"

    # What tests and reports look at ------------------------------------------------------------------------------

    @property
    def events(self) -> list[tuple[object, ...]] | None:
        """Where ("af_out", size, limit_pfn, pfn) and ("ff_in", pfn, size) are appended, or None."""
        return self._events if self._recording else None

    @events.setter
    def events(self, target: list[tuple[object, ...]] | None) -> None:
        self._events = [] if target is None else target
        self._recording = target is not None

    @property
    def node_count(self) -> int:
        """Nodes in the tree, reservations included, the anchor not."""
        return self.search.tree.count

    @property
    def max32_alloc_size(self) -> int:
        """The kernel's negative cache: sizes from here up are refused at once below 4 GiB (policy ``linux``)."""
        return self.search.max32_alloc_size

    def nodes(self) -> list[tuple[int, int]]:
        """Allocated ranges (lo, hi), cached and reserved ones included, ascending, the anchor left out."""
        return self.search.tree.nodes()

    def magazines(self, cpu: SupportsIndex, order: SupportsIndex) -> tuple[list[int], list[int]]:
        """The pfns in (loaded, prev) of a CPU, top of the stack last."""
        cpu = within("cpu", cpu, 0, self.cpus - 1)
        slot = cpu * IOVA_RANGE_CACHE_MAX_SIZE + within("order", order, 0, IOVA_RANGE_CACHE_MAX_SIZE - 1)
        pool = self.rcaches.pool
        return pool.content(self.rcaches.loaded[slot]), pool.content(self.rcaches.prev[slot])

    def depot_sizes(self) -> list[int]:
        """Full magazines in the depot, by order."""
        return list(self.rcaches.depot_size)

    def cached_pfns(self) -> list[tuple[int, int]]:
        """Every range in a magazine or depot as (pfn, size), ascending."""
        return sorted((pfn, 1 << order) for pfn, order in self.rcaches.contents())

    # Arguments ---------------------------------------------------------------------------------------------------

    def _on_cpu(self, cpu: SupportsIndex) -> int:
        cpu = within("cpu", cpu, 0, self.cpus - 1)
        if not self._online[cpu]:
            raise MisuseError(f"cpu={cpu}: is off line")
        return cpu

    def _allocated(self, pfn: SupportsIndex) -> int:
        pfn = within("pfn", pfn, 1, self.highest_pfn)
        if self.search.tree._find(pfn) == IOVA_NIL:
            raise MisuseError(f"pfn={pfn:#x}: no range is allocated there")
        return pfn

    def _sizes(self, sizes: object) -> memoryview[int]:
        flat = words("sizes", sizes)
        bad = self._first_bad_size(flat)
        if bad >= 0:
            within(f"sizes[{bad}]", flat[bad], 1, self.highest_pfn)
        return flat

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
        one: cython.ulonglong = 1
        order: cython.int = ceil_log2(size)
        length: cython.ulonglong = one << order if order < IOVA_RANGE_CACHE_MAX_SIZE else size
        pfn: cython.ulonglong = 0
        if order < IOVA_RANGE_CACHE_MAX_SIZE and length <= limit_pfn:
            pfn = self.rcaches._get(cpu, order, limit_pfn + 1 - length)
        if pfn == 0:
            pfn = self._alloc(cpu, length, limit_pfn)
            if pfn == 0 and flush_rcache:
                self._flush_rcaches(cpu)
                pfn = self._alloc(cpu, length, limit_pfn)
            self.ledger.counts[L_IOVA_TREE if pfn else L_IOVA_FAILED] += 1
        if self._recording:
            self._emit_alloc(size, limit_pfn, pfn)
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
        base: cython.int = magazine * IOVA_MAG_STRIDE
        i: cython.int
        node: cython.int
        self.ledger._lock(L_LOCK_RBTREE, cpu)
        for i in range(self.rcaches.pool.size[magazine]):
            node = self.search.tree._find(self.rcaches.pool.pfns[base + i])
            if node != IOVA_NIL:
                self.search._remove(node)
        self.rcaches.pool.size[magazine] = 0

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

    def _first_bad_size(self, sizes: memoryview[int]) -> cython.Py_ssize_t:
        """Index of the first size that is 0 or larger than the space, or -1."""
        i: cython.Py_ssize_t
        for i in range(len(sizes)):
            if sizes[i] == 0 or sizes[i] > self.highest_pfn:
                return i
        return -1

    def _alloc_many(
        self,
        cpu: cython.int,
        sizes: memoryview[int],
        limit_pfn: cython.ulonglong,
        flush_rcache: cython.bint,
        pfns: memoryview[int],
    ) -> cython.longlong:
        """``_alloc_fast`` for each size; the number of successes."""
        i: cython.Py_ssize_t
        done: cython.longlong = 0
        for i in range(len(sizes)):
            pfns[i] = self._alloc_fast(cpu, sizes[i], limit_pfn, flush_rcache)
            if pfns[i] != 0:
                done += 1
        return done  # noqa: RET504 (it takes the GIL)

    def _free_many(self, cpu: cython.int, pfns: memoryview[int], sizes: memoryview[int]) -> cython.void:
        """``_free_fast`` for each pair."""
        i: cython.Py_ssize_t
        for i in range(len(pfns)):
            if pfns[i] != 0:
                self._free_fast(cpu, pfns[i], sizes[i])
