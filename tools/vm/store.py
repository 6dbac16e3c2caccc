"""Parts: folders that are built once, named by the digest of their recipe, and appear whole or not at all.

A part is built in ``work-NAME-DIGEST/`` (its log and, when it is resumable, its half-done work stay there after a
failure) and its result, ``work…/out``, is renamed to ``NAME-DIGEST/``. A lock lets one process build while the
others wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PLAIN = "DMAKIT_VM_PLAIN"  # set: no line that is redrawn (two processes share the terminal)


class VmError(Exception):
    """The VM cannot be built or run; the text says why and what helps."""


def cache_folder() -> Path:
    """Where the parts are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmakit" / "vm"


def digest(*pieces: str | bytes | Path) -> str:
    """Twelve hexadecimal digits over texts, bytes and the contents of files."""
    total = hashlib.sha256()
    for piece in pieces:
        raw = piece.read_bytes() if isinstance(piece, Path) else piece.encode() if isinstance(piece, str) else piece
        total.update(len(raw).to_bytes(8, "little") + raw)
    return total.hexdigest()[:12]


@dataclass(frozen=True)
class Part:
    """One part: ``build(work, out)`` fills the folder ``out``; ``work`` is scratch, kept while ``resumable``."""

    name: str
    recipe: str  # digest of everything that the result depends on
    build: Callable[[Workshop], None]
    resumable: bool = False

    @property
    def path(self) -> Path:
        """The finished folder."""
        return cache_folder() / f"{self.name}-{self.recipe}"

    @property
    def built(self) -> bool:
        """Whether it is there."""
        return self.path.exists()

    def ensure(self) -> Path:
        """The finished folder, built now if need be; VmError when that fails."""
        if not self.built:
            with self._lock():
                if not self.built:
                    self._make()
        os.utime(self.path)  # `vm clean` keeps what was used last
        return self.path

    def _make(self) -> None:
        work = cache_folder() / f"work-{self.name}-{self.recipe}"
        if not self.resumable:
            remove(work)
        out = work / "out"
        remove(out)
        out.mkdir(parents=True)
        started = time.monotonic()
        self.build(Workshop(self.name, work, out))
        out.rename(self.path)
        remove(work)
        say(f"{self.name}: done in {time.monotonic() - started:.0f} s")

    @contextmanager
    def _lock(self) -> Iterator[None]:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with (cache_folder() / f".lock-{self.name}").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{self.name}: waiting for another process that builds it")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


@dataclass(frozen=True)
class Workshop:
    """Where one part is built: scratch folder, result folder, and steps with progress and a log."""

    name: str
    work: Path
    out: Path

    def step(self, title: str, command: list[str], text: str = "", **environment: str) -> None:
        """Run a command with its output in the log and a line of progress; VmError when it fails.

        The command has a process group of its own, which dies with this call, and a mount name space of its own,
        so that nothing it mounts is left behind however it ends.
        """
        log = self.work / "log"
        started = time.monotonic()
        progress = Progress(f"{self.name}: {title}")
        with log.open("ab") as file:
            file.write(f"\n== {title}: {' '.join(command)}\n".encode())
            file.flush()
            child = subprocess.Popen(
                ["unshare", "--mount", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "LC_ALL": "C", **environment},
                start_new_session=True,
            )
            assert child.stdin and child.stdout
            try:
                child.stdin.write(text.encode())
                child.stdin.close()
                while chunk := _read(child.stdout.fileno(), progress):
                    file.write(chunk)
                    file.flush()
                    progress.lines += chunk.count(b"\n")
                status = child.wait()
            finally:
                end_group(child)
        progress.end()
        if status:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise VmError(f"{self.name}: {title} failed with status {status}; the end of {log}:\n{tail}")
        if (seconds := time.monotonic() - started) >= 2:
            say(f"{self.name}: {title} took {seconds:.0f} s")


def _read(fd: int, progress: Progress) -> bytes:
    """The next output; the progress line moves while there is none."""
    while not select.select([fd], [], [], 1.0)[0]:
        progress.show()
    progress.show()
    return os.read(fd, 1 << 16)


class Progress:
    """One line that tells what is going on: redrawn on a terminal, repeated once a minute elsewhere."""

    def __init__(self, title: str) -> None:
        self.title, self.started, self.lines = title, time.monotonic(), 0
        self.terminal = sys.stderr.isatty() and PLAIN not in os.environ
        self.shown = self.started

    def show(self) -> None:
        """Draw it when it is due."""
        now = time.monotonic()
        if now - self.shown < (0.3 if self.terminal else 60.0):
            return
        self.shown = now
        text = f"vm: {self.title} … {now - self.started:.0f} s, {self.lines} lines of output"
        print(
            f"\r{text}\x1b[K" if self.terminal else text, end="" if self.terminal else "\n", file=sys.stderr, flush=True
        )

    def end(self) -> None:
        """Take it away again."""
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def end_group(child: subprocess.Popen[bytes], patience: float = 5.0) -> None:
    """End a child and all that it started: TERM, then KILL."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, signum)
        except ProcessLookupError:
            break
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(f"vm: {text}", file=sys.stderr, flush=True)


def remove(folder: Path) -> None:
    """Remove a folder, if it is there; a mount point inside it would be an error, not a loss."""
    if folder.exists():
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        inside = [mount for mount in mounts if mount.startswith(f"{folder}/")]
        if inside:
            raise VmError(f"{inside[0]} is mounted inside {folder}: unmount it first")
        shutil.rmtree(folder)


def clean(keep: set[Path], spare: int = 8) -> list[Path]:
    """Remove every part but ``keep`` and the ``spare`` latest cores; returns what went."""
    every = [path for path in cache_folder().glob("*-*") if path.is_dir() and not path.name.startswith("work-")]
    cores = sorted((p for p in every if p.name.startswith("core-")), key=lambda p: p.stat().st_mtime, reverse=True)
    gone = [path for path in every if path not in keep and path not in cores[:spare]]
    for path in gone:
        remove(path)
    return gone
