"""A small mapping device for tests of the block layer: obvious bookkeeping instead of an IOMMU.

Addresses are handed out upwards from a base; every mapping is remembered until it is undone, so that a test can
ask what is left. ``fail`` is asked before each call that can fail.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dmakit.errors import ExhaustedError, MisuseError
from dmakit.failpoint import FailPoint

GRANULE = 4096


@dataclass
class SoftWindow:
    device: BlockDevice
    addr: int
    size: int
    linked: list[tuple[int, int, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.size > 0

    def link(self, phys: int, offset: int, size: int, direction: int, attrs: int = 0) -> None:
        self.device.log.append(("link", phys, offset, size, attrs))
        if self.device.fail.hit():
            raise ExhaustedError("no memory for a table")
        if offset and phys % GRANULE:
            raise MisuseError("unaligned start", 5)
        self.linked.append((offset, phys, size))

    def sync(self, offset: int, size: int) -> None:
        self.device.log.append(("sync", offset, size))
        if self.device.fail.hit():
            raise ExhaustedError("sync")

    def destroy(self, mapped_len: int, direction: int, attrs: int = 0, *, cpu: int | None = None) -> None:
        self.device.log.append(("destroy", mapped_len, attrs))
        assert mapped_len == sum(size for _, _, size in self.linked)
        self.linked.clear()
        self.device.windows.remove(self)


@dataclass
class SoftSg:
    segments: list[tuple[int, int]]


class BlockDevice:
    """Implements ``block.device.MappingDevice``; ``log`` records every call."""

    def __init__(self, *, translating: bool = True, identity: bool = False, windows: bool = True) -> None:
        self.translating = translating
        self.identity = identity
        self.give_windows = windows and translating
        self.fail = FailPoint()
        self.why = 0
        self.log: list[tuple[object, ...]] = []
        self.mapped: dict[int, tuple[int, int]] = {}
        self.windows: list[SoftWindow] = []
        self.needs_unmap = translating
        self.at = 1 << 40

    def _take(self, phys: int, size: int) -> int:
        addr = self.at + phys % GRANULE if self.translating else phys
        self.at += (phys % GRANULE + size + GRANULE - 1) // GRANULE * GRANULE + GRANULE
        return addr

    def map_phys(self, phys: int, size: int, direction: int, attrs: int = 0, *, cpu: int = 0) -> int:
        self.log.append(("map", phys, size, attrs))
        if self.fail.hit():
            raise ExhaustedError("no IOVA")
        addr = self._take(phys, size)
        self.mapped[addr] = (phys, size)
        return addr

    def unmap_phys(self, addr: int, size: int, direction: int, attrs: int = 0, *, cpu: int = 0) -> None:
        self.log.append(("unmap", addr, size, attrs))
        phys, mapped = self.mapped.pop(addr)
        assert mapped == size

    def map_sg(self, segments: list[tuple[int, int]], direction: int, attrs: int = 0, *, cpu: int = 0) -> SoftSg:
        self.log.append(("map_sg", len(segments)))
        if self.fail.hit():
            raise ExhaustedError("no IOVA")
        return SoftSg([(self.map_phys(phys, size, direction), size) for phys, size in segments])

    def unmap_sg(self, mapping: SoftSg, *, cpu: int = 0) -> None:
        for addr, size in mapping.segments:
            self.unmap_phys(addr, size, 0)
        self.log.append(("unmap_sg", cpu))

    def try_alloc(self, phys: int, size: int, *, cpu: int = 0) -> SoftWindow:
        self.log.append(("try_alloc", phys, size))
        if not self.give_windows or self.fail.hit():
            return SoftWindow(self, 0, 0)
        window = SoftWindow(self, self._take(phys, size), size)
        self.windows.append(window)
        return window

    @property
    def merge_boundary(self) -> int:
        return GRANULE - 1 if self.translating else 0

    def need_unmap(self) -> bool:
        return self.needs_unmap

    def opt_mapping_size(self) -> int:
        return 131072 if self.translating else 0

    def calls(self, name: str) -> int:
        return sum(1 for entry in self.log if entry[0] == name)

    def clean(self) -> bool:
        return not self.windows and (not self.mapped or not self.needs_unmap)
