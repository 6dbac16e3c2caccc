"""Page tables against a dict: every format, height and set of leaf sizes; maps, unmaps, relinks and dirty bits."""

from __future__ import annotations

import errno
from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from dmakit.iommu.dirty import LeafBitScan
from dmakit.iommu.gather import Gather
from tests.iommu.world import G1, K4, M2, SHAPES, World, linked_tables, page_format

PAGES = st.one_of(st.integers(1, 40), st.sampled_from((511, 512, 513, 1024, 1025, 512 * 512, 512 * 513)))
OFFSETS = st.one_of(st.integers(0, 30), st.sampled_from((511, 512, 513, 1023, 1024, 512 * 512 - 1)))


class PageTableAgainstDict(RuleBasedStateMachine):
    """``leaves``: start -> (size, phys, prot), the truth; ``dirty``: starts of leaves whose D bit hardware has set."""

    @initialize(shape=st.sampled_from(SHAPES), coherent=st.booleans())
    def build(self, shape: tuple[str, int, int], coherent: bool) -> None:
        name, levels, sizes = shape
        self.world = World()
        self.table = self.world.table(page_format(name, sizes), levels, coherent=coherent)
        self.sizes = [size for size in (G1, M2, K4) if sizes & size]
        top = self.table.aperture_last + 1
        self.bases = [0, M2, G1 - 4 * K4, G1, 5 * G1 - M2, top - 2 * G1, top - M2, top - 8 * K4]
        self.leaves: dict[int, tuple[int, int, int]] = {}
        self.dirty: set[int] = set()

    def place(self, base: int, offset: int) -> int:
        return self.bases[base] + offset * K4

    def leaf_at(self, iova: int) -> int | None:
        return next(
            (s for size in self.sizes if (s := iova & -size) in self.leaves and self.leaves[s][0] == size), None
        )

    def occupied(self, iova: int, size: int) -> bool:
        return any(start < iova + size and iova < start + leaf[0] for start, leaf in self.leaves.items())

    def cut(self, iova: int, phys: int, size: int) -> dict[int, tuple[int, int]]:
        """The leaves that a map makes: at each place the largest size that divides both and fits."""
        made: dict[int, tuple[int, int]] = {}
        done = 0
        while done < size:
            at, to = iova + done, phys + done
            leaf = next(s for s in self.sizes if at % s == 0 and to % s == 0 and size - done >= s)
            made[at] = (leaf, to)
            done += leaf
        return made

    @rule(
        base=st.integers(0, 7),
        offset=OFFSETS,
        pages=PAGES,
        prot=st.integers(1, 3),
        off_by=st.sampled_from((0, 0, 1, 512)),
    )
    def map(self, base: int, offset: int, pages: int, prot: int, off_by: int) -> None:
        iova, size = self.place(base, offset), pages * K4
        phys = (iova & (64 * G1 - 1)) + 128 * G1 + off_by * K4
        if self.sizes == [K4] and pages > 2048 or off_by and pages > 2048:
            return
        gather = Gather()
        error = self.table.map(iova, phys, size, prot, gather)
        if iova + size - 1 > self.table.aperture_last:
            assert (error, gather.mapped) == (-errno.ERANGE, 0)
        elif self.occupied(iova, size):
            assert error == -errno.EADDRINUSE
            undo = Gather()
            assert self.table.unmap(iova, gather.mapped, undo) == gather.mapped < size
            self.settle(undo, False)
        else:
            assert (error, gather.mapped) == (0, size)
            always = self.table.fmt.name == "x86_64"  # a present entry always permits reading
            for at, (leaf, to) in self.cut(iova, phys, size).items():
                self.leaves[at] = (leaf, to, prot | always)
                if self.table.fmt.name == "x86_64" and prot & 2:
                    self.dirty.add(at)
        self.settle(gather)

    @rule(base=st.integers(0, 7), offset=OFFSETS, pages=PAGES)
    def unmap(self, base: int, offset: int, pages: int) -> None:
        iova, size = self.place(base, offset), pages * K4
        at = iova
        while iova + size - 1 <= self.table.aperture_last and at < iova + size and at in self.leaves:
            at += self.leaves.pop(at)[0]
        gather = Gather()
        assert self.table.unmap(iova, size, gather) == at - iova
        self.dirty &= self.leaves.keys()
        assert gather.is_empty == (at == iova)
        if at != iova:
            assert (gather.start, gather.end) == (iova, at - 1)
        self.settle(gather)

    @rule(data=st.data())
    def unmap_what_was_mapped(self, data: st.DataObject) -> None:
        if self.leaves:
            at = data.draw(st.sampled_from(sorted(self.leaves)))
            size = self.leaves[at][0]
            run = at
            while data.draw(st.booleans()) and run + size in self.leaves:
                run += size
                size = self.leaves[run][0]
            end = run + size
            gather = Gather()
            assert self.table.unmap(at, end - at, gather) == end - at
            while at < end:
                at += self.leaves.pop(at)[0]
            self.dirty &= self.leaves.keys()
            self.settle(gather)

    @rule(data=st.data())
    def hardware_writes(self, data: st.DataObject) -> None:
        """A walker that sets D, the way the unit does it: in the entry's memory."""
        if self.leaves:
            at = data.draw(st.sampled_from(sorted(self.leaves)))
            found = next(leaf for leaf in self.table.leaves(at, 1))
            node = self.table.root
            for level in range(self.table.levels, found.level - 1, -1):
                word = (node >> 3) + ((at >> (12 + 9 * (level - 1))) & 511)
                node = self.world.memory.words[word] & ((1 << 52) - 4096)
            self.world.memory.words[word] |= self.table.fmt.dirty_bit
            self.dirty.add(at)

    @rule(base=st.integers(0, 7), pages=st.integers(1, 2048), keep=st.booleans(), page=st.sampled_from((K4, M2)))
    def read_dirty(self, base: int, pages: int, keep: bool, page: int) -> None:
        iova = self.bases[base] & -page
        size = -(-pages * K4 // page) * page
        if iova + size - 1 > self.table.aperture_last:
            return
        bitmap, gather = array("Q", [0] * (size // page // 64 + 1)), Gather()
        LeafBitScan(self.table, iova, size, bitmap, gather, page_size=page, flags=int(keep)).run()
        expected: set[int] = set()
        hit = {at for at in self.dirty if at < iova + size and iova < at + self.leaves[at][0]}
        for at in hit:
            low, high = max(at, iova), min(at + self.leaves[at][0], iova + size)
            expected |= set(range((low - iova) // page, (high - 1 - iova) // page + 1))
        assert {n for n in range(len(bitmap) * 64) if bitmap[n >> 6] >> (n & 63) & 1} == expected
        if not keep:
            self.dirty -= hit
            if hit:
                assert gather.start == min(hit)
                assert gather.end == max(at + self.leaves[at][0] for at in hit) - 1

    @rule(base=st.integers(0, 7), offset=OFFSETS, byte=st.integers(0, K4 - 1))
    def look_up(self, base: int, offset: int, byte: int) -> None:
        iova = self.place(base, offset) + byte
        start = self.leaf_at(iova)
        expected = 0 if start is None else self.leaves[start][1] + iova - start
        assert self.table.iova_to_phys(iova) == expected

    def settle(self, gather: Gather, last: bool = True) -> None:
        self.world.tables.free_list(gather.freelist)
        assert not last or self.world.tables.in_use == self.table.table_pages == self.world.pages.allocated_pages

    @invariant()
    def the_tree_holds_exactly_the_leaves(self) -> None:
        if hasattr(self, "table"):
            bits, dirty = self.table.fmt.address_mask, self.table.fmt.dirty_bit
            seen = {
                leaf.iova: (leaf.size, leaf.entry & bits & -leaf.size, leaf.entry & 3, leaf.entry & dirty != 0)
                for leaf in self.table.leaves()
            }
            assert seen == {at: (*leaf, at in self.dirty) for at, leaf in self.leaves.items()}
            assert len(linked_tables(self.table)) == self.table.table_pages

    def teardown(self) -> None:
        if hasattr(self, "table"):
            self.table.destroy()
            assert self.world.pages.allocated_pages == self.world.tables.in_use == 0


def run(steps: int, examples: int) -> None:
    run_state_machine_as_test(PageTableAgainstDict, settings=settings(max_examples=examples, stateful_step_count=steps))


def test_page_tables_against_a_dict() -> None:
    run(25, 40)


@pytest.mark.long
def test_page_tables_against_a_dict_for_long() -> None:
    run(500, 200)
