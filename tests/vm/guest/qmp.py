"""QEMU's monitor (QMP) as the guest reaches it: the third serial line is joined to it (``tools/vm/machine.py``)."""

from __future__ import annotations

import json
import os
import select
import termios
import time
import tty
from types import TracebackType
from typing import Any

LINE = "/dev/ttyS2"


class Monitor:
    """One conversation; ``with Monitor() as monitor: monitor("query-block")``."""

    def __init__(self) -> None:
        self.fd = os.open(LINE, os.O_RDWR | os.O_NOCTTY)
        self.rest = b""
        try:
            tty.setraw(self.fd)
            time.sleep(
                0.1
            )  # the terminal has echoed the greeting, or what it had of it: QEMU complains, 0xff starts anew
            termios.tcflush(self.fd, termios.TCIFLUSH)
            os.write(self.fd, b"\xff")
            self("qmp_capabilities")
        except BaseException:
            os.close(self.fd)
            raise

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Run a command; its answer, or AssertionError with QEMU's own words."""
        words = {"execute": command, "id": command, "arguments": arguments}
        os.write(self.fd, json.dumps(words).encode() + b"\n")
        while True:
            try:
                answer = json.loads(self._line())
            except ValueError:
                continue  # the rest of a line that was cut
            if answer.get("id") == command:
                done = command == "qmp_capabilities"  # a second conversation is told that the first one did it
                assert "error" not in answer or done, answer["error"]
                return answer.get("return")

    def _line(self) -> bytes:
        while b"\n" not in self.rest:
            assert select.select([self.fd], [], [], 20)[0], f"QEMU does not answer: {self.rest!r}"
            self.rest += os.read(self.fd, 4096)
        line, self.rest = self.rest.split(b"\n", 1)
        return line

    def throttle(self, drive: str, *, bytes_a_second: int) -> None:
        """Slow a drive down; 0 lets it go."""
        limits = dict.fromkeys(("bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
        self("block_set_io_throttle", device=drive, bps=bytes_a_second, **limits)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)
