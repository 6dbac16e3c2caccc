"""What the contract checker knows about one window of a two-step mapping, and the rules it checks there.

A ``Window`` follows one ``IovaState`` from try_alloc to destroy or free: which pieces are linked (as they were linked,
cut only by unlinks), which bytes no sync has covered yet. Methods that begin with ``check_`` look at a call before it
runs and yield the rules it would break, as (rule, text, errno); ``verify_`` look afterwards at what the stack did,
through translations and the allocator's own lists, and yield the promises it broke. Nothing here raises.

Addresses: offsets are bytes in the window; ``addr`` of offset 0 is the state's. A granule is the smallest page of
the IOMMU: what the device sees is whole granules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from dmakit import consts
from dmakit.dma.ranges import Ranges

Finding = tuple[str, str, int]


class Piece(NamedTuple):
    """[start, end) of the window, linked to physical address ``phys`` (``bounced``: through slots in part)."""

    start: int
    end: int
    phys: int
    direction: int
    attrs: int
    bounced: bool


class Tap:
    """While it is open, the events of some components go to one list of its own; then to their own lists too."""

    def __init__(self, *components: Any) -> None:
        self.components = [one for one in components if one is not None]
        self.saved = [one.events for one in self.components]
        self.events: list[tuple[Any, ...]] = []
        for one in self.components:
            one.events = self.events

    def close(self) -> list[tuple[Any, ...]]:
        """Put the components' own lists back and pass the events on, once a list; what was seen."""
        targets: list[list[Any]] = []
        for one, events in zip(self.components, self.saved, strict=True):
            one.events = events
            if events is not None and not any(events is target for target in targets):
                targets.append(events)
        for target in targets:
            target.extend(self.events)
        return self.events


class Window:
    """The pieces of one live window of ``device``."""

    def __init__(self, device: Any, state: Any) -> None:
        self.device = device
        self.state = state
        self.addr = int(state.addr)
        self.size = int(state.size)
        self.mask = int(device.merge_boundary)
        self.pieces: list[Piece] = []
        self.linked = Ranges()
        self.unsynced = Ranges()
        self.broken = False  # the link under way breaks a rule
        self.tap: Tap | None = None  # open while an unlink of bounced pieces runs

    def _granules(self, start: int, end: int) -> tuple[int, int]:
        """The bus addresses of the whole granules that hold [start, end) of the window."""
        return (self.addr + start) & ~self.mask, (self.addr + end + self.mask) & ~self.mask

    # Before a call -----------------------------------------------------------------------------------------

    def check_link(self, phys: int, offset: int, size: int) -> Iterator[Finding]:
        """The rules that a link would break."""
        end = offset + size
        what = f"link of [{offset:#x}, {end:#x}) to phys {phys:#x}"
        if end > self.size:
            yield "outside-window", f"{what} reaches beyond the window of {self.size:#x} bytes", consts.EINVAL
        if offset and phys & self.mask:
            yield "unaligned-interior", f"{what} starts inside a granule of {self.mask + 1:#x}", consts.EIO
        elif (self.addr + offset ^ phys) & self.mask:
            yield "alignment", f"{what}: offset and phys differ inside a granule of {self.mask + 1:#x}", consts.ENXIO
        low, high = self._granules(offset, end)
        later = [piece for piece in self.pieces if piece.start >= end]
        if later and (self.addr + end) & self.mask:
            text = f"{what} ends inside a granule, but [{later[0].start:#x}, {later[0].end:#x}) follows it"
            yield "unaligned-interior", text, consts.EINVAL
        for piece in self.pieces:
            if self._granules(piece.start, piece.end)[0] < high and low < self._granules(piece.start, piece.end)[1]:
                yield "overlapping-link", f"{what} overlaps [{piece.start:#x}, {piece.end:#x})", consts.EADDRINUSE
                break
            if piece.end <= offset and (self.addr + piece.end) & self.mask:
                text = f"{what} follows [{piece.start:#x}, {piece.end:#x}), which ends inside a granule"
                yield "unaligned-interior", text, consts.EINVAL

    def check_unlink(self, call: str, offset: int, size: int, direction: int, attrs: int) -> Iterator[Finding]:
        """The rules that an unlink, or the unlink in a destroy, would break."""
        end = offset + size
        what = f"{call} of [{offset:#x}, {end:#x})"
        if end > self.size:
            yield "outside-window", f"{what} reaches beyond the window of {self.size:#x} bytes", consts.EINVAL
        if size and not self.linked.covers(offset, end):
            rule = "unlink-not-linked" if call == "unlink" else "destroy-length"
            yield rule, f"{what}: linked is {self._linked_text()}", consts.EINVAL
        for piece in self.pieces:
            if piece.start >= end or offset >= piece.end:
                continue
            if piece.direction != direction:
                text = f"{what} passes direction {direction}, linked with {piece.direction}"
                yield "unlink-direction", text, consts.EINVAL
            if (piece.attrs ^ attrs) & consts.ATTR_MMIO:
                text = f"{what} passes attrs {attrs:#x}, linked with {piece.attrs:#x}"
                yield "unlink-attrs", text, consts.EINVAL
            for border in (offset, end):
                if piece.start < border < piece.end:
                    yield from self._check_border(what, piece, border)

    def _check_border(self, what: str, piece: Piece, border: int) -> Iterator[Finding]:
        """A range that begins or ends inside a piece."""
        inside = f"{what} cuts the piece [{piece.start:#x}, {piece.end:#x}) at {border:#x}"
        if (self.addr + border) & self.mask:
            yield "unlink-inside-granule", f"{inside}, inside a granule of {self.mask + 1:#x}", consts.EINVAL
        elif self.device.leaf_across(self.addr + border):
            yield "unlink-cuts-leaf", f"{inside}, inside a large leaf", consts.EINVAL

    def check_destroy(self, mapped_len: int, direction: int, attrs: int) -> Iterator[Finding]:
        """The rules that a destroy would break."""
        yield from self.check_unlink("destroy", 0, mapped_len, direction, attrs)
        if self.linked.overlaps(mapped_len, max(self.size, mapped_len + 1)):
            text = f"destroy with mapped_len={mapped_len:#x}: linked is {self._linked_text()}"
            yield "destroy-length", text, consts.EINVAL

    def check_free(self) -> Iterator[Finding]:
        """The rule that a free would break."""
        if self.linked:
            yield "free-while-linked", f"free of a window in which {self._linked_text()} is linked", consts.EINVAL

    def _linked_text(self) -> str:
        return ", ".join(f"[{start:#x}, {end:#x})" for start, end in self.linked) or "nothing"

    # What happened -------------------------------------------------------------------------------------------

    def note_link(self, phys: int, offset: int, size: int, direction: int, attrs: int) -> None:
        """A link succeeded."""
        bounced = bool(self.state.bounced) and bool((phys | size) & self.mask)
        self.pieces.append(Piece(offset, offset + size, phys, direction, attrs, bounced))
        self.linked.add(offset, offset + size)
        self.unsynced.add(offset, offset + size)

    def note_unlink(self, offset: int, size: int) -> None:
        """[offset, offset + size) is no longer linked."""
        end = offset + size
        kept = []
        for piece in self.pieces:
            if piece.start < offset:
                kept.append(piece._replace(end=min(piece.end, offset)))
            if piece.end > end:
                start = max(piece.start, end)
                kept.append(piece._replace(start=start, phys=piece.phys + start - piece.start))
        self.pieces = kept
        self.linked.remove(offset, end)
        self.unsynced.remove(offset, end)

    # After a call ------------------------------------------------------------------------------------------

    def _at(self, offset: int) -> int:
        return int(self.device.iova_to_phys(self.addr + offset))

    def verify_pieces(self, rule: str, what: str) -> Iterator[Finding]:
        """Every piece is translated at both ends, to its own memory unless it went through slots."""
        yield from self.verify_link(rule, what, self.pieces)

    def verify_link(self, rule: str, what: str, pieces: list[Piece]) -> Iterator[Finding]:
        """As ``verify_pieces``, for some of them."""
        for piece in pieces:
            for offset in (piece.start, piece.end - 1):
                phys = self._at(offset)
                expected = piece.phys + offset - piece.start
                if phys == 0 or (not piece.bounced and phys != expected):
                    text = f"after {what} the device reaches phys {phys:#x} at {offset:#x}, linked was {expected:#x}"
                    yield rule, text, consts.EFAULT

    def verify_gone(self, rule: str, what: str, offset: int, size: int) -> Iterator[Finding]:
        """No granule that belongs to [offset, offset + size) alone is translated any more."""
        low, high = self._granules(offset, offset + size)
        others = [self._granules(piece.start, piece.end) for piece in self.pieces]
        for addr in {low, high - self.mask - 1}:
            if any(start <= addr < end for start, end in others):
                continue
            phys = int(self.device.iova_to_phys(addr))
            if phys:
                yield (
                    rule,
                    f"after {what} the device still reaches phys {phys:#x} at {addr - self.addr:#x}",
                    consts.EFAULT,
                )

    def verify_freed(self, call: str) -> Iterator[Finding]:
        """The allocator's lists hold the window's IOVA at its full size, if they hold it at all."""
        shift = int(self.device.granule_shift)
        low, high = self._granules(0, self.size)
        pfn, pages = low >> shift, (high - low) >> shift
        queue = self.device.flush_queue
        found = [size for at, size in queue.waiting() if at == pfn] if queue is not None else []
        if found and found[-1] != pages:
            text = f"{call} queued {found[-1]} of the window's {pages} granules"
            yield "window-freed-partly", text, consts.EFAULT
        cached = [size for at, size in self.device.iovad.cached_pfns() if at == pfn]
        if cached and cached[-1] != 1 << (pages - 1).bit_length():
            text = f"{call} cached {cached[-1]} of the window's {pages} granules"
            yield "window-freed-partly", text, consts.EFAULT
