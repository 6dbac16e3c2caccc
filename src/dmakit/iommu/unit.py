"""One IOMMU as its driver sees it: domain ids, ranges to flush, descriptors submitted and waited for.

A *domain* is known to the unit by its id (``did``) and its context (``walker``): where the table is and how to read
it. ``attach`` hands out ids, counting up from 2 like Linux does (0 is reserved by caching mode, 1 is the first-level
default). The hardware half, translation and the execution of descriptors, is ``translation``; the words are
``invalidation``'s.

A flush asks by range. ``_flush_range`` rounds [start, end] to an aligned block of 2^mask pages, words one IOTLB
request for the domain and one device-TLB request for each of its ATS devices, and waits once for the batch. Rules,
those of ``drivers/iommu/intel/cache.c``:

* a block of more than 2^``max_mask`` pages becomes a domain-selective request; [0, all ones] shows mask 52 and is one
  too;
* IH = 1 says that no table page was freed; a domain-selective request has no hint;
* first-stage tables are invalidated by PASID-based requests, second-stage tables by IOTLB requests;
* a new mapping is invalidated only in caching mode, and only for second-stage tables (``_sync_range``).

``events`` collects ("flush_range" | "flush_range_np" | "flush_range_devtlb", start, end, addr, mask) and, as they are
submitted, ("qi", low, high); waits are counted and not shown, as in the kernel's trace. Ends are inclusive.
"""

from __future__ import annotations

from typing import SupportsIndex

import cython

from dmakit.errors import ExhaustedError, MisuseError
from dmakit.iova.arguments import within

if not cython.compiled:
    from dmakit.consts import (
        CAUSE_OTHER,
        CAUSE_SYNC_MAP,
        CTX_FIRST_STAGE,
        CTX_FLAGS,
        CTX_LEVELS,
        CTX_NP_CACHE,
        CTX_ROOT,
        CTX_WIDTH,
        CTX_WORDS,
        L_INV_CAUSE_UNMAP,
        L_INV_DEVTLB,
        L_INV_DOMAIN,
        L_INV_GLOBAL,
        L_INV_PAGE,
        N_CAUSES,
        QI_BATCH,
        QI_DOMAIN,
        QI_GLOBAL,
        QI_PAGE,
        WHOLE_MASK,
    )
    from dmakit.iommu.devtlb import DeviceTlb
    from dmakit.iommu.formats.base import PtFormat
    from dmakit.iommu.invalidation import (
        InvalidationQueue,
        _devtlb_high,
        _devtlb_low,
        _iotlb_low,
        _piotlb_low,
        _range_high,
    )
    from dmakit.iommu.translation import Translator
    from dmakit.ledger import Ledger
    from dmakit.memory.physical import PhysicalMemory

ALL_ONES = (1 << 64) - 1


@cython.final
@cython.cclass
class IommuUnit(Translator):
    """See the head of this file; the options are the unit's capability register.

    ``max_mask``: largest address mask of a page-selective request. ``iotlb_entries`` in sets of ``iotlb_ways``,
    ``psc_entries`` in sets of 4, replacement ``policy`` ``lru`` or ``fifo``. ``domains``: ids it can tell apart.
    ``events``: list or None.
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        *,
        ledger: Ledger,
        caching_mode: bool = False,
        coherent_walker: bool = True,
        max_mask: int = 18,
        iotlb_entries: int = 512,
        iotlb_ways: int = 8,
        psc_entries: int = 64,
        policy: str = "lru",
        domains: int = 256,
        fault_entries: int = 64,
        first_domain_id: int = 2,
    ) -> None:
        if not 0 <= max_mask <= 40:
            raise MisuseError(f"max_mask={max_mask}: must be 0 to 40")
        if not 1 <= domains <= 65536:
            raise MisuseError(f"domains={domains}: must be 1 to 65536")
        if not 0 <= first_domain_id < domains:
            raise MisuseError(f"first_domain_id={first_domain_id}: must be below domains={domains}")
        super().__init__(
            memory,
            ledger,
            domains=domains,
            iotlb_entries=iotlb_entries,
            iotlb_ways=iotlb_ways,
            psc_entries=psc_entries,
            policy=policy,
            fault_entries=fault_entries,
        )
        self.caching_mode = caching_mode
        self.coherent_walker = coherent_walker
        self.max_mask = max_mask
        self.first_domain_id = first_domain_id
        self.queue = InvalidationQueue(ledger)
        self.ats = False
        self.events: list[tuple[object, ...]] | None = None

    # Domains ---------------------------------------------------------------------------------------------

    def attach(self, fmt: PtFormat, root: int, levels: int) -> int:
        """Give the table of ``levels`` levels at physical address ``root`` the lowest free domain id."""
        self.ledger._alone()
        for did in range(self.first_domain_id, self.walker.domains):
            if self.walker.contexts[did * CTX_WORDS + CTX_LEVELS] == 0:
                self.walker.set_context(did, fmt, root, levels, bool(self.caching_mode))
                return did
        raise ExhaustedError(f"all domain ids from {self.first_domain_id} to {self.walker.domains - 1} are taken")

    def detach(self, did: int, *, cpu: int = 0) -> None:
        """Take the domain id back: its context goes first, then everything that was cached for it."""
        did, cpu = self._check_did(did), self._check_cpu(cpu)
        for devtlb in [devtlb for devtlb in self.devtlbs if devtlb.did == did]:
            self.detach_devtlb(devtlb, cpu=cpu)
        self.walker.clear_context(did)
        self._inv_domain(did, CAUSE_OTHER, cpu)

    def set_dirty_tracking(self, did: int, on: bool, *, cpu: int = 0) -> None:
        """Switch SSADS of a second-stage domain; cached translations go, they would hide the first writes."""
        did, cpu = self._check_did(did), self._check_cpu(cpu)
        if self.walker.contexts[did * CTX_WORDS + CTX_FLAGS] & CTX_FIRST_STAGE:
            raise MisuseError(f"domain {did}: a first-stage table has no dirty tracking to switch")
        self.walker._set_dirty(did, on)
        self._flush_all(did, CAUSE_OTHER, cpu)

    def attach_devtlb(self, devtlb: DeviceTlb, did: int) -> None:
        """Enable ATS for a device of the domain: flushes of the domain then reach its TLB."""
        self._check_did(did)
        if any(other.source == devtlb.source for other in self.devtlbs):
            raise MisuseError(f"source={devtlb.source:#x}: this requester's TLB is attached already")
        devtlb.did = did
        self.devtlbs.append(devtlb)
        self.ats = True

    def detach_devtlb(self, devtlb: DeviceTlb, *, cpu: int = 0) -> None:
        """Disable ATS for a device: its TLB is invalidated whole, then forgotten."""
        cpu = self._check_cpu(cpu)
        if devtlb not in self.devtlbs:
            raise MisuseError(f"source={devtlb.source:#x}: this requester's TLB is not attached")
        self._push_devtlb(devtlb, 0, WHOLE_MASK, cpu)
        self._submit(cpu)
        self.devtlbs.remove(devtlb)
        self.ats = bool(self.devtlbs)

    def set_root(self, did: int, root: int, levels: int, *, cpu: int = 0) -> None:
        """Point a domain at another table page (a table that grew a level) and invalidate the domain."""
        did, cpu = self._check_did(did), self._check_cpu(cpu)
        self.walker.check_root(root)
        levels = within("levels", levels, 1, 5)
        self.ledger._alone()
        self._set_root(did, root, levels)
        self._flush_all(did, CAUSE_OTHER, cpu)

    def _set_root(self, did: cython.int, root: cython.ulonglong, levels: cython.int) -> cython.void:
        """Point the context at another table (a table that grew); the caller invalidates."""
        base: cython.Py_ssize_t = did * CTX_WORDS
        width: cython.ulonglong = self.walker.contexts[base + CTX_WIDTH]
        width += 9 * (levels - self.walker.contexts[base + CTX_LEVELS])
        self.walker.contexts[base + CTX_ROOT] = root
        self.walker.contexts[base + CTX_WIDTH] = width
        self.walker.contexts[base + CTX_LEVELS] = levels

    def _check_did(self, did: SupportsIndex) -> int:
        number = within("did", did, 0, 65535)
        self.ledger._alone()
        if number >= self.walker.domains or self.walker.contexts[number * CTX_WORDS + CTX_LEVELS] == 0:
            raise MisuseError(f"did={number}: no domain with this id is attached")
        return number

    # Flushes: what a domain asks for -------------------------------------------------------------------------

    def _flush_range(
        self,
        did: cython.int,
        start: cython.ulonglong,
        end: cython.ulonglong,
        ih: cython.bint,
        cause: cython.int,
        cpu: cython.int,
    ) -> cython.void:
        """Invalidate [start, end] of a domain and wait. ``ih``: no table page was freed. ``cause``: CAUSE_*."""
        mask: cython.int = _block_mask(start, end)
        addr: cython.ulonglong = 0 if mask == WHOLE_MASK else start >> (12 + mask) << (12 + mask)
        if self.events is not None:
            self._note_flush(did, start, end, addr, mask)
        self._push_iotlb(did, addr, mask, ih, cause, cpu)
        if self.ats:
            self._push_devtlbs(did, addr, mask, cpu)
        self._submit(cpu)

    def _flush_all(self, did: cython.int, cause: cython.int, cpu: cython.int) -> cython.void:
        """Invalidate the whole domain and wait: what a flush queue does."""
        self._flush_range(did, 0, self.no_phys, False, cause, cpu)

    def _sync_range(
        self, did: cython.int, start: cython.ulonglong, end: cython.ulonglong, cpu: cython.int
    ) -> cython.void:
        """After [start, end] was mapped: in caching mode tell the unit that not-present entries became present."""
        if self.walker.contexts[did * CTX_WORDS + CTX_FLAGS] & CTX_NP_CACHE == 0:
            return
        mask: cython.int = _block_mask(start, end)
        addr: cython.ulonglong = 0 if mask == WHOLE_MASK else start >> (12 + mask) << (12 + mask)
        if self.events is not None:
            self._note_sync(start, end, addr, mask)
        self._push_iotlb(did, addr, mask, False, CAUSE_SYNC_MAP, cpu)
        self._submit(cpu)

    def _inv_pages(
        self,
        did: cython.int,
        addr: cython.ulonglong,
        mask: cython.int,
        ih: cython.bint,
        cause: cython.int,
        cpu: cython.int,
    ) -> cython.void:
        """One request for the aligned block of 2^mask pages at ``addr``, IOTLB only, and a wait."""
        self._push_iotlb(did, addr, mask, ih, cause, cpu)
        self._submit(cpu)

    def _inv_domain(self, did: cython.int, cause: cython.int, cpu: cython.int) -> cython.void:
        """One domain-selective request, IOTLB only, and a wait."""
        self._push_iotlb(did, 0, WHOLE_MASK, False, cause, cpu)
        self._submit(cpu)

    def _inv_global(self, cause: cython.int, cpu: cython.int) -> cython.void:
        """One global request and a wait."""
        self.ledger.counts[L_INV_GLOBAL] += 1
        self.ledger.counts[L_INV_CAUSE_UNMAP + cause] += 1
        self._push(_iotlb_low(0, QI_GLOBAL), 0, cpu)
        self._submit(cpu)

    def flush_range(
        self, did: int, start: int, end: int, *, ih: bool = False, cause: int = CAUSE_OTHER, cpu: int = 0
    ) -> None:
        """Invalidate [start, end] (inclusive) of a domain with its device TLBs, and wait."""
        self._check_did(did)
        if not 0 <= start <= end <= ALL_ONES:
            raise MisuseError(f"[{start:#x}, {end:#x}]: a flush needs 0 <= start <= end < 2^64")
        self._check_cause(cause, cpu)
        self._flush_range(did, start, end, ih, cause, cpu)

    def sync_range(self, did: int, start: int, end: int, *, cpu: int = 0) -> None:
        """Tell the unit that [start, end] (inclusive) was mapped: a request in caching mode only."""
        self._check_did(did)
        if not 0 <= start <= end <= ALL_ONES:
            raise MisuseError(f"[{start:#x}, {end:#x}]: a sync needs 0 <= start <= end < 2^64")
        self._check_cause(CAUSE_SYNC_MAP, cpu)
        self._sync_range(did, start, end, cpu)

    def flush_all(self, did: int, *, cause: int = CAUSE_OTHER, cpu: int = 0) -> None:
        """Invalidate everything of a domain with its device TLBs, and wait."""
        self.flush_range(did, 0, ALL_ONES, cause=cause, cpu=cpu)

    def inv_pages(
        self, did: int, addr: int, mask: int, *, ih: bool = False, cause: int = CAUSE_OTHER, cpu: int = 0
    ) -> None:
        """One bare request for 2^mask pages at ``addr``, device TLBs not told; domain-selective beyond ``max_mask``."""
        self._check_did(did)
        if not 0 <= mask < WHOLE_MASK or not 0 <= addr <= ALL_ONES or addr % (4096 << mask):
            raise MisuseError(f"addr={addr:#x} mask={mask}: must be an aligned block of 2^mask pages, mask 0 to 51")
        self._check_cause(cause, cpu)
        self._inv_pages(did, addr, mask, ih, cause, cpu)

    def inv_domain(self, did: int, *, cause: int = CAUSE_OTHER, cpu: int = 0) -> None:
        """One bare domain-selective request, device TLBs not told."""
        self._check_did(did)
        self._check_cause(cause, cpu)
        self._inv_domain(did, cause, cpu)

    def inv_global(self, *, cause: int = CAUSE_OTHER, cpu: int = 0) -> None:
        """Invalidate the IOTLB and the paging-structure cache of every domain, and wait."""
        self._check_cause(cause, cpu)
        self._inv_global(cause, cpu)

    def _check_cause(self, cause: SupportsIndex, cpu: SupportsIndex) -> tuple[int, int]:
        return within("cause", cause, 0, N_CAUSES - 1), self._check_cpu(cpu)

    def _check_cpu(self, cpu: SupportsIndex) -> int:
        number = within("cpu", cpu, 0, self.ledger.cpus - 1)
        self.ledger._alone()
        return number

    # Descriptors -----------------------------------------------------------------------------------------------

    def _push_iotlb(
        self,
        did: cython.int,
        addr: cython.ulonglong,
        mask: cython.int,
        ih: cython.bint,
        cause: cython.int,
        cpu: cython.int,
    ) -> cython.void:
        """Word the IOTLB request for a block, by what the unit can do and what the domain's table is."""
        first_stage: cython.bint = self.walker.contexts[did * CTX_WORDS + CTX_FLAGS] & CTX_FIRST_STAGE != 0
        by_page: cython.bint = mask < WHOLE_MASK if first_stage else mask <= self.max_mask
        scope: cython.int = QI_PAGE if by_page else QI_DOMAIN
        high: cython.ulonglong = _range_high(addr, mask, ih) if by_page else 0
        self.ledger.counts[L_INV_PAGE if by_page else L_INV_DOMAIN] += 1
        self.ledger.counts[L_INV_CAUSE_UNMAP + cause] += 1
        self._push(_piotlb_low(did, scope) if first_stage else _iotlb_low(did, scope), high, cpu)

    def _push_devtlbs(self, did: cython.int, addr: cython.ulonglong, mask: cython.int, cpu: cython.int) -> cython.void:
        """Word one request for the block to every ATS device of the domain."""
        for devtlb in self.devtlbs:
            if devtlb.did == did:
                self._push_devtlb(devtlb, addr, mask, cpu)

    def _push_devtlb(self, devtlb: DeviceTlb, addr: cython.ulonglong, mask: cython.int, cpu: cython.int) -> cython.void:
        self.ledger.counts[L_INV_DEVTLB] += 1
        self._push(_devtlb_low(devtlb.source, devtlb.queue_depth), _devtlb_high(addr, mask), cpu)

    def _push(self, low: cython.ulonglong, high: cython.ulonglong, cpu: cython.int) -> cython.void:
        """Collect one descriptor; a full batch is submitted on the way."""
        if self.events is not None:
            self._note_qi(low, high)
        if self.queue._push(low, high) == QI_BATCH:
            self._submit(cpu)

    def _submit(self, cpu: cython.int) -> cython.void:
        """Ring the doorbell if anything was collected; when this returns the wait has completed."""
        if self.queue.pending == 0:
            return
        self.queue._submit(cpu)
        at: cython.Py_ssize_t = self.queue._next()
        while at >= 0:
            self._execute(self.queue.ring[at], self.queue.ring[at + 1])
            at = self.queue._next()

    # Events ----------------------------------------------------------------------------------------------------

    def _note_flush(
        self,
        did: cython.int,
        start: cython.ulonglong,
        end: cython.ulonglong,
        addr: cython.ulonglong,
        mask: cython.int,
    ) -> cython.void:
        """One event for the IOTLB and one for each device TLB, before the descriptors, as the kernel traces them."""
        if self.events is not None:
            self.events.append(("flush_range", start, end, addr, mask))
            for devtlb in self.devtlbs:
                if devtlb.did == did:
                    self.events.append(("flush_range_devtlb", start, end, addr, mask))

    def _note_sync(
        self, start: cython.ulonglong, end: cython.ulonglong, addr: cython.ulonglong, mask: cython.int
    ) -> cython.void:
        if self.events is not None:
            self.events.append(("flush_range_np", start, end, addr, mask))

    def _note_qi(self, low: cython.ulonglong, high: cython.ulonglong) -> cython.void:
        if self.events is not None:
            self.events.append(("qi", low, high))


def _block_mask(start: cython.ulonglong, end: cython.ulonglong) -> cython.int:
    """Smallest mask whose aligned block of 2^mask pages holds [start, end]; WHOLE_MASK for the whole space.

    The size rounds up to a power of two first; where the range straddles a boundary of that size, the block widens
    until first and last page lie in the same one.
    """
    first: cython.ulonglong = start >> 12
    last: cython.ulonglong = end >> 12
    mask: cython.int = 0
    while mask < WHOLE_MASK and (last - first) >> mask != 0:
        mask += 1
    if mask < WHOLE_MASK and first & ((1 << mask) - 1) != 0:
        while mask < WHOLE_MASK and (first ^ last) >> mask & 1:
            mask += 1
    return mask
