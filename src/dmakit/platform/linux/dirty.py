"""Dirty pages as a host reports them, gathered into the caller's bitmap.

A host answers for one mapped range at a time, in pages of 4 KiB, into a bitmap of its own words; what it reports is
OR-ed into the caller's bitmap at the caller's page size. Bits are counted from the first page of the request, little
endian, 64 to a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from dmakit.consts import PAGE_SIZE
from dmakit.units import GIB

STEP = GIB
Ask = Callable[[int, int, Any], None]


def gather(parts: Iterable[tuple[int, int]], first: int, size: int, bitmap: Any, unit: int, ask: Ask) -> int:
    """Ask for each (iova, size) of ``parts`` and OR the answers into ``bitmap``; how many bits were 0 before.

    ``ask(iova, size, words)`` ORs the dirty 4 KiB pages of a range into ``words`` (uint64, zero before).
    """
    target = np.frombuffer(bitmap, np.uint64)
    fresh = 0
    for iova, length in parts:
        for at in range(iova, iova + length, STEP):
            part = min(STEP, iova + length - at)
            words = np.zeros(-(-part // (PAGE_SIZE * 64)), np.uint64)
            ask(at, part, words)
            pages = np.nonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))[0]
            fresh += _merge(target, np.unique((pages * PAGE_SIZE + at - first) // unit))
    return fresh


def _merge(target: Any, bits: Any) -> int:
    """Set ``bits`` in ``target``; how many were 0 before."""
    words, masks = bits >> 6, np.uint64(1) << (bits & 63).astype(np.uint64)
    fresh = int(np.count_nonzero(target[words] & masks == 0))
    np.bitwise_or.at(target, words, masks)
    return fresh
