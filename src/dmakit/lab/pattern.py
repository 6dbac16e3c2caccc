"""The bytes that requests carry: different for every request, cheap to make and to check."""

from __future__ import annotations

import random

import numpy as np

_STRIDE = 4099
_WINDOW = 1 << 20


class Pattern:
    """A window that slides over fixed random bytes: request n gets the ``size`` bytes from a place of its own.

    That place is byte ``n * stride % window`` of ``bytes``; ``largest`` is the most that a request may ask for.
    """

    stride, window = _STRIDE, _WINDOW

    def __init__(self, largest: int, seed: int = 0) -> None:
        self.largest = largest
        self.bytes = memoryview(random.Random(seed).randbytes(largest + _WINDOW))

    def of(self, number: int, size: int) -> memoryview:
        """The payload of request ``number``."""
        start = number * _STRIDE % _WINDOW
        return self.bytes[start : start + size]


def count_wrong(expected: memoryview, found: bytes | bytearray) -> int:
    """How many bytes differ."""
    if bytes(expected) == found:
        return 0
    left, right = np.frombuffer(expected, np.uint8), np.frombuffer(found, np.uint8)
    if len(left) != len(right):
        return max(len(left), len(right))
    return int(np.count_nonzero(left != right))
