"""An I/O address space as every layer above sees it: the ``Domain`` that mapping code is written on.

A domain maps I/O virtual addresses (IOVA) to addresses of its platform's source space (``phys``). ``map`` makes
translations without telling the hardware, ``sync_map`` tells it where that is needed, ``unmap`` takes translations
away into a gather, ``flush`` invalidates what a gather holds. Callers unmap what they linked; what a domain cannot do
it declares in its ``capabilities``.

Two layers, as everywhere: typed internals (``_map`` …) that compiled callers reach through the vtable without the
GIL and that return 0, −errno or bytes, and public methods that check their arguments once and raise. The public ones
are written here, on the internals; an implementation writes the internals. The ones here belong to a domain in which
nothing can be mapped.

Implementations: ``iommu.domain.PageTableDomain`` (tables in the machine's own memory) and, above this room, domains
whose tables belong to somebody else (a host kernel). Only the first has a ``table``; where it is None nothing may look
into tables.

Models the calls of ``struct iommu_domain_ops``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import cython

from dmakit.errors import DmakitError, MisuseError, UnsupportedError
from dmakit.iommu.dirty import _checked_scan
from dmakit.iommu.protocol import Capabilities
from dmakit.iova.arguments import pairs, within

if cython.compiled:
    from cython.cimports.cpython.long import PyLong_AsLongLongAndOverflow
else:
    from dmakit.consts import CAUSE_OTHER, EOPNOTSUPP, PAGE_SIZE
    from dmakit.iommu.gather import Gather
    from dmakit.iommu.pagetable import PageTable
    from dmakit.iova.flush_queue import FlushTarget
    from dmakit.ledger import Ledger

_TOP = (1 << 64) - 1
_PROT_TOP = 63  # all PROT_* bits
_LONG = 16 << 20  # bytes; from here up 4096 entries may have to be written: some microseconds


@cython.exceptval(1, check=True)
def _word(name: str, value: object, low: cython.ulonglong, high: cython.ulonglong) -> cython.ulonglong:
    """``value`` as an integer in [low, high]: an ordinary int at once, anything else by the validator."""
    if cython.compiled:
        overflow: cython.int = 0
        if type(value) is int:
            number: cython.longlong = PyLong_AsLongLongAndOverflow(value, cython.address(overflow))
            if number >= 0:
                word: cython.ulonglong = number
                if low <= word <= high:
                    return word
    return within(name, value, low, high)  # type: ignore[arg-type]


def checked_reserved(reserved: object) -> tuple[tuple[int, int], ...]:
    """``reserved`` as (start, size) pairs of 64-bit numbers; MisuseError for anything else."""
    return tuple(
        (within("reserved", start, 0, _TOP), within("reserved", size, 0, _TOP))
        for start, size in pairs("reserved", reserved)
    )


@cython.cclass
class Domain(FlushTarget):
    """An I/O address space. Addresses and sizes in bytes.

    ``granule``: the smallest mapping; ``page_sizes``: a bitmap of the leaf sizes; ``aperture_end``: the highest IOVA
    (inclusive); ``reserved``: (start, size) ranges that the DMA layer never maps; ``table``: the page table, None when
    it is not ours; ``events``: None, or a list that gets a tuple for each map, unmap, sync and flush; ``failure``: the
    exception behind the −errno of the last ``_map``, where somebody else refused it.
    """

    def __init__(
        self,
        ledger: Ledger,
        capabilities: Capabilities,
        *,
        aperture_end: int = 0,
        granule: int = PAGE_SIZE,
        page_sizes: int = PAGE_SIZE,
        reserved: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.ledger = ledger
        self.capabilities = capabilities
        self.aperture_end = aperture_end
        self.granule = granule
        self.page_sizes = page_sizes
        self.reserved = checked_reserved(reserved)
        self.table: PageTable | None = None
        self.dirty_tracking = False
        self.events: list[tuple[object, ...]] | None = None
        self.failure: DmakitError | None = None
        self.scratch = Gather()
        self.pending = Gather()

    # public ------------------------------------------------------------------------------------------------------

    def map(
        self,
        iova: SupportsIndex,
        phys: SupportsIndex,
        size: SupportsIndex,
        prot: SupportsIndex,
        cpu: SupportsIndex = 0,
    ) -> None:
        """Map [iova, iova + size) to phys with PROT_READ and/or PROT_WRITE, without ``sync_map``.

        All in bytes, multiples of the granule. When it raises, nothing of the range is mapped that was not before.
        """
        start: cython.ulonglong = _word("iova", iova, 0, _TOP)
        target: cython.ulonglong = _word("phys", phys, 0, _TOP)
        length: cython.ulonglong = _word("size", size, 0, _TOP)
        bits: cython.int = _word("prot", prot, 0, _PROT_TOP)
        error: cython.int = self._map_undisturbed(start, target, length, bits, self._on_cpu(cpu))
        if error != 0:
            raise self.map_error(-error, int(start), int(target), int(length), int(bits))

    def sync_map(self, iova: SupportsIndex, size: SupportsIndex, cpu: SupportsIndex = 0) -> None:
        """Tell the unit about new translations of the range (it acts only in caching mode)."""
        start: cython.ulonglong = _word("iova", iova, 0, _TOP)
        length: cython.ulonglong = _word("size", size, 1, _TOP)
        on: cython.int = self._on_cpu(cpu)
        self.ledger._alone()
        self._sync_map(start, length, on)

    def unmap(self, iova: SupportsIndex, size: SupportsIndex, cpu: SupportsIndex = 0) -> int:
        """Unmap up to the first hole and invalidate at once; the bytes removed (more than asked if a leaf was cut)."""
        start: cython.ulonglong = _word("iova", iova, 0, _TOP)
        length: cython.ulonglong = _word("size", size, 0, _TOP)
        return self._unmap_undisturbed(start, length, self.pending, True, self._on_cpu(cpu))

    def unmap_gather(self, iova: SupportsIndex, size: SupportsIndex, gather: Gather) -> int:
        """``unmap`` without the invalidation: it stays in ``gather`` for ``flush``. The bytes removed."""
        start: cython.ulonglong = _word("iova", iova, 0, _TOP)
        return self._unmap_undisturbed(start, _word("size", size, 0, _TOP), gather, False, 0)

    def flush(self, gather: Gather, cpu: SupportsIndex = 0) -> None:
        """Invalidate what ``gather`` holds, free its table pages, and empty it; nothing when it is queued."""
        on: cython.int = self._on_cpu(cpu)
        self.ledger._alone()
        self._flush(gather, on)

    def flush_all(self, cpu: SupportsIndex = 0) -> None:
        """Invalidate the whole domain."""
        on: cython.int = self._on_cpu(cpu)
        self.ledger._alone()
        self._flush_all(CAUSE_OTHER, on)

    def iova_to_phys(self, iova: SupportsIndex) -> int:
        """The physical address that ``iova`` translates to, 0 when nothing is mapped there."""
        place: cython.ulonglong = _word("iova", iova, 0, _TOP)
        self.ledger._alone()
        return self._iova_to_phys(place)

    def set_dirty_tracking(self, on: bool, *, cpu: SupportsIndex = 0) -> None:
        """Switch dirty tracking; UnsupportedError where ``capabilities.dirty`` is false.

        Switching on starts with every page clean, where it is hardware that tracks.
        """
        self._need_dirty()
        processor = self._on_cpu(cpu)
        with self.ledger.turn:
            self._set_dirty(on, processor)
            self.dirty_tracking = on

    def read_and_clear_dirty(
        self,
        iova: SupportsIndex,
        size: SupportsIndex,
        bitmap: object,
        *,
        page_size: SupportsIndex = PAGE_SIZE,
        flags: SupportsIndex = 0,
        cpu: SupportsIndex = 0,
    ) -> int:
        """OR the dirty pages of [iova, iova + size) into ``bitmap`` (uint64 array, bit i = page i of ``page_size``).

        What is reported is clean afterwards, unless ``flags`` is ``DIRTY_NO_CLEAR``. Returns how many were found:
        leaves of our own tables, bits set anew where a host reports. Errors: those of ``LeafBitScan``; UnsupportedError
        where ``capabilities.dirty`` is false.
        """
        self._need_dirty()
        start, length, marks, unit, bits = _checked_scan(iova, size, bitmap, page_size, flags, int(self.aperture_end))
        processor = self._on_cpu(cpu)
        with self.ledger.turn:
            found: int = self._read_dirty(start, length, marks, unit, bits, processor)
        return found

    # for an implementation ---------------------------------------------------------------------------------------

    def map_error(self, error: int, iova: int, phys: int, size: int, prot: int) -> DmakitError:
        """The exception that belongs to a failed map; ``error`` is a positive errno."""
        what = f"map [{iova:#x}, {iova + size:#x}) to {phys:#x}"
        if error == EOPNOTSUPP:
            return UnsupportedError(f"{what}: nothing can be mapped in this domain", error)
        return MisuseError(f"{what}: refused (errno {error})", error)

    def _need_dirty(self) -> None:
        if not self.capabilities.dirty:
            raise UnsupportedError(self._untracked())

    def _untracked(self) -> str:
        """Why ``capabilities.dirty`` is false, and what would do."""
        return "this domain does not track dirty pages"

    def _set_dirty(self, on: bool, cpu: int) -> None:
        """Switch tracking, which this domain has."""

    def _read_dirty(self, iova: int, size: int, bitmap: Any, page_size: int, flags: int, cpu: int) -> int:
        """See ``read_and_clear_dirty``; the arguments are checked. ``bitmap`` None: only count."""
        return 0

    def detach(self, *, cpu: SupportsIndex = 0) -> None:
        """Give up the domain; a second call does nothing."""
        return

    # for the public calls: alone in the machine, without the GIL when it may take long ---------------------------

    def _map_undisturbed(
        self,
        iova: cython.ulonglong,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        prot: cython.int,
        cpu: cython.int,
    ) -> cython.int:
        """``_map``."""
        error: cython.int
        if size < _LONG:
            self.ledger._alone()
            return self._map(iova, phys, size, prot, cpu)
        self.ledger.turn._take()
        try:
            with cython.nogil:
                error = self._map(iova, phys, size, prot, cpu)
        finally:
            self.ledger.turn._give()
        return error

    def _unmap_undisturbed(
        self, iova: cython.ulonglong, size: cython.ulonglong, gather: Gather, flush: cython.bint, cpu: cython.int
    ) -> cython.ulonglong:
        """``_unmap`` and, when told, ``_flush``."""
        removed: cython.ulonglong
        if size < _LONG:
            self.ledger._alone()
            removed = self._unmap(iova, size, gather)
            if flush:
                self._flush(gather, cpu)
            return removed
        self.ledger.turn._take()
        try:
            with cython.nogil:
                removed = self._unmap(iova, size, gather)
                if flush:
                    self._flush(gather, cpu)
        finally:
            self.ledger.turn._give()
        return removed

    # internals ---------------------------------------------------------------------------------------------------

    def _map(
        self,
        iova: cython.ulonglong,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        prot: cython.int,
        cpu: cython.int = 0,
    ) -> cython.int:
        """0 or −errno; nothing of the range stays mapped when it fails."""
        return -EOPNOTSUPP

    def _sync_map(self, iova: cython.ulonglong, size: cython.ulonglong, cpu: cython.int = 0) -> cython.int:
        """Map-side sync of a range that is not empty; 0 or −errno."""
        return 0

    def _unmap(self, iova: cython.ulonglong, size: cython.ulonglong, gather: Gather) -> cython.ulonglong:
        """Bytes removed; what must be invalidated is in ``gather``."""
        return 0

    def _flush(self, gather: Gather, cpu: cython.int = 0) -> cython.void:
        """Invalidate and empty a gather that is not queued."""
        if not gather.queued:
            gather._init()

    def _flush_all(self, cause: cython.int, cpu: cython.int = 0) -> cython.void:
        """Invalidate the whole domain."""
        return

    def _fq_flush_all(self, cause: cython.int) -> cython.void:
        """The flush queue's flush."""
        self._flush_all(cause, 0)

    def _iova_to_phys(self, iova: cython.ulonglong) -> cython.ulonglong:
        """Physical address or 0."""
        return 0

    def _leaf_across(self, iova: cython.ulonglong) -> cython.bint:
        """Whether an unmap that begins or ends at ``iova`` would cut what can only be removed as one."""
        return False

    def _on_cpu(self, cpu: object) -> cython.int:
        number: cython.int = _word("cpu", cpu, 0, self.ledger.cpus - 1)
        return number
