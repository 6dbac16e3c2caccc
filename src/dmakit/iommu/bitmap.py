"""Dirty bitmaps: bit ``i`` stands for page ``i``, little-endian in words of 64 bits, as iommufd and VFIO keep them.

What a migration does with them between two reads: OR one source's pages into those of all, count them, list the pages
to send (one by one, or as runs of neighbours), clear, and convert between granularities: a device that logs 2 MiB
blocks dirties 512 pages of 4 KiB (``refined``), one that sends 64 KiB needs one bit for sixteen (``coarsened``).

Each pass runs at the speed of memory, without a Python object a word and without the GIL:

* *Count*: a plain loop, compiled twice (``total_t`` in the .pxd): for a processor that counts the bits of a word in one
  instruction, and for one that does not; the loader chooses. It asks far ahead (``__builtin_prefetch``), one line at a
  time between the words of another: asked for in bursts the lines come a quarter slower.
* *OR*: asking for both streams far ahead makes it as fast as a copy.
* *List*: at one dirty page in a hundred a word holds 0, 1 or 2 bits, and a loop "while there is a bit" is mispredicted
  at almost every word. So a block of words is first thinned out, without a branch, to those that are not 0; of each
  the lowest three bits are written, and the position moves on only by those that exist; only a fourth bit takes a
  branch. ``out`` needs room for a whole word, thus at least 64 items. Blocks are short, so that reading and writing
  take turns often enough for both streams to stay busy; both are asked for while thinning.
* *Runs*: the same, on the bits of ``word ^ (word << 1 | last bit of the word before)``: they are where runs begin and,
  in turn, end. They are made while thinning.
* *Convert*: see ``granularity.py``.

Threads may share a bitmap: each call is one step for the others (a bitmap has a ``turn`` of its own). Who writes to
``words`` himself, or hands them to ``read_and_clear_dirty`` of two machines at once, is outside of that: an OR of two
threads into one word loses bits.
"""

from __future__ import annotations

from typing import SupportsIndex

import cython

from dmakit.errors import ExhaustedError, MisuseError
from dmakit.iova.arguments import apart, within
from dmakit.iova.arguments import words as as_words
from dmakit.iova.arrays import zeroed

if cython.compiled:
    from cython.cimports.libc.string import memset
else:
    from dmakit.iommu.granularity import coarsen, refine
    from dmakit.turn import Turn

    total_t = cython.ulonglong
    _LOW_63 = 0x7FFFFFFFFFFFFFFF

    def __builtin_prefetch(place: int) -> None:
        """Nothing to fetch ahead."""

    def _prefetch_to_write(place: int) -> None:
        """Nothing to fetch ahead."""

    def __builtin_popcountll(word: int) -> int:
        """The number of bits set."""
        return word.bit_count()

    def __builtin_ctzll(word: int) -> int:
        """The number of the lowest bit; any number for 0."""
        return (word & -word).bit_length() - 1 if word else 0


_MOST = 1 << 40  # bits; 1 TiB of 4 KiB pages is 2**28
_MOST_SHIFT = 36
_BLOCK = 64  # words that are thinned out at a time


def _count(words: memoryview[int]) -> total_t:
    """Bits set in all words."""
    n: cython.Py_ssize_t = len(words)
    i: cython.Py_ssize_t = 0
    j: cython.Py_ssize_t = 0
    total: cython.ulonglong = 0
    while i + 8 <= n:
        if cython.compiled:
            __builtin_prefetch(cython.address(words[i]) + 512)
        for j in range(i, i + 8):
            total += __builtin_popcountll(words[j])
        i += 8
    while i < n:
        total += __builtin_popcountll(words[i])
        i += 1
    return total


def _merge(target: memoryview[int], source: memoryview[int]) -> cython.void:
    """target |= source, of the same length."""
    i: cython.Py_ssize_t = 0
    j: cython.Py_ssize_t = 0
    n: cython.Py_ssize_t = len(target)
    while i + 8 <= n:
        if cython.compiled:
            _prefetch_to_write(cython.address(target[i]) + 512)
            __builtin_prefetch(cython.address(source[i]) + 512)
        for j in range(i, i + 8):
            target[j] = target[j] | source[j]
        i += 8
    while i < n:
        target[i] = target[i] | source[i]
        i += 1


def _take(target: memoryview[int], source: memoryview[int]) -> cython.void:
    """target |= source, source = 0, in one pass."""
    i: cython.Py_ssize_t = 0
    n: cython.Py_ssize_t = len(target)
    while i < n:
        target[i] = target[i] | source[i]
        source[i] = 0
        i += 1


def _clear(words: memoryview[int]) -> cython.void:
    """All words 0."""
    if cython.compiled:
        if len(words) > 0:
            memset(cython.address(words[0]), 0, len(words) * 8)
    else:
        words[:] = zeroed("Q", len(words))


def _mask(low: cython.int, width: cython.int) -> cython.ulonglong:
    """``width`` (1 to 64) ones from bit ``low``; low + width <= 64."""
    one: cython.ulonglong = 1
    return (((one << (width - 1)) - 1) | (one << (width - 1))) << low


def set_range(words: memoryview[int], first: cython.ulonglong, last: cython.ulonglong) -> cython.void:
    """Set bits ``first`` to ``last``."""
    while first <= last:
        width: cython.ulonglong = min(64 - (first & 63), last - first + 1)
        words[first >> 6] |= _mask(first & 63, width)
        first += width


def _clear_range(words: memoryview[int], first: cython.ulonglong, last: cython.ulonglong) -> cython.void:
    """Clear bits ``first`` to ``last``."""
    while first <= last:
        width: cython.ulonglong = min(64 - (first & 63), last - first + 1)
        words[first >> 6] &= ~_mask(first & 63, width)
        first += width


def _emit(
    word: cython.ulonglong, base: cython.ulonglong, out: memoryview[int], at: cython.Py_ssize_t
) -> cython.Py_ssize_t:
    """Write ``base`` + the number of each bit of ``word``, not 0, to ``out`` from ``at`` (64 fit); the place behind."""
    guard: cython.ulonglong = 1
    guard <<= 63  # a count of zeros is undefined for 0
    out[at] = base + __builtin_ctzll(word)
    at += 1
    word &= word - 1
    out[at] = base + __builtin_ctzll(word | guard)
    at += word != 0
    word &= word - 1
    out[at] = base + __builtin_ctzll(word | guard)
    at += word != 0
    word &= word - 1
    if word != 0:
        while word != 0:
            out[at] = base + __builtin_ctzll(word)
            at += 1
            word &= word - 1
    return at


def _thin(
    words: memoryview[int], places: memoryview[int], out: memoryview[int], at: cython.Py_ssize_t
) -> cython.Py_ssize_t:
    """Write the positions of the words that are not 0 to ``places``; how many they are.

    Meanwhile ask for the words that come next, and for the items of ``out`` that will be written from ``at``.
    """
    n: cython.Py_ssize_t = len(words)
    i: cython.Py_ssize_t = 0
    j: cython.Py_ssize_t = 0
    found: cython.Py_ssize_t = 0
    while i + 8 <= n:
        if cython.compiled:
            __builtin_prefetch(cython.address(words[i]) + 512)
            _prefetch_to_write(cython.address(out[at]) + 512 + i)
        for j in range(i, i + 8):
            places[found] = j
            found += words[j] != 0
        i += 8
    for j in range(i, n):
        places[found] = j
        found += words[j] != 0
    return found


def _thin_edges(
    words: memoryview[int], places: memoryview[int], edges: memoryview[int], before: cython.ulonglong
) -> cython.Py_ssize_t:
    """``_thin`` for the bits where runs begin and end, kept in ``edges``; ``before``: the bit before the first word."""
    n: cython.Py_ssize_t = len(words)
    i: cython.Py_ssize_t = 0
    j: cython.Py_ssize_t = 0
    found: cython.Py_ssize_t = 0
    word: cython.ulonglong = 0
    edge: cython.ulonglong = 0
    while i < n:
        if cython.compiled:
            __builtin_prefetch(cython.address(words[i]) + 512)
        for j in range(i, min(i + 8, n)):
            word = words[j]
            edge = word ^ (((word & _LOW_63) << 1) | before)
            edges[found] = edge
            places[found] = j
            found += edge != 0
            before = word >> 63
        i += 8
    return found


def _clear_words(words: int, bits: int) -> memoryview[int]:
    try:
        return zeroed("Q", words)
    except MemoryError:
        raise ExhaustedError(f"no memory for a bitmap of {bits} bits") from None


@cython.cclass
class Bitmap:
    """``bits`` dirty bits, all clear, or over ``words``: a buffer of 64-bit words (a mapped bitmap).

    ``words`` is the memory itself, to hand to ``read_and_clear_dirty`` or to NumPy. Bits above ``bits`` in the last
    word stay 0: MisuseError when a given buffer has some, has too few words, or is read-only.
    """

    def __init__(self, bits: SupportsIndex, words: object | None = None) -> None:
        size = within("bits", bits, 1, _MOST)
        needed = (size + 63) >> 6
        marks = _clear_words(needed, size) if words is None else as_words("words", words, writable=True)
        if len(marks) != needed:
            raise MisuseError(f"words: has {len(marks)}, {size} bits need {needed}")
        if size & 63 and marks[needed - 1] >> (size & 63):
            raise MisuseError(f"words: bits above {size} are set in the last one")
        self.bits = size
        self.marks = marks
        self.words = marks
        self.stop = 0
        self.turn = Turn()

    def set(self, page: SupportsIndex, count: SupportsIndex = 1) -> None:
        """Set ``count`` bits from ``page``."""
        first = within("page", page, 0, self.bits - 1)
        last = first + within("count", count, 1, self.bits - first) - 1
        self.turn._wait()
        set_range(self.marks, first, last)

    def reset(self, page: SupportsIndex, count: SupportsIndex = 1) -> None:
        """Clear ``count`` bits from ``page``."""
        first = within("page", page, 0, self.bits - 1)
        last = first + within("count", count, 1, self.bits - first) - 1
        self.turn._wait()
        _clear_range(self.marks, first, last)

    def test(self, page: SupportsIndex) -> bool:
        """Whether a bit is set."""
        at = within("page", page, 0, self.bits - 1)
        return bool(self.marks[at >> 6] >> (at & 63) & 1)

    def set_many(self, pages: object) -> None:
        """Set the bits whose numbers are in ``pages`` (64-bit words, not the bitmap); none when one is too large."""
        numbers = as_words("pages", pages)
        apart("bitmap", self.marks, pages=numbers)
        with self.turn:
            bad = self._set_many(numbers)
        if bad >= 0:
            raise MisuseError(f"pages[{bad}]={numbers[bad]}: must be from 0 to {self.bits - 1}")

    def _set_many(self, pages: memoryview[int]) -> cython.Py_ssize_t:
        """-1, or the first page that is too large."""
        i: cython.Py_ssize_t = 0
        n: cython.Py_ssize_t = len(pages)
        one: cython.ulonglong = 1
        with cython.nogil:
            while i < n and pages[i] < self.bits:
                i += 1
            if i < n:
                return i
            i = 0
            while i < n:
                self.marks[pages[i] >> 6] |= one << (pages[i] & 63)
                i += 1
        return -1

    def merge(self, other: Bitmap) -> None:
        """OR the bits of ``other``, a bitmap of the same size, into this one."""
        first, second = self._in_order(other)
        if other is not self:
            apart("bitmap", self.marks, other=other.marks)
        with first, second, cython.nogil:
            _merge(self.marks, other.marks)

    def take(self, other: Bitmap) -> None:
        """``merge`` that clears ``other`` in the same pass."""
        first, second = self._in_order(other)
        if other is self:
            raise MisuseError("take: a bitmap cannot be taken into itself")
        apart("bitmap", self.marks, other=other.marks)
        with first, second, cython.nogil:
            _take(self.marks, other.marks)

    def clear(self) -> None:
        """Clear every bit."""
        with self.turn, cython.nogil:
            _clear(self.marks)

    def count(self) -> int:
        """How many bits are set."""
        total: cython.ulonglong = 0
        with self.turn, cython.nogil:
            total = _count(self.marks)
        return int(total)

    def scan_pages(self, out: object, start: SupportsIndex = 0) -> tuple[int, int]:
        """Write the numbers of the set bits into ``out`` (64-bit words, 64 at least), ascending, from word ``start``.

        (how many, the word to go on from): the scan stops before a word for which there may be no room, and has come to
        the end when that word is ``len(words)``.
        """
        room = self._room(out)
        first = within("start", start, 0, len(self.words))
        with self.turn:
            found = self._scan_pages(self.marks, first, room, zeroed("H", _BLOCK))
            return int(found), int(self.stop)

    def scan_runs(self, out: object, start: SupportsIndex = 0) -> tuple[int, int]:
        """Write runs of set bits into ``out`` as pairs, first and one past the last; ``out``: 66 words at least.

        (how many runs, the word to go on from) as in ``scan_pages``; a run still open where the scan stops ends there.
        """
        room = self._room(out, 66)
        first = within("start", start, 0, len(self.words))
        with self.turn:
            found = self._scan_runs(self.marks, first, room, zeroed("H", _BLOCK), zeroed("Q", _BLOCK))
            return int(found) >> 1, int(self.stop)

    def pages(self) -> memoryview[int]:
        """The numbers of all set bits, ascending."""
        with self.turn:
            out = zeroed("Q", self.count() + 64)
            return out[: self.scan_pages(out)[0]]

    def runs(self) -> memoryview[int]:
        """All runs of set bits: first, one past the last, first, …"""
        with self.turn:
            out = zeroed("Q", 2 * min(self.count(), len(self.words) * 32) + 66)
            return out[: 2 * self.scan_runs(out)[0]]

    def coarsened(self, shift: SupportsIndex) -> Bitmap:
        """A bitmap of groups of ``1 << shift`` pages: a group is dirty when any page of it is."""
        by = within("shift", shift, 0, _MOST_SHIFT)
        result = Bitmap((self.bits + (1 << by) - 1) >> by)
        with self.turn:
            coarsen(self.marks, result.marks, by)
        return result

    def refined(self, shift: SupportsIndex) -> Bitmap:
        """A bitmap of parts of a page, ``1 << shift`` of them: all are dirty when the page is."""
        by = within("shift", shift, 0, _MOST_SHIFT)
        if self.bits << by > _MOST:
            raise MisuseError(f"shift={by}: {self.bits} bits become more than {_MOST}")
        result = Bitmap(self.bits << by)
        with self.turn:
            refine(self.marks, result.marks, by)
        return result

    def _in_order(self, other: Bitmap) -> tuple[Turn, Turn]:
        """The turns of both, checked to be of one size, in an order that is the same for every thread."""
        if not isinstance(other, Bitmap):
            raise MisuseError(f"other={other!r}: must be a Bitmap")
        if other.bits != self.bits:
            raise MisuseError(f"a bitmap of {other.bits} bits cannot join one of {self.bits}")
        return (self.turn, other.turn) if id(self) < id(other) else (other.turn, self.turn)

    def _room(self, out: object, least: int = 64) -> memoryview[int]:
        room = as_words("out", out, writable=True)
        if len(room) < least:
            raise MisuseError(f"out has {len(room)} items: needs at least {least}")
        apart("out", room, bitmap=self.marks)
        return room

    def _scan_pages(
        self, marks: memoryview[int], start: cython.Py_ssize_t, out: memoryview[int], places: memoryview[int]
    ) -> cython.Py_ssize_t:
        """``scan_pages``: the number found; ``stop`` is the word to go on from. ``places``: scratch, a block long."""
        n: cython.Py_ssize_t = len(marks)
        i: cython.Py_ssize_t = start
        j: cython.Py_ssize_t = 0
        at: cython.Py_ssize_t = 0
        last: cython.Py_ssize_t = len(out) - 64
        found: cython.Py_ssize_t = 0
        with cython.nogil:
            while i < n and at <= last:
                found = _thin(marks[i : min(i + _BLOCK, n)], places, out, at)
                j = 0
                while j < found and at <= last:
                    at = _emit(marks[i + places[j]], (i + places[j]) << 6, out, at)
                    j += 1
                i = i + places[j] if j < found else min(i + _BLOCK, n)
        self.stop = i
        return at

    def _scan_runs(
        self,
        marks: memoryview[int],
        start: cython.Py_ssize_t,
        out: memoryview[int],
        places: memoryview[int],
        edges: memoryview[int],
    ) -> cython.Py_ssize_t:
        """``scan_runs``: the items written; ``stop`` is the word to go on from. Scratch: two, a block long."""
        n: cython.Py_ssize_t = len(marks)
        i: cython.Py_ssize_t = start
        j: cython.Py_ssize_t = 0
        at: cython.Py_ssize_t = 0
        last: cython.Py_ssize_t = len(out) - 65
        found: cython.Py_ssize_t = 0
        before: cython.ulonglong = 0  # the last bit of the word before
        with cython.nogil:
            while i < n and at <= last:
                found = _thin_edges(marks[i : min(i + _BLOCK, n)], places, edges, before)
                j = 0
                while j < found and at <= last:
                    at = _emit(edges[j], (i + places[j]) << 6, out, at)
                    j += 1
                i = i + places[j] if j < found else min(i + _BLOCK, n)
                before = marks[i - 1] >> 63
            if before != 0:
                out[at] = i << 6
                at += 1
        self.stop = i
        return at
