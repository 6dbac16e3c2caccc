"""What the block layer asks of a device: the part of ``dma.Device`` that request mapping uses, as protocols.

The software machine's ``dma.Device`` has these methods; so has every other platform's. Keeping the list here
makes it short on purpose: a driver that needs more than this does not belong in the request path.
"""

from __future__ import annotations

from typing import Protocol


class Window(Protocol):
    """A state of the two-step API (``dma.IovaState``): false when it cannot be used."""

    @property
    def addr(self) -> int:
        """First usable IOVA."""

    @property
    def size(self) -> int:
        """Bytes asked for."""

    def __bool__(self) -> bool: ...

    def link(self, phys: int, offset: int, size: int, direction: int, attrs: int = 0) -> None:
        """Map a piece at ``offset``, without a sync."""

    def sync(self, offset: int, size: int) -> None:
        """Make linked pieces visible to the device."""

    def destroy(self, mapped_len: int, direction: int, attrs: int = 0, *, cpu: int | None = None) -> None:
        """Unmap ``mapped_len`` bytes from offset 0 and give the window back."""


class SgMapping(Protocol):
    """The result of ``map_sg``."""

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Output (address, length) pairs."""


class MappingDevice(Protocol):
    """A device whose memory accesses are mapped."""

    @property
    def translating(self) -> bool:
        """Whether an IOMMU translates its accesses (a DMA domain)."""

    @property
    def identity(self) -> bool:
        """Whether it sits behind an IOMMU in passthrough mode."""

    @property
    def why(self) -> int:
        """The ``Reason`` of the last call that failed (0 = none)."""

    def map_phys(self, phys: int, size: int, direction: int, attrs: int = 0, *, cpu: int = 0) -> int:
        """The DMA address of memory."""

    def unmap_phys(self, addr: int, size: int, direction: int, attrs: int = 0, *, cpu: int = 0) -> None:
        """Undo ``map_phys``."""

    def map_sg(self, segments: list[tuple[int, int]], direction: int, attrs: int = 0, *, cpu: int = 0) -> SgMapping:
        """Map a scatterlist."""

    def unmap_sg(self, mapping: SgMapping, *, cpu: int = 0) -> None:
        """Undo ``map_sg``."""

    def try_alloc(self, phys: int, size: int, *, cpu: int = 0) -> Window:
        """Reserve a window; false when two-step mapping is not possible."""

    @property
    def merge_boundary(self) -> int:
        """Mask on which neighbours can be made contiguous; 0 = never."""

    def need_unmap(self) -> bool:
        """Whether addresses must be kept to unmap them."""

    def opt_mapping_size(self) -> int:
        """Largest mapping that is still cheap, in bytes."""


class PeerMemory(Protocol):
    """A request's memo of the peer-to-peer decision (``p2p.state.P2pState``) for the requesting device."""

    @property
    def bus_offset(self) -> int:
        """What to add to a physical address of the provider asked about last."""

    def reset(self) -> None:
        """Forget the last provider: a new request begins."""

    def map_type(self, phys: int) -> int:
        """``consts.P2P_MAP_*`` of the memory at ``phys``."""
