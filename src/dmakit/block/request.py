"""A request: one I/O as the driver gets it, with its memory and what the block layer knows about that memory.

A ``Payload`` is memory described by bvecs in two flat arrays, with what is computed once when it is made:
its size, the lowest gap bit between neighbours, and the number of physical segments. A ``Request`` has a data
payload and, with protection information, an integrity payload; both are walked by the same iterator.

Vocabulary: ``gap_mask`` has the lowest gap bit and every higher one set (0: no gap anywhere). ``segments`` is
``blk_rq_nr_phys_segments``: counted bvec by bvec within the limits, as the split code does; the iterator may
yield fewer, because it also merges bvecs that happen to be contiguous. Sectors have 512 bytes.

Models ``struct request`` (``include/linux/blk-mq.h``) and the counting in ``block/blk-merge.c``.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any

import cython

from dmakit.block.limits import SECTOR_SHIFT, QueueLimits
from dmakit.errors import MisuseError
from dmakit.iova.arguments import pairs
from dmakit.ledger import MOST_CPUS

if not cython.compiled:
    from dmakit.block.segments import SegmentIter, gap_between, lowest_bit, mergeable, segment_room, smaller_bit
    from dmakit.consts import DMA_FROM_DEVICE, DMA_NONE, DMA_TO_DEVICE


class Op(IntEnum):
    """Request operations (``REQ_OP_*``)."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    WRITE_ZEROES = 9
    DRV_IN = 34
    DRV_OUT = 35


_DIRECTIONS = {
    Op.READ: DMA_FROM_DEVICE,
    Op.WRITE: DMA_TO_DEVICE,
    Op.FLUSH: DMA_NONE,
    Op.DISCARD: DMA_TO_DEVICE,
    Op.WRITE_ZEROES: DMA_NONE,
    Op.DRV_IN: DMA_FROM_DEVICE,
    Op.DRV_OUT: DMA_TO_DEVICE,
}


@cython.cclass
class Payload:
    """Memory of a request: ``bvecs`` is a sequence of (phys, length), lengths in bytes and above 0."""

    def __init__(self, bvecs: Iterable[tuple[int, int]], limits: QueueLimits, gap_bit: int = -1) -> None:
        if not isinstance(limits, QueueLimits):
            raise TypeError(f"limits={limits!r}: must be QueueLimits")
        given: Any = pairs("bvecs", bvecs)
        for phys, length in given:
            if phys < 0 or phys >= 1 << 63 or length <= 0 or length > 1 << 32:
                raise MisuseError(
                    f"segment (phys={phys:#x}, length={length}): phys must lie in [0, 2^63), length in [1, 2^32]"
                )
        self.first = 0
        self.count = len(given)
        self.phys = memoryview(array("Q", [phys for phys, _ in given] or [0]))
        self.length = memoryview(array("Q", [length for _, length in given] or [0]))
        self.max_size = limits.max_segment_size
        self.boundary = limits.seg_boundary_mask
        self.virt_boundary = limits.virt_boundary_mask
        self._measure()
        if gap_bit >= 0:
            self.gap_bit = gap_bit

    def _over(self, phys: memoryview[int], length: memoryview[int]) -> cython.int:
        """Look at bvecs in columns of somebody else's, of which ``_select`` says the part."""
        self.phys = phys
        self.length = length
        self._select(0, 0)
        return 0

    def _select(self, first: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.void:
        """Be the bvecs ``first`` to ``end`` − 1."""
        self.first = first
        self.count = end - first
        self._measure()

    def _measure(self) -> cython.void:
        """Size, physical segments and gap bit, in one pass over the bvecs."""
        at: cython.Py_ssize_t
        gaps: cython.ulonglong = 0
        left: cython.ulonglong
        room: cython.ulonglong
        phys: cython.ulonglong
        self.size = 0
        self.segments = 0
        for at in range(self.first, self.first + self.count):
            phys = self.phys[at]
            left = self.length[at]
            if at > self.first:
                gaps |= gap_between(self.phys[at - 1], self.length[at - 1], phys)
            self.size += left
            while left > 0:
                room = segment_room(phys, left, self.max_size, self.boundary)
                phys += room
                left -= room
                self.segments += 1
        self.gap_bit = lowest_bit(gaps)

    def _may_coalesce(self, merge_boundary: cython.ulonglong, gap_rule: cython.bint) -> cython.bint:
        """Whether one window may hold all of it, given the device's merge boundary (``block.dma_iter``)."""
        if not gap_rule:
            return (self.virt_boundary + 1) & merge_boundary == 0
        return self.gap_bit <= 0 or self.gap_bit > 64 or merge_boundary >> (self.gap_bit - 1) == 0

    def _iterate(self, walk: SegmentIter) -> cython.void:
        """Start ``walk`` on this payload."""
        walk._begin(self.phys, self.length, self.count, self.max_size, self.boundary)

    @property
    def gap_mask(self) -> int:
        """The lowest gap bit and all higher ones of 64 (``req_phys_gap_mask``); 0 without a gap."""
        return ((1 << 64) - 1) & ~((1 << (self.gap_bit - 1)) - 1) if self.gap_bit else 0

    @property
    def bvecs(self) -> list[tuple[int, int]]:
        """The bvecs as they were added."""
        return [(self.phys[i], self.length[i]) for i in range(self.count)]

    @property
    def vectors(self) -> list[tuple[int, int]]:
        """The merged segments that the iterator yields."""
        walk = SegmentIter()
        self._iterate(walk)
        found = []
        while walk._next():
            found.append((walk.paddr, walk.size))
        return found


@cython.cclass
class Request:
    """One I/O: operation, first 512-byte sector, data and integrity payloads, the CPU that submits it.

    ``user_command``: a passthrough command of user space (NVMe then prefers SGLs, which carry the length).
    ``ranges``: for DISCARD, the (sector, sectors) ranges. ``context`` and ``tag`` belong to the driver.
    """

    def __init__(
        self,
        op: int,
        bvecs: Iterable[tuple[int, int]] = (),
        *,
        sector: int = 0,
        limits: QueueLimits | None = None,
        integrity: Iterable[tuple[int, int]] = (),
        user_command: bool = False,
        ranges: Sequence[tuple[int, int]] = (),
        cpu: int = 0,
        gap_bit: int = -1,
    ) -> None:
        if sector < 0 or sector >= 1 << 55:
            raise MisuseError(f"sector={sector}: must lie in [0, 2^55)")
        if cpu < 0 or cpu >= MOST_CPUS:
            raise MisuseError(f"cpu={cpu}: must be 0 to {MOST_CPUS - 1}")
        self.op = Op(op)
        self.direction = _DIRECTIONS[Op(op)]
        self.sector = sector
        self.limits = limits or QueueLimits()
        self.data = Payload(bvecs, self.limits, gap_bit)
        self.integrity = Payload(integrity, self.limits)
        self.user_command = user_command
        self.ranges = tuple(pairs("ranges", ranges))
        self.cpu = cpu
        self.tag = -1
        self.context: object = None
        if self.data.size and self.direction == DMA_NONE:
            raise MisuseError(f"{Op(op).name}: carries no data, but {self.data.count} segments were given")
        if self.integrity.segments > self.limits.max_integrity_segments:
            raise MisuseError(
                f"{self.integrity.segments} integrity segments: the queue takes at most "
                f"{self.limits.max_integrity_segments}"
            )

    @property
    def payload_bytes(self) -> int:
        """Bytes of data (``blk_rq_payload_bytes``)."""
        return self.data.size

    @property
    def segments(self) -> int:
        """Number of physical data segments (``blk_rq_nr_phys_segments``)."""
        return self.data.segments

    @property
    def gap_bit(self) -> int:
        """Lowest gap bit between data neighbours, from 1; 0 without a gap (``phys_gap_bit``)."""
        return self.data.gap_bit

    @property
    def gap_mask(self) -> int:
        """See ``Payload.gap_mask``."""
        return self.data.gap_mask

    def merge_back(self, other: Request) -> Request:
        """One request of this one's data followed by ``other``'s, as the block layer merges adjacent I/O.

        The two must be adjacent on the device; together they must stay within the queue's limits. A contiguous
        meeting point leaves no gap, whatever its alignment.
        """
        limits: QueueLimits = self.limits
        if self.op != other.op or self.sector + (self.data.size >> SECTOR_SHIFT) != other.sector:
            raise MisuseError(f"merge: sector {other.sector} does not continue a request that starts at {self.sector}")
        if not self.data.count or not other.data.count:
            raise MisuseError("merge: both requests must carry data")
        phys, length = self.data.bvecs[self.data.count - 1]
        first, more = other.data.bvecs[0]
        joined = mergeable(phys, length, first, more, limits.seg_boundary_mask)
        gap = gap_between(phys, length, first)
        if not joined and gap & limits.virt_boundary_mask:
            raise MisuseError(f"merge: gap {gap:#x} lies within the virtual boundary {limits.virt_boundary_mask:#x}")
        bit = smaller_bit(self.data.gap_bit, other.data.gap_bit)
        bit = bit if joined else smaller_bit(bit, lowest_bit(gap))
        merged = Request(
            self.op,
            self.data.bvecs + other.data.bvecs,
            sector=self.sector,
            limits=limits,
            integrity=self.integrity.bvecs + other.integrity.bvecs,
            user_command=self.user_command,
            cpu=self.cpu,
            gap_bit=bit,
        )
        if merged.data.size > limits.max_bytes or merged.data.segments > limits.max_segments:
            raise MisuseError(
                f"merge: {merged.data.size} bytes in {merged.data.segments} segments exceed the queue's "
                f"{limits.max_bytes} bytes in {limits.max_segments} segments"
            )
        return merged
