"""No half-made objects in the compiled core: ``Cls.__new__(Cls)`` is refused there.

A compiled class sets its C fields in ``__init__``. An object that went through ``__new__`` alone has null pointers for
arrays and None for its parts, and its typed methods would follow them. Python never needs that way to make one: a call
of the class goes through the type's slot, not through the attribute ``__new__``. So the attribute is taken out of each
compiled class when its module has been loaded; what is found then is ``object.__new__``, which refuses such a class
with a TypeError. Interpreted classes need no care: a missing attribute is an AttributeError.
"""

from __future__ import annotations

import cython

if cython.compiled:
    from cython.cimports.dmakit._seal import _without_new


def _seal(owner: object) -> None:
    """Take ``__new__`` out of a compiled class; others are left alone."""
    if cython.compiled and isinstance(owner, type):
        _without_new(owner)
