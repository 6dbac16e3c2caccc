"""What a queue's hardware can take: ``struct queue_limits``, in bytes.

A driver fills the limits once; the split code (``block.bio``) cuts every bio to them, and the segment iterator
(``block.request``) merges neighbours within them. The limits that matter to DMA mapping:

* ``max_bytes``: the largest request. Linux starts from the device's own limit and caps it with
  ``dma_opt_mapping_size()``, which behind an IOMMU is what the IOVA caches hold (128 KiB): larger requests
  would search the red-black tree under its lock.
* ``max_segment_size`` and ``seg_boundary_mask``: no segment is longer, none crosses such a boundary.
* ``virt_boundary_mask``: neighbours must meet on this boundary; a bio that has a gap there is split. PRP lists
  need it (4095); controllers with SGLs do not.
* ``dma_alignment``: a mask; segments must start on it.

Models ``include/linux/blkdev.h`` and ``drivers/nvme/host/core.c`` (``nvme_set_ctrl_limits``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dmakit.errors import MisuseError

SECTOR_SHIFT = 9
SECTOR_SIZE = 512
UNLIMITED = (1 << 32) - 1
NO_BOUNDARY = (1 << 63) - 1  # wider than any address a machine has

NVME_CTRL_PAGE_SIZE = 4096
NVME_MAX_BYTES = 8 << 20
NVME_MAX_SEGS = NVME_CTRL_PAGE_SIZE // 16
NVME_MAX_META_SEGS = 256 // 16 - 1


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Limits of one request queue; all sizes in bytes, masks as bit masks, segments as counts."""

    logical_block_size: int = SECTOR_SIZE
    physical_block_size: int = SECTOR_SIZE
    max_bytes: int = NVME_MAX_BYTES
    max_segments: int = NVME_MAX_SEGS
    max_segment_size: int = UNLIMITED
    seg_boundary_mask: int = NO_BOUNDARY
    virt_boundary_mask: int = 0
    dma_alignment: int = 3
    chunk_bytes: int = 0
    max_integrity_segments: int = NVME_MAX_META_SEGS
    integrity_interval: int = 0
    integrity_tuple: int = 0

    def __post_init__(self) -> None:
        for name in ("logical_block_size", "physical_block_size"):
            value = getattr(self, name)
            if value < SECTOR_SIZE or value & (value - 1):
                raise MisuseError(f"{name}={value}: must be a power of two of at least {SECTOR_SIZE}")
        for name in ("seg_boundary_mask", "virt_boundary_mask", "dma_alignment"):
            value = getattr(self, name)
            if value < 0 or value & (value + 1) or value >> 64:
                raise MisuseError(f"{name}={value:#x}: must be a mask (a power of two minus one) of at most 64 bits")
        if self.max_segment_size < 1 or self.max_segments < 1:
            raise MisuseError("max_segment_size and max_segments must be at least 1")
        if self.max_bytes < self.logical_block_size:
            raise MisuseError(
                f"max_bytes={self.max_bytes}: must hold at least one logical block of {self.logical_block_size} bytes"
            )

    def capped(self, opt_mapping_size: int) -> QueueLimits:
        """These limits with ``max_bytes`` capped to ``dma_opt_mapping_size`` (0 or larger than it: unchanged)."""
        if opt_mapping_size <= 0 or opt_mapping_size >= self.max_bytes:
            return self
        return replace(self, max_bytes=max(self.logical_block_size, opt_mapping_size))

    def max_io_bytes(self, sector: int) -> int:
        """How many bytes a request that starts at ``sector`` may have (``get_max_io_size``).

        Ends on a physical block where that is possible, else on a logical one; does not cross a chunk.
        """
        limit = self.max_bytes
        if self.chunk_bytes:
            limit = min(limit, self.chunk_bytes - (sector << SECTOR_SHIFT) % self.chunk_bytes)
        start = (sector << SECTOR_SHIFT) & (self.physical_block_size - 1)
        end = (start + limit) & ~(self.physical_block_size - 1)
        return end - start if end > start else limit & ~(self.logical_block_size - 1)

    def integrity_bytes(self, payload: int) -> int:
        """Bytes of protection information for ``payload`` bytes of data (0 without integrity)."""
        return payload // self.integrity_interval * self.integrity_tuple if self.integrity_interval else 0


def nvme_limits(
    *,
    block_size: int = SECTOR_SIZE,
    max_transfer: int = 0,
    sgl_supported: bool,
    opt_mapping_size: int = 0,
    admin: bool = False,
    metadata_size: int = 0,
) -> QueueLimits:
    """The limits nvme-pci sets: ``max_transfer`` is the controller's MDTS in bytes (0 = none).

    Controllers without SGLs, and every admin queue, need the PRP virtual boundary of one controller page.
    """
    limit = min(max_transfer or NVME_MAX_BYTES, NVME_MAX_BYTES)
    return QueueLimits(
        logical_block_size=block_size,
        physical_block_size=block_size,
        max_bytes=limit,
        max_segments=NVME_MAX_SEGS,
        virt_boundary_mask=0 if sgl_supported and not admin else NVME_CTRL_PAGE_SIZE - 1,
        integrity_interval=block_size if metadata_size else 0,
        integrity_tuple=metadata_size,
    ).capped(opt_mapping_size)
