"""Hostile values: what an argument must survive, whatever its parameter is. Lists are made anew (mutable)."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np


class Evil:
    """A number that raises when it is asked for its value."""

    def __index__(self) -> int:
        raise ValueError("evil index")

    def __repr__(self) -> str:
        return "Evil()"


class Buried:
    """A sequence that says it is longer than it is."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, at: int) -> tuple[int, int]:
        if at > 0:
            raise IndexError(at)
        return (4096, 4096)

    def __repr__(self) -> str:
        return "Buried()"


def numbers() -> list[Any]:
    """Integers at every edge, and what is no integer."""
    edges = [-1, 0, 1, 3, 4095, 4097, 1 << 31, 1 << 32, (1 << 48) - 4096, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096]
    wide = [(1 << 64) - 1, 1 << 64, (1 << 64) + 4096, 1 << 200, -(1 << 31), -(1 << 63), -(1 << 64), -(1 << 200)]
    return [*edges, *wide, 1.5, float("nan"), float("inf"), None, "x", b"x", [], Evil(), np.int64(-1), np.uint64(7)]


def sequences() -> list[Any]:
    """Lists of pairs, right and wrong."""
    pairs: list[Any] = [[], [1], [(1,)], [(1, 2, 3)], [None], [("a", 1)], [(-1, 4096)], [(0, 0)], [(4096, -1)]]
    pairs += [[((1 << 64) - 4096, 8192)], [(1 << 64, 4096)], [(4096, 1 << 200)], [(1.5, 2)], [(Evil(), 4096)]]
    pairs += [[(1 << 40, 1 << 63), (1 << 40, 1 << 63)], [(4096, 4096), (4096, 4096)], Buried(), 7, {"a": 1}, iter([])]
    return [*pairs, object()]


def buffers() -> list[Any]:
    """Buffers: wrong item, wrong shape, read-only, holes, released, too short, and words that are absurd."""
    released = memoryview(array("Q", [1]))
    released.release()
    good = array("Q", [4096, 8192, 12288, 16384])
    view = memoryview(good)
    odd: list[Any] = [b"", b"1234567", bytearray(8), bytearray(7), array("I", [1, 2]), array("d", [1.0])]
    odd += [array("q", [-1]), view.toreadonly(), view[::2], view[::-1], view[:0], released]
    odd += [memoryview(bytearray(64)).cast("B").cast("Q", (2, 4)), np.zeros((2, 2), np.uint64), np.zeros(4, ">u8")]
    odd += [np.zeros(8, np.uint64)[::2], np.array(5, np.uint64), array("Q"), array("Q", [0] * 4)]
    odd += [array("Q", [1 << 63] * 4), array("Q", [(1 << 64) - 1] * 4), array("Q", [4096] * 3)]
    return [*odd, array("Q", [1 << 40] * 64), [1, 2]]


def everything() -> list[Any]:
    """All of them."""
    return [*numbers(), *sequences(), *buffers()]


def shown(value: Any) -> str:
    """A text for reports that is the same in every process."""
    if isinstance(value, memoryview):
        try:
            return f"memoryview({value.format!r}, {value.shape}, {value.strides}, readonly={value.readonly})"
        except ValueError:
            return "memoryview(released)"
    if isinstance(value, (array, np.ndarray)):
        return " ".join(repr(value)[:80].split())
    if isinstance(value, (int, float, str, bytes, tuple, list, dict, type(None), Evil, Buried, np.generic)):
        return " ".join(repr(value)[:120].split())
    return f"<{type(value).__name__}>"
