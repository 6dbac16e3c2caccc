"""The I/O address space of a real device: a Domain whose tables belong to the host's kernel.

Mapping is a system call: the internals that compiled code calls without the GIL take it, resolve the source addresses
(``space.SourceSpace``) and ask a *backend* (``type1``, ``iommufd``) for one mapping a piece. What the kernel holds is
remembered in a ``ShadowMap``, which answers ``iova_to_phys`` and refuses what the kernel would refuse, before it is
asked. Declared in ``capabilities``: only what was mapped as one can be unmapped (``unmap_unit`` = ``mapping``), and an
unmap is flushed when it returns (no ``deferred_flush``).

Errnos of ``_map``: −EINVAL (no permission, size 0), −ENXIO (not whole pages), −ERANGE (beyond the aperture, or in a
reserved window), −EOVERFLOW, −EADDRINUSE, and whatever the host's kernel says. ``failure`` holds the exception behind
the last −errno, so that the public call above can raise what really happened.

A mapping of several pieces that fails half-way is taken back. An unmap that the kernel refuses leaves the mapping in
the shadow: its IOVA answers −EADDRINUSE until an unmap succeeds, for a device may still reach the memory. A Ctrl-C
inside these calls is delivered after they have finished.
"""

from __future__ import annotations

import _thread
import contextlib
from dataclasses import replace
from typing import Any, SupportsIndex

import cython

from dmakit.errors import DmakitError, ExhaustedError, MisuseError
from dmakit.iommu.protocol import Capabilities
from dmakit.iova.arrays import zeroed
from dmakit.ledger import ROWS

if not cython.compiled:
    from dmakit.consts import (
        EADDRINUSE,
        EINVAL,
        EIO,
        ENOENT,
        ENOMEM,
        ENXIO,
        EOVERFLOW,
        ERANGE,
        L_DOMAIN_MAPS,
        L_DOMAIN_UNMAPS,
        L_SYNC_MAP,
        PAGE_MASK_LOW,
        PAGE_SIZE,
        PROT_READ,
        PROT_WRITE,
    )
    from dmakit.iommu.gather import Gather
    from dmakit.iommu.space import Domain
    from dmakit.ledger import Ledger
    from dmakit.platform.linux.shadow import ShadowMap

_TOP = (1 << 64) - 1

# What happens inside the host's IOMMU driver cannot be seen from here.
UNOBSERVED = frozenset(
    row.name
    for row in ROWS
    if row.name.startswith(("pte_", "tables_", "table_flush", "inv_", "iotlb_", "psc_", "devtlb_"))
    or row.name in ("lock_qi", "walk_reads", "faults")
)


@cython.cclass
class HostDomain(Domain):
    """The mappings of one host I/O address space, made through ``backend`` from ``source``.

    ``backend``: ``map(iova, piece, prot)``, ``unmap(iova, size) -> bytes``, ``ranges() -> [(first, last)]``,
    ``page_sizes``, ``dirty``, ``set_dirty(on)``, ``read_dirty(iova, size, bitmap, page_size, flags)``, ``close()``.
    ``source.resolve(phys, size)``: the pieces of memory behind a range.
    """

    def __init__(self, backend: Any, source: Any, ledger: Ledger, observes: frozenset[str]) -> None:
        can = Capabilities(
            unmap_unit="mapping",
            deferred_flush=False,
            dirty=bool(backend.dirty),
            observes=observes,
            cost_per_call="syscall",
        )
        super().__init__(ledger, can, page_sizes=backend.page_sizes)
        self.backend = backend
        self.source = source
        self.shadow = ShadowMap()
        self.ranges: list[tuple[int, int]] = []
        self.low, self.high = 1, 0
        self.interrupted = False

    @property
    def mappings(self) -> int:
        """How many mappings the host's kernel holds for us."""
        return self.shadow.count

    def refresh(self) -> list[tuple[int, int]]:
        """Ask the kernel again which IOVAs it allows (first, last), and which pages: after every attach and detach."""
        self.ranges = self.backend.ranges()
        gaps: list[tuple[int, int]] = []
        at = 0
        for first, last in self.ranges:
            if first > at:
                gaps.append((at, first - at))
            at = last + 1
        self.aperture_end = max(at - 1, 0)
        self.low, self.high = 1, 0
        self.capabilities = replace(self.capabilities, dirty=bool(self.backend.dirty))
        self.page_sizes = self.backend.page_sizes  # type1 knows them when a group has brought its IOMMU
        self.reserved = tuple(gaps)
        return self.ranges

    def held(self) -> list[tuple[int, int, int]]:
        """Every mapping that the kernel holds: (iova, phys, size), ascending."""
        return self.shadow.mappings()

    def map_error(self, error: int, iova: int, phys: int, size: int, prot: int) -> DmakitError:
        """The exception that belongs to a failed map; ``error`` is a positive errno."""
        what = f"map [{iova:#x}, {iova + size:#x}) to {phys:#x}"
        told = self.failure
        if isinstance(told, DmakitError) and told.errno == error:
            return told
        if error == EADDRINUSE:
            return MisuseError(f"{what}: something is mapped at {int(self.shadow._overlap(iova, size)):#x}", error)
        if error == ENXIO:
            return MisuseError(f"{what}: addresses and size must be multiples of {PAGE_SIZE}", error)
        if error == ERANGE:
            allowed = ", ".join(f"{first:#x} to {last:#x}" for first, last in self.ranges)
            return MisuseError(f"{what}: outside what this IOMMU translates ({allowed or 'nothing'})", error)
        if error == EOVERFLOW:
            return MisuseError(f"{what}: wraps around the end of the 64-bit address space", error)
        if error == ENOMEM:
            return ExhaustedError(f"{what}: no memory to remember the mapping", error)
        if prot & (PROT_READ | PROT_WRITE) == 0:
            return MisuseError(f"{what}: prot={prot:#x} permits neither reading nor writing", error)
        return MisuseError(f"{what}: the size must not be 0", error)

    # Dirty pages -------------------------------------------------------------------------------------------------

    def _untracked(self) -> str:
        return "this host's IOMMU does not track dirty pages"

    def _set_dirty(self, on: bool, cpu: int) -> None:
        self.backend.set_dirty(on)

    def _read_dirty(self, iova: int, size: int, bitmap: Any, page_size: int, flags: int, cpu: int) -> int:
        """Asked mapping by mapping: the kernel stops without a word at a hole. How many bits were set anew."""
        if not self.dirty_tracking:
            raise MisuseError("read_and_clear_dirty: dirty tracking is off; call set_dirty_tracking(True) first")
        marks = zeroed("Q", size // page_size // 64 + 1) if bitmap is None else bitmap
        found: int = self.backend.read_dirty(self._live(iova, iova + size), iova, size, marks, page_size, flags)
        return found

    def _live(self, first: int, end: int) -> list[tuple[int, int]]:
        """The mapped parts of [first, end) as (iova, size), neighbours joined."""
        parts: list[tuple[int, int]] = []
        start = stop = first
        for iova, _, size in self.shadow.mappings():
            low, high = max(iova, first), min(iova + size, end)
            if low < high:
                if low > stop:
                    parts.append((start, stop - start))
                    start = low
                stop = high
        parts.append((start, stop - start))
        return [part for part in parts if part[1]]

    def detach(self, *, cpu: SupportsIndex = 0) -> None:
        """Let the host's kernel drop every mapping and the address space itself; a second call does nothing."""
        with self.ledger.turn:
            self.backend.close()
            self.shadow = ShadowMap()

    # Internals ---------------------------------------------------------------------------------------------------

    def _map(
        self,
        iova: cython.ulonglong,
        phys: cython.ulonglong,
        size: cython.ulonglong,
        prot: cython.int,
        cpu: cython.int = 0,
    ) -> cython.int:
        """0 or −errno; nothing of the range stays mapped when it fails."""
        self.ledger.counts[L_DOMAIN_MAPS] += 1
        if prot & (PROT_READ | PROT_WRITE) == 0 or size == 0:
            return self._refuse(EINVAL)
        if (iova | phys | size) & PAGE_MASK_LOW:
            return self._refuse(ENXIO)
        if size - 1 > _TOP - iova or size - 1 > _TOP - phys:
            return self._refuse(EOVERFLOW)
        if self.shadow._overlap(iova, size) != iova + size:
            return self._refuse(EADDRINUSE)
        return self._map_pieces(iova, phys, size, prot)

    def _refuse(self, error: cython.int) -> cython.int:
        """−error, found by ourselves."""
        self.failure = None
        return -error

    def _map_pieces(
        self, iova: cython.ulonglong, phys: cython.ulonglong, size: cython.ulonglong, prot: cython.int
    ) -> cython.int:
        done: cython.ulonglong = 0
        error: cython.int = 0
        self.failure = None
        try:
            if (iova < self.low or iova + (size - 1) > self.high) and not self._find_range(iova, size):
                return -ERANGE
            for piece in self.source.resolve(int(phys), int(size)):
                self.backend.map(int(iova + done), piece, int(prot))
                length: cython.ulonglong = piece.size
                if not self.shadow._insert(iova + done, phys + done, length):
                    self.backend.unmap(int(iova + done), int(length))
                    error = -ENOMEM
                    break
                done += length
        except DmakitError as refusal:
            self.failure = refusal
            error = -(refusal.errno or EIO)
        except BaseException as stop:
            error = self._put_off(stop)
            self._unmap_unnoted(int(iova + done), int(size - done))
        if error != 0 and done != 0:
            self._take_back(iova, done)
        if self.events is not None:
            self.events.append(("map", int(iova), int(phys), int(size) if error == 0 else int(done)))
        self._deliver()
        return error

    def _find_range(self, iova: cython.ulonglong, size: cython.ulonglong) -> cython.bint:
        """Remember the allowed range that holds [iova, iova + size), for the next mapping; false when none does."""
        for first, last in self.ranges:
            if first <= iova and iova + (size - 1) <= last:
                self.low, self.high = first, last
                return True
        return False

    def _put_off(self, stop: object) -> cython.int:
        """What is neither ours nor the host's: Ctrl-C comes back when the call is over, a defect is kept to be seen."""
        if isinstance(stop, KeyboardInterrupt):
            self.interrupted = True
        else:
            self.failure = MisuseError(f"{type(stop).__name__} in a host mapping: {stop}", EIO)
        return -EIO

    def _deliver(self) -> None:
        """The Ctrl-C that was put off, now that kernel and shadow agree."""
        if self.interrupted:
            self.interrupted = False
            _thread.interrupt_main()

    def _take_back(self, iova: cython.ulonglong, size: cython.ulonglong) -> cython.ulonglong:
        """Unmap whole mappings one behind the other; the bytes removed, 0 when the kernel refused."""
        try:
            self.backend.unmap(int(iova), int(size))
        except DmakitError as refusal:
            if refusal.errno != ENOENT:
                return 0  # ``failure`` stays what made the map before it fail
        except BaseException as stop:
            self._put_off(stop)
            self._unmap_unnoted(int(iova), int(size))
        self.shadow._remove(iova, size)
        self._deliver()
        return size

    def _unmap_unnoted(self, iova: int, size: int) -> None:
        """After an interrupt: whatever the kernel holds of a range that the shadow does not."""
        with contextlib.suppress(DmakitError):
            self.backend.unmap(iova, size)

    def _sync_map(self, iova: cython.ulonglong, size: cython.ulonglong, cpu: cython.int = 0) -> cython.int:
        """Nothing to do: the host's kernel tells its hardware before a mapping call returns."""
        self.ledger.counts[L_SYNC_MAP] += 1
        if self.events is not None:
            self._note("syncmap_in", iova, size)
        return 0

    def _unmap(self, iova: cython.ulonglong, size: cython.ulonglong, gather: Gather) -> cython.ulonglong:
        """Bytes removed: whole mappings up to the first hole, or the first that would be cut; flushed already."""
        removed: cython.ulonglong = self.shadow._run(iova, size)
        self.ledger.counts[L_DOMAIN_UNMAPS] += 1
        if removed != 0:
            removed = self._take_back(iova, removed)
        if self.events is not None:
            self._note_unmap(iova, size, removed)
        return removed

    def _iova_to_phys(self, iova: cython.ulonglong) -> cython.ulonglong:
        """Source address or 0, from the shadow."""
        return self.shadow._at(iova)

    def _leaf_across(self, iova: cython.ulonglong) -> cython.bint:
        """Whether an unmap that begins or ends at ``iova`` would cut a mapping."""
        return self.shadow._cuts(iova)

    def _note(self, name: str, first: cython.ulonglong, second: cython.ulonglong) -> cython.void:
        events: Any = self.events
        events.append((name, int(first), int(second)))

    def _note_unmap(self, iova: cython.ulonglong, size: cython.ulonglong, removed: cython.ulonglong) -> cython.void:
        events: Any = self.events
        events.append(("unmap", int(iova), int(size), int(removed)))
