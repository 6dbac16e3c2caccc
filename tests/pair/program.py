"""A program of calls over one machine, and everything that can be seen of it afterwards.

A program is plain data: a configuration and a list of (operation, a, b, c, d). The numbers are what Hypothesis drew;
each operation makes of them what it needs (``piece``: memory, ``pick``: one of what is live), so every program can run,
and many of its calls are wrong ones. ``run`` answers step by step with results or errors, and at the end with what the
machine holds: the bytes of every table page, the ledger, the events, the allocator's ranges, bitmaps and buffers.

This module runs in the child processes, once on each core: it decides nothing by what core it runs on.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from typing import Any

from dmakit.block.limits import QueueLimits
from dmakit.block.request import Op, Request
from dmakit.dma import batch
from dmakit.errors import DmakitError
from dmakit.iommu.bitmap import Bitmap
from dmakit.iova.domain import IovaDomain
from dmakit.nvme.coherent import DeviceSource
from dmakit.nvme.mapping import RequestMapper
from dmakit.nvme.pool import LARGE_BYTES, SMALL_BYTES, DescriptorPool
from dmakit.platform.soft import Machine

PAGE = 4096
PAGES = 64
DIRTY_BASE = 1 << 34
CONFIGS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"mode": "strict"}, {}),
    ({"mode": "lazy", "policy": "augmented", "cpus": 2}, {}),
    ({"mode": "lazy", "iommu": "x86"}, {}),
    ({"mode": "strict", "caching_mode": True, "coherent_walker": False}, {}),
    ({"mode": "lazy", "checker": True}, {"trusted": False, "min_align_mask": 4095}),
    ({"mode": "strict", "coherent": False}, {}),
    ({"iommu": "none"}, {"mask": (1 << 24) - 1}),
    ({"mode": "passthrough", "force_bounce": True}, {}),
    ({"mode": "lazy"}, {"coherent": False}),
)


class Run:
    """One program's machine and what it has live."""

    def __init__(self, config: int) -> None:
        machine, device = CONFIGS[config % len(CONFIGS)]
        self.machine = Machine(**{"ram": "64M", "swiotlb": "1M", **machine})
        self.events: list[Any] = []
        self.device = self.machine.device("dev0", **device)
        self.machine.record_events(self.events)
        self.base = self.machine.buffer(PAGES * PAGE, order=6).ranges[0][0]
        self.machine.memory.write(self.base, bytes(range(256)) * (PAGES * PAGE // 256))
        self.iovad = IovaDomain(cpus=2, policy="augmented" if config & 1 else "linux")
        self.singles: list[tuple[int, int, int]] = []
        self.lists: list[Any] = []
        self.states: list[Any] = []
        self.windows: list[array[int]] = []
        self.batches: list[tuple[array[int], array[int], int]] = []
        self.ranges: list[tuple[int, int]] = []
        self.coherent: list[Any] = []
        self.iods: list[Any] = []
        self.bitmap = Bitmap(256)
        self.mapper: RequestMapper | None = None

    def piece(self, at: int, size: int) -> tuple[int, int]:
        """Memory: mostly inside the buffer, sometimes far from any."""
        if at < 0 or at >= 1 << 32 or size < 0 or size >= 1 << 32:
            return at, size
        return self.base + at % (PAGES * PAGE // 2), size % (8 * PAGE + 1)

    def pieces(self, at: int, count: int, step: int) -> tuple[array[int], array[int]]:
        """Whole pages of the buffer, as two arrays."""
        many = count % 9
        places = [self.base + (at + i * (1 + step % 3)) % PAGES * PAGE for i in range(many)]
        return array("Q", places), array("Q", [PAGE] * many)

    @staticmethod
    def pick(items: list[Any], at: int) -> Any:
        """One of what is live (and out of the list), or None."""
        return items.pop(at % len(items)) if items else None

    # Streaming ---------------------------------------------------------------------------------------------------

    def map_phys(self, a: int, b: int, c: int, d: int) -> Any:
        phys, size = self.piece(a, b)
        addr = self.device.map_phys(phys, size, c % 5, d & 0x3FF6 if d & 7 == 0 else 0)
        self.singles.append((addr, size, c % 5))
        return addr

    def unmap_phys(self, a: int, b: int, c: int, d: int) -> Any:
        addr, size, direction = self.pick(self.singles, a) or (b, c, d % 4)
        return self.device.unmap_phys(addr, size, direction)

    def sync_single(self, a: int, b: int, c: int, d: int) -> Any:
        addr, size, direction = self.singles[a % len(self.singles)] if self.singles else (b, c, d % 4)
        self.device.sync_single_for_cpu(addr, size, direction)
        return self.device.sync_single_for_device(addr, max(size // 2, 1), direction)

    def map_sg(self, a: int, b: int, c: int, d: int) -> Any:
        segments = [self.piece(a + i * c, b + i) for i in range(d % 6)]
        sg = self.device.map_sg(segments, c % 4)
        self.lists.append(sg)
        return sg.segments, sg.inputs

    def unmap_sg(self, a: int, b: int, c: int, d: int) -> Any:
        sg = self.pick(self.lists, a)
        return None if sg is None else (self.device.unmap_sg(sg), sg.live)

    def map_many(self, a: int, b: int, c: int, d: int) -> Any:
        phys, sizes = self.pieces(a, b, c)
        out = array("Q", bytes(8 * (len(phys) + (d % 7 == 6))))
        batch.map_many(self.device, phys, sizes, out, c % 4)
        self.batches.append((out, sizes, c % 4))
        return out.tolist()

    def unmap_many(self, a: int, b: int, c: int, d: int) -> Any:
        held = self.pick(self.batches, a)
        return None if held is None else batch.unmap_many(self.device, *held)

    # Two steps ---------------------------------------------------------------------------------------------------

    def try_alloc(self, a: int, b: int, c: int, d: int) -> Any:
        state = self.device.try_alloc(self.base + a % PAGE if a % 3 == 0 else 0, b)
        self.states.append(state)
        return state.addr, state.size, bool(state)

    def _state(self, at: int) -> Any:
        return self.states[at % len(self.states)] if self.states else self.device.try_alloc(0, 4 * PAGE)

    def link(self, a: int, b: int, c: int, d: int) -> Any:
        phys, size = self.piece(b if b % 3 else b // PAGE * PAGE, d)
        return self._state(a).link(phys, c % 5 * PAGE, size, d % 4)

    def link_many(self, a: int, b: int, c: int, d: int) -> Any:
        phys, sizes = self.pieces(b, c, 1)
        return batch.link_many(self._state(a), phys, sizes, d % 4, offset=d % 3 * PAGE)

    def sync(self, a: int, b: int, c: int, d: int) -> Any:
        return self._state(a).sync(b if d % 3 else 0, c if d % 2 else None)

    def unlink(self, a: int, b: int, c: int, d: int) -> Any:
        return self._state(a).unlink(b % 6 * PAGE, c if c % 3 else PAGE, d % 4)

    def destroy(self, a: int, b: int, c: int, d: int) -> Any:
        state = self._state(a)
        return state.destroy(b if b % 3 else b % 5 * PAGE, c % 4), state.addr

    def undo(self, a: int, b: int, c: int, d: int) -> Any:
        return self._state(a).undo() if d % 2 else self._state(a).free()

    def map_window(self, a: int, b: int, c: int, d: int) -> Any:
        phys, sizes = self.pieces(a, b, c)
        state = self.device.map_window(phys, sizes, d % 4)
        self.states.append(state)
        return state.addr, state.size_word

    def map_windows(self, a: int, b: int, c: int, d: int) -> Any:
        phys, sizes = self.pieces(a, b, c)
        bounds = array("Q", sorted({0, c % (len(phys) + 1), len(phys)}))
        states = array("Q", bytes(16 * (len(bounds) - 1)))
        self.device.map_windows(phys, sizes, bounds, states, d % 4)
        self.windows.append(states)
        return states.tolist()

    def unmap_windows(self, a: int, b: int, c: int, d: int) -> Any:
        states = self.pick(self.windows, a)
        return None if states is None else (self.device.unmap_windows(states, d % 4), states.tolist())

    # Device, dirty pages, memory -----------------------------------------------------------------------------------

    def access(self, a: int, b: int, c: int, d: int) -> Any:
        addr, size, _ = self.singles[a % len(self.singles)] if self.singles else (b, 64, 0)
        if d % 2:
            return self.device.dma_write(addr, bytes([c & 255]) * min(size, 300))
        return hashlib.md5(self.device.dma_read(addr, min(size, 5000))).hexdigest()

    def dirty(self, a: int, b: int, c: int, d: int) -> Any:
        domain = self.device.domain
        if domain is None:
            return None
        if d % 5 == 0:
            return domain.set_dirty_tracking(bool(a & 1))
        if d % 5 == 1:
            return domain.map(DIRTY_BASE + a % 64 * PAGE, self.base, b % 5 * PAGE, 3)
        if d % 5 == 2:
            return domain.unmap(DIRTY_BASE + a % 64 * PAGE, b % 70 * PAGE)
        if d % 5 == 3:
            return self.device.port.write(DIRTY_BASE + a % (64 * PAGE), bytes(b % 5000))
        found = domain.read_and_clear_dirty(DIRTY_BASE, 64 * PAGE, self.bitmap.words[:1], flags=c & 1)
        return found, self.bitmap.pages().tolist()

    def bitmap_call(self, a: int, b: int, c: int, d: int) -> Any:
        calls: tuple[Callable[[], Any], ...] = (
            lambda: self.bitmap.set(a, b),
            lambda: self.bitmap.reset(a % 256, b % 300),
            lambda: self.bitmap.test(a),
            lambda: self.bitmap.set_many(array("Q", [a & 255, b & 511])),
            lambda: self.bitmap.coarsened(a % 40).words.tolist(),
            lambda: self.bitmap.refined(a % 12 - 2).words.tolist()[:8],
            lambda: self.bitmap.runs().tolist(),
        )
        return calls[d % len(calls)](), self.bitmap.count()

    def alloc_coherent(self, a: int, b: int, c: int, d: int) -> Any:
        memory = self.device.alloc_coherent(b if d % 4 == 0 else 1 + b % 20000)
        self.coherent.append(memory)
        return memory.addr, memory.size

    def free_coherent(self, a: int, b: int, c: int, d: int) -> Any:
        memory = self.pick(self.coherent, a)
        return None if memory is None else memory.free()

    # IOVA, failures, time ------------------------------------------------------------------------------------------

    def iova_alloc(self, a: int, b: int, c: int, d: int) -> Any:
        size = a if d % 7 == 0 else 1 + a % 70
        pfn = self.iovad.alloc_fast(size, b if d % 5 == 0 else 0xFFFFF, bool(c & 1), c % 3)
        self.ranges.append((pfn, size))
        return pfn

    def iova_free(self, a: int, b: int, c: int, d: int) -> Any:
        pfn, size = self.pick(self.ranges, a) or (b, c)
        return self.iovad.free_fast(pfn, size, d % 3)

    def iova_batch(self, a: int, b: int, c: int, d: int) -> Any:
        sizes = array("Q", [1 + (a + i * b) % 40 for i in range(c % 150)])
        pfns = array("Q", bytes(8 * len(sizes)))
        done = self.iovad.alloc_batch(sizes, 0xFFFFF if d % 3 else 300, pfns, bool(d & 1), d % 3)
        got = pfns.tolist()
        self.iovad.free_batch(pfns, sizes, d % 2)
        return done, got

    def reserve(self, a: int, b: int, c: int, d: int) -> Any:
        return self.iovad.reserve(a % 0x1000 + 0xFE000, b % 0x2000 + 0xFE000), self.iovad.node_count

    def fail_at(self, a: int, b: int, c: int, d: int) -> Any:
        return self.machine.fail.disarm() if d % 3 == 0 else self.machine.fail.arm(a % 12)

    def advance(self, a: int, b: int, c: int, d: int) -> Any:
        return self.machine.clock.advance(a % 20_000_000)

    # NVMe --------------------------------------------------------------------------------------------------------

    def nvme_map(self, a: int, b: int, c: int, d: int) -> Any:
        if self.mapper is None:
            source, options = DeviceSource(self.device), {"ledger": self.machine.ledger, "fail": self.machine.fail}
            small, large = (DescriptorPool(source, size, **options) for size in (SMALL_BYTES, LARGE_BYTES))
            self.mapper = RequestMapper(
                self.device, small, large, ledger=self.machine.ledger, sgl_supported=bool(a & 1), sgl_threshold=2 * PAGE
            )
        step = PAGE if d % 3 else 3 * PAGE // 2
        bvecs = [
            (self.base + (b + i * step) % (PAGES * PAGE - PAGE) // 4 * 4, 512 * (1 + c % 8)) for i in range(d % 12)
        ]
        iod = self.mapper.map(Request(Op.READ if a & 2 else Op.WRITE, bvecs, limits=QueueLimits()))
        self.iods.append(iod)
        lists = [hashlib.md5(bytes(block.words)).hexdigest() for block in self.mapper.prp.blocks(iod.chain)]
        return int(iod.status), iod.psdt, iod.low, iod.high, iod.path_name, int(iod.reason), iod.entries, lists

    def nvme_unmap(self, a: int, b: int, c: int, d: int) -> Any:
        iod = self.pick(self.iods, a)
        return None if iod is None or self.mapper is None else self.mapper.unmap(iod)

    # The end -----------------------------------------------------------------------------------------------------

    def tables(self) -> list[tuple[int, str]]:
        """(physical address, digest) of every table page, found by walking from the root."""
        domain = self.device.domain
        if domain is None:
            return []
        table, memory = domain.table, self.machine.memory
        found, queue = [], [(table.root, table.levels)]
        while queue:
            page, level = queue.pop()
            words = memory.words[page >> 3 : (page >> 3) + 512]
            found.append((page, hashlib.md5(bytes(words)).hexdigest()))
            for entry in words if level > 1 else ():
                if entry & table.fmt.present_bits and not (level <= 3 and entry & table.fmt.large_bit):
                    queue.append((entry & table.fmt.address_mask, level - 1))
        return found

    def end(self) -> dict[str, Any]:
        """Everything that is left to see."""
        device = self.device
        return {
            "tables": self.tables(),
            "ledger": self.machine.ledger.snapshot(),
            "locks": self.machine.ledger.lock_counts(),
            "events": [tuple(map(_plain, event)) for event in self.events],
            "live": self.machine.live(),
            "nodes": self.iovad.nodes(),
            "cached": self.iovad.cached_pfns(),
            "device nodes": device.iovad.nodes() if device.iovad is not None else [],
            "waiting": device.flush_queue.waiting() if device.flush_queue is not None else [],
            "bitmap": self.bitmap.words.tolist(),
            "memory": hashlib.md5(self.machine.memory.read(self.base, PAGES * PAGE)).hexdigest(),
            "reports": [str(report) for report in getattr(self.machine.checker, "reports", ())],
        }


OPERATIONS = tuple(
    name
    for name, thing in vars(Run).items()
    if callable(thing) and not name.startswith("_") and name not in ("piece", "pieces", "pick", "tables", "end")
)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else int(value)


def run(program: tuple[int, list[tuple[str, int, int, int, int]]]) -> list[Any]:
    """Every step's result or error, and the end."""
    config, steps = program
    made = Run(config)
    answers: list[Any] = []
    for name, *numbers in steps:
        try:
            answers.append(getattr(made, name)(*numbers))
        except DmakitError as error:
            answers.append((type(error).__name__, str(error), error.errno))
        except (TypeError, ValueError, OverflowError) as error:
            answers.append((type(error).__name__,))
        answers.append(int(made.device.why))
    answers.append(made.end())
    return answers
