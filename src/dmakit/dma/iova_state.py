"""The two-step mapping: allocate a window of IOVAs once, link memory into it when it is needed.

``IovaState`` is ``struct dma_iova_state``: 16 bytes of truth, ``addr`` (the first usable IOVA: the window's base plus
the offset of the memory inside its granule) and ``size_word`` (the bytes asked for, with bit 63 = some piece was
bounced). Everything else a caller must remember is an offset: nothing else is stored per piece.

    with device.try_alloc(phys, 128 * KIB) as state:
        state.link(phys, 0, 128 * KIB, Direction.TO_DEVICE)
        state.sync()

Rules (docs/two_step.md tells them function by function):

* Whole granules become visible to the device: only the first piece may start, and only the last may end, inside a
  granule. A piece that starts inside one at offset > 0 is refused (−EIO).
* ``link`` writes entries and nothing else; ``sync`` makes them known to the hardware, once for any number of links.
* ``unlink`` flushes before it returns, in lazy mode too, and keeps the window; ``destroy`` unlinks [0, mapped_len),
  frees the window and may leave the flush to the queue; ``free`` frees a window in which nothing is linked.
* An untrusted device gets the unaligned head and tail of a piece as copies in bounce slots, the middle in place.

Internals return 0 or −errno and ask no questions: like the kernel's, a destroyed state keeps its words. The public
methods look whether the state is alive, and remember what they linked so that a ``with`` block can undo it.

Models ``drivers/iommu/dma-iommu.c`` (dma_iova_*), ``include/linux/dma-mapping.h``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

import cython

from dmakit.dma.direction import checked_attrs, checked_cpu, checked_direction, integer
from dmakit.dma.pieces import one_run, without
from dmakit.dma.report import link_error
from dmakit.errors import MisuseError
from dmakit.reasons import Reason

if cython.compiled:
    from cython.cimports.dmakit.consts import (
        ATTR_MMIO,
        ATTR_REQUIRE_COHERENT,
        EINVAL,
        EIO,
        EOPNOTSUPP,
        EPERM,
        L_DESTROY_CALLS,
        L_LINK_CALLS,
        L_SYNC_CALLS,
        L_TRY_ALLOC_CALLS,
        L_UNLINK_CALLS,
    )
    from cython.cimports.dmakit.dma.core import LARGE_LEAF, MapCore
else:
    from dmakit.consts import (
        ATTR_MMIO,
        ATTR_REQUIRE_COHERENT,
        EINVAL,
        EIO,
        EOPNOTSUPP,
        EPERM,
        L_DESTROY_CALLS,
        L_LINK_CALLS,
        L_SYNC_CALLS,
        L_TRY_ALLOC_CALLS,
        L_UNLINK_CALLS,
    )
    from dmakit.dma.core import LARGE_LEAF, MapCore

from dmakit.dma import defects

if TYPE_CHECKING:
    from types import TracebackType

USE_SWIOTLB = 1 << 63
_SIZE_BITS = (1 << 63) - 1
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
class IovaState:
    """One window of IOVAs. Falsy when it cannot be used (``dma_use_iova``): map each piece by itself then."""

    def __init__(self) -> None:
        self.addr = 0
        self.size_word = 0
        self.cpu = 0
        self.pieces: list[tuple[int, int, int, int]] | None = None

    # Internals ----------------------------------------------------------------------------------------------

    def _try_alloc(
        self, core: MapCore, phys: cython.ulonglong, size: cython.ulonglong, cpu: cython.int
    ) -> cython.ulonglong:
        """A window for ``size`` bytes that start at phys's offset in a granule; returns ``addr``, 0 when unusable."""
        pad: cython.ulonglong = phys & core.granule_mask
        iova: cython.ulonglong
        self.core = core
        self.addr = 0
        self.size_word = 0
        core.ledger.counts[L_TRY_ALLOC_CALLS] += 1
        if not core.translating:
            return core._fail(-EOPNOTSUPP, _IDENTITY_DOMAIN if core.identity else _NO_IOMMU)
        if size == 0 or size >> 63 != 0:
            if core.events is not None:
                core.events.append(("warn", "dma_iova_try_alloc: size is 0 or uses bit 63"))
            return core._fail(-EINVAL, _NONE)
        iova = core._alloc_iova(core._aligned(size + pad), core.mask, cpu)
        if iova == 0:
            return core._fail(-EINVAL, _IOVA_EXHAUSTED)
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
        core: MapCore = self.core
        pad: cython.ulonglong = phys & core.granule_mask
        core.ledger.counts[L_LINK_CALLS] += 1
        if pad != 0 and offset != 0:
            if core.events is not None:
                core.events.append(("warn", "dma_iova_link: unaligned start at offset > 0"))
            return -EIO
        if attrs & ATTR_REQUIRE_COHERENT:
            if not core.coherent:
                return -EOPNOTSUPP
            if self.size_word & USE_SWIOTLB:
                if core.events is not None:
                    core.events.append(("warn", "dma_iova_link: REQUIRE_COHERENT on a bounced state"))
                return -EOPNOTSUPP
        if (phys | size) & core.granule_mask and core._may_bounce(size, direction):
            if attrs & (ATTR_MMIO | ATTR_REQUIRE_COHERENT):
                return -EPERM
            return self._link_bounced(phys, offset, size, direction, attrs, cpu)
        return self._link_in_place(
            self.addr + offset - pad, phys - pad, core._aligned(size + pad), direction, attrs, cpu
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
        core: MapCore = self.core
        if core._needs_cache_care(attrs):
            core._for_device(phys, size, direction)
        return core._map_entries(iova, phys, size, core._prot(direction, attrs), cpu)

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
        core: MapCore = self.core
        pad: cython.ulonglong = phys & core.granule_mask
        tail: cython.ulonglong = (phys + size) & core.granule_mask
        done: cython.ulonglong = 0
        middle: cython.ulonglong
        error: cython.int
        if pad != 0:
            done = min(size, core.granule_mask + 1 - pad)
            error = self._bounce_and_link(self.addr + offset, phys, done, pad, direction, attrs, cpu)
            if error != 0:
                return error
            self.size_word |= USE_SWIOTLB
            if done == size:
                return 0
        middle = size - done - tail
        error = 0
        if middle != 0 or core.defects & _ZERO_MIDDLE:
            error = self._link_in_place(self.addr + offset + done, phys + done, middle, direction, attrs, cpu)
            if error == 0:
                done += middle
        if error == 0 and tail != 0:
            error = self._bounce_and_link(self.addr + offset + done, phys + done, tail, 0, direction, attrs, cpu)
            if error == 0:
                self.size_word |= USE_SWIOTLB
        if error != 0 and done != 0:
            self._remove(0 if core.defects & _UNWIND_FROM_ZERO else offset, done, direction, attrs, False, cpu)
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
        core: MapCore = self.core
        tlb: cython.ulonglong
        error: cython.int
        if core.events is not None:
            core.events.append(("blink", iova, phys, size))
        tlb = core._bounce_in(phys, size, core.granule_mask, direction, attrs, cpu)
        if tlb == 0:
            return core.error
        error = self._link_in_place(iova - pad, tlb - pad, core._aligned(size + pad), direction, attrs, cpu)
        if error != 0:
            core._bounce_out(tlb, size, direction, attrs)
        return error

    def _sync(self, offset: cython.ulonglong, size: cython.ulonglong, cpu: cython.int) -> cython.int:
        """Make the entries of [offset, offset+size) known to the hardware; 0 or −errno."""
        core: MapCore = self.core
        iova: cython.ulonglong = self.addr + offset
        pad: cython.ulonglong = iova & core.granule_mask
        core.ledger.counts[L_SYNC_CALLS] += 1
        error: cython.int = core.domain._sync_map(iova - pad, core._aligned(size + pad), cpu)
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
        core: MapCore = self.core
        addr: cython.ulonglong = self.addr + offset
        pad: cython.ulonglong = addr & core.granule_mask
        length: cython.ulonglong = core._aligned(size + pad)
        slow: cython.bint = (self.size_word & USE_SWIOTLB) != 0 or core._needs_cache_care(attrs)
        slots_first: cython.bint = (core.defects & _SLOTS_FREED_BEFORE_UNMAP) != 0
        queued: cython.bint = free_iova and core.flush_queue is not None
        if self.size_word & USE_SWIOTLB and not slots_first:
            queued = False  # a slot may be released only when the device cannot reach it any more
        if (
            self.size_word & _SIZE_BITS >= LARGE_LEAF
            and not core.defects & _UNLINK_CUTS_LEAF
            and core._cuts_leaf(addr - pad, addr - pad + length)
        ):
            return -EINVAL
        if slow:
            core._remember(addr, size)
            if slots_first:
                core._release_remembered(direction, attrs)
        core.gather._init()
        core.gather.queued = queued
        if core.domain._unmap(addr - pad, length, core.gather) != length and core.events is not None:
            core.events.append(("warn", "__iommu_dma_iova_unlink: unmapped size differs"))
        if not queued:
            core.domain._flush(core.gather, cpu)
        if slow:
            core._release_remembered(direction, attrs)
        if free_iova:
            if not core.defects & _PARTIAL_DESTROY:
                length = core._aligned((self.size_word & _SIZE_BITS) + pad)
            core._free_iova(addr - pad, length, queued, cpu)
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
        core: MapCore = self.core
        pad: cython.ulonglong = self.addr & core.granule_mask
        core.ledger.counts[L_DESTROY_CALLS] += 1
        return core._free_iova(self.addr - pad, core._aligned((self.size_word & _SIZE_BITS) + pad), False, cpu)

    # Public -------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes of the window as asked for (``dma_iova_size``); 0 when it is not usable."""
        return int(self.size_word & _SIZE_BITS)

    @property
    def bounced(self) -> bool:
        """Whether some piece went through a bounce slot (bit 63)."""
        return bool(self.size_word & USE_SWIOTLB)

    def __bool__(self) -> bool:
        return self.pieces is not None

    @property
    def use_iova(self) -> bool:
        """``dma_use_iova``: whether there is a live window."""
        return bool(self)

    def _open(self, device: Any, cpu: int) -> None:
        """Called by ``Device.try_alloc`` when the window exists."""
        self.device = device
        self.cpu = cpu
        self.pieces = []

    def _check_alive(self, call: str) -> None:
        if self.pieces is None and not (self.core is not None and self.core.unchecked):
            raise MisuseError(
                f"{call}: this state has no live window (never allocated, freed or destroyed)", rule="stale-state"
            )

    def _check_range(self, call: str, offset: object, size: object) -> tuple[int, int]:
        self._check_alive(call)
        start, length = integer(offset), integer(size)
        least = 0 if self.core.unchecked else 1
        if start is None or length is None or start < 0 or length < least or start + length >> 64:
            raise MisuseError(f"{call}: offset={offset!r}, size={size!r}: must be integers, offset >= 0 and size > 0")
        if start + length > self.size and not self.core.unchecked:
            raise MisuseError(
                f"{call}: [{start:#x}, {start + length:#x}) is outside the window of {self.size:#x} bytes",
                rule="outside-window",
            )
        return start, length

    def _on_cpu(self, cpu: object) -> int:
        """The CPU of a call: the window's own when none was given."""
        return int(self.cpu) if cpu is None else checked_cpu(cpu, self.core.ledger.cpus)

    def link(
        self,
        phys: SupportsIndex,
        offset: SupportsIndex,
        size: SupportsIndex,
        direction: SupportsIndex,
        attrs: SupportsIndex = 0,
        *,
        cpu: SupportsIndex | None = None,
    ) -> None:
        """Link ``size`` bytes of memory at ``phys`` at byte ``offset`` of the window (``dma_iova_link``).

        Writes IOMMU entries only: call ``sync`` after the last link and before the device uses the range. Raises with
        the kernel's errno: EIO (starts inside a granule at offset > 0), EADDRINUSE (over a linked piece), ENXIO, EPERM
        and EOPNOTSUPP (MMIO or REQUIRE_COHERENT where a bounce or cache care is needed), ENOMEM (slot or table page).
        """
        start, length = self._check_range("link", offset, size)
        way, how, on = checked_direction(direction), checked_attrs(attrs), self._on_cpu(cpu)
        place = integer(phys)
        if place is None or not 0 <= place <= (1 << 64) - 1 - length:
            raise MisuseError(f"link: phys={phys!r}: must be an address below 2**64 - size")
        checker = self.core.checker
        if checker is not None:
            checker.before_link(self, place, start, length, way, how)
        error = self._link(place, start, length, way, how, on)
        if error != 0:
            if checker is not None:
                checker.link_failed(self, place, start, length, way, how, -error)
            raise link_error(self.core, error, place, start, length, way, how)
        self._note_piece(start, length, way, how)
        if checker is not None:
            checker.after_link(self, place, start, length, way, how)

    def sync(
        self, offset: SupportsIndex = 0, size: SupportsIndex | None = None, *, cpu: SupportsIndex | None = None
    ) -> None:
        """Make everything linked in [offset, offset+size) known to the hardware (``dma_iova_sync``); default: all."""
        first = integer(offset)
        rest = self.size - first if size is None and first is not None else size
        start, length = self._check_range("sync", offset, rest)
        error = self._sync(start, length, self._on_cpu(cpu))
        if error != 0:
            raise link_error(self.core, error, 0, start, length, 0, 0)
        if self.core.checker is not None:
            self.core.checker.after_sync(self, start, length)

    def unlink(
        self,
        offset: SupportsIndex,
        size: SupportsIndex,
        direction: SupportsIndex,
        attrs: SupportsIndex = 0,
        *,
        cpu: SupportsIndex | None = None,
    ) -> None:
        """Unlink [offset, offset+size), flushed when this returns; the window stays (``dma_iova_unlink``).

        MisuseError (EINVAL), with nothing changed, when the range cuts a large leaf: unlink what was linked as one.
        """
        start, length = self._check_range("unlink", offset, size)
        way, how, on = checked_direction(direction), checked_attrs(attrs), self._on_cpu(cpu)
        if self.core.checker is not None:
            self.core.checker.before_unlink(self, start, length, way, how)
        self._raise_cut("unlink", self._unlink(start, length, way, how, on), start, length)
        self._forget(start, length)
        if self.core.checker is not None:
            self.core.checker.after_unlink(self, start, length)

    def destroy(
        self,
        mapped_len: SupportsIndex,
        direction: SupportsIndex,
        attrs: SupportsIndex = 0,
        *,
        cpu: SupportsIndex | None = None,
    ) -> None:
        """Unlink the ``mapped_len`` bytes linked from offset 0 and free the window (``dma_iova_destroy``)."""
        self._check_alive("destroy")
        length = integer(mapped_len)
        if length is None or not 0 <= length <= (1 << 63 if self.core.unchecked else self.size):
            raise MisuseError(
                f"destroy: mapped_len={mapped_len!r}: must be 0 to {self.size:#x}, the size of the window",
                rule="destroy-length",
            )
        way, how, on = checked_direction(direction), checked_attrs(attrs), self._on_cpu(cpu)
        if self.core.checker is not None:
            self.core.checker.before_destroy(self, length, way, how)
        self._raise_cut("destroy", self._destroy(length, way, how, on), 0, length)
        self._close()
        if self.core.checker is not None:
            self.core.checker.after_destroy(self)

    def free(self, *, cpu: SupportsIndex | None = None) -> None:
        """Free a window in which nothing is linked (``dma_iova_free``)."""
        self._check_alive("free")
        if self.core.checker is not None:
            self.core.checker.before_free(self)
        self._free(self._on_cpu(cpu))
        self._close()
        if self.core.checker is not None:
            self.core.checker.after_free(self)

    def _raise_cut(self, call: str, error: int, offset: int, size: int) -> None:
        if error != 0:
            raise MisuseError(
                f"{call}: [{offset:#x}, {offset + size:#x}) cuts a large leaf: unlink what was linked as one piece",
                -error,
                rule="unlink-cuts-leaf",
            )

    def _forget(self, offset: int, size: int) -> None:
        if self.pieces is not None:
            self.pieces = without(self.pieces, offset, size)

    def _note_piece(self, offset: int, size: int, direction: int, attrs: int) -> None:
        if self.pieces is not None:
            self.pieces.append((offset, size, direction, attrs))

    def _close(self) -> None:
        if self.pieces is not None:
            self.pieces = None
            self.device._state_closed(self)

    def undo(self) -> None:
        """Unlink whatever the public ``link`` linked and free the window; harmless on a dead state."""
        run = one_run(self.pieces or [])
        if run is None:
            for piece in sorted(self.pieces or []):
                self.unlink(*piece)
            self.free()
        elif self.pieces is not None:
            self.destroy(*run[1:])

    def __enter__(self) -> IovaState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()
