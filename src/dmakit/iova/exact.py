"""Ordinary arguments at C speed: what the compiled public calls look at before they validate in Python terms.

* ``exact(value)``: the value of an ordinary ``int`` below 2**63; negative for anything else (a negative number, a
  larger one, another type). A caller that finds the answer in range takes it; any other goes to ``arguments.within``,
  which accepts it or raises, so that errors are made in one place and are the same in both forms.
* ``borrow(words, items, writable)``: the address and length of a contiguous buffer of 64-bit words, or false
  (``arguments.words`` then accepts or raises); ``give_back`` ends it. Compiled only: it fills a C struct.

The compiled forms are the inline functions of ``exact.pxd``.
"""

from __future__ import annotations

import cython

if not cython.compiled:

    def exact(value: object) -> int:
        """``value`` when it is an ordinary int from 0 to 2**63 - 1, else -1."""
        return value if type(value) is int and 0 <= value < 1 << 63 else -1
