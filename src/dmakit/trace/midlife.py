"""Whether a trace begins in the middle of a domain's life: it frees a range that it never saw allocated.

An allocation counts from its begin, a free at its end; at one moment frees come first. What happens behind the first
lost events says nothing. Ranges given are kept as bits, so that memory is bounded by the address space in use.
"""

from __future__ import annotations

import cython

_PAGE = 12  # bits of a pfn inside one bitmap


@cython.cclass
class MidLife:
    """``found``: the domains in question."""

    def __init__(self) -> None:
        self.found: set[int] = set()
        self.looking = True
        self.bits: dict[tuple[int, int], bytearray] = {}
        self.fresh: list[tuple[int, int]] = []
        self.fresh_at = -2

    def given(self, at: cython.longlong, iovad: cython.ulonglong, pfn: cython.ulonglong) -> None:
        """An allocation that got ``pfn`` began at the moment ``at``."""
        if self.looking:
            if at > self.fresh_at:
                self._settle()
                self.fresh_at = at
            self.fresh.append((iovad, pfn))

    def freed(self, at: cython.longlong, iovad: cython.ulonglong, pfn: cython.ulonglong) -> None:
        """A free of ``pfn`` ended at the moment ``at``."""
        if not self.looking or pfn == 0:
            return
        if at > self.fresh_at:
            self._settle()
        page = self.bits.get((iovad, pfn >> _PAGE))
        low: cython.int = pfn & ((1 << _PAGE) - 1)
        if page is None or not page[low >> 3] >> (low & 7) & 1:
            self.found.add(iovad)

    def stop(self) -> None:
        """Events were lost, or it is known that the trace begins at the beginning."""
        self.looking = False
        self.bits.clear()

    def _settle(self) -> None:
        low: cython.int
        for iovad, pfn in self.fresh:
            low = pfn & ((1 << _PAGE) - 1)
            page = self.bits.get((iovad, pfn >> _PAGE))
            if page is None:
                page = self.bits[iovad, pfn >> _PAGE] = bytearray(1 << _PAGE >> 3)
            page[low >> 3] |= 1 << (low & 7)
        self.fresh.clear()
