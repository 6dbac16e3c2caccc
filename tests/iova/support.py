"""What the allocator's tests share: calls that answer 0 instead of raising, and the tree's invariants."""

from __future__ import annotations

from dmakit.consts import IOVA_ANCHOR, IOVA_NIL
from dmakit.errors import ExhaustedError
from dmakit.iova.domain import IovaDomain

LIMIT32, LIMIT64 = (1 << 20) - 1, (1 << 52) - 1


def alloc(domain: IovaDomain, size: int, limit: int = LIMIT32, flush: bool = True, cpu: int = 0) -> int:
    """``alloc_fast`` with 0 for a failure."""
    try:
        return domain.alloc_fast(size, limit, flush, cpu=cpu)
    except ExhaustedError:
        return 0


def naturally_aligned_fit(start: int, end: int) -> int:
    """The largest size for which an aligned range fits into [start, end), by trying every one."""
    best = 0
    for size in range(1, end - start + 1):
        align = 1 << (size - 1).bit_length()
        if (end - size) // align * align >= start:
            best = size
    return best


def check_tree(domain: IovaDomain, *, fits: bool = False) -> None:
    """Order, threads, parent links, balance, counts; with ``fits`` the gap sizes of an augmented tree."""
    tree = domain.search.tree
    order: list[int] = []

    def visit(node: int, parent: int) -> int:
        if node == IOVA_NIL:
            return 0
        assert tree.parent[node] == parent
        left = visit(tree.left[node], node)
        order.append(node)
        right = visit(tree.right[node], node)
        assert abs(left - right) <= 1
        assert tree.height[node] == 1 + max(left, right)
        if tree.augmented:
            assert tree.best[node] == max(tree.fit[node], tree.best[tree.left[node]], tree.best[tree.right[node]])
        return tree.height[node]

    visit(tree.root, IOVA_NIL)
    assert order[-1] == IOVA_ANCHOR
    assert len(order) == tree.count + 1
    assert [tree.next[node] for node in order[:-1]] == order[1:]
    assert [tree.prev[node] for node in order] == [IOVA_NIL, *order[:-1]]
    spans = [(tree.lo[node], tree.hi[node]) for node in order]
    assert all(lo <= hi for lo, hi in spans)
    assert all(below[1] < above[0] for below, above in zip(spans, spans[1:], strict=False))
    assert all(view[IOVA_NIL] == 0 for view in (tree.left, tree.right, tree.height, tree.fit, tree.best))
    if fits:
        for node in order[:-1]:
            start = max(tree.start, tree.hi[tree.prev[node]] + 1 if tree.prev[node] else 0)
            assert tree.fit[node] == naturally_aligned_fit(start, tree.lo[node])
