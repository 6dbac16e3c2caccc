"""The flush queue of a lazy domain: freed IOVA ranges wait here until the whole domain has been flushed.

Unmapping in lazy mode clears the page table but leaves the IOTLB as it is; the range must not be given out again,
and table pages must not be reused, before an invalidation. So they go into a ring, each entry stamped with
``start_cnt``, the number of flushes begun so far. A flush of the whole domain adds 1 to ``start_cnt`` before it
and 1 to ``finish_cnt`` after it: an entry is safe when its stamp is below ``finish_cnt``, because then a flush began
after it was queued, and has ended.

Queueing first frees, from the front, what is safe; when the ring is full (one slot always stays empty) it flushes and
frees again. The first entry after a quiet time arms one timer for all rings; it flushes and frees everywhere. Ranges
are freed through the magazines of the CPU that does the freeing.

Two shapes: a ring of 256 entries for each CPU, flushed after 10 ms; or one ring of 32768 entries for all, flushed
after 1 s, for devices whose mappings are shadowed by a hypervisor (``shadow_on_flush``), where a flush is dear.

Models ``queue_iova``, ``fq_ring_free_locked``, ``fq_flush_iotlb``, ``fq_flush_timeout`` and ``iommu_dma_init_fq`` in
``drivers/iommu/dma-iommu.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import SupportsIndex

import cython

from dmakit.clock import MS, Timer, VirtualClock
from dmakit.errors import ExhaustedError
from dmakit.iova.arguments import within
from dmakit.iova.arrays import zeroed

if not cython.compiled:
    from dmakit.consts import (
        CAUSE_FQ_FULL,
        CAUSE_FQ_TIMER,
        CAUSE_OTHER,
        IOVA_DEFAULT_FQ_SIZE,
        IOVA_SINGLE_FQ_SIZE,
        L_FQ_ENTRIES,
        L_FQ_FLUSHES_FULL,
        L_FQ_FLUSHES_TIMER,
        L_LOCK_FQ,
    )
    from dmakit.failpoint import FailPoint
    from dmakit.iova.domain import IovaDomain
    from dmakit.iova.exact import exact
    from dmakit.ledger import Ledger

DEFAULT_TIMEOUT_NS = 10 * MS
SINGLE_TIMEOUT_NS = 1000 * MS
_ALL_ONES = (1 << 64) - 1


@cython.cclass
class FlushTarget:
    """What a flush queue acts on: a domain overrides both. This one has nothing to flush and no tables."""

    def _fq_flush_all(self, cause: cython.int) -> cython.void:
        """Invalidate the whole domain (``flush_iotlb_all``); ``cause`` is a ``consts.CAUSE_*``."""
        return

    def _fq_free_tables(self, head: cython.ulonglong) -> cython.void:
        """Free the table pages chained from physical address ``head`` (never 0)."""
        return


@cython.cclass
class CallbackTarget(FlushTarget):
    """A target for Python code: ``on_flush(cause)`` and ``on_free_tables(head)``, both optional."""

    def __init__(
        self,
        on_flush: Callable[[int], object] | None = None,
        on_free_tables: Callable[[int], object] | None = None,
    ) -> None:
        self.on_flush = on_flush
        self.on_free_tables = on_free_tables

    def _fq_flush_all(self, cause: cython.int) -> cython.void:
        self._call_flush(cause)

    def _fq_free_tables(self, head: cython.ulonglong) -> cython.void:
        self._call_free_tables(head)

    def _call_flush(self, cause: cython.int) -> cython.void:
        if self.on_flush is not None:
            self.on_flush(cause)

    def _call_free_tables(self, head: cython.ulonglong) -> cython.void:
        if self.on_free_tables is not None:
            self.on_free_tables(head)


@cython.cclass
class FlushQueue:
    """The queue of one domain; ExhaustedError when there is no memory for its rings (the domain stays strict then).

    Nothing here locks: its calls take turns, as those of its domain (the ledger counts the locks that Linux takes).
    A target's callbacks must not call the queue.

    ``clock`` may be None: then the timer only runs when ``timeout`` is called.
    """

    def __init__(
        self,
        iovad: IovaDomain,
        target: FlushTarget,
        *,
        cpus: SupportsIndex = 1,
        single: object = False,
        clock: VirtualClock | None = None,
        ledger: Ledger | None = None,
        fail: FailPoint | None = None,
    ) -> None:
        self.iovad = iovad
        self.target = target
        self.cpus = within("cpus", cpus, 1, iovad.cpus)
        self.clock = clock
        self.ledger = iovad.ledger if ledger is None else ledger
        self.rings = 1 if single else self.cpus
        self.size = IOVA_SINGLE_FQ_SIZE if single else IOVA_DEFAULT_FQ_SIZE
        self.timeout_ns = SINGLE_TIMEOUT_NS if single else DEFAULT_TIMEOUT_NS
        if (iovad.fail if fail is None else fail).hit():
            raise ExhaustedError(f"no memory for {self.rings} flush queue(s) of {self.size} entries")
        self.start_cnt = 0
        self.finish_cnt = 0
        self.timer_on = False
        self.timer_cpu = 0
        slots = self.rings * self.size
        self.head, self.tail = zeroed("I", self.rings), zeroed("I", self.rings)
        self.pfn, self.pages = zeroed("Q", slots), zeroed("Q", slots)
        self.tables, self.counter = zeroed("Q", slots), zeroed("Q", slots)
        self._timer: Timer | None = None
        self._events: list[tuple[object, ...]] = []
        self._recording = False

    # Public calls ------------------------------------------------------------------------------------------------

    def queue(
        self, pfn: SupportsIndex, pages: SupportsIndex, freelist_head: SupportsIndex = 0, cpu: SupportsIndex = 0
    ) -> None:
        """Queue ``pages`` granules at ``pfn`` and the table pages chained from ``freelist_head`` (0 = none)."""
        on: cython.longlong = exact(cpu)
        if not 0 <= on < self.cpus:
            on = within("cpu", cpu, 0, self.cpus - 1)
        first: cython.ulonglong = self.iovad._pfn("pfn", pfn, 1)
        count: cython.ulonglong = self.iovad._pfn("pages", pages, 1)
        head: cython.ulonglong = 0
        tables: cython.longlong = exact(freelist_head)
        head = tables if tables >= 0 else within("freelist_head", freelist_head, 0, _ALL_ONES)
        self.ledger._alone()
        self._queue(on, first, count, head)

    def timeout(self, *, cpu: SupportsIndex | None = None) -> None:
        """What the timer does: flush the domain, then free every entry on ``cpu`` (default: the CPU that armed it)."""
        on = self.timer_cpu if cpu is None else within("cpu", cpu, 0, self.cpus - 1)
        with self.ledger.turn:
            if self.clock is not None and self._timer is not None:
                self.clock.cancel(self._timer)
            self._timer = None
            self.timer_on = False
            if self._recording:
                self._events.append(("fqto_in",))
            self._sweep(CAUSE_FQ_TIMER, on)

    def flush(self, *, cpu: SupportsIndex = 0) -> None:
        """Flush the domain and free every entry now; the timer, if armed, stays armed."""
        on = within("cpu", cpu, 0, self.cpus - 1)
        self.ledger._alone()
        self._sweep(CAUSE_OTHER, on)

    def close(self) -> None:
        """Take the timer off the clock, then flush: nothing waits afterwards."""
        with self.ledger.turn:
            if self.clock is not None and self._timer is not None:
                self.clock.cancel(self._timer)
            self._timer = None
            self.timer_on = False
            if any(self.entries(cpu) for cpu in range(self.rings)):
                self.flush()

    def entries(self, cpu: SupportsIndex) -> int:
        """Entries that wait in the ring of ``cpu`` (in the one ring of a single queue)."""
        ring = within("cpu", cpu, 0, self.cpus - 1) % self.rings
        return (self.tail[ring] - self.head[ring]) % self.size

    def waiting(self) -> list[tuple[int, int]]:
        """Every queued range as (pfn, pages), oldest first, ring by ring."""
        found = []
        self.ledger._alone()
        for ring in range(self.rings):
            for i in range(self.entries(ring)):
                at = ring * self.size + (self.head[ring] + i) % self.size
                found.append((self.pfn[at], self.pages[at]))
        return found

    @property
    def events(self) -> list[tuple[object, ...]] | None:
        """Where ("fqto_in",) is appended when the timer fires, or None."""
        return self._events if self._recording else None

    @events.setter
    def events(self, target: list[tuple[object, ...]] | None) -> None:
        self._events = [] if target is None else target
        self._recording = target is not None

    # Internals ---------------------------------------------------------------------------------------------------

    def _queue(
        self, cpu: cython.int, pfn: cython.ulonglong, pages: cython.ulonglong, freelist_head: cython.ulonglong
    ) -> cython.void:
        """``queue_iova``: never fails."""
        ring: cython.int = cpu if self.rings > 1 else 0
        mask: cython.uint = self.size - 1
        at: cython.Py_ssize_t
        self.ledger._lock(L_LOCK_FQ, cpu)
        self._free_flushed(ring, cpu)
        if (self.tail[ring] + 1) & mask == self.head[ring]:
            self._flush_iotlb(CAUSE_FQ_FULL)
            self._free_flushed(ring, cpu)
        at = ring * self.size + self.tail[ring]
        self.pfn[at] = pfn
        self.pages[at] = pages
        self.tables[at] = freelist_head
        self.counter[at] = self.start_cnt
        self.tail[ring] = (self.tail[ring] + 1) & mask
        self.ledger.counts[L_FQ_ENTRIES] += 1
        if not self.timer_on:
            self.timer_on = True
            self._arm(cpu)

    def _free_flushed(self, ring: cython.int, cpu: cython.int) -> cython.void:
        """Free the entries at the front that a finished flush covers; the caller counted the ring's lock."""
        mask: cython.uint = self.size - 1
        at: cython.Py_ssize_t
        while self.head[ring] != self.tail[ring]:
            at = ring * self.size + self.head[ring]
            if self.counter[at] >= self.finish_cnt:
                return
            if self.tables[at] != 0:
                self.target._fq_free_tables(self.tables[at])
                self.tables[at] = 0
            self.iovad._free_fast(cpu, self.pfn[at], self.pages[at])
            self.head[ring] = (self.head[ring] + 1) & mask

    def _flush_iotlb(self, cause: cython.int) -> cython.void:
        """One flush of the whole domain between the two counters."""
        if cause == CAUSE_FQ_FULL:
            self.ledger.counts[L_FQ_FLUSHES_FULL] += 1
        elif cause == CAUSE_FQ_TIMER:
            self.ledger.counts[L_FQ_FLUSHES_TIMER] += 1
        self.start_cnt += 1
        self.target._fq_flush_all(cause)
        self.finish_cnt += 1

    def _sweep(self, cause: cython.int, cpu: cython.int) -> cython.void:
        """Flush, then free in every ring."""
        ring: cython.int
        self._flush_iotlb(cause)
        for ring in range(self.rings):
            self.ledger._lock(L_LOCK_FQ, cpu)
            self._free_flushed(ring, cpu)

    def _arm(self, cpu: cython.int) -> cython.void:
        """Start the one timer of this queue."""
        self.timer_cpu = cpu
        if self.clock is not None:
            self._timer = self.clock.call_later(self.timeout_ns, self.timeout)
