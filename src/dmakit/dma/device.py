"""``Device``: the DMA API of one device, for people.

A device is what a driver maps memory for. Its options say what the hardware and firmware say about it: how wide its
addresses are (``mask``), whether it snoops CPU caches (``coherent``), whether it sits behind an external-facing port
(``trusted=False``), what its scatterlists may look like. Whether there is an IOMMU in front of it is the machine's
business: ``platform.soft.Machine.device`` makes devices; nobody else needs the constructor.

Every public method validates once and raises one of the errors of ``dmakit.errors``; the typed internals that it calls
(``_map_phys``, ``_map_sg``, ``IovaState._link`` …) are what compiled consumers use.

Addresses: ``phys`` is what memory is called by the CPU (and by the IOMMU's tables), ``addr`` what the device puts on
its bus. Sizes are bytes. Models ``kernel/dma/mapping.c`` and ``include/linux/dma-mapping.h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import cython

from dmakit.consts import DMA_NONE, ENOMEM, PAGE_SIZE
from dmakit.dma import coherent as _coherent
from dmakit.dma import phys_vec as _phys_vec
from dmakit.dma.defects import defect_bits
from dmakit.dma.direction import (
    Attrs,
    checked_attrs,
    checked_cpu,
    checked_direction,
    checked_mask,
    checked_range,
    integer,
)
from dmakit.dma.report import map_error, sg_error
from dmakit.errors import MisuseError
from dmakit.iova.arguments import pairs
from dmakit.reasons import Reason
from dmakit.swiotlb.bounce import max_mapping_size

if not cython.compiled:
    from dmakit.dma.exact import exact, known
    from dmakit.dma.scatter import SgMapping
    from dmakit.dma.windows import Windows

if TYPE_CHECKING:
    from types import TracebackType

U64 = (1 << 64) - 1
_IOVA_EXHAUSTED = int(Reason.IOVA_EXHAUSTED)
_RCACHE_RANGE = PAGE_SIZE << 5  # iova_rcache_range(): the largest size that magazines hold
_ABSENT = ("domain", "iovad", "flush_queue", "swiotlb", "cache", "p2p", "gather", "fail", "checker")
_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys((*_ABSENT, "coherent_mask", "boundary")),
    **dict.fromkeys(("coherent", "trusted", "pci", "kmalloc_bounce"), True),
    **dict.fromkeys(("identity", "forcedac", "force_bounce", "unchecked"), False),
    "mask": U64,
    "bus_dma_limit": 0,
    "min_align_mask": 0,
    "max_segment": 64 << 10,
}


def _serial(state: Any) -> int:
    return int(state.serial)


@cython.cclass
class Device(Windows):
    """One device and its mappings; a context manager that checks for leaks at its end.

    Options (keywords): ``memory``, ``port`` (how the device reaches memory), ``ledger``, ``clock``; behind an IOMMU
    ``domain``, ``iovad``, ``gather`` and, when lazy, ``flush_queue``; ``swiotlb`` (bounce memory), ``p2p`` (decisions
    about peers), ``cache`` (CPU caches that devices do not snoop), ``pages`` and ``low_pages`` (for coherent memory);
    ``mask`` and ``coherent_mask`` (2**n - 1), ``bus_dma_limit`` (0 = none), ``coherent``, ``trusted``, ``identity``,
    ``min_align_mask``, ``max_segment`` and ``boundary`` (of scatterlists), ``pci`` (32-bit addresses first),
    ``forcedac`` (not), ``force_bounce``, ``checker``, ``debug`` (keep every unmap necessary), ``defects`` (names or
    versions), ``unchecked`` (a caller that breaks the rules gets the kernel's answer: for replays of misuse).
    """

    def __init__(self, name: str, **options: Any) -> None:
        unknown = (
            set(options)
            - set(_DEFAULTS)
            - {"memory", "port", "ledger", "clock", "pages", "low_pages", "debug", "defects"}
        )
        if unknown:
            raise MisuseError(f"device {name!r}: unknown option {sorted(unknown)[0]!r}")
        if options.get("port") is None:
            raise MisuseError(f"device {name!r}: needs the option 'port'")
        merged = {**_DEFAULTS, **options}
        checked_mask("mask", merged["mask"])
        if merged["coherent_mask"] is None:
            merged["coherent_mask"] = merged["mask"]
        checked_mask("coherent_mask", merged["coherent_mask"])
        if merged["boundary"] is None:
            merged["boundary"] = 0xFFFFFFFF if merged["pci"] else U64
        checked_mask("boundary", merged["boundary"])
        merged["defects"] = defect_bits(options.get("defects", ()))
        Windows.__init__(self, name, merged)
        self.port = options["port"]
        self.pages = options.get("pages")
        self.low_pages = options.get("low_pages")
        self.clock = options.get("clock")
        self.debug = bool(options.get("debug", False))
        self.allocations: set[Any] = set()

    # What the driver tells about its device ----------------------------------------------------------------

    def set_mask(self, mask: SupportsIndex, coherent_mask: SupportsIndex | None = None) -> None:
        """``dma_set_mask`` (2**n - 1), and ``dma_set_coherent_mask`` when given."""
        wide = checked_mask("mask", mask)
        if coherent_mask is not None:
            self.coherent_mask = checked_mask("coherent_mask", coherent_mask)
        self.mask = wide

    def set_max_segment(self, size: SupportsIndex) -> None:
        """``dma_set_max_seg_size``: the longest output segment of a scatterlist (bytes)."""
        number = integer(size)
        if number is None or not 0 < number < 1 << 32:
            raise MisuseError(f"max_segment={size!r}: must be 1 to 2**32 - 1 bytes")
        self.max_segment = number

    def set_boundary(self, mask: SupportsIndex) -> None:
        """``dma_set_seg_boundary`` (2**n - 1): no output segment crosses a multiple of mask + 1."""
        self.boundary = checked_mask("boundary", mask)

    def set_min_align_mask(self, mask: SupportsIndex) -> None:
        """``dma_set_min_align_mask``: the address bits that a bounce slot must preserve (0 = none)."""
        self.min_align_mask = 0 if integer(mask) == 0 else checked_mask("min_align_mask", mask)

    # One piece ---------------------------------------------------------------------------------------------

    def _ordinary(self, direction: object, attrs: object, cpu: object) -> cython.bint:
        """Whether the three are integers that need no further check; then ``way``, ``how`` and ``on`` hold them."""
        way: cython.longlong = exact(direction)
        how: cython.longlong = exact(attrs)
        on: cython.longlong = exact(cpu)
        if not known(way, how) or way == DMA_NONE or on < 0 or on >= self.ledger.cpus:
            return False
        self.ledger._alone()
        self.way, self.how, self.on = way, how, on
        return True

    def map_phys(
        self,
        phys: SupportsIndex,
        size: SupportsIndex,
        direction: SupportsIndex,
        attrs: SupportsIndex = 0,
        cpu: SupportsIndex = 0,
    ) -> int:
        """Map memory for the device; returns the bus address (``dma_map_phys``)."""
        place: cython.longlong = exact(phys)
        total: cython.longlong = exact(size)
        found: cython.ulonglong
        if place >= 0 and total > 0 and self.checker is None and self._ordinary(direction, attrs, cpu):
            found = self._map_phys(place, total, self.way, self.how, self.on)
            if found != 0:
                return found
            raise map_error(self, int(place), int(total), int(self.how))
        start, length = checked_range("map_phys", phys, size)
        way, how, on = checked_direction(direction), checked_attrs(attrs), checked_cpu(cpu, self.ledger.cpus)
        if way == DMA_NONE:
            raise MisuseError("map_phys: Direction.NONE cannot be mapped")
        with self.ledger.turn:
            if self.checker is not None:
                self.checker.mapping(self, start, length, way, how)
            found = self._map_phys(start, length, way, how, on)
            if found == 0:
                raise map_error(self, start, length, how)
            if self.checker is not None:
                self.checker.mapped(self, found, start, length, way, how)
        return int(found)

    def unmap_phys(
        self,
        addr: SupportsIndex,
        size: SupportsIndex,
        direction: SupportsIndex,
        attrs: SupportsIndex = 0,
        cpu: SupportsIndex = 0,
    ) -> None:
        """Undo ``map_phys``, with the same size, direction and attributes (``dma_unmap_phys``)."""
        place: cython.longlong = exact(addr)
        total: cython.longlong = exact(size)
        if place >= 0 and total > 0 and self.checker is None and self._ordinary(direction, attrs, cpu):
            if self._unmap_phys(place, total, self.way, self.how, self.on) == 0:
                return
            raise MisuseError(f"unmap_phys: nothing is mapped at {int(place):#x}", rule="not-mapped")
        start, length = checked_range("unmap_phys", addr, size)
        way, how, on = checked_direction(direction), checked_attrs(attrs), checked_cpu(cpu, self.ledger.cpus)
        with self.ledger.turn:
            if self.checker is not None:
                self.checker.unmapping(self, start, length, way, how)
            if self._unmap_phys(start, length, way, how, on) != 0:
                raise MisuseError(f"unmap_phys: nothing is mapped at {start:#x}", rule="not-mapped")

    def map_page(
        self,
        phys: SupportsIndex,
        size: SupportsIndex,
        direction: SupportsIndex,
        attrs: SupportsIndex = 0,
        *,
        cpu: SupportsIndex = 0,
    ) -> int:
        """``dma_map_page_attrs``: as ``map_phys``, for memory that has a struct page (MMIO is refused)."""
        start, length = checked_range("map_page", phys, size)
        if checked_attrs(attrs) & Attrs.MMIO or not self.memory.is_ram(start):
            raise MisuseError(f"map_page: phys={start:#x} must be RAM, and Attrs.MMIO is not allowed; use map_resource")
        return self.map_phys(start, length, direction, attrs, cpu=cpu)

    def unmap_page(
        self,
        addr: SupportsIndex,
        size: SupportsIndex,
        direction: SupportsIndex,
        attrs: SupportsIndex = 0,
        *,
        cpu: SupportsIndex = 0,
    ) -> None:
        """Undo ``map_page``."""
        self.unmap_phys(addr, size, direction, attrs, cpu=cpu)

    def map_resource(
        self,
        phys: SupportsIndex,
        size: SupportsIndex,
        direction: SupportsIndex,
        attrs: SupportsIndex = 0,
        *,
        cpu: SupportsIndex = 0,
    ) -> int:
        """Map device memory (a BAR): ``map_phys`` with Attrs.MMIO; no cache maintenance, never bounced."""
        start, length = checked_range("map_resource", phys, size)
        if self.memory.is_ram(start):
            raise MisuseError(f"map_resource: phys={start:#x} is RAM; use map_phys", rule="resource-is-ram")
        return self.map_phys(start, length, direction, checked_attrs(attrs) | Attrs.MMIO, cpu=cpu)

    def unmap_resource(
        self,
        addr: SupportsIndex,
        size: SupportsIndex,
        direction: SupportsIndex,
        attrs: SupportsIndex = 0,
        *,
        cpu: SupportsIndex = 0,
    ) -> None:
        """Undo ``map_resource``."""
        self.unmap_phys(addr, size, direction, checked_attrs(attrs) | Attrs.MMIO, cpu=cpu)

    def sync_single_for_cpu(self, addr: SupportsIndex, size: SupportsIndex, direction: SupportsIndex) -> None:
        """Let the CPU read what the device wrote to [addr, addr+size) of a live mapping."""
        self._sync("sync_single_for_cpu", addr, size, direction, True)

    def sync_single_for_device(self, addr: SupportsIndex, size: SupportsIndex, direction: SupportsIndex) -> None:
        """Let the device see what the CPU wrote."""
        self._sync("sync_single_for_device", addr, size, direction, False)

    def _sync(
        self, call: str, addr: SupportsIndex, size: SupportsIndex, direction: SupportsIndex, for_cpu: bool
    ) -> None:
        start, length = checked_range(call, addr, size)
        way = checked_direction(direction)
        with self.ledger.turn:
            if self.checker is not None:
                self.checker.syncing(self, start, length, way, for_cpu)
            if self._sync_single(start, length, way, for_cpu) != 0:
                raise MisuseError(f"{call}: nothing is mapped at {start:#x}", rule="not-mapped")

    # Scatterlists ------------------------------------------------------------------------------------------

    def map_sg(
        self,
        segments: Sequence[tuple[int, int]],
        direction: SupportsIndex,
        attrs: SupportsIndex = 0,
        *,
        cpu: SupportsIndex = 0,
    ) -> SgMapping:
        """Map a list of (phys, length) at once (``dma_map_sg``); ``.segments`` of the answer is what the device gets.

        An entry may be a peer's device memory when the device has a ``p2p`` state; UnsupportedError (EREMOTEIO) when
        the two cannot talk.
        """
        given, total = pairs("map_sg", segments), 0
        sg = SgMapping(len(given))
        sg.direction, sg.attrs = checked_direction(direction), checked_attrs(attrs)
        for i, (phys, length) in enumerate(given):
            place, length = checked_range("map_sg", phys, length)
            sg.phys[i], sg.length[i] = place, length
            total += length
        if total >= 1 << 62:
            raise MisuseError(f"map_sg: {total:#x} bytes in all: must be below 2**62")
        sg.entries = len(given)
        on = checked_cpu(cpu, self.ledger.cpus)
        with self.ledger.turn:
            count = self._sg_run(sg, on, True)
            if count <= 0:
                raise sg_error(self, int(count), sg)
            if self.checker is not None:
                self.checker.mapped_sg(self, sg)
        return sg

    def unmap_sg(self, sg: SgMapping, *, cpu: SupportsIndex = 0) -> None:
        """Undo ``map_sg``."""
        on = checked_cpu(cpu, self.ledger.cpus)
        with self.ledger.turn:
            if not sg.live:
                raise MisuseError("unmap_sg: this list is not mapped", rule="double-unmap")
            if self.checker is not None:
                self.checker.unmapping_sg(self, sg)
            self._sg_run(sg, on, False)

    def sync_sg_for_cpu(self, sg: SgMapping) -> None:
        """Let the CPU read what the device wrote to a live list."""
        self._checked_sync_sg(sg, True)

    def sync_sg_for_device(self, sg: SgMapping) -> None:
        """Let the device see what the CPU wrote."""
        self._checked_sync_sg(sg, False)

    def _checked_sync_sg(self, sg: SgMapping, for_cpu: bool) -> None:
        with self.ledger.turn:
            if not sg.live:
                raise MisuseError("sync_sg: this list is not mapped", rule="not-mapped")
            if self.checker is not None:
                self.checker.syncing_sg(self, sg, for_cpu)
            self._sync_sg(sg, for_cpu)

    # Several ranges -----------------------------------------------------------------------------------------

    def map_ranges(
        self,
        ranges: Sequence[tuple[int, int]],
        direction: SupportsIndex,
        attrs: SupportsIndex = 0,
        *,
        cpu: SupportsIndex = 0,
    ) -> _phys_vec.RangeMapping:
        """Map several (phys, size) as one device range where they meet on granules, each by itself elsewhere."""
        pieces = [checked_range("map_ranges", phys, size) for phys, size in pairs("map_ranges", ranges)]
        if not pieces:
            raise MisuseError("map_ranges: needs at least one range")
        way, how, on = checked_direction(direction), checked_attrs(attrs), checked_cpu(cpu, self.ledger.cpus)
        if way == DMA_NONE:
            raise MisuseError("map_ranges: Direction.NONE cannot be mapped")
        return _phys_vec.map_ranges(self, pieces, way, how, on)

    # Memory that driver and device share -------------------------------------------------------------------

    def alloc_coherent(
        self, size: SupportsIndex, attrs: SupportsIndex = 0, *, cpu: SupportsIndex = 0
    ) -> _coherent.CoherentMemory:
        """Memory that CPU and device see alike at any time (``dma_alloc_coherent``); released by its ``free``."""
        _, length = checked_range("alloc_coherent", 0, size)
        on = checked_cpu(cpu, self.ledger.cpus)
        with self.ledger.turn:
            return _coherent.allocate(self, length, self.coherent_mask, -1, checked_attrs(attrs), on)

    def alloc_noncontiguous(
        self, size: SupportsIndex, direction: SupportsIndex, attrs: SupportsIndex = 0, *, cpu: SupportsIndex = 0
    ) -> _coherent.CoherentMemory:
        """Pages that need not be neighbours, one bus-address range (``dma_alloc_noncontiguous``); sync as streaming."""
        _, length = checked_range("alloc_noncontiguous", 0, size)
        way, how, on = checked_direction(direction), checked_attrs(attrs), checked_cpu(cpu, self.ledger.cpus)
        with self.ledger.turn:
            return _coherent.allocate(self, length, self.coherent_mask, way, how, on)

    def _map_ranges(
        self, ranges: list[tuple[int, int]], size: int, direction: int, attrs: int, mask: int, cpu: int
    ) -> int:
        """Whole pages into one IOVA range at or below ``mask``; 0, with nothing mapped, when that fails."""
        iova = self._alloc_iova(size, mask, cpu)
        if iova == 0:
            return int(self._fail(-ENOMEM, _IOVA_EXHAUSTED))
        done = 0
        error = 0
        for phys, length in ranges:
            error = self.domain._map(iova + done, phys, length, self._prot(direction, attrs), cpu)
            if error != 0:
                break
            done += length
        if error == 0:
            error = self.domain._sync_map(iova, size, cpu)
        if error == 0:
            return int(iova)
        if done:
            self.gather._init()
            self.domain._unmap(iova, done, self.gather)
            self.domain._flush(self.gather, cpu)
        self._free_iova(iova, size, False, cpu)
        return int(self._fail(error, 0))

    def _unmap_ranges(self, addr: int, size: int, cpu: int) -> None:
        self._iommu_unmap(addr, size, cpu)

    def _sync_ranges(self, ranges: list[tuple[int, int]], direction: int, for_cpu: bool) -> None:
        if self.coherent or direction < 0:
            return
        for phys, length in ranges:
            if for_cpu:
                self._for_cpu(phys, length, direction)
            else:
                self._for_device(phys, length, direction)

    # Questions ---------------------------------------------------------------------------------------------

    @property
    def merge_boundary(self) -> int:
        """``dma_get_merge_boundary``: granule − 1 behind an IOMMU, 0 when nothing can be merged."""
        return int(self.granule_mask) if self.translating else 0

    def max_mapping_size(self) -> int:
        """``dma_max_mapping_size``: the most that one classic call maps; 2**64 − 1 when nothing limits it."""
        if self.translating:
            limited = not self.trusted
        else:
            ram_end = max((region.end for region in self.memory.regions if region.kind == "ram"), default=0)
            limit = min(self.mask, self.bus_dma_limit or U64)
            limited = self.swiotlb is not None and (self.force_bounce or limit < ram_end - 1)
        return max_mapping_size(self.min_align_mask) if limited else U64

    def opt_mapping_size(self) -> int:
        """``dma_opt_mapping_size``: above this an IOVA allocation always searches the tree (128 KiB)."""
        limit = self.max_mapping_size()
        return min(limit, _RCACHE_RANGE) if self.translating else limit

    def need_unmap(self) -> bool:
        """``dma_need_unmap``: False when unmapping has nothing to do. Ask after all mappings were made."""
        return bool(self._need_unmap())

    def _need_unmap(self) -> cython.bint:
        return self.translating or not self.skip_sync or self.debug

    def iova_to_phys(self, addr: SupportsIndex) -> int:
        """What the device's address ``addr`` leads to by the tables (0 = nothing); the address itself when direct."""
        place: cython.longlong = exact(addr)
        if place >= 0 and self.translating:
            self.ledger._alone()
            answer: cython.ulonglong = self.domain._iova_to_phys(place)
            return answer
        start, _ = checked_range("iova_to_phys", addr, 1)
        self.ledger._alone()
        return int(self.domain._iova_to_phys(start)) if self.translating else start

    def leaf_across(self, addr: SupportsIndex) -> bool:
        """Whether one page-table leaf begins before bus address ``addr`` and ends after it."""
        start, _ = checked_range("leaf_across", addr, 1)
        self.ledger._alone()
        return bool(self.translating and self.domain._leaf_across(start))

    # The device's own accesses -----------------------------------------------------------------------------

    def dma_read(self, addr: SupportsIndex, size: SupportsIndex) -> bytes:
        """The device reads ``size`` bytes from bus address ``addr``; FaultError where the IOMMU blocks it."""
        start: int
        length: int
        place: cython.longlong = exact(addr)
        total: cython.longlong = exact(size)
        if place >= 0 and total > 0:
            start, length = place, total
        else:
            start, length = checked_range("dma_read", addr, size)
        data: bytes = self.port.read(start, length)
        if self.checker is not None:
            self.checker.accessed(self, start, length, False)
        return data

    def dma_write(self, addr: SupportsIndex, data: bytes | bytearray | memoryview) -> None:
        """The device writes ``data``."""
        start, _ = checked_range("dma_write", addr, 1)
        self.port.write(start, data)
        if self.checker is not None:
            self.checker.accessed(self, start, len(data), True)

    # End ---------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """The driver lets the device go; MisuseError naming what is still mapped when something is."""
        if self.checker is not None:
            self.checker.released(self)
        left = [f"a window of {state.size:#x} bytes at {state.addr:#x}" for state in sorted(self.states, key=_serial)]
        left += [f"coherent memory of {memory.size:#x} bytes at {memory.addr:#x}" for memory in self.allocations]
        if left:
            raise MisuseError(f"device {self.name!r} released with live mappings: {'; '.join(left)}", rule="leak")

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.release()
