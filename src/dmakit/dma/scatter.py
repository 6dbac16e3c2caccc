"""``dma_map_sg``: a list of pieces of memory becomes a (shorter) list of bus-address ranges.

Behind an IOMMU the whole list gets one IOVA range. Each entry is padded to granules; where a padded entry would cross
the device's segment boundary, the entry before it is padded up to the boundary (it then maps pages past its own
end, as Linux does). Because an IOVA range is aligned to its size, the layout can be made before the address is known.
Afterwards neighbours are merged into one output segment iff the new piece starts on a granule, the one before
ended on a granule, the address is not on a segment boundary and the result fits the device's maximum segment size.

Not merged, each entry by itself: no IOMMU, an untrusted device, or a device that does not snoop with a length that
shares cache lines. A peer's memory (``p2p``) that is reached by its bus address takes no part in the IOVA
range and keeps an output segment of its own; through a host bridge it is mapped like memory.

``SgMapping`` holds the list as flat arrays: entries in (``phys``, ``length``, ``kind``, ``bus``), segments out
(``addr``, ``out_length``, ``out_bus``), and what unmap needs.

Models ``drivers/iommu/dma-iommu.c`` (iommu_dma_map_sg, __finalise_sg), ``kernel/dma/direct.c`` (dma_direct_map_sg).
"""

from __future__ import annotations

from array import array
from typing import SupportsIndex

import cython

from dmakit.dma import defects
from dmakit.iova.arguments import within
from dmakit.reasons import Reason

if not cython.compiled:
    from dmakit.consts import (
        ATTR_MMIO,
        ATTR_SKIP_CPU_SYNC,
        DMA_NONE,
        EINVAL,
        EIO,
        ENOMEM,
        EREMOTEIO,
        L_PASSES,
        L_SG_CALLS,
        P2P_MAP_BUS_ADDR,
        P2P_MAP_NOT_SUPPORTED,
        P2P_MAP_THRU_HOST_BRIDGE,
    )
    from dmakit.dma.streaming import Streaming

_IOVA_EXHAUSTED = int(Reason.IOVA_EXHAUSTED)
_P2P_NOT_SUPPORTED = int(Reason.P2P_NOT_SUPPORTED)
_SG_MERGED = int(Reason.SG_MERGED)
_SG_NOT_MERGED = int(Reason.SG_NOT_MERGED)
_SG_BUS_LENGTH_OF_HEAD = defects.SG_BUS_LENGTH_OF_HEAD
_DIRECT_SG_HOST_BRIDGE = defects.DIRECT_SG_HOST_BRIDGE
_ALL_ONES = (1 << 64) - 1
_UINT_MASK = (1 << 32) - 1
_LONG = 64  # entries; from here up a list is worth letting go of the GIL
_MOST_ENTRIES = 1 << 24  # of one list; Linux counts them in an int


@cython.cclass
class SgMapping:
    """A scatterlist of up to ``capacity`` entries and what it was mapped to."""

    def __init__(self, capacity: SupportsIndex) -> None:
        self.capacity = capacity = within("capacity", capacity, 0, _MOST_ENTRIES)
        self.entries = 0
        self.count = 0
        self.direction = 0
        self.attrs = 0
        self.each = False
        self.live = False
        words = 8 * max(capacity, 1)
        self.phys = memoryview(array("Q", bytes(words)))
        self.length = memoryview(array("Q", bytes(words)))
        self.bus = memoryview(array("Q", bytes(words)))
        self.span = memoryview(array("Q", bytes(words)))
        self.addr = memoryview(array("Q", bytes(words)))
        self.out_length = memoryview(array("Q", bytes(words)))
        self.kind = memoryview(array("B", bytes(max(capacity, 1))))
        self.out_bus = memoryview(array("B", bytes(max(capacity, 1))))

    @property
    def segments(self) -> list[tuple[int, int]]:
        """The output: (bus address, length in bytes), in order."""
        return [(int(self.addr[i]), int(self.out_length[i])) for i in range(self.count)]

    @property
    def inputs(self) -> list[tuple[int, int]]:
        """The entries as given: (phys, length in bytes)."""
        return [(int(self.phys[i]), int(self.length[i])) for i in range(self.entries)]

    def _layout(self, granule_mask: cython.ulonglong, boundary: cython.ulonglong) -> cython.ulonglong:
        """Fill ``span`` (bytes of IOVA an entry takes) and return their sum."""
        total: cython.ulonglong = 0
        padded: cython.ulonglong
        pad: cython.ulonglong
        last: cython.Py_ssize_t = 0
        i: cython.Py_ssize_t = 0
        for i in range(self.entries):
            self.span[i] = 0
            if self.kind[i] == P2P_MAP_BUS_ADDR:
                continue
            padded = (self.length[i] + (self.phys[i] & granule_mask) + granule_mask) & ~granule_mask
            pad = (boundary - total + 1) & boundary
            if pad != 0 and pad < padded - 1:
                self.span[last] += pad
                total += pad
            self.span[i] = padded
            total += padded
            last = i
        return total

    def _finalise(
        self,
        iova: cython.ulonglong,
        granule_mask: cython.ulonglong,
        boundary: cython.ulonglong,
        max_segment: cython.ulonglong,
        length_of_head: cython.bint,
    ) -> cython.Py_ssize_t:
        """Fill the output from an IOVA range laid out by ``_layout``; returns the number of output segments."""
        out: cython.Py_ssize_t = -1
        open_length: cython.ulonglong = 0
        offset: cython.ulonglong
        size: cython.ulonglong
        fits: cython.bint
        i: cython.Py_ssize_t = 0
        for i in range(self.entries):
            size = self.length[i]
            if self.kind[i] == P2P_MAP_BUS_ADDR:
                out += 1
                self.addr[out] = self.bus[i]
                self.out_length[out] = self.length[0] if length_of_head else size
                self.out_bus[out] = 1
                open_length = 0
                continue
            offset = self.phys[i] & granule_mask
            fits = (max_segment - open_length) & _UINT_MASK >= size
            if open_length != 0 and offset == 0 and iova & boundary != 0 and fits:
                open_length += size
            else:
                out += 1
                self.addr[out] = iova + offset
                self.out_bus[out] = 0
                open_length = size
            self.out_length[out] = open_length
            iova += self.span[i]
            if size + offset < self.span[i]:
                open_length = 0
        self.count = out + 1
        return out + 1


@cython.cclass
class Scatter(Streaming):
    """A device's scatterlist mappings (internals)."""

    def _map_sg(self, sg: SgMapping, cpu: cython.int) -> cython.Py_ssize_t:
        """Map ``sg``; returns the number of output segments or −errno (EINVAL, EIO, ENOMEM, EREMOTEIO)."""
        count: cython.Py_ssize_t
        self.ledger.counts[L_SG_CALLS] += 1
        sg.count = 0
        if sg.direction >= DMA_NONE or sg.entries == 0:
            return -EINVAL
        self._classify(sg)
        if not self.translating or self._sg_needs_bounce(sg):
            count = self._map_each(sg, cpu)
        else:
            count = self._map_merged(sg, cpu)
        sg.live = count > 0
        return count

    def _sg_run(self, sg: SgMapping, cpu: cython.int, mapping: cython.bint) -> cython.Py_ssize_t:
        """``_map_sg`` or ``_unmap_sg``, a long list without the GIL; the caller has the machine's turn."""
        if sg.entries < _LONG:
            return self._map_sg(sg, cpu) if mapping else self._unmap_sg(sg, cpu)
        with cython.nogil:
            return self._map_sg(sg, cpu) if mapping else self._unmap_sg(sg, cpu)

    def _unmap_sg(self, sg: SgMapping, cpu: cython.int) -> cython.int:
        """Undo ``_map_sg``."""
        sg.live = False
        if sg.each:
            return self._unmap_each(sg, sg.count, sg.attrs, cpu)
        return self._unmap_merged(sg, cpu)

    def _sync_sg(self, sg: SgMapping, for_cpu: cython.bint) -> cython.int:
        """Hand every entry of a live mapping to the CPU or to the device."""
        i: cython.Py_ssize_t = 0
        if sg.each:
            for i in range(sg.count):
                if sg.out_bus[i] == 0:
                    self._sync_single(sg.addr[i], sg.out_length[i], sg.direction, for_cpu)
            return 0
        if self.coherent:
            return 0
        for i in range(sg.entries):
            if sg.kind[i] == P2P_MAP_BUS_ADDR or sg.kind[i] == P2P_MAP_THRU_HOST_BRIDGE:
                continue
            if for_cpu:
                self._for_cpu(sg.phys[i], sg.length[i], sg.direction)
            else:
                self._for_device(sg.phys[i], sg.length[i], sg.direction)
        return 0

    def _classify(self, sg: SgMapping) -> cython.int:
        """Say of every entry whether it is a peer's memory and how it is reached (once for a run of one provider)."""
        i: cython.Py_ssize_t = 0
        for i in range(sg.entries):
            sg.kind[i] = 0
        if self.p2p is None:
            return 0
        self.p2p._reset()
        for i in range(sg.entries):
            sg.kind[i] = self.p2p._map_type(sg.phys[i])
            if sg.kind[i] == P2P_MAP_BUS_ADDR:
                sg.bus[i] = sg.phys[i] + self.p2p.bus_offset
        return 0

    def _sg_needs_bounce(self, sg: SgMapping) -> cython.bint:
        """Whether every entry must be mapped by itself because some may be bounced (dev_use_sg_swiotlb)."""
        i: cython.Py_ssize_t = 0
        if not self.trusted:
            return True
        if self.coherent:
            return False
        for i in range(sg.entries):  # noqa: SIM110 - a generator would cost objects
            if self._kmalloc_unsafe(sg.length[i], sg.direction):
                return True
        return False

    # Each entry by itself -----------------------------------------------------------------------------------

    def _map_each(self, sg: SgMapping, cpu: cython.int) -> cython.Py_ssize_t:
        addr: cython.ulonglong
        attrs: cython.int
        i: cython.Py_ssize_t = 0
        sg.each = True
        self.ledger.counts[L_PASSES] += 1
        for i in range(sg.entries):
            attrs = sg.attrs
            sg.out_bus[i] = 0
            sg.out_length[i] = sg.length[i]
            addr = 0
            if sg.kind[i] == P2P_MAP_BUS_ADDR:
                addr = sg.bus[i]
                sg.out_bus[i] = 1
            elif sg.kind[i] == P2P_MAP_NOT_SUPPORTED:
                self._fail(-EREMOTEIO, _P2P_NOT_SUPPORTED)
            elif (
                sg.kind[i] == P2P_MAP_THRU_HOST_BRIDGE
                and not self.translating
                and self.defects & _DIRECT_SG_HOST_BRIDGE
            ):
                addr = _ALL_ONES
            else:
                if sg.kind[i] == P2P_MAP_THRU_HOST_BRIDGE:
                    attrs |= ATTR_MMIO
                if self.translating:
                    addr = self._iommu_map_phys(sg.phys[i], sg.length[i], sg.direction, attrs, cpu)
                else:
                    addr = self._direct_map(sg.phys[i], sg.length[i], sg.direction, attrs, cpu)
            if addr == 0:
                self._unmap_each(sg, i, sg.attrs | ATTR_SKIP_CPU_SYNC, cpu)
                return -EREMOTEIO if self.error == -EREMOTEIO else -EIO
            sg.addr[i] = addr
        sg.count = sg.entries
        self.why = _SG_NOT_MERGED
        return sg.count

    def _unmap_each(self, sg: SgMapping, count: cython.Py_ssize_t, attrs: cython.int, cpu: cython.int) -> cython.int:
        own: cython.int
        i: cython.Py_ssize_t = 0
        for i in range(count):
            if sg.out_bus[i] or sg.addr[i] == _ALL_ONES:
                continue
            own = attrs | ATTR_MMIO if sg.kind[i] == P2P_MAP_THRU_HOST_BRIDGE else attrs
            if self.translating:
                self._iommu_unmap_phys(sg.addr[i], sg.out_length[i], sg.direction, own, cpu)
            else:
                self._direct_unmap(sg.addr[i], sg.out_length[i], sg.direction, own)
        return 0

    # One IOVA range for the list ----------------------------------------------------------------------------

    def _map_merged(self, sg: SgMapping, cpu: cython.int) -> cython.Py_ssize_t:
        total: cython.ulonglong
        iova: cython.ulonglong = 0
        error: cython.int
        i: cython.Py_ssize_t = 0
        sg.each = False
        for i in range(sg.entries):
            if sg.kind[i] == P2P_MAP_NOT_SUPPORTED:
                self._fail(-EREMOTEIO, _P2P_NOT_SUPPORTED)
                return -EREMOTEIO
        if self._needs_cache_care(sg.attrs):
            self._sync_sg(sg, False)
        total = sg._layout(self.granule_mask, self.boundary)
        self.ledger.counts[L_PASSES] += 2
        if total != 0:
            iova = self._alloc_iova(total, self.mask, cpu)
            if iova == 0:
                self._fail(-ENOMEM, _IOVA_EXHAUSTED)
                return -ENOMEM
            error = self._map_runs(sg, iova, self._prot(sg.direction, sg.attrs), cpu)
            self.ledger.counts[L_PASSES] += 1
            if error != 0:
                self._free_iova(iova, total, False, cpu)
                self.error = error
                return -ENOMEM if error == -ENOMEM else -EINVAL
        sg._finalise(
            iova, self.granule_mask, self.boundary, self.max_segment, (self.defects & _SG_BUS_LENGTH_OF_HEAD) != 0
        )
        self.why = _SG_MERGED if sg.count < sg.entries else _SG_NOT_MERGED
        return sg.count

    def _map_runs(self, sg: SgMapping, iova: cython.ulonglong, prot: cython.int, cpu: cython.int) -> cython.int:
        """Map physically contiguous runs of padded entries at ``iova``; all or nothing (iommu_map_sg)."""
        start: cython.ulonglong = 0
        run: cython.ulonglong = 0
        mapped: cython.ulonglong = 0
        at: cython.ulonglong
        error: cython.int = 0
        i: cython.Py_ssize_t = 0
        for i in range(sg.entries + 1):
            if i < sg.entries:
                if sg.kind[i] == P2P_MAP_BUS_ADDR:
                    continue
                at = sg.phys[i] & ~self.granule_mask
                if run != 0 and at == start + run:
                    run += sg.span[i]
                    continue
            if run != 0:
                error = self._map_entries(iova + mapped, start, run, prot, cpu)
                if error != 0:
                    break
                mapped += run
            if i < sg.entries:
                start = at
                run = sg.span[i]
        if error == 0:
            error = self.domain._sync_map(iova, mapped, cpu)
        if error != 0 and mapped != 0:
            self.gather._init()
            self.domain._unmap(iova, mapped, self.gather)
            self.domain._flush(self.gather, cpu)
        return error

    def _unmap_merged(self, sg: SgMapping, cpu: cython.int) -> cython.int:
        """Unmap from the first to the last output segment that lies in the IOVA range."""
        start: cython.ulonglong = 0
        end: cython.ulonglong = 0
        i: cython.Py_ssize_t = 0
        if self._needs_cache_care(sg.attrs):
            self._sync_sg(sg, True)
        for i in range(sg.count):
            if sg.out_bus[i]:
                continue
            if end == 0:
                start = sg.addr[i]
            end = sg.addr[i] + sg.out_length[i]
        return self._iommu_unmap(start, end - start, cpu) if end != 0 else 0
