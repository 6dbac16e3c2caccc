"""What is recorded: a command that runs to its end, or some time, and the signals that end either.

Signals set a flag and nothing else, so that no exception can fall between two steps of a recording. The command runs in
our process group: Ctrl-C on a terminal reaches it directly; it gets time to end by itself, then SIGTERM, then SIGKILL.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from types import FrameType, TracebackType

from dmakit.errors import InputError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE = 5.0  # seconds before a command that was asked to end is asked harder


class Signals:
    """Counts SIGINT, SIGTERM and SIGHUP while it is open (``with``); ``first`` is the first that came, or 0."""

    def __init__(self) -> None:
        self.first = 0
        self.count = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or number
        self.count += 1


class Workload:
    """The command, or nothing but time."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.command = list(command)
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        self._asked = 0.0
        self._stage = 0

    def start(self) -> None:
        """Run the command, if there is one. InputError when it cannot be run."""
        if not self.command:
            return
        try:
            self.process = subprocess.Popen(self.command, env=os.environ | self.environment)
        except OSError as error:
            raise InputError(f"{self.command[0]}: cannot be run: {error.strerror}", error.errno or 2) from error

    def ended(self, wait: float) -> bool:
        """Whether the command has ended, waiting up to ``wait`` seconds; never without a command."""
        if self.process is None:
            return False
        try:
            self.process.wait(wait)
        except subprocess.TimeoutExpired:
            return False
        return True

    def ask(self, number: int, now: float) -> None:
        """Have it end: called again and again after a signal, ``now`` in seconds."""
        if self.process is None or self.process.poll() is not None:
            return
        if self._stage == 0:
            self._stage, self._asked = 1, now
            if number != signal.SIGINT:
                self.process.send_signal(number)
        elif now - self._asked >= _GRACE:
            self.process.send_signal(signal.SIGTERM if self._stage == 1 else signal.SIGKILL)
            self._stage, self._asked = 2, now

    def stop(self) -> None:
        """End it now: the recording failed."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    @property
    def status(self) -> int:
        """The command's exit status as a shell gives it (128 + signal); 0 without a command or while it runs."""
        code = self.process.poll() if self.process is not None else 0
        return 128 - code if code is not None and code < 0 else code or 0
