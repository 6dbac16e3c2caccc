"""Known defects of Linux's mapping code that can be switched on, by name or by kernel version.

dmakit does the right thing by default. A ``Defect`` names one place where a Linux release does not, so that a
recorded kernel can be reproduced step by step and so that a checker has something real to catch. A switch is
given as a defect's name (``partial-destroy-frees-wrong-size``) or as a version (``7.2``: every defect that this
version has). Numbers are those of the list in docs/fidelity.md.

Sources: ``drivers/iommu/dma-iommu.c``, ``drivers/iommu/iommu.c``, ``kernel/dma/direct.c``,
``drivers/dma-buf/dma-buf-mapping.c``, ``net/core/tso.c``, ``drivers/iommu/generic_pt/iommu_pt.h``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dmakit.errors import InputError

PARTIAL_DESTROY = 1 << 0
ZERO_MIDDLE = 1 << 1
UNWIND_FROM_ZERO = 1 << 2
FAILED_MAP_REPORTED_AS_SUCCESS = 1 << 3
DIRECT_SG_HOST_BRIDGE = 1 << 4
SG_BUS_LENGTH_OF_HEAD = 1 << 5
DMABUF_LINKS_AT_ZERO = 1 << 6
TSO_UNALIGNED_LINKS = 1 << 7
SLOTS_FREED_BEFORE_UNMAP = 1 << 8
UNLINK_CUTS_LEAF = 1 << 9


@dataclass(frozen=True, slots=True)
class Defect:
    """One defect: its bit, number in the list, switch name, the versions that have it, and what happens."""

    bit: int
    number: str
    name: str
    versions: tuple[str, ...]
    text: str
    instead: str


DEFECTS: tuple[Defect, ...] = (
    Defect(
        PARTIAL_DESTROY,
        "1",
        "partial-destroy-frees-wrong-size",
        ("6.16", "6.17", "6.18", "7.0", "7.1", "7.2"),
        "dma_iova_destroy with mapped_len < size frees an IOVA of mapped_len: up to 32 granules it enters the cache of "
        "a smaller order and the rest of the window is lost",
        "the whole window is freed, as the kernel-doc says",
    ),
    Defect(
        ZERO_MIDDLE,
        "2",
        "bounce-links-empty-middle",
        ("6.16", "6.17", "6.18", "7.0", "7.1"),
        "a bounced piece without a whole granule in its middle still links a middle of size 0, which the page table "
        "refuses with -EINVAL",
        "an empty middle is not linked",
    ),
    Defect(
        UNWIND_FROM_ZERO,
        "3",
        "bounce-unwind-from-zero",
        ("6.16", "6.17", "6.18", "7.0", "7.1"),
        "when the tail of a bounced piece cannot be linked, the unwind removes [0, mapped) instead of "
        "[offset, offset + mapped): earlier pieces are lost and this one stays",
        "exactly what this call linked is removed",
    ),
    Defect(
        FAILED_MAP_REPORTED_AS_SUCCESS,
        "4",
        "failed-map-reported-as-success",
        ("7.1",),
        "iommu_map_nosync reports a failed map as success (page-table formats outside generic_pt)",
        "a failed map is rolled back and reported",
    ),
    Defect(
        DIRECT_SG_HOST_BRIDGE,
        "5a",
        "direct-sg-host-bridge-without-address",
        ("6.16", "6.17", "6.18", "7.0", "7.1"),
        "dma_direct_map_sg leaves the address of a peer-to-peer entry through a host bridge unset",
        "the entry gets its address",
    ),
    Defect(
        SG_BUS_LENGTH_OF_HEAD,
        "5b",
        "sg-bus-entry-length-of-head",
        ("6.16", "6.17", "6.18", "7.0", "7.1"),
        "iommu_dma_map_sg gives a bus-address entry the length of the list's first entry",
        "each entry keeps its own length",
    ),
    Defect(
        DMABUF_LINKS_AT_ZERO,
        "6",
        "dmabuf-links-at-zero",
        ("6.19", "7.0", "7.1", "7.2"),
        "dma_buf_phys_vec_to_sgt links every range at offset 0, so a second range collides (-EADDRINUSE)",
        "each range is linked behind the one before (Device.map_ranges)",
    ),
    Defect(
        TSO_UNALIGNED_LINKS,
        "7",
        "tso-links-unaligned-pieces",
        ("7.1", "7.2"),
        "net/core/tso.c links fragments at arbitrary offsets: the start rule answers -EIO with a warning and the "
        "caller falls back",
        "a caller asks first whether its pieces meet on granules (Device.map_ranges)",
    ),
    Defect(
        SLOTS_FREED_BEFORE_UNMAP,
        "8",
        "unlink-frees-slots-before-unmap",
        ("6.16", "6.17", "6.18", "7.0", "7.1", "7.2"),
        "unlink and destroy copy back and release bounce slots before the entries are cleared: the device can still "
        "write a slot that is already somebody else's",
        "entries are cleared and flushed first, then slots are copied back and released",
    ),
    Defect(
        UNLINK_CUTS_LEAF,
        "9",
        "unlink-cuts-large-leaf",
        ("7.0", "7.1", "7.2"),
        "an unlink that starts inside a large leaf removes nothing (the device keeps access), one that ends inside "
        "removes the whole leaf (neighbouring linked memory is lost)",
        "refused with -EINVAL before anything changes",
    ),
)

BY_NAME: dict[str, Defect] = {defect.name: defect for defect in DEFECTS}
VERSIONS: tuple[str, ...] = tuple(sorted({version for defect in DEFECTS for version in defect.versions}))


def defects_of(names: Iterable[str] | str) -> tuple[Defect, ...]:
    """The defects that ``names`` (switch names or kernel versions) turn on, in the order of the list."""
    wanted: set[str] = set()
    for name in (names,) if isinstance(names, str) else names:
        if name in BY_NAME:
            wanted.add(name)
        elif name in VERSIONS:
            wanted |= {defect.name for defect in DEFECTS if name in defect.versions}
        else:
            known = ", ".join((*BY_NAME, *VERSIONS))
            raise InputError(f"defect {name!r} is not known; a name or a kernel version of: {known}")
    return tuple(defect for defect in DEFECTS if defect.name in wanted)


def defect_bits(names: Iterable[str] | str) -> int:
    """The bits of ``defects_of(names)`` for hot code."""
    bits = 0
    for defect in defects_of(names):
        bits |= defect.bit
    return bits
