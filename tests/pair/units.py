"""Operations of a program: the IOMMU's side: a domain's batches, translation, device TLBs, dirty pages, bitmaps."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from typing import Any

from dmakit.iommu.bitmap import Bitmap
from dmakit.iommu.devtlb import DeviceTlb
from dmakit.iommu.gather import Gather
from dmakit.iommu.port import DmaPort
from tests.pair.held import PAGE, PAGES, Held

DIRTY_BASE = 1 << 34
ROWS_BASE = DIRTY_BASE + (1 << 30)
LARGE = 1 << 21


class Units(Held):
    """The device's own domain, at addresses that the IOVA allocator does not reach."""

    def set_up(self, config: int) -> None:
        super().set_up(config)
        self.other = Bitmap(256)
        self.gather = Gather()
        self.ats: list[tuple[DeviceTlb, DmaPort]] = []
        self.sources = 0

    @property
    def domain(self) -> Any:
        """The device's domain; without one the call is a wrong one."""
        if self.device.domain is None:
            raise ValueError("no domain")
        return self.device.domain

    def _iovas(self, a: int, b: int, count: int) -> array[int]:
        """Addresses: of mappings, of rows, of the dirty range, far away; runs of neighbours and scattered ones."""
        found: array[int] = array("Q")
        for i in range(count):
            place = (a + i * b) & 0xFFFFFF
            kind = (a + i * (b % 3)) % 5
            if kind < 2 and self.singles:
                addr, size, _ = self.singles[place % len(self.singles)]
                found.append(addr + place % (size or 1) & (1 << 64) - 1)
            elif kind < 4:
                found.append((ROWS_BASE if kind == 3 else DIRTY_BASE) + place % (700 * PAGE))
            else:
                found.append((place << 40) + place & (1 << 64) - 1 if place % 7 == 0 else ROWS_BASE + (place << 12))
        return found

    # Domain ----------------------------------------------------------------------------------------------------------

    def _rows(self, a: int, b: int, c: int) -> tuple[array[int], array[int], array[int]]:
        many = c % 60
        if b % 5 == 4:  # large leaves
            iovas = [ROWS_BASE + (1 << 30) + (a + i) % 64 * LARGE for i in range(many % 5)]
            return (
                array("Q", iovas),
                array("Q", [(4 + (a + i) % 16) * LARGE for i in range(many % 5)]),
                array("Q", [LARGE * (1 + b % 2)] * (many % 5)),
            )
        iovas = [ROWS_BASE + (a + i * (1 + b % 4)) % 700 * PAGE for i in range(many)]
        phys = [self.base + (a + i) % PAGES * PAGE for i in range(many)]
        return array("Q", iovas), array("Q", phys), array("Q", [PAGE * (1 + b % 2)] * many)

    def map_rows(self, a: int, b: int, c: int, d: int) -> Any:
        iovas, phys, sizes = self._rows(a, b, c)
        if d % 19 == 18:
            sizes = sizes[1:]
        return self.domain.map_many(iovas, phys, sizes, d % 4 if d % 5 == 0 else 3, cpu=self.cpu(d))

    def unmap_rows(self, a: int, b: int, c: int, d: int) -> Any:
        iovas, _, sizes = self._rows(a, b, c)
        return self.domain.unmap_many(iovas, sizes, cpu=self.cpu(d))

    def rows_to_phys(self, a: int, b: int, c: int, d: int) -> Any:
        iovas = self._iovas(a, b, c % 40)
        out = array("Q", bytes(8 * (len(iovas) + d % 2)))
        return self.domain.iova_to_phys_many(iovas, out), out.tolist(), self.domain.iova_to_phys(a)

    def gather_rows(self, a: int, b: int, c: int, d: int) -> Any:
        domain, gather = self.domain, self.gather
        if d % 3 == 0:
            return domain.flush(gather, self.cpu(c)), gather.is_empty
        removed = domain.unmap_gather(ROWS_BASE + a % 700 * PAGE, b % 90 * PAGE, gather)
        return removed, gather.start, gather.end, gather.freelist, gather.mapped

    # Translation -----------------------------------------------------------------------------------------------------

    def translate_many(self, a: int, b: int, c: int, d: int) -> Any:
        did = self.domain.did if d % 11 else a & 0xFFFF
        iovas = self._iovas(a, b, c % 400)
        out = array("Q", bytes(8 * len(iovas)))
        return self.unit.translate_many(did, iovas, out, bool(d & 1), source=b & 0xFFFF), out.tolist()

    def translate_dense(self, a: int, b: int, c: int, d: int) -> Any:
        """A sweep that fills both caches, so that the lane serves most of it."""
        iovas = array("Q", [ROWS_BASE + (a + i * (1 + b % 5)) % 700 * PAGE + i for i in range(600)])
        out = array("Q", bytes(8 * len(iovas)))
        faults = self.unit.translate_many(self.domain.did, iovas, out, bool(d & 1))
        return faults, hashlib.md5(out.tobytes()).hexdigest()

    def translate(self, a: int, b: int, c: int, d: int) -> Any:
        iova = self._iovas(a, b, 1)[0] if d % 3 else a
        return self.unit.translate(self.domain.did, iova, bool(d & 1), source=b & 0xFFFF)

    def invalidate(self, a: int, b: int, c: int, d: int) -> Any:
        unit, did, cpu = self.unit, self.domain.did if d % 9 else b, self.cpu(c)
        calls: tuple[Callable[[], Any], ...] = (
            lambda: unit.flush_range(did, a, a + (b & 0xFFFFF), ih=bool(c & 1), cpu=cpu),
            lambda: unit.inv_pages(did, a % 64 * PAGE, b % 20, ih=bool(c & 1), cpu=cpu),
            lambda: unit.inv_domain(did, cpu=cpu),
            lambda: unit.inv_global(cpu=cpu),
            lambda: unit.sync_range(did, a, a + (b & 0xFFFFF), cpu=cpu),
            lambda: (unit.faults, unit.faults_lost, unit.clear_faults()),
        )
        return calls[a % len(calls)]()

    # Device TLBs -----------------------------------------------------------------------------------------------------

    def ats_attach(self, a: int, b: int, c: int, d: int) -> Any:
        source = 0x300 + self.sources % 5
        self.sources += 1
        tlb = DeviceTlb(source, entries=16 << a % 2, ways=4, queue_depth=1 + b % 32)
        self.unit.attach_devtlb(tlb, self.domain.did)
        self.ats.append((tlb, DmaPort(self.machine.memory, self.unit, self.domain.did, source=source, devtlb=tlb)))
        return source

    def ats_access(self, a: int, b: int, c: int, d: int) -> Any:
        if not self.ats:
            return None
        tlb, port = self.ats[d % len(self.ats)]
        iova = self._iovas(a, b, 1)[0]
        if c % 3 == 0:
            return port.locate(iova, bool(b & 1)), tlb.invalidations
        if c % 3 == 1:
            return port.write(iova, bytes([c & 255]) * (b % 9000))
        return hashlib.md5(port.read(iova, b % 9000)).hexdigest()

    def ats_detach(self, a: int, b: int, c: int, d: int) -> Any:
        held = self.pick(self.ats, a) if d % 3 == 0 else None
        return None if held is None else (self.unit.detach_devtlb(held[0], cpu=self.cpu(b)), held[0].invalidations)

    # Dirty pages -----------------------------------------------------------------------------------------------------

    def dirty(self, a: int, b: int, c: int, d: int) -> Any:
        domain = self.domain
        if d % 5 == 0:
            return domain.set_dirty_tracking(bool(a & 1))
        if d % 5 == 1:
            return domain.map(DIRTY_BASE + a % 64 * PAGE, self.base, b % 5 * PAGE, 3)
        if d % 5 == 2:
            return domain.unmap(DIRTY_BASE + a % 64 * PAGE, b % 70 * PAGE, self.cpu(c))
        if d % 5 == 3:
            return self.device.port.write(DIRTY_BASE + a % (64 * PAGE), bytes(b % 5000))
        found = domain.read_and_clear_dirty(DIRTY_BASE, 64 * PAGE, self.bitmap.words[:1], flags=c & 1)
        return found, self.bitmap.pages().tolist()

    def dirty_rows(self, a: int, b: int, c: int, d: int) -> Any:
        """The D bits of the rows, large leaves among them, at a drawn granularity; c % 3: no bitmap, no clearing."""
        shift = 12 + d % 10
        start = ROWS_BASE + (a % 4 << 30 >> 1)
        marks = None if c % 3 == 2 else array("Q", bytes(8 * ((1 << 30 - shift) + 63 >> 6)))
        options = {"page_size": 1 << shift, "flags": c % 3 & 1, "cpu": self.cpu(b)}
        found = self.domain.read_and_clear_dirty(start, 1 << 30, marks, **options)
        return found, None if marks is None else hashlib.md5(marks.tobytes()).hexdigest()

    def bitmap_call(self, a: int, b: int, c: int, d: int) -> Any:
        bitmap = self.bitmap if c % 3 else self.other
        calls: tuple[Callable[[], Any], ...] = (
            lambda: bitmap.set(a, b),
            lambda: bitmap.set(a % 256, 1 + b % 90),
            lambda: bitmap.reset(a % 256, b % 300),
            lambda: bitmap.test(a),
            lambda: bitmap.set_many(array("Q", [a & 255, b & 511])),
            lambda: bitmap.coarsened(a % 40).words.tolist(),
            lambda: bitmap.refined(a % 12 - 2).words.tolist()[:8],
            lambda: bitmap.runs().tolist(),
            lambda: self.bitmap.merge(self.other),
            lambda: self.bitmap.take(self.other),
            lambda: bitmap.clear() if a % 4 == 0 else None,
            lambda: Bitmap(a, bitmap.words).count(),
        )
        return calls[d % len(calls)](), bitmap.count()

    def bitmap_scan(self, a: int, b: int, c: int, d: int) -> Any:
        bitmap = self.bitmap if c % 2 else self.other
        out = array("Q", bytes(8 * (a % 130 if d % 7 == 6 else 66 + a % 64)))
        found = (bitmap.scan_pages if d % 2 else bitmap.scan_runs)(out, b % 6)
        return found, out.tolist()

    def units_end(self) -> dict[str, Any]:
        """What is left to see of caches, device TLBs, bitmaps."""
        unit = self.machine.unit
        found: dict[str, Any] = {"bitmaps": (self.bitmap.words.tolist(), self.other.words.tolist())}
        found["device TLBs"] = [(tlb.source, tlb.invalidations, tlb.cache.entries()) for tlb, _ in self.ats]
        if unit is not None:
            found["caches"] = unit.iotlb.entries(), unit.psc.entries()
            found["faults"] = unit.faults, unit.faults_lost
        return found
