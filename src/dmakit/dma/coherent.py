"""Memory that a driver and its device share: coherent and noncontiguous allocations.

Behind an IOMMU the pages need not be neighbours: they are taken in the largest blocks that the IOMMU has leaves for
(2 MiB, then 4 KiB), falling back block by block when memory is fragmented, and mapped into one IOVA range, with the
*coherent* mask as limit. Without one, a naturally aligned block of 2**n pages is taken that the device can reach.

``alloc_coherent``: CPU and device see the same bytes at any time; on a machine whose devices do not snoop, the
CPU's access goes around its caches (the kernel maps such memory uncached). ``alloc_noncontiguous``: a streaming
mapping of such pages; the caller syncs.

Models ``drivers/iommu/dma-iommu.c`` (__iommu_dma_alloc_pages, iommu_dma_alloc), ``kernel/dma/direct.c``
(dma_direct_alloc), ``kernel/dma/mapping.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dmakit import consts
from dmakit.consts import PAGE_SHIFT, PAGE_SIZE
from dmakit.dma.report import told
from dmakit.errors import ExhaustedError, MisuseError, UnsupportedError
from dmakit.memory.buffers import Buffer
from dmakit.memory.pages import PageAllocator

if TYPE_CHECKING:
    from types import TracebackType

_MAX_ORDER = 10  # MAX_PAGE_ORDER of the kernel's page allocator

Block = tuple[PageAllocator, int, int]  # allocator, phys, order


class CoherentMemory:
    """An allocation: ``addr`` and ``size`` for the device, ``buffer`` (read, write) for the CPU, until ``free``."""

    def __init__(self, device: Any, addr: int, size: int, blocks: list[Block], direction: int, cpu: int) -> None:
        self.device = device
        self.addr = addr
        self.size = size
        self.direction = direction
        self.cpu = cpu
        self.uncached = direction < 0
        self.buffer = Buffer(device.memory, ranges_of(blocks, size), cpu=None if self.uncached else device.cache)
        self._blocks = blocks
        self._live = True
        device.allocations.add(self)

    def read(self, offset: int = 0, n: int | None = None) -> bytes:
        """``n`` bytes from ``offset`` as the CPU sees them."""
        return self.buffer.read(offset, n)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``offset`` by the CPU."""
        self.buffer.write(offset, data)

    def sync_for_cpu(self) -> None:
        """Let the CPU read what the device wrote (only noncontiguous memory needs it)."""
        with self.device.ledger.turn:
            self.device._sync_ranges(self.buffer.ranges, self.direction, True)

    def sync_for_device(self) -> None:
        """Let the device see what the CPU wrote."""
        with self.device.ledger.turn:
            self.device._sync_ranges(self.buffer.ranges, self.direction, False)

    def free(self) -> None:
        """Unmap and give the pages back."""
        with self.device.ledger.turn:
            if not self._live:
                raise MisuseError(f"coherent memory at {self.addr:#x} was freed already", rule="double-free")
            self._live = False
            self.device.allocations.discard(self)
            if self.device.translating:
                self.device._unmap_ranges(self.addr, self.size, self.cpu)
            free_blocks(self._blocks)

    def __enter__(self) -> CoherentMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self.free()


def ranges_of(blocks: list[Block], size: int) -> list[tuple[int, int]]:
    """The (phys, size) pieces of the first ``size`` bytes, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for _, phys, order in blocks:
        take = min(PAGE_SIZE << order, size)
        if take <= 0:
            break
        if ranges and sum(ranges[-1]) == phys:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + take)
        else:
            ranges.append((phys, take))
        size -= take
    return ranges


def free_blocks(blocks: list[Block]) -> None:
    """Give every block back to its allocator."""
    for pages, phys, order in blocks:
        pages.free(phys, order)


def alloc_pages(pages: PageAllocator, count: int, page_sizes: int, single: bool) -> list[Block]:
    """``count`` pages in the largest blocks that ``page_sizes`` (a bitmap) has, smaller ones when fragmented."""
    orders = [o for o in range(_MAX_ORDER, 0, -1) if page_sizes >> (o + PAGE_SHIFT) & 1 and not single]
    blocks: list[Block] = []
    while count > 0:
        phys = order = 0
        for order in (*(o for o in orders if 1 << o <= count), 0):
            try:
                phys = pages.alloc(order)
                break
            except ExhaustedError:
                if order == 0:
                    free_blocks(blocks)
                    raise
        blocks.append((pages, phys, order))
        count -= 1 << order
    return blocks


def _reachable_block(device: Any, size: int, mask: int) -> list[Block]:
    """One naturally aligned block that ends at or below ``mask``."""
    order = (-(-size // PAGE_SIZE) - 1).bit_length()
    for pages in (device.pages, device.low_pages):
        if pages is None:
            continue
        phys = pages.alloc(order)
        if phys + size - 1 <= min(mask, device.bus_dma_limit or mask):
            return [(pages, phys, order)]
        pages.free(phys, order)
    raise UnsupportedError(
        f"no memory of {size:#x} bytes at or below {mask:#x}, what the device reaches", consts.ENOMEM
    )


def _prepare(device: Any, ranges: list[tuple[int, int]]) -> None:
    """New memory is zero and in no CPU cache."""
    for phys, length in ranges:
        if device.cache is not None:
            device.cache.invalidate(phys, length)
        device.memory.fill(phys, length, 0)


def allocate(device: Any, size: int, mask: int, direction: int, attrs: int, cpu: int) -> CoherentMemory:
    """``size`` bytes for CPU and device below ``mask``; ``direction`` −1 = coherent, else a streaming direction."""
    padded = -(-size // PAGE_SIZE) * PAGE_SIZE
    if not device.translating:
        blocks = _reachable_block(device, size, mask)
    elif attrs & consts.ATTR_FORCE_CONTIGUOUS:
        order = (padded // PAGE_SIZE - 1).bit_length()
        blocks = [(device.pages, device.pages.alloc(order), order)]
    else:
        single = bool(attrs & consts.ATTR_ALLOC_SINGLE_PAGES)
        blocks = alloc_pages(device.pages, padded // PAGE_SIZE, device.domain.page_sizes, single)
    ranges = ranges_of(blocks, padded)
    _prepare(device, ranges)
    addr = ranges[0][0]
    if device.translating:
        addr = device._map_ranges(ranges, padded, max(direction, 0), attrs, mask, cpu)
        if addr == 0:
            free_blocks(blocks)
            raise told(device, -device.error) or ExhaustedError(
                f"no IOVA range or table page for {size:#x} bytes of shared memory"
            )
    return CoherentMemory(device, addr, size, blocks, direction, cpu)
