"""One swiotlb pool: a contiguous piece of low memory cut into slots that bounced buffers are copied through.

Models ``struct io_tlb_pool`` and the slot search of ``kernel/dma/swiotlb.c``, slot for slot.

* A *slot* is 2 KiB. A *segment* is 128 slots (256 KiB): no mapping crosses a segment, so that is the largest one.
* An *area* is an equal share of the pool with its own lock, its own use count and its own search index, so that
  CPUs do not meet. A search looks at one area; who calls decides in which order areas are tried.
* ``free_run[slot]`` (the kernel's ``list``) is 0 for a slot in use, else the number of free slots from it to the
  next used slot or to the end of its segment. An allocation needs one look a candidate, and claiming or releasing
  repairs the counts backwards inside the segment.
* The search goes on from the area's index, wraps to the area's first slot, and leaves the index behind what it took:
  slots are used round robin, not first fit. That decides every address, so it is kept exactly.

Where a buffer may start (all masks are 2**n - 1):

* ``align_mask``: the allocation starts on it (dma-iommu passes granule - 1; 0 from the direct mapping).
* ``min_align``: the device wants these low bits of the original address preserved. Bits inside the slot become an
  offset in the slot. Bits above the slot but inside ``align_mask`` become *padding slots* in front of the buffer.
  Other bits above the slot restrict which slots will do.
* neither given and at least a page long: page-aligned, as drivers have long relied on.
* ``boundary``: the device cannot cross an address that is a multiple of boundary + 1; nor may an allocation. As in
  Linux, alignment is judged on the pool's start modulo boundary + 1: a boundary narrower than a mask defeats the mask.

Invariants: per area, ``used`` = slots with ``free_run`` 0; a used slot knows by ``left`` how many bytes of its
allocation remain from its first byte on; a used slot that is not padding knows by ``origin`` which physical
address its first byte stands for (this may lie before the buffer's first byte, never before 0).
"""

from __future__ import annotations

from array import array

import cython

from dmakit.errors import MisuseError

if not cython.compiled:
    from dmakit.consts import (
        IO_TLB_SEGSIZE,
        IO_TLB_SHIFT,
        IO_TLB_SIZE,
        L_BOUNCE_AREA_LOCKS,
        PAGE_MASK_LOW,
        PAGE_SIZE,
    )
    from dmakit.ledger import Ledger
    from dmakit.memory.physical import PhysicalMemory

_NO_ORIGIN = (1 << 64) - 1  # a free slot, or padding


def limit_areas(areas: int, slots: int) -> int:
    """The most areas up to ``areas`` (a power of two) that are whole segments of a pool of ``slots``."""
    while areas > 1 and slots % (areas * IO_TLB_SEGSIZE):
        areas //= 2
    return areas


@cython.final
@cython.cclass
class SwiotlbPool:
    """``size`` bytes (whole slots) of RAM at ``start`` (page-aligned), shared equally by ``areas`` (a power of two).

    ``transient``: made for one mapping, freed with it. The memory must be zero: the first user of a slot may see it.
    The pool owns neither the memory it lies in nor a policy:
    ``dmakit.swiotlb.bounce.Swiotlb`` chooses pool and area and counts.
    """

    def __init__(
        self, memory: PhysicalMemory, start: int, size: int, *, areas: int = 1, ledger: Ledger, transient: bool = False
    ) -> None:
        slots = size // IO_TLB_SIZE
        if start <= 0 or start % PAGE_SIZE:
            raise MisuseError(f"start={start:#x}: a bounce pool starts on a page of {PAGE_SIZE} bytes, above 0")
        if size <= 0 or size % IO_TLB_SIZE:
            raise MisuseError(f"size={size}: a bounce pool is one or more slots of {IO_TLB_SIZE} bytes")
        if areas <= 0 or areas & (areas - 1) or (areas > 1 and slots % (areas * IO_TLB_SEGSIZE)):
            raise MisuseError(f"areas={areas}: must be a power of two that cuts {slots} slots into whole segments")
        memory.region_at(start, size)
        self.memory = memory
        self.ledger = ledger
        self.start, self.end = start, start + size
        self.slots, self.areas, self.area_slots = slots, areas, slots // areas
        self.transient = transient
        rest = slots % IO_TLB_SEGSIZE
        runs = array("H", range(IO_TLB_SEGSIZE, 0, -1)) * (slots // IO_TLB_SEGSIZE) + array("H", range(rest, 0, -1))
        self.free_run = memoryview(runs)
        self.pad_slots = memoryview(array("H", bytes(2 * slots)))
        self.left = memoryview(array("Q", bytes(8 * slots)))
        self.origin = memoryview(array("Q", (_NO_ORIGIN,) * slots))
        self.area_index = memoryview(array("q", bytes(8 * areas)))
        self.area_used = memoryview(array("q", bytes(8 * areas)))

    def _search(
        self,
        area: cython.Py_ssize_t,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        align_mask: cython.ulonglong,
        min_align: cython.ulonglong,
        boundary: cython.ulonglong,
    ) -> cython.Py_ssize_t:
        """Claim slots for ``size`` bytes (offset and padding included) in one area: the first slot, or -1."""
        needed: cython.Py_ssize_t = (size + IO_TLB_SIZE - 1) >> IO_TLB_SHIFT
        base: cython.ulonglong = self.start & boundary
        window: cython.ulonglong = (boundary >> IO_TLB_SHIFT) + 1
        first: cython.Py_ssize_t = area * self.area_slots
        self.ledger.counts[L_BOUNCE_AREA_LOCKS] += 1
        if needed > self.area_slots - self.area_used[area]:
            return -1
        if align_mask == 0 and min_align == 0 and size >= PAGE_SIZE:
            align_mask = PAGE_MASK_LOW
        align_mask |= IO_TLB_SIZE - 1
        min_align &= ~align_mask
        if phys == 0:
            min_align = 0
        stride: cython.Py_ssize_t = (max(align_mask, min_align) >> IO_TLB_SHIFT) + 1
        index: cython.Py_ssize_t = self.area_index[area]
        checked: cython.Py_ssize_t = 0
        while checked < self.area_slots:
            slot: cython.Py_ssize_t = first + index
            tlb: cython.ulonglong = base + (slot << IO_TLB_SHIFT)
            step: cython.Py_ssize_t = stride
            if tlb & align_mask or (tlb ^ phys) & min_align:
                step = 1
            elif ((tlb >> IO_TLB_SHIFT) & (window - 1)) + needed <= window and self.free_run[slot] >= needed:
                self._take(slot, needed, size)
                index += needed
                self.area_index[area] = index if index < self.area_slots else 0
                self.area_used[area] += needed
                return slot
            checked += step
            index += step
            if index >= self.area_slots:
                index = 0
        return -1

    def _take(self, slot: cython.Py_ssize_t, needed: cython.Py_ssize_t, size: cython.ulonglong) -> cython.void:
        """Mark ``needed`` slots as used by an allocation of ``size`` bytes."""
        i: cython.Py_ssize_t
        for i in range(needed):
            self.free_run[slot + i] = 0
            self.left[slot + i] = size - (i << IO_TLB_SHIFT)
        self._repair(slot, 0)

    def _repair(self, slot: cython.Py_ssize_t, run: cython.Py_ssize_t) -> cython.void:
        """Recount the free slots before ``slot`` in its segment, when ``run`` free slots begin at ``slot``."""
        i: cython.Py_ssize_t = slot - 1
        while i & (IO_TLB_SEGSIZE - 1) != IO_TLB_SEGSIZE - 1 and self.free_run[i] != 0:
            run += 1
            self.free_run[i] = run
            i -= 1

    def _place(self, slot: cython.Py_ssize_t, phys: cython.ulonglong, offset: cython.ulonglong) -> cython.ulonglong:
        """Tie claimed slots from ``slot`` to the buffer at ``phys``, ``offset`` bytes in: its bounce address."""
        pad: cython.Py_ssize_t = offset >> IO_TLB_SHIFT
        count: cython.Py_ssize_t = ((self.left[slot] + IO_TLB_SIZE - 1) >> IO_TLB_SHIFT) - pad
        i: cython.Py_ssize_t
        offset &= IO_TLB_SIZE - 1
        slot += pad
        self.pad_slots[slot] = pad
        for i in range(count):
            self.origin[slot + i] = phys - offset + (i << IO_TLB_SHIFT)
        return self.start + (slot << IO_TLB_SHIFT) + offset

    def _release(self, tlb: cython.ulonglong) -> cython.Py_ssize_t:
        """Free the allocation whose buffer begins at ``tlb``; the number of slots freed."""
        slot: cython.Py_ssize_t = (tlb - self.start) >> IO_TLB_SHIFT
        slot -= self.pad_slots[slot]
        freed: cython.Py_ssize_t = (self.left[slot] + IO_TLB_SIZE - 1) >> IO_TLB_SHIFT
        behind: cython.Py_ssize_t = slot + freed
        run: cython.Py_ssize_t = 0
        i: cython.Py_ssize_t = behind - 1
        self.ledger.counts[L_BOUNCE_AREA_LOCKS] += 1
        if behind & (IO_TLB_SEGSIZE - 1) != 0 and behind < self.slots:
            run = self.free_run[behind]
        while i >= slot:
            run += 1
            self.free_run[i] = run
            self.origin[i] = _NO_ORIGIN
            self.left[i] = 0
            self.pad_slots[i] = 0
            i -= 1
        self._repair(slot, run)
        self.area_used[slot // self.area_slots] -= freed
        return freed

    def _copy_slots(self, tlb: cython.ulonglong, size: cython.ulonglong, to_device: cython.bint) -> cython.ulonglong:
        """Copy between the buffer and its slots; the bytes copied (fewer than ``size`` at the allocation's end)."""
        slot: cython.Py_ssize_t = (tlb - self.start) >> IO_TLB_SHIFT
        within: cython.ulonglong = tlb & (IO_TLB_SIZE - 1)
        phys: cython.ulonglong = self.origin[slot]
        if phys == _NO_ORIGIN or within >= self.left[slot]:
            return 0
        phys += within
        size = min(size, self.left[slot] - within)
        if to_device:
            self.memory._copy(tlb, phys, size)
        else:
            self.memory._copy(phys, tlb, size)
        return size

    def room(self, tlb: int) -> int:
        """Bytes from ``tlb`` to the end of the allocation it lies in; 0 in a free slot or in padding."""
        slot = (tlb - self.start) >> IO_TLB_SHIFT
        if not 0 <= slot < self.slots or self.origin[slot] == _NO_ORIGIN:
            return 0
        left, within = int(self.left[slot]), tlb & (IO_TLB_SIZE - 1)
        return left - within if left > within else 0

    def owns(self, tlb: int, low: int, high: int) -> bool:
        """Whether [low, high), around ``tlb``, is in the slots, with padding, of the live allocation of ``tlb``."""
        room = self.room(tlb)
        if room == 0 or not self.start <= low <= tlb:
            return False
        slot, first = (tlb - self.start) >> IO_TLB_SHIFT, (low - self.start) >> IO_TLB_SHIFT
        end = (tlb + room + IO_TLB_SIZE - 1) >> IO_TLB_SHIFT << IO_TLB_SHIFT
        return high <= end and int(self.left[first]) == int(self.left[slot]) + ((slot - first) << IO_TLB_SHIFT)

    def begins(self, tlb: int) -> bool:
        """Whether an allocation's buffer begins in the slot of ``tlb``."""
        slot = (tlb - self.start) >> IO_TLB_SHIFT
        if self.room(tlb) == 0:
            return False
        return slot == 0 or self.origin[slot - 1] == _NO_ORIGIN or self.left[slot - 1] <= IO_TLB_SIZE

    @property
    def used(self) -> int:
        """Slots in use."""
        return sum(self.area_used)

    def allocations(self) -> list[tuple[int, int, int]]:
        """Live allocations for reports and leak checks: (first slot, slots, physical address of the first byte)."""
        found = []
        slot = 0
        while slot < self.slots:
            taken = (int(self.left[slot]) + IO_TLB_SIZE - 1) >> IO_TLB_SHIFT
            if taken:
                mapped = next((s for s in range(slot, slot + taken) if self.origin[s] != _NO_ORIGIN), slot)
                found.append((slot, taken, self.origin[mapped]))
            slot += taken or 1
        return found
