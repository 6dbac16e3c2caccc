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

from itertools import permutations
from typing import Any

import cython

from dmakit.errors import MisuseError

if not cython.compiled:
    from dmakit.consts import (
        IOVA_MAG_SIZE,
        IOVA_NIL,
        IOVA_RANGE_CACHE_MAX_SIZE,
        L_IOVA_DEPOT,
        L_IOVA_MAGAZINE,
    )
    from dmakit.iova.bits import ceil_log2
    from dmakit.iova.domain import IovaDomain
    from dmakit.trace.branch import Branch
    from dmakit.trace.operation import Operation
    from dmakit.trace.tally import Counts, Tally

WIDTH_LIMIT = 64
_RIVALS_LIMIT = 4  # pending operations whose orders are tried at one return
_MERGE_EVERY = 32  # returns after which branches are compared although none was added


def order_of(size: cython.ulonglong) -> cython.int:
    """The magazine order of a size in granules (6 and more are not cached)."""
    return ceil_log2(size) if size else 1


@cython.cclass
class OrderSearch:
    """Replays the operations of one domain; feed ``begin`` and ``end`` in the order of time."""

    def __init__(self, domain: IovaDomain, tallies: list[Tally], *, width_limit: int = WIDTH_LIMIT) -> None:
        self.branches = [Branch(domain)]
        self.tallies = tallies
        self.width_limit = width_limit
        self.pending: dict[int, Operation] = {}
        self.counts = Counts()
        self.since_merge = 0

    # Feeding ---------------------------------------------------------------------------------------------------------

    def begin(self, key: cython.longlong, op: Operation) -> None:
        """The entry of ``op``; ``key`` is unique."""
        other: Operation
        for other in self.pending.values():
            if other.kind != "depot":
                self.counts.overlapping += 1
                break
        self.pending[key] = op

    def end(self, key: cython.longlong) -> None:
        """The return of the operation ``key``: it has taken effect by now."""
        if key not in self.pending:
            raise MisuseError(f"key={key}: no operation with this key has begun")
        op: Operation = self.pending[key]
        branch: Branch
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
        for branch in survivors or stuck:
            if key in branch.passed:
                branch.passed -= {key}
        if survivors:
            self._agree(op, survivors)
        else:
            self._disagree(key, op, stuck[0])

    def lose(self) -> None:
        """Events were lost: from here on the state is not known."""
        tally: Tally
        for tally in self.tallies:
            tally.known = False
        self.branches = self.branches[:1]

    # One operation in one branch --------------------------------------------------------------------------------------

    def _run(self, branch: Branch, op: Operation, cpu: cython.int) -> bool:
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
        branch.stale = True
        return True

    def _allocate(self, branch: Branch, op: Operation, cpu: cython.int) -> bool:
        domain: IovaDomain = branch.domain
        before: cython.longlong = domain.ledger.counts[L_IOVA_MAGAZINE] + domain.ledger.counts[L_IOVA_DEPOT]
        pfn: cython.ulonglong = _alloc(domain, op, cpu, False)
        if pfn == 0 and op.flush and op.searches is None:
            pfn = _alloc(domain, op, cpu, True)
            branch.stale = True
        cached: cython.bint = domain.ledger.counts[L_IOVA_MAGAZINE] + domain.ledger.counts[L_IOVA_DEPOT] > before
        branch.answer, branch.cached = pfn, cached
        wrong_path = op.searches is not None and cached == bool(op.searches)
        if op.pfn is None or (pfn == op.pfn and not wrong_path):
            if pfn and not cached:
                branch.change(pfn, pfn + _span(op.size) - 1)
            return True
        if pfn and cached:
            domain._free_fast(cpu, pfn, op.size)
        elif pfn:
            domain._free(cpu, pfn)
        return False

    def _free(self, branch: Branch, op: Operation, cpu: cython.int) -> None:
        domain: IovaDomain = branch.domain
        pfn: cython.ulonglong = op.pfn or 0
        node: cython.int = domain.search.tree._find(pfn)
        if node == IOVA_NIL:
            self.counts.unknown_frees += 1
            if op.kind == "free_node" or op.to_tree:
                return
            domain.adopt(pfn, _span(op.size))
            branch.stale = True
            node = domain.search.tree._find(pfn)
        if op.kind == "free" and not op.to_tree and order_of(op.size) < IOVA_RANGE_CACHE_MAX_SIZE:
            domain._free_fast(cpu, pfn, op.size)
            return
        branch.change(domain.search.tree.lo[node], domain.search.tree.hi[node])
        domain._free(cpu, pfn)  # also when the kernel found no memory for a magazine

    @staticmethod
    def _depot(domain: IovaDomain, op: Operation) -> bool:
        """One run of a depot's work; true when it drained. The order is not recorded: one over its limit, if any."""
        over = _over(domain)
        if not over or (op.drained and op.drained[0][1] != IOVA_MAG_SIZE):
            return False
        return domain.depot_work(over[0])

    # Orders -----------------------------------------------------------------------------------------------------------

    def _continue(self, branch: Branch, key: int) -> list[Branch]:
        """The branches in which ``key`` has taken effect; ``branch`` itself when only one order is possible."""
        op: Operation = self.pending[key]
        rivals = self._rivals(branch, key) if len(self.pending) > 1 else []
        if len(rivals) > _RIVALS_LIMIT:
            self.counts.capped = True
            rivals = rivals[:_RIVALS_LIMIT]
        if not rivals and len(op.cpus) == 1:
            branch.reordered += key in branch.passed
            return [branch] if self._run(branch, op, op.cpus[0]) else []
        orders = [(*first, key) for count in range(len(rivals) + 1) for first in permutations(rivals, count)]
        orders = [order for order in orders if not _hopeless(branch.domain, self.pending[order[0]])]
        alone = len(orders) == 1 and self._sure(branch, orders[0])
        before = branch.done
        twin: Branch
        found: list[Branch] = []
        dead: set[tuple[int, ...]] = set()
        for order in orders:
            if any(order[:count] in dead for count in range(1, len(order))):
                continue
            last = order is orders[len(orders) - 1] and found  # nobody needs the branch as it was
            twins = self._sequence(branch if alone or last else branch.copy(), order, dead)
            left = [rival for rival in rivals if rival not in order and self.pending[rival].begin < op.begin]
            for twin in twins:
                twin.done = (before | set(order)) - {key}
                twin.passed |= frozenset(left)
            found += twins
        return found

    def _sure(self, branch: Branch, order: tuple[int, ...]) -> bool:
        """Whether ``order`` leaves ``branch`` as it is should it die: then it needs no copy."""
        first: Operation = self.pending[order[0]]
        last: Operation = self.pending[order[len(order) - 1]]
        if len(first.cpus) > 1 or len(last.cpus) > 1:
            return False
        if len(order) == 2:  # the first has the recorded answer, and a free has none
            return last.kind == "free" and not first.searches and first.pfn == (_next(branch.domain, first) or None)
        return len(order) == 1

    def _sequence(self, branch: Branch, keys: tuple[int, ...], dead: set[tuple[int, ...]]) -> list[Branch]:
        """``branch`` and copies of it in which ``keys`` took effect in that order, for every choice of CPU. When none
        is left, ``dead`` learns behind which first keys."""
        target: Branch
        twins = [branch]
        for count, key in enumerate(keys):
            op = self.pending[key]
            following = []
            for twin in twins:
                for i, cpu in enumerate(op.cpus):
                    target = twin if i == len(op.cpus) - 1 else twin.copy()
                    if self._run(target, op, cpu):
                        target.reordered += key in target.passed
                        following.append(target)
            twins = following
            if not twins:
                dead.add(keys[: count + 1])
                break
        return twins

    def _rivals(self, branch: Branch, key: int) -> list[int]:
        """Pending operations, not yet in effect, whose order with ``key`` may matter, directly or through others."""
        open_keys = [other for other in self.pending if other not in branch.done and other != key]
        chosen = [key]
        for here in chosen:  # grows while it is walked
            for other in open_keys:
                if other not in chosen and _conflict(branch.domain, self.pending[here], self.pending[other]):
                    chosen.append(other)
        return chosen[1:] if len(chosen) == 1 else self._that_matter(branch.domain, chosen)

    def _that_matter(self, domain: IovaDomain, chosen: list[int]) -> list[int]:
        """Rivals without the runs of depot work that find nothing to do, now or behind any of ``chosen``: only a free
        puts a magazine into a depot."""
        kinds = {self.pending[key].kind for key in chosen}
        if "depot" not in kinds or not kinds <= {"alloc", "miss", "depot"} or _over(domain):
            return chosen[1:]
        return [key for key in chosen[1:] if self.pending[key].kind != "depot"]

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
        cached: cython.bint = True
        branch: Branch
        for branch in survivors:
            cached = cached and branch.cached
        tally: Tally
        for tally in self.tallies:
            tally.agree(cached)

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
        tally: Tally
        found: dict[str, Any] | None = None
        for tally in self.tallies:
            if tally.disagree(op.kind) and tally.divergence is None:
                found = found or self._describe(op, branch)
                tally.divergence = found
        if op.kind == "alloc" and op.pfn:
            _adopt(branch.domain, op, op.pfn)
            branch.stale = True

    def _describe(self, op: Operation, branch: Branch) -> dict[str, Any]:
        """The divergence, with the state around it, for people and JSON."""
        domain = branch.domain
        order = order_of(op.size)
        state: dict[str, Any] = {"nodes": domain.node_count, "depots": domain.depot_sizes()}
        if order < IOVA_RANGE_CACHE_MAX_SIZE:
            loaded, prev = domain.magazines(op.cpus[0], order)
            state["magazines"] = {"loaded": len(loaded), "top": _top(loaded), "prev": len(prev), "prev_top": _top(prev)}
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


def _top(magazine: list[int]) -> list[int]:
    return magazine[max(len(magazine) - 4, 0) :]


def _path(op: Operation) -> str:
    if op.searches is None:
        return "not recorded"
    return "tree" if op.searches else "magazine"


def _span(size: cython.ulonglong) -> cython.ulonglong:
    """Granules that an allocation of ``size`` occupies."""
    one: cython.ulonglong = 1
    order: cython.int = order_of(size)
    return one << order if order < IOVA_RANGE_CACHE_MAX_SIZE else size


def _adopt(domain: IovaDomain, op: Operation, pfn: int) -> None:
    """Take the kernel's answer over. Ranges that lie above it in our magazine are not in the kernel's: they are taken
    out too, and count as allocated until they are seen freed."""
    order = order_of(op.size)
    if order < IOVA_RANGE_CACHE_MAX_SIZE:
        loaded, _ = domain.magazines(op.cpus[0], order)
        above = loaded[loaded.index(pfn) + 1 :] if pfn in loaded else []
        for range_above in above:
            if range_above + (1 << order) - 1 <= op.limit:
                domain.rcaches._discard(range_above)
    domain.adopt(pfn, _span(op.size))


def _over(domain: IovaDomain) -> list[int]:
    """Orders whose depots hold more magazines than there are CPUs on line."""
    return [
        order for order in range(IOVA_RANGE_CACHE_MAX_SIZE) if domain.rcaches.depot_size[order] > domain.online_cpus
    ]


def _alloc(domain: IovaDomain, op: Operation, cpu: cython.int, flush: cython.bint) -> cython.ulonglong:
    """The model's answer; 0 when it has none."""
    limit: cython.ulonglong = min(op.limit, domain.highest_pfn)
    if not 0 < op.size <= domain.highest_pfn:
        return 0
    if op.retry:
        return domain._alloc(cpu, _span(op.size), limit)
    return domain._alloc_fast(cpu, op.size, limit, flush)


def _flushes(op: Operation) -> cython.bint:
    """Whether an allocation gave all magazines back, as far as the trace tells."""
    return op.kind == "drain" or (op.kind == "alloc" and op.flush and op.searches is None and op.pfn == 0)


def _conflict(domain: IovaDomain, one: Operation, two: Operation) -> cython.bint:
    """Whether the order of two operations may matter."""
    if _flushes(one) or _flushes(two):
        return True
    order: cython.int = order_of(one.size)
    if (
        order == order_of(two.size)
        and order < IOVA_RANGE_CACHE_MAX_SIZE
        and one.kind in ("alloc", "free", "miss")
        and two.kind in ("alloc", "free", "miss")
        and not set(one.cpus).isdisjoint(two.cpus)
    ):
        return True
    return not _private(domain, one) and not _private(domain, two)


def _private(domain: IovaDomain, op: Operation) -> cython.bint:
    """Whether ``op``, if it took effect now, would stay in its CPU's own magazines."""
    order: cython.int = order_of(op.size)
    if (op.kind != "alloc" and op.kind != "free") or op.retry or order >= IOVA_RANGE_CACHE_MAX_SIZE or len(op.cpus) > 1:
        return False
    cpu: cython.int = op.cpus[0]
    slot: cython.int = cpu * IOVA_RANGE_CACHE_MAX_SIZE + order
    loaded: cython.int = domain.rcaches.pool._size(domain.rcaches.loaded[slot])
    prev: cython.int = domain.rcaches.pool._size(domain.rcaches.prev[slot])
    if op.kind == "alloc":
        return loaded > 0 or prev > 0
    return loaded < IOVA_MAG_SIZE or prev < IOVA_MAG_SIZE


def _next(domain: IovaDomain, op: Operation) -> cython.ulonglong:
    """What the magazines of its CPU would answer to the allocation ``op`` now; 0 when they would not."""
    one: cython.ulonglong = 1
    order: cython.int = order_of(op.size)
    limit: cython.ulonglong = min(op.limit, domain.highest_pfn)
    if op.kind != "alloc" or not _private(domain, op) or one << order > limit:
        return 0
    cpu: cython.int = op.cpus[0]
    slot: cython.int = cpu * IOVA_RANGE_CACHE_MAX_SIZE + order
    magazine: cython.int = domain.rcaches.loaded[slot]
    if domain.rcaches.pool._size(magazine) == 0:
        magazine = domain.rcaches.prev[slot]
    at: cython.Py_ssize_t = domain.rcaches.pool._look(magazine, limit + 1 - (one << order))
    return domain.rcaches.pool.words[at] if at else 0


def _hopeless(domain: IovaDomain, op: Operation) -> cython.bint:
    """Whether ``op``, taking effect now, would certainly get another answer than the recorded one."""
    answer: cython.ulonglong = _next(domain, op)
    return answer != 0 and op.pfn is not None and answer != op.pfn
