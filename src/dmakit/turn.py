"""Whose turn it is: what keeps threads apart while one of them is inside a machine without the GIL.

A *machine* is everything that counts in one ledger, and its turn is the ledger's. A batch call lets go of the GIL for
its loop, so it takes the turn first; other threads' batches wait for it. Calls that keep the GIL exclude each other by
that; all they must do is not to begin while somebody's batch is running, so they do not take the turn but wait until
nobody else has it (``_wait``), as the last thing before they touch anything: from there on they run to their end. That
costs them one look at a word.

Whoever waits has given up the GIL, because the holder may need it (to note an event, to widen an array). The turn may
be taken again by the thread that has it: what a batch calls in Python (a CPU-cache model, a list of events) may call
the machine. ``with ledger.turn:`` makes several calls of a thread one, for everybody else.

Compiled, the words here change under the GIL only, so that a turn which nobody waits for costs no lock: the first who
waits takes the lock in the holder's name (it is free, or with a waiter that is just letting go of it), then waits for
it as the others do; giving the turn back releases it. Interpreted, the lock is the turn.

What this cannot do: a call that keeps the GIL loses it where Python runs in its middle, and an interpreted one
anywhere. Between two such calls only a ``with`` helps (contracts.md, Threads).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import cython

from dmakit.errors import MisuseError

if not cython.compiled:
    _thread_ident = threading.get_ident
    _allocate_lock = threading.Lock

    def _acquire_lock(lock: threading.Lock, wait: bool) -> bool:
        """Take the lock; without ``wait`` only when it is free. Whether it was taken."""
        return lock.acquire(wait)

    def _release_lock(lock: threading.Lock) -> None:
        """Let it go."""
        lock.release()

    def _free_lock(lock: threading.Lock) -> None:
        """Nothing to do: it goes with its last reference."""


if TYPE_CHECKING:
    from types import TracebackType


@cython.final
@cython.cclass
class Turn:
    """One turn; a context manager. ``taken``: somebody has it."""

    def __init__(self) -> None:
        self.taken = False
        self.waited = False
        self.owner = 0
        self.depth = 0
        self.lock = _allocate_lock()
        if self.lock == cython.NULL:
            raise MemoryError("no memory for a lock")

    def __dealloc__(self) -> None:
        if self.lock != cython.NULL:
            _free_lock(self.lock)

    def __enter__(self) -> Turn:
        self._take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.taken or self.owner != self._me():
            raise MisuseError("turn: this thread does not have it")
        self._give()

    def _me(self) -> cython.ulong:
        return _thread_ident()

    def _take(self) -> cython.void:
        """Take the turn, after whoever has it; the thread that has it takes it once more."""
        me: cython.ulong = self._me()
        if self.taken and self.owner == me:
            self.depth += 1
            return
        if cython.compiled:
            self._wait()
        else:
            _acquire_lock(self.lock, True)
        self.owner = me
        self.taken = True

    def _give(self) -> cython.void:
        """Give back what ``_take`` took."""
        if self.depth != 0:
            self.depth -= 1
            return
        self.taken = False
        if self.waited or not cython.compiled:
            self.waited = False
            _release_lock(self.lock)

    def _wait(self) -> cython.void:
        """Return when no other thread has the turn, with the GIL held since."""
        while self.taken and self.owner != self._me():
            if cython.compiled and not self.waited:
                _acquire_lock(self.lock, True)
                self.waited = True
            with cython.nogil:
                _acquire_lock(self.lock, True)
                _release_lock(self.lock)
