"""Swiotlb: what devices bounce through: the pools of a machine, the choice among them, copying and counting.

Models ``struct io_tlb_mem`` and ``swiotlb_tbl_map_single`` and its relatives in ``kernel/dma/swiotlb.c``.

A *bounce* copies a buffer that a device cannot or must not reach (address beyond its mask, unaligned ends of an
untrusted device's buffer, small buffers of a non-coherent device, ``swiotlb=force``) through slots that it can
reach. The rules:

* Map copies the original in **always**, also for FROM_DEVICE: a device that writes less than it was given must not
  make stale slot bytes appear in the buffer.
* Unmap copies back for FROM_DEVICE and BIDIRECTIONAL unless SKIP_CPU_SYNC; then the slots are free.
* The search begins in the area of the calling CPU and goes round; in each area it asks every pool, newest first.
* With a ``grower`` (``dmakit.swiotlb.dynamic``) a search that fails asks for another pool to be added in the
  background and answers this one mapping from a *transient* pool of its own, freed at unmap.
* Before an untrusted device sees a slot, the rest of its granules is cleared: ``_zero_pads``, called by dma-iommu.

As long as there is one pool (``alone``: most kernels never have more), slots are searched, copied and freed without the
GIL; the list of several pools is Python's, and walking it takes the GIL, as noting an event does.

The caller keeps what is the device's: its masks, and that it ever bounced (``dma_skip_sync``). Bounce addresses
are never 0, so 0 says "no room". Events: ``swiotlb_bounced``, ``tblmap``, ``tblunmap`` and ``warn``, with the fields
of ``docs/design/contracts.md``; a failed ``tblmap`` shows the error cookie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cython

from dmakit.errors import ExhaustedError, MisuseError
from dmakit.ledger import MOST_CPUS

if cython.compiled:
    from dmakit.swiotlb.pool import limit_areas
else:
    from dmakit.consts import (
        ATTR_NO_WARN,
        ATTR_SKIP_CPU_SYNC,
        DMA_BIDIRECTIONAL,
        DMA_FROM_DEVICE,
        DMA_TO_DEVICE,
        IO_TLB_SEGSIZE,
        IO_TLB_SHIFT,
        IO_TLB_SIZE,
        L_BOUNCE_MAPS,
        L_BOUNCE_PAD_BYTES,
        L_BOUNCE_SLOTS,
        L_BOUNCED_BYTES,
    )
    from dmakit.failpoint import FailPoint
    from dmakit.ledger import Ledger
    from dmakit.memory.physical import PhysicalMemory
    from dmakit.swiotlb.pool import SwiotlbPool, limit_areas

if TYPE_CHECKING:
    from dmakit.swiotlb.dynamic import PoolGrower

_MAPPING_ERROR = (1 << 64) - 1
_SEGMENT_BYTES = 128 * 2048
NO_BOUNDARY = (1 << 32) - 1  # what the kernel assumes when the driver set no segment boundary
NO_LIMIT = (1 << 64) - 1


def _check_mask(name: str, value: int, bits: int = 64) -> None:
    if not isinstance(value, int) or not 0 <= value < 1 << bits or value & (value + 1):
        raise MisuseError(f"{name}={value:#x}: must be 2**n - 1 with n from 0 to {bits}")


@cython.final
@cython.cclass
class Swiotlb:
    """The bounce memory of one machine, at first one pool of ``size`` zero bytes at ``start``.

    ``areas``: a power of two, usually the number of CPUs; fewer when the pool has not a segment for each.

    ``used``, ``high_water``, ``transient_slots``: slots, as in the kernel's debugfs ``swiotlb/io_tlb_*``.
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        start: int,
        size: int,
        *,
        areas: int = 1,
        ledger: Ledger,
        fail: FailPoint | None = None,
        grower: PoolGrower | None = None,
    ) -> None:
        self.memory = memory
        self.ledger = ledger
        self.fail = FailPoint() if fail is None else fail
        self.grower: Any = grower
        self.events: list[Any] | None = None
        self.pools: list[SwiotlbPool] = []
        self.transients: list[SwiotlbPool] = []
        self.low, self.high = _MAPPING_ERROR, 0
        self.used = self.high_water = self.transient_slots = 0
        if areas <= 0 or areas & (areas - 1):
            raise MisuseError(f"areas={areas}: must be a power of two")
        self.areas = areas = limit_areas(areas, size // IO_TLB_SIZE)
        self.pool = SwiotlbPool(memory, start, size, areas=areas, ledger=ledger)
        self.alone = False
        self.add_pool(self.pool)
        if grower is not None:
            grower.attach(self.add_pool)

    def add_pool(self, pool: SwiotlbPool) -> None:
        """Let later mappings use ``pool`` too; it is asked first."""
        if not isinstance(pool, SwiotlbPool):
            raise TypeError(f"pool={pool!r}: must be a SwiotlbPool")
        self.ledger._alone()
        self._widen(pool)
        self.pools.insert(0, pool)
        self.alone = len(self.pools) == 1 and not self.transients

    def _widen(self, pool: SwiotlbPool) -> cython.void:
        """Keep [low, high) around every pool, so that most addresses are ruled out by two compares."""
        self.low = min(self.low, pool.start)
        self.high = max(self.high, pool.end)

    @property
    def slots(self) -> int:
        """Slots of all lasting pools (``io_tlb_nslabs``)."""
        return sum(pool.slots for pool in self.pools)

    def _pool_of(self, tlb: cython.ulonglong) -> SwiotlbPool | None:
        """The pool that ``tlb`` lies in."""
        pool: SwiotlbPool
        for pool in self.pools:
            if pool.start <= tlb < pool.end:
                return pool
        for pool in self.transients:
            if pool.start <= tlb < pool.end:
                return pool
        return None

    def _contains(self, phys: cython.ulonglong) -> cython.bint:
        """Whether ``phys`` lies in bounce memory (``is_swiotlb_buffer``)."""
        if self.alone:
            return self.pool.start <= phys < self.pool.end
        return self.low <= phys < self.high and self._in_some_pool(phys)

    def _in_some_pool(self, phys: cython.ulonglong) -> cython.bint:
        return self._pool_of(phys) is not None

    def _map(
        self,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        alloc_align_mask: cython.ulonglong,
        min_align_mask: cython.ulonglong,
        boundary: cython.ulonglong,
        limit: cython.ulonglong,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.ulonglong:
        """Take slots for ``size`` bytes at ``phys`` and copy them in: the bounce address, or 0 without room.

        ``limit``: the highest address the device reaches; only a transient pool has to be found below it. What lies
        outside the memory cannot be copied and gets no slot.
        """
        tlb: cython.ulonglong = 0
        if self.events is not None:
            self._note_bounced(phys, size)
        if not self.fail._hit() and size <= self.memory.span and phys <= self.memory.span - size:
            tlb = self._claim(phys, size, alloc_align_mask, min_align_mask, boundary, limit, cpu)
        if tlb != 0:
            self.ledger.counts[L_BOUNCE_MAPS] += 1
            self._bounce(tlb, size, True)
        if self.events is not None:
            self._note_mapped(phys, size, tlb, attrs)
        return tlb

    def _claim(
        self,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        align_mask: cython.ulonglong,
        min_align: cython.ulonglong,
        boundary: cython.ulonglong,
        limit: cython.ulonglong,
        cpu: cython.int,
    ) -> cython.ulonglong:
        """Slots for the buffer, from any area of any pool, or else from a transient pool; 0 when there are none."""
        offset: cython.ulonglong = phys & min_align & (align_mask | (IO_TLB_SIZE - 1))
        total: cython.ulonglong = (size + offset + align_mask) & ~align_mask
        tlb: cython.ulonglong = 0
        turn: cython.Py_ssize_t
        if size > _SEGMENT_BYTES or total > _SEGMENT_BYTES:
            return 0
        for turn in range(self.areas):
            if self.alone:
                tlb = self._ask(self.pool, cpu + turn, phys, total, offset, align_mask, min_align, boundary)
            else:
                tlb = self._ask_all(turn, cpu, phys, total, offset, align_mask, min_align, boundary)
            if tlb != 0:
                return tlb
        if self.grower is None:
            return 0
        return self._claim_transient(phys, total, offset, align_mask, min_align, boundary, limit)

    def _ask(
        self,
        pool: SwiotlbPool,
        turn: cython.Py_ssize_t,
        phys: cython.ulonglong,
        total: cython.ulonglong,
        offset: cython.ulonglong,
        align_mask: cython.ulonglong,
        min_align: cython.ulonglong,
        boundary: cython.ulonglong,
    ) -> cython.ulonglong:
        """Slots from one area of one pool, the one in turn; 0 when it has no room."""
        slot: cython.Py_ssize_t = pool._search(turn & (pool.areas - 1), phys, total, align_mask, min_align, boundary)
        if slot < 0:
            return 0
        self._count_used((total + IO_TLB_SIZE - 1) >> IO_TLB_SHIFT)
        return pool._place(slot, phys, offset)

    def _ask_all(
        self,
        turn: cython.Py_ssize_t,
        cpu: cython.Py_ssize_t,
        phys: cython.ulonglong,
        total: cython.ulonglong,
        offset: cython.ulonglong,
        align_mask: cython.ulonglong,
        min_align: cython.ulonglong,
        boundary: cython.ulonglong,
    ) -> cython.ulonglong:
        """``_ask`` of every lasting pool, the newest first."""
        pool: SwiotlbPool
        tlb: cython.ulonglong = 0
        for pool in self.pools:
            if turn < pool.areas:
                tlb = self._ask(pool, cpu + turn, phys, total, offset, align_mask, min_align, boundary)
                if tlb != 0:
                    break
        return tlb

    def _claim_transient(
        self,
        phys: cython.ulonglong,
        total: cython.ulonglong,
        offset: cython.ulonglong,
        align_mask: cython.ulonglong,
        min_align: cython.ulonglong,
        boundary: cython.ulonglong,
        limit: cython.ulonglong,
    ) -> cython.ulonglong:
        """Slots from a pool made for this buffer alone, while the worker is asked for a lasting one; or 0."""
        self.grower.request()
        made = self.grower.transient(int((total + IO_TLB_SIZE - 1) >> IO_TLB_SHIFT), limit)
        if made is None:
            return 0
        pool: SwiotlbPool = made
        tlb: cython.ulonglong = self._ask(pool, 0, phys, total, offset, align_mask, min_align, boundary)
        if tlb == 0:
            self.grower.release(pool)
            return 0
        self.transients.append(pool)
        self._widen(pool)
        self.alone = False
        self.transient_slots += pool.slots
        return tlb

    def _count_used(self, slots: cython.Py_ssize_t) -> cython.void:
        """Account newly taken slots."""
        self.ledger.counts[L_BOUNCE_SLOTS] += slots
        self.used += slots
        self.high_water = max(self.high_water, self.used)

    def _unmap(
        self, tlb: cython.ulonglong, size: cython.ulonglong, direction: cython.int, attrs: cython.int
    ) -> cython.void:
        """Copy back what the device may have written, then free the slots; ``tlb`` as ``_map`` returned it."""
        if self.events is not None:
            self._note_unmapped(tlb, size)
        if not self._contains(tlb):
            return
        if not attrs & ATTR_SKIP_CPU_SYNC and direction in (DMA_FROM_DEVICE, DMA_BIDIRECTIONAL):
            self._bounce(tlb, size, False)
        self.used -= self.pool._release(tlb) if self.alone else self._release_somewhere(tlb)

    def _release_somewhere(self, tlb: cython.ulonglong) -> cython.Py_ssize_t:
        """Free the slots of ``tlb`` in whichever pool, and with them a transient pool; how many."""
        found = self._pool_of(tlb)
        assert found is not None
        pool: SwiotlbPool = found
        freed: cython.Py_ssize_t = pool._release(tlb)
        if pool.transient:
            self.transients.remove(pool)
            self.transient_slots -= pool.slots
            self.alone = len(self.pools) == 1 and not self.transients
            self.grower.release(pool)
        return freed

    def _bounce(self, tlb: cython.ulonglong, size: cython.ulonglong, to_device: cython.bint) -> cython.void:
        """Copy ``size`` bytes between slots and buffer (``swiotlb_bounce``), not beyond the allocation's end."""
        copied: cython.ulonglong
        if not self._contains(tlb):
            return
        if self.alone:
            copied = self.pool._copy_slots(tlb, size, to_device)
        else:
            copied = self._copy_somewhere(tlb, size, to_device)
        self.ledger.counts[L_BOUNCED_BYTES] += copied
        if copied != size and copied != 0 and self.events is not None:
            self._note_overflow(copied, size)

    def _copy_somewhere(
        self, tlb: cython.ulonglong, size: cython.ulonglong, to_device: cython.bint
    ) -> cython.ulonglong:
        found = self._pool_of(tlb)
        assert found is not None
        pool: SwiotlbPool = found
        return pool._copy_slots(tlb, size, to_device)

    def _sync(self, tlb: cython.ulonglong, size: cython.ulonglong, to_device: cython.bint) -> cython.void:
        """Copy the part [tlb, tlb + size) of a live mapping to the slots, or back to the buffer."""
        self._bounce(tlb, size, to_device)

    # Events, when somebody listens ----------------------------------------------------------------------------

    def _note_bounced(self, phys: cython.ulonglong, size: cython.ulonglong) -> cython.void:
        assert self.events is not None
        self.events.append(("swiotlb_bounced", phys, size))

    def _note_mapped(
        self, phys: cython.ulonglong, size: cython.ulonglong, tlb: cython.ulonglong, attrs: cython.int
    ) -> cython.void:
        assert self.events is not None
        if tlb == 0 and not attrs & ATTR_NO_WARN:
            self.events.append(("warn", f"swiotlb buffer is full (sz: {size} bytes)"))
        self.events.append(("tblmap", phys, size, tlb if tlb != 0 else _MAPPING_ERROR))

    def _note_unmapped(self, tlb: cython.ulonglong, size: cython.ulonglong) -> cython.void:
        assert self.events is not None
        self.events.append(("tblunmap", tlb, size))

    def _note_overflow(self, copied: cython.ulonglong, size: cython.ulonglong) -> cython.void:
        assert self.events is not None
        self.events.append(("warn", f"Buffer overflow detected. Allocation size: {copied}. Mapping size: {size}."))

    def _zero_pads(self, tlb: cython.ulonglong, size: cython.ulonglong, granule_mask: cython.ulonglong) -> cython.void:
        """Clear the rest of the granules that hold [tlb, tlb + size): an untrusted device sees them whole."""
        front: cython.ulonglong = tlb & granule_mask
        end: cython.ulonglong = tlb + size
        back: cython.ulonglong = ((end + granule_mask) & ~granule_mask) - end
        self.memory._zero(tlb - front, front)
        self.memory._zero(end, back)
        self.ledger.counts[L_BOUNCE_PAD_BYTES] += front + back

    # Public forms: validated, raising -------------------------------------------------------------------------

    def map(
        self,
        phys: int,
        size: int,
        *,
        alloc_align_mask: int = 0,
        min_align_mask: int = 0,
        boundary: int = NO_BOUNDARY,
        limit: int = NO_LIMIT,
        attrs: int = 0,
        cpu: int = 0,
    ) -> int:
        """Bounce ``size`` bytes of RAM at ``phys``: the bounce address, its bytes copied in.

        Masks as in ``dmakit.swiotlb.pool``. MisuseError for impossible arguments; ExhaustedError (ENOMEM) when no area
        has a run of slots. Follows ``swiotlb_tbl_map_single``.
        """
        _check_mask("alloc_align_mask", alloc_align_mask, 31)
        _check_mask("min_align_mask", min_align_mask, 31)
        _check_mask("boundary", boundary)
        if boundary < IO_TLB_SIZE - 1:
            raise MisuseError(f"boundary={boundary:#x}: must leave room for a slot of {IO_TLB_SIZE} bytes")
        if size <= 0:
            raise MisuseError(f"size={size}: a bounce needs at least one byte")
        self.memory.region_at(phys, size)
        if not 0 <= cpu < MOST_CPUS or not 0 <= limit <= NO_LIMIT:
            raise MisuseError(f"cpu={cpu}, limit={limit:#x}: must be 0 to {MOST_CPUS - 1}, and 0 to 2**64 - 1")
        self.ledger._alone()
        tlb: int = self._map(phys, size, alloc_align_mask, min_align_mask, boundary, limit, attrs, cpu)
        if not tlb:
            raise ExhaustedError(
                f"no run of bounce slots for {size} bytes at {phys:#x}: {self.used} of {self.slots} slots in use, "
                f"at most {_SEGMENT_BYTES} bytes with offset and padding"
            )
        return tlb

    def unmap(self, tlb: int, size: int, direction: int, attrs: int = 0) -> None:
        """Undo ``map``: copy back for FROM_DEVICE and BIDIRECTIONAL (unless SKIP_CPU_SYNC), free the slots."""
        self._check_live(tlb, size, direction)
        if not any(pool.begins(tlb) for pool in self.pools + self.transients):
            raise MisuseError(f"tlb={tlb:#x} is not the beginning of a bounced mapping", rule="unmap")
        self._unmap(tlb, size, direction, attrs)

    def sync_for_cpu(self, tlb: int, size: int, direction: int) -> None:
        """Copy what the device wrote in [tlb, tlb + size) back to the buffer; nothing for TO_DEVICE."""
        self._check_live(tlb, size, direction)
        if direction != DMA_TO_DEVICE:
            self._bounce(tlb, size, False)

    def sync_for_device(self, tlb: int, size: int, direction: int) -> None:
        """Copy the buffer's bytes of [tlb, tlb + size) to the slots; nothing for FROM_DEVICE."""
        self._check_live(tlb, size, direction)
        if direction != DMA_FROM_DEVICE:
            self._bounce(tlb, size, True)

    def zero_pads(self, tlb: int, size: int, granule: int) -> None:
        """Clear the rest of the granules (``granule`` bytes, a power of two) around [tlb, tlb + size).

        MisuseError when they reach beyond the mapping's own slots: it was made with a smaller ``alloc_align_mask``.
        """
        _check_mask("granule - 1", granule - 1, 31)
        self._check_live(tlb, size, DMA_BIDIRECTIONAL)
        pool, low, high = self._pool_of(tlb), tlb & -granule, -(-(tlb + size) // granule) * granule
        if pool is None or not pool.owns(tlb, low, high):
            raise MisuseError(f"granule={granule:#x}: [{low:#x}, {high:#x}) is not inside one bounced mapping")
        self._zero_pads(tlb, size, granule - 1)

    def contains(self, phys: int) -> bool:
        """Whether ``phys`` lies in bounce memory."""
        return 0 <= phys <= NO_LIMIT and bool(self._contains(phys))

    def _check_live(self, tlb: int, size: int, direction: int) -> None:
        if direction not in (DMA_BIDIRECTIONAL, DMA_TO_DEVICE, DMA_FROM_DEVICE):
            raise MisuseError(f"direction={direction}: must be BIDIRECTIONAL, TO_DEVICE or FROM_DEVICE")
        self.ledger._alone()
        pool = self._pool_of(tlb) if 0 <= tlb <= NO_LIMIT else None
        room = 0 if pool is None else pool.room(tlb)
        if not 0 < size <= room:
            raise MisuseError(f"[{tlb:#x}, {tlb + size:#x}) is not inside one bounced mapping", rule="unmap")


def max_mapping_size(min_align_mask: int = 0) -> int:
    """The most bytes one mapping can bounce: 256 KiB less what preserving the offset may cost.

    Follows ``swiotlb_max_mapping_size``: the mask is rounded up to whole slots, whatever the buffer's offset is.
    """
    _check_mask("min_align_mask", min_align_mask, 31)
    return IO_TLB_SEGSIZE * IO_TLB_SIZE - -(-min_align_mask // IO_TLB_SIZE) * IO_TLB_SIZE
