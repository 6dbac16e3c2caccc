"""The fail-nth sweep: run an operation with its 1st, 2nd, 3rd … fallible use failing, until none fails."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dmakit.errors import DmakitError
from dmakit.failpoint import FailPoint

World = TypeVar("World")


def descriptors() -> int:
    """Open descriptors of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@contextmanager
def no_collection() -> Iterator[None]:
    """What an earlier test left to the collector keeps files open: it must not go while descriptors are counted."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def sweep(
    make: Callable[[], World],
    failpoint: Callable[[World], FailPoint],
    operation: Callable[[World], object],
    check: Callable[[World, bool], None],
    *,
    limit: int = 10_000,
) -> int:
    """Returns how many fallible uses the operation has.

    For n = 0, 1, …: a fresh world, the n-th use armed to fail, the operation run; ``check(world, failed)`` must
    find nothing leaked and nothing damaged. ``failed`` tells whether the operation raised. Ends when the armed
    use is never reached.
    """
    for nth in range(limit):
        world = make()
        point = failpoint(world)
        point.arm(nth)
        failed = False
        try:
            operation(world)
        except DmakitError:
            failed = True
        fired = point.fired
        point.disarm()
        check(world, failed)
        if not fired:
            assert not failed, "the operation failed although no failure was injected"
            return nth
    raise AssertionError(f"the operation has more than {limit} fallible uses")
