"""Rows 10 and 11: dirty bitmaps of 32 MiB (1 TiB of 4 KiB pages) against memcpy, memset and the best of NumPy.

NumPy's best: for the count, ``bitwise_count`` in pieces that stay in the cache; for the list, only the bytes that are
not 0 are unpacked, or bits are peeled off word by word, whichever is faster. Our list goes into a buffer that is used
again, as a migration does it; NumPy has no such form. Clustered: runs of 1 to 1,023 pages, a tenth of all.
"""

from __future__ import annotations

import ctypes
from array import array
from typing import Any

import numpy as np

from dmakit.bench.row import Bench, Row
from dmakit.iommu.bitmap import Bitmap

WORDS = (32 << 20) // 8
PIECE = 1 << 14
Words = np.ndarray[Any, np.dtype[np.uint64]]


def dense(bench: Bench) -> tuple[Bitmap, Words, Bitmap]:
    """Two bitmaps of random bits; the words of the first."""

    def make() -> tuple[Bitmap, Words, Bitmap]:
        count = bench.scaled(WORDS)
        random = np.random.default_rng(1)
        ours, theirs = (random.integers(0, 1 << 64, count, dtype=np.uint64) for _ in range(2))
        return Bitmap(count * 64, ours), ours, Bitmap(count * 64, theirs)

    return bench.once("bitmap dense", make)


def merge(bench: Bench) -> float:
    """10a."""
    target, words, source = dense(bench)
    return bench.timed(lambda: target.merge(source), words.nbytes)


def clear(bench: Bench) -> tuple[float, float]:
    """10b, against memset."""
    count = bench.scaled(WORDS)
    bitmap = bench.once("bitmap cleared", lambda: Bitmap(count * 64))
    place = (ctypes.c_char * (count * 8)).from_buffer(bitmap.words)
    peer = bench.timed(lambda: ctypes.memset(place, 0, count * 8), count * 8)
    return bench.timed(bitmap.clear, count * 8), peer


def count(bench: Bench) -> tuple[float, float]:
    """10c, against NumPy."""
    bitmap, words, _ = dense(bench)
    return bench.timed(bitmap.count, words.nbytes), bench.timed(lambda: numpy_count(words), words.nbytes)


def numpy_count(words: Words) -> int:
    """Bits set, in pieces."""
    total = 0
    room = np.empty(PIECE, np.uint8)
    for start in range(0, len(words), PIECE):
        piece = words[start : start + PIECE]
        total += int(np.bitwise_count(piece, out=room[: len(piece)]).sum(dtype=np.uint32))
    return total


def sparse(bench: Bench) -> tuple[Bitmap, Words, array[int]]:
    """A bitmap with one page in a hundred dirty, its words, and room for the list."""

    def make() -> tuple[Bitmap, Words, array[int]]:
        words = bench.scaled(WORDS)
        bitmap = Bitmap(words * 64)
        bitmap.set_many(np.random.default_rng(2).integers(0, bitmap.bits, bitmap.bits // 100, dtype=np.uint64))
        room = array("Q", bytes(8 * (bitmap.count() + 512)))
        return bitmap, np.frombuffer(bitmap.words, np.uint64), room

    return bench.once("bitmap sparse", make)


def pages(bench: Bench) -> tuple[float, float]:
    """11a, against NumPy."""
    bitmap, words, room = sparse(bench)
    ours = bench.timed(lambda: bitmap.scan_pages(room), words.nbytes)
    by_bytes = bench.timed(lambda: numpy_by_bytes(words), words.nbytes)
    return ours, min(by_bytes, bench.timed(lambda: numpy_by_words(words), words.nbytes))


def numpy_by_bytes(words: Words) -> Words:
    """The page list: unpack the bytes that are not 0."""
    flat = words.view(np.uint8)
    places = np.flatnonzero(flat != 0)
    bits = np.flatnonzero(np.unpackbits(flat[places], bitorder="little").view(np.bool_))
    listed: Words = ((places[bits >> 3] << 3) | (bits & 7)).view(np.uint64)
    return listed


def numpy_by_words(words: Words) -> Words:
    """The page list: peel the lowest bit off every word that has one left, then sort."""
    places = np.flatnonzero(words)
    rest, parts = words[places], []
    while len(places):
        low = rest & (~rest + np.uint64(1))
        parts.append((places << 6) + np.bitwise_count(low - np.uint64(1)))
        rest ^= low
        left = rest != 0
        places, rest = places[left], rest[left]
    return np.sort(np.concatenate(parts)).view(np.uint64)


def runs(bench: Bench) -> float:
    """11b."""

    def make() -> tuple[Bitmap, array[int]]:
        bitmap = Bitmap(bench.scaled(WORDS) * 64)
        random = np.random.default_rng(3)
        for first, length in zip(
            random.integers(0, bitmap.bits - 1023, bitmap.bits // 5000).tolist(),
            random.integers(1, 1024, bitmap.bits // 5000).tolist(),
            strict=True,
        ):
            bitmap.set(first, length)
        return bitmap, array("Q", bytes(16 * (bitmap.bits // 5000) + 8 * 66))

    bitmap, room = bench.once("bitmap clustered", make)
    return bench.timed(lambda: bitmap.scan_runs(room), bitmap.bits / 8)


ROWS = [
    Row("10a", "dirty bitmaps of 32 MiB: OR", "ns/byte", 0.9, "higher", "M", merge),
    Row("10b", "dirty bitmap: clear, against memset", "ns/byte", 0.9, "higher", "own", clear),
    Row("10c", "dirty bitmap: count, against NumPy", "ns/byte", 2.0, "higher", "own", count),
    Row("11a", "dirty bitmap, 1 % dirty: page list, against NumPy", "ns/byte", 18.0, "higher", "own", pages),
    Row("11b", "dirty bitmap, clustered: runs", "ns/byte", 0.35, "higher", "M", runs),
]
