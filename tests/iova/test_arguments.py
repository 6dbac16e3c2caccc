"""What is no list of pairs, no array of words and no number is refused by name, whatever Python says about it."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from dmakit.errors import MisuseError
from dmakit.iova.arguments import pairs, within, words

TABLE = memoryview(bytes(range(4))).cast("B", (2, 2))  # Python cannot iterate over its rows: NotImplementedError


class Broken:
    """A sequence that ends in an error of its own kind."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __getitem__(self, at: int) -> tuple[int, int]:
        raise self.error


@pytest.mark.parametrize("wrong", [5, None, [1], [(1,)], [(1, 2, 3)], TABLE, Broken(KeyError), Broken(ValueError)])
def test_what_is_no_list_of_pairs_is_refused(wrong: Any) -> None:
    with pytest.raises(MisuseError, match=r"^ranges: must be a sequence of pairs of numbers$"):
        pairs("ranges", wrong)


def test_an_error_of_the_callers_own_is_not_hidden() -> None:
    with pytest.raises(RuntimeError):
        pairs("ranges", Broken(RuntimeError))


def test_pairs_of_any_iterable_are_taken() -> None:
    assert pairs("ranges", iter([(1, 2), [3, 4], "ab"])) == [(1, 2), (3, 4), ("a", "b")]
    assert pairs("ranges", Broken(IndexError)) == []  # the old protocol of sequences: that is their end


@pytest.mark.parametrize("wrong", [5, "text", b"12345678", array("I", [1]), array("d", [1.0]), TABLE])
def test_what_is_no_array_of_words_is_refused(wrong: Any) -> None:
    with pytest.raises(MisuseError, match=r"^sizes: must be a contiguous buffer of unsigned 64-bit words$"):
        words("sizes", wrong)
    with pytest.raises(MisuseError, match=r"^sizes: must be a contiguous buffer of unsigned 64-bit words$"):
        words("sizes", memoryview(array("Q", range(4)))[::2])


def test_words_are_the_callers_own_and_writable_where_they_must_be() -> None:
    mine = array("Q", [1, 2])
    words("sizes", mine, writable=True)[1] = 7
    assert mine[1] == 7
    with pytest.raises(MisuseError, match=r"^sizes: must be writable$"):
        words("sizes", memoryview(mine).toreadonly(), writable=True)
    assert len(words("sizes", array("Q"))) == 0


def test_numbers_are_checked_against_both_ends() -> None:
    assert (within("cpu", 0, 0, 3), within("cpu", True, 0, 3), within("cpu", 3, 0, 3)) == (0, 1, 3)
    for wrong in (-1, 4, 1 << 64):
        with pytest.raises(MisuseError, match=rf"^cpu={wrong}: must be from 0 to 3$"):
            within("cpu", wrong, 0, 3)
    with pytest.raises(MisuseError, match=r"^cpu=1.0: must be an integer$"):
        within("cpu", 1.0, 0, 3)  # type: ignore[arg-type]
