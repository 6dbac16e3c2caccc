"""Checks of the public calls' arguments: the same error interpreted and compiled.

Public methods of compiled classes annotate numbers as ``SupportsIndex`` and texts as ``Text``: Cython turns a plain
``int`` or ``str`` annotation into a check of its own, with an error that the interpreted form does not raise.
"""

from __future__ import annotations

from operator import index
from typing import Any, SupportsIndex, TypeAlias

from dmakit.errors import MisuseError
from dmakit.iova.exact import shares

Text: TypeAlias = str


def within(name: str, value: SupportsIndex, low: int, high: int) -> int:
    """``value`` as an int, checked to lie in [low, high]."""
    try:
        number = index(value)
    except TypeError:
        raise MisuseError(f"{name}={value!r}: must be an integer") from None
    if not low <= number <= high:
        raise MisuseError(f"{name}={number}: must be from {low} to {high}")
    return number


def words(name: str, items: object, *, writable: bool = False) -> memoryview[int]:
    """``items`` as a flat view of 64-bit words; MisuseError when it is no contiguous buffer of them."""
    try:
        view = memoryview(items)  # type: ignore[arg-type]
        if view.ndim != 1 or view.itemsize != 8 or view.format not in ("Q", "L"):
            raise TypeError
        flat = view.cast("B").cast("Q") if len(view) else memoryview(bytearray()).cast("Q")
    except (TypeError, ValueError, BufferError):
        raise MisuseError(f"{name}: must be a contiguous buffer of unsigned 64-bit words") from None
    if writable and view.readonly:
        raise MisuseError(f"{name}: must be writable")
    return flat


def apart(name: str, written: object, **others: object) -> None:
    """MisuseError when ``written``, the array that a call fills, has memory in common with one of ``others``.

    The rule of every batch call: what it writes must not overlap another of its arrays; what it only reads may.
    """
    for other, items in others.items():
        if shares(written, items):
            raise MisuseError(f"{name}: is written, and must not overlap {other}")


def pairs(name: str, items: object) -> list[tuple[Any, Any]]:
    """``items`` as a list of pairs; MisuseError when it is no iterable of them. The numbers are not looked at."""
    try:
        return [(first, second) for first, second in items]  # type: ignore[attr-defined]
    except (TypeError, ValueError, LookupError, NotImplementedError):
        raise MisuseError(f"{name}: must be a sequence of pairs of numbers") from None
