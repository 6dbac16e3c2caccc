"""VT-d second stage ("vtdss"): the format of ordinary Intel DMA domains in legacy mode and of dirty tracking.

========  ============================================================================================
bit       meaning
========  ============================================================================================
0 R, 1 W  read, write permission; there is no present bit: an entry is present when R or W is set
7 PS      leaf at level 2 (2 MiB) or 3 (1 GiB)
8 A, 9 D  accessed, dirty: set by hardware only where second-stage A/D (SSADS) is switched on
10        software: the table this entry points to was flushed for an incoherent page walker
11 SNP    snoop, set in leaves of a domain that forces coherent access
51:12     address
========  ============================================================================================

Table entries carry R and W. 3, 4 and 5 levels translate 39, 48 and 57 address bits, the whole unsigned range.
MMIO leaves no trace in an entry. Models ``drivers/iommu/generic_pt/fmt/vtdss.h``.
"""

from __future__ import annotations

import cython

if not cython.compiled:
    from dmakit.iommu.formats.base import PtFormat

from dmakit.iommu.formats.base import ALL_SIZES


@cython.cclass
class VtdSecondStage(PtFormat):
    """Options: ``page_sizes`` (large-page capability), ``output_bits``, ``force_snoop`` (bit 11 in leaves)."""

    def __init__(self, *, page_sizes: int = ALL_SIZES, output_bits: int = 52, force_snoop: bool = False) -> None:
        super().__init__("vtdss", page_sizes=page_sizes, output_bits=output_bits)
        read, write, snoop = 1 << 0, 1 << 1, 1 << 11
        self.present_bits = read | write
        self.read_bit = read
        self.write_bit = write
        self.accessed_bit = 1 << 8
        self.dirty_bit = 1 << 9
        self.flushed_bit = 1 << 10
        self.table_bits = read | write
        self.leaf_bits = snoop if force_snoop else 0
        self.leaf_read_bits = read
        self.leaf_write_bits = write
        self.dirty_tracking = True
