"""The yardsticks' native parts: the least that a machine can do of each kind of work.

Every benchmark row is a ratio to one of these, measured in the same run, so that a figure says how far the
shipped code is from the limit of *this* machine, whatever the machine. They do nothing else on purpose: no
bookkeeping, no bounds, no ledger. Interpreted, the same loops run as Python; ``dmakit bench`` says so.

* ``Empty.call``: what one call of a native method costs CPython, with one integer in and one out.
* ``fill``: one 8-byte page-table entry after the other, ascending addresses (F).
* ``walk``: the barest four-level walk, entries only (W).
* ``_Ready``: a controller that has always finished; not a yardstick, but what row 16 drives.
"""

from __future__ import annotations

import cython

from dmakit.iova.arguments import words as as_words


@cython.cclass
class Empty:
    """A native object whose method does nothing."""

    def call(self, value: cython.longlong) -> cython.longlong:
        """Returns its argument."""
        return value


def fill(words: object, first: cython.ulonglong, step: cython.ulonglong) -> None:
    """Write len(words) entries: ``first``, ``first + step``, …"""
    _fill(as_words("words", words, writable=True), first, step)


def _fill(table: memoryview[int], first: cython.ulonglong, step: cython.ulonglong) -> cython.void:
    i: cython.Py_ssize_t = 0
    n: cython.Py_ssize_t = len(table)
    entry: cython.ulonglong = first
    while i < n:
        table[i] = entry
        entry += step
        i += 1


def _walk_unchecked(words: memoryview[int], root: cython.ulonglong, iovas: memoryview[int]) -> int:
    """Translate every address of ``iovas`` (uint64) by four reads from ``root``; returns the XOR of the answers.

    Nothing is checked, hence the underscore: whoever calls it has built the tables in ``words``.
    """
    return _walk(words, root, iovas)


def _walk(table: memoryview[int], root: cython.ulonglong, addresses: memoryview[int]) -> cython.ulonglong:
    i: cython.Py_ssize_t = 0
    n: cython.Py_ssize_t = len(addresses)
    answer: cython.ulonglong = 0
    iova: cython.ulonglong = 0
    entry: cython.ulonglong = 0
    while i < n:
        iova = addresses[i]
        entry = table[(root >> 3) + ((iova >> 39) & 511)]
        entry = table[(entry >> 12 << 9) + ((iova >> 30) & 511)]
        entry = table[(entry >> 12 << 9) + ((iova >> 21) & 511)]
        entry = table[(entry >> 12 << 9) + ((iova >> 12) & 511)]
        answer ^= (entry >> 12 << 12) + (iova & 4095)
        i += 1
    return answer


@cython.cclass
class _Ready:
    """The NVMe controller that is always ready: every command that was submitted has succeeded when it looks.

    Nothing is checked, hence the underscore: whoever makes one has built the rings.

    ``sq``, ``cq``: the words of both rings of ``entries`` entries (at most 64: each in one page) and their first word;
    ``bar``: 32-bit words, with the tail at index ``tail``.
    """

    def __init__(
        self,
        sq: tuple[memoryview[int], int],
        cq: tuple[memoryview[int], int],
        entries: int,
        qid: int,
        bar: memoryview[int],
        tail: int,
    ) -> None:
        self.sq, self.sq_start = sq
        self.cq, self.cq_start = cq
        self.entries, self.qid, self.bar, self.tail = entries, qid, bar, tail
        self.head = self.slot = 0
        self.phase = 1

    def answer(self) -> None:
        """Complete what was submitted."""
        self._answer()

    def _answer(self) -> cython.void:
        cid: cython.ulonglong
        while self.head != self.bar[self.tail]:
            cid = (self.sq[self.sq_start + 8 * self.head] >> 16) & 0xFFFF
            self.head += 1
            if self.head == self.entries:
                self.head = 0
            self.cq[self.cq_start + 2 * self.slot] = 0
            self.cq[self.cq_start + 2 * self.slot + 1] = self.head | self.qid << 16 | cid << 32 | self.phase << 48
            self.slot += 1
            if self.slot == self.entries:
                self.slot = 0
                self.phase ^= 1
