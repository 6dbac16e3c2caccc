"""IOTLB, paging-structure cache and device TLB against a model of what hardware may answer.

The model keeps sets instead of caches. For each domain and span it knows every table that an entry has pointed to
since the last request that dropped its paging-structure entry, and for each page every translation that a walk could
have produced since the last request that covered the page. An answer is right when it is one of those, or what a walk
gives now; after a covering request only the latter is left. Table pages are linked, unlinked, shared and scribbled on
at will, as freed pages are.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from dmakit.errors import FaultError
from dmakit.iommu.devtlb import DeviceTlb
from dmakit.iommu.formats.vtdss import VtdSecondStage
from dmakit.iommu.port import DmaPort
from dmakit.iommu.unit import IommuUnit
from dmakit.ledger import Ledger
from dmakit.memory.physical import PhysicalMemory

LEVELS = 3
ADDRESSES = [
    (giga << 30) | (region << 21) | (page << 12) for giga in (0, 1) for region in (0, 5) for page in (0, 1, 2, 511)
]
TABLES = {3: (0x1000, 0x2000), 2: (0x3000, 0x4000, 0x5000), 1: (0x6000, 0x7000, 0x8000, 0x9000)}
LEAVES = (0x100000, 0x101000, 0x200000)
ADDRESS = ((1 << 52) - 1) & ~4095
Leaf = tuple[int, int] | None  # (physical page of 4 KiB, permissions), None = not present

domains = st.integers(0, 1)
addresses = st.sampled_from(ADDRESSES)
leaves = st.sampled_from(LEAVES)


class Truth:
    """What the hardware may believe of one domain."""

    def __init__(self, memory: PhysicalMemory, root: int) -> None:
        self.memory, self.root = memory, root
        self.tables: dict[tuple[int, int], set[int]] = {}  # by (level of the entry, span): tables it may lead to
        self.cached: dict[int, set[Leaf]] = {iova: set() for iova in ADDRESSES}
        self.device: dict[int, set[Leaf]] = {iova: set() for iova in ADDRESSES}

    def walks(self, iova: int) -> set[Leaf]:
        """Every outcome that a walk can have now, from any table that may be remembered; remembers what it passes."""
        outcomes: set[Leaf] = set()
        here = {self.root}
        for level in range(LEVELS, 0, -1):
            shift = 3 + 9 * level
            below = self.tables.setdefault((level, iova >> shift), set())
            for table in here:
                entry = int(self.memory.words[(table >> 3) + ((iova >> shift) & 511)])
                if not entry & 3:
                    outcomes.add(None)
                elif level == 1 or entry & 0x80:
                    outcomes.add(((entry & ADDRESS) | (iova & ((1 << shift) - 1)), entry & 3))
                else:
                    below.add(entry & ADDRESS)
            here = below
        return outcomes

    def settle(self) -> None:
        """After any change: a cache may pick up every outcome at any moment."""
        for iova in ADDRESSES:
            outcomes = self.walks(iova)
            self.cached[iova] |= outcomes
            self.device[iova] |= outcomes | self.cached[iova]

    def invalidate(self, start: int, end: int, *, structures: bool, device: bool) -> None:
        """A request over [start, end] was executed."""
        for level, span in self.tables if structures else ():
            low = span << (3 + 9 * level)
            if low <= end and start < low + (1 << (3 + 9 * level)):
                self.tables[level, span] = set()
        for iova in ADDRESSES:
            if start <= iova <= end:
                self.cached[iova] = set()
                if device:
                    self.device[iova] = set()
        self.settle()


class CacheMachine(RuleBasedStateMachine):
    """Two domains over shared table pages; ``caching_mode`` also lets not-present outcomes be cached."""

    @initialize(
        caching_mode=st.booleans(),
        geometry=st.sampled_from([(64, 8), (64, 2), (32, 8), (8, 2)]),
        psc=st.sampled_from([16, 4, 1]),
        policy=st.sampled_from(["lru", "fifo"]),
    )
    def build(self, caching_mode: bool, geometry: tuple[int, int], psc: int, policy: str) -> None:
        self.memory = PhysicalMemory(16 << 20)
        self.memory.add_region(0, 16 << 20)
        self.caching_mode = caching_mode
        self.unit = IommuUnit(
            self.memory,
            ledger=Ledger(1),
            caching_mode=caching_mode,
            iotlb_entries=geometry[0],
            iotlb_ways=geometry[1],
            psc_entries=psc,
            policy=policy,
        )
        self.dids = [self.unit.attach(VtdSecondStage(), root, LEVELS) for root in TABLES[3]]
        self.truth = [Truth(self.memory, root) for root in TABLES[3]]
        tlb = DeviceTlb(8, entries=geometry[0], ways=2, policy=policy)
        self.unit.attach_devtlb(tlb, self.dids[0])
        self.port = DmaPort(self.memory, self.unit, self.dids[0], source=8, devtlb=tlb)
        for i, iova in enumerate(ADDRESSES):
            for domain in (0, 1):
                self.map_small(domain, iova, LEAVES[(i + domain) % len(LEAVES)], 3)
        self.look(0)

    def store(self, table: int, iova: int, level: int, entry: int) -> None:
        """Write one table word; every domain may be concerned, for tables are shared."""
        self.memory.words[(table >> 3) + ((iova >> (3 + 9 * level)) & 511)] = entry
        for truth in self.truth:
            truth.settle()

    @rule(domain=domains, iova=addresses, table=st.sampled_from(TABLES[2]), on=st.booleans())
    def link_middle(self, domain: int, iova: int, table: int, on: bool) -> None:
        self.store(TABLES[3][domain], iova, 3, table | 3 if on else 0)

    @rule(middle=st.sampled_from(TABLES[2]), iova=addresses, table=st.sampled_from(TABLES[1]), on=st.booleans())
    def link_last(self, middle: int, iova: int, table: int, on: bool) -> None:
        self.store(middle, iova, 2, table | 3 if on else 0)

    @rule(domain=domains, iova=addresses, table=st.sampled_from(TABLES[1]), phys=leaves, ih=st.booleans())
    def replace_table(self, domain: int, iova: int, table: int, phys: int, ih: bool) -> None:
        """A last-level table gives way to another: with IH = 1 the old one may still be walked."""
        middle = int(self.memory.words[(TABLES[3][domain] >> 3) + (iova >> 30)]) & ADDRESS
        if middle:
            self.store(table, iova, 1, phys | 3)
            self.store(middle, iova, 2, table | 3)
            self.flush_range(domain, iova, iova, ih)

    @rule(middle=st.sampled_from(TABLES[2]), iova=addresses, phys=st.sampled_from([0x200000, 0x400000]))
    def map_large(self, middle: int, iova: int, phys: int) -> None:
        self.store(middle, iova, 2, phys | 0x83)

    @rule(table=st.sampled_from(TABLES[1]), iova=addresses, phys=leaves, prot=st.integers(0, 3))
    def scribble(self, table: int, iova: int, phys: int, prot: int) -> None:
        self.store(table, iova, 1, phys | prot if prot else 0)

    @rule(domain=domains, iova=addresses, phys=leaves, prot=st.integers(1, 3))
    def remap(self, domain: int, iova: int, phys: int, prot: int) -> None:
        self.map_small(domain, iova, phys, prot)
        self.look(domain)

    def map_small(self, domain: int, iova: int, phys: int, prot: int) -> None:
        middle = int(self.memory.words[(TABLES[3][domain] >> 3) + (iova >> 30)]) & ADDRESS or TABLES[2][domain]
        slot = (middle >> 3) + ((iova >> 21) & 511)
        last = int(self.memory.words[slot]) & ADDRESS
        last = last if last in TABLES[1] else TABLES[1][domain]
        self.store(last, iova, 1, phys | prot)
        self.store(middle, iova, 2, last | 3)
        self.store(TABLES[3][domain], iova, 3, middle | 3)

    @rule(domain=domains, iova=addresses, write=st.booleans(), offset=st.integers(0, 4095), ats=st.booleans())
    def access(self, domain: int, iova: int, write: bool, offset: int, ats: bool) -> None:
        """One access, by an untranslated request or through the device TLB of domain 0."""
        truth = self.truth[domain]
        ats = ats and domain == 0
        cached = truth.cached[iova] | (truth.device[iova] - {None} if ats else set())
        phys: int | None
        try:
            if ats:
                phys = self.port.locate(iova + offset, write)
            else:
                phys = self.unit.translate(self.dids[domain], iova + offset, write)
        except FaultError:
            phys = None
        self.judge(truth, iova, offset, write, phys, cached)

    @rule(domain=domains)
    def look(self, domain: int) -> None:
        """Every address, both ways, read and write: fills the caches and finds what is wrong in them."""
        for i, iova in enumerate(ADDRESSES):
            for write in (False, True):
                for ats in (False, True) if domain == 0 else (False,):
                    self.access(domain, iova, write, i, ats)

    def judge(self, truth: Truth, iova: int, offset: int, write: bool, phys: int | None, cached: set[Leaf]) -> None:
        """The answer must come from a cache that may hold it or from a walk that is possible now."""
        need = 2 if write else 1
        now = truth.walks(iova)
        if phys is None:
            assert any(leaf is None or not leaf[1] & need for leaf in now) or (self.caching_mode and None in cached)
        else:
            assert phys - offset in {leaf[0] for leaf in now | cached if leaf is not None and leaf[1] & need}

    @rule(domain=domains, first=addresses, last=addresses, ih=st.booleans())
    def flush_range(self, domain: int, first: int, last: int, ih: bool) -> None:
        start, end = min(first, last), max(first, last) + 4095
        self.unit.flush_range(self.dids[domain], start, end, ih=ih)
        self.truth[domain].invalidate(start, end, structures=not ih, device=True)
        self.look(domain)

    @rule(domain=domains, iova=addresses, mask=st.integers(0, 20), ih=st.booleans())
    def inv_pages(self, domain: int, iova: int, mask: int, ih: bool) -> None:
        start = iova >> (12 + mask) << (12 + mask)
        self.unit.inv_pages(self.dids[domain], start, mask, ih=ih)
        self.truth[domain].invalidate(start, start + (4096 << mask) - 1, structures=not ih, device=False)
        self.look(domain)

    @rule(domain=domains, everything=st.booleans())
    def flush_domain(self, domain: int, everything: bool) -> None:
        if everything:
            self.unit.flush_all(self.dids[domain])
        else:
            self.unit.inv_domain(self.dids[domain])
        self.truth[domain].invalidate(0, (1 << 39) - 1, structures=True, device=everything)
        self.look(domain)

    @rule()
    def inv_global(self) -> None:
        self.unit.inv_global()
        for truth in self.truth:
            truth.invalidate(0, (1 << 39) - 1, structures=True, device=False)
        self.look(0)
        self.look(1)

    def teardown(self) -> None:
        if hasattr(self, "unit"):
            for cache in (self.unit.iotlb, self.unit.psc):
                assert cache.used == len(cache.entries()) <= cache.capacity


QUICK = settings(max_examples=40, stateful_step_count=25, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=2000, stateful_step_count=50, suppress_health_check=list(HealthCheck))


def test_every_answer_is_current_or_stale_since_the_last_covering_request() -> None:
    run_state_machine_as_test(CacheMachine, settings=QUICK)


@pytest.mark.long
def test_every_answer_is_current_or_stale_over_a_hundred_thousand_steps() -> None:
    run_state_machine_as_test(CacheMachine, settings=LONG)
