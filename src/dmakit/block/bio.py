"""A bio: memory for one range of a device, built piece by piece and split to what the queue can take.

``Bio.add`` packs tightly, as ``bio_add_page`` does: a piece that continues the last one physically extends it.
``split`` cuts a bio to a queue's limits and returns the requests in order: a request ends where another bvec
would break the segment count, the byte limit or the virtual boundary, and always on a logical block.

One quirk is kept, because it decides how a request is mapped: the gap before the bvec at which a bio is split
is counted for the front part, also when nothing of that bvec stays in it.

Models ``block/bio.c`` (``bio_add_page``) and ``block/blk-merge.c`` (``bio_split_io_at``, ``bvec_split_segs``).
"""

from __future__ import annotations

from dmakit.block.limits import SECTOR_SHIFT, QueueLimits
from dmakit.block.request import Request
from dmakit.block.segments import gap_between, lowest_bit, segment_room
from dmakit.errors import MisuseError

Piece = tuple[int, int]


class Bio:
    """Memory for [sector, sector + size/512) of a device; ``bvecs`` holds (phys, length) pieces."""

    def __init__(self, op: int, sector: int = 0, *, pack: bool = True) -> None:
        self.op = op
        self.sector = sector
        self.pack = pack
        self.bvecs: list[Piece] = []

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return sum(length for _, length in self.bvecs)

    def add(self, phys: int, length: int) -> Bio:
        """Append ``length`` bytes of memory at ``phys``; returns the bio."""
        if phys < 0 or length <= 0:
            raise MisuseError(f"bio: (phys={phys:#x}, length={length}): length must be positive, phys not negative")
        if self.pack and self.bvecs and sum(self.bvecs[-1]) == phys:
            start, before = self.bvecs[-1]
            self.bvecs[-1] = (start, before + length)
        else:
            self.bvecs.append((phys, length))
        return self


class _Cut:
    """What fits in the front part: bytes and segments so far."""

    def __init__(self, limits: QueueLimits, max_bytes: int) -> None:
        self.limits = limits
        self.max_bytes = max_bytes
        self.bytes = 0
        self.segments = 0

    def take(self, phys: int, length: int) -> bool:
        """Take as much of a bvec as fits; False when some of it does not."""
        limits = self.limits
        room = self.max_bytes - self.bytes
        left = min(length, room)
        taken = 0
        while left and self.segments < limits.max_segments:
            piece = segment_room(phys + taken, left, limits.max_segment_size, limits.seg_boundary_mask)
            self.segments += 1
            taken += piece
            left -= piece
            if (phys + taken) & limits.virt_boundary_mask:
                break
        self.bytes += taken
        return left == 0 and length <= room


def _front(bvecs: list[Piece], sector: int, limits: QueueLimits) -> tuple[int, int]:
    """(bytes, gap bit) of the part that makes the next request; bytes is a multiple of the logical block."""
    cut = _Cut(limits, limits.max_io_bytes(sector))
    gaps = 0
    before: Piece | None = None
    for phys, length in bvecs:
        if phys & limits.dma_alignment:
            raise MisuseError(
                f"bio: segment at {phys:#x} does not start on the DMA alignment {limits.dma_alignment:#x}"
            )
        if before is not None:
            gap = gap_between(before[0], before[1], phys)
            if gap & limits.virt_boundary_mask:
                break
            gaps |= gap
        if not cut.take(phys, length):
            break
        before = (phys, length)
    else:
        return cut.bytes, lowest_bit(gaps)
    return cut.bytes & ~(limits.logical_block_size - 1), lowest_bit(gaps)


def _divide(bvecs: list[Piece], size: int) -> tuple[list[Piece], list[Piece]]:
    """The first ``size`` bytes of the bvecs, and the rest."""
    front: list[Piece] = []
    for at, (phys, length) in enumerate(bvecs):
        if size == 0:
            return front, bvecs[at:]
        if length > size:
            return [*front, (phys, size)], [(phys + size, length - size), *bvecs[at + 1 :]]
        front.append((phys, length))
        size -= length
    return front, []


def split(bio: Bio, limits: QueueLimits, *, user_command: bool = False, cpu: int = 0) -> list[Request]:
    """The requests of ``bio`` in order; a bio without data gives one request without data."""
    if bio.size % limits.logical_block_size:
        raise MisuseError(f"bio: {bio.size} bytes are not a multiple of the {limits.logical_block_size}-byte block")
    rest, sector = list(bio.bvecs), bio.sector
    if not rest:
        return [Request(bio.op, sector=sector, limits=limits, user_command=user_command, cpu=cpu)]
    requests = []
    while rest:
        size, gap_bit = _front(rest, sector, limits)
        if size == 0:
            raise MisuseError(
                f"bio: no block-aligned part from sector {sector} fits in {limits.max_segments} segments and "
                f"{limits.max_bytes} bytes"
            )
        front, rest = _divide(rest, size)
        requests.append(
            Request(bio.op, front, sector=sector, limits=limits, user_command=user_command, cpu=cpu, gap_bit=gap_bit)
        )
        sector += size >> SECTOR_SHIFT
    return requests
