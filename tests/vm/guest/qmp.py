"""QEMU's monitor (QMP) as the guest reaches it: the third serial line is joined to it (``tools/vm/machine.py``)."""

from __future__ import annotations

import json
import os
import select
import termios
import tty
from types import TracebackType
from typing import Any

LINE = "/dev/ttyS2"


class Monitor:
    """One conversation; ``with Monitor() as monitor: monitor("query-block")``."""

    def __init__(self) -> None:
        self.fd = os.open(LINE, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self.fd)
        termios.tcflush(self.fd, termios.TCIFLUSH)
        self.rest = b""
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Run a command; its answer, or AssertionError with QEMU's own words."""
        words = {"execute": command, "id": command, "arguments": arguments}
        os.write(self.fd, json.dumps(words).encode() + b"\n")
        while True:
            answer = json.loads(self._line())
            if answer.get("id") == command:
                gone = "negotiation" if command == "qmp_capabilities" else "\0"  # an earlier conversation did it
                assert "error" not in answer or gone in answer["error"]["desc"], answer["error"]
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
