"""PRP lists against an independent model, and the dialogue of the reader with its errors."""

from __future__ import annotations

import struct
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmakit.errors import ExhaustedError, MisuseError
from dmakit.failpoint import FailPoint
from dmakit.ledger import Ledger
from dmakit.nvme.pool import LARGE_BYTES, SMALL_BYTES, DescriptorPool, PlainSource
from dmakit.nvme.prp import PrpWalker, PrpWriter, entries_needed
from dmakit.nvme.spec import Status

PAGE = 4096
Range = tuple[int, int]


def pools(fail: FailPoint | None = None) -> tuple[DescriptorPool, DescriptorPool]:
    ledger, fail = Ledger(), fail or FailPoint()
    source = PlainSource()
    return (
        DescriptorPool(source, SMALL_BYTES, ledger=ledger, fail=fail),
        DescriptorPool(source, LARGE_BYTES, ledger=ledger, fail=fail),
    )


def reference(ranges: list[Range]) -> list[int]:
    """The PRP entries of the ranges: PRP1, then one address a page. Written without looking at the builder."""
    pages: list[int] = []
    for addr, length in ranges:
        position = addr
        while position < addr + length:
            pages.append(position)
            position = (position // PAGE + 1) * PAGE
    return pages


def decode(prp1: int, prp2: int, total: int, memory: dict[int, memoryview[int]]) -> list[int]:
    """Follow the lists by the specification's words and return the entries again."""
    count = entries_needed(prp1, total)
    entries = [prp1]
    if count == 2:
        entries.append(prp2)
    elif count > 2:
        page, slot, size = memory[prp2], 0, len(memory[prp2])
        while len(entries) < count:
            last_slot = slot == size - 1 and size == 512
            if last_slot and count - len(entries) > 1:
                page, slot = memory[page[slot]], 0
                continue
            entries.append(page[slot])
            slot += 1
    return entries


@st.composite
def range_lists(draw: st.DrawFn, max_pages: int = 1300) -> list[Range]:
    """Ranges that PRPs can describe: interior ends on pages, the first start and last end anywhere."""
    count = draw(st.integers(1, 6))
    ranges = []
    for at in range(count):
        pages = draw(st.integers(1, draw(st.sampled_from([1, 3, 40, max_pages]))))
        base = draw(st.integers(1, 1 << 30)) * PAGE
        start = draw(st.integers(0, 1023)) * 4 if at == 0 else 0
        cut = draw(st.integers(0, PAGE - 1)) if at == count - 1 else 0
        if start + cut >= pages * PAGE:
            cut = 0
        ranges.append((base + start, pages * PAGE - start - cut))
    return ranges


def walk_all(walker: PrpWalker, memory: dict[int, memoryview[int]]) -> int:
    """Answer the walker's reads from the list blocks; returns the number of reads."""
    reads = 0
    while walker.list_entries and not walker.status:
        base = walker.list_addr & ~(PAGE - 1) if walker.list_addr & ~(PAGE - 1) in memory else walker.list_addr
        words = memory[base]
        offset = (walker.list_addr - base) >> 3
        walker.list_words(bytes(words[offset : offset + walker.list_entries]))
        reads += 1
    return reads


@given(range_lists())
@settings(max_examples=60)
def test_e5_prp_lists_equal_the_reference_and_decode_again(ranges: list[Range]) -> None:
    small, large = pools()
    writer = PrpWriter(small, large)
    prp1, prp2, chain = writer.build(ranges)
    total = sum(length for _, length in ranges)
    memory = {block.addr: block.words for block in writer.blocks(chain)}
    assert decode(prp1, prp2, total, memory) == reference(ranges)
    walker = PrpWalker()
    walker.begin(prp1, prp2, total)
    walk_all(walker, memory)
    assert walker.status == 0
    assert reference(walker.ranges) == reference(ranges)
    assert sum(length for _, length in walker.ranges) == total
    writer.drop(chain)
    assert small.used == large.used == 0


@pytest.mark.parametrize(
    ("pages", "sizes"),
    [
        (1, []),
        (2, []),
        (3, [SMALL_BYTES]),
        (33, [SMALL_BYTES]),
        (34, [LARGE_BYTES]),
        (513, [LARGE_BYTES]),
        (514, [LARGE_BYTES, LARGE_BYTES]),
        (1024, [LARGE_BYTES, LARGE_BYTES]),
        (1025, [LARGE_BYTES, LARGE_BYTES, LARGE_BYTES]),
        (2048, [LARGE_BYTES] * 5),
    ],
)
def test_blocks_by_number_of_pages(pages: int, sizes: list[int]) -> None:
    """32 entries fit in a small block, 512 in a page; the 513th entry opens another page; 8 MiB needs five."""
    writer = PrpWriter(*pools())
    _, _, chain = writer.build([(at * 2 * PAGE + (1 << 20), PAGE) for at in range(pages)])
    blocks = writer.blocks(chain)
    expected = sizes if pages != 2048 else [LARGE_BYTES] * 5
    assert [block.size for block in blocks] == expected
    assert all(block.addr % block.size == 0 for block in blocks)


@pytest.mark.parametrize(("tail", "size"), [(0, SMALL_BYTES), (1, LARGE_BYTES), (4095, LARGE_BYTES)])
def test_a_partial_page_counts_as_an_entry(tail: int, size: int) -> None:
    writer = PrpWriter(*pools())
    (block,) = writer.blocks(writer.build([(1 << 20, 33 * PAGE + tail)])[2])
    assert block.size == size


def test_the_last_entry_moves_to_the_next_page_and_becomes_the_link() -> None:
    writer = PrpWriter(*pools())
    prp1, prp2, chain = writer.build([((1 << 20) + at * 2 * PAGE, PAGE) for at in range(514)])
    first, second = writer.blocks(chain)
    assert prp2 == first.addr and first.words[511] == second.addr
    assert [second.words[0], second.words[1]] == [(1 << 20) + 512 * 2 * PAGE, (1 << 20) + 513 * 2 * PAGE]
    assert first.words[510] == (1 << 20) + 511 * 2 * PAGE and prp1 == 1 << 20


def test_gap_inside_a_request_is_refused() -> None:
    small, large = pools()
    writer = PrpWriter(small, large)
    for ranges in ([(0x1200, 0x200), (0x3000, 0x1000)], [(0x1000, 0x1000), (0x3200, 0x200)]):
        with pytest.raises(
            MisuseError, match=r"does not continue the request: ranges must meet on 4096-byte pages"
        ) as e:
            writer.build(ranges)
        assert e.value.errno_name == "EIO"
    assert small.used == large.used == 0


WRONG = {
    "beyond the total": lambda w: w.feed(0x40000, 600 * PAGE),
    "not from a page": lambda w: w.feed(0x40200, PAGE),
    "not to a page": lambda w: w.feed(0x40000, PAGE + 1),
    "gap far behind": lambda w: w.feed(0x40000, 514 * PAGE + 1),
    "no address": lambda w: w.feed(-1, PAGE),
    "build, gap": lambda w: w.build([(0x1000, 40 * PAGE), (0x3200, 0x200)]),
    "build, no address": lambda w: w.build([(0x1000, PAGE), (1 << 64, PAGE)]),
    "build, nothing": lambda w: w.build([]),
    "batch": lambda w: w.build_batch(words(2), array("Q", [40 * PAGE, 0]), array("Q", [0, 1, 2]), words(4), words(2)),
}


def words(count: int) -> array[int]:
    return array("Q", bytes(8 * count))


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("fed", [0, 1, 2, 30, 512, 513, 514])
def test_what_is_refused_leaves_the_request_as_it_was(wrong: str, fed: int) -> None:
    """Ranges of a page are fed, a wrong call comes, then the rest: the list is the one without the wrong call."""
    small, large = pools()
    writer = PrpWriter(small, large)
    ranges = [((1 << 20) + at * 2 * PAGE, PAGE) for at in range(550)]
    writer.begin(550 * PAGE)
    for addr, length in ranges[:fed]:
        writer.feed(addr, length)

    def seen() -> tuple[int, ...]:
        blocks = (writer.chain, small.used, large.used)
        return writer.prp1, writer.prp2, writer.left, writer.entries, *blocks

    before = seen()
    with pytest.raises(MisuseError):
        WRONG[wrong](writer)
    assert seen() == before
    for addr, length in ranges[fed:]:
        writer.feed(addr, length)
    memory = {block.addr: block.words for block in writer.blocks(writer.chain)}
    assert decode(writer.prp1, writer.prp2, 550 * PAGE, memory) == reference(ranges)
    assert writer.left == 0
    writer.drop(writer.chain)
    assert small.used == large.used == 0


def test_batch_equals_scalar() -> None:
    writer = PrpWriter(*pools())
    requests = [[(0x10200, 512)], [(0x20000, 131072)], [(0x60000, 4096), (0x90000, 8192)], [(0x100E00, 512 * 9)]]
    flat = [r for ranges in requests for r in ranges]
    bounds = [0]
    for ranges in requests:
        bounds.append(bounds[-1] + len(ranges))
    prps = memoryview(array("Q", bytes(16 * len(requests))))
    chains = array("Q", bytes(8 * len(requests)))
    writer.build_batch(
        memoryview(array("Q", [a for a, _ in flat])),
        memoryview(array("Q", [n for _, n in flat])),
        memoryview(array("Q", bounds)),
        prps,
        chains,
    )
    for at, ranges in enumerate(requests):
        memory = {block.addr: block.words for block in writer.blocks(chains[at])}
        total = sum(length for _, length in ranges)
        assert decode(prps[2 * at], prps[2 * at + 1], total, memory) == reference(ranges)


def test_batch_gives_every_block_back_when_one_request_is_wrong() -> None:
    small, large = pools()
    writer = PrpWriter(small, large)
    arguments = [
        memoryview(array("Q", [0x10000, 0x20200, 0x40000])),
        memoryview(array("Q", [131072, 512, 4096])),
        memoryview(array("Q", [0, 1, 3])),
        memoryview(array("Q", bytes(32))),
        array("Q", bytes(24)),
    ]
    with pytest.raises(MisuseError, match=r"^PRP: request 1: its bounds are wrong, or its ranges do not meet on 4096"):
        writer.build_batch(*arguments)
    assert small.used == large.used == 0
    with pytest.raises(MisuseError, match=r"^pointers: has 4 words, at least 6 are needed$"):
        writer.build_batch(*arguments[:2], memoryview(array("Q", [0, 1, 2, 3])), *arguments[3:])
    with pytest.raises(MisuseError, match=r"^addrs: must be a contiguous buffer of unsigned 64-bit words$"):
        writer.build_batch(memoryview(b"abc"), *arguments[1:])
    with pytest.raises(MisuseError, match=r"^PRP: request 0: its bounds are wrong"):
        writer.build_batch(*arguments[:2], memoryview(array("Q", [0, 9])), *arguments[3:])


@pytest.mark.parametrize("nth", range(4))
def test_no_block_leaks_when_a_pool_runs_out(nth: int) -> None:
    fail = FailPoint()
    small, large = pools(fail)
    writer = PrpWriter(small, large)
    fail.arm(nth)
    ranges = [((1 << 20) + at * 2 * PAGE, PAGE) for at in range(1025)]
    if nth < 3:
        with pytest.raises(ExhaustedError, match=r"^descriptor pool of 4096-byte blocks: no memory$"):
            writer.build(ranges)
    else:
        writer.drop(writer.build(ranges)[2])
    assert small.used == large.used == 0


class TestReading:
    def check(self, prp1: int, prp2: int, size: int) -> PrpWalker:
        walker = PrpWalker()
        walker.begin(prp1, prp2, size)
        return walker

    def test_offsets(self) -> None:
        bad = int(Status.PRP_OFFSET_INVALID)
        assert self.check(0x1002, 0, 512).status == bad
        assert self.check(0x1004, 0, 512).ranges == [(0x1004, 512)]
        assert self.check(0x1000, 0x3200, 8192).status == bad
        assert self.check(0x1000, 0x3004, 12288).status == bad
        assert self.check(0x1000, 0x3000, 0).ranges == []

    def test_the_last_page_has_no_neighbour(self) -> None:
        last = (1 << 64) - PAGE
        assert self.check(last, 0, 2 * PAGE).ranges == [(last, PAGE), (0, PAGE)]

    def test_a_list_may_start_inside_its_page_and_then_ends_there(self) -> None:
        walker = self.check(0x1000, 0x5000 + 510 * 8, 4 * PAGE)
        assert (walker.list_addr, walker.list_entries) == (0x5000 + 510 * 8, 2)
        walker.list_words(struct.pack("<2Q", 0x9000, 0x6000))
        assert (walker.list_addr, walker.list_entries) == (0x6000, 2)
        walker.list_words(struct.pack("<2Q", 0xA000, 0xC000))
        assert walker.status == 0 and walker.ranges == [(0x1000, PAGE), (0x9000, 2 * PAGE), (0xC000, PAGE)]

    def test_entries_and_links_must_be_page_aligned(self) -> None:
        for words in ((0x9008, 0x6000), (0x9000, 0x6010)):
            walker = self.check(0x1000, 0x5000 + 510 * 8, 4 * PAGE)
            walker.list_words(struct.pack("<2Q", *words))
            assert walker.status == int(Status.PRP_OFFSET_INVALID) and walker.list_entries == 0

    def test_wrong_answer_is_refused(self) -> None:
        walker = self.check(0x1000, 0x5000, 3 * PAGE)
        with pytest.raises(MisuseError, match=r"^PRP list: 8 bytes given, 16 asked for$"):
            walker.list_words(bytes(8))
