"""Dirty bitmaps against a plain set of page numbers."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmakit.errors import MisuseError
from dmakit.iommu.bitmap import Bitmap

BITS = 1500
PAGES = st.sets(st.integers(0, BITS - 1), max_size=200)
SPANS = st.lists(st.tuples(st.integers(0, BITS - 1), st.integers(1, 300)), max_size=8)


def bitmap_of(pages: set[int], bits: int = BITS) -> Bitmap:
    made = Bitmap(bits)
    made.set_many(array("Q", sorted(pages)))
    return made


def set_of(bitmap: Bitmap) -> set[int]:
    return {n for n in range(bitmap.bits) if bitmap.test(n)}


def runs_of(pages: set[int]) -> list[int]:
    edges = [n for n in range(BITS + 1) if (n in pages) != (n - 1 in pages)]
    assert len(edges) % 2 == 0
    return edges


@settings(max_examples=40)
@given(PAGES, SPANS)
def test_lists_counts_and_runs(pages: set[int], spans: list[tuple[int, int]]) -> None:
    bitmap = bitmap_of(pages)
    for first, count in spans:
        bitmap.set(first, min(count, BITS - first))
        pages = pages | set(range(first, min(first + count, BITS)))
    assert set_of(bitmap) == pages
    assert bitmap.count() == len(pages)
    assert list(bitmap.pages()) == sorted(pages)
    assert list(bitmap.runs()) == runs_of(pages)
    for first, count in spans[:3]:
        bitmap.reset(first, min(count, BITS - first))
        pages = pages - set(range(first, first + count))
    assert list(bitmap.pages()) == sorted(pages)


@settings(max_examples=20)
@given(PAGES, PAGES)
def test_merge_take_clear(ours: set[int], theirs: set[int]) -> None:
    target, source = bitmap_of(ours), bitmap_of(theirs)
    target.merge(source)
    assert set_of(target) == ours | theirs
    assert set_of(source) == theirs
    target.clear()
    assert target.count() == 0
    target.set_many(array("Q", sorted(ours)))
    target.take(source)
    assert (set_of(target), source.count()) == (ours | theirs, 0)


@settings(max_examples=30)
@given(PAGES, st.integers(0, 12), st.integers(0, 8))
def test_granularities(pages: set[int], coarser: int, finer: int) -> None:
    coarse = bitmap_of(pages).coarsened(coarser)
    assert coarse.bits == (BITS + (1 << coarser) - 1) >> coarser
    assert set(coarse.pages()) == {n >> coarser for n in pages}
    fine = coarse.refined(finer)
    assert fine.bits == coarse.bits << finer
    assert set(fine.pages()) == {(n << finer) + k for n in coarse.pages() for k in range(1 << finer)}


@pytest.mark.parametrize("shift", range(11))
def test_granularities_over_many_blocks(shift: int) -> None:
    bits = 64 * 331 + 17
    pages = set(random.Random(shift).sample(range(bits), bits // 50)) | {0, bits - 1} | set(range(4000, 4300))
    coarse = bitmap_of(pages, bits).coarsened(shift)
    groups = {page >> shift for page in pages}
    assert (coarse.bits, set(coarse.pages())) == ((bits - 1 >> shift) + 1, groups)
    fine = coarse.refined(shift)
    assert list(fine.runs()) == edges_of({(group << shift) + k for group in groups for k in range(1 << shift)})


def edges_of(pages: set[int]) -> list[int]:
    return sorted({page for page in pages if page - 1 not in pages} | {page + 1 for page in pages} - pages)


def test_a_scan_goes_on_where_there_was_no_room() -> None:
    pages = set(random.Random(7).sample(range(BITS), 700))
    bitmap = bitmap_of(pages)
    found: list[int] = []
    out, word = array("Q", bytes(8 * 70)), 0
    while word < len(bitmap.words):
        count, word = bitmap.scan_pages(out, word)
        found += out[:count]
    assert found == sorted(pages)
    covered: list[int] = []
    word = 0
    while word < len(bitmap.words):
        count, word = bitmap.scan_runs(out, word)
        for n in range(count):
            covered += range(out[2 * n], out[2 * n + 1])
    assert covered == sorted(pages)


@pytest.mark.parametrize("each", [1, 7, 20, 100, 1000])
def test_many_blocks_of_every_density(each: int) -> None:
    """A page in ``each``, over more words than are looked at in one go, none of them a round number."""
    bits = 64 * 331 + 17
    pages = set(random.Random(each).sample(range(bits), bits // each))
    bitmap = bitmap_of(pages, bits)
    assert bitmap.count() == len(pages)
    assert list(bitmap.pages()) == sorted(pages)
    assert list(bitmap.runs()) == edges_of(pages)
    for start in (1, 63, 64, 65, 330, 331, 332):
        out = array("Q", bytes(8 * (bits + 66)))
        count, word = bitmap.scan_pages(out, start)
        assert (list(out[:count]), word) == ([page for page in sorted(pages) if page >= 64 * start], 332)
        count, word = bitmap.scan_runs(out, start)
        assert (set_of_runs(out[: 2 * count]), word) == ({page for page in pages if page >= 64 * start}, 332)


@pytest.mark.parametrize("room", [66, 67, 129, 400, 4200])
def test_any_room_lists_everything_and_nothing_beyond_it_is_touched(room: int) -> None:
    bits = 64 * 200
    pages = set(random.Random(room).sample(range(bits), bits // 10)) | set(range(640, 1000))
    bitmap = bitmap_of(pages, bits)
    for scan in (bitmap.scan_pages, bitmap.scan_runs):
        out = array("Q", [7] * (room + 8))
        found: set[int] = set()
        word = 0
        while word < len(bitmap.words):
            count, after = scan(memoryview(out)[:room], word)
            assert after > word
            word = after
            found |= set(out[:count]) if scan == bitmap.scan_pages else set_of_runs(out[: 2 * count])
            assert list(out[room:]) == [7] * 8
        assert found == pages


def set_of_runs(edges: array[int]) -> set[int]:
    return {page for n in range(0, len(edges), 2) for page in range(edges[n], edges[n + 1])}


def test_dense_and_empty() -> None:
    full = Bitmap(64 * 40)
    full.set(0, full.bits)
    assert list(full.pages()) == list(range(full.bits))
    assert list(full.runs()) == [0, full.bits]
    assert full.count() == full.bits
    assert list(Bitmap(1).pages()) == list(Bitmap(1).runs()) == []


def test_it_works_on_the_callers_memory() -> None:
    words = array("Q", [0, 1 << 63])
    bitmap = Bitmap(128, words)
    assert list(bitmap.pages()) == [127]
    bitmap.set(3)
    assert list(words) == [8, 1 << 63]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda b: Bitmap(0), "bits=0: must be from 1 to 1099511627776"),
        (lambda b: Bitmap(65, array("Q", [0])), "words: has 1, 65 bits need 2"),
        (lambda b: Bitmap(3, array("Q", [8])), "words: bits above 3 are set in the last one"),
        (lambda b: Bitmap(64, bytes(8)), "words: must be a contiguous buffer of unsigned 64-bit words"),
        (lambda b: b.set(-1), "page=-1: must be from 0 to 1499"),
        (lambda b: b.set(1499, 2), "count=2: must be from 1 to 1"),
        (lambda b: b.test(1500), "page=1500: must be from 0 to 1499"),
        (lambda b: b.test("x"), "page='x': must be an integer"),
        (lambda b: b.set_many(array("Q", [1, 1500])), "pages[1]=1500: must be from 0 to 1499"),
        (lambda b: b.merge(Bitmap(7)), "a bitmap of 7 bits cannot join one of 1500"),
        (lambda b: b.take(b), "take: a bitmap cannot be taken into itself"),
        (lambda b: b.scan_pages(array("Q", [0] * 63)), "out has 63 items: needs at least 64"),
        (lambda b: b.scan_runs(array("Q", [0] * 65)), "out has 65 items: needs at least 66"),
        (lambda b: b.scan_pages(array("Q", [0] * 64), 25), "start=25: must be from 0 to 24"),
        (lambda b: b.scan_pages(memoryview(bytes(512)).cast("Q")), "out: must be writable"),
        (lambda b: b.coarsened(37), "shift=37: must be from 0 to 36"),
        (lambda b: b.refined(36), "shift=36: 1500 bits become more than 1099511627776"),
    ],
)
def test_bad_arguments(call, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MisuseError) as caught:
        call(Bitmap(BITS))
    assert text in str(caught.value)


def test_page_numbers_are_only_read() -> None:
    bitmap = Bitmap(BITS)
    bitmap.set_many(memoryview(array("Q", [3, 700])).toreadonly())
    assert set_of(bitmap) == {3, 700}


def test_another_kind_of_object_is_refused() -> None:
    with pytest.raises((MisuseError, TypeError)):
        Bitmap(5).merge([1])  # type: ignore[arg-type]
