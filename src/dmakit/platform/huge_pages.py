"""Which transparent huge pages this host gives to shared memory.

The RAM of a machine is a memory file, and its huge pages follow ``shmem_enabled``, not ``enabled`` (private memory). It
has a value for all sizes and, on newer kernels, one for each:

* all sizes: ``always``, ``within_size``, ``advise`` (what asked for it with madvise, as we do), ``never``; ``deny`` and
  ``force`` go over everything else.
* 2 MiB: the same words but the last two, or ``inherit`` (what all sizes say: the default).

madvise succeeds whatever they say. Models ``shmem_allowable_huge_orders`` in ``mm/shmem.c``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

THP = "sys/kernel/mm/transparent_hugepage"
_ALL, _SIZE = f"{THP}/shmem_enabled", f"{THP}/hugepages-2048kB/shmem_enabled"


class SharedHuge(NamedTuple):
    """``mode``: the word that decides, empty where there are no such pages; ``remedy``: how to make it give some."""

    mode: str
    remedy: str

    @property
    def given(self) -> bool:
        """Whether memory that asks for huge pages may get some."""
        return bool(self.mode) and not self.remedy


def shared_huge(read: Callable[[str], str | None]) -> SharedHuge:
    """What decides about 2 MiB pages of a memory file; ``read`` gives a file below / (None or empty: there is none)."""
    every, own = _chosen(read(_ALL)), _chosen(read(_SIZE)) or "inherit"
    if every in ("", "deny") or own == "inherit":
        return SharedHuge(every, f"echo advise > /{_ALL}" if every in ("never", "deny") else "")
    if every == "force":
        return SharedHuge(own, f"echo inherit > /{_SIZE}")
    return SharedHuge(own, f"echo advise > /{_SIZE}" if own == "never" else "")


def _chosen(text: str | None) -> str:
    """The word in brackets."""
    found = re.search(r"\[(\w+)\]", text or "")
    return found[1] if found else ""
