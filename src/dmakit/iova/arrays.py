"""Flat arrays that grow."""

from __future__ import annotations

from array import array


def zeroed(kind: str, items: int) -> memoryview[int]:
    """``items`` zeros of the ``array`` type code ``kind``."""
    return memoryview(array(kind, bytes(array(kind).itemsize * items)))


def widened(kind: str, old: memoryview[int], items: int) -> memoryview[int]:
    """A zeroed array of ``items`` items that begins with those of ``old``."""
    view = zeroed(kind, items)
    view[: len(old)] = old
    return view
