"""What ``compare`` and ``explain`` are given: the bundled trace, a trace file, or a description of a workload.

A description is written like a fio job, ``bs=128k,iodepth=8,rw=randread,frag=1,n=200``:

=========== ============================================================== =======
key         meaning                                                         default
=========== ============================================================== =======
bs          block size, or several joined by ``+`` (equal shares)           4k
iodepth     requests in flight in each job                                  1
jobs        jobs, one CPU each                                              1
n           requests                                                        256
rw          read, write, randread, randwrite, or rw (half of each)          read
frag        0 (contiguous buffers) to 1 (every page alone)                  1
offset      where buffers start inside a page, bytes                        0
folio       buffers are made of folios of 2**folio pages (9: 2 MiB)         0
piece       buffers are made of separate pieces of this size (readv)        0
=========== ============================================================== =======

``case:NAME`` is a case of ``lab.court``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from dmakit.errors import InputError
from dmakit.lab.workload import FioSpec
from dmakit.units import parse_size

BUNDLED = "smp2-lazy-mono.trace.txt.xz"
_READ_SHARES = {"read": 1.0, "randread": 1.0, "write": 0.0, "randwrite": 0.0, "rw": 0.5, "randrw": 0.5}


@dataclass(frozen=True, slots=True)
class Input:
    """One input: its name for reports, and exactly one of a trace file or a workload description."""

    name: str
    trace: Path | None = None
    spec: FioSpec | None = None


def _share(text: str) -> float:
    if text not in _READ_SHARES:
        raise InputError(f"rw={text}: must be one of {', '.join(_READ_SHARES)}")
    return _READ_SHARES[text]


def _number(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    def convert(text: str) -> int | float:
        try:
            return kind(text)
        except ValueError:
            raise InputError(f"{text!r} is not a number") from None

    return convert


_KEYS: dict[str, tuple[str, Callable[[str], object]]] = {
    "bs": ("block_sizes", lambda text: tuple(parse_size(part) for part in text.split("+"))),
    "iodepth": ("iodepth", _number(int)),
    "jobs": ("jobs", _number(int)),
    "n": ("requests", _number(int)),
    "rw": ("read_share", _share),
    "frag": ("fragmentation", _number(float)),
    "offset": ("offset", parse_size),
    "folio": ("folio_order", _number(int)),
    "piece": ("piece", parse_size),
}


def parse_spec(text: str, seed: int = 0) -> FioSpec:
    """The FioSpec of ``bs=…,iodepth=…``; InputError naming the word that is wrong."""
    values: dict[str, object] = {"seed": seed}
    for word in text.split(","):
        key, equals, value = word.partition("=")
        if not equals or key not in _KEYS:
            raise InputError(f"{word!r} in {text!r}: write key=value with a key of {', '.join(_KEYS)}")
        field, convert = _KEYS[key]
        if field in values:
            raise InputError(f"{key} is given twice in {text!r}")
        values[field] = convert(value)
    return FioSpec(**values)  # type: ignore[arg-type]


def bundled() -> Path:
    """The trace that ships with dmakit."""
    return Path(str(resources.files("dmakit").joinpath("data", BUNDLED)))


def _case(text: str) -> Input:
    from dmakit.lab.court import CASES

    if text[5:] not in CASES:
        raise InputError(f"{text}: the cases are {', '.join(CASES)}")
    return Input(text, spec=CASES[text[5:]].spec)


def resolve(text: str | None, seed: int = 0) -> Input:
    """Find out what an argument means; InputError when it is neither a file nor a description."""
    if text is None:
        return Input(f"bundled trace {BUNDLED}", trace=bundled())
    if text.startswith("case:"):
        return _case(text)
    path = Path(text)
    if path.exists():
        return Input(text, trace=path)
    if "=" in text:
        return Input(text, spec=parse_spec(text, seed))
    raise InputError(f"{text!r}: there is no such file, and it is not a workload (bs=128k,iodepth=8,…) or case:NAME")
