"""Flat storage of the trace room."""

from __future__ import annotations

from array import array


def longs(items: int) -> memoryview[int]:
    """``items`` zeroed 64-bit words."""
    return memoryview(array("Q", bytes(8 * items)))
