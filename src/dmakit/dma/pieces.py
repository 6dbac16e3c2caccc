"""What a window's user linked: pieces (offset, size, direction, attrs), to undo them at the end of a ``with``."""

from __future__ import annotations

from bisect import bisect_right
from operator import itemgetter

Piece = tuple[int, int, int, int]


def without(pieces: list[Piece], runs: list[tuple[int, int]]) -> list[Piece]:
    """The pieces less the bytes of ``runs``: (offset, size), in any order."""
    gaps: list[tuple[int, int]] = []
    for start, size in sorted(runs):
        end = start + size
        if gaps and start <= gaps[-1][1]:
            start, before = gaps.pop()
            end = max(before, end)
        gaps.append((start, end))
    kept: list[Piece] = []
    for start, length, direction, attrs in pieces:
        end = start + length
        at = bisect_right(gaps, start, key=itemgetter(1))  # the first gap that ends above start
        while at < len(gaps) and gaps[at][0] < end:
            if start < gaps[at][0]:
                kept.append((start, gaps[at][0] - start, direction, attrs))
            start = gaps[at][1]
            at += 1
        if start < end:
            kept.append((start, end - start, direction, attrs))
    return kept


def one_run(pieces: list[Piece]) -> Piece | None:
    """All pieces as one that begins at 0, when they leave no hole and share direction and attributes; else None."""
    end = 0
    kinds = {(direction, attrs) for _, _, direction, attrs in pieces} or {(0, 0)}
    for offset, size, _, _ in sorted(pieces):
        if offset != end:
            return None
        end = offset + size
    direction, attrs = kinds.pop()
    return None if kinds else (0, end, direction, attrs)
