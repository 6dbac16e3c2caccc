"""Many requests mapped and unmapped by one call, without a Python object for any of them.

Requests are columns: a direction and a CPU each, and memory as segments of two arrays with bounds. What a driver keeps
for a request is a *row* of ``ROW`` words: the numbers of an ``Iod``. ``RowMapper`` is a ``RequestMapper``'s other face:
the same code maps, over one Iod that every request passes through, so that paths, reasons, descriptors, page tables and
every count of the ledger are those of ``map`` and ``unmap``. A window is two words of the row, as in
``dma.windows.map_windows``: the device does not list it among its live windows.

A request that cannot be mapped has a status in its row, as an Iod has, and nothing stays mapped of it. Vectors of
requests whose segments PRPs describe one by one are kept in slots of ``NVME_MAX_SEGS`` pairs, like the driver's own
memory pool for them.

Models what ``nvme_queue_rqs`` of ``drivers/nvme/host/pci.c`` does for a list of requests. Metadata, user commands and
the admin queue are for ``RequestMapper``.
"""

from __future__ import annotations

from array import array

import cython

from dmakit.block.limits import NVME_MAX_SEGS, QueueLimits
from dmakit.block.request import Op
from dmakit.block.status import BlkStatus
from dmakit.errors import MisuseError, UnsupportedError
from dmakit.iova.arguments import apart, words
from dmakit.reasons import Reason

if not cython.compiled:
    from dmakit.block.dma_iter import typed_device
    from dmakit.block.request import Payload, Request
    from dmakit.consts import (
        DMA_FROM_DEVICE,
        DMA_TO_DEVICE,
        EINVAL,
        L_BOOKKEEPING_BYTES,
        L_DESCRIPTORS,
        PATH_FAILED,
        PATH_NO_DATA,
    )
    from dmakit.dma.device import Device
    from dmakit.nvme.iod import Iod
    from dmakit.nvme.mapping import RequestMapper

ROW = 16  # words of a row, in this order
FIELDS: tuple[str, ...] = (
    *("status", "path", "reason", "psdt", "low", "high", "total", "entries"),
    *("flags", "map_type", "direction", "chain", "window_addr", "window_size", "vectors", "kept"),
)

_ROW = ROW
_SLOT = 2 * NVME_MAX_SEGS
_MAX_SEGMENTS = NVME_MAX_SEGS
_TAKEN = -2
_LONGEST = 1 << 32
_INVAL = int(BlkStatus.INVAL)
_NO_DATA = int(Reason.NO_DATA)


@cython.final
@cython.cclass
class RowMapper:
    """Maps columns of requests with ``mapper``, whose device must be one of dmakit's own; ``limits``: the queue's."""

    def __init__(self, mapper: RequestMapper, limits: QueueLimits | None = None) -> None:
        self.mapper = mapper
        self.payload = Payload([], limits or QueueLimits())
        self.iod = Iod(Request(Op.FLUSH))
        self.vectors = memoryview(array("Q"))
        self.free_next = memoryview(array("q"))
        self.free_first = -1
        self.slots = 0

    # One request --------------------------------------------------------------------------------------------

    def _map_one(self) -> cython.int:
        """Map the selected payload into ``iod``, as ``RequestMapper.map`` does; returns the status."""
        if self.payload.count == 0:
            self.iod.path = PATH_NO_DATA
            self.iod.reason = _NO_DATA
        elif self.payload.segments > _MAX_SEGMENTS:
            self.iod.status = _INVAL
            self.iod.path = PATH_FAILED
        else:
            self.mapper._map_data(self.iod, self.payload, self.mapper._choice(self.payload, False, False))
        if self.iod.status == 0:
            self.mapper.ledger.counts[L_DESCRIPTORS] += self.iod.entries
            self.mapper.ledger.counts[L_BOOKKEEPING_BYTES] += self.iod._bookkeeping()
        return self.iod.status

    def _store(self, rows: memoryview[int], at: cython.Py_ssize_t) -> cython.int:
        """Write the Iod to the row that begins at word ``at``."""
        slot: cython.Py_ssize_t = -1
        if self.iod.kept_count > 0:
            slot = self._keep()
        rows[at] = self.iod.status
        rows[at + 1] = self.iod.path
        rows[at + 2] = self.iod.reason
        rows[at + 3] = self.iod.psdt
        rows[at + 4] = self.iod.low
        rows[at + 5] = self.iod.high
        rows[at + 6] = self.iod.total
        rows[at + 7] = self.iod.entries
        rows[at + 8] = self.iod.flags
        rows[at + 9] = self.iod.map_type
        rows[at + 10] = self.iod.direction
        rows[at + 11] = self.iod.chain
        rows[at + 12] = self.iod.window_addr
        rows[at + 13] = self.iod.window_size
        rows[at + 14] = slot + 1
        rows[at + 15] = self.iod.kept_count
        return 0

    def _load(self, rows: memoryview[int], at: cython.Py_ssize_t, cpu: cython.int) -> cython.int:
        """Read the Iod from a row, which becomes zeros; -EINVAL, nothing taken, for numbers that no row has."""
        i: cython.Py_ssize_t = 0
        if rows[at + 10] > 3 or rows[at + 7] > _SLOT or rows[at + 8] > 15 or rows[at + 3] > 2 or rows[at + 9] > 4:
            return -EINVAL
        if rows[at + 15] > 0 and not self._known(rows[at + 14], rows[at + 15]):
            return -EINVAL
        self.iod._clear(rows[at + 10], cpu)
        self.iod.psdt = rows[at + 3]
        self.iod.low = rows[at + 4]
        self.iod.high = rows[at + 5]
        self.iod.total = rows[at + 6]
        self.iod.entries = rows[at + 7]
        self.iod.flags = rows[at + 8]
        self.iod.map_type = rows[at + 9]
        self.iod.chain = rows[at + 11]
        self.iod.window_addr = rows[at + 12]
        self.iod.window_size = rows[at + 13]
        if rows[at + 15] > 0:
            self._recall(rows[at + 14] - 1, rows[at + 15])
        while i < _ROW:
            rows[at + i] = 0
            i += 1
        return 0

    # Vectors ------------------------------------------------------------------------------------------------

    def _keep(self) -> cython.Py_ssize_t:
        """Move the Iod's vectors to a slot."""
        i: cython.Py_ssize_t = 0
        slot: cython.Py_ssize_t
        if self.free_first < 0:
            self._widen()
        slot = self.free_first
        self.free_first = self.free_next[slot]
        self.free_next[slot] = _TAKEN
        while i < 2 * self.iod.kept_count:
            self.vectors[slot * _SLOT + i] = self.iod.kept[i]
            i += 1
        return slot

    def _known(self, slot: cython.ulonglong, count: cython.ulonglong) -> cython.bint:
        """Whether a row may name this slot, from 1, and so many vectors."""
        return 0 < slot <= self.slots and count <= _MAX_SEGMENTS and self.free_next[slot - 1] == _TAKEN

    def _recall(self, slot: cython.Py_ssize_t, count: cython.Py_ssize_t) -> cython.int:
        """Move vectors back into the Iod."""
        i: cython.Py_ssize_t = 0
        while i < count:
            self.iod._keep(self.vectors[slot * _SLOT + 2 * i], self.vectors[slot * _SLOT + 2 * i + 1])
            i += 1
        self.free_next[slot] = self.free_first
        self.free_first = slot
        return 0

    def _widen(self) -> cython.int:
        """Double the slots."""
        first = self.slots
        self.slots = max(4, 2 * first)
        self.vectors = memoryview(array("Q", bytes(self.vectors) + bytes(8 * _SLOT * (self.slots - first))))
        self.free_next = memoryview(array("q", bytes(self.free_next) + bytes(8 * (self.slots - first))))
        for slot in range(first, self.slots):
            self.free_next[slot] = slot + 1 if slot + 1 < self.slots else -1
        self.free_first = first
        return 0

    # Many requests ------------------------------------------------------------------------------------------

    def _ours(self, call: str) -> Device:
        """The mapper's device; UnsupportedError when it is not one of ours."""
        own = typed_device(self.mapper.device, 0)
        if own is None:
            raise UnsupportedError(f"{call}: the device must be one of dmakit's own, without a contract checker")
        return own

    def _ready(self) -> None:
        """Make the mapper's iterator ready for windows of two words; the caller has the machine's turn."""
        mapper: RequestMapper = self.mapper
        mapper.walk._prepare(self.payload, mapper.device, mapper.peer, 0)
        mapper.walk._without_objects()
        mapper.own = mapper.walk.own

    def _wrong(
        self,
        directions: memoryview[int],
        cpus: memoryview[int],
        bounds: memoryview[int],
        count: cython.Py_ssize_t,
        cpu_count: cython.ulonglong,
    ) -> cython.Py_ssize_t:
        """The first request that has no such direction, CPU or memory; ``count`` when all are right."""
        i: cython.Py_ssize_t = 0
        at: cython.ulonglong
        pieces: cython.ulonglong = len(self.payload.phys)
        while i < count:
            if directions[i] != DMA_TO_DEVICE and directions[i] != DMA_FROM_DEVICE:
                return i
            if cpus[i] >= cpu_count or bounds[i + 1] < bounds[i] or bounds[i + 1] > pieces:
                return i
            at = bounds[i]
            while at < bounds[i + 1]:
                if self.payload.phys[at] >> 63 != 0 or not 0 < self.payload.length[at] <= _LONGEST:
                    return i
                at += 1
            i += 1
        return count

    def _exist(self, cpus: memoryview[int], count: cython.Py_ssize_t, cpu_count: cython.ulonglong) -> cython.bint:
        """Whether the first ``count`` CPUs are there."""
        i: cython.Py_ssize_t = 0
        while i < count and cpus[i] < cpu_count:
            i += 1
        return i == count

    def _map_run(
        self,
        directions: memoryview[int],
        cpus: memoryview[int],
        bounds: memoryview[int],
        rows: memoryview[int],
        count: cython.Py_ssize_t,
    ) -> cython.Py_ssize_t:
        """Map every request; how many have status 0."""
        i: cython.Py_ssize_t = 0
        mapped: cython.Py_ssize_t = 0
        with cython.nogil:
            while i < count:
                self.payload._select(bounds[i], bounds[i + 1])
                self.mapper.walk._aim(bounds[i], bounds[i + 1], cpus[i])
                self.iod._clear(directions[i], cpus[i])
                if self._map_one() == 0:
                    mapped += 1
                self._store(rows, _ROW * i)
                i += 1
        return mapped

    def _unmap_run(self, rows: memoryview[int], cpus: memoryview[int], count: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """Unmap row after row; how many, fewer than ``count`` when one is none."""
        i: cython.Py_ssize_t = 0
        with cython.nogil:
            while i < count:
                if self._load(rows, _ROW * i, cpus[i]) != 0:
                    break
                self.mapper._unmap_data(self.iod, cpus[i])
                i += 1
        return i

    # Public -------------------------------------------------------------------------------------------------

    def map_many(
        self, directions: object, cpus: object, phys: object, lengths: object, bounds: object, rows: object
    ) -> int:
        """Map many requests; how many could be (``rows[ROW * i]`` is the status of request i).

        Buffers of 64-bit words: request i goes in ``directions[i]`` (``consts.DMA_TO_DEVICE`` or ``DMA_FROM_DEVICE``),
        by ``cpus[i]``, with the segments ``bounds[i]`` to ``bounds[i+1]`` − 1 of ``phys`` and ``lengths``; ``rows`` has
        ``ROW`` words a request (``FIELDS``) and must not overlap another array. MisuseError, nothing done, names the
        first request that is wrong; UnsupportedError where the device is not one of dmakit's own.
        """
        ways, on, edges = words("directions", directions), words("cpus", cpus), words("bounds", bounds)
        places, sizes, out = words("phys", phys), words("lengths", lengths), words("rows", rows, writable=True)
        count = len(edges) - 1
        for name, there, needed in (
            ("bounds", edges, 1),
            ("directions", ways, count),
            ("cpus", on, count),
            ("lengths", sizes, len(places)),
            ("rows", out, ROW * count),
        ):
            if len(there) < needed:
                raise MisuseError(f"{name}: has {len(there)} words, at least {needed} are needed")
        apart("rows", out, directions=ways, cpus=on, phys=places, lengths=sizes, bounds=edges)
        ledger = self._ours("map_many").ledger
        with ledger.turn:
            self.payload._over(memoryview(array("Q", bytes(places))), memoryview(array("Q", bytes(sizes))))
            wrong = int(self._wrong(ways, on, edges, count, ledger.cpus))
            if wrong < count:
                raise MisuseError(
                    f"map_many: request {wrong}: its direction, its CPU, its bounds or a segment of it is out of range"
                )
            self._ready()
            mapped = int(self._map_run(ways, on, edges, out, count))
            self.iod.error = None
        return mapped

    def unmap_many(self, rows: object, cpus: object) -> None:
        """Unmap the requests of ``map_many``, each by its CPU; rows become zeros, and rows of zeros are left alone.

        MisuseError at the first row that ``map_many`` did not write; those before it are unmapped.
        """
        live, on = words("rows", rows, writable=True), words("cpus", cpus)
        count = len(live) // ROW
        if len(on) < count:
            raise MisuseError(f"cpus: has {len(on)} words, at least {count} are needed")
        apart("rows", live, cpus=on)
        ledger = self._ours("unmap_many").ledger
        if not self._exist(on, count, ledger.cpus):
            raise MisuseError(f"cpus: must be below {ledger.cpus}")
        with ledger.turn:
            self._ready()
            done = int(self._unmap_run(live, on, count))
        if done < count:
            raise MisuseError(f"unmap_many: row {done}: its numbers are not those of a request that was mapped")
