"""The set-up part of a recording: the boot trace beside a trace, and what it says about each domain.

``NAME.boot.txt`` (any archive) beside ``NAME.trace.txt[.xz]`` holds ``init_iova_domain`` and ``reserve_iova`` of
every domain, seen by probes on the kernel's command line. A domain is told by the address of its ``struct
iova_domain``, so a boot trace of another boot matches nothing.
"""

from __future__ import annotations

from pathlib import Path

from dmakit.errors import InputError

_ARCHIVES = ("", ".xz", ".zst", ".gz")


def _stem(path: Path) -> str:
    """A trace's name without archive, ``.txt`` and ``.trace``."""
    stem = path.name
    for suffix in _ARCHIVES[1:]:
        stem = stem.removesuffix(suffix)
    return stem.removesuffix(".txt").removesuffix(".trace")


def boot_file(path: str | Path) -> Path | None:
    """The boot trace that belongs to a trace, by its name, or None."""
    path = Path(path)
    stem = _stem(path)
    for suffix in _ARCHIVES:
        candidate = path.with_name(f"{stem}.boot.txt{suffix}")
        if candidate.exists() and candidate != path:
            return candidate
    return None


def chosen_boot(path: str | Path, given: str | Path | None) -> Path | None:
    """``given`` when there is one (it must exist), otherwise what lies beside the trace."""
    if given is None:
        return boot_file(path)
    if not Path(given).exists():
        raise InputError(f"--boot {given}: no such file")
    return Path(given)


def boot_name(path: str | Path) -> Path:
    """Where the boot trace of a trace belongs: ``NAME.boot.txt`` beside it."""
    path = Path(path)
    return path.with_name(f"{_stem(path)}.boot.txt")
