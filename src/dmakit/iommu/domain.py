"""The page-table domain: a page table behind one hardware unit, and when the unit is told about changes.

Models ``iommu_map``/``iommu_unmap`` (``drivers/iommu/iommu.c``) over a generic_pt table and the Intel driver's
``iotlb_sync``, ``iotlb_sync_map`` and ``flush_iotlb_all`` (``drivers/iommu/intel/iommu.c``). Rules:

* ``_map`` sends nothing, except when a large leaf replaced an empty table: then the unit must forget the table at once.
  On failure it unmaps what it had mapped and invalidates that at once, in lazy mode too; nothing stays mapped.
* ``_sync_map`` asks the unit, which acts only in caching mode.
* ``_unmap`` sends nothing: the range and the table pages that left the tree are in the caller's gather. ``_flush``
  sends one request for the gather, then frees its table pages. IH (the hint that the paging-structure caches may
  keep what they have) is set when there are none. A *queued* gather is left alone: a flush queue takes its freelist,
  and later flushes the whole domain.
* An unmap that removed nothing leaves an empty gather, and an empty gather sends nothing.

Invariant: a table page is freed only after an invalidation with IH = 0, or of the whole domain, has completed.
Errnos of ``_map`` are those of Linux 7.2: -EINVAL (no permission, size 0), -ERANGE (beyond aperture or address width),
-EOVERFLOW, -ENXIO (not expressible in pages), -EADDRINUSE (something is mapped there), -ENOMEM.

``events`` is None or a list that gets ``map``, ``unmap``, ``syncmap_in``, ``tlbsync_in`` and ``warn`` tuples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import cython

from dmakit.errors import DmakitError, ExhaustedError, MisuseError
from dmakit.iommu.dirty import LeafBitScan
from dmakit.iommu.protocol import Capabilities
from dmakit.iommu.space import checked_reserved
from dmakit.iova.arguments import apart, within, words
from dmakit.ledger import ROWS

if not cython.compiled:
    from dmakit.consts import (
        CAUSE_OTHER,
        CAUSE_TABLE,
        CAUSE_UNMAP,
        EADDRINUSE,
        EINVAL,
        ENOMEM,
        ENXIO,
        EOVERFLOW,
        ERANGE,
        L_DOMAIN_MAPS,
        L_DOMAIN_UNMAPS,
        L_SYNC_MAP,
        PAGE_SIZE,
        PROT_READ,
        PROT_WRITE,
    )
    from dmakit.iommu.formats.base import PtFormat
    from dmakit.iommu.gather import Gather
    from dmakit.iommu.pagetable import PageTable
    from dmakit.iommu.space import Domain
    from dmakit.iommu.tables import TablePages
    from dmakit.iommu.unit import IommuUnit

_PROT_TOP = 63  # all PROT_* bits


def map_error(error: int, iova: int, phys: int, size: int, prot: int, mapped: int, table: PageTable) -> DmakitError:
    """The exception that belongs to a failed map; ``error`` is a positive errno, ``mapped`` how far it got (bytes)."""
    what = f"map [{iova:#x}, {iova + size:#x}) to {phys:#x}"
    if error == EADDRINUSE:
        return MisuseError(f"{what}: something is mapped at or just above {iova + mapped:#x}", error)
    if error == ENXIO:
        return MisuseError(f"{what}: addresses and size must be multiples of {PAGE_SIZE}", error)
    if error == ERANGE:
        limits = f"IOVA {int(table.aperture_last):#x}, physical address {(1 << int(table.fmt.output_bits)) - 1:#x}"
        return MisuseError(f"{what}: exceeds the highest address of the table ({limits})", error)
    if error == EOVERFLOW:
        return MisuseError(f"{what}: wraps around the end of the 64-bit address space", error)
    if error == ENOMEM:
        return ExhaustedError(f"{what}: no memory for a table page", error)
    if table.root == 0:
        return MisuseError(f"{what}: the domain is detached", error)
    if prot & (PROT_READ | PROT_WRITE) == 0:
        return MisuseError(f"{what}: prot={prot:#x} permits neither reading nor writing", error)
    return MisuseError(f"{what}: the size must not be 0", error)


@cython.final
@cython.cclass
class PageTableDomain(Domain):
    """A domain of ``unit`` with a table of ``levels`` levels in format ``fmt``; attaching takes a domain id (``did``).

    ``tables`` gives the table pages. ``reserved``: (start, size) ranges that are never to be mapped by the DMA layer
    (the MSI window …). Raises ExhaustedError without a page for the root or a free domain id.
    """

    def __init__(
        self,
        unit: IommuUnit,
        fmt: PtFormat,
        tables: TablePages,
        *,
        levels: int = 4,
        reserved: Sequence[tuple[int, int]] = (),
    ) -> None:
        reserved = checked_reserved(reserved)
        self.unit = unit
        self.tables = tables
        table = PageTable(fmt, tables, levels=levels, coherent_walker=unit.coherent_walker)
        try:
            self.did = unit.attach(fmt, int(table.root), levels)
        except BaseException:
            table.destroy()
            raise
        can = Capabilities(
            unmap_unit="granule",
            deferred_flush=True,
            dirty=fmt.dirty_tracking,
            observes=frozenset(row.name for row in ROWS),
            cost_per_call="inline",
        )
        super().__init__(
            tables.ledger, can, aperture_end=table.aperture_last, page_sizes=fmt.page_sizes, reserved=reserved
        )
        self.table: PageTable = table
        self.last_error = 0

    # public ------------------------------------------------------------------------------------------------------

    def map_many(
        self, iovas: object, phys: object, sizes: object, prot: SupportsIndex, *, cpu: SupportsIndex = 0
    ) -> None:
        """``map`` for each row of three uint64 arrays of one length; all or nothing."""
        iova_words, phys_words, size_words = words("iovas", iovas), words("phys", phys), words("sizes", sizes)
        if not len(iova_words) == len(phys_words) == len(size_words):
            lengths = f"{len(iova_words)}, {len(phys_words)}, {len(size_words)}"
            raise MisuseError(f"iovas, phys, sizes have {lengths} items: must have the same number")
        bits, on = within("prot", prot, 0, _PROT_TOP), self._on_cpu(cpu)
        turn = self.ledger.turn
        turn._take()
        try:
            done = self._map_many(iova_words, phys_words, size_words, len(iova_words), bits, on)
            if done < len(iova_words):
                error, mapped, gather = -int(self.last_error), int(self.scratch.mapped), Gather()
                self._unmap_many(iova_words, size_words, done, gather, on)
                raise map_error(error, iova_words[done], phys_words[done], size_words[done], bits, mapped, self.table)
        finally:
            turn._give()

    def unmap_many(self, iovas: object, sizes: object, *, cpu: SupportsIndex = 0) -> int:
        """``unmap`` for each row of two uint64 arrays, with one invalidation for all; the bytes removed."""
        iova_words, size_words = words("iovas", iovas), words("sizes", sizes)
        if len(iova_words) != len(size_words):
            raise MisuseError(
                f"iovas, sizes have {len(iova_words)}, {len(size_words)} items: must have the same number"
            )
        gather, on, turn = Gather(), self._on_cpu(cpu), self.ledger.turn
        turn._take()
        try:
            return int(self._unmap_many(iova_words, size_words, len(iova_words), gather, on))
        finally:
            turn._give()

    def iova_to_phys_many(self, iovas: object, out: object) -> int:
        """``out[i]`` = translation of ``iovas[i]``, 0 when there is none (uint64 arrays); how many translate."""
        iova_words, out_words = words("iovas", iovas), words("out", out, writable=True)
        if len(out_words) < len(iova_words):
            raise MisuseError(f"out has {len(out_words)} items: needs {len(iova_words)}")
        apart("out", out_words, iovas=iova_words)
        turn = self.ledger.turn
        turn._take()
        try:
            return int(self._iova_to_phys_many(iova_words, out_words, len(iova_words)))
        finally:
            turn._give()

    def map_error(self, error: int, iova: int, phys: int, size: int, prot: int) -> DmakitError:
        """The exception that belongs to a failed map; ``error`` is a positive errno."""
        return map_error(error, iova, phys, size, prot, int(self.scratch.mapped), self.table)

    # dirty tracking ----------------------------------------------------------------------------------------------

    def _untracked(self) -> str:
        return f"{self.table.fmt.name} tables do not track dirty pages; vtdss (second stage) tables do"

    def _set_dirty(self, on: bool, cpu: int) -> None:
        self.unit.set_dirty_tracking(int(self.did), on, cpu=cpu)
        if on and not self.dirty_tracking:
            gather = Gather()
            LeafBitScan(self.table, 0, int(self.aperture_end) + 1, None, gather).run()
            self._invalidate(gather, CAUSE_OTHER, cpu)

    def _read_dirty(self, iova: int, size: int, bitmap: Any, page_size: int, flags: int, cpu: int) -> int:
        """Clears the D bits and invalidates. The number of dirty leaves."""
        gather = Gather()
        found = LeafBitScan(self.table, iova, size, bitmap, gather, page_size=page_size, flags=flags).run()
        self._invalidate(gather, CAUSE_OTHER, cpu)
        return found

    def detach(self, *, cpu: SupportsIndex = 0) -> None:
        """Give up the domain id and free every table; a second call does nothing."""
        on = self._on_cpu(cpu)
        with self.ledger.turn:
            if self.table.root != 0:
                self.unit.detach(int(self.did), cpu=on)
                self.table.destroy()

    # internals ---------------------------------------------------------------------------------------------------

    def _map(
        self,
        iova: cython.ulonglong,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        prot: cython.int,
        cpu: cython.int = 0,
    ) -> cython.int:
        """0 or -errno; what a failing map had mapped is unmapped and invalidated."""
        self.ledger.counts[L_DOMAIN_MAPS] += 1
        error: cython.int = self.table._map(iova, phys, size, prot, self.scratch)
        if self.scratch.freelist != 0:
            mapped: cython.ulonglong = self.scratch.mapped
            self._invalidate(self.scratch, CAUSE_TABLE, cpu)
            self.scratch.mapped = mapped
        if self.events is not None:
            self._note_map(iova, phys, self.scratch.mapped, prot, error)
        if error != 0:
            self._undo_map(iova, cpu)
        return error

    def _undo_map(self, iova: cython.ulonglong, cpu: cython.int) -> cython.void:
        """Unmap what a failing map had mapped from ``iova`` on; how much that was stays in ``scratch.mapped``."""
        mapped: cython.ulonglong = self.scratch.mapped
        self._unmap(iova, mapped, self.scratch)
        self._invalidate(self.scratch, CAUSE_UNMAP, cpu)
        self.scratch.mapped = mapped

    def _sync_map(self, iova: cython.ulonglong, size: cython.ulonglong, cpu: cython.int = 0) -> cython.int:
        """Map-side sync of a range that is not empty; 0."""
        self.ledger.counts[L_SYNC_MAP] += 1
        if self.events is not None:
            self._note_sync(iova, size)
        self.unit._sync_range(self.did, iova, iova + (size - 1), cpu)
        return 0

    def _unmap(self, iova: cython.ulonglong, size: cython.ulonglong, gather: Gather) -> cython.ulonglong:
        """Bytes removed; what must be invalidated is in ``gather``."""
        self.ledger.counts[L_DOMAIN_UNMAPS] += 1
        unmapped: cython.ulonglong = self.table._unmap(iova, size, gather)
        if self.events is not None:
            self._note_unmap(iova, size, unmapped)
        return unmapped

    def _flush(self, gather: Gather, cpu: cython.int = 0) -> cython.void:
        """Invalidate and empty a gather that is not queued."""
        if not gather.queued:
            self._invalidate(gather, CAUSE_UNMAP, cpu)

    def _invalidate(self, gather: Gather, cause: cython.int, cpu: cython.int) -> cython.void:
        """One request for the gather's range, then its table pages are free; nothing when it is empty."""
        if gather._is_empty():
            return
        if self.events is not None:
            self._note_flush(gather.start, gather.end)
        self.unit._flush_range(self.did, gather.start, gather.end, gather.freelist == 0, cause, cpu)
        self.tables._free_list(gather.freelist)
        gather._init()

    def _flush_all(self, cause: cython.int, cpu: cython.int = 0) -> cython.void:
        """Invalidate the whole domain."""
        self.unit._flush_all(self.did, cause, cpu)

    def _fq_free_tables(self, head: cython.ulonglong) -> cython.void:
        """The flush queue's table pages, after its flush."""
        self.tables._free_list(head)

    def _iova_to_phys(self, iova: cython.ulonglong) -> cython.ulonglong:
        """Physical address or 0."""
        return self.table._iova_to_phys(iova)

    def _leaf_across(self, iova: cython.ulonglong) -> cython.bint:
        """Whether an unmap that begins or ends at ``iova`` would cut a leaf."""
        return self.table._leaf_across(iova)

    def _map_many(
        self,
        iovas: memoryview[int],
        phys: memoryview[int],
        sizes: memoryview[int],
        count: cython.Py_ssize_t,
        prot: cython.int,
        cpu: cython.int,
    ) -> cython.Py_ssize_t:
        """Rows mapped; fewer than all: the next one failed (and undid itself), its -errno is in ``last_error``."""
        row: cython.Py_ssize_t = 0
        with cython.nogil:
            while row < count:
                error: cython.int = self._map(iovas[row], phys[row], sizes[row], prot, cpu)
                if error != 0:
                    self.last_error = error
                    break
                row += 1
        return row

    def _unmap_many(
        self,
        iovas: memoryview[int],
        sizes: memoryview[int],
        count: cython.Py_ssize_t,
        gather: Gather,
        cpu: cython.int,
    ) -> cython.ulonglong:
        """Bytes removed from the first ``count`` rows, with one flush at the end."""
        removed: cython.ulonglong = 0
        row: cython.Py_ssize_t = 0
        with cython.nogil:
            while row < count:
                removed += self._unmap(iovas[row], sizes[row], gather)
                row += 1
            self._flush(gather, cpu)
        return removed

    def _iova_to_phys_many(
        self, iovas: memoryview[int], out: memoryview[int], count: cython.Py_ssize_t
    ) -> cython.Py_ssize_t:
        """How many of ``iovas`` translate; the translations in ``out``."""
        translated: cython.Py_ssize_t = 0
        row: cython.Py_ssize_t = 0
        with cython.nogil:
            while row < count:
                out[row] = self.table._iova_to_phys(iovas[row])
                if out[row] != 0:
                    translated += 1
                row += 1
        return translated

    def _note_map(
        self,
        iova: cython.ulonglong,
        phys: cython.ulonglong,
        mapped: cython.ulonglong,
        prot: cython.int,
        error: cython.int,
    ) -> cython.void:
        events = self.events
        if events is None:
            return
        if error == -EINVAL and prot & (PROT_READ | PROT_WRITE) == 0:
            events.append(("warn", f"{self.table.fmt.name}_map_range: neither read nor write permission"))
        events.append(("map", iova, phys, mapped))

    def _note_unmap(self, iova: cython.ulonglong, size: cython.ulonglong, unmapped: cython.ulonglong) -> cython.void:
        events = self.events
        if events is not None:
            events.append(("unmap", iova, size, unmapped))

    def _note_sync(self, iova: cython.ulonglong, size: cython.ulonglong) -> cython.void:
        events = self.events
        if events is not None:
            events.append(("syncmap_in", iova, size))

    def _note_flush(self, start: cython.ulonglong, end: cython.ulonglong) -> cython.void:
        events = self.events
        if events is not None:
            events.append(("tlbsync_in", start, end, 0))
