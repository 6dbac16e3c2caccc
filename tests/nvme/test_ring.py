"""The rings against an independent model: dictionaries and lists, entries packed and unpacked by ``struct``."""

from __future__ import annotations

import struct
from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmakit.errors import ExhaustedError, MisuseError
from dmakit.nvme.ring import LIES, NEVER, Ring

QID = 3


class Both:
    """A ring on plain memory, and the device's view of it; pages lie apart and out of order."""

    def __init__(self, entries: int, *, mapped: bool) -> None:
        self.entries, self.mapped = entries, mapped
        self.words = memoryview(array("Q", bytes(4096 * 16)))
        self.sq_pages, self.cq_pages = [512 * 3, 512 * 1, 512 * 5], [512 * 8]
        self.bar = memoryview(array("I", bytes(64)))
        self.written: dict[int, int] = {}
        self.ring = Ring(
            QID, entries, (self.words, memoryview(array("Q", self.sq_pages))),
            (self.words, memoryview(array("Q", self.cq_pages))), sq_doorbell=24, cq_doorbell=28,
            bar=self.bar if mapped else None, write32=self.written.__setitem__,
        )  # fmt: skip
        self.fetched = 0  # device's head
        self.posted, self.phase = 0, 1

    def doorbell(self, at: int) -> int:
        return self.bar[at >> 2] if self.mapped else self.written.get(at, 0)

    def fetch(self) -> list[tuple[int, ...]]:
        """What the device reads: the commands up to the doorbell, as sixteen dwords each."""
        found = []
        while self.fetched != self.doorbell(24):
            at = self.sq_pages[self.fetched // 64] + self.fetched % 64 * 8
            found.append(struct.unpack("<16I", bytes(self.words[at : at + 8])))
            self.fetched = (self.fetched + 1) % self.entries
        return found

    def post(self, cid: int, status: int = 0, result: int = 0, *, qid: int = QID, head: int = -1) -> None:
        """What the device writes."""
        at = self.cq_pages[0] + 2 * self.posted
        raw = struct.pack("<IIHHHH", result, 0, self.fetched if head < 0 else head, qid, cid, status << 1 | self.phase)
        self.words[at], self.words[at + 1] = struct.unpack("<QQ", raw)
        self.posted += 1
        if self.posted == self.entries:
            self.posted, self.phase = 0, self.phase ^ 1

    def reap(self, room: int = 256) -> list[tuple[int, int, int, int]]:
        out = [array("Q", bytes(8 * room)) for _ in range(4)]
        n = self.ring.reap(*out)
        return list(zip(*(column[:n] for column in out), strict=True))


step = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 12)),
    st.tuples(st.just("push"), st.integers(1, 3)),
    st.tuples(st.just("complete"), st.integers(0, 12)),
    st.tuples(st.just("reap"), st.integers(1, 12)),
)


@settings(max_examples=100)
@given(
    entries=st.sampled_from([2, 3, 8, 64, 65, 130]),
    mapped=st.booleans(),
    steps=st.lists(step, max_size=60),
    pick=st.randoms(use_true_random=False),
)
def test_what_goes_in_comes_out_once(entries: int, mapped: bool, steps: list[tuple[str, int]], pick: object) -> None:
    both = Both(entries, mapped=mapped)
    ring, tag = both.ring, 0
    at_device: list[tuple[int, int]] = []  # (cid, tag), fetched and not completed
    waiting: dict[int, int] = {}  # tag -> status, completed and not reaped
    for name, count in steps:
        free = entries - 1 - len(at_device) - len(waiting)
        assert ring.free_count == free and ring.in_flight == entries - 1 - free
        if name == "submit":
            tags = list(range(tag, tag + count))
            columns = [array("Q", [base + t for t in tags]) for base in (1 << 40, 5, 1 << 44, 1 << 45, 0)]
            done = ring.submit(2, 7, *columns)
            assert done == min(count, free)
            tag += done
            for t, dwords in zip(tags, both.fetch(), strict=False):
                lba, count_, low, high = (1 << 40) + t, 5 + t, (1 << 44) + t, (1 << 45) + t
                assert dwords[0] & 0xFFFF == 2 and dwords[1] == 7 and dwords[2:6] == (0, 0, 0, 0)
                assert dwords[6:10] == (low & 0xFFFFFFFF, low >> 32, high & 0xFFFFFFFF, high >> 32)
                assert dwords[10:] == (lba & 0xFFFFFFFF, lba >> 32, count_ - 1, 0, 0, 0)
                at_device.append((dwords[0] >> 16, t))
        elif name == "push":
            for _ in range(count):
                entry = bytes((5, 0x40)) + bytes(range(62))
                if not ring.free_count:
                    with pytest.raises(ExhaustedError, match=rf"^queue 3: all {entries - 1} commands are in flight$"):
                        ring.push(entry, tag)
                    break
                ring.push(entry, tag)
                ring.ring()
                (dwords,) = both.fetch()
                assert struct.pack("<16I", *dwords)[4:] == entry[4:] and dwords[0] & 0xFFFF == 0x4005
                at_device.append((dwords[0] >> 16, tag))
                tag += 1
        elif name == "complete":
            for _ in range(min(count, len(at_device))):
                cid, t = at_device.pop(pick.randrange(len(at_device)))  # type: ignore[attr-defined]
                waiting[t] = t & 0x7FFF
                both.post(cid, t & 0x7FFF, t)
        else:
            for slot, t, status, result in both.reap(count):
                assert waiting.pop(t) == status and result == t and 0 <= slot < entries - 1
            assert not ring.lie
        live = [cid for cid, _ in at_device]
        assert len(live) == len(set(live)), "an identifier is in flight twice"
    assert both.doorbell(28) == ring.head


@pytest.mark.parametrize(
    ("lie", "code"), [({"qid": 4}, 1), ({"cid": 0x2001}, 2), ({"cid": 0xFFF}, 2), ({"head": 5}, 3), ({"head": 99}, 3)]
)
def test_a_lie_is_consumed_and_stops_the_scan(lie: dict[str, int], code: int) -> None:
    both = Both(16, mapped=True)
    words = [array("Q", [1, 2, 3])] * 5
    assert both.ring.submit(2, 1, *words) == 3
    cids = [dwords[0] >> 16 for dwords in both.fetch()]
    both.post(cids[0])
    both.post(lie.get("cid", cids[1]), qid=lie.get("qid", QID), head=lie.get("head", -1))
    both.post(cids[2])
    assert len(both.reap()) == 1 and both.ring.lie == code and LIES[code]
    assert both.reap() == [] and both.ring.in_flight == 2
    both.ring.forgive()
    assert len(both.reap()) == 1 and both.ring.in_flight == 1


def test_a_completion_that_comes_twice_names_nobody_even_when_its_slot_is_used_again() -> None:
    both = Both(8, mapped=True)
    one = [array("Q", [1])] * 5
    both.ring.submit(2, 1, *one)
    (first,) = (dwords[0] >> 16 for dwords in both.fetch())
    both.post(first)
    assert len(both.reap()) == 1
    both.ring.submit(2, 1, *one)
    (second,) = (dwords[0] >> 16 for dwords in both.fetch())
    assert first & 0xFFF == second & 0xFFF and first != second
    both.post(first)
    assert both.reap() == [] and both.ring.lie == 2


def test_deadlines_and_restart() -> None:
    both = Both(8, mapped=False)
    one = [array("Q", [1, 2])] * 5
    assert both.ring.deadline() == NEVER
    both.ring.submit(2, 1, *one, deadline=500)
    both.ring.push(bytes(64), 9, 300)
    assert both.ring.deadline() == 300 and both.ring.overdue(299) == []
    (slot,) = both.ring.overdue(300)
    assert both.ring.tag(slot) == 9
    both.ring.extend(slot, 900)
    assert len(both.ring.overdue(500)) == 2 and slot not in both.ring.overdue(500)
    both.ring.restart()
    assert both.ring.in_flight == 0 and both.ring.live() == [] and both.ring.free_count == 7


def test_bad_arguments() -> None:
    both = Both(8, mapped=True)
    one = [array("Q", [1])] * 5
    for wrong, message in (
        ({"opcode": 256}, r"^opcode=256, nsid=1: an opcode has 8 bits, a namespace identifier 32$"),
        ({"nsid": 1 << 32}, r"^opcode=2, nsid=4294967296: "),
        ({"counts": array("Q", [65537])}, r"^counts\[0\]=65537: one command transfers 1 to 65536 blocks$"),
        ({"counts": array("Q")}, r"^counts: has 0 words, at least 1 are needed$"),
        ({"low": array("I", [1])}, r"^low: must be a flat buffer of 64-bit unsigned words$"),
        ({"tags": 5}, r"^tags: must be a buffer of 64-bit unsigned words, not int$"),
    ):
        given_ = {"opcode": 2, "nsid": 1, "lbas": one[0], "counts": one[0], "low": one[0], "high": one[0],
                  "tags": one[0], **wrong}  # fmt: skip
        with pytest.raises(MisuseError, match=message):
            both.ring.submit(**given_)  # type: ignore[arg-type]
    with pytest.raises(MisuseError, match=r"^entry of 3 bytes: a submission entry has 64$"):
        both.ring.push(b"abc")
    with pytest.raises(MisuseError, match=r"^entries=1: must lie in \[2, 4096\]$"):
        Both(1, mapped=True)
    assert both.ring.in_flight == 0 and both.fetch() == []
    both.ring.close()
    with pytest.raises(MisuseError, match=r"^this queue is closed$"):
        both.ring.submit(2, 1, *one)


@pytest.mark.parametrize(
    "wrong",
    [5, (), (memoryview(array("Q", [0])),), memoryview(bytes(4)).cast("B", (2, 2))],  # the last: NotImplementedError
)
def test_memory_that_is_no_pair_of_arrays_is_refused(wrong: Any) -> None:
    good = (memoryview(array("Q", bytes(4096))), memoryview(array("Q", [0])))
    options = {"sq_doorbell": 8, "cq_doorbell": 12, "bar": None, "write32": lambda at, value: None}
    Ring(1, 2, good, good, **options)
    for name, pairs in (("sq", (wrong, good)), ("cq", (good, wrong))):
        with pytest.raises(MisuseError, match=f"^{name}: must be a pair of words and page indices$"):
            Ring(1, 2, *pairs, **options)
