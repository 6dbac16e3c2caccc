"""Operations of a program: streaming mappings, windows, coherent memory, and the device's own accesses."""

from __future__ import annotations

import hashlib
from array import array
from typing import Any

from dmakit.dma import batch
from tests.pair.held import PAGE, PAGES, Held

WAYS = (0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4)


class Mapping(Held):
    """What a driver asks of its ``dma.Device``."""

    def set_up(self, config: int) -> None:
        super().set_up(config)
        self.lists: list[Any] = []
        self.states: list[Any] = []
        self.windows: list[array[int]] = []
        self.batches: list[tuple[array[int], array[int], int]] = []
        self.spans: list[Any] = []
        self.coherent: list[Any] = []

    # Streaming ---------------------------------------------------------------------------------------------------

    def map_phys(self, a: int, b: int, c: int, d: int) -> Any:
        (phys, size), direction = self.piece(a, b), WAYS[c % len(WAYS)]
        addr = self.device.map_phys(phys, size, direction, d & 0x3FF6 if d & 7 == 0 else 0, cpu=self.cpu(c))
        self.singles.append((addr, size, direction))
        return addr

    def map_resource(self, a: int, b: int, c: int, d: int) -> Any:
        phys, size = (self.bar + a % (1 << 19), b % (4 * PAGE)) if d % 4 else self.piece(a, b)
        addr = self.device.map_resource(phys, size, c % 3)
        self.singles.append((addr, size, c % 3))
        return addr

    def unmap_phys(self, a: int, b: int, c: int, d: int) -> Any:
        addr, size, direction = self.pick(self.singles, a) or (b, c, d % 4)
        return self.device.unmap_phys(addr, size, direction, cpu=self.cpu(d))

    def sync_single(self, a: int, b: int, c: int, d: int) -> Any:
        addr, size, direction = self.singles[a % len(self.singles)] if self.singles else (b, c, d % 4)
        self.device.sync_single_for_cpu(addr, size, direction)
        return self.device.sync_single_for_device(addr, max(size // 2, 1), direction)

    def map_sg(self, a: int, b: int, c: int, d: int) -> Any:
        segments = [self.piece(a + i * c, b + i) for i in range(d % 6)]
        sg = self.device.map_sg(segments, c % 4, cpu=self.cpu(a))
        self.lists.append(sg)
        return sg.segments, sg.inputs

    def sync_sg(self, a: int, b: int, c: int, d: int) -> Any:
        if not self.lists:
            return None
        sg = self.lists[a % len(self.lists)]
        return self.device.sync_sg_for_cpu(sg) if d % 2 else self.device.sync_sg_for_device(sg)

    def unmap_sg(self, a: int, b: int, c: int, d: int) -> Any:
        sg = self.pick(self.lists, a)
        return None if sg is None else (self.device.unmap_sg(sg), sg.live)

    def map_many(self, a: int, b: int, c: int, d: int) -> Any:
        phys, sizes = self.pieces(a, b, c)
        out = array("Q", bytes(8 * (len(phys) + (d % 7 == 6))))
        batch.map_many(self.device, phys, sizes, out, c % 4, cpu=self.cpu(d))
        self.batches.append((out, sizes, c % 4))
        return out.tolist()

    def unmap_many(self, a: int, b: int, c: int, d: int) -> Any:
        held = self.pick(self.batches, a)
        return None if held is None else batch.unmap_many(self.device, *held, cpu=self.cpu(b))

    def sync_singles(self, a: int, b: int, c: int, d: int) -> Any:
        """Ranges of a batch, or some that may not be mapped."""
        if not self.batches:
            return None
        out, sizes, direction = self.batches[a % len(self.batches)]
        if b % 9 == 8:
            out = array("Q", [place + c for place in out])
        call = batch.sync_many_for_cpu if d % 2 else batch.sync_many_for_device
        return call(self.device, out, sizes, direction)

    def map_ranges(self, a: int, b: int, c: int, d: int) -> Any:
        ranges = [self.piece((a + i * b) // PAGE * PAGE, PAGE * (1 + (c + i) % 3)) for i in range(d % 5)]
        made = self.device.map_ranges(ranges, c % 3)
        self.spans.append(made)
        return made.segments

    def unmap_ranges(self, a: int, b: int, c: int, d: int) -> Any:
        made = self.pick(self.spans, a)
        return None if made is None else made.unmap()

    # Two steps ---------------------------------------------------------------------------------------------------

    def try_alloc(self, a: int, b: int, c: int, d: int) -> Any:
        size = b if d % 4 == 0 else PAGE * (1 + b % 20)
        state = self.device.try_alloc(self.base + a % PAGE if a % 3 == 0 else 0, size, self.cpu(c))
        self.states.append(state)
        return state.addr, state.size, bool(state)

    def _state(self, at: int) -> Any:
        """Mostly a live window, now and then any, one of its own where there is none."""
        states = self.states if at % 7 == 6 else [state for state in self.states if state]
        if not states:
            states = [self.device.try_alloc(0, 16 * PAGE, self.cpu(at))]
            self.states += states
        return states[at % len(states)]

    def link(self, a: int, b: int, c: int, d: int) -> Any:
        phys, size = self.piece(b, d) if d % 5 == 4 else (self.base + b % PAGES * PAGE, PAGE * (1 + d % 3))
        state = self._state(a)
        place = c % 9 if d % 7 == 6 else c % max(1, state.size // PAGE)
        return state.link(phys, place * PAGE, size, WAYS[d % 10], cpu=self.cpu(c))

    def link_many(self, a: int, b: int, c: int, d: int) -> Any:
        phys, sizes = self.pieces(b, c, 1)
        state = self._state(a)
        place = d % 9 if d % 7 == 6 else d % max(1, state.size // PAGE - len(sizes) + 1)
        return batch.link_many(state, phys, sizes, WAYS[d % 10], offset=place * PAGE, cpu=self.cpu(c))

    def sync(self, a: int, b: int, c: int, d: int) -> Any:
        return self._state(a).sync(b if d % 3 else 0, c if d % 2 else None)

    def unlink(self, a: int, b: int, c: int, d: int) -> Any:
        return self._state(a).unlink(b % 6 * PAGE, c if c % 3 else PAGE, d % 4, cpu=self.cpu(d))

    def _spans(self, a: int, b: int, c: int) -> tuple[array[int], array[int]]:
        """Ranges of a window: pages in a row, with holes, twice, and one outside now and then."""
        offsets = [(b + i * (c % 3)) % 12 * PAGE for i in range(a % 7)]
        if offsets and c % 11 == 10:
            offsets[-1] = b
        return array("Q", offsets), array("Q", [PAGE * (1 + (b + i) % 2) for i in range(len(offsets))])

    def sync_many(self, a: int, b: int, c: int, d: int) -> Any:
        offsets, sizes = self._spans(a, b, c)
        return batch.sync_many(self._state(d), offsets, sizes, cpu=self.cpu(c) if c % 2 else None)

    def unlink_many(self, a: int, b: int, c: int, d: int) -> Any:
        offsets, sizes = self._spans(a, b, c)
        return batch.unlink_many(self._state(d), offsets, sizes, c % 4, cpu=self.cpu(c) if c % 2 else None)

    def destroy(self, a: int, b: int, c: int, d: int) -> Any:
        state = self._state(a)
        return state.destroy(b if b % 3 else b % 5 * PAGE, c % 4, cpu=self.cpu(d)), state.addr

    def undo(self, a: int, b: int, c: int, d: int) -> Any:
        return self._state(a).undo() if d % 2 else self._state(a).free()

    def map_window(self, a: int, b: int, c: int, d: int) -> Any:
        phys, sizes = self.pieces(a, b, c)
        state = self.device.map_window(phys, sizes, d % 4, 0, self.cpu(d))
        self.states.append(state)
        return state.addr, state.size_word

    def map_windows(self, a: int, b: int, c: int, d: int) -> Any:
        phys, sizes = self.pieces(a, b, c)
        bounds = array("Q", sorted({0, c % (len(phys) + 1), len(phys)}))
        if d % 11 == 10:
            bounds.append(a & 0xFFFF)
        states = array("Q", bytes(16 * (len(bounds) - 1)))
        self.device.map_windows(phys, sizes, bounds, states, d % 4, 0, self.cpu(d))
        self.windows.append(states)
        return states.tolist()

    def unmap_windows(self, a: int, b: int, c: int, d: int) -> Any:
        states = self.pick(self.windows, a)
        if states is None:
            return None
        return self.device.unmap_windows(states, d % 4, 0, self.cpu(b)), states.tolist()

    # The device ----------------------------------------------------------------------------------------------------

    def access(self, a: int, b: int, c: int, d: int) -> Any:
        addr, size, _ = self.singles[a % len(self.singles)] if self.singles else (b, 64, 0)
        if d % 2:
            return self.device.dma_write(addr, bytes([c & 255]) * min(size, 300))
        return hashlib.md5(self.device.dma_read(addr, min(size, 5000))).hexdigest()

    def set_device(self, a: int, b: int, c: int, d: int) -> Any:
        device = self.device
        if d % 4 == 0:
            return device.set_max_segment(a if c % 5 == 0 else PAGE << a % 5), device.merge_boundary
        if d % 4 == 1:
            return device.set_boundary(b if c % 5 == 0 else (1 << 12 + b % 40) - 1)
        if d % 4 == 2:
            return device.set_min_align_mask(a if c % 5 == 0 else (1 << a % 13) - 1), device.max_mapping_size()
        return device.opt_mapping_size(), device.need_unmap(), device.iova_to_phys(a)

    def alloc_coherent(self, a: int, b: int, c: int, d: int) -> Any:
        memory = self.device.alloc_coherent(b if d % 4 == 0 else 1 + b % 20000)
        self.coherent.append(memory)
        return memory.addr, memory.size

    def alloc_noncontiguous(self, a: int, b: int, c: int, d: int) -> Any:
        memory = self.device.alloc_noncontiguous(b if d % 4 == 0 else 1 + b % 50000, c % 3)
        self.coherent.append(memory)
        return memory.addr, memory.buffer.ranges

    def free_coherent(self, a: int, b: int, c: int, d: int) -> Any:
        memory = self.pick(self.coherent, a)
        return None if memory is None else memory.free()
