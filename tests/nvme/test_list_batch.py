"""PRPs and SGLs of many requests in one call: the same words, blocks and counts as one by one, without the GIL."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.gil import released

from dmakit import _core
from dmakit.errors import DmakitError, ExhaustedError, MisuseError
from dmakit.failpoint import FailPoint
from dmakit.ledger import Ledger
from dmakit.nvme.pool import LARGE_BYTES, SMALL_BYTES, DescriptorPool, PlainSource
from dmakit.nvme.prp import PrpWriter
from dmakit.nvme.sgl import SglWriter

PAGE = 4096
Range = tuple[int, int]
COMPILED = pytest.mark.skipif(_core.status()["running"] != "compiled", reason="interpreted code keeps the GIL")


class Side:
    """A writer with pools of its own, and what can be seen of them."""

    def __init__(self, kind: type[Any], pages: int = 1 << 20, nth: int = -1) -> None:
        self.ledger, self.fail = Ledger(), FailPoint()
        source = PlainSource(limit=pages)
        self.small, self.large = (
            DescriptorPool(source, size, ledger=self.ledger, fail=self.fail) for size in (SMALL_BYTES, LARGE_BYTES)
        )
        self.writer = kind(self.small, self.large)
        if nth >= 0:
            self.fail.arm(nth)

    def lists(self, chain: int) -> list[tuple[int, bytes]]:
        """(address, bytes) of the blocks of a chain."""
        return [(block.addr, bytes(block.words)) for block in self.writer.blocks(chain)]

    def one_by_one(self, requests: list[list[Range]]) -> Any:
        """Words, lists, counters of each request built alone; after an error everything is given back."""
        found, chains = [], []
        try:
            for ranges in requests:
                low, high, chain = self.writer.build(ranges)
                found.append((low, high, self.lists(chain)))
                chains.append(chain)
        except DmakitError as error:
            for chain in chains:
                self.writer.drop(chain)
            return type(error), self.seen()
        return found, self.seen()

    def together(self, requests: list[list[Range]]) -> Any:
        """The same by one call."""
        flat = [item for ranges in requests for item in ranges]
        bounds = array("Q", [0])
        for ranges in requests:
            bounds.append(bounds[-1] + len(ranges))
        words, chains = array("Q", bytes(16 * len(requests))), array("Q", bytes(8 * len(requests)))
        columns = (array("Q", [addr for addr, _ in flat]), array("Q", [length for _, length in flat]))
        try:
            self.writer.build_batch(*columns, bounds, words, chains)
        except DmakitError as error:
            assert not any(chains)
            return type(error), self.seen()
        found = [(words[2 * at], words[2 * at + 1], self.lists(chains[at])) for at in range(len(requests))]
        seen = self.seen()
        self.writer.drop_batch(chains)
        assert not any(chains) and self.small.used == self.large.used == 0
        return found, seen

    def seen(self) -> tuple[object, ...]:
        return self.ledger.snapshot(), self.small.used, self.large.used, self.fail.uses


@st.composite
def described(draw: st.DrawFn) -> list[Range]:
    """The ranges of a request: most can be described by PRPs, some cannot."""
    count = draw(st.sampled_from([1, 1, 2, 3, 17, 33, 40]))
    size = draw(st.sampled_from([PAGE, PAGE, 512, 20 * PAGE, 520 * PAGE]))
    first = draw(st.integers(1, 1 << 20)) * PAGE + draw(st.sampled_from([0, 0, 0, 512]))
    return [(first + at * 2 * size // PAGE * PAGE, size) for at in range(count)]


@pytest.mark.parametrize("kind", [PrpWriter, SglWriter])
@given(requests=st.lists(described(), min_size=1, max_size=6), nth=st.integers(-1, 12), pages=st.sampled_from([2, 99]))
@settings(max_examples=80)
def test_batch_equals_one_by_one(kind: type[Any], requests: list[list[Range]], nth: int, pages: int) -> None:
    """Words, list bytes, blocks and every counter, with memory that runs out at any block or page."""
    assert Side(kind, pages, nth).together(requests) == Side(kind, pages, nth).one_by_one(requests)


@pytest.mark.parametrize("kind", [PrpWriter, SglWriter])
@pytest.mark.parametrize("addr", [1 << 63, (1 << 64) - PAGE])
def test_an_address_that_no_single_request_may_have_is_refused_in_a_batch(kind: type[Any], addr: int) -> None:
    """Above 2**63, as ``build`` refuses it: pages there might run over the end of the address space."""
    side = Side(kind)
    good = [(at * 2 * PAGE + (1 << 20), PAGE) for at in range(40)]
    for length in (PAGE, 2 * PAGE, 40 * PAGE):
        before = side.seen()[1:3]
        with pytest.raises(MisuseError, match=rf"^{kind.kind}: request 1: .*below 2\^63$"):
            side.writer.build_batch(
                array("Q", [start for start, _ in good] + [addr]),
                array("Q", [size for _, size in good] + [length]),
                array("Q", [0, 40, 41]),
                array("Q", bytes(32)),
                array("Q", bytes(16)),
            )
        assert side.seen()[1:3] == before


@pytest.mark.parametrize("kind", [PrpWriter, SglWriter])
def test_what_is_no_list_that_is_out_is_refused(kind: type[Any]) -> None:
    side = Side(kind)
    chains = [side.writer.build([(at * 2 * PAGE + (1 << 20), PAGE) for at in range(count)])[2] for count in (3, 40)]
    for chain in (*(chain + 2 for chain in chains), 1, (1 << 63) - 1, 200 << 1):
        with pytest.raises(MisuseError, match=rf"^chain={chain}: no list blocks that are out$"):
            side.writer.drop(chain)
        with pytest.raises(MisuseError, match=r"^block -?\d+: is not out$"):
            side.writer.blocks(chain)
    assert (side.small.used, side.large.used) == (1, 1)
    given_back = array("Q", [chains[0], chains[0], chains[1]])
    with pytest.raises(MisuseError, match=r"^drop_batch: item 1: no list blocks that are out$"):
        side.writer.drop_batch(given_back)
    assert (side.small.used, side.large.used, list(given_back)) == (0, 0, [0, 0, 0])
    with pytest.raises(MisuseError, match=r"^chain=-1: must be from 0 to"):
        side.writer.drop(-1)


@pytest.mark.parametrize("kind", [PrpWriter, SglWriter])
def test_a_list_whose_pool_was_destroyed_is_not_written_to(kind: type[Any]) -> None:
    """The memory of the block is gone: feeding on is refused."""
    side = Side(kind)
    side.writer.begin(40 * PAGE if kind is PrpWriter else 40)
    for at in range(5):
        side.writer.feed((1 << 20) + at * 2 * PAGE, PAGE)
    side.large.destroy(lost=True)
    with pytest.raises(MisuseError, match=r": the list block of the request being written is not out any more$"):
        side.writer.feed(1 << 21, PAGE)


def test_a_source_that_gives_no_page_is_told_as_it_says_it() -> None:
    side = Side(PrpWriter, pages=0)
    with pytest.raises(ExhaustedError, match=r"^no more descriptor pages$"):
        side.writer.build([(1 << 20, 40 * PAGE)])
    with pytest.raises(ExhaustedError, match=r"^no more descriptor pages$"):
        side.large.alloc()


@COMPILED
@pytest.mark.parametrize("kind", [PrpWriter, SglWriter])
def test_other_threads_run_during_a_batch(kind: type[Any]) -> None:
    side = Side(kind)
    requests, segments = 100, 256
    addrs = array("Q", [(1 << 30) + at * 2 * PAGE for at in range(requests * segments)])
    lengths, bounds = array("Q", [PAGE]) * len(addrs), array("Q", range(0, len(addrs) + 1, segments))
    words, chains = array("Q", bytes(16 * requests)), array("Q", bytes(8 * requests))

    def build_and_drop() -> None:
        side.writer.build_batch(addrs, lengths, bounds, words, chains)
        side.writer.drop_batch(chains)

    assert not released(lambda: sum(range(100)))
    assert released(build_and_drop)
