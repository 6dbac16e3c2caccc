"""The two rings of a queue pair, at C speed: submission entries written, completion entries checked and taken.

*Slot*: a place in the table of commands in flight, 0 to entries − 2; *identifier* (CID): the slot and, above it, a
4-bit generation that changes at every use, so that a completion that comes twice, or late, names nobody. *Tag*: 64 bits
of the caller's own; *deadline*: ns on the transport's clock, all-ones for never.

Whatever a completion entry says is checked before it is believed: the queue it names, the identifier, and the
submission head, which may only move from where it was to the tail. An entry that fails is a *lie*: it is consumed,
kept in ``lie`` (``LIES``), ``lie_low`` and ``lie_high``, and scanning stops until ``forgive``.

``submit`` and ``reap`` are the batch forms: arrays of 64-bit words in and out, no Python object an item, no GIL, one
doorbell each. ``push`` is the scalar form, an entry as 64 bytes; ``ring`` tells the controller. A ring belongs to one
thread at a time. ``bar`` is BAR 0 as 32-bit words when doorbells are plain stores, else None and ``write32`` is called.

Memory is given as 64-bit words and the index of each 4 KiB page's first word (it need not be contiguous).

Models ``drivers/nvme/host/pci.c`` (nvme_sq_copy_cmd, nvme_write_sq_db, nvme_poll_cq, nvme_handle_cqe) and ``nvme.h``
(nvme_cid: the generation).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable

import cython

from dmakit.errors import ExhaustedError, MisuseError
from dmakit.iova.arguments import apart
from dmakit.nvme.pool import words_of

if cython.compiled:
    from cython.cimports.dmakit.nvme.mmio import load64, store32

LIES = ("", "names another queue", "names a command that is not in flight", "has a submission head that cannot be")
MAX_ENTRIES = 4096
NEVER = (1 << 64) - 1

_NOTHING = -1
_BAD_QUEUE = -2
_BAD_COMMAND = -3
_BAD_HEAD = -4
_LIVE = 1 << 16


def _words(count: int) -> memoryview[int]:
    return memoryview(array("Q", bytes(8 * count)))


def _closed(offset: int, value: int) -> None:
    raise MisuseError("this queue is closed")


@cython.cclass
class Ring:
    """Both rings of queue ``qid``, of ``entries`` entries each; ``sq`` and ``cq`` are (words, page indices)."""

    def __init__(
        self,
        qid: int,
        entries: int,
        sq: Iterable[memoryview[int]],
        cq: Iterable[memoryview[int]],
        *,
        sq_doorbell: int,
        cq_doorbell: int,
        bar: memoryview[int] | None,
        write32: Callable[[int, int], None],
    ) -> None:
        if not 2 <= entries <= MAX_ENTRIES:
            raise MisuseError(f"entries={entries}: must lie in [2, {MAX_ENTRIES}]")
        if not 0 <= qid < 1 << 16 or sq_doorbell < 0 or cq_doorbell < 0 or (sq_doorbell | cq_doorbell) & 3:
            raise MisuseError(f"qid={qid}, doorbells at {sq_doorbell:#x}, {cq_doorbell:#x}: 16 bits, and 32-bit words")
        if bar is not None and (bar.format != "I" or cq_doorbell >= 4 * len(bar) or sq_doorbell >= 4 * len(bar)):
            raise MisuseError(f"bar: must be 32-bit words that reach the doorbell at {cq_doorbell:#x}")
        self.qid = qid
        self.entries = entries
        self.sq, self.sq_pages = _checked("sq", sq, entries, 64)
        self.cq, self.cq_pages = _checked("cq", cq, entries, 256)
        self.cids, self.tags = _words(entries), _words(entries)
        self.deadlines, self.idle = _words(entries), _words(entries)
        self.mapped = bar is not None
        self.bar = bar if bar is not None else memoryview(array("I", [0]))
        self.write32 = write32
        self.sq_doorbell, self.cq_doorbell = sq_doorbell, cq_doorbell
        self.submitted = self.completed = self.lie = 0
        self.restart()

    def restart(self) -> None:
        """As new: nothing is in flight, the completion ring is cleared (the controller has been reset)."""
        slot: cython.Py_ssize_t
        for slot in range(self.entries):
            self.cids[slot] = self.cids[slot] & 0xF000
            at: cython.ulonglong = self.cq_pages[slot >> 8] + ((slot & 255) << 1)
            self.cq[at] = 0
            self.cq[at + 1] = 0
        for slot in range(self.entries - 1):
            self.idle[slot] = self.entries - 2 - slot
        self.free_count = self.entries - 1
        self.tail = self.rung = self.head = self.told = self.sq_head = 0
        self.phase = 1
        self.forgive()

    def close(self) -> None:
        """Let go of the rings' memory and of the doorbells, which go away; nothing is in flight any more."""
        self.sq = self.cq = _words(64 * self.entries)
        self.sq_pages = _words(1 + self.entries // 64)
        self.cq_pages = _words(1 + self.entries // 64)
        self.mapped = False
        self.bar = memoryview(array("I", [0]))
        self.write32 = _closed

    # Slots --------------------------------------------------------------------------------------------------

    def _slot(self, tag: cython.ulonglong, deadline: cython.ulonglong) -> cython.int:
        """Take a slot (there is one) and give it a new identifier."""
        slot: cython.int
        self.free_count -= 1
        slot = self.idle[self.free_count]
        self.cids[slot] = ((self.cids[slot] + 0x1000) & 0xF000) | slot | _LIVE
        self.tags[slot] = tag
        self.deadlines[slot] = deadline
        return slot

    def _drop(self, slot: cython.int) -> cython.int:
        """Give a slot back; its identifier stays until the next use."""
        self.cids[slot] = self.cids[slot] & 0xFFFF
        self.idle[self.free_count] = slot
        self.free_count += 1
        return 0

    @property
    def in_flight(self) -> int:
        """Commands submitted and not completed."""
        return self.entries - 1 - self.free_count

    def identifier(self, slot: int) -> int:
        """The CID in use at ``slot``; -1 when the slot is idle."""
        return self.cids[slot] & 0xFFFF if 0 <= slot < self.entries and self.cids[slot] & _LIVE else -1

    def live(self) -> list[int]:
        """The slots in use."""
        return [slot for slot in range(self.entries) if self.cids[slot] & _LIVE]

    def tag(self, slot: int) -> int:
        """The tag of a slot."""
        return self.tags[slot] if 0 <= slot < self.entries else 0

    def deadline(self) -> int:
        """The earliest deadline in flight; ``NEVER`` when there is none."""
        return min((self.deadlines[slot] for slot in self.live()), default=NEVER)

    def overdue(self, now: int) -> list[int]:
        """The slots whose deadline has come."""
        return [slot for slot in self.live() if self.deadlines[slot] <= now]

    def extend(self, slot: int, deadline: int) -> None:
        """Give a command in flight another deadline."""
        if self.identifier(slot) < 0:
            raise MisuseError(f"queue {self.qid}: slot {slot} is not in use")
        self.deadlines[slot] = deadline

    # Submission ---------------------------------------------------------------------------------------------

    def _next(self) -> cython.ulonglong:
        """The first word of the entry at the tail, which moves on."""
        at: cython.ulonglong = self.sq_pages[self.tail >> 6] + ((self.tail & 63) << 3)
        self.tail += 1
        if self.tail == self.entries:
            self.tail = 0
        self.submitted += 1
        return at

    def _put(
        self,
        first: cython.ulonglong,
        low: cython.ulonglong,
        high: cython.ulonglong,
        lba: cython.ulonglong,
        last: cython.ulonglong,
    ) -> cython.void:
        """Write one read or write."""
        at: cython.ulonglong = self._next()
        self.sq[at] = first
        self.sq[at + 1] = 0
        self.sq[at + 2] = 0
        self.sq[at + 3] = low
        self.sq[at + 4] = high
        self.sq[at + 5] = lba
        self.sq[at + 6] = last
        self.sq[at + 7] = 0

    def _submit(
        self,
        first: cython.ulonglong,
        lbas: memoryview[int],
        counts: memoryview[int],
        low: memoryview[int],
        high: memoryview[int],
        tags: memoryview[int],
        n: cython.Py_ssize_t,
        deadline: cython.ulonglong,
    ) -> cython.Py_ssize_t:
        """Write up to ``n`` entries; how many found room, or −1 − i when ``counts[i]`` is no number of blocks."""
        i: cython.Py_ssize_t
        cid: cython.ulonglong
        if n > self.free_count:
            n = self.free_count
        for i in range(n):
            if counts[i] == 0 or counts[i] > 0x10000:
                return -1 - i
        for i in range(n):
            cid = self.cids[self._slot(tags[i], deadline)] & 0xFFFF
            self._put(first | cid << 16, low[i], high[i], lbas[i], counts[i] - 1)
        return n

    def _ring_mapped(self) -> cython.int:
        """Store the tail in its doorbell (compiled: after a write barrier)."""
        if cython.compiled:
            store32(cython.address(self.bar[self.sq_doorbell >> 2]), self.tail)
        else:
            self.bar[self.sq_doorbell >> 2] = self.tail
        self.rung = self.tail
        return 0

    def _tell_mapped(self) -> cython.int:
        """Store the head in its doorbell."""
        if cython.compiled:
            store32(cython.address(self.bar[self.cq_doorbell >> 2]), self.head)
        else:
            self.bar[self.cq_doorbell >> 2] = self.head
        self.told = self.head
        return 0

    def ring(self) -> None:
        """Tell the controller the new tail, when there is one."""
        if self.rung == self.tail:
            return
        if self.mapped:
            self._ring_mapped()
        else:
            self.rung = self.tail
            self.write32(self.sq_doorbell, self.tail)

    def tell(self) -> None:
        """Tell the controller which completions were taken, when there are any."""
        if self.told == self.head:
            return
        if self.mapped:
            self._tell_mapped()
        else:
            self.told = self.head
            self.write32(self.cq_doorbell, self.head)

    def push(self, entry: bytes, tag: int = 0, deadline: int = NEVER) -> int:
        """Write an entry of 64 bytes under a new identifier, without ringing; its slot. ExhaustedError when full."""
        if len(entry) != 64:
            raise MisuseError(f"entry of {len(entry)} bytes: a submission entry has 64")
        if self.free_count == 0:
            raise ExhaustedError(f"queue {self.qid}: all {self.entries - 1} commands are in flight", 11)
        words = memoryview(entry).cast("Q")
        slot: cython.int = self._slot(tag, deadline)
        at: cython.ulonglong = self._next()
        i: cython.Py_ssize_t
        for i in range(8):
            self.sq[at + i] = words[i]
        self.sq[at] = (words[0] & ~(0xFFFF << 16)) | (self.cids[slot] & 0xFFFF) << 16
        return slot

    def submit(
        self,
        opcode: int,
        nsid: int,
        lbas: memoryview[int],
        counts: memoryview[int],
        low: memoryview[int],
        high: memoryview[int],
        tags: memoryview[int],
        *,
        sgl: bool = False,
        deadline: int = NEVER,
    ) -> int:
        """Submit reads or writes of memory that is mapped already, and ring once; returns how many found room.

        Arrays of 64-bit words, as long as ``lbas``: first blocks, numbers of blocks (1 to 65536), the two words of the
        data pointer (PRP1 and PRP2; with ``sgl`` the descriptor), tags.
        """
        if not 0 <= opcode < 256 or not 0 <= nsid < 1 << 32:
            raise MisuseError(f"opcode={opcode}, nsid={nsid}: an opcode has 8 bits, a namespace identifier 32")
        first: cython.ulonglong = opcode | nsid << 32
        if sgl:
            first |= 1 << 14
        places = words_of("lbas", lbas)
        n: cython.Py_ssize_t = len(places)
        blocks, lows = words_of("counts", counts, n), words_of("low", low, n)
        highs, names = words_of("high", high, n), words_of("tags", tags, n)
        done: cython.Py_ssize_t = self._submit(first, places, blocks, lows, highs, names, n, deadline)
        if done < 0:
            raise MisuseError(f"counts[{-1 - done}]={blocks[-1 - done]}: one command transfers 1 to 65536 blocks")
        self.ring()
        return done

    # Completion ---------------------------------------------------------------------------------------------

    def _look(self) -> cython.int:
        """The entry at the head: its slot, ``_NOTHING``, or a lie; not consumed."""
        at: cython.ulonglong = self.cq_pages[self.head >> 8] + ((self.head & 255) << 1)
        high: cython.ulonglong
        slot: cython.int
        reach: cython.int
        moved: cython.int
        if cython.compiled:
            high = load64(cython.address(self.cq[at + 1]))
        else:
            high = self.cq[at + 1]
        if (high >> 48) & 1 != self.phase:
            return _NOTHING
        self.lie_low = self.cq[at]
        self.lie_high = high
        slot = (high >> 32) & 0xFFF
        if (high >> 16) & 0xFFFF != self.qid:
            return _BAD_QUEUE
        if slot >= self.entries or self.cids[slot] != ((high >> 32) & 0xFFFF | _LIVE):
            return _BAD_COMMAND
        reach = self.rung - self.sq_head
        if reach < 0:
            reach += self.entries
        moved = (high & 0xFFFF) - self.sq_head
        if moved < 0:
            moved += self.entries
        if (high & 0xFFFF) >= self.entries or moved > reach:
            return _BAD_HEAD
        self.sq_head = high & 0xFFFF
        self.status = high >> 49
        self.result = self.lie_low
        return slot

    def _reap(
        self,
        slots: memoryview[int],
        tags: memoryview[int],
        statuses: memoryview[int],
        results: memoryview[int],
        n: cython.Py_ssize_t,
    ) -> cython.Py_ssize_t:
        """Take up to ``n`` completions; stops at a lie, which is consumed."""
        done: cython.Py_ssize_t = 0
        slot: cython.int
        while done < n and self.lie == 0:
            slot = self._look()
            if slot == _NOTHING:
                break
            self.head += 1
            if self.head == self.entries:
                self.head = 0
                self.phase ^= 1
            if slot < 0:
                self.lie = -1 - slot
                break
            slots[done] = slot
            tags[done] = self.tags[slot]
            statuses[done] = self.status
            results[done] = self.result
            self._drop(slot)
            done += 1
        self.completed += done
        return done

    def reap(
        self,
        slots: memoryview[int],
        tags: memoryview[int],
        statuses: memoryview[int],
        results: memoryview[int],
    ) -> int:
        """Take the completions that are there, up to the length of ``slots``, and tell the controller; how many.

        Each has a slot (free again), the tag of its command, the 15-bit status field and dword 0 and 1. The arrays
        must not overlap.
        """
        places = words_of("slots", slots)
        n: cython.Py_ssize_t = len(places)
        names, codes, values = (
            words_of("tags", tags, n),
            words_of("statuses", statuses, n),
            words_of("results", results, n),
        )
        apart("slots", places, tags=names, statuses=codes, results=values)
        apart("tags", names, statuses=codes, results=values)
        apart("statuses", codes, results=values)
        done: cython.Py_ssize_t = self._reap(places, names, codes, values, n)
        self.tell()
        return done

    def waiting(self) -> bool:
        """Whether there is an entry to take."""
        return self._look() != _NOTHING

    def forgive(self) -> None:
        """Forget a lie and go on behind it."""
        self.lie = 0
        self.lie_low = self.lie_high = 0

    def drop(self, slot: int) -> None:
        """Forget a command that will never complete (its controller was reset)."""
        if self.identifier(slot) < 0:
            raise MisuseError(f"queue {self.qid}: slot {slot} is not in use")
        self._drop(slot)


def _checked(
    name: str, memory: Iterable[memoryview[int]], entries: int, per_page: int
) -> tuple[memoryview[int], memoryview[int]]:
    """The two arrays of a ring: 64-bit words, and a page index for every page it takes."""
    try:
        first, second = memory
    except (TypeError, ValueError, NotImplementedError):
        raise MisuseError(f"{name}: must be a pair of words and page indices") from None
    words, pages = words_of(name, first), words_of(f"{name} pages", second, -(-entries // per_page))
    page_words = per_page * (8 if per_page == 64 else 2)
    last = (entries - 1) % per_page + 1
    for at in range(-(-entries // per_page)):
        needed = (last if at == (entries - 1) // per_page else per_page) * (page_words // per_page)
        if pages[at] + needed > len(words):
            raise MisuseError(f"{name}: page {at} at word {pages[at]} is not inside {len(words)} words")
    return words, pages
