"""What a window's user linked: pieces (offset, size, direction, attrs), to undo them at the end of a ``with``."""

from __future__ import annotations

Piece = tuple[int, int, int, int]


def without(pieces: list[Piece], offset: int, size: int) -> list[Piece]:
    """The pieces less the bytes [offset, offset+size)."""
    kept: list[Piece] = []
    for start, length, direction, attrs in pieces:
        if start < offset:
            kept.append((start, min(length, offset - start), direction, attrs))
        if start + length > offset + size:
            begin = max(start, offset + size)
            kept.append((begin, start + length - begin, direction, attrs))
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
