"""Dirty bits from one granularity to another: words of 64 bits into words of 64 bits, at ``1 << shift`` bits a bit.

*Coarser* (a group is dirty when any bit of it is) folds each group into its lowest bit, then joins what is left of the
word in log steps: fields of 1 bit to fields of 2, 4 … until they lie at the bottom. *Finer* parts the fields in the
reverse order and fills each group by ``(word << width) - word``. Either is a table of steps ``word = (word | word
shifted by n) & mask`` that is the same for all words. So a block of words takes the first step, then the second …:
loops without a branch, which the compiler turns into vectors. From 64 bits a bit on (shift 6) it is words a bit.

The arrays do not overlap; ``out`` has room for all of ``words`` (coarser), or says how much is wanted (finer).
"""

from __future__ import annotations

import cython

from dmakit.iova.arrays import zeroed

_BLOCK = 64  # words a block; a whole number of them makes a word of any coarser bitmap


def coarsen(words: memoryview[int], out: memoryview[int], shift: cython.int) -> cython.int:
    """OR each group of ``1 << shift`` bits of ``words`` into one bit of ``out``, which is 0 before; 0."""
    _convert(words, out, shift, _coarser(shift), zeroed("Q", _BLOCK), False)
    return 0


def refine(words: memoryview[int], out: memoryview[int], shift: cython.int) -> cython.int:
    """Write each bit of ``words`` as ``1 << shift`` bits of ``out``, as many as ``out`` holds; 0."""
    _convert(words, out, shift, _finer(shift), zeroed("Q", _BLOCK), True)
    return 0


def _convert(
    words: memoryview[int],
    out: memoryview[int],
    shift: cython.int,
    steps: memoryview[int],
    block: memoryview[int],
    finer: cython.bint,
) -> cython.void:
    """Either of them, without the GIL. ``block``: scratch."""
    with cython.nogil:
        if shift >= 6 and finer:
            _refine_words(words, out, shift - 6)
        elif shift >= 6:
            _coarsen_words(words, out, shift - 6)
        elif finer:
            _refine(words, out, shift, steps, block)
        else:
            _coarsen(words, out, shift, steps, block)


def _coarsen(
    words: memoryview[int], out: memoryview[int], shift: cython.int, steps: memoryview[int], block: memoryview[int]
) -> cython.void:
    """``coarsen`` for a shift of 0 to 5."""
    n: cython.Py_ssize_t = len(words)
    i: cython.Py_ssize_t = 0
    j: cython.Py_ssize_t = 0
    size: cython.Py_ssize_t = 0
    low: cython.int = 0
    word: cython.ulonglong = 0
    while i < n:
        size = min(n - i, _BLOCK)
        for j in range(size):
            block[j] = words[i + j]
        _down(block, steps)
        j = 0
        while j < size:
            word = 0
            low = 0
            while low < 64 and j < size:
                word |= block[j] << low
                low += 64 >> shift
                j += 1
            out[(i + j - 1) >> shift] = word
        i += _BLOCK


def _refine(
    words: memoryview[int], out: memoryview[int], shift: cython.int, steps: memoryview[int], block: memoryview[int]
) -> cython.void:
    """``refine`` for a shift of 0 to 5."""
    n: cython.Py_ssize_t = len(out)
    i: cython.Py_ssize_t = 0
    j: cython.Py_ssize_t = 0
    size: cython.Py_ssize_t = 0
    part: cython.Py_ssize_t = 64 >> shift
    width: cython.int = 1 << shift
    while i < n:
        size = min(n - i, _BLOCK)
        for j in range(size):
            block[j] = words[(i + j) >> shift] >> (((i + j) * part) & 63)
        _up(block, steps)
        for j in range(size):
            out[i + j] = (block[j] << width) - block[j]
        i += _BLOCK


def _down(block: memoryview[int], steps: memoryview[int]) -> cython.void:
    """Take the steps of ``_coarser``."""
    j: cython.Py_ssize_t = 0
    k: cython.Py_ssize_t = 0
    while k < len(steps):
        by: cython.int = steps[k]
        mask: cython.ulonglong = steps[k + 1]
        for j in range(64):
            block[j] = (block[j] | block[j] >> by) & mask
        k += 2


def _up(block: memoryview[int], steps: memoryview[int]) -> cython.void:
    """Take the steps of ``_finer``."""
    j: cython.Py_ssize_t = 0
    k: cython.Py_ssize_t = 0
    while k < len(steps):
        by: cython.int = steps[k]
        mask: cython.ulonglong = steps[k + 1]
        for j in range(64):
            block[j] = (block[j] | block[j] << by) & mask
        k += 2


def _coarsen_words(words: memoryview[int], out: memoryview[int], shift: cython.int) -> cython.void:
    """OR each group of ``1 << shift`` words into one bit of ``out``, which is 0 before."""
    n: cython.Py_ssize_t = len(words)
    i: cython.Py_ssize_t = 0
    while i < n:
        bit: cython.Py_ssize_t = i >> shift
        stop: cython.Py_ssize_t = min(n, (bit + 1) << shift)
        some: cython.ulonglong = 0
        while i < stop:
            some |= words[i]
            i += 1
        dirty: cython.ulonglong = some != 0
        out[bit >> 6] |= dirty << (bit & 63)


def _refine_words(words: memoryview[int], out: memoryview[int], shift: cython.int) -> cython.void:
    """Write each bit of ``words`` as ``1 << shift`` words, as many as ``out`` holds."""
    n: cython.Py_ssize_t = len(out)
    i: cython.Py_ssize_t = 0
    one: cython.ulonglong = 1
    full: cython.ulonglong = ((one << 63) - 1) | (one << 63)
    while i < n:
        bit: cython.Py_ssize_t = i >> shift
        out[i] = full if (words[bit >> 6] >> (bit & 63)) & 1 else 0
        i += 1


def _fields(width: int, shift: int) -> int:
    """Ones in fields of ``width`` bits, ``width << shift`` apart, in 64 bits."""
    return sum(((1 << width) - 1) << low for low in range(0, 64, width << shift))


def _coarser(shift: int) -> memoryview[int]:
    """(by, mask) of each step down: fold the groups, join the fields. None from shift 6 on."""
    folds = [(1 << k, _fields(1, k + 1)) for k in range(shift)]
    joins = [((1 << (k + shift)) - (1 << k), _fields(2 << k, shift)) for k in range(6 - shift)]
    return _table(folds + joins if shift < 6 else [])


def _finer(shift: int) -> memoryview[int]:
    """(by, mask) of each step up: only the bits of this word, then part the fields. None from shift 6 on."""
    parts = [((1 << (k + shift)) - (1 << k), _fields(1 << k, shift)) for k in reversed(range(6 - shift))]
    return _table([(0, (1 << (64 >> shift)) - 1), *parts] if shift < 6 else [])


def _table(steps: list[tuple[int, int]]) -> memoryview[int]:
    table = zeroed("Q", 2 * len(steps))
    for n, (by, mask) in enumerate(steps):
        table[2 * n], table[2 * n + 1] = by, mask
    return table
