"""Order search: one order of overlapping operations that explains every recorded answer of one domain.

Operations whose intervals do not overlap take effect in the order of time. For those that do, every order inside the
intervals is possible, and the model's answers must equal the recorded ones. The search keeps a *frontier* of branches:
each is a model of the domain and the set of operations that already took effect in it although they have not returned
yet. At the return of an operation every branch in which it has not taken effect is continued by each sequence of
pending operations that ends with it; a branch whose answer differs from the record dies; branches with the same state
(``Branch.state``) and the same open operations are one. The largest frontier is the search's *width*; it
is capped, and whether the cap was ever met is reported.

Only orders that can matter are tried. Two operations *conflict* when they use the magazines of the same CPU and
order, or when both leave their CPU's magazines (tree or depot), or when one may flush all magazines; operations that
do not conflict commute.

When no branch survives, the record *diverges*: the kernel's answer is adopted in the first branch (as little as
possible is changed), and the replay goes on. In a domain whose state is not known (the trace begins mid-life, or
events were lost) an answer counts as matched only when it is a range that the trace itself saw freed into the
magazine it came from; every other one is adopted.

Models no code: it looks for the order in which the kernel's locks were taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from dmakit.consts import (
    IOVA_MAG_SIZE,
    IOVA_RANGE_CACHE_MAX_SIZE,
    L_IOVA_DEPOT,
    L_IOVA_MAGAZINE,
)
from dmakit.errors import ExhaustedError
from dmakit.iova.domain import IovaDomain
from dmakit.trace.operations import Operation

WIDTH_LIMIT = 64
_RIVALS_LIMIT = 4  # pending operations whose orders are tried at one return
_MERGE_EVERY = 32  # returns after which branches are compared although none was added
_CACHED = (L_IOVA_MAGAZINE, L_IOVA_DEPOT)


def order_of(size: int) -> int:
    """The magazine order of a size in granules (6 and more are not cached)."""
    return (size - 1).bit_length()


@dataclass
class Branch:
    """A model of the domain; ``done``: operations that took effect and have not returned; ``passed``: those that were
    overtaken by a later, conflicting one."""

    domain: IovaDomain
    done: frozenset[int] = frozenset()
    passed: frozenset[int] = frozenset()
    reordered: int = 0
    answer: int = 0
    cached: bool = False
    ranges: int = 0

    def copy(self) -> Branch:
        """An independent branch with the same past."""
        return Branch(self.domain.copy(), self.done, self.passed, self.reordered, ranges=self.ranges)

    def state(self) -> tuple[object, ...]:
        """Equal for branches that will answer alike. ``ranges`` stands for the tree: the exclusive or of the hashes of
        its ranges, kept up while they come and go."""
        return self.done, self.ranges, self.domain.search.hints(), self.domain.rcaches.fingerprint()

    def recount(self) -> None:
        """Compute ``ranges`` anew, after a change that concerned many."""
        self.ranges = 0
        for node in self.domain.nodes():
            self.ranges ^= hash(node)


@dataclass
class Counts:
    """What a replay of one domain counted."""

    allocations: int = 0
    matched: int = 0
    adopted: int = 0
    diverged: int = 0
    operations: int = 0
    overlapping: int = 0
    reordered: int = 0
    unknown_frees: int = 0
    width: int = 1
    capped: bool = False
    divergences: list[dict[str, Any]] = field(default_factory=list)


class OrderSearch:
    """Replays the operations of one domain; feed ``begin`` and ``end`` in the order of time."""

    def __init__(
        self, domain: IovaDomain, *, known: bool, presumed: bool = False, width_limit: int = WIDTH_LIMIT
    ) -> None:
        self.branches = [Branch(domain)]
        self.known = known
        self.presumed = presumed
        self.width_limit = width_limit
        self.pending: dict[int, Operation] = {}
        self.counts = Counts()
        self.since_merge = 0

    # Feeding ---------------------------------------------------------------------------------------------------------

    def begin(self, key: int, op: Operation) -> None:
        """The entry of ``op``; ``key`` is unique."""
        if any(other.kind != "depot" for other in self.pending.values()):
            self.counts.overlapping += 1
        self.pending[key] = op

    def end(self, key: int) -> None:
        """The return of the operation ``key``: it has taken effect by now."""
        op = self.pending[key]
        self.counts.operations += 1
        self.counts.allocations += op.kind == "alloc"
        survivors, stuck = [], []
        for branch in self.branches:
            if key in branch.done:
                branch.done -= {key}
                survivors.append(branch)
            else:
                survivors += self._continue(branch, key)
                stuck.append(branch)
        del self.pending[key]
        if survivors:
            self._agree(op, survivors)
        else:
            self._disagree(key, op, stuck[0])

    def lose(self) -> None:
        """Events were lost: from here on the state is not known."""
        self.known = False
        self.branches = self.branches[:1]

    # One operation in one branch --------------------------------------------------------------------------------------

    def _run(self, branch: Branch, op: Operation, cpu: int) -> bool:
        """Let ``op`` take effect; false when the model's answer is not the recorded one (then it is undone)."""
        domain = branch.domain
        if op.kind in ("alloc", "miss"):
            return self._allocate(branch, op, cpu)
        if op.kind in ("free", "free_node"):
            self._free(branch, op, cpu)
            return True
        if op.kind == "drain":
            domain.flush_rcaches(cpu=cpu)
        elif op.kind == "reserve":
            domain.reserve(op.pfn or 0, op.hi)
        elif op.kind == "depot" and not self._depot(domain, op):
            return True
        elif op.kind == "offline" and op.size < domain.cpus:
            domain.set_online(op.size, False)
            domain.set_online(op.size, True)
        branch.recount()
        return True

    def _allocate(self, branch: Branch, op: Operation, cpu: int) -> bool:
        domain, counts = branch.domain, branch.domain.ledger.counts
        before = counts[L_IOVA_MAGAZINE] + counts[L_IOVA_DEPOT]
        pfn = _alloc(domain, op, cpu, False)
        if pfn == 0 and op.flush and op.searches is None:
            pfn = _alloc(domain, op, cpu, True)
        cached = counts[L_IOVA_MAGAZINE] + counts[L_IOVA_DEPOT] > before
        branch.answer, branch.cached = pfn, cached
        wrong_path = op.searches is not None and cached == bool(op.searches)
        if op.pfn is None or (pfn == op.pfn and not wrong_path):
            if pfn and not cached:
                branch.ranges ^= hash((pfn, pfn + _span(op.size) - 1))
            return True
        if pfn and cached:
            domain.free_fast(pfn, op.size, cpu=cpu)
        elif pfn:
            domain.free(pfn, cpu=cpu)
        return False

    def _free(self, branch: Branch, op: Operation, cpu: int) -> None:
        domain, pfn = branch.domain, op.pfn or 0
        node = domain.search.tree.find(pfn)
        if node is None:
            self.counts.unknown_frees += 1
            if op.kind == "free_node" or op.to_tree:
                return
            domain.adopt(pfn, _span(op.size))
            branch.recount()
        if op.kind == "free" and not op.to_tree and order_of(op.size) < IOVA_RANGE_CACHE_MAX_SIZE:
            domain.free_fast(pfn, op.size, cpu=cpu)
            return
        domain.free(pfn, cpu=cpu)  # also when the kernel found no memory for a magazine
        branch.ranges ^= hash(node)

    @staticmethod
    def _depot(domain: IovaDomain, op: Operation) -> bool:
        """One run of a depot's work; true when it drained. The order is not recorded: one over its limit, if any."""
        over = [order for order, size in enumerate(domain.depot_sizes()) if size > domain.online_cpus]
        if not over or (op.drained and op.drained[0][1] != IOVA_MAG_SIZE):
            return False
        return domain.depot_work(over[0])

    # Orders -----------------------------------------------------------------------------------------------------------

    def _continue(self, branch: Branch, key: int) -> list[Branch]:
        """The branches in which ``key`` has taken effect; ``branch`` itself when only one order is possible."""
        rivals = self._rivals(branch, key)
        op = self.pending[key]
        if len(rivals) > _RIVALS_LIMIT:
            self.counts.capped = True
            rivals = rivals[:_RIVALS_LIMIT]
        if not rivals and len(op.cpus) == 1:
            branch.reordered += key in branch.passed
            return [branch] if self._run(branch, op, op.cpus[0]) else []
        found = []
        for count in range(len(rivals) + 1):
            for first in permutations(rivals, count):
                for twin in self._sequence(branch, (*first, key)):
                    twin.done = (branch.done | set(first)) - {key}
                    left = [rival for rival in rivals if rival not in first and self.pending[rival].begin < op.begin]
                    twin.passed |= frozenset(left)
                    found.append(twin)
        return found

    def _sequence(self, branch: Branch, keys: tuple[int, ...]) -> Iterator[Branch]:
        """Copies of ``branch`` in which ``keys`` took effect in that order, for every choice of CPU."""
        twins = [branch.copy()]
        for key in keys:
            op = self.pending[key]
            following = []
            for twin in twins:
                for i, cpu in enumerate(op.cpus):
                    target = twin if i == len(op.cpus) - 1 else twin.copy()
                    if self._run(target, op, cpu):
                        target.reordered += key in target.passed
                        following.append(target)
            twins = following
        yield from twins

    def _rivals(self, branch: Branch, key: int) -> list[int]:
        """Pending operations, not yet in effect, whose order with ``key`` may matter, directly or through others."""
        open_keys = [other for other in self.pending if other not in branch.done and other != key]
        chosen = [key]
        for here in chosen:  # grows while it is walked
            for other in open_keys:
                if other not in chosen and self._conflict(branch.domain, self.pending[here], self.pending[other]):
                    chosen.append(other)
        return chosen[1:]

    @staticmethod
    def _conflict(domain: IovaDomain, one: Operation, two: Operation) -> bool:
        if _flushes(one) or _flushes(two):
            return True
        orders = order_of(one.size), order_of(two.size)
        cached = max(orders) < IOVA_RANGE_CACHE_MAX_SIZE and {one.kind, two.kind} <= {"alloc", "free", "miss"}
        if cached and orders[0] == orders[1] and set(one.cpus) & set(two.cpus):
            return True
        return not _private(domain, one) and not _private(domain, two)

    # Outcomes ---------------------------------------------------------------------------------------------------------

    def _agree(self, op: Operation, survivors: list[Branch]) -> None:
        if len(survivors) > 1:
            self.since_merge += 1
            if len(survivors) > len(self.branches) or self.since_merge >= _MERGE_EVERY:
                survivors = self._merge(survivors)
        self.branches = survivors
        self.counts.width = max(self.counts.width, len(survivors))
        if op.kind != "alloc":
            return
        if self.known:
            self.counts.matched += 1
            self.presumed = False
        elif all(branch.cached for branch in survivors):
            self.counts.matched += 1
        else:
            self.counts.adopted += 1

    def _merge(self, survivors: list[Branch]) -> list[Branch]:
        """One branch for each state, the one with the fewest reordered operations, best first."""
        survivors.sort(key=lambda branch: branch.reordered)
        self.since_merge = 0
        kept: dict[tuple[object, ...], Branch] = {}
        for branch in survivors:
            kept.setdefault(branch.state(), branch)
        found = list(kept.values())
        if len(found) > self.width_limit:
            self.counts.capped = True
        return found[: self.width_limit]

    def _disagree(self, key: int, op: Operation, branch: Branch) -> None:
        """No order explains ``op``: adopt its answer in ``branch`` and go on."""
        self.branches = [branch]
        if self.presumed and op.kind in ("alloc", "miss"):
            self.known = False
        if self.known:
            self.counts.diverged += 1
            self.counts.divergences.append(self._describe(op, branch))
        elif op.kind == "alloc":
            self.counts.adopted += 1
        if op.kind == "alloc" and op.pfn:
            _adopt(branch.domain, op, op.pfn)
            branch.recount()

    def _describe(self, op: Operation, branch: Branch) -> dict[str, Any]:
        """The divergence, with the state around it, for people and JSON."""
        domain = branch.domain
        order = order_of(op.size)
        state: dict[str, Any] = {"nodes": domain.node_count, "depots": domain.depot_sizes()}
        if order < IOVA_RANGE_CACHE_MAX_SIZE:
            loaded, prev = domain.magazines(op.cpus[0], order)
            state["magazines"] = {"loaded": len(loaded), "top": loaded[-4:], "prev": len(prev), "prev_top": prev[-4:]}
        near = [node for node in domain.nodes() if abs(node[0] - (op.pfn or op.limit)) < 64]
        return {
            "line": op.line,
            "operation": str(op),
            "kernel": op.pfn,
            "ours": branch.answer,
            "kernel_path": _path(op),
            "our_path": "magazine" if branch.cached else "tree",
            "pending": [str(other) for other in self.pending.values()],
            "near": near[:8],
            **state,
        }


def _path(op: Operation) -> str:
    if op.searches is None:
        return "not recorded"
    return "tree" if op.searches else "magazine"


def _span(size: int) -> int:
    """Granules that an allocation of ``size`` occupies."""
    order = order_of(size)
    return 1 << order if order < IOVA_RANGE_CACHE_MAX_SIZE else size


def _adopt(domain: IovaDomain, op: Operation, pfn: int) -> None:
    """Take the kernel's answer over. Ranges that lie above it in our magazine are not in the kernel's: they are taken
    out too, and count as allocated until they are seen freed."""
    order = order_of(op.size)
    if order < IOVA_RANGE_CACHE_MAX_SIZE:
        loaded, _ = domain.magazines(op.cpus[0], order)
        above = loaded[loaded.index(pfn) + 1 :] if pfn in loaded else []
        for range_above in above:
            if range_above + (1 << order) - 1 <= op.limit:
                domain.rcaches.discard(range_above)
    domain.adopt(pfn, _span(op.size))


def _alloc(domain: IovaDomain, op: Operation, cpu: int, flush: bool) -> int:
    try:
        limit = min(op.limit, domain.highest_pfn)
        if op.retry:
            return domain.alloc(_span(op.size), limit, cpu=cpu)
        return domain.alloc_fast(op.size, limit, flush, cpu=cpu)
    except ExhaustedError:
        return 0


def _flushes(op: Operation) -> bool:
    """Whether an allocation gave all magazines back, as far as the trace tells."""
    return op.kind == "drain" or (op.kind == "alloc" and op.flush and op.searches is None and op.pfn == 0)


def _private(domain: IovaDomain, op: Operation) -> bool:
    """Whether ``op``, if it took effect now, would stay in its CPU's own magazines."""
    order = order_of(op.size)
    if op.kind not in ("alloc", "free") or op.retry or order >= IOVA_RANGE_CACHE_MAX_SIZE or len(op.cpus) > 1:
        return False
    slot = op.cpus[0] * IOVA_RANGE_CACHE_MAX_SIZE + order
    rcaches = domain.rcaches
    loaded = rcaches.pool.size[rcaches.loaded[slot]]
    prev = rcaches.pool.size[rcaches.prev[slot]]
    if op.kind == "alloc":
        return loaded > 0 or prev > 0
    return loaded < IOVA_MAG_SIZE or prev < IOVA_MAG_SIZE
