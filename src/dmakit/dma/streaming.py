"""The classic streaming calls: one piece of memory, one bus address (``dma_map_phys`` and its kin).

Two ways, as in the kernel. *Direct*: the bus address is the physical one, unless the device cannot reach it, the
buffer shares cache lines with a device that does not snoop, or bouncing is forced: then it is a bounce slot's.
*Translating*: one IOVA allocation and one map with its sync; an untrusted device gets a copy of the **whole**
buffer when it is not granule-aligned (only the two-step calls bounce head and tail alone).

Order of an unmap: caches, entries, flush (or the flush queue, which also takes the IOVA), IOVA, then copy back and
release the slot, so that no device write can land in a slot that is already somebody else's (lazy mode excepted:
there the device keeps access until the queue is flushed).

Models ``drivers/iommu/dma-iommu.c`` (iommu_dma_map_phys …), ``kernel/dma/direct.h``, ``kernel/dma/mapping.c``.
"""

from __future__ import annotations

import cython

from dmakit.reasons import Reason

if not cython.compiled:
    from dmakit.consts import (
        ATTR_MMIO,
        ATTR_REQUIRE_COHERENT,
        ATTR_SKIP_CPU_SYNC,
        DMA_FROM_DEVICE,
        DMA_NONE,
        DMA_TO_DEVICE,
        EINVAL,
        EIO,
        ENOMEM,
        EOPNOTSUPP,
        EPERM,
        L_MAP_CALLS,
        L_UNMAP_CALLS,
    )
    from dmakit.dma.core import WARN_MAP_ALIGN, WARN_UNMAP_NOTHING, WARN_UNMAP_SIZE, MapCore

_NO_IOMMU = int(Reason.NO_IOMMU)
_IDENTITY_DOMAIN = int(Reason.IDENTITY_DOMAIN)
_IOVA_EXHAUSTED = int(Reason.IOVA_EXHAUSTED)
_TABLE_MEMORY_EXHAUSTED = int(Reason.TABLE_MEMORY_EXHAUSTED)
_UNTRUSTED_BOUNCE = int(Reason.UNTRUSTED_BOUNCE)
_KMALLOC_BOUNCE = int(Reason.KMALLOC_BOUNCE)
_MASK_BOUNCE = int(Reason.MASK_BOUNCE)
_FORCED_BOUNCE = int(Reason.FORCED_BOUNCE)
_NON_COHERENT = int(Reason.NON_COHERENT)
_NONE = int(Reason.NONE)


@cython.cclass
class Streaming(MapCore):
    """A device's streaming mappings (internals; ``device.Device`` is the public face)."""

    def _map_phys(
        self,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.ulonglong:
        """Bus address of [phys, phys+size), or 0 with ``error`` (what dma_mapping_error tells) and ``why``."""
        self.ledger.counts[L_MAP_CALLS] += 1
        if direction >= DMA_NONE or size == 0:
            return self._fail(-EINVAL, _NONE)
        if self.translating:
            return self._iommu_map_phys(phys, size, direction, attrs, cpu)
        return self._direct_map(phys, size, direction, attrs, cpu)

    def _unmap_phys(
        self,
        addr: cython.ulonglong,
        size: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.int:
        """Undo ``_map_phys`` with the same size, direction and attributes."""
        self.ledger.counts[L_UNMAP_CALLS] += 1
        if self.translating:
            return self._iommu_unmap_phys(addr, size, direction, attrs, cpu)
        return self._direct_unmap(addr, size, direction, attrs)

    def _sync_single(
        self, addr: cython.ulonglong, size: cython.ulonglong, direction: cython.int, for_cpu: cython.bint
    ) -> cython.int:
        """Hand [addr, addr+size) of a live mapping to the CPU or back to the device; −EINVAL when nothing is mapped."""
        phys: cython.ulonglong = addr
        if self.skip_sync or (self.translating and self.coherent and not self._may_bounce(size, direction)):
            return 0
        if self.translating:
            phys = self.domain._iova_to_phys(addr)
            if phys == 0:
                return -EINVAL
        if for_cpu and not self.coherent:
            self._for_cpu(phys, size, direction)
        if self._is_slot(phys) and direction != (DMA_TO_DEVICE if for_cpu else DMA_FROM_DEVICE):
            self._bounce_sync(phys, size, not for_cpu)
        if not for_cpu and not self.coherent:
            self._for_device(phys, size, direction)
        return 0

    # Behind an IOMMU ----------------------------------------------------------------------------------------

    def _iommu_map_phys(
        self,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.ulonglong:
        source: cython.ulonglong = phys
        addr: cython.ulonglong
        bounced: cython.bint = False
        self.why = _NONE
        if attrs & ATTR_REQUIRE_COHERENT and not self.coherent:
            return self._fail(-EOPNOTSUPP, _NON_COHERENT)
        if attrs & ATTR_MMIO == 0 and (phys | size) & self.granule_mask and self._may_bounce(size, direction):
            if attrs & ATTR_REQUIRE_COHERENT:
                return self._fail(-EPERM, _UNTRUSTED_BOUNCE)
            source = self._bounce_in(phys, size, self.granule_mask, direction, attrs, cpu)
            if source == 0:
                return 0
            self.why = _KMALLOC_BOUNCE if self.trusted else _UNTRUSTED_BOUNCE
            bounced = True
        if self._needs_cache_care(attrs):
            self._for_device(source, size, direction)
        addr = self._iommu_map(source, size, self._prot(direction, attrs), cpu)
        if addr == 0 and bounced:
            self._bounce_out(source, size, direction, attrs)
        return addr

    def _iommu_map(
        self, phys: cython.ulonglong, size: cython.ulonglong, prot: cython.int, cpu: cython.int
    ) -> cython.ulonglong:
        """One IOVA for the granules of [phys, phys+size), mapped and synced (__iommu_dma_map)."""
        pad: cython.ulonglong = phys & self.granule_mask
        length: cython.ulonglong = self._aligned(size + pad)
        iova: cython.ulonglong
        error: cython.int
        if self.min_align_mask > self.granule_mask:
            self._warn(WARN_MAP_ALIGN)
            return self._fail(-EINVAL, _NONE)
        if size >> 63:  # rounded up it may not be a 64-bit number any more
            return self._fail(-ENOMEM, _IOVA_EXHAUSTED)
        iova = self._alloc_iova(length, self.mask, cpu)
        if iova == 0:
            return self._fail(-ENOMEM, _IOVA_EXHAUSTED)
        error = self._map_entries(iova, phys - pad, length, prot, cpu)
        if error == 0:
            error = self.domain._sync_map(iova, length, cpu)
            if error != 0:
                self.gather._init()
                self.domain._unmap(iova, length, self.gather)
                self.domain._flush(self.gather, cpu)
        if error != 0:
            self._free_iova(iova, length, False, cpu)
            return self._fail(error, _TABLE_MEMORY_EXHAUSTED if error == -ENOMEM else _NONE)
        return iova + pad

    def _iommu_unmap(self, addr: cython.ulonglong, size: cython.ulonglong, cpu: cython.int) -> cython.int:
        """Clear the granules of [addr, addr+size), flush or queue the flush, free the IOVA (__iommu_dma_unmap)."""
        pad: cython.ulonglong = addr & self.granule_mask
        length: cython.ulonglong = self._aligned(size + pad)
        queued: cython.bint = self.flush_queue is not None
        self.gather._init()
        self.gather.queued = queued
        if self.domain._unmap(addr - pad, length, self.gather) != length:
            self._warn(WARN_UNMAP_SIZE)
        if not queued:
            self.domain._flush(self.gather, cpu)
        return self._free_iova(addr - pad, length, queued, cpu)

    def _iommu_unmap_phys(
        self,
        addr: cython.ulonglong,
        size: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.int:
        phys: cython.ulonglong = 0
        if attrs & (ATTR_MMIO | ATTR_REQUIRE_COHERENT) == 0:
            phys = self.domain._iova_to_phys(addr)
            if phys == 0:
                self._warn(WARN_UNMAP_NOTHING)
                return -EINVAL
            if self._needs_cache_care(attrs):
                self._for_cpu(phys, size, direction)
        self._iommu_unmap(addr, size, cpu)
        if phys != 0 and self._is_slot(phys):
            self._bounce_out(phys, size, direction, attrs)
        return 0

    # Direct -------------------------------------------------------------------------------------------------

    def _capable(self, addr: cython.ulonglong, size: cython.ulonglong) -> cython.bint:
        """Whether the device can put [addr, addr+size) on its bus (dma_capable)."""
        last: cython.ulonglong = addr + size - 1
        return last >= addr and last <= self.mask and (self.bus_dma_limit == 0 or last <= self.bus_dma_limit)

    def _direct_map(
        self,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.ulonglong:
        unsafe: cython.bint
        self.why = _IDENTITY_DOMAIN if self.identity else _NO_IOMMU
        if attrs & ATTR_REQUIRE_COHERENT and not self.coherent:
            return self._fail(-EOPNOTSUPP, _NON_COHERENT)
        if self.force_bounce:
            if attrs & (ATTR_MMIO | ATTR_REQUIRE_COHERENT):
                return self._fail(-EPERM, _FORCED_BOUNCE)
            return self._direct_bounce(phys, size, direction, attrs, cpu, _FORCED_BOUNCE)
        if attrs & ATTR_MMIO:
            if not self._capable(phys, size):
                return self._fail(-EIO, _MASK_BOUNCE)
            return phys
        unsafe = self._kmalloc_unsafe(size, direction)
        if unsafe or not self._capable(phys, size):
            if self.swiotlb is None or attrs & ATTR_REQUIRE_COHERENT:
                return self._fail(-EIO, _KMALLOC_BOUNCE if unsafe else _MASK_BOUNCE)
            return self._direct_bounce(phys, size, direction, attrs, cpu, _KMALLOC_BOUNCE if unsafe else _MASK_BOUNCE)
        if self._needs_cache_care(attrs):
            self._for_device(phys, size, direction)
        return phys

    def _direct_bounce(
        self,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
        why: cython.int,
    ) -> cython.ulonglong:
        tlb: cython.ulonglong = self._bounce_in(phys, size, 0, direction, attrs, cpu)
        if tlb == 0:
            return 0
        if not self._capable(tlb, size):
            self._bounce_out(tlb, size, direction, attrs | ATTR_SKIP_CPU_SYNC)
            return self._fail(-EIO, _MASK_BOUNCE)
        self.why = why
        if self._needs_cache_care(attrs):
            self._for_device(tlb, size, direction)
        return tlb

    def _direct_unmap(
        self, addr: cython.ulonglong, size: cython.ulonglong, direction: cython.int, attrs: cython.int
    ) -> cython.int:
        if self._needs_cache_care(attrs):
            self._for_cpu(addr, size, direction)
        if attrs & (ATTR_MMIO | ATTR_REQUIRE_COHERENT) == 0 and self._is_slot(addr):
            self._bounce_out(addr, size, direction, attrs)
        return 0
