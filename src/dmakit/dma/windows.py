"""A device's windows: the two-step calls for one window, and whole windows in one call or by the batch.

* ``try_alloc`` gives an ``IovaState``; the caller links and syncs.
* ``map_window`` allocates, links every piece of two arrays one behind the other, and syncs: what a driver does for
  one request. It answers as the single calls do, with their errors; a piece that cannot be linked leaves nothing.
* ``map_windows`` and ``unmap_windows`` do that for many requests, with arrays in and out and no Python object for any
  of them: two words a request, the kernel's ``struct dma_iova_state``. The contract checker does not see them.

The ledger counts the single calls that each stands for. Arrays are buffers of 64-bit words. Compiled, both run without
the GIL; no other thread may use the device meanwhile.
"""

from __future__ import annotations

from typing import Any, SupportsIndex

import cython

from dmakit.dma.direction import checked_attrs, checked_cpu, checked_direction, integer
from dmakit.dma.report import link_error, window_error
from dmakit.errors import DmakitError, MisuseError
from dmakit.iova.arguments import words

if cython.compiled:
    from cython.cimports.dmakit.dma.exact import exact
    from cython.cimports.dmakit.dma.iova_state import IovaState
    from cython.cimports.dmakit.dma.scatter import Scatter
    from cython.cimports.dmakit.dma.window import SIZE_BITS, IovaWindow
else:
    from dmakit.dma.exact import exact
    from dmakit.dma.iova_state import IovaState
    from dmakit.dma.scatter import Scatter
    from dmakit.dma.window import SIZE_BITS, IovaWindow

_TOP = (1 << 64) - 1


@cython.cclass
class Windows(Scatter):
    """A device's two-step mappings; ``states`` are the live windows."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        Scatter.__init__(self, name, options)
        self.states: dict[IovaState, None] = {}
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
        if start is None or not 0 <= start <= _TOP:
            raise MisuseError(f"try_alloc: phys={phys!r}: must be a 64-bit address")
        if length is None or (not 0 < length < 1 << 63 and not (self.unchecked and 0 <= length <= _TOP)):
            raise MisuseError(f"try_alloc: size={size!r}: must be 1 to 2**63 - 1 bytes (bit 63 is the state's own)")
        return self._opened(start, length, on)

    def _opened(self, phys: cython.ulonglong, size: cython.ulonglong, cpu: cython.int) -> IovaState:
        """``try_alloc`` with checked arguments."""
        state = IovaState()
        if state._try_alloc(self, phys, size, cpu) != 0:
            state._open(self, cpu)
            self.states[state] = None
            if self.checker is not None:
                self.checker.allocated(self, state)
        return state

    def _state_closed(self, state: IovaState) -> None:
        del self.states[state]

    # Whole windows ------------------------------------------------------------------------------------------

    @cython.locals(places="const unsigned long long[::1]", lengths="const unsigned long long[::1]")
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
        way: cython.int = checked_direction(direction)
        how: cython.int = checked_attrs(attrs)
        on: cython.int = checked_cpu(cpu, self.ledger.cpus)
        places, lengths = words("phys", phys), words("sizes", sizes)
        count: cython.Py_ssize_t = len(places)
        if count != len(lengths) or count == 0:
            raise MisuseError(f"phys, sizes have {count}, {len(lengths)} items: must have the same number, at least 1")
        if self.checker is not None or self._total(places, lengths, 0, count) == 0:
            return self._map_piecewise(list(places), list(lengths), way, how, on)
        state: IovaState = self._opened(places[0], self._total(places, lengths, 0, count), on)
        if not state.live:
            return state
        done: cython.Py_ssize_t
        with cython.nogil:
            done = self._fill(state, places, lengths, 0, count, way, how, on)
        if done < count:
            state._close()
            raise self._piece_error(places, lengths, 0, done, way, how)
        state._note_run(state.size_word & SIZE_BITS, way, how)
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

    @cython.locals(places="const unsigned long long[::1]", lengths="const unsigned long long[::1]")
    @cython.locals(edges="const unsigned long long[::1]", found="unsigned long long[::1]", done=cython.Py_ssize_t)
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

        ``states[2i]`` becomes its address and ``states[2i+1]`` its size (bit 63: bounced). All or nothing.
        """
        way: cython.int = checked_direction(direction)
        how: cython.int = checked_attrs(attrs)
        on: cython.int = checked_cpu(cpu, self.ledger.cpus)
        places, lengths, edges = words("phys", phys), words("sizes", sizes), words("bounds", bounds)
        found = words("states", states, writable=True)
        count: cython.Py_ssize_t = len(edges) - 1
        if len(places) != len(lengths):
            raise MisuseError(f"phys, sizes have {len(places)}, {len(lengths)} items: must have the same number")
        if len(found) < 2 * count:
            raise MisuseError(f"states has {len(found)} items: needs {2 * count}")
        if not self._ascending(edges, len(places)):
            raise MisuseError(f"bounds: must ascend from request to request, up to the {len(places)} pieces")
        with cython.nogil:
            done = self._map_run(places, lengths, edges, found, way, how, on)
        if done < count:
            error = self._window_error(places, lengths, edges[done], edges[done + 1], way, how)
            self.unmap_windows(found[: 2 * done], way, how, on)
            raise error

    @cython.locals(live="unsigned long long[::1]", done=cython.Py_ssize_t)
    def unmap_windows(
        self, states: object, direction: SupportsIndex, attrs: SupportsIndex = 0, cpu: SupportsIndex = 0
    ) -> None:
        """Destroy each window of ``map_windows``, with the same direction and attributes; ``states`` becomes zeros."""
        way: cython.int = checked_direction(direction)
        how: cython.int = checked_attrs(attrs)
        on: cython.int = checked_cpu(cpu, self.ledger.cpus)
        live = words("states", states, writable=True)
        with cython.nogil:
            done = self._unmap_run(live, way, how, on)
        if 2 * done < len(live) - 1:
            raise MisuseError(f"states[{2 * done}]: a window at {live[2 * done]:#x} cuts a large leaf")

    # Internals ----------------------------------------------------------------------------------------------

    def _total(
        self, phys: memoryview[int], sizes: memoryview[int], first: cython.Py_ssize_t, end: cython.Py_ssize_t
    ) -> cython.ulonglong:
        """Bytes of the pieces ``first`` to ``end`` − 1; 0 when one of them, or the sum, is out of range."""
        i: cython.Py_ssize_t = first
        total: cython.ulonglong = 0
        while i < end:
            if sizes[i] == 0 or sizes[i] >> 62 != 0 or phys[i] >> 63 != 0:
                return 0
            total += sizes[i]
            if total >> 62 != 0:
                return 0
            i += 1
        return total

    def _ascending(self, bounds: memoryview[int], pieces: cython.Py_ssize_t) -> cython.bint:
        i: cython.Py_ssize_t = 1
        while i < len(bounds):
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
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.Py_ssize_t:
        """Link the pieces into a fresh window and sync; on failure it is destroyed, and the piece is returned."""
        done: cython.Py_ssize_t
        if cython.compiled:
            done = window._link_pieces(
                cython.address(phys[0]), cython.address(sizes[0]), first, end, 0, direction, attrs, cpu
            )
        else:
            done = window._link_pieces(phys, sizes, first, end, 0, direction, attrs, cpu)
        if done < end:
            why: cython.int = self.error
            window._destroy(self._total(phys, sizes, first, done), direction, attrs, cpu)
            self.error = why
            return done
        window._sync(0, window.size_word & SIZE_BITS, cpu)
        return end

    def _map_run(
        self,
        phys: memoryview[int],
        sizes: memoryview[int],
        bounds: memoryview[int],
        states: memoryview[int],
        direction: cython.int,
        attrs: cython.int,
        cpu: cython.int,
    ) -> cython.Py_ssize_t:
        """How many requests were mapped; when fewer than all, ``failed_at`` is the piece (or −1: no window)."""
        i: cython.Py_ssize_t = 0
        count: cython.Py_ssize_t = len(bounds) - 1
        total: cython.ulonglong
        while i < count:
            self.failed_at = -1
            total = self._total(phys, sizes, bounds[i], bounds[i + 1])
            if total == 0 or self.window._open_window(phys[bounds[i]], total, cpu) == 0:
                self.oversized = total == 0
                return i
            self.failed_at = self._fill(self.window, phys, sizes, bounds[i], bounds[i + 1], direction, attrs, cpu)
            if self.failed_at < bounds[i + 1]:
                return i
            states[2 * i] = self.window.addr
            states[2 * i + 1] = self.window.size_word
            i += 1
        return i

    def _unmap_run(
        self, states: memoryview[int], direction: cython.int, attrs: cython.int, cpu: cython.int
    ) -> cython.Py_ssize_t:
        """How many windows were destroyed; fewer than all when a large leaf was cut."""
        i: cython.Py_ssize_t = 0
        count: cython.Py_ssize_t = len(states) >> 1
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
        self, phys: memoryview[int], sizes: memoryview[int], first: int, piece: int, direction: int, attrs: int
    ) -> DmakitError:
        """Why a piece could not be linked."""
        linked = int(sum(sizes[first:piece]))
        return link_error(self, int(self.error), int(phys[piece]), linked, int(sizes[piece]), direction, attrs)

    def _window_error(
        self, phys: memoryview[int], sizes: memoryview[int], first: int, end: int, direction: int, attrs: int
    ) -> DmakitError:
        """Why a request of a batch could not be mapped."""
        if self.failed_at >= 0:
            return self._piece_error(phys, sizes, first, int(self.failed_at), direction, attrs)
        if self.oversized:
            return MisuseError(f"pieces {first} to {end - 1}: each must be above 0 bytes, below 2**62 in sum")
        return window_error(self, int(sum(sizes[first:end])))
