"""Several ranges of memory as one window: what dma-buf exporters and the network stack do with the two-step calls.

``map_ranges`` asks for one window for all ranges, links each behind the one before and syncs once; the device sees one
range. That works when the ranges meet on granules (only the first may start, only the last may end inside one). When
they do not, or when the device has no window to offer, each range is mapped by itself.

Linux gets two things wrong here, and both can be switched on: ``dmabuf-links-at-zero`` links every range at offset 0
(``drivers/dma-buf/dma-buf-mapping.c``), and ``tso-links-unaligned-pieces`` does not ask whether the ranges meet on
granules: the link refuses with a warning, and only then each range is mapped by itself (``net/core/tso.c``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dmakit.consts import EIO
from dmakit.dma.defects import DMABUF_LINKS_AT_ZERO, TSO_UNALIGNED_LINKS
from dmakit.errors import DmakitError, MisuseError

if TYPE_CHECKING:
    from types import TracebackType

    from dmakit.dma.iova_state import IovaState

Ranges = Sequence[tuple[int, int]]


class RangeMapping:
    """Mapped ranges: ``segments`` (bus address, length) for the device, until ``unmap`` or the end of ``with``."""

    def __init__(self, device: Any, direction: int, attrs: int, cpu: int) -> None:
        self.device = device
        self.direction = direction
        self.attrs = attrs
        self.cpu = cpu
        self.state: IovaState | None = None
        self.segments: list[tuple[int, int]] = []

    def unmap(self) -> None:
        """Unmap everything; MisuseError when that was done already."""
        with self.device.ledger.turn:
            if not self.segments:
                raise MisuseError("unmap: these ranges are not mapped", rule="double-unmap")
            if self.state is not None:
                whole = sum(length for _, length in self.segments)
                self.state.destroy(whole, self.direction, self.attrs, cpu=self.cpu)
            else:
                for addr, length in self.segments:
                    self.device.unmap_phys(addr, length, self.direction, self.attrs, cpu=self.cpu)
            self.segments = []

    def __enter__(self) -> RangeMapping:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.segments:
            self.unmap()


def meet_on_granules(ranges: Ranges, granule_mask: int) -> bool:
    """Whether ranges can be linked one behind the other: only the first starts, only the last ends inside a granule."""
    starts = all(phys & granule_mask == 0 for phys, _ in ranges[1:])
    return starts and all((phys + size) & granule_mask == 0 for phys, size in ranges[:-1])


def map_ranges(device: Any, ranges: Ranges, direction: int, attrs: int, cpu: int) -> RangeMapping:
    """See ``Device.map_ranges``."""
    mapping = RangeMapping(device, direction, attrs, cpu)
    asked = meet_on_granules(ranges, device.granule_mask) or device.defects & TSO_UNALIGNED_LINKS
    if asked and _link_all(mapping, ranges):
        return mapping
    try:
        for phys, size in ranges:
            mapping.segments.append((device.map_phys(phys, size, direction, attrs, cpu=cpu), size))
    except DmakitError:
        if mapping.segments:
            mapping.unmap()
        raise
    return mapping


def _link_all(mapping: RangeMapping, ranges: Ranges) -> bool:
    """One window for all; False when there is none or when the start rule refuses a range."""
    device = mapping.device
    total = sum(size for _, size in ranges)
    state = device.try_alloc(ranges[0][0], total, cpu=mapping.cpu)
    if not state:
        return False
    offset = 0
    try:
        for phys, size in ranges:
            at = 0 if device.defects & DMABUF_LINKS_AT_ZERO else offset
            state.link(phys, at, size, mapping.direction, mapping.attrs)
            offset += size
        state.sync()
    except DmakitError as error:
        state.undo()
        if error.errno == EIO and device.defects & TSO_UNALIGNED_LINKS:
            return False
        raise
    mapping.state = state
    mapping.segments = [(int(state.addr), total)]
    return True
