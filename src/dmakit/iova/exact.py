"""Ordinary arguments at C speed: what the compiled public calls look at before they validate in Python terms.

* ``exact(value)``: the value of an ordinary ``int`` below 2**63; negative for anything else (a negative number, a
  larger one, another type). A caller that finds the answer in range takes it; any other goes to ``arguments.within``,
  which accepts it or raises, so that errors are made in one place and are the same in both forms.
* ``borrow(words, items, writable)``: the address and length of a contiguous buffer of 64-bit words, or false
  (``arguments.words`` then accepts or raises); ``give_back`` ends it. Compiled only: it fills a C struct.

* ``shares(one, other)``: whether two contiguous buffers have memory in common.

The compiled forms of the first two are the inline functions of ``exact.pxd``.
"""

# ruff: noqa: RET505 (Cython drops the branch that is not compiled only when it stands in an else)

from __future__ import annotations

import cython

if not cython.compiled:

    def exact(value: object) -> int:
        """``value`` when it is an ordinary int from 0 to 2**63 - 1, else -1."""
        return value if type(value) is int and 0 <= value < 1 << 63 else -1


def shares(one: object, other: object) -> bool:
    """Whether two contiguous buffers of 64-bit words have a word in common; no buffer shares with one of 0 words."""
    if cython.compiled:
        found: cython.bint = False
        first = cython.declare(Words)  # noqa: F821 (exact.pxd)
        second = cython.declare(Words)  # noqa: F821
        if borrow(cython.address(first), one, False):  # noqa: F821
            if borrow(cython.address(second), other, False):  # noqa: F821
                found = meet(first.at, first.n, second.at, second.n)  # noqa: F821
                give_back(cython.address(second))  # noqa: F821
            give_back(cython.address(first))  # noqa: F821
        return found
    else:
        import numpy as np

        try:
            views = [memoryview(given) for given in (one, other)]  # type: ignore[arg-type]
            flat = [np.frombuffer(view, np.uint64) for view in views if view.ndim == 1 and view.format in ("Q", "L")]
        except (TypeError, ValueError, BufferError):
            return False  # no contiguous buffer: refused by who looks at it
        return len(flat) == 2 and np.may_share_memory(flat[0], flat[1])
