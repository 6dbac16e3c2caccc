"""A device's windows: the two-step calls for one window, and whole windows in one call or by the batch.

* ``try_alloc`` gives an ``IovaState``; the caller links and syncs.
* ``map_window`` allocates, links every piece of two arrays one behind the other, and syncs: what a driver does for
  one request. It answers as the single calls do, with their errors; a piece that cannot be linked leaves nothing.
* ``map_windows`` and ``unmap_windows`` do that for many requests, with arrays in and out and no Python object for any
  of them: two words a request, the kernel's ``struct dma_iova_state``. The contract checker does not see them.

The ledger counts the single calls that each stands for. Arrays are buffers of 64-bit words. Compiled, both run without
the GIL; other threads' calls of the machine wait meanwhile.
"""

from __future__ import annotations

from typing import Any, SupportsIndex

import cython

from dmakit.consts import EINVAL
from dmakit.dma.direction import checked_attrs, checked_cpu, checked_direction, integer
from dmakit.dma.report import link_error, window_error
from dmakit.errors import DmakitError, MisuseError
from dmakit.iova.arguments import apart, words

if not cython.compiled:
    from dmakit.dma.exact import Words, exact, known, taken
    from dmakit.dma.iova_state import IovaState
    from dmakit.dma.scatter import Scatter
    from dmakit.dma.window import SIZE_BITS, IovaWindow

_ALL_ONES = (1 << 64) - 1
_SIGN = 1 << 63  # of 0 - 1, in either form


def _slice(items: Words, first: cython.Py_ssize_t, end: cython.Py_ssize_t) -> list[int]:
    found = []
    i: cython.Py_ssize_t = first
    while i < end:
        found.append(int(items.items[i]))
        i += 1
    return found


@cython.cclass
class Windows(Scatter):
    """A device's two-step mappings; ``states`` are the live windows, in no order (``serial`` has it)."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        Scatter.__init__(self, name, options)
        self.states: list[IovaState] = []
        self.opened = 0
        self.window = IovaWindow()
        self.window.core = self
        self.failed_at = -1
        self.oversized = False

    def try_alloc(self, phys: SupportsIndex, size: SupportsIndex, cpu: SupportsIndex = 0) -> IovaState:
        """A window of ``size`` bytes of IOVA (``dma_iova_try_alloc``); falsy when the device or the space has none.

        Only phys's offset inside a granule matters (0 for page-aligned users). MisuseError for a size of 0 or one
        that uses bit 63.
        """
        first: cython.longlong = exact(phys)
        total: cython.longlong = exact(size)
        processor: cython.longlong = exact(cpu)
        if first >= 0 and total > 0 and 0 <= processor < self.ledger.cpus:
            return self._opened(first, total, processor)
        start, length, on = integer(phys), integer(size), checked_cpu(cpu, self.ledger.cpus)
        if start is None or not 0 <= start <= _ALL_ONES:
            raise MisuseError(f"try_alloc: phys={phys!r}: must be a 64-bit address")
        if length is None or (not 0 < length < 1 << 63 and not (self.unchecked and 0 <= length <= _ALL_ONES)):
            raise MisuseError(f"try_alloc: size={size!r}: must be 1 to 2**63 - 1 bytes (bit 63 is the state's own)")
        return self._opened(start, length, on)

    def _opened(self, phys: cython.ulonglong, size: cython.ulonglong, cpu: cython.int) -> IovaState:
        """``try_alloc`` with checked arguments."""
        state: IovaState = IovaState.__new__(IovaState) if cython.compiled else IovaState()
        self.ledger._alone()
        if state._try_alloc(self, phys, size, cpu) != 0:
            state._open(self, cpu)
            state.serial = self.opened
            self.opened += 1
            state.slot = len(self.states)
            self.states.append(state)
            if self.checker is not None:
                self.checker.allocated(self, state)
        return state

    def _state_closed(self, state: object) -> cython.int:
        """A window of this device is no longer live: the last one takes its place."""
        closed: IovaState = state  # type: ignore[assignment]
        last: IovaState = self.states.pop()
        if last is not closed:
            self.states[closed.slot] = last
            last.slot = closed.slot
        return 0

    # Whole windows ------------------------------------------------------------------------------------------

    def map_window(
        self,
        phys: object,
        sizes: object,
        direction: SupportsIndex,
        attrs: SupportsIndex = 0,
        cpu: SupportsIndex = 0,
    ) -> IovaState:
        """One window for all pieces, linked one behind the other and synced; falsy as ``try_alloc``'s answer.

        The errors are those of the single calls; after one, nothing is mapped.
        """
        way: cython.longlong = exact(direction)
        how: cython.longlong = exact(attrs)
        on: cython.longlong = exact(cpu)
        if not known(way, how) or not 0 <= on < self.ledger.cpus:
            way, how, on = checked_direction(direction), checked_attrs(attrs), checked_cpu(cpu, self.ledger.cpus)
        places: Words = taken("phys", phys, False)
        lengths: Words = taken("sizes", sizes, False)
        count: cython.Py_ssize_t = places.count
        if count != lengths.count or count == 0:
            raise MisuseError(f"phys, sizes have {count}, {lengths.count} items: must have the same number, at least 1")
        total: cython.ulonglong = self._total(places.items, lengths.items, 0, count)
        if self.checker is not None or total == 0:
            return self._map_piecewise(list(words("phys", phys)), list(words("sizes", sizes)), way, how, on)
        state: IovaState = self._opened(places.items[0], total, on)
        if not state.live:
            return state
        done: cython.Py_ssize_t = self._fill(state, places.items, lengths.items, 0, count, total, way, how, on)
        if done < count:
            state._close()
            raise self._piece_error(places, lengths, 0, done, way, how)
        state._note_run(total, way, how)
        return state

    def _map_piecewise(self, phys: list[int], sizes: list[int], direction: int, attrs: int, cpu: int) -> IovaState:
        """``map_window`` by the single calls, for the checker's eyes and for the errors of odd arguments."""
        state = self.try_alloc(phys[0], sum(sizes), cpu)
        linked = 0
        if not state:
            return state
        try:
            for place, length in zip(phys, sizes, strict=True):
                state.link(place, linked, length, direction, attrs)
                linked += length
            state.sync(0, linked)
        except DmakitError:
            state.destroy(linked, direction, attrs)
            raise
        return state

    def map_windows(
        self,
        phys: object,
        sizes: object,
        bounds: object,
        states: object,
        direction: SupportsIndex,
        attrs: SupportsIndex = 0,
        cpu: SupportsIndex = 0,
    ) -> None:
        """A window for each request: request i has the pieces ``bounds[i]`` to ``bounds[i+1]`` − 1.

        ``states[2i]`` becomes its address and ``states[2i+1]`` its size (bit 63: bounced); it must not overlap the
        other arrays. All or nothing.
        """
        way: cython.int = checked_direction(direction)
        how: cython.int = checked_attrs(attrs)
        on: cython.int = checked_cpu(cpu, self.ledger.cpus)
        places: Words = taken("phys", phys, False)
        lengths: Words = taken("sizes", sizes, False)
        edges: Words = taken("bounds", bounds, False)
        found: Words = taken("states", states, True)
        done: cython.Py_ssize_t
        if places.count != lengths.count:
            raise MisuseError(f"phys, sizes have {places.count}, {lengths.count} items: must have the same number")
        if edges.count > 0 and found.count < 2 * (edges.count - 1):
            raise MisuseError(f"states has {found.count} items: needs {2 * (edges.count - 1)}")
        apart("states", states, phys=phys, sizes=sizes, bounds=bounds)
        if not self._ascending(edges.items, edges.count, places.count):
            raise MisuseError(f"bounds: must ascend from request to request, up to the {places.count} pieces")
        turn = self.ledger.turn
        turn._take()
        try:
            with cython.nogil:
                done = self._map_run(
                    places.items, lengths.items, edges.items, edges.count - 1, found.items, way, how, on
                )
            if done < edges.count - 1:
                error = self._window_error(places, lengths, edges.items[done], edges.items[done + 1], way, how)
                with cython.nogil:
                    self._unmap_run(found.items, done, way, how, on)
                raise error
        finally:
            turn._give()

    def unmap_windows(
        self, states: object, direction: SupportsIndex, attrs: SupportsIndex = 0, cpu: SupportsIndex = 0
    ) -> None:
        """Destroy each window of ``map_windows``, with the same direction and attributes; ``states`` becomes zeros."""
        way: cython.int = checked_direction(direction)
        how: cython.int = checked_attrs(attrs)
        on: cython.int = checked_cpu(cpu, self.ledger.cpus)
        live: Words = taken("states", states, True)
        done: cython.Py_ssize_t
        turn = self.ledger.turn
        turn._take()
        try:
            with cython.nogil:
                done = self._unmap_run(live.items, live.count >> 1, way, how, on)
        finally:
            turn._give()
        if done < live.count >> 1:
            raise MisuseError(f"states[{2 * done}]: the window at {live.items[2 * done]:#x} cuts a large leaf", EINVAL)

    # Internals ----------------------------------------------------------------------------------------------

    def _total(
        self, phys: memoryview[int], sizes: memoryview[int], first: cython.Py_ssize_t, end: cython.Py_ssize_t
    ) -> cython.ulonglong:
        """Bytes of the pieces ``first`` to ``end`` − 1; 0 when an address or a size is none of this world's."""
        i: cython.Py_ssize_t = first
        total: cython.ulonglong = 0
        high: cython.ulonglong = 0
        longest: cython.ulonglong = 0
        empty: cython.ulonglong = 0
        while i < end:
            total += sizes[i]
            high |= phys[i]
            longest |= sizes[i]
            empty |= sizes[i] - 1
            i += 1
        if high >> 62 != 0 or longest >> 40 != 0 or empty & _SIGN != 0 or end - first >= 1 << 22:
            return 0
        return total

    def _ascending(self, bounds: memoryview[int], count: cython.Py_ssize_t, pieces: cython.ulonglong) -> cython.bint:
        i: cython.Py_ssize_t = 1
        while i < count:
            if bounds[i] <= bounds[i - 1] or bounds[i] > pieces:
                return False
            i += 1
        return True

    def _fill(
        self,
        window: IovaWindow,
        phys: memoryview[int],
        sizes: memoryview[int],
        first: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
        total: cython.ulonglong,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.Py_ssize_t:
        """Link the pieces into a fresh window and sync; on failure it is destroyed, and the piece is returned.

        A sync that fails is the last piece's."""
        done: cython.Py_ssize_t = window._link_pieces(phys, sizes, first, end, 0, direction, attrs, cpu)
        why: cython.int = self.error
        if done == end:
            why = window._sync(0, total, cpu)
            if why == 0:
                return end
            done = end - 1
        else:
            total = self._total(phys, sizes, first, done)
        window._destroy(total, direction, attrs, cpu)
        self.error = why
        return done

    def _map_run(
        self,
        phys: memoryview[int],
        sizes: memoryview[int],
        bounds: memoryview[int],
        count: cython.Py_ssize_t,
        states: memoryview[int],
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.Py_ssize_t:
        """How many requests were mapped; when fewer than all, ``failed_at`` is the piece (or −1: no window)."""
        i: cython.Py_ssize_t = 0
        end: cython.Py_ssize_t
        total: cython.ulonglong
        while i < count:
            end = bounds[i + 1]
            total = self._total(phys, sizes, bounds[i], end)
            self.failed_at = -1
            self.oversized = total == 0
            if total == 0 or self.window._open_window(phys[bounds[i]], total, cpu) == 0:
                return i
            self.failed_at = self._fill(self.window, phys, sizes, bounds[i], end, total, direction, attrs, cpu)
            if self.failed_at < end:
                return i
            states[2 * i] = self.window.addr
            states[2 * i + 1] = self.window.size_word
            i += 1
        return i

    def _unmap_run(
        self,
        states: memoryview[int],
        count: cython.Py_ssize_t,
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.Py_ssize_t:
        """How many windows were destroyed; fewer than all when a large leaf was cut."""
        i: cython.Py_ssize_t = 0
        while i < count:
            self.window.addr = states[2 * i]
            self.window.size_word = states[2 * i + 1]
            if self.window.size_word != 0:
                if self.window._destroy(self.window.size_word & SIZE_BITS, direction, attrs, cpu) != 0:
                    return i
                states[2 * i] = 0
                states[2 * i + 1] = 0
            i += 1
        return i

    def _piece_error(
        self, phys: Words, sizes: Words, first: int, piece: int, direction: int, attrs: int
    ) -> DmakitError:
        """Why a piece could not be linked."""
        linked = int(sum(_slice(sizes, first, piece)))
        at: cython.Py_ssize_t = piece
        place, length = int(phys.items[at]), int(sizes.items[at])
        return link_error(self, int(self.error), place, linked, length, direction, attrs)

    def _window_error(self, phys: Words, sizes: Words, first: int, end: int, direction: int, attrs: int) -> DmakitError:
        """Why a request of a batch could not be mapped."""
        if self.failed_at >= 0:
            return self._piece_error(phys, sizes, first, int(self.failed_at), direction, attrs)
        if self.oversized:
            return MisuseError(f"pieces {first} to {end - 1}: each must be 1 to 2**40 - 1 bytes, below 2**62")
        return window_error(self, int(sum(_slice(sizes, first, end))))
