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

from typing import Any, SupportsIndex

import cython

from dmakit.errors import ExhaustedError, MisuseError
from dmakit.iova.arguments import apart, within, words

if cython.compiled:
    from cython.cimports.dmakit.iova.exact import Words, borrow, give_back, meet
else:
    from dmakit.consts import IOVA_NIL, IOVA_RANGE_CACHE_MAX_SIZE, L_IOVA_FAILED, L_IOVA_TREE
    from dmakit.iova.allocator import IovaAllocator
    from dmakit.iova.exact import exact


@cython.cclass
class IovaDomain(IovaAllocator):
    """One IOVA space of ``granule``-sized pages from ``start_pfn``, shared by ``cpus`` CPUs.

    ``ledger``, ``fail`` and ``clock`` are the machine's; without a clock the depot's delayed work runs only when
    ``depot_work`` is called. ExhaustedError when there is no memory for the magazines.
    """

    # Public calls: validate, call the internal, raise ------------------------------------------------------------

    @cython.locals(on=cython.int, wanted=cython.ulonglong, limit=cython.ulonglong, pfn=cython.ulonglong)
    @cython.locals(flush=cython.bint)
    def alloc_fast(
        self, size: SupportsIndex, limit_pfn: SupportsIndex, flush_rcache: object = True, cpu: SupportsIndex = 0
    ) -> int:
        """First pfn of ``size`` granules that end at ``limit_pfn`` or below (``alloc_iova_fast``).

        ``flush_rcache``: when nothing fits, give all cached ranges back to the tree and search again.
        ExhaustedError when the space (or memory for a node) is used up.
        """
        on = self._cpu(cpu)
        wanted, limit = self._pfn("size", size, 1), self._pfn("limit_pfn", limit_pfn, 0)
        flush = True if flush_rcache is True else bool(flush_rcache)
        self.ledger._alone()
        pfn = self._alloc_fast(on, wanted, limit, flush)
        if pfn == 0:
            raise ExhaustedError(f"no free range of {wanted} granules at or below pfn {limit:#x}")
        return pfn

    @cython.locals(on=cython.int, wanted=cython.ulonglong, limit=cython.ulonglong, pfn=cython.ulonglong)
    def alloc(self, size: SupportsIndex, limit_pfn: SupportsIndex, cpu: SupportsIndex = 0) -> int:
        """``alloc_fast`` without magazines and without rounding: one search of the tree (``alloc_iova``)."""
        on = self._cpu(cpu)
        wanted, limit = self._pfn("size", size, 1), self._pfn("limit_pfn", limit_pfn, 0)
        self.ledger._alone()
        pfn = self._alloc(on, wanted, limit)
        self.ledger.counts[L_IOVA_TREE if pfn else L_IOVA_FAILED] += 1
        if pfn == 0:
            raise ExhaustedError(f"no free range of {wanted} granules at or below pfn {limit:#x}")
        return pfn

    @cython.locals(on=cython.int, wanted=cython.ulonglong)
    def free_fast(self, pfn: SupportsIndex, size: SupportsIndex, cpu: SupportsIndex = 0) -> None:
        """Free the range at ``pfn`` through the magazines of ``cpu`` (``free_iova_fast``)."""
        on, wanted = self._cpu(cpu), self._pfn("size", size, 1)
        self._free_fast(on, self._allocated(pfn), wanted)

    @cython.locals(on=cython.int)
    def free(self, pfn: SupportsIndex, cpu: SupportsIndex = 0) -> None:
        """Remove the whole tree node that holds ``pfn`` (``free_iova``)."""
        on = self._cpu(cpu)
        self._free(on, self._allocated(pfn))

    def reserve(self, lo: SupportsIndex, hi: SupportsIndex) -> None:
        """Make pfns ``lo`` to ``hi`` (inclusive) unavailable, over whatever is allocated there (``reserve_iova``).

        ExhaustedError without memory for a node; nodes that overlapped stay extended then, as in the kernel.
        """
        lo, hi = within("lo", lo, 0, self.highest_pfn), within("hi", hi, 0, self.highest_pfn)
        if lo > hi:
            raise MisuseError(f"lo={lo}: must not be above hi={hi}")
        self.ledger._alone()
        if self._reserve(lo, hi) < 0:
            raise ExhaustedError(f"no memory for the reservation of pfns [{lo:#x}, {hi:#x}]")

    @cython.locals(on=cython.int, limit=cython.ulonglong, flush=cython.bint, done=cython.Py_ssize_t)
    def alloc_batch(
        self,
        sizes: object,
        limit_pfn: SupportsIndex,
        pfns: object,
        flush_rcache: object = True,
        cpu: SupportsIndex = 0,
    ) -> int:
        """``alloc_fast`` for each of ``sizes`` into ``pfns`` (64-bit words; 0 = failed); returns the successes.

        ``pfns`` must not overlap ``sizes``.
        Compiled, it runs without the GIL; other threads' calls of the machine wait meanwhile.
        """
        on, limit, flush = self._cpu(cpu), self._pfn("limit_pfn", limit_pfn, 0), bool(flush_rcache)
        done = self._alloc_words(on, sizes, limit, flush, pfns) if cython.compiled else -1
        if done < 0:
            wanted, found = self._sizes(sizes), words("pfns", pfns, writable=True)
            if len(wanted) != len(found):
                raise MisuseError(f"pfns: must have as many items as sizes ({len(wanted)}), not {len(found)}")
            apart("pfns", found, sizes=wanted)
            done = self._alloc_words(on, wanted, limit, flush, found)
        return done

    @cython.locals(on=cython.int, done=cython.bint)
    def free_batch(self, pfns: object, sizes: object, cpu: SupportsIndex = 0) -> None:
        """``free_fast`` for each pair of ``pfns`` and ``sizes`` (64-bit words); a pfn of 0 is skipped."""
        on = self._cpu(cpu)
        done = self._free_words(on, pfns, sizes) if cython.compiled else False
        if not done:
            ranges, spans = words("pfns", pfns), self._sizes(sizes)
            if len(ranges) != len(spans):
                raise MisuseError(f"sizes: must have as many items as pfns ({len(ranges)}), not {len(spans)}")
            self._free_words(on, ranges, spans)

    def flush_rcaches(self, *, cpu: SupportsIndex = 0) -> None:
        """Give every cached range back to the tree, as an allocation does that found nothing."""
        on = self._on_cpu(cpu)
        self.ledger._alone()
        self._flush_rcaches(on)

    def set_online(self, cpu: SupportsIndex, online: object) -> None:
        """Take a CPU off line (its magazines go back to the tree) or on line again."""
        cpu, online = within("cpu", cpu, 0, self.cpus - 1), bool(online)
        self.ledger._alone()
        if bool(self._online[cpu]) == online:
            return
        if not online and self.online_cpus == 1:
            raise MisuseError(f"cpu={cpu}: is the last CPU on line")
        self._online[cpu] = online
        self.online_cpus += 1 if online else -1
        if not online:
            self._drain_cpu(cpu, cpu)

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
        self.ledger._alone()
        twin.search._become(self.search)
        twin.rcaches._become(self.rcaches)
        twin._online[:] = self._online
        twin.online_cpus = self.online_cpus
        return twin

    def fingerprint(self) -> int:
        """A hash of the whole state, for comparisons in this process: equal domains answer every later call alike."""
        self.ledger._alone()
        return hash((self.search.fingerprint(), self.rcaches.fingerprint(), bytes(self._online)))

    def adopt(self, pfn: int, size: int) -> str:
        """Make the range at ``pfn`` allocated because a recording says so; returns how it was free before.

        ``cached``: it lay in a magazine and was taken out; ``free``: a node was inserted; ``overlap``: allocated
        ranges stood in the way and were dropped first.
        """
        pfn, size = within("pfn", pfn, 1, self.highest_pfn), within("size", size, 1, self.highest_pfn)
        self.ledger._alone()
        if self.rcaches._discard(pfn) and self.search.tree.find(pfn) is not None:
            return "cached"
        dropped = self.search._adopt(pfn, pfn + size - 1)
        for lost in dropped:
            self.rcaches._discard(lost)
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
        self.ledger._alone()
        return self.search.tree.nodes()

    def magazines(self, cpu: SupportsIndex, order: SupportsIndex) -> tuple[list[int], list[int]]:
        """The pfns in (loaded, prev) of a CPU, top of the stack last."""
        cpu = within("cpu", cpu, 0, self.cpus - 1)
        slot = cpu * IOVA_RANGE_CACHE_MAX_SIZE + within("order", order, 0, IOVA_RANGE_CACHE_MAX_SIZE - 1)
        pool = self.rcaches.pool
        self.ledger._alone()
        return pool.content(self.rcaches.loaded[slot]), pool.content(self.rcaches.prev[slot])

    def depot_sizes(self) -> list[int]:
        """Full magazines in the depot, by order."""
        return list(self.rcaches.depot_size)

    def cached_pfns(self) -> list[tuple[int, int]]:
        """Every range in a magazine or depot as (pfn, size), ascending."""
        self.ledger._alone()
        return sorted((pfn, 1 << order) for pfn, order in self.rcaches.contents())

    # Arguments ---------------------------------------------------------------------------------------------------

    def _cpu(self, cpu: SupportsIndex) -> cython.int:
        """``cpu`` checked to be there and on line."""
        at: cython.longlong = exact(cpu)
        if 0 <= at < self.cpus and self._online[at]:
            return at
        return self._on_cpu(cpu)

    def _pfn(self, name: str, value: SupportsIndex, low: cython.longlong) -> cython.ulonglong:
        """``value``, a pfn or a number of granules, checked to lie between ``low`` and the highest pfn."""
        got: cython.longlong = exact(value)
        highest: cython.longlong = self.highest_pfn
        if low <= got <= highest:
            return got
        return within(name, value, low, self.highest_pfn)

    def _allocated(self, pfn: SupportsIndex) -> cython.ulonglong:
        """``pfn`` checked to lie in a range that is allocated."""
        at: cython.ulonglong = self._pfn("pfn", pfn, 1)
        self.ledger._alone()
        if self.search.tree._find(at) == IOVA_NIL:
            raise MisuseError(f"pfn={at:#x}: no range is allocated there")
        return at

    def _sizes(self, sizes: object) -> memoryview[int]:
        flat, highest = words("sizes", sizes), self.highest_pfn
        bad = next((i for i, size in enumerate(flat) if not 0 < size <= highest), -1)
        if bad >= 0:
            within(f"sizes[{bad}]", flat[bad], 1, highest)
        return flat

    def _alloc_words(
        self, cpu: cython.int, sizes: Any, limit_pfn: cython.ulonglong, flush: cython.bint, pfns: Any
    ) -> cython.Py_ssize_t:
        """A batch over two buffers: the successes. Compiled, -1 when something about the buffers is unusual."""
        if cython.compiled:
            done: cython.Py_ssize_t = -1
            unusual: cython.bint
            wanted = cython.declare(Words)
            found = cython.declare(Words)
            if not borrow(cython.address(wanted), sizes, False):
                return -1
            if borrow(cython.address(found), pfns, True):
                unusual = wanted.n != found.n or meet(wanted.at, wanted.n, found.at, found.n)
                if not unusual and self._all_sizes(wanted.at, wanted.n):
                    self.ledger.turn._take()
                    with cython.nogil:
                        done = self._alloc_many(cpu, wanted.at, wanted.n, limit_pfn, flush, found.at)
                    self.ledger.turn._give()
                give_back(cython.address(found))
            give_back(cython.address(wanted))
            return done
        with self.ledger.turn:
            return self._alloc_many(cpu, sizes, len(sizes), limit_pfn, flush, pfns)

    def _free_words(self, cpu: cython.int, pfns: Any, sizes: Any) -> cython.bint:
        """A batch over two buffers. Compiled, false when something about the buffers is unusual."""
        if cython.compiled:
            done: cython.bint = False
            ranges = cython.declare(Words)
            spans = cython.declare(Words)
            if not borrow(cython.address(ranges), pfns, False):
                return False
            if borrow(cython.address(spans), sizes, False):
                if ranges.n == spans.n and self._all_sizes(spans.at, spans.n):
                    done = True
                    self.ledger.turn._take()
                    with cython.nogil:
                        self._free_many(cpu, ranges.at, spans.at, ranges.n)
                    self.ledger.turn._give()
                give_back(cython.address(spans))
            give_back(cython.address(ranges))
            return done
        with self.ledger.turn:
            self._free_many(cpu, pfns, sizes, len(sizes))
        return True

    def _all_sizes(self, sizes: cython.p_ulonglong, n: cython.Py_ssize_t) -> cython.bint:
        """Whether each of ``n`` sizes lies between 1 and the highest pfn."""
        i: cython.Py_ssize_t
        for i in range(n):  # noqa: SIM110 (a generator is no C loop)
            if sizes[i] == 0 or sizes[i] > self.highest_pfn:
                return False
        return True
