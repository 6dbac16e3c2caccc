"""Registered memory: mapped once for both directions, as one window where the two-step API can, until it is released.

Requests on it compute addresses and map nothing. It needs a device that snoops, and memory that is not bounced: nothing
syncs it on each use.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

from dmakit.consts import L_BOUNCE_MAPS, PAGE_SIZE
from dmakit.dma.direction import Direction
from dmakit.errors import DmakitError, MisuseError, UnsupportedError


def shape_of(memory: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(pieces, pages that they touch) of (phys, length) pieces."""
    return len(memory), sum(-(-(phys + n) // PAGE_SIZE) - phys // PAGE_SIZE for phys, n in memory)


class Registration:
    """Memory that stays mapped: ``pieces`` are (phys, length, device address), sorted by phys; ``ranges`` are the
    (device address, length) in the order of the memory, neighbours joined."""

    def __init__(self, pieces: list[tuple[int, int, int]], undo: Callable[[], None]) -> None:
        self.pieces = sorted(pieces)
        self.ranges: list[tuple[int, int]] = []
        for _, length, addr in pieces:
            if self.ranges and sum(self.ranges[-1]) == addr:
                self.ranges[-1] = (self.ranges[-1][0], self.ranges[-1][1] + length)
            else:
                self.ranges.append((addr, length))
        self._undo: Callable[[], None] | None = undo

    def address(self, phys: int) -> int:
        """The device address of a byte of it; MisuseError outside."""
        at = bisect.bisect_right(self.pieces, (phys, 1 << 64, 0)) - 1
        if at >= 0 and phys < self.pieces[at][0] + self.pieces[at][1]:
            return self.pieces[at][2] + phys - self.pieces[at][0]
        raise MisuseError(f"memory at {phys:#x} is not part of this registration")

    def release(self) -> None:
        """Unmap (once)."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


def register(device: Any, pieces: Sequence[tuple[int, int]]) -> Registration:
    """Map memory (phys, length) for both directions until ``release``; one window when it has no gaps inside pages."""
    if not device.coherent:
        raise UnsupportedError("registered memory is not synced on each use: it needs a device that snoops")
    bounced = device.ledger.counts[L_BOUNCE_MAPS]
    inner = all(phys % PAGE_SIZE == 0 for phys, _ in pieces[1:]) and all(
        (p + n) % PAGE_SIZE == 0 for p, n in pieces[:-1]
    )
    size = sum(length for _, length in pieces)
    state = device.try_alloc(pieces[0][0], size) if inner and len(pieces) > 1 else None
    if state:
        found = _linked(state, pieces, size)
    else:
        found = _mapped(device, pieces)
    if device.ledger.counts[L_BOUNCE_MAPS] != bounced:
        found.release()
        raise UnsupportedError("registered memory is not synced on each use: it must not be bounced")
    return found


def _linked(state: Any, pieces: Sequence[tuple[int, int]], size: int) -> Registration:
    """One window."""
    done = 0
    placed: list[tuple[int, int, int]] = []
    try:
        for phys, length in pieces:
            state.link(phys, done, length, Direction.BIDIRECTIONAL)
            placed.append((phys, length, state.addr + done))
            done += length
        state.sync(0, size)
    except DmakitError:
        state.destroy(done, Direction.BIDIRECTIONAL)
        raise
    return Registration(placed, lambda: state.destroy(size, Direction.BIDIRECTIONAL))


def _mapped(device: Any, pieces: Sequence[tuple[int, int]]) -> Registration:
    """Piece by piece."""
    placed: list[tuple[int, int, int]] = []

    def undo() -> None:
        for _, length, addr in placed:
            device.unmap_phys(addr, length, Direction.BIDIRECTIONAL)

    try:
        for phys, length in pieces:
            placed.append((phys, length, device.map_phys(phys, length, Direction.BIDIRECTIONAL)))
    except DmakitError:
        undo()
        raise
    return Registration(list(placed), undo)
