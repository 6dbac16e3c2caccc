"""Boot a machine, run a command in it, hand back output and status; whatever happens, QEMU ends with this call."""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tools.vm import guest, parts
from tools.vm import machine as machines
from tools.vm.kernels import kernel
from tools.vm.store import Part, end_group

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1
TIMED_OUT = 124  # the status that timeout(1) uses


@dataclass(frozen=True)
class Result:
    """How a boot went: the command's status (None: the guest died), its output, the kernel's console, seconds."""

    status: int | None
    output: str
    console: str
    seconds: float
    timed_out: bool = False

    def verdict(self) -> str:
        """One line, empty when the command ran to its end."""
        if self.timed_out:
            return f"the guest did not finish within {self.seconds:.0f} s"
        return "" if self.status is not None else "the guest died before the command ended"


def needed(name: str) -> list[Part]:
    """The parts of a boot with this kernel."""
    return [parts.qemu(), parts.toolchain(), parts.packages(), parts.image(), kernel(name), parts.core()]


def boot(
    machine: machines.Machine,
    command: Sequence[str],
    *,
    out: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300.0,
    sink: Callable[[bytes], object] | None = None,
    terminal: bool = False,
) -> Result:
    """Boot, run ``command`` with the checkout as its folder, power off.

    ``out`` is the guest's /mnt/out; ``sink`` gets the output as it comes; ``terminal`` connects stdin and stdout.
    A part that is missing is built first (VmError when that fails). At the end of ``timeout`` seconds QEMU is killed.
    """
    linux = kernel(machine.kernel).ensure()
    scratch = Path(tempfile.mkdtemp(prefix="dmakit-vm."))
    try:
        for name in ("share", "out"):
            (scratch / name).mkdir()
        shares = {"ro-checkout": parts.ROOT, "job": scratch / "share", "out": (out or scratch / "out").resolve()}
        initrd = scratch / "initrd"
        job = guest.initramfs(machine, command, environment or {}, terminal)
        initrd.write_bytes((linux / "modules.cpio").read_bytes() + job)
        argv = machines.command(machine, linux / "vmlinuz", initrd, shares, scratch)
        return _watch(argv, scratch, timeout, sink, terminal)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _watch(
    argv: list[str], scratch: Path, timeout: float, sink: Callable[[bytes], object] | None, terminal: bool
) -> Result:
    """Run QEMU to its end or the deadline."""
    started = time.monotonic()
    output = bytearray()
    late = False
    with (scratch / "qemu.log").open("wb") as log:
        pipe = None if terminal else subprocess.PIPE
        stdin = None if terminal else subprocess.DEVNULL
        die = partial(_die_with, os.getpid())
        own = not terminal
        child = subprocess.Popen(argv, stdin=stdin, stdout=pipe, stderr=log, start_new_session=own, preexec_fn=die)
        try:
            if child.stdout is None:
                child.wait()
            else:
                late = not _stream(child.stdout.fileno(), started + timeout, output, sink)
                if not late:
                    child.wait()
        finally:
            end_group(child) if not terminal else child.kill()
    status = scratch / "share" / "status"
    console = _text(scratch / "console") + _text(scratch / "qemu.log")
    known = int(status.read_text()) if status.exists() and status.read_text().strip() else None
    return Result(known, output.decode(errors="replace"), console, time.monotonic() - started, late)


def _die_with(parent: int) -> None:
    """In the child, before QEMU: be killed when the parent goes, or end now if it has gone.

    QEMU's own exit-with-parent would begin when it has started up, too late for a parent that is killed at once.
    """
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _stream(fd: int, deadline: float, output: bytearray, sink: Callable[[bytes], object] | None) -> bool:
    """Copy until end of file; False when the deadline came first."""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([fd], [], [], min(left, 1.0))[0]:
            continue
        if not (chunk := os.read(fd, 1 << 16)):
            return True
        output += chunk
        if sink:
            sink(chunk)
    return False


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def to_stdout(chunk: bytes) -> None:
    """A sink that shows the output as it comes."""
    sys.stdout.buffer.write(chunk)
    sys.stdout.flush()


def interruptible() -> None:
    """End by an exception on TERM and HUP, so that QEMU and the scratch folder go as they do on Ctrl-C."""

    def stop(signum: int, _frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(signum).name)

    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, stop)
