"""The first look at the arguments of a public call: ordinary integers, ordinary arrays?

Public methods ask ``exact`` for each number, and call their internal at once when every answer is in range. Anything
unusual (a negative or very large number, an object with ``__index__``, a wrong type) goes to the checks of
``dma.direction``, which accept it or say what is wrong: so an ordinary call costs no Python call for its checks, and
errors have one source. ``Words`` does the same for arrays of 64-bit words: the unusual ones go to ``iova.arguments``.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

import cython

from dmakit.dma.direction import Attrs
from dmakit.iova.arguments import words

if cython.compiled:
    from cython.cimports.cpython.buffer import (
        PyBUF_FORMAT,
        PyBUF_ND,
        PyBUF_WRITABLE,
        PyBuffer_Release,
        PyObject_GetBuffer,
    )
    from cython.cimports.cpython.long import PyLong_AsLongLongAndOverflow

_ALL_ATTRS = int(reduce(or_, Attrs))
_Q = ord("Q")
_L = ord("L")


def exact(value: object) -> cython.longlong:
    """``value`` when it is an int (or one of an enum) from 0 to 2**63 − 1, else −1."""
    if not isinstance(value, int):
        return -1
    if cython.compiled:
        overflow: cython.int = 0
        number: cython.longlong = PyLong_AsLongLongAndOverflow(value, cython.address(overflow))
        return number if number >= 0 else -1
    return value if 0 <= value < 1 << 63 else -1


def known(direction: cython.longlong, attrs: cython.longlong) -> cython.bint:
    """Whether these are a direction and known attributes."""
    return 0 <= direction <= 3 and attrs >= 0 and attrs & ~_ALL_ATTRS == 0


@cython.freelist(8)
@cython.cclass
class Words:
    """An array of 64-bit words of a caller: ``items`` (``count`` of them), held until this object goes."""

    def __init__(self) -> None:
        if not cython.compiled:
            self.items: memoryview[int] = memoryview(bytearray()).cast("Q")
            self.count = 0

    def __dealloc__(self) -> None:
        self._drop()

    def _take(self, given: object, writable: cython.bint) -> cython.bint:
        """Hold ``given``; false when it is not a contiguous buffer of words."""
        if cython.compiled:
            self._drop()
            try:
                PyObject_GetBuffer(
                    given, cython.address(self.view), PyBUF_ND | PyBUF_FORMAT | (PyBUF_WRITABLE if writable else 0)
                )
            except Exception:
                return False
            self.held = True
            if self.view.ndim != 1 or self.view.itemsize != 8 or self.view.format == cython.NULL:
                return False
            if (self.view.format[0] != _Q and self.view.format[0] != _L) or self.view.format[1] != 0:
                return False
            self.items = cython.cast("unsigned long long*", self.view.buf)
            self.count = self.view.len >> 3
            return True
        return False

    def _drop(self) -> cython.void:
        if cython.compiled and self.held:
            PyBuffer_Release(cython.address(self.view))
            self.held = False


def taken(name: str, given: object, writable: cython.bint) -> Words:
    """``given`` as words; MisuseError naming it when it is no contiguous (writable) buffer of them."""
    found: Words = Words.__new__(Words) if cython.compiled else Words()
    if not found._take(given, writable):
        view = words(name, given, writable=writable)
        if cython.compiled:
            found._take(view, writable)
        else:
            found.items, found.count = view, len(view)
    return found
