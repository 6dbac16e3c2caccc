"""The first look at an argument of a public call: is it an ordinary integer?

Public methods ask ``exact`` for each number, and call their internal at once when every answer is in range. Anything
unusual (a negative or very large number, an object with ``__index__``, a wrong type) goes to the checks of
``dma.direction``, which accept it or say what is wrong: so an ordinary call costs no Python call for its checks, and
errors have one source.
"""

from __future__ import annotations

import cython

if cython.compiled:
    from cython.cimports.cpython.long import PyLong_AsLongLongAndOverflow


def exact(value: object) -> cython.longlong:
    """``value`` when it is an int (or one of an enum) from 0 to 2**63 − 1, else −1."""
    if not isinstance(value, int):
        return -1
    if cython.compiled:
        overflow: cython.int = 0
        number: cython.longlong = PyLong_AsLongLongAndOverflow(value, cython.address(overflow))
        return number if number >= 0 else -1
    return value if 0 <= value < 1 << 63 else -1
