"""One branch of an order search: a model of the domain in which some pending operations have taken effect already."""

from __future__ import annotations

import cython

if not cython.compiled:
    from dmakit.consts import IOVA_ANCHOR, IOVA_NIL
    from dmakit.iova.bits import mix
    from dmakit.iova.domain import IovaDomain


@cython.cclass
class Branch:
    """A model of the domain; ``done``: operations that took effect and have not returned; ``passed``: those that were
    overtaken by a later, conflicting one. ``stale``: ``ranges`` does not fit the tree since a change that concerned
    many ranges; it is counted anew when somebody asks for the state, which few do."""

    def __init__(self, domain: IovaDomain) -> None:
        self.domain = domain
        self.done: frozenset[int] = frozenset()
        self.passed: frozenset[int] = frozenset()
        self.reordered = self.answer = self.ranges = 0
        self.cached = self.stale = False

    def copy(self) -> Branch:
        """An independent branch with the same past."""
        twin = Branch(self.domain.copy())
        twin.done, twin.passed, twin.reordered = self.done, self.passed, self.reordered
        twin.ranges, twin.stale = self.ranges, self.stale
        return twin

    def change(self, lo: cython.ulonglong, hi: cython.ulonglong) -> cython.void:
        """The range [lo, hi] came into the tree or went out of it."""
        self.ranges ^= mix(mix(lo, hi), lo)

    def _recount(self) -> cython.void:
        tree = self.domain.search.tree
        node: cython.int = tree.prev[IOVA_ANCHOR]
        self.ranges, self.stale = 0, False
        while node != IOVA_NIL:
            self.change(tree.lo[node], tree.hi[node])
            node = tree.prev[node]

    def state(self) -> tuple[object, ...]:
        """Equal for branches that will answer alike. ``ranges`` stands for the tree: the exclusive or of the mixed
        bounds of its ranges, kept up while they come and go."""
        if self.stale:
            self._recount()
        return self.done, self.ranges, self.domain.search.hints(), self.domain.rcaches.fingerprint()
