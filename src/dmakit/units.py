"""Sizes: names for powers of two, and reading and writing them the way storage people do (``128k``, ``4M``)."""

from __future__ import annotations

import re

from dmakit.errors import InputError

PAGE = 4096
KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_SUFFIX = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB}
_SIZE = re.compile(r"(0x[0-9a-f]+|\d+)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of ``'4096'``, ``'128k'``, ``'2MiB'``; raises InputError naming the text when it is none."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{text!r} is not a size: write a number with an optional k, m, g or t (powers of 1024)")
    return int(match[1], 0) * _SUFFIX[match[2].lower()]


def format_size(count: int) -> str:
    """The shortest exact form: ``131072`` gives ``128K``, ``5000`` gives ``5000``."""
    for suffix, unit in (("T", TIB), ("G", GIB), ("M", MIB), ("K", KIB)):
        if count and count % unit == 0:
            return f"{count // unit}{suffix}"
    return str(count)
