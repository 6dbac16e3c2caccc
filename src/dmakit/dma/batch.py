"""Many pieces in one call: arrays in, arrays out, no Python object a piece.

Each is a loop of the scalar call and costs what that loop costs:

| batch | loop of | when one item fails |
|---|---|---|
| ``map_many`` | ``map_phys`` (one IOVA and one sync each) | all or nothing |
| ``unmap_many`` | ``unmap_phys`` | goes on, names the first at the end |
| ``sync_many_for_cpu``, ``sync_many_for_device`` | ``sync_single_for_cpu``, ``sync_single_for_device`` | goes on |
| ``link_many`` | ``IovaState.link``, one piece behind the other | all or nothing |
| ``sync_many`` | ``IovaState.sync`` | goes on |
| ``unlink_many`` | ``IovaState.unlink`` | goes on |

All or nothing: what a failing call had done is undone before it raises. An item that no scalar call would look at (an
empty range, one outside the window) is refused before anything is done. Arrays are buffers of 64-bit words
(``array("Q")``, NumPy ``uint64``, memoryviews of them), not to be written by others meanwhile; ``out`` must not overlap
the others. Compiled, the loops run without the GIL, in the machine's turn. The contract checker sees only the scalar
calls.
"""

from __future__ import annotations

from typing import Any, SupportsIndex

import cython

from dmakit.consts import DMA_NONE
from dmakit.dma.direction import checked_attrs, checked_cpu, checked_direction, checked_range, integer
from dmakit.dma.report import cut_error, link_error, map_error
from dmakit.errors import MisuseError
from dmakit.iova.arguments import apart, words

if not cython.compiled:
    from dmakit.dma.iova_state import IovaState
    from dmakit.dma.streaming import Streaming

_ALL_ONES = (1 << 64) - 1


def _bytes(sizes: memoryview[int], count: cython.Py_ssize_t) -> cython.ulonglong:
    """Sum of the first ``count`` sizes; all ones when that does not fit in 64 bits."""
    i: cython.Py_ssize_t = 0
    total: cython.ulonglong = 0
    while i < count:
        if sizes[i] > _ALL_ONES - total:
            return _ALL_ONES
        total += sizes[i]
        i += 1
    return total


def _link_run(
    state: IovaState,
    phys: memoryview[int],
    sizes: memoryview[int],
    offset: cython.ulonglong,
    direction: cython.int,
    attrs: cython.int,
    cpu: cython.int,
) -> cython.Py_ssize_t:
    """How many pieces were linked; when fewer than all, ``state.core.error`` is why."""
    if len(phys) == 0:
        return 0
    if cython.compiled:
        with cython.nogil:
            return state._link_pieces(
                cython.address(phys[0]), cython.address(sizes[0]), 0, len(phys), offset, direction, attrs, cpu
            )
    return state._link_pieces(phys, sizes, 0, len(phys), offset, direction, attrs, cpu)


def _map_run(
    device: Streaming,
    phys: memoryview[int],
    sizes: memoryview[int],
    out: memoryview[int],
    direction: cython.int,
    attrs: cython.int,
    cpu: cython.int,
) -> cython.Py_ssize_t:
    """How many pieces were mapped; when fewer than all, ``device.error`` and ``why`` tell about the next one."""
    i: cython.Py_ssize_t = 0
    with cython.nogil:
        while i < len(phys):
            out[i] = device._map_phys(phys[i], sizes[i], direction, attrs, cpu)
            if out[i] == 0:
                break
            i += 1
    return i


def _unmap_run(
    device: Streaming,
    addresses: memoryview[int],
    sizes: memoryview[int],
    count: cython.Py_ssize_t,
    direction: cython.int,
    attrs: cython.int,
    cpu: cython.int,
) -> cython.Py_ssize_t:
    """Unmap them all; the first piece at which nothing was mapped, ``count`` when there is none."""
    i: cython.Py_ssize_t = 0
    missing: cython.Py_ssize_t = count
    with cython.nogil:
        while i < count:
            if device._unmap_phys(addresses[i], sizes[i], direction, attrs, cpu) != 0 and missing == count:
                missing = i
            i += 1
    return missing


def _sync_run(
    device: Streaming,
    addresses: memoryview[int],
    sizes: memoryview[int],
    direction: cython.int,
    for_cpu: cython.bint,
) -> cython.Py_ssize_t:
    """Sync them all; the first piece at which nothing was mapped, their number when there is none."""
    i: cython.Py_ssize_t = 0
    missing: cython.Py_ssize_t = len(addresses)
    with cython.nogil:
        while i < len(addresses):
            if device._sync_single(addresses[i], sizes[i], direction, for_cpu) != 0 and missing == len(addresses):
                missing = i
            i += 1
    return missing


def _window_run(
    state: IovaState,
    offsets: memoryview[int],
    sizes: memoryview[int],
    first: cython.Py_ssize_t,
    syncing: cython.bint,
    direction: cython.int,
    attrs: cython.int,
    cpu: cython.int,
) -> cython.Py_ssize_t:
    """Sync or unlink ranges of a window from ``first`` on; the one that failed (``core.error`` is why), or all."""
    i: cython.Py_ssize_t = first
    error: cython.int = 0
    with cython.nogil:
        while i < len(offsets):
            if syncing:
                error = state._sync(offsets[i], sizes[i], cpu)
            else:
                error = state._unlink(offsets[i], sizes[i], direction, attrs, cpu)
            if error != 0:
                state.core.error = error
                break
            i += 1
    return i


def _runs(
    offsets: memoryview[int],
    sizes: memoryview[int],
    first: cython.Py_ssize_t,
    end: cython.Py_ssize_t,
    found: Any,
) -> cython.int:
    """Append ranges ``first`` to ``end`` - 1 to ``found`` as (offset, size), neighbours in one."""
    i: cython.Py_ssize_t = first
    while i < end:
        start: cython.ulonglong = offsets[i]
        size: cython.ulonglong = sizes[i]
        i += 1
        while i < end and offsets[i] == start + size:
            size += sizes[i]
            i += 1
        found.append((start, size))
    return 0


def _beyond(starts: memoryview[int], sizes: memoryview[int], end: cython.ulonglong) -> cython.Py_ssize_t:
    """The first range that is empty or ends above ``end`` (inclusive, as the last byte); their number if none."""
    i: cython.Py_ssize_t = 0
    while i < len(starts) and sizes[i] != 0 and sizes[i] - 1 <= end and starts[i] <= end - (sizes[i] - 1):
        i += 1
    return i


def _pairs(first: object, second: object, names: str) -> tuple[memoryview[int], memoryview[int]]:
    left, right = words(names, first), words("sizes", second)
    if len(left) != len(right):
        raise MisuseError(f"{names}, sizes have {len(left)}, {len(right)} items: must have the same number")
    return left, right


def link_many(
    state: IovaState,
    phys: object,
    sizes: object,
    direction: SupportsIndex,
    attrs: SupportsIndex = 0,
    *,
    offset: SupportsIndex = 0,
    cpu: SupportsIndex | None = None,
) -> int:
    """``state.link`` for each piece, one behind the other from ``offset``; returns the bytes linked. No sync."""
    way, how = checked_direction(direction), checked_attrs(attrs)
    places, lengths = _pairs(phys, sizes, "phys")
    begin = integer(offset)  # before the sizes are looked at: what answers may change them
    state._check_alive("link_many")
    on = state._on_cpu(cpu)
    known = int(_bytes(lengths, len(lengths)))
    at = offset if begin is None else begin
    with state.core.ledger.turn:
        start, total = state._check_range("link_many", at, known if known != _ALL_ONES else sum(lengths))
        if not state.core.unchecked:
            _check_ranges("link_many", places, lengths)
        done = int(_link_run(state, places, lengths, start, way, how, on))
        if done < len(places):
            error, linked = int(state.core.error), int(_bytes(lengths, done))
            if linked:
                state._note_piece(start, linked, way, how)
                state.unlink(start, linked, way, how, cpu=on)
            raise link_error(state.core, error, places[done], start + linked, lengths[done], way, how)
        state._note_piece(start, total, way, how)
    return total


def sync_many(state: IovaState, offsets: object, sizes: object, *, cpu: SupportsIndex | None = None) -> None:
    """``state.sync`` for each range of the window; where the domain refuses one, the error for the first at the end."""
    state._check_alive("sync_many")
    on = state._on_cpu(cpu)  # before the ranges are looked at: what answers may change them
    starts, lengths = _inside("sync_many", state, offsets, sizes)
    with state.core.ledger.turn:
        state._check_alive("sync_many")
        failed = _each(state, starts, lengths, True, 0, 0, on)
        if failed:
            at, error = failed[0]
            raise link_error(state.core, error, 0, starts[at], lengths[at], 0, 0)


def unlink_many(
    state: IovaState,
    offsets: object,
    sizes: object,
    direction: SupportsIndex,
    attrs: SupportsIndex = 0,
    *,
    cpu: SupportsIndex | None = None,
) -> None:
    """``state.unlink`` for each range of the window, each flushed by itself; the window stays.

    A range that would cut what goes only as a whole stays linked: the error of ``unlink``, naming the first such item,
    when the others are gone.
    """
    state._check_alive("unlink_many")
    way, how, on = checked_direction(direction), checked_attrs(attrs), state._on_cpu(cpu)
    starts, lengths = _inside("unlink_many", state, offsets, sizes)
    first = 0
    gone: list[tuple[int, int]] = []
    with state.core.ledger.turn:
        state._check_alive("unlink_many")
        failed = _each(state, starts, lengths, False, way, how, on)
        for at in [*(at for at, _ in failed), len(starts)]:
            _runs(starts, lengths, first, at, gone)
            first = at + 1
        state._forget(gone)
        if failed:
            at, error = failed[0]
            what = f"unlink_many: item {at}: [{starts[at]:#x}, {starts[at] + lengths[at]:#x})"
            raise cut_error(state.core, what, -error)


def _each(
    state: IovaState, offsets: memoryview[int], sizes: memoryview[int], syncing: bool, way: int, how: int, on: int
) -> list[tuple[int, int]]:
    """``_window_run`` over all ranges, past those that fail: (item, −errno) of each of these."""
    failed: list[tuple[int, int]] = []
    at = int(_window_run(state, offsets, sizes, 0, syncing, way, how, on))
    while at < len(offsets):
        failed.append((at, int(state.core.error)))
        at = int(_window_run(state, offsets, sizes, at + 1, syncing, way, how, on))
    return failed


def _inside(call: str, state: IovaState, offsets: object, sizes: object) -> tuple[memoryview[int], memoryview[int]]:
    """Two arrays of ranges that lie in the state's window; MisuseError naming the first that does not."""
    starts, lengths = _pairs(offsets, sizes, "offsets")
    if state.core.unchecked:
        return starts, lengths
    at = int(_beyond(starts, lengths, state.size - 1))
    if at < len(starts):
        state._check_range(f"{call}: item {at}", starts[at], lengths[at])
    return starts, lengths


def map_many(
    device: Streaming,
    phys: object,
    sizes: object,
    out: object,
    direction: SupportsIndex,
    attrs: SupportsIndex = 0,
    *,
    cpu: SupportsIndex = 0,
) -> None:
    """``map_phys`` for each piece; the bus addresses go to ``out``."""
    way, how, on = checked_direction(direction), checked_attrs(attrs), checked_cpu(cpu, device.ledger.cpus)
    places, lengths = _pairs(phys, sizes, "phys")
    addresses = words("out", out, writable=True)
    if len(addresses) < len(places):
        raise MisuseError(f"out has {len(addresses)} items: needs {len(places)}")
    if way == DMA_NONE:
        raise MisuseError("map_many: Direction.NONE cannot be mapped")
    apart("out", addresses, phys=places, sizes=lengths)
    _check_ranges("map_many", places, lengths)
    with device.ledger.turn:
        done = int(_map_run(device, places, lengths, addresses, way, how, on))
        if done < len(places):
            error = map_error(device, places[done], lengths[done], how)
            _unmap_run(device, addresses, lengths, done, way, how, on)
            raise error


def unmap_many(
    device: Streaming,
    addresses: object,
    sizes: object,
    direction: SupportsIndex,
    attrs: SupportsIndex = 0,
    *,
    cpu: SupportsIndex = 0,
) -> None:
    """``unmap_phys`` for each piece of ``map_many``.

    Where nothing is mapped, MisuseError as from ``unmap_phys``, naming the first such item; the others are unmapped.
    """
    way, how, on = checked_direction(direction), checked_attrs(attrs), checked_cpu(cpu, device.ledger.cpus)
    places, lengths = _pairs(addresses, sizes, "addresses")
    _check_ranges("unmap_many", places, lengths)
    with device.ledger.turn:
        at = int(_unmap_run(device, places, lengths, len(places), way, how, on))
    if at < len(places):
        raise MisuseError(f"unmap_many: item {at}: nothing is mapped at {places[at]:#x}", rule="not-mapped")


def sync_many_for_cpu(device: Streaming, addresses: object, sizes: object, direction: SupportsIndex) -> None:
    """``sync_single_for_cpu`` for each range.

    Where nothing is mapped, MisuseError as from the scalar call, naming the first such item; the others are synced.
    """
    _sync_many("sync_many_for_cpu", device, addresses, sizes, direction, True)


def sync_many_for_device(device: Streaming, addresses: object, sizes: object, direction: SupportsIndex) -> None:
    """``sync_single_for_device`` for each range; errors as ``sync_many_for_cpu``."""
    _sync_many("sync_many_for_device", device, addresses, sizes, direction, False)


def _sync_many(
    call: str, device: Streaming, addresses: object, sizes: object, direction: SupportsIndex, for_cpu: bool
) -> None:
    way = checked_direction(direction)
    places, lengths = _pairs(addresses, sizes, "addresses")
    _check_ranges(call, places, lengths)
    with device.ledger.turn:
        at = int(_sync_run(device, places, lengths, way, for_cpu))
    if at < len(places):
        raise MisuseError(f"{call}: item {at}: nothing is mapped at {places[at]:#x}", rule="not-mapped")


def _check_ranges(call: str, starts: memoryview[int], sizes: memoryview[int]) -> None:
    """MisuseError, as from the scalar call, naming the first range that is empty or wraps around."""
    at = int(_beyond(starts, sizes, _ALL_ONES))
    if at < len(starts):
        checked_range(f"{call}: item {at}", starts[at], sizes[at])
