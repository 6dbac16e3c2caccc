"""x86-64: the CPU's own format, as VT-d first stage and AMD v2 guest tables use it for DMA.

==========  =========================================================================
bit         meaning
==========  =========================================================================
0 P         present; a present entry always permits reads
1 RW, 2 U   write permission; user (the IOMMU checks DMA as user accesses)
5 A, 6 D    accessed, dirty: hardware always maintains them in this format
7 PS        leaf at level 2 (2 MiB) or 3 (1 GiB)
11          software: the table this entry points to was flushed for an incoherent walker
51:12       address
63 XD       no-execute
==========  =========================================================================

Leaves are written with A, and D where they are writable, so hardware never has to set them; that is also why
this format cannot tell dirty pages apart. Table entries carry P, RW, U and A. Addresses are sign-extended: DMA
uses the lower half, 38, 47 or 56 bits for 3, 4 or 5 levels. Models ``drivers/iommu/generic_pt/fmt/x86_64.h``.
"""

from __future__ import annotations

import cython

if not cython.compiled:
    from dmakit.iommu.formats.base import PtFormat

from dmakit.iommu.formats.base import ALL_SIZES


@cython.cclass
class X86_64(PtFormat):
    """Options: ``page_sizes`` (2 MiB and 1 GiB leaves by capability), ``output_bits``."""

    def __init__(self, *, page_sizes: int = ALL_SIZES, output_bits: int = 52) -> None:
        super().__init__("x86_64", page_sizes=page_sizes, output_bits=output_bits)
        present, write, user, accessed, dirty = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6
        self.present_bits = present
        self.read_bit = present
        self.write_bit = write
        self.accessed_bit = accessed
        self.dirty_bit = dirty
        self.flushed_bit = 1 << 11
        self.table_bits = present | write | user | accessed
        self.leaf_bits = present | user | accessed
        self.leaf_write_bits = write | dirty
        self.sign_extended = True
