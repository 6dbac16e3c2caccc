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

The work is in ``dma.window``. The public methods here look whether the state is alive, and remember what they linked
so that a ``with`` block can undo it.

Models ``drivers/iommu/dma-iommu.c`` (dma_iova_*), ``include/linux/dma-mapping.h``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

import cython

from dmakit.dma.direction import checked_attrs, checked_cpu, checked_direction, integer
from dmakit.dma.pieces import Piece, one_run, without
from dmakit.dma.report import cut_error, link_error
from dmakit.errors import MisuseError

if not cython.compiled:
    from dmakit.dma.exact import exact, known
    from dmakit.dma.window import SIZE_BITS, USE_SWIOTLB, IovaWindow

if TYPE_CHECKING:
    from types import TracebackType


@cython.cclass
class IovaState(IovaWindow):
    """One window of IOVAs. Falsy when it cannot be used (``dma_use_iova``): map each piece by itself then."""

    def __init__(self) -> None:
        IovaWindow.__init__(self)
        self.cpu = 0
        self.live = False
        self.serial = 0
        self.slot = 0
        self.run = 0
        self.run_direction = 0
        self.run_attrs = 0
        self.more: list[Piece] | None = None

    @property
    def pieces(self) -> list[Piece] | None:
        """What the public calls linked: (offset, size, direction, attrs); None without a live window."""
        if not self.live:
            return None
        run = [(0, int(self.run), int(self.run_direction), int(self.run_attrs))] if self.run else []
        return run + (self.more or [])

    @property
    def size(self) -> int:
        """Bytes of the window as asked for (``dma_iova_size``); 0 when it is not usable."""
        return int(self.size_word & SIZE_BITS)

    @property
    def bounced(self) -> bool:
        """Whether some piece went through a bounce slot (bit 63)."""
        return bool(self.size_word & USE_SWIOTLB)

    def __bool__(self) -> bool:
        return bool(self.live)

    @property
    def use_iova(self) -> bool:
        """``dma_use_iova``: whether there is a live window."""
        return bool(self.live)

    def _open(self, device: Any, cpu: cython.int) -> cython.void:
        """Called by the device when the window exists."""
        self.device = device
        self.cpu = cpu
        self.live = True
        self.run = 0
        self.more = None

    def _check_alive(self, call: str) -> None:
        if not self.live and not (self.core is not None and self.core.unchecked):
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

    def _quick(self, offset: object, size: object, direction: object, attrs: object, cpu: object) -> cython.bint:
        """Whether a call needs no further check and has no checker: ``start``, ``length`` … then hold its numbers."""
        start: cython.longlong = exact(offset)
        length: cython.longlong = exact(size)
        way: cython.longlong = exact(direction)
        how: cython.longlong = exact(attrs)
        on: cython.longlong = self.cpu if cpu is None else exact(cpu)
        if not self.live or self.core.checker is not None or start < 0 or length < 0 or not known(way, how):
            return False
        self.core.ledger._alone()
        if not self.live or start + length > self.size_word & SIZE_BITS or not 0 <= on < self.core.ledger.cpus:
            return False
        self.start, self.length, self.way, self.how, self.on = start, length, way, how, on
        return True

    def link(
        self,
        phys: SupportsIndex,
        offset: SupportsIndex,
        size: SupportsIndex,
        direction: SupportsIndex,
        attrs: SupportsIndex = 0,
        cpu: SupportsIndex | None = None,
    ) -> None:
        """Link ``size`` bytes of memory at ``phys`` at byte ``offset`` of the window (``dma_iova_link``).

        Writes IOMMU entries only: call ``sync`` after the last link and before the device uses the range. Raises with
        the kernel's errno: EIO (starts inside a granule at offset > 0), EADDRINUSE (over a linked piece), ENXIO, EPERM
        and EOPNOTSUPP (MMIO or REQUIRE_COHERENT where a bounce or cache care is needed), ENOMEM (slot or table page).
        """
        if self._quick(offset, size, direction, attrs, cpu) and exact(phys) >= 0 and self.length > 0:
            place: cython.ulonglong = exact(phys)
            error: cython.int = self._link(place, self.start, self.length, self.way, self.how, self.on)
            if error != 0:
                raise link_error(
                    self.core, error, int(place), int(self.start), int(self.length), int(self.way), int(self.how)
                )
            self._note_piece(int(self.start), int(self.length), int(self.way), int(self.how))
            return
        self._check_alive("link")
        with self.core.ledger.turn:
            self._link_checked(phys, offset, size, direction, attrs, cpu)

    def _link_checked(
        self,
        phys: SupportsIndex,
        offset: SupportsIndex,
        size: SupportsIndex,
        direction: SupportsIndex,
        attrs: SupportsIndex,
        cpu: SupportsIndex | None,
    ) -> None:
        """``link`` with every argument looked at, and with the checker."""
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
        if size is not None and self._quick(offset, size, 0, 0, cpu) and self.length > 0:
            failed: cython.int = self._sync(self.start, self.length, self.on)
            if failed != 0:
                raise link_error(self.core, failed, 0, int(self.start), int(self.length), 0, 0)
            return
        self._check_alive("sync")
        with self.core.ledger.turn:
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
        cpu: SupportsIndex | None = None,
    ) -> None:
        """Unlink [offset, offset+size), flushed when this returns; the window stays (``dma_iova_unlink``).

        MisuseError (EINVAL), with nothing changed, when the range cuts a large leaf: unlink what was linked as one;
        UnsupportedError where the domain unmaps only what was mapped as one (``capabilities.unmap_unit``).
        """
        self._check_alive("unlink")
        with self.core.ledger.turn:
            start, length = self._check_range("unlink", offset, size)
            way, how, on = checked_direction(direction), checked_attrs(attrs), self._on_cpu(cpu)
            if self.core.checker is not None:
                self.core.checker.before_unlink(self, start, length, way, how)
            self._raise_cut("unlink", self._unlink(start, length, way, how, on), start, length)
            self._forget([(start, length)])
            if self.core.checker is not None:
                self.core.checker.after_unlink(self, start, length)

    def destroy(
        self,
        mapped_len: SupportsIndex,
        direction: SupportsIndex,
        attrs: SupportsIndex = 0,
        cpu: SupportsIndex | None = None,
    ) -> None:
        """Unlink the ``mapped_len`` bytes linked from offset 0 and free the window (``dma_iova_destroy``)."""
        if self._quick(0, mapped_len, direction, attrs, cpu):
            self._raise_cut("destroy", self._destroy(self.length, self.way, self.how, self.on), 0, self.length)
            self._close()
            return
        self._check_alive("destroy")
        with self.core.ledger.turn:
            self._destroy_checked(mapped_len, direction, attrs, cpu)

    def _destroy_checked(
        self,
        mapped_len: SupportsIndex,
        direction: SupportsIndex,
        attrs: SupportsIndex,
        cpu: SupportsIndex | None,
    ) -> None:
        """``destroy`` with every argument looked at, and with the checker."""
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
        with self.core.ledger.turn:
            self._check_alive("free")
            on = self._on_cpu(cpu)
            if self.core.checker is not None:
                self.core.checker.before_free(self)
            self._free(on)
            self._close()
            if self.core.checker is not None:
                self.core.checker.after_free(self)

    def _raise_cut(self, call: str, error: int, offset: int, size: int) -> None:
        if error != 0:
            raise cut_error(self.core, f"{call}: [{offset:#x}, {offset + size:#x})", -error)

    def _forget(self, runs: list[tuple[int, int]]) -> None:
        if self.live:
            self.more = without(self.pieces or [], runs)
            self.run = 0

    def _note_piece(self, offset: int, size: int, direction: int, attrs: int) -> None:
        if self.live:
            if self.more is None:
                self.more = []
            self.more.append((offset, size, direction, attrs))

    def _note_run(self, size: cython.ulonglong, direction: cython.int, attrs: cython.int) -> cython.void:
        """``_note_piece`` for all that a fresh window holds."""
        self.run = size
        self.run_direction = direction
        self.run_attrs = attrs

    def _close(self) -> cython.int:
        """The window is gone: the device forgets it."""
        if self.live:
            self.live = False
            self.more = None
            self.core._state_closed(self)
        return 0

    def undo(self) -> None:
        """Unlink whatever the public ``link`` linked and free the window; harmless on a dead state."""
        if not self.live:
            return
        with self.core.ledger.turn:
            pieces = self.pieces
            run = one_run(pieces or [])
            if run is None:
                for piece in sorted(pieces or []):
                    self.unlink(*piece)
                self.free()
            elif pieces is not None:
                self.destroy(*run[1:])

    def __enter__(self) -> IovaState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()
