"""What every mapping call of one device rests on: its properties, its IOVA space, bounce slots, CPU caches.

A device is *direct* (no IOMMU, or an identity domain: bus addresses are physical) or *translating* (dma-iommu: bus
addresses are IOVAs of its domain). The classic calls (``streaming``), the two-step state (``iova_state``) and
scatterlists (``scatter``) are written on the few primitives here:

* ``_alloc_iova`` / ``_free_iova``: the 32-bit-first rule with its permanent switch; frees go to the flush queue when
  the domain is lazy and the caller allows it, else straight back to the magazines.
* ``_for_device`` / ``_for_cpu``: CPU-cache maintenance of a device that does not snoop (arch_sync_dma_for_*).
* ``_bounce_in`` / ``_bounce_out``: a swiotlb slot filled from, and copied back to, the original.
* ``_remember`` / ``_release_remembered``: what a slow unlink must copy back or invalidate, collected before the
  entries are cleared and worked off after the flush.

Invariants: *why* holds the reason (``reasons.Reason``) and *error* the negative errno of the last failure; both are
set by the branch that decided. Nothing here raises for an expected failure: 0 is "no address". The primitives run
without the GIL; what appends events, asks the CPU-cache model or walks several bounce pools takes it for itself.

Models ``drivers/iommu/dma-iommu.c`` (iommu_dma_alloc_iova, iommu_dma_free_iova, dev_use_swiotlb,
iommu_dma_map_swiotlb), ``include/linux/dma-map-ops.h`` (dma_kmalloc_needs_bounce), ``kernel/dma/swiotlb.c``.
"""

from __future__ import annotations

from array import array
from typing import Any

import cython

from dmakit.dma.defects import FAILED_MAP_REPORTED_AS_SUCCESS
from dmakit.errors import MisuseError
from dmakit.iova.arrays import widened
from dmakit.reasons import Reason

if not cython.compiled:
    from dmakit.consts import (
        ATTR_MMIO,
        ATTR_PRIVILEGED,
        ATTR_SKIP_CPU_SYNC,
        DMA_BIDIRECTIONAL,
        DMA_FROM_DEVICE,
        DMA_TO_DEVICE,
        EFAULT,
        ENOMEM,
        IO_TLB_SHIFT,
        IO_TLB_SIZE,
        L_CACHE_CLEAN_BYTES,
        L_CACHE_INV_BYTES,
        PROT_CACHE,
        PROT_MMIO,
        PROT_PRIV,
        PROT_READ,
        PROT_WRITE,
    )
    from dmakit.swiotlb.pool import SwiotlbPool

MASK_32BIT = (1 << 32) - 1
LARGE_LEAF = 1 << 21

_NEEDED = ("memory", "ledger")
_OPTIONS = (
    *("domain", "iovad", "flush_queue", "swiotlb", "p2p", "cache", "fail", "checker", "gather", "identity", "coherent"),
    *("trusted", "kmalloc_bounce", "force_bounce", "pci", "unchecked", "forcedac", "mask", "coherent_mask"),
    *("bus_dma_limit", "min_align_mask", "max_segment", "boundary", "defects"),
)
_NOT_MEMORY = 0
_SLOTS_EXHAUSTED = int(Reason.SLOTS_EXHAUSTED)
_FAILED_MAP_REPORTED_AS_SUCCESS = FAILED_MAP_REPORTED_AS_SUCCESS
_WARNINGS = (
    "__iommu_dma_iova_unlink: hole",
    "__iommu_dma_iova_unlink: unmapped size differs",
    "dma_iova_try_alloc: size is 0 or uses bit 63",
    "dma_iova_link: unaligned start at offset > 0",
    "dma_iova_link: REQUIRE_COHERENT on a bounced state",
    "__iommu_dma_map: min_align_mask over the granule",
    "__iommu_dma_unmap: unmapped size differs",
    "iommu_dma_unmap_phys: nothing is mapped",
)
WARN_UNLINK_HOLE = 0
WARN_UNLINK_SIZE = 1
WARN_ALLOC_SIZE = 2
WARN_LINK_START = 3
WARN_LINK_BOUNCED = 4
WARN_MAP_ALIGN = 5
WARN_UNMAP_SIZE = 6
WARN_UNMAP_NOTHING = 7


def _need_all(name: str, options: dict[str, Any]) -> None:
    missing = [needed for needed in _NEEDED if options.get(needed) is None]
    missing += [needed for needed in _OPTIONS if needed not in options]
    if missing:
        raise MisuseError(f"device {name!r}: needs the option {missing[0]!r}")


@cython.cclass
class MapCore:
    """The mapping state of one device. Made by ``dma.device.Device``; options are documented there."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        _need_all(name, options)
        self.name = name
        self.memory = options["memory"]
        self.domain = options["domain"]
        self.iovad = options["iovad"]
        self.flush_queue = options["flush_queue"]
        self.swiotlb = options["swiotlb"]
        self.p2p = options["p2p"]
        self.cache = options["cache"]
        self.ledger = options["ledger"]
        self.fail = options["fail"]
        self.checker = options["checker"]
        self.events: list[tuple[object, ...]] | None = None
        self.gather = options["gather"]
        self.translating = self.domain is not None
        self.identity = options["identity"]
        self.coherent = options["coherent"]
        self.trusted = options["trusted"]
        self.kmalloc_bounce = options["kmalloc_bounce"]
        self.force_bounce = options["force_bounce"]
        self.pci = options["pci"]
        self.unchecked = options["unchecked"]
        self.prefer_32bit = self.pci and not options["forcedac"]
        self.skip_sync = self.coherent
        self.mask = options["mask"]
        self.coherent_mask = options["coherent_mask"]
        self.bus_dma_limit = options["bus_dma_limit"]
        self.granule_mask = self.iovad.granule - 1 if self.translating else 4095
        self.granule_shift = int(self.granule_mask).bit_length()
        whole = self.translating and self.domain.capabilities.unmap_unit == "mapping"
        self.cut_from = 0 if whole else LARGE_LEAF  # windows of so many bytes may hold what cannot be removed in part
        self.min_align_mask = options["min_align_mask"]
        self.max_segment = options["max_segment"]
        self.boundary = options["boundary"]
        self.defects = options["defects"]
        self.why = 0
        self.error = 0
        self.scratch: memoryview[int] = memoryview(array("Q", bytes(16 * 64)))
        self.scratch_used = 0

    def _fail(self, error: cython.int, why: cython.int) -> cython.ulonglong:
        """Record why there is no address; returns 0."""
        self.error = error
        self.why = why
        return 0

    def _warn(self, which: cython.int) -> cython.void:
        """Append a kernel warning (WARN_*) to the events, when there are any."""
        if self.events is not None:
            self.events.append(("warn", _WARNINGS[which]))

    def _note_wider(self, limit: cython.ulonglong) -> cython.void:
        assert self.events is not None
        self.events.append(("notice", f"{self.name}: Using {int(limit).bit_length()}-bit DMA addresses"))

    def _note_bounce(self, iova: cython.ulonglong, phys: cython.ulonglong, size: cython.ulonglong) -> cython.void:
        assert self.events is not None
        self.events.append(("blink", iova, phys, size))

    def _state_closed(self, state: object) -> cython.int:
        """A window of this device is no longer live (a device that keeps a list overrides this)."""
        return 0

    def _aligned(self, size: cython.ulonglong) -> cython.ulonglong:
        """``size`` rounded up to granules."""
        return (size + self.granule_mask) & ~self.granule_mask

    def _prot(self, direction: cython.int, attrs: cython.int) -> cython.int:
        """IOMMU protection bits of a direction and attributes (dma_info_to_prot); 0 for DMA_NONE."""
        prot: cython.int = 0
        if direction == DMA_BIDIRECTIONAL:
            prot = PROT_READ | PROT_WRITE
        elif direction == DMA_TO_DEVICE:
            prot = PROT_READ
        elif direction == DMA_FROM_DEVICE:
            prot = PROT_WRITE
        else:
            return 0
        if attrs & ATTR_MMIO:
            prot |= PROT_MMIO
        elif self.coherent:
            prot |= PROT_CACHE
        if attrs & ATTR_PRIVILEGED:
            prot |= PROT_PRIV
        return prot

    def _needs_cache_care(self, attrs: cython.int) -> cython.bint:
        return not self.coherent and (attrs & (ATTR_SKIP_CPU_SYNC | ATTR_MMIO)) == 0

    def _kmalloc_unsafe(self, size: cython.ulonglong, direction: cython.int) -> cython.bint:
        """Whether ``size`` bytes may share a cache line with somebody else's data (dma_kmalloc_needs_bounce)."""
        if self.coherent or not self.kmalloc_bounce or direction == DMA_TO_DEVICE:
            return False
        return size <= 32 or 64 < size <= 96  # in kmalloc's buckets that are no multiple of a line: 8, 16, 32, 96

    def _may_bounce(self, size: cython.ulonglong, direction: cython.int) -> cython.bint:
        """Whether an unaligned piece of ``size`` bytes must be bounced behind an IOMMU (dev_use_swiotlb)."""
        return not self.trusted or self._kmalloc_unsafe(size, direction)

    # IOVA ---------------------------------------------------------------------------------------------------

    def _alloc_iova(self, size: cython.ulonglong, limit: cython.ulonglong, cpu: cython.int) -> cython.ulonglong:
        """An IOVA for ``size`` bytes (granule multiple) at or below ``limit``; 0 when there is none."""
        pages: cython.ulonglong = size >> self.granule_shift
        pfn: cython.ulonglong
        if self.bus_dma_limit != 0 and self.bus_dma_limit < limit:
            limit = self.bus_dma_limit
        if self.domain.aperture_end < limit:
            limit = self.domain.aperture_end
        if limit > MASK_32BIT and self.prefer_32bit:
            pfn = self.iovad._alloc_fast(cpu, pages, MASK_32BIT >> self.granule_shift, False)
            if pfn != 0:
                return pfn << self.granule_shift
            self.prefer_32bit = False
            if self.events is not None:
                self._note_wider(limit)
        pfn = self.iovad._alloc_fast(cpu, pages, limit >> self.granule_shift, True)
        return pfn << self.granule_shift

    def _free_iova(
        self, iova: cython.ulonglong, size: cython.ulonglong, queued: cython.bint, cpu: cython.int
    ) -> cython.int:
        """Give ``size`` bytes at ``iova`` back; ``queued``: through the flush queue, with the gather's table pages."""
        pfn: cython.ulonglong = iova >> self.granule_shift
        if queued:
            self.flush_queue._queue(cpu, pfn, size >> self.granule_shift, self.gather.freelist)
        else:
            self.iovad._free_fast(cpu, pfn, size >> self.granule_shift)
        return 0

    def _map_entries(
        self, iova: cython.ulonglong, phys: cython.ulonglong, size: cython.ulonglong, prot: cython.int, cpu: cython.int
    ) -> cython.int:
        """Entries for whole granules, without sync: 0 or −errno (iommu_map_nosync)."""
        error: cython.int = self.domain._map(iova, phys, size, prot, cpu)
        if error != 0 and self.defects & _FAILED_MAP_REPORTED_AS_SUCCESS:
            return 0
        return error

    # CPU caches ---------------------------------------------------------------------------------------------

    def _for_device(self, phys: cython.ulonglong, size: cython.ulonglong, direction: cython.int) -> cython.int:
        """Clean the CPU cache, so that a device that does not snoop sees memory as the CPU left it."""
        if self.cache is not None:
            self._clean_lines(phys, size)
        if size <= self.memory.span:  # more than that is no memory, and no cache holds it
            self.ledger.counts[L_CACHE_CLEAN_BYTES] += size
        return 0

    def _for_cpu(self, phys: cython.ulonglong, size: cython.ulonglong, direction: cython.int) -> cython.int:
        """Drop cached lines that the device may have overtaken (arch_sync_dma_for_cpu)."""
        if direction == DMA_TO_DEVICE:
            return 0
        if self.cache is not None:
            self._drop_lines(phys, size)
        if size <= self.memory.span:
            self.ledger.counts[L_CACHE_INV_BYTES] += size
        return 0

    def _clean_lines(self, phys: cython.ulonglong, size: cython.ulonglong) -> cython.int:
        self.cache.clean(phys, size)
        return 0

    def _drop_lines(self, phys: cython.ulonglong, size: cython.ulonglong) -> cython.int:
        self.cache.invalidate(phys, size)
        return 0

    # Bounce slots -------------------------------------------------------------------------------------------

    def _is_slot(self, phys: cython.ulonglong) -> cython.bint:
        return self.swiotlb is not None and self.swiotlb._contains(phys)

    def _bounce_in(
        self,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        align_mask: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.ulonglong:
        """A slot that holds a copy of [phys, phys+size); 0 when there is none (error −ENOMEM; −EFAULT: not memory).

        ``align_mask`` = granule − 1 behind an IOMMU, where an untrusted device must find zeros around the copy."""
        tlb: cython.ulonglong = 0
        if size > self.memory.span or phys > self.memory.span - size:  # there is nothing to copy
            return self._fail(-EFAULT, _NOT_MEMORY)
        if self.swiotlb is not None:
            self.skip_sync = False
            if self.cache is not None:
                self._clean_lines(phys, size)
            tlb = self.swiotlb._map(phys, size, align_mask, self.min_align_mask, self.boundary, self.mask, attrs, cpu)
        if tlb == 0:
            return self._fail(-ENOMEM, _SLOTS_EXHAUSTED)
        if align_mask != 0 and not self.trusted:
            self.swiotlb._zero_pads(tlb, size, self.granule_mask)
        return tlb

    def _origin(self, tlb: cython.ulonglong) -> cython.ulonglong:
        """The buffer address behind bounce address ``tlb``."""
        pool: SwiotlbPool = self.swiotlb._pool_of(tlb)
        return pool.origin[(tlb - pool.start) >> IO_TLB_SHIFT] + (tlb & (IO_TLB_SIZE - 1))

    def _bounce_sync(self, tlb: cython.ulonglong, size: cython.ulonglong, to_device: cython.bint) -> cython.int:
        """Copy a part of a live bounced mapping to its slot, or back to the buffer."""
        if self.cache is not None:
            self._clean_lines(self._origin(tlb), size)
        self.swiotlb._sync(tlb, size, to_device)
        if self.cache is not None and not to_device:
            self._drop_lines(self._origin(tlb), size)
        return 0

    def _bounce_out(
        self, tlb: cython.ulonglong, size: cython.ulonglong, direction: cython.int, attrs: cython.int
    ) -> cython.int:
        """Copy a slot back as its direction asks and release it."""
        origin: cython.ulonglong = 0
        if self.cache is not None:
            origin = self._origin(tlb)
            self._clean_lines(origin, size)
        self.swiotlb._unmap(tlb, size, direction, attrs)
        if self.cache is not None and direction != DMA_TO_DEVICE:
            self._drop_lines(origin, size)
        return 0

    def _remember(self, addr: cython.ulonglong, size: cython.ulonglong) -> cython.ulonglong:
        """Note the memory behind [addr, addr+size) granule by granule up to the first hole; returns the bytes noted."""
        at: cython.ulonglong = addr
        end: cython.ulonglong = addr + size
        length: cython.ulonglong
        phys: cython.ulonglong
        used: cython.Py_ssize_t = 0
        while at < end:
            phys = self.domain._iova_to_phys(at)
            if phys == 0:
                self._warn(WARN_UNLINK_HOLE)
                break
            length = min(end - at, self.granule_mask + 1 - (at & self.granule_mask))
            if used == len(self.scratch):
                self._widen_scratch()
            self.scratch[used] = phys
            self.scratch[used + 1] = length
            used += 2
            at += length
        self.scratch_used = used
        return at - addr

    def _widen_scratch(self) -> cython.int:
        self.scratch = widened("Q", self.scratch, 2 * len(self.scratch))
        return 0

    def _release_remembered(self, direction: cython.int, attrs: cython.int) -> cython.int:
        """Invalidate and copy back what ``_remember`` noted, and release its slots."""
        i: cython.Py_ssize_t = 0
        care: cython.bint = self._needs_cache_care(attrs)
        while i < self.scratch_used:
            if care:
                self._for_cpu(self.scratch[i], self.scratch[i + 1], direction)
            if self._is_slot(self.scratch[i]):
                self._bounce_out(self.scratch[i], self.scratch[i + 1], direction, attrs)
            i += 2
        self.scratch_used = 0
        return 0

    def _cuts_leaf(self, start: cython.ulonglong, end: cython.ulonglong) -> cython.bint:
        """Whether what goes only as a whole (a large leaf, a host mapping) lies across ``start`` or ``end``."""
        cut: cython.bint = self.domain._leaf_across(start) or self.domain._leaf_across(end)
        return cut
