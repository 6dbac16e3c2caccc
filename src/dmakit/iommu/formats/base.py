"""A page-table format: a table of integers, and the few functions that touch entries run by run.

The algorithm (``iommu.pagetable``) and the hardware walker (``iommu.unit``) know no format: they read these
integers. A format whose entries have the common shape (address in ``address_mask``, permissions and flags as
bits around it) is only numbers; one that encodes differently overrides the run functions. They are called once
for a run of entries inside one table page, never once per entry.

Vocabulary. Levels count from 1 (the table of 4 KiB leaves) to the root, ``min_levels`` to ``max_levels`` high.
Tables are 4 KiB pages of 512 eight-byte little-endian entries, 9 address bits a level: an entry of level ``l``
spans ``1 << (12 + 9 * (l - 1))`` bytes. An entry is *present* when any of ``present_bits`` is set; a present entry
above level 1 is a *leaf* when ``large_bit`` is set and a pointer to a table otherwise.

Models ``drivers/iommu/generic_pt/fmt/*.h``.
"""

from __future__ import annotations

import cython

from dmakit.errors import MisuseError, UnsupportedError

if not cython.compiled:
    from dmakit.consts import PAGE_SHIFT, PROT_READ, PROT_WRITE, PT_INDEX_BITS
    from dmakit.memory.physical import PhysicalMemory

SIZE_4K = 1 << 12
SIZE_2M = 1 << 21
SIZE_1G = 1 << 30
ALL_SIZES = SIZE_4K | SIZE_2M | SIZE_1G


@cython.cclass
class PtFormat:
    """The integers of one format; all public and read-only.

    ``present_bits`` any set = present; ``read_bit``/``write_bit`` permit the access (in every entry of the walk);
    ``table_bits`` go into an entry that points to a table, ``leaf_bits | leaf_read_bits | leaf_write_bits`` into a
    leaf (by protection); ``accessed_bit``/``dirty_bit`` are set by hardware; ``flushed_bit`` is the software bit
    that remembers, in a table entry, that the table was flushed for an incoherent walker. ``page_sizes`` is the
    bitmap of leaf sizes (bytes), ``output_bits`` the width of a physical address, ``sign_extended`` whether the
    usable aperture is only the lower half, ``dirty_tracking`` whether Linux tracks dirty pages with this format.
    """

    def __init__(self, name: str, *, page_sizes: int = ALL_SIZES, output_bits: int = 52) -> None:
        if page_sizes & ~ALL_SIZES or not page_sizes & SIZE_4K:
            raise MisuseError(
                f"page_sizes={page_sizes:#x}: must hold 0x1000 and at most 0x200000 and 0x40000000 beside it"
            )
        if not 32 <= output_bits <= 52:
            raise MisuseError(f"output_bits={output_bits}: a physical address has 32 to 52 bits")
        self.name = name
        self.page_sizes = page_sizes
        self.output_bits = output_bits
        self.min_levels = 3
        self.max_levels = 5
        self.sign_extended = False
        self.dirty_tracking = False
        self.address_mask = ((1 << 52) - 1) & ~(SIZE_4K - 1)
        self.present_bits = 1
        self.read_bit = 1
        self.write_bit = 2
        self.large_bit = 1 << 7
        self.accessed_bit = 0
        self.dirty_bit = 0
        self.flushed_bit = 0
        self.table_bits = 1
        self.leaf_bits = 0
        self.leaf_read_bits = 0
        self.leaf_write_bits = 0

    def check_levels(self, levels: int) -> None:
        """UnsupportedError unless tables of ``levels`` levels exist in this format."""
        if not self.min_levels <= levels <= self.max_levels:
            raise UnsupportedError(
                f"levels={levels}: {self.name} tables have {self.min_levels} to {self.max_levels} levels"
            )

    def aperture_last(self, levels: int) -> int:
        """The highest I/O virtual address (inclusive) that a table of ``levels`` levels translates."""
        self.check_levels(levels)
        return (1 << (PAGE_SHIFT + PT_INDEX_BITS * levels - int(self.sign_extended))) - 1

    def _leaf_bits(self, prot: cython.int) -> cython.ulonglong:
        """The bits of a leaf with protection ``prot`` (PROT_*), without ``large_bit``."""
        bits: cython.ulonglong = self.leaf_bits
        if prot & PROT_READ:
            bits |= self.leaf_read_bits
        if prot & PROT_WRITE:
            bits |= self.leaf_write_bits
        return bits

    def _prot(self, entry: cython.ulonglong) -> cython.int:
        """PROT_READ and PROT_WRITE as the entry grants them (0 when it is not present)."""
        prot: cython.int = 0
        if entry & self.present_bits:
            if entry & self.read_bit:
                prot |= PROT_READ
            if entry & self.write_bit:
                prot |= PROT_WRITE
        return prot

    def _is_leaf(self, entry: cython.ulonglong, level: cython.int) -> cython.bint:
        """Whether a present entry of a table of ``level`` is a leaf."""
        return level == 1 or (entry & self.large_bit) != 0

    def _fill(
        self,
        memory: PhysicalMemory,
        at: cython.ulonglong,
        count: cython.ulonglong,
        phys: cython.ulonglong,
        level: cython.int,
        bits: cython.ulonglong,
    ) -> cython.void:
        """Write ``count`` leaves of ``level`` from word index ``at``: pages from ``phys`` upwards, with ``bits``."""
        step: cython.ulonglong = 1
        step <<= PAGE_SHIFT + PT_INDEX_BITS * (level - 1)
        entry: cython.ulonglong = phys | bits
        if level > 1:
            entry |= self.large_bit
        if count == 1:
            memory.words[at] = entry
        else:
            memory._ascend(at, count, entry, step)
