"""Flat storage of the trace room."""

from __future__ import annotations

from array import array
from typing import Any, cast

import numpy.typing as npt


def longs(items: int) -> memoryview[int]:
    """``items`` zeroed 64-bit words."""
    return memoryview(array("Q", bytes(8 * items)))


def flat(words: npt.NDArray[Any]) -> memoryview[int]:
    """An array of 64-bit integers as the view that compiled and interpreted code index alike."""
    return memoryview(cast(Any, words))
