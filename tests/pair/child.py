"""A child process: one program after the other, as pickles on stdin and stdout, on the core that DMAKIT_CORE names."""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import traceback

from tests.pair.program import run


def main() -> None:
    """Answer programs until stdin ends."""
    faulthandler.enable()
    source = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not break the protocol
    while True:
        try:
            program = pickle.load(source)
        except EOFError:
            return
        try:
            answer = run(program)
        except Exception:
            answer = ["died", traceback.format_exc()]
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
