"""What a window of IOVAs does: the two-step calls as compiled callers use them, one by one and many pieces at a time.

``IovaWindow`` is ``struct dma_iova_state``, 16 bytes of truth: ``addr`` (the first usable IOVA) and ``size_word`` (the
bytes asked for, with bit 63 = some piece was bounced). ``dma.iova_state`` tells the rules and is the public face.

Everything here runs without the GIL, returns 0 or −errno and asks no questions: like the kernel's, a destroyed
window keeps its words and may be opened again.

Linking many pieces (``_link_pieces``): a piece of whole pages, less than 2 MiB long, over empty entries of a table that
exists needs nothing but its entries and its counts. Such pieces are written one behind the other, as far as one table
(512 entries, 2 MiB) goes. All others go the general way, ``_link``, which makes tables and finds errors.

Models ``drivers/iommu/dma-iommu.c`` (dma_iova_*).
"""

from __future__ import annotations

import cython

from dmakit.dma import defects
from dmakit.reasons import Reason

if not cython.compiled:
    from dmakit.consts import (
        ATTR_MMIO,
        ATTR_REQUIRE_COHERENT,
        DMA_NONE,
        EINVAL,
        EIO,
        EOPNOTSUPP,
        EPERM,
        L_DESTROY_CALLS,
        L_DOMAIN_MAPS,
        L_LINK_CALLS,
        L_PTE_SET_1,
        L_SYNC_CALLS,
        L_TRY_ALLOC_CALLS,
        L_UNLINK_CALLS,
        PAGE_MASK_LOW,
        PAGE_SHIFT,
        PAGE_SIZE,
    )
    from dmakit.dma.core import (
        WARN_ALLOC_SIZE,
        WARN_LINK_BOUNCED,
        WARN_LINK_START,
        WARN_UNLINK_SIZE,
        MapCore,
    )

USE_SWIOTLB = 1 << 63
SIZE_BITS = (1 << 63) - 1
_ALL_ONES = (1 << 64) - 1
_NO_IOMMU = int(Reason.NO_IOMMU)
_IDENTITY_DOMAIN = int(Reason.IDENTITY_DOMAIN)
_IOVA_EXHAUSTED = int(Reason.IOVA_EXHAUSTED)
_NONE = int(Reason.NONE)
_PARTIAL_DESTROY = defects.PARTIAL_DESTROY
_ZERO_MIDDLE = defects.ZERO_MIDDLE
_UNWIND_FROM_ZERO = defects.UNWIND_FROM_ZERO
_SLOTS_FREED_BEFORE_UNMAP = defects.SLOTS_FREED_BEFORE_UNMAP
_UNLINK_CUTS_LEAF = defects.UNLINK_CUTS_LEAF


@cython.cclass
class IovaWindow:
    """One window of IOVAs of the device ``core``."""

    def __init__(self) -> None:
        self.core: MapCore = None  # type: ignore[assignment]  # until a device opens it
        self.addr = 0
        self.size_word = 0
        self.filled = 0

    def _try_alloc(
        self, core: MapCore, phys: cython.ulonglong, size: cython.ulonglong, cpu: cython.int
    ) -> cython.ulonglong:
        """A window for ``size`` bytes that start at phys's offset in a granule; returns ``addr``, 0 when unusable."""
        self.core = core
        return self._open_window(phys, size, cpu)

    def _open_window(self, phys: cython.ulonglong, size: cython.ulonglong, cpu: cython.int) -> cython.ulonglong:
        """``_try_alloc`` for the device of the window before."""
        pad: cython.ulonglong = phys & self.core.granule_mask
        iova: cython.ulonglong
        self.addr = 0
        self.size_word = 0
        self.core.ledger.counts[L_TRY_ALLOC_CALLS] += 1
        if not self.core.translating:
            return self.core._fail(-EOPNOTSUPP, _IDENTITY_DOMAIN if self.core.identity else _NO_IOMMU)
        if size == 0 or size >> 63 != 0:
            self.core._warn(WARN_ALLOC_SIZE)
            return self.core._fail(-EINVAL, _NONE)
        iova = self.core._alloc_iova(self.core._aligned(size + pad), self.core.mask, cpu)
        if iova == 0:
            return self.core._fail(-EINVAL, _IOVA_EXHAUSTED)
        self.addr = iova + pad
        self.size_word = size
        return self.addr

    def _link(
        self,
        phys: cython.ulonglong,
        offset: cython.ulonglong,
        size: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.int:
        """Link [phys, phys+size) at ``offset``; 0 or −errno, entries only, no sync."""
        pad: cython.ulonglong = phys & self.core.granule_mask
        self.core.ledger.counts[L_LINK_CALLS] += 1
        if pad != 0 and offset != 0:
            self.core._warn(WARN_LINK_START)
            return -EIO
        if attrs & ATTR_REQUIRE_COHERENT:
            if not self.core.coherent:
                return -EOPNOTSUPP
            if self.size_word & USE_SWIOTLB:
                self.core._warn(WARN_LINK_BOUNCED)
                return -EOPNOTSUPP
        if (phys | size) & self.core.granule_mask and self.core._may_bounce(size, direction):
            if attrs & (ATTR_MMIO | ATTR_REQUIRE_COHERENT):
                return -EPERM
            return self._link_bounced(phys, offset, size, direction, attrs, cpu)
        return self._link_in_place(
            self.addr + offset - pad, phys - pad, self.core._aligned(size + pad), direction, attrs, cpu
        )

    def _link_in_place(
        self,
        iova: cython.ulonglong,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.int:
        """Entries for whole granules, with the cache cleaned for a device that does not snoop (__dma_iova_link)."""
        if self.core._needs_cache_care(attrs):
            self.core._for_device(phys, size, direction)
        return self.core._map_entries(iova, phys, size, self.core._prot(direction, attrs), cpu)

    def _link_bounced(
        self,
        phys: cython.ulonglong,
        offset: cython.ulonglong,
        size: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.int:
        """Head and tail of the piece through slots, the granules between in place (iommu_dma_iova_link_swiotlb)."""
        pad: cython.ulonglong = phys & self.core.granule_mask
        tail: cython.ulonglong = (phys + size) & self.core.granule_mask
        done: cython.ulonglong = 0
        middle: cython.ulonglong
        error: cython.int
        if pad != 0:
            done = min(size, self.core.granule_mask + 1 - pad)
            error = self._bounce_and_link(self.addr + offset, phys, done, pad, direction, attrs, cpu)
            if error != 0:
                return error
            self.size_word |= USE_SWIOTLB
            if done == size:
                return 0
        middle = size - done - tail
        error = 0
        if middle != 0 or self.core.defects & _ZERO_MIDDLE:
            error = self._link_in_place(self.addr + offset + done, phys + done, middle, direction, attrs, cpu)
            if error == 0:
                done += middle
        if error == 0 and tail != 0:
            error = self._bounce_and_link(self.addr + offset + done, phys + done, tail, 0, direction, attrs, cpu)
            if error == 0:
                self.size_word |= USE_SWIOTLB
        if error != 0 and done != 0:
            self._remove(0 if self.core.defects & _UNWIND_FROM_ZERO else offset, done, direction, attrs, False, cpu)
        return error

    def _bounce_and_link(
        self,
        iova: cython.ulonglong,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        pad: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.int:
        """Copy the piece into a slot and link the slot's granule; −ENXIO when the slot lost the offset ``pad``."""
        tlb: cython.ulonglong
        error: cython.int
        if self.core.events is not None:
            self.core._note_bounce(iova, phys, size)
        tlb = self.core._bounce_in(phys, size, self.core.granule_mask, direction, attrs, cpu)
        if tlb == 0:
            return self.core.error
        error = self._link_in_place(iova - pad, tlb - pad, self.core._aligned(size + pad), direction, attrs, cpu)
        if error != 0:
            self.core._bounce_out(tlb, size, direction, attrs)
        return error

    def _sync(self, offset: cython.ulonglong, size: cython.ulonglong, cpu: cython.int) -> cython.int:
        """Make the entries of [offset, offset+size) known to the hardware; 0 or −errno."""
        iova: cython.ulonglong = self.addr + offset
        pad: cython.ulonglong = iova & self.core.granule_mask
        self.core.ledger.counts[L_SYNC_CALLS] += 1
        error: cython.int = self.core.domain._sync_map(iova - pad, self.core._aligned(size + pad), cpu)
        return error

    def _unlink(
        self,
        offset: cython.ulonglong,
        size: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.int:
        """Clear the entries of [offset, offset+size) and flush; −EINVAL, nothing changed, when it cuts a large leaf."""
        self.core.ledger.counts[L_UNLINK_CALLS] += 1
        return self._remove(offset, size, direction, attrs, False, cpu)

    def _remove(
        self,
        offset: cython.ulonglong,
        size: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        free_iova: cython.bint,
        cpu: cython.int,
    ) -> cython.int:
        """Unlink a range and, with ``free_iova``, give the window back (__iommu_dma_iova_unlink)."""
        addr: cython.ulonglong = self.addr + offset
        pad: cython.ulonglong = addr & self.core.granule_mask
        length: cython.ulonglong = self.core._aligned(size + pad)
        slow: cython.bint = (self.size_word & USE_SWIOTLB) != 0 or self.core._needs_cache_care(attrs)
        slots_first: cython.bint = (self.core.defects & _SLOTS_FREED_BEFORE_UNMAP) != 0
        queued: cython.bint = free_iova and self.core.flush_queue is not None
        if self.size_word & USE_SWIOTLB and not slots_first:
            queued = False  # a slot may be released only when the device cannot reach it any more
        if (
            self.size_word & SIZE_BITS >= self.core.cut_from
            and not self.core.defects & _UNLINK_CUTS_LEAF
            and self.core._cuts_leaf(addr - pad, addr - pad + length)
        ):
            return -EINVAL
        if slow:
            self.core._remember(addr, size)
            if slots_first:
                self.core._release_remembered(direction, attrs)
        self.core.gather._init()
        self.core.gather.queued = queued
        if self.core.domain._unmap(addr - pad, length, self.core.gather) != length:
            self.core._warn(WARN_UNLINK_SIZE)
        if not queued:
            self.core.domain._flush(self.core.gather, cpu)
        if slow:
            self.core._release_remembered(direction, attrs)
        if free_iova:
            if not self.core.defects & _PARTIAL_DESTROY:
                length = self.core._aligned((self.size_word & SIZE_BITS) + pad)
            self.core._free_iova(addr - pad, length, queued, cpu)
        return 0

    def _destroy(
        self, mapped_len: cython.ulonglong, direction: cython.int, attrs: cython.int, cpu: cython.int
    ) -> cython.int:
        """Unlink [0, mapped_len) and free the window; −EINVAL, nothing changed, when mapped_len cuts a large leaf."""
        if mapped_len == 0:
            return self._free(cpu)
        self.core.ledger.counts[L_DESTROY_CALLS] += 1
        return self._remove(0, mapped_len, direction, attrs, True, cpu)

    def _free(self, cpu: cython.int) -> cython.int:
        """Give the window back at once, whatever is linked (never through the flush queue)."""
        pad: cython.ulonglong = self.addr & self.core.granule_mask
        self.core.ledger.counts[L_DESTROY_CALLS] += 1
        return self.core._free_iova(self.addr - pad, self.core._aligned((self.size_word & SIZE_BITS) + pad), False, cpu)

    # Many pieces at a time ----------------------------------------------------------------------------------

    def _link_pieces(
        self,
        phys: memoryview[int],
        sizes: memoryview[int],
        first: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
        offset: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.Py_ssize_t:
        """``_link`` for the pieces ``first`` to ``end`` − 1, one behind the other from ``offset``; no sync.

        Returns the piece that failed (``core.error`` is why, the ones before it are linked), or ``end``."""
        i: cython.Py_ssize_t = first
        done: cython.Py_ssize_t
        error: cython.int
        plain: cython.bint = self._plain(direction, attrs)
        while i < end:
            table: cython.ulonglong = self._table_of(self.addr + offset) if plain else 0
            if table != 0:
                if cython.compiled:
                    done = self._fill_pieces(
                        cython.address(self.core.memory.words[table]), phys, sizes, i, end, offset, direction, attrs
                    )
                else:
                    done = self._fill_pieces(
                        self.core.memory.words[table : table + 512], phys, sizes, i, end, offset, direction, attrs
                    )
                if done > i:
                    offset += self.filled
                    i = done
                    continue
            error = self._link(phys[i], offset, sizes[i], direction, attrs, cpu)
            if error != 0:
                self.core.error = error
                return i
            offset += sizes[i]
            i += 1
        return end

    def _plain(self, direction: cython.int, attrs: cython.int) -> cython.bint:
        """Whether linking a whole granule means its entry in our table and nothing else: no events, no cache care."""
        if self.core.domain.table is None or self.addr == 0:
            return False
        if self.core.events is not None or self.core.domain.events is not None:
            return False
        if attrs & ATTR_REQUIRE_COHERENT or self.core._needs_cache_care(attrs) or direction == DMA_NONE:
            return False
        return self.core.granule_mask == PAGE_MASK_LOW and self.core.domain.table.coherent_walker

    def _table_of(self, iova: cython.ulonglong) -> cython.ulonglong:
        """Word index of the table of 4 KiB leaves for ``iova``; 0 when there is none yet, or a larger leaf."""
        table: cython.ulonglong = self.core.domain.table.root
        level: cython.int = self.core.domain.table.levels
        entry: cython.ulonglong
        if iova > self.core.domain.table.aperture_last or table == 0:
            return 0
        while level > 1:
            level -= 1
            entry = self.core.memory.words[(table >> 3) + ((iova >> (PAGE_SHIFT + 9 * level)) & 511)]
            if entry & self.core.domain.table.fmt.present_bits == 0 or entry & self.core.domain.table.fmt.large_bit:
                return 0
            table = entry & self.core.domain.table.fmt.address_mask
        return table >> 3

    def _fill_pieces(
        self,
        table: memoryview[int],
        phys: memoryview[int],
        sizes: memoryview[int],
        first: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
        offset: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
    ) -> cython.Py_ssize_t:
        """Write the entries of pieces from ``first`` on into ``table`` up to the first that needs the general way.

        Returns that piece; ``filled`` is what was linked (bytes)."""
        i: cython.Py_ssize_t = first
        bits: cython.ulonglong = self.core.domain.table.fmt._leaf_bits(self.core._prot(direction, attrs))
        present: cython.ulonglong = self.core.domain.table.fmt.present_bits
        refused: cython.ulonglong = _ALL_ONES >> self.core.domain.table.fmt.output_bits
        refused = refused << self.core.domain.table.fmt.output_bits | PAGE_MASK_LOW
        at: cython.Py_ssize_t = ((self.addr + offset) >> PAGE_SHIFT) & 511
        begin: cython.Py_ssize_t = at
        if (self.addr + offset) & PAGE_MASK_LOW != 0:
            end = first
        while i < end:
            while i < end and at < 512 and sizes[i] == PAGE_SIZE:
                if phys[i] & refused != 0 or table[at] & present != 0:
                    break
                table[at] = phys[i] | bits
                at += 1
                i += 1
            if i == end or not self._room(table, at, phys[i], sizes[i], present, refused):
                break
            stop: cython.Py_ssize_t = at + (sizes[i] >> PAGE_SHIFT)
            entry: cython.ulonglong = phys[i] | bits
            while at < stop:
                table[at] = entry
                entry += PAGE_SIZE
                at += 1
            i += 1
        self.core.ledger.counts[L_LINK_CALLS] += i - first
        self.core.ledger.counts[L_DOMAIN_MAPS] += i - first
        self.core.ledger.counts[L_PTE_SET_1] += at - begin
        self.filled = at - begin
        self.filled <<= PAGE_SHIFT
        return i

    def _room(
        self,
        table: memoryview[int],
        at: cython.Py_ssize_t,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        present: cython.ulonglong,
        refused: cython.ulonglong,
    ) -> cython.bint:
        """Whether a piece is whole pages that the table can take from entry ``at`` on, nothing being mapped there."""
        if size == 0 or size & PAGE_MASK_LOW != 0 or size >> 21 != 0:
            return False
        stop: cython.Py_ssize_t = at + (size >> PAGE_SHIFT)
        if stop > 512 or phys & refused != 0 or (phys + size - PAGE_SIZE) & refused != 0:
            return False
        while at < stop and table[at] & present == 0:
            at += 1
        return at == stop
