"""Flat arrays that grow."""

from __future__ import annotations

from array import array


def zeroed(kind: str, items: int) -> memoryview[int]:
    """``items`` zeros of the ``array`` type code ``kind``."""
    return memoryview(array(kind, (0,)) * items)


def widened(kind: str, old: memoryview[int], items: int) -> memoryview[int]:
    """A zeroed array of ``items`` items that begins with those of ``old`` (as many as fit)."""
    if items == len(old):
        return memoryview(bytearray(old)).cast(kind)  # type: ignore[call-overload, no-any-return]
    view = zeroed(kind, items)
    kept = min(len(old), items)
    view[:kept] = old[:kept]
    return view
