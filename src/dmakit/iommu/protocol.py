"""The Domain protocol: what the layers above need of an I/O address space, and what an implementation declares.

A domain maps I/O virtual addresses (IOVA) to physical ones. ``map`` writes translations without telling the hardware,
``sync_map`` tells it where that is needed, ``unmap`` removes translations into a gather, ``flush`` invalidates what a
gather holds. Callers unmap what they linked; what a domain cannot do it declares in its ``capabilities``, so that the
caller is refused with an UnsupportedError before anything changes.

The forms below take and return Python objects and raise. A domain that the compiled layers drive also has them as
typed internals (same names with an underscore) that return 0, -errno or bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


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


class Domain(Protocol):
    """An I/O address space. Addresses and sizes in bytes; ``aperture_end`` is the highest IOVA (inclusive)."""

    @property
    def granule(self) -> int: ...

    @property
    def page_sizes(self) -> int: ...

    @property
    def aperture_end(self) -> int: ...

    @property
    def reserved(self) -> Sequence[tuple[int, int]]: ...

    @property
    def capabilities(self) -> Capabilities: ...

    def map(self, iova: int, phys: int, size: int, prot: int, *, cpu: int = 0) -> None:
        """Translate [iova, iova + size) to phys; nothing is mapped when it raises."""
        ...

    def sync_map(self, iova: int, size: int, *, cpu: int = 0) -> None:
        """Make new translations of the range visible to the hardware."""
        ...

    def unmap(self, iova: int, size: int, *, cpu: int = 0) -> int:
        """Remove translations up to the first hole and invalidate; the bytes removed."""
        ...

    def flush_all(self, *, cpu: int = 0) -> None:
        """Invalidate everything that hardware caches of the domain."""
        ...

    def iova_to_phys(self, iova: int) -> int:
        """The physical address behind ``iova``, 0 when there is none."""
        ...

    def read_and_clear_dirty(self, iova: int, size: int, bitmap: object, *, page_size: int, flags: int = 0) -> int:
        """OR the dirty pages of the range into ``bitmap``; the number of dirty leaves."""
        ...
