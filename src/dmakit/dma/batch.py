"""Many pieces in one call: arrays in, arrays out, no Python object a piece.

``map_many`` and ``unmap_many`` are loops of ``map_phys`` and ``unmap_phys`` (one IOVA and one sync each); ``link_many``
links pieces one behind the other into a window. Mapping is all or nothing: what a failing call had done is undone
before it raises. Unmapping goes on past a piece that is not there, and says so at the end. Arrays are buffers of 64-bit
words (``array("Q")``, NumPy ``uint64``, memoryviews of them); ``out`` must not overlap the others. The contract checker
sees only the scalar calls.
"""

from __future__ import annotations

from typing import SupportsIndex

import cython

from dmakit.dma.direction import checked_attrs, checked_cpu, checked_direction, integer
from dmakit.dma.report import link_error, map_error
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
    cpu: SupportsIndex = 0,
) -> int:
    """``state.link`` for each piece, one behind the other from ``offset``; returns the bytes linked. No sync."""
    way, how, on = checked_direction(direction), checked_attrs(attrs), state._on_cpu(cpu)
    places, lengths = _pairs(phys, sizes, "phys")
    begin = integer(offset)  # before the sizes are looked at: what answers may change them
    known = int(_bytes(lengths, len(lengths)))
    at = offset if begin is None else begin
    start, total = state._check_range("link_many", at, known if known != _ALL_ONES else sum(lengths))
    done = int(_link_run(state, places, lengths, start, way, how, on))
    if done < len(places):
        error, linked = int(state.core.error), int(_bytes(lengths, done))
        if linked:
            state._note_piece(start, linked, way, how)
            state.unlink(start, linked, way, how, cpu=on)
        raise link_error(state.core, error, places[done], start + linked, lengths[done], way, how)
    state._note_piece(start, total, way, how)
    return total


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
    apart("out", addresses, phys=places, sizes=lengths)
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
    at = int(_unmap_run(device, places, lengths, len(places), way, how, on))
    if at < len(places):
        raise MisuseError(f"unmap_many: item {at}: nothing is mapped at {places[at]:#x}", rule="not-mapped")
