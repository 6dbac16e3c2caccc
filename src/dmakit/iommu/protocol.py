"""What an I/O address space declares about itself, for the layers above (``iommu.space.Domain``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a domain can do.

    ``unmap_unit``: ``granule`` = any granule of a 4 KiB mapping can be unmapped alone, ``mapping`` = only what was
    mapped as one. ``deferred_flush``: an unmap may return before its invalidation (lazy mode). ``dirty``: it can track
    dirty pages. ``observes``: names of the ledger rows that it counts. ``cost_per_call``: what one call costs besides
    its work: nothing (``inline``), a system call (``syscall``) or a message to another process (``message``).
    """

    unmap_unit: Literal["granule", "mapping"]
    deferred_flush: bool
    dirty: bool
    observes: frozenset[str]
    cost_per_call: Literal["inline", "syscall", "message"]
