"""The hardware page walker: reads real table entries out of memory, level by level, as the IOMMU would.

It knows no format by name. When a domain is attached its format's integers (``formats.base.PtFormat``) are copied
into the domain's *context*, CTX_WORDS 64-bit words in one flat array indexed by domain id, which stands for the
context or PASID entry that hardware reads. A walk goes from the deepest paging-structure entry (or the root) to a
leaf; permissions are the conjunction of all levels; a table that lies outside memory, a leaf where none may be and an
address bit below a large page's size are faults of their own, so that garbage in a reused table page is met as
hardware meets it.

*Accessed and dirty bits.* Where the context says so (first stage: always; second stage: while dirty tracking is on)
the walker sets A in every entry that it uses and D in the leaf of a write. It does so on a walk only: an IOTLB entry
made by a write does not touch the table again until it is invalidated, hence the flush after
``read_and_clear_dirty``.

Answer: a translation word (``consts.TR_*``), or a FAULT_* reason when its level bits are 0, with TR_ABSENT when an
entry was not present. Source: VT-d specification 3.6, 3.7, 9.
"""

from __future__ import annotations

from array import array
from typing import SupportsIndex

import cython

from dmakit.errors import MisuseError
from dmakit.iova.arguments import within

if not cython.compiled:
    from dmakit.consts import (
        CTX_ACCESSED,
        CTX_ACCESSED_BIT,
        CTX_ADDRESS,
        CTX_DIRTY,
        CTX_DIRTY_BIT,
        CTX_FIRST_STAGE,
        CTX_FLAGS,
        CTX_LEAF,
        CTX_LEVELS,
        CTX_NP_CACHE,
        CTX_PRESENT,
        CTX_READ,
        CTX_ROOT,
        CTX_WIDTH,
        CTX_WORDS,
        CTX_WRITE,
        FAULT_READ,
        FAULT_RESERVED,
        FAULT_TABLE,
        FAULT_WRITE,
        L_PSC_HITS,
        L_WALK_READS,
        PAGE_SIZE,
        TR_ABSENT,
        TR_DIRTY,
        TR_LEVEL_MASK,
        TR_LEVEL_SHIFT,
        TR_READ,
        TR_WRITE,
    )
    from dmakit.iommu.formats.base import PtFormat
    from dmakit.iommu.psc import PagingStructureCache
    from dmakit.ledger import Ledger
    from dmakit.memory.physical import PhysicalMemory


@cython.final
@cython.cclass
class Walker:
    """Walks the tables of up to ``domains`` domain ids in ``memory``."""

    def __init__(self, memory: PhysicalMemory, psc: PagingStructureCache, ledger: Ledger, domains: int) -> None:
        self.memory = memory
        self.psc = psc
        self.ledger = ledger
        self.domains = domains = within("domains", domains, 1, 65536)
        self.contexts = memoryview(array("Q", bytes(8 * CTX_WORDS * domains)))

    def set_context(self, did: SupportsIndex, fmt: PtFormat, root: int, levels: int, caching_mode: bool) -> None:
        """Write the context of ``did``: a table of ``levels`` levels in format ``fmt`` at ``root``."""
        did = within("did", did, 0, self.domains - 1)
        width = int(fmt.aperture_last(levels)).bit_length()
        self.check_root(root)
        context = self.contexts[did * CTX_WORDS : (did + 1) * CTX_WORDS]
        context[CTX_ROOT] = root
        context[CTX_WIDTH] = width
        context[CTX_PRESENT] = fmt.present_bits
        context[CTX_READ] = fmt.read_bit
        context[CTX_WRITE] = fmt.write_bit
        context[CTX_LEAF] = fmt.large_bit
        context[CTX_ADDRESS] = fmt.address_mask
        context[CTX_ACCESSED_BIT] = fmt.accessed_bit
        context[CTX_DIRTY_BIT] = fmt.dirty_bit
        first_stage = bool(fmt.sign_extended)  # the lower-half aperture is what tells a first stage from a second
        context[CTX_FLAGS] = CTX_FIRST_STAGE if first_stage else (CTX_NP_CACHE if caching_mode else 0)
        context[CTX_LEVELS] = levels
        self._set_dirty(did, first_stage)

    def check_root(self, root: int) -> None:
        """MisuseError unless ``root`` is a page of memory."""
        if root % PAGE_SIZE or not 0 < root < self.memory.span:
            raise MisuseError(f"root={root:#x}: must be a page inside {self.memory.span:#x} bytes of memory")

    def clear_context(self, did: SupportsIndex) -> None:
        """Make the context of ``did`` not present."""
        did = within("did", did, 0, self.domains - 1)
        for word in range(did * CTX_WORDS, (did + 1) * CTX_WORDS):
            self.contexts[word] = 0

    def _set_dirty(self, did: cython.int, on: cython.bint) -> cython.void:
        """Let walks of the domain set accessed and dirty bits, or not."""
        base: cython.Py_ssize_t = did * CTX_WORDS
        self.contexts[base + CTX_ACCESSED] = self.contexts[base + CTX_ACCESSED_BIT] if on else 0
        self.contexts[base + CTX_DIRTY] = self.contexts[base + CTX_DIRTY_BIT] if on else 0

    def _walk(self, did: cython.int, iova: cython.ulonglong, write: cython.bint) -> cython.ulonglong:
        """Translate ``iova`` (inside the domain's width) by the tables of an attached domain."""
        base: cython.Py_ssize_t = did * CTX_WORDS
        level: cython.int = self.contexts[base + CTX_LEVELS]
        table: cython.ulonglong = self.contexts[base + CTX_ROOT]
        permissions: cython.ulonglong = TR_READ | TR_WRITE
        at: cython.Py_ssize_t
        entry: cython.ulonglong
        known: cython.ulonglong = self.psc._deepest(did, iova, level)
        if known != 0:
            self.ledger.counts[L_PSC_HITS] += 1
            level = (known & TR_LEVEL_MASK) >> TR_LEVEL_SHIFT
            table = known >> 12 << 12
            permissions = known & (TR_READ | TR_WRITE)
        while True:
            at = (table >> 3) + ((iova >> (3 + 9 * level)) & 511)
            entry = self.memory.words[at]
            self.ledger.counts[L_WALK_READS] += 1
            if entry & self.contexts[base + CTX_PRESENT] == 0:
                return (FAULT_WRITE if write else FAULT_READ) | TR_ABSENT
            if entry & self.contexts[base + CTX_READ] == 0:
                permissions &= TR_WRITE
            if entry & self.contexts[base + CTX_WRITE] == 0:
                permissions &= TR_READ
            if level == 1 or entry & self.contexts[base + CTX_LEAF] != 0:
                return self._leaf(base, at, level, permissions, write)
            self.memory.words[at] = entry | self.contexts[base + CTX_ACCESSED]
            table = entry & self.contexts[base + CTX_ADDRESS]
            if table > self.memory.span - PAGE_SIZE:
                return FAULT_TABLE
            self.psc._remember(did, level, iova, table, permissions)
            level -= 1

    def _leaf(
        self,
        base: cython.Py_ssize_t,
        at: cython.Py_ssize_t,
        level: cython.int,
        permissions: cython.ulonglong,
        write: cython.bint,
    ) -> cython.ulonglong:
        """The translation word of the leaf at word index ``at``: checks it and sets its A and D bits."""
        entry: cython.ulonglong = self.memory.words[at]
        phys: cython.ulonglong = entry & self.contexts[base + CTX_ADDRESS]
        size: cython.ulonglong = 1
        size <<= 3 + 9 * level
        if level > 3 or phys & (size - 1) != 0:
            return FAULT_RESERVED
        if write and permissions & TR_WRITE == 0:
            return FAULT_WRITE
        if not write and permissions & TR_READ == 0:
            return FAULT_READ
        dirty: cython.ulonglong = self.contexts[base + CTX_DIRTY]
        entry |= self.contexts[base + CTX_ACCESSED]
        if write:
            entry |= dirty
        self.memory.words[at] = entry
        if dirty == 0 or entry & dirty != 0:
            permissions |= TR_DIRTY
        leaf: cython.ulonglong = level
        return phys | leaf << TR_LEVEL_SHIFT | permissions
