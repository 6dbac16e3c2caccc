"""The hardware half of an IOMMU: translation through its caches, fault records, and the execution of invalidations.

An access is translated in this order: device TLB (``devtlb``, the device's own), IOTLB, paging-structure cache,
tables. What a cache says is believed without a look at the tables, so unmapping without invalidating leaves the old
page reachable. An entry that does not permit the access (or that would have to set the dirty bit) is dropped and the
tables are walked; a cached *not-present* entry, which exists only in caching mode, is believed like any other.

``_execute`` acts on the two words of one descriptor and on nothing else:

* IOTLB requests: global, by domain, by block of pages; global and domain scope also empty the paging-structure cache
  (of the domain), a block does so for its range when IH = 0 and spares it when IH = 1;
* device-TLB requests go to the TLB of the named requester.

Invariant: once a covering request was executed, no cache answers from before. Threads take turns (``turn``); batches
run without the GIL. Source: VT-d specification, chapters 4, 6 and 7.
"""

from __future__ import annotations

import cython

from dmakit.errors import MisuseError
from dmakit.iommu.faults import FaultRecord, fault_error
from dmakit.iova.arguments import apart

if not cython.compiled:
    from dmakit.consts import (
        CTX_FLAGS,
        CTX_LEVELS,
        CTX_NP_CACHE,
        CTX_WIDTH,
        CTX_WORDS,
        FAULT_NO_CONTEXT,
        FAULT_READ,
        FAULT_WIDTH,
        FAULT_WRITE,
        L_DEVTLB_HITS,
        L_FAULTS,
        L_IOTLB_HITS,
        L_IOTLB_MISSES,
        QI_DEVTLB,
        QI_DOMAIN,
        QI_IOTLB,
        QI_PAGE,
        QI_PIOTLB,
        TR_ABSENT,
        TR_DIRTY,
        TR_LEVEL_MASK,
        TR_LEVEL_SHIFT,
        TR_READ,
        TR_WRITE,
    )
    from dmakit.iommu.devtlb import DeviceTlb
    from dmakit.iommu.faults import FaultLog
    from dmakit.iommu.invalidation import _devtlb_mask
    from dmakit.iommu.iotlb import Iotlb
    from dmakit.iommu.lane import BatchLane
    from dmakit.iommu.psc import PagingStructureCache
    from dmakit.iommu.walker import Walker
    from dmakit.ledger import Ledger
    from dmakit.memory.physical import PhysicalMemory

ALL_ONES = (1 << 64) - 1


def _output(word: cython.ulonglong, iova: cython.ulonglong) -> cython.ulonglong:
    """The physical address that a translation word gives for an address inside its page."""
    size: cython.ulonglong = 1
    size <<= 3 + 9 * ((word & TR_LEVEL_MASK) >> TR_LEVEL_SHIFT)
    return (word >> 12 << 12) | (iova & (size - 1))


@cython.cclass
class Translator:
    """Caches, walker and fault log of one unit. ``no_phys`` is all ones, the answer for a blocked access."""

    def __init__(
        self,
        memory: PhysicalMemory,
        ledger: Ledger,
        *,
        domains: int,
        iotlb_entries: int,
        iotlb_ways: int,
        psc_entries: int,
        policy: str,
        fault_entries: int,
    ) -> None:
        self.memory = memory
        self.ledger = ledger
        self.no_phys = ALL_ONES
        self.iotlb = Iotlb(iotlb_entries, iotlb_ways, policy)
        self.psc = PagingStructureCache(psc_entries, min(4, psc_entries), policy)
        self.walker = Walker(memory, self.psc, ledger, domains)
        self.lane = BatchLane(self.iotlb, self.psc, memory, self.walker.contexts, ledger)
        self.fault_log = FaultLog(fault_entries)
        self.devtlbs: list[DeviceTlb] = []
        self.last_reason = 0

    def translate(self, did: int, iova: int, write: bool = False, *, source: int = 0) -> int:
        """Physical address of one untranslated request of ``source``; FaultError (logged) when it is blocked."""
        _check_address(iova)
        self.ledger._alone()
        phys = self._translate(did, iova, write, source)
        if phys == ALL_ONES:
            raise fault_error(source, iova, write, self.last_reason)
        return int(phys)

    def translate_many(self, did: int, iovas: object, out: object, write: bool = False, *, source: int = 0) -> int:
        """Translate a batch, uint64 arrays of one length; a fault leaves all ones. Returns the number of faults."""
        source_view, out_view = memoryview(iovas), memoryview(out)  # type: ignore[arg-type]
        for name, view in (("iovas", source_view), ("out", out_view)):
            if view.ndim != 1 or view.itemsize != 8 or view.format not in ("Q", "L"):
                raise MisuseError(f"{name}: must be a one-dimensional array of uint64, not of {view.format!r}")
            if not view.c_contiguous:
                raise MisuseError(f"{name}: must be contiguous")
        if len(source_view) != len(out_view):
            raise MisuseError(f"out has {len(out_view)} elements for {len(source_view)} addresses")
        if out_view.readonly:
            raise MisuseError("out: must be writable")
        apart("out", out_view, iovas=source_view)
        turn = self.ledger.turn
        turn._take()
        try:
            return int(self._translate_many(did, source_view, out_view, write, source))
        finally:
            turn._give()

    @property
    def faults(self) -> list[FaultRecord]:
        """The fault records, oldest first."""
        self.ledger._alone()
        return list(self.fault_log.records())

    @property
    def faults_lost(self) -> int:
        """Faults that found the log full."""
        return int(self.fault_log.lost)

    def clear_faults(self) -> None:
        """What a fault handler does when it has read the records."""
        self.ledger._alone()
        self.fault_log.clear()

    def _resolve(self, did: cython.int, iova: cython.ulonglong, write: cython.bint) -> cython.ulonglong:
        """The translation word for one access, from a cache or by a walk; a FAULT_* reason when its level is 0."""
        if did < 0 or did >= self.walker.domains:
            return FAULT_NO_CONTEXT
        base: cython.Py_ssize_t = did * CTX_WORDS
        if self.walker.contexts[base + CTX_LEVELS] == 0:
            return FAULT_NO_CONTEXT
        if iova >> self.walker.contexts[base + CTX_WIDTH] != 0:
            return FAULT_WIDTH
        need: cython.ulonglong = TR_WRITE | TR_DIRTY if write else TR_READ
        word: cython.ulonglong = self.iotlb._lookup(did, iova)
        if word != 0:
            if word & need == need:
                self.ledger.counts[L_IOTLB_HITS] += 1
                return word
            if word & TR_ABSENT != 0:
                self.ledger.counts[L_IOTLB_HITS] += 1
                return FAULT_WRITE if write else FAULT_READ
            self.iotlb._drop(self.iotlb.hit)
        self.ledger.counts[L_IOTLB_MISSES] += 1
        word = self.walker._walk(did, iova, write)
        level: cython.int = (word & TR_LEVEL_MASK) >> TR_LEVEL_SHIFT
        if level != 0:
            self.iotlb._insert(did, level, iova >> (3 + 9 * level), word)
        elif word & TR_ABSENT != 0:
            word &= 15
            if self.walker.contexts[base + CTX_FLAGS] & CTX_NP_CACHE != 0:
                self.iotlb._insert(did, 1, iova >> 12, (1 << TR_LEVEL_SHIFT) | TR_ABSENT)
        return word

    def _translate(
        self, did: cython.int, iova: cython.ulonglong, write: cython.bint, source: cython.int
    ) -> cython.ulonglong:
        """Physical address of an untranslated request, or all ones: blocked, logged, ``last_reason`` set."""
        word: cython.ulonglong = self._resolve(did, iova, write)
        level: cython.int = (word & TR_LEVEL_MASK) >> TR_LEVEL_SHIFT
        if level == 0:
            self.last_reason = word
            self.ledger.counts[L_FAULTS] += 1
            self.fault_log._add(did, iova, write, source, word)
            return self.no_phys
        return _output(word, iova)

    def _translate_ats(self, devtlb: DeviceTlb, iova: cython.ulonglong, write: cython.bint) -> cython.ulonglong:
        """Physical address that an ATS device uses, or all ones: the translation request was not granted."""
        word: cython.ulonglong = devtlb._lookup(iova, write)
        if word != 0:
            self.ledger.counts[L_DEVTLB_HITS] += 1
            return _output(word, iova)
        word = self._resolve(devtlb.did, iova, write)
        if word & TR_LEVEL_MASK == 0:
            self.last_reason = word
            self.ledger.counts[L_FAULTS] += 1
            return self.no_phys
        devtlb._fill(iova, word)
        return _output(word, iova)

    def _translate_many(
        self,
        did: cython.int,
        iovas: memoryview[int],
        out: memoryview[int],
        write: cython.bint,
        source: cython.int,
    ) -> cython.Py_ssize_t:
        """``out[i]`` = translation of ``iovas[i]`` (all ones: fault), without the GIL; the number of faults."""
        faults: cython.Py_ssize_t = 0
        i: cython.Py_ssize_t = 0
        n: cython.Py_ssize_t = len(iovas)
        attached: cython.bint = (
            0 <= did < self.walker.domains and self.walker.contexts[did * CTX_WORDS + CTX_LEVELS] != 0
        )
        with cython.nogil:
            while i < n:
                if attached:
                    i = self.lane._run(iovas, out, i, did, write)
                    if i == n:
                        break
                out[i] = self._translate(did, iovas[i], write, source)
                if out[i] == self.no_phys:
                    faults += 1
                i += 1
        return faults

    # Execution of invalidation descriptors ------------------------------------------------------------------

    def _execute(self, low: cython.ulonglong, high: cython.ulonglong) -> cython.void:
        """Act on one descriptor (interrupt-entry and wait descriptors touch no translation)."""
        kind: cython.int = low & 15
        if kind == QI_DEVTLB:
            self._execute_devtlb(low, high)
            return
        if kind != QI_IOTLB and kind != QI_PIOTLB:
            return
        did: cython.int = (low >> 16) & 0xFFFF
        scope: cython.int = (low >> 4) & 3
        if scope == QI_PAGE:
            self.iotlb._drop_range(did, high, high & 63)
            if high & 64 == 0:
                self.psc._drop_range(did, high, high & 63)
        elif scope == QI_DOMAIN:
            self.iotlb._drop_domain(did)
            self.psc._drop_domain(did)
        else:
            self.iotlb._drop_all()
            self.psc._drop_all()

    def _execute_devtlb(self, low: cython.ulonglong, high: cython.ulonglong) -> cython.void:
        """Pass a device-TLB request on to the requester it names."""
        source = (low >> 32) & 0xFFFF
        for devtlb in self.devtlbs:
            if devtlb.source == source:
                tlb: DeviceTlb = devtlb
                tlb._invalidate(high, _devtlb_mask(high))


def _check_address(iova: int) -> None:
    if not 0 <= iova <= ALL_ONES:
        raise MisuseError(f"iova={iova:#x}: a device's address has 64 bits")
