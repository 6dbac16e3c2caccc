"""Whether a call lets other threads run: not by a clock, but by giving another thread no other chance."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

NEVER = 1e6  # seconds until the interpreter would take the GIL away
CALLS = 2000


def released(call: Callable[[], object]) -> bool:
    """Whether another thread ran while ``call`` was called, again and again, by a thread that otherwise keeps the GIL.

    The other thread wants to run from before the first call on. It is not asked to be fast: when the GIL is let go,
    it runs in one of the calls; when not, in none.
    """
    ran: list[bool] = []
    gate, ready = threading.Lock(), threading.Event()
    gate.acquire()

    def other() -> None:
        ready.set()
        with gate:
            ran.append(True)

    before = sys.getswitchinterval()
    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    sys.setswitchinterval(NEVER)
    try:
        gate.release()
        assert not ran
        for _ in range(CALLS):
            if ran:
                break
            call()
        return bool(ran)
    finally:
        sys.setswitchinterval(before)
        thread.join()
