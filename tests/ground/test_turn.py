"""The turn of a machine: one thread at a time, again for the thread that has it, and who waits goes on afterwards."""

from __future__ import annotations

import threading

import pytest

from dmakit.errors import MisuseError
from dmakit.ledger import Ledger
from dmakit.turn import Turn

SOON = 10.0  # seconds: a thread that has not come that far by then never will


def started(work: object) -> threading.Thread:
    """A thread that does ``work``; it does not keep a failing test from ending."""
    thread = threading.Thread(target=work, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def test_the_thread_that_has_the_turn_may_take_it_again() -> None:
    turn = Turn()
    with turn, turn, turn:
        assert turn.taken
    assert not turn.taken


def test_an_exception_gives_the_turn_back() -> None:
    turn = Turn()
    with pytest.raises(KeyError), turn:
        raise KeyError
    assert not turn.taken


def test_giving_back_what_one_does_not_have_is_refused() -> None:
    turn, refused = Turn(), []

    def meddle() -> None:
        with pytest.raises(MisuseError, match="^turn: this thread does not have it$"):
            turn.__exit__(None, None, None)
        refused.append(True)

    meddle()
    with turn:
        started(meddle).join(SOON)
    assert refused == [True, True]


def test_others_wait_until_it_is_given_back() -> None:
    ledger, order, waiting = Ledger(), [], threading.Event()

    def other() -> None:
        waiting.set()
        with ledger.turn:
            order.append("other")

    with ledger.turn:
        thread = started(other)
        assert waiting.wait(SOON)
        thread.join(0.01)
        assert thread.is_alive()
        order.append("first")
    thread.join(SOON)
    assert order == ["first", "other"]


def test_a_counter_behind_the_turn_loses_nothing() -> None:
    turn, counted = Turn(), [0]

    def work() -> None:
        for _ in range(200):
            with turn:
                before = counted[0]
                for _ in range(20):
                    pass
                counted[0] = before + 1

    threads = [started(work) for _ in range(4)]
    for thread in threads:
        thread.join(SOON)
    assert counted == [800]
    assert not turn.taken
