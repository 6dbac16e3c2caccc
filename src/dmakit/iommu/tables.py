"""Where table pages come from and when they go back.

A table is one zeroed page of RAM. A table that leaves a tree is not freed: it joins the freelist of the gather
(``_defer``), a chain through ``PhysicalMemory.page_link`` that leaves the page's bytes alone, because hardware may
walk it until its caches are invalidated. Whoever has flushed calls ``_free_list``.

Models ``drivers/iommu/iommu-pages.c``.
"""

from __future__ import annotations

from typing import SupportsIndex

import cython

from dmakit.errors import MisuseError
from dmakit.iova.arguments import within

if not cython.compiled:
    from dmakit.consts import L_TABLES_ALLOCATED, L_TABLES_FREED, PAGE_SHIFT, PAGE_SIZE
    from dmakit.iommu.gather import Gather
    from dmakit.ledger import Ledger
    from dmakit.memory.pages import PageAllocator


@cython.final
@cython.cclass
class TablePages:
    """Table pages of one machine; ``in_use`` counts those not yet freed, pages that wait on a freelist included.

    Memory may run out (the page allocator asks the machine's fail point).
    """

    def __init__(self, pages: PageAllocator, *, ledger: Ledger) -> None:
        self.pages = pages
        self.memory = pages.memory
        self.ledger = ledger
        self.in_use = 0

    def free_list(self, head: SupportsIndex) -> int:
        """Free a chain of table pages after its flush; returns how many there were. MisuseError, and nothing is freed,
        when something in the chain is no allocated page."""
        first = at = within("head", head, 0, (1 << 64) - 1)
        seen: set[int] = set()
        self.ledger._alone()
        while at:
            if at in seen or not self.pages.holds(at):
                raise MisuseError(f"head={first:#x}: the chain from there is not one of allocated pages")
            seen.add(at)
            at = self.memory.page_link[at >> PAGE_SHIFT]
        return int(self._free_list(first))

    def _new(self) -> cython.ulonglong:
        """Physical address of a zeroed table, or 0."""
        return self._new_around(0, 0)

    def _new_around(self, first: cython.ulonglong, size: cython.ulonglong) -> cython.ulonglong:
        """Physical address of a table that is zeroed but for ``size`` bytes from byte ``first``, or 0.

        The caller writes these before anything points to the table.
        """
        table: cython.ulonglong = self.pages._alloc(0)
        if table != 0:
            self.memory._zero(table, first)
            self.memory._zero(table + first + size, PAGE_SIZE - first - size)
            self.in_use += 1
            self.ledger.counts[L_TABLES_ALLOCATED] += 1
        return table

    def _defer(self, table: cython.ulonglong, gather: Gather) -> cython.void:
        """Put an unlinked table on the gather's freelist."""
        self.memory.page_link[table >> PAGE_SHIFT] = gather.freelist
        gather.freelist = table

    def _free_list(self, head: cython.ulonglong) -> cython.longlong:
        """Give every page of the chain back."""
        freed: cython.longlong = 0
        while head != 0:
            following: cython.ulonglong = self.memory.page_link[head >> PAGE_SHIFT]
            self.pages._free(head, 0)
            head = following
            freed += 1
        self.in_use -= freed
        self.ledger.counts[L_TABLES_FREED] += freed
        return freed
