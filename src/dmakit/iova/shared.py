"""One IOVA domain for several threads, each of which plays a CPU: the locked form of ``domain.IovaDomain``.

A plain domain has no locks: its calls take turns, one at a time in a machine (``turn``). This form locks, and needs no
GIL for that: any number of threads may call it, also with the same ``cpu``, and CPUs run side by side.

Locks: one for each CPU's magazines, one (the last) for everything shared: depots, tree, magazine memory, ledger. As
long as a batch is served by the loaded magazine it holds only its CPU's lock, for one run; CPUs do not meet there.
Prev, a depot and the tree are reached with the shared lock and then the CPU's own; to empty every CPU's magazines, or
to move their memory because it grows, the others' are taken too. Who holds a CPU's lock alone waits for nothing, and
only the holder of the shared lock waits for a CPU's, so nobody waits in a circle; and whoever waits has given up the
GIL, because the holder may need it (to grow an array, to arm a timer, to record an event).

What batches took from and gave to magazines is counted beside the CPU's lock, in a cache line that is its own, and goes
into the ledger when that CPU next takes the shared lock, or with ``settle``: one shared word a batch would cost two
CPUs more than all their work. The ledger of other parts of the machine must not be counted by other threads meanwhile:
give the domain its own, or count from one thread.

Compiled, a lock is one word, taken by an atomic exchange; who finds it held looks at it for a while (it is held for a
run of a magazine, or for one search) and then yields to other threads. Interpreted it is ``threading.Lock``.
"""

from __future__ import annotations

import threading
from typing import Any, SupportsIndex

import cython

from dmakit.errors import ExhaustedError, MisuseError
from dmakit.iova.arguments import apart, words
from dmakit.iova.arrays import zeroed

if cython.compiled:
    from cython.cimports.dmakit.iova.exact import Words, borrow, give_back, meet
else:
    from dmakit.consts import IOVA_RANGE_CACHE_MAX_SIZE, L_IOVA_FREE_MAGAZINE, L_IOVA_MAGAZINE
    from dmakit.iova.bits import ceil_log2
    from dmakit.iova.domain import IovaDomain

_LOOKS = 200
_APART = 4  # 1 << _APART words from one CPU to the next: two cache lines, because a line's neighbour is fetched with it
_TAKEN = 1  # words after the lock: what magazines served, and what they took back, since the ledger heard of it
_GIVEN = 2


@cython.cclass
class SharedDomain:
    """``domain`` behind locks; while threads use it through here, nobody may use it directly."""

    def __init__(self, domain: IovaDomain) -> None:
        self.domain = domain
        self.cpus = domain.cpus
        self._own = zeroed("q", (self.cpus + 1) << _APART)
        self._locks = [threading.Lock() for _ in range(0 if cython.compiled else self.cpus + 1)]

    @cython.locals(on=cython.int, flush=cython.bint)
    @cython.locals(wanted=cython.ulonglong, limit=cython.ulonglong, pfn=cython.ulonglong)
    def alloc_fast(
        self, size: SupportsIndex, limit_pfn: SupportsIndex, flush_rcache: object = True, cpu: SupportsIndex = 0
    ) -> int:
        """As ``IovaDomain.alloc_fast``."""
        on, flush = self.domain._cpu(cpu), bool(flush_rcache)
        wanted, limit = self.domain._pfn("size", size, 1), self.domain._pfn("limit_pfn", limit_pfn, 0)
        with cython.nogil:
            pfn = self._alloc_one(on, wanted, limit, flush)
        if pfn == 0:
            raise ExhaustedError(f"no free range of {wanted} granules at or below pfn {limit:#x}")
        return pfn

    @cython.locals(on=cython.int, wanted=cython.ulonglong, first=cython.ulonglong, known=cython.bint)
    def free_fast(self, pfn: SupportsIndex, size: SupportsIndex, cpu: SupportsIndex = 0) -> None:
        """As ``IovaDomain.free_fast``."""
        on, wanted = self.domain._cpu(cpu), self.domain._pfn("size", size, 1)
        first = self.domain._pfn("pfn", pfn, 1)
        with cython.nogil:
            known = self._free_one(on, first, wanted, True)
        if not known:
            raise MisuseError(f"pfn={first:#x}: no range is allocated there")

    @cython.locals(on=cython.int, limit=cython.ulonglong, flush=cython.bint, done=cython.Py_ssize_t)
    def alloc_batch(
        self,
        sizes: object,
        limit_pfn: SupportsIndex,
        pfns: object,
        flush_rcache: object = True,
        cpu: SupportsIndex = 0,
    ) -> int:
        """As ``IovaDomain.alloc_batch``; CPUs run side by side. For its counts see ``settle``."""
        on, limit, flush = self.domain._cpu(cpu), self.domain._pfn("limit_pfn", limit_pfn, 0), bool(flush_rcache)
        done = self._alloc_words(on, sizes, limit, flush, pfns) if cython.compiled else -1
        if done < 0:
            wanted, found = self.domain._sizes(sizes), words("pfns", pfns, writable=True)
            if len(wanted) != len(found):
                raise MisuseError(f"pfns: must have as many items as sizes ({len(wanted)}), not {len(found)}")
            apart("pfns", found, sizes=wanted)
            done = self._alloc_words(on, wanted, limit, flush, found)
        return done

    @cython.locals(on=cython.int, done=cython.bint)
    def free_batch(self, pfns: object, sizes: object, cpu: SupportsIndex = 0) -> None:
        """As ``IovaDomain.free_batch``; CPUs run side by side. For its counts see ``settle``."""
        on = self.domain._cpu(cpu)
        done = self._free_words(on, pfns, sizes) if cython.compiled else False
        if not done:
            ranges, spans = words("pfns", pfns), self.domain._sizes(sizes)
            if len(ranges) != len(spans):
                raise MisuseError(f"sizes: must have as many items as pfns ({len(ranges)}), not {len(spans)}")
            self._free_words(on, ranges, spans)

    def settle(self) -> None:
        """Bring the domain's ledger up to date with what magazines did in batches. Threads may go on meanwhile.

        Without it, the ledger hears of them when the CPU next needs more than its magazines.
        """
        cpu: cython.int
        with cython.nogil:
            for cpu in range(self.cpus):
                self._enter_shared(cpu)
                self._leave_shared(cpu)

    # Locks -------------------------------------------------------------------------------------------------------

    def _enter(self, lock: cython.int) -> cython.void:
        looks: cython.int
        if cython.compiled:
            while test_and_set(cython.address(self._own[lock << _APART]), 1):  # noqa: F821 (shared.pxd)
                looks = _LOOKS
                while looks and held(cython.address(self._own[lock << _APART]), 0):  # noqa: F821
                    looks -= 1
                if looks == 0:
                    sched_yield()  # noqa: F821
        else:
            self._locks[lock].acquire()

    def _leave(self, lock: cython.int) -> cython.void:
        if cython.compiled:
            unset(cython.address(self._own[lock << _APART]))  # noqa: F821
        else:
            self._locks[lock].release()

    def _enter_shared(self, cpu: cython.int) -> cython.void:
        """The shared lock, then that of ``cpu``."""
        self._enter(self.cpus)
        self._enter(cpu)
        self._settle(cpu)

    def _leave_shared(self, cpu: cython.int) -> cython.void:
        self._leave(cpu)
        self._leave(self.cpus)

    def _enter_others(self, cpu: cython.int) -> cython.void:
        """Every other CPU's lock, in ``_enter_shared``."""
        other: cython.int
        for other in range(self.cpus):
            if other != cpu:
                self._enter(other)

    def _leave_others(self, cpu: cython.int) -> cython.void:
        other: cython.int
        for other in range(self.cpus):
            if other != cpu:
                self._leave(other)

    # Internals: called without the GIL -------------------------------------------------------------------------

    def _settle(self, cpu: cython.int) -> cython.void:
        """Tell the ledger what the magazines of ``cpu`` did; with both locks."""
        at: cython.int = cpu << _APART
        self.domain.ledger.counts[L_IOVA_MAGAZINE] += self._own[at + _TAKEN]
        self.domain.ledger.counts[L_IOVA_FREE_MAGAZINE] += self._own[at + _GIVEN]
        self._own[at + _TAKEN] = 0
        self._own[at + _GIVEN] = 0

    def _alloc_one(
        self, cpu: cython.int, size: cython.ulonglong, limit_pfn: cython.ulonglong, flush_rcache: cython.bint
    ) -> cython.ulonglong:
        """As ``IovaDomain._alloc_fast``."""
        self._enter_shared(cpu)
        pfn: cython.ulonglong = self.domain._alloc_near(cpu, size, limit_pfn)
        if pfn == 0:
            self._enter_others(cpu)
            pfn = self.domain._alloc_far(cpu, size, limit_pfn, flush_rcache)
            self._leave_others(cpu)
        if self.domain._recording:
            self.domain._emit_alloc(size, limit_pfn, pfn)
        self._leave_shared(cpu)
        return pfn

    def _free_one(
        self, cpu: cython.int, pfn: cython.ulonglong, size: cython.ulonglong, check: cython.bint
    ) -> cython.bint:
        """As ``IovaDomain._free_fast``; false when ``check`` finds that no range is allocated at ``pfn``."""
        self._enter_shared(cpu)
        known: cython.bint = not check or self.domain.search.tree._find(pfn) != 0
        grows: cython.bint = self.domain.rcaches.pool.unused == 0
        if known:
            if grows:
                self._enter_others(cpu)
            self.domain._free_fast(cpu, pfn, size)
            if grows:
                self._leave_others(cpu)
        self._leave_shared(cpu)
        return known

    def _alloc_words(
        self, cpu: cython.int, sizes: Any, limit_pfn: cython.ulonglong, flush: cython.bint, pfns: Any
    ) -> cython.Py_ssize_t:
        """As ``IovaDomain._alloc_words``."""
        if cython.compiled:
            done: cython.Py_ssize_t = -1
            unusual: cython.bint
            wanted = cython.declare(Words)
            found = cython.declare(Words)
            if not borrow(cython.address(wanted), sizes, False):
                return -1
            if borrow(cython.address(found), pfns, True):
                unusual = wanted.n != found.n or meet(wanted.at, wanted.n, found.at, found.n)
                if not unusual and self.domain._all_sizes(wanted.at, wanted.n):
                    with cython.nogil:
                        done = self._alloc_many(cpu, wanted.at, wanted.n, limit_pfn, flush, found.at)
                give_back(cython.address(found))
            give_back(cython.address(wanted))
            return done
        return self._alloc_many(cpu, sizes, len(sizes), limit_pfn, flush, pfns)

    def _free_words(self, cpu: cython.int, pfns: Any, sizes: Any) -> cython.bint:
        """As ``IovaDomain._free_words``."""
        if cython.compiled:
            done: cython.bint = False
            ranges = cython.declare(Words)
            spans = cython.declare(Words)
            if not borrow(cython.address(ranges), pfns, False):
                return False
            if borrow(cython.address(spans), sizes, False):
                if ranges.n == spans.n and self.domain._all_sizes(spans.at, spans.n):
                    done = True
                    with cython.nogil:
                        self._free_many(cpu, ranges.at, spans.at, ranges.n)
                give_back(cython.address(spans))
            give_back(cython.address(ranges))
            return done
        self._free_many(cpu, pfns, sizes, len(sizes))
        return True

    def _alloc_many(
        self,
        cpu: cython.int,
        sizes: cython.p_ulonglong,
        n: cython.Py_ssize_t,
        limit_pfn: cython.ulonglong,
        flush_rcache: cython.bint,
        pfns: cython.p_ulonglong,
    ) -> cython.longlong:
        i: cython.Py_ssize_t = 0
        end: cython.Py_ssize_t
        taken: cython.Py_ssize_t
        done: cython.longlong = n
        while i < n:
            end = i + 1
            while end < n and sizes[end] == sizes[i]:
                end += 1
            while i < end:
                self._enter(cpu)
                taken = 0 if self.domain._recording else self.domain._cached_run(cpu, sizes[i], limit_pfn, pfns, i, end)
                self._own[(cpu << _APART) + _TAKEN] += taken
                self._leave(cpu)
                i += taken
                if i < end:
                    pfns[i] = self._alloc_one(cpu, sizes[i], limit_pfn, flush_rcache)
                    if pfns[i] == 0:
                        done -= 1
                    i += 1
        return done

    def _free_many(
        self, cpu: cython.int, pfns: cython.p_ulonglong, sizes: cython.p_ulonglong, n: cython.Py_ssize_t
    ) -> cython.void:
        i: cython.Py_ssize_t = 0
        end: cython.Py_ssize_t
        put: cython.Py_ssize_t
        order: cython.int
        while i < n:
            if pfns[i] == 0:
                i += 1
                continue
            end = i + 1
            while end < n and sizes[end] == sizes[i] and pfns[end] != 0:
                end += 1
            order = ceil_log2(sizes[i])
            while i < end:
                put = 0
                if order < IOVA_RANGE_CACHE_MAX_SIZE and not self.domain._recording:
                    self._enter(cpu)
                    put = self.domain.rcaches._put_run(cpu, order, pfns, i, end)
                    self._own[(cpu << _APART) + _GIVEN] += put
                    self._leave(cpu)
                i += put
                if i < end:
                    self._free_one(cpu, pfns[i], sizes[i], False)
                    i += 1
