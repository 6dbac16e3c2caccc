"""What the scanner found: rows as long as their kind needs, then columns; words as small ids.

Rows are written one after the other while a chunk is scanned, and sorted into columns when it is done: ``block(kind)``
is a matrix, one column after the other. Words become ids in the order in which they first occur. The ids are kept
from chunk to chunk, and every buffer too: memory is bounded by the largest chunk and the number of different words.
"""

# ruff: noqa: RET505 (Cython drops the branch that is not compiled only when it stands in an else)

from __future__ import annotations

from typing import SupportsIndex

import cython

from dmakit.iova.arguments import within
from dmakit.trace.pattern import Pattern
from dmakit.trace.storage import longs

if not cython.compiled:
    from dmakit.consts import SCAN_HEAD, SCAN_LOST

_MASK = (1 << 64) - 1  # interpreted code only
_ROOM = 1024  # rows, malformed lines and list elements that there is room for at first


def _doubled(old: memoryview[int]) -> memoryview[int]:
    grown = longs(2 * len(old))
    grown[: len(old)] = old
    return grown


@cython.cclass
class Rows:
    """Text being scanned, and the rows found in it; the base of ``Scanner``."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.width = memoryview(pattern.width)
        self.names: list[str] = []
        self.ids: dict[bytes, int] = {}
        self.known = 0
        self.room, self.pool_room = _ROOM, _ROOM
        self.kinds, self.bad_lines, self.pool = longs(_ROOM), longs(_ROOM), longs(_ROOM)
        self.rows, self.columns = (longs(_ROOM * (SCAN_HEAD + pattern.widest)) for _ in range(2))
        self.count, self.start, self.filled = (longs(SCAN_LOST + 1) for _ in range(3))
        self.word_hash, self.word_id = longs(1 << 10), longs(1 << 10)
        self.records = self.top = self.pooled = self.others = self.notes = self.malformed = 0

    def _read(self, text: bytes) -> None:
        """Make ``text`` what is read."""
        self.text = text
        if cython.compiled:
            self.data = text
            self.p = cython.cast(cython.p_uchar, cython.address(self.data[0]))
        else:
            self.p = text

    def _grow(self) -> cython.void:
        """Twice the room for rows and malformed lines; columns have nothing to keep."""
        self.kinds, self.bad_lines = _doubled(self.kinds), _doubled(self.bad_lines)
        self.rows, self.columns = _doubled(self.rows), longs(2 * len(self.columns))
        self.room *= 2

    def _grow_pool(self) -> cython.void:
        """Twice the room for list elements."""
        self.pool = _doubled(self.pool)
        self.pool_room *= 2

    def present(self) -> list[int]:
        """The kinds that the last scan met."""
        return [kind for kind, count in enumerate(self.count) if count] if self.records else []

    def block(self, kind: SupportsIndex) -> tuple[memoryview[int], int]:
        """(columns, rows) of a kind, 0 to SCAN_LOST, of the last scan: SCAN_HEAD columns (record number, line, stamp,
        cpu, pid, context), then the fields' slots, one column of ``rows`` words after the other; valid until the next
        scan."""
        known = within("kind", kind, 0, SCAN_LOST)
        rows, start = self.count[known], self.start[known]
        return memoryview(self.columns)[start : start + rows * (SCAN_HEAD + self.width[known])], rows

    def rowwise(self) -> tuple[memoryview[int], memoryview[int]]:
        """(kinds, words) of the last scan's rows in the order of the file: a row is SCAN_HEAD words and its fields'
        slots, as wide as its kind; valid until the next scan."""
        return memoryview(self.kinds)[: self.records], memoryview(self.rows)[: self.top]

    def elements(self) -> memoryview[int]:
        """The elements of all lists of the last scan."""
        return memoryview(self.pool)[: self.pooled]

    def bad(self) -> list[tuple[int, int]]:
        """(offset in the text, line number) of the malformed lines of the last scan."""
        return [(entry >> 32, entry & 0xFFFFFFFF) for entry in self.bad_lines[: self.malformed]]

    # Words ---------------------------------------------------------------------------------------------------

    def _hash(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.ulonglong:
        """A 64-bit hash of a word (Python's own interpreted: only equality is ever used)."""
        if cython.compiled:
            value: cython.ulonglong = 0x4222325
            prime: cython.ulonglong = (cython.cast(cython.ulonglong, 0x9E3779B1) << 32) | 0x7F4A7C15
            p: cython.p_uchar = self.p
            while begin + 8 <= end:
                value = (value ^ cython.cast(cython.p_ulonglong, p + begin)[0]) * prime
                value ^= value >> 32
                begin += 8
            while begin < end:
                value = (value ^ p[begin]) * prime
                begin += 1
            return value ^ (value >> 29)
        else:
            return hash(self.text[begin:end]) & _MASK

    def _name(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.ulonglong:
        """The id of a word."""
        if cython.compiled:
            hashed: cython.ulonglong = self._hash(begin, end) | 1
            mask: cython.Py_ssize_t = self.word_hash.shape[0] - 1
            slot: cython.Py_ssize_t = hashed >> 32 & mask
            while self.word_hash[slot] != 0:
                if self.word_hash[slot] == hashed:
                    return self.word_id[slot]
                slot = (slot + 1) & mask
            self.word_hash[slot] = hashed
            self.word_id[slot] = self.known
            return self._new_name(begin, end)
        else:
            word = self.text[begin:end]
            if word not in self.ids:
                self.ids[word] = self._new_name(begin, end)
            return self.ids[word]

    def _new_name(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.ulonglong:
        """Keep the text of a word that has not occurred before; its id. The table grows when it is half full."""
        self.names.append(self.text[begin:end].decode("utf-8", "replace"))
        self.known = len(self.names)
        if self.known * 2 > len(self.word_hash):
            old_hash, old_id = self.word_hash, self.word_id
            mask = 2 * len(old_hash) - 1
            self.word_hash, self.word_id = longs(mask + 1), longs(mask + 1)
            for hashed, number in zip(old_hash, old_id, strict=True):
                slot = hashed >> 32 & mask
                while self.word_hash[slot]:
                    slot = (slot + 1) & mask
                self.word_hash[slot], self.word_id[slot] = hashed, number
        return self.known - 1

    # Columns -------------------------------------------------------------------------------------------------

    def _to_columns(self) -> cython.void:
        """Sort the rows by kind into columns: ``count`` rows of each, from ``start``."""
        i: cython.Py_ssize_t
        column: cython.Py_ssize_t
        width: cython.Py_ssize_t
        kind: cython.Py_ssize_t
        row: cython.Py_ssize_t = 0
        place: cython.Py_ssize_t = 0
        for kind in range(SCAN_LOST + 1):
            self.count[kind] = 0
        for i in range(self.records):
            self.count[self.kinds[i]] += 1
        for kind in range(SCAN_LOST + 1):
            self.start[kind] = place
            place += self.count[kind] * (SCAN_HEAD + self.width[kind])
            self.filled[kind] = self.start[kind]
        for i in range(self.records):
            kind = self.kinds[i]
            width = SCAN_HEAD + self.width[kind]
            place = self.filled[kind]
            self.filled[kind] += 1
            if cython.compiled:
                for column in range(width):
                    self.columns[place] = self.rows[row + column]
                    place += self.count[kind]
            else:
                rows = self.count[kind]
                self.columns[place : place + rows * (width - 1) + 1 : rows] = self.rows[row : row + width]
            row += width
