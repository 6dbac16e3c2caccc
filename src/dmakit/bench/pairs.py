"""Rounds of one batch of allocations and one of frees, as a program in C would do them: no Python between, no GIL.

What the thread rows measure: called from Python, batches of 64 take the GIL twice a call, and threads then measure how
CPython hands it over. ``thread_rows`` has both. Arguments are not checked, hence the underscores.
"""

from __future__ import annotations

import cython

if not cython.compiled:
    from dmakit.iova.allocator import IovaAllocator
    from dmakit.iova.shared import SharedDomain


def _alone_unchecked(
    domain: IovaAllocator, sizes: memoryview[int], pfns: memoryview[int], top: int, rounds: int
) -> None:
    """``rounds`` rounds on CPU 0 of a domain without locks; ``sizes`` in granules, ``pfns`` is written."""
    _alone(domain, sizes, pfns, top, rounds)


def _shared_unchecked(
    domain: SharedDomain, cpu: int, sizes: memoryview[int], pfns: memoryview[int], top: int, rounds: int
) -> None:
    """``rounds`` rounds on ``cpu`` of a domain with locks; threads with arrays of their own run side by side."""
    _shared(domain, cpu, sizes, pfns, top, rounds)


def _alone(
    domain: IovaAllocator,
    sizes: memoryview[int],
    pfns: memoryview[int],
    top: cython.ulonglong,
    rounds: cython.Py_ssize_t,
) -> cython.void:
    n: cython.Py_ssize_t = len(sizes)
    if cython.compiled:
        with cython.nogil:
            for _ in range(rounds):
                domain._alloc_many(0, cython.address(sizes[0]), n, top, True, cython.address(pfns[0]))
                domain._free_many(0, cython.address(pfns[0]), cython.address(sizes[0]), n)
        return
    for _ in range(rounds):
        domain._alloc_many(0, sizes, n, top, True, pfns)
        domain._free_many(0, pfns, sizes, n)


def _shared(
    domain: SharedDomain,
    cpu: cython.int,
    sizes: memoryview[int],
    pfns: memoryview[int],
    top: cython.ulonglong,
    rounds: cython.Py_ssize_t,
) -> cython.void:
    n: cython.Py_ssize_t = len(sizes)
    if cython.compiled:
        with cython.nogil:
            for _ in range(rounds):
                domain._alloc_many(cpu, cython.address(sizes[0]), n, top, True, cython.address(pfns[0]))
                domain._free_many(cpu, cython.address(pfns[0]), cython.address(sizes[0]), n)
        return
    for _ in range(rounds):
        domain._alloc_many(cpu, sizes, n, top, True, pfns)
        domain._free_many(cpu, pfns, sizes, n)
