"""Which core runs: the hot modules interpreted from their ``.py``, or compiled from the same files.

The hot mechanisms are written once, in Cython's pure-Python mode. Beside ``x.py`` the build may leave a
compiled ``x.<abi>.so``; Python prefers it. This module is the only place that knows about the choice:

* ``COMPILED_MODULES`` lists what the build compiles (``setup.py`` reads it from here).
* ``DMAKIT_CORE=python`` loads the ``.py`` although the ``.so`` lies beside it; ``DMAKIT_CORE=compiled``
  refuses to start without every ``.so``; unset, the compiled module is taken where there is one.
* In a checkout (a ``pyproject.toml`` stands above ``src/``) a compiled module whose sources have changed
  since it was built is refused, with the command that rebuilds it: an edited ``.py`` must never keep
  running as the old ``.so``. The build records the digests in ``RECORD``, a file for each kind of Python.
* A module that is not in the list runs from its ``.py``, whatever an earlier build left beside it.

Nothing here imports another module of dmakit: it runs before all of them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

COMPILED_MODULES = (
    "dmakit._seal",
    "dmakit.bench.native",
    "dmakit.bench.pairs",
    "dmakit.block.dma_iter",
    "dmakit.block.request",
    "dmakit.block.segments",
    "dmakit.clock",
    "dmakit.dma.batch",
    "dmakit.dma.core",
    "dmakit.dma.device",
    "dmakit.dma.exact",
    "dmakit.dma.iova_state",
    "dmakit.dma.scatter",
    "dmakit.dma.streaming",
    "dmakit.dma.window",
    "dmakit.dma.windows",
    "dmakit.failpoint",
    "dmakit.iommu.bitmap",
    "dmakit.iommu.caches",
    "dmakit.iommu.devtlb",
    "dmakit.iommu.dirty",
    "dmakit.iommu.domain",
    "dmakit.iommu.faults",
    "dmakit.iommu.formats.base",
    "dmakit.iommu.formats.vtdss",
    "dmakit.iommu.formats.x86_64",
    "dmakit.iommu.gather",
    "dmakit.iommu.granularity",
    "dmakit.iommu.invalidation",
    "dmakit.iommu.iotlb",
    "dmakit.iommu.lane",
    "dmakit.iommu.pagetable",
    "dmakit.iommu.port",
    "dmakit.iommu.psc",
    "dmakit.iommu.space",
    "dmakit.iommu.tables",
    "dmakit.iommu.translation",
    "dmakit.iommu.tree",
    "dmakit.iommu.unit",
    "dmakit.iommu.walker",
    "dmakit.iova.allocator",
    "dmakit.iova.bits",
    "dmakit.iova.domain",
    "dmakit.iova.exact",
    "dmakit.iova.flush_queue",
    "dmakit.iova.magazine",
    "dmakit.iova.rcache",
    "dmakit.iova.search",
    "dmakit.iova.shared",
    "dmakit.iova.tree",
    "dmakit.lab.descriptors",
    "dmakit.lab.engine",
    "dmakit.lab.flight",
    "dmakit.lab.payload",
    "dmakit.lab.sharing",
    "dmakit.lab.strategies",
    "dmakit.ledger",
    "dmakit.memory.pages",
    "dmakit.memory.physical",
    "dmakit.nvme.fetch",
    "dmakit.nvme.iod",
    "dmakit.nvme.lists",
    "dmakit.nvme.mapping",
    "dmakit.nvme.mmio",
    "dmakit.nvme.pool",
    "dmakit.nvme.prp",
    "dmakit.nvme.ring",
    "dmakit.nvme.rows",
    "dmakit.nvme.sgl",
    "dmakit.p2p.state",
    "dmakit.platform.linux.domain",
    "dmakit.platform.linux.shadow",
    "dmakit.swiotlb.bounce",
    "dmakit.swiotlb.pool",
    "dmakit.trace.branch",
    "dmakit.trace.midlife",
    "dmakit.trace.operation",
    "dmakit.trace.operations",
    "dmakit.trace.rows",
    "dmakit.trace.scanner",
    "dmakit.trace.search",
    "dmakit.trace.tally",
    "dmakit.trace.timeline",
    "dmakit.turn",
)

PACKAGE = Path(__file__).resolve().parent
RECORD = PACKAGE / f"_built{importlib.machinery.EXTENSION_SUFFIXES[0].removesuffix('.so')}.json"
REBUILD = "./dmakit build"
_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class made by a class statement, not a compiled one
_CIMPORT = re.compile(rb"(?:cython\.cimports\.|from +)(dmakit(?:\.\w+)+) +c?import")


class CoreError(ImportError):
    """The chosen core cannot run (not built, or older than its source)."""


def source_of(module: str) -> Path:
    """The ``.py`` file of a dotted module name."""
    return PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")


def extension_of(module: str) -> Path | None:
    """The compiled file beside the source that this interpreter would load, or None."""
    source = source_of(module)
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        candidate = source.with_suffix(suffix)
        if candidate.exists():
            return candidate
    return None


@cache
def _source(path: Path) -> tuple[bytes, tuple[Path, ...]]:
    """A source file (empty when it is not there) and the .pxd files that it cimports."""
    if not path.exists():
        return b"", ()
    text = path.read_bytes()
    names = {name.decode() for name in _CIMPORT.findall(text)}
    return text, tuple(source_of(name).with_suffix(".pxd") for name in sorted(names))


def source_digest(module: str) -> str:
    """Digest of what the compiled form of ``module`` depends on: its .py and every .pxd it cimports."""
    import hashlib  # not needed to print a help text

    digest = hashlib.sha256(_source(source_of(module))[0])
    seen: set[Path] = set()
    queue = [source_of(module).with_suffix(".pxd"), source_of(module)]
    while queue:
        path = queue.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        text, more = _source(path)
        if path.suffix == ".pxd":
            digest.update(text)
        queue += more
    return digest.hexdigest()


def in_checkout() -> bool:
    """True when this package runs from a source checkout rather than from an installed wheel."""
    return (PACKAGE.parent.parent / "pyproject.toml").exists()


def recorded_digests(path: Path = RECORD) -> dict[str, str]:
    """Digests that the build recorded, by module; empty when nothing was compiled, or the record is damaged."""
    import json

    try:
        loaded = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def requested() -> str:
    """The value of ``DMAKIT_CORE``: ``auto`` (unset), ``python`` or ``compiled``."""
    value = os.environ.get("DMAKIT_CORE", "") or "auto"
    if value not in ("auto", "python", "compiled"):
        raise CoreError(f"DMAKIT_CORE={value!r}: must be python, compiled or unset")
    return value


class _Loader(importlib.machinery.ExtensionFileLoader):
    """Loads a compiled module and seals its classes (``_seal``)."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if module.__name__ == "dmakit._seal":
            return
        seal = importlib.import_module("dmakit._seal")._seal
        for thing in vars(module).values():
            if isinstance(thing, type) and thing.__module__ == module.__name__ and not thing.__flags__ & _HEAP:
                seal(thing)


class _CoreFinder(importlib.abc.MetaPathFinder):
    """Decides, module by module, which form of a hot module is loaded."""

    def __init__(self, choice: str) -> None:
        self.choice = choice
        self.digests: dict[str, str] | None = None
        self.checkout = in_checkout()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("dmakit."):
            return None
        extension = extension_of(fullname)
        if fullname not in COMPILED_MODULES:
            left = extension is not None and source_of(fullname).exists()
            return importlib.util.spec_from_file_location(fullname, source_of(fullname)) if left else None
        if self.choice == "python" or (extension is None and self.choice == "auto"):
            return importlib.util.spec_from_file_location(fullname, source_of(fullname))
        if extension is None:
            raise CoreError(f"DMAKIT_CORE=compiled, but {fullname} is not compiled; build it with: {REBUILD}")
        if self.digests is None:
            self.digests = recorded_digests()
        if self.checkout and self.digests.get(fullname) != source_digest(fullname):
            raise CoreError(
                f"{fullname}: the compiled module is older than its source; rebuild it with: {REBUILD}"
                " (or run interpreted with DMAKIT_CORE=python)"
            )
        loader = _Loader(fullname, str(extension))
        return importlib.util.spec_from_file_location(fullname, extension, loader=loader)


def install() -> None:
    """Put the finder first on ``sys.meta_path`` (once)."""
    if not any(isinstance(finder, _CoreFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _CoreFinder(requested()))


def c_compiler() -> str:
    """The C compiler's command, as the build looks for it: $CC, else this Python's own, else cc; '' without one."""
    import shutil
    import sysconfig

    own = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    if shutil.which(own.split()[0]) is not None:
        return str(own)
    return "cc" if not os.environ.get("CC") and shutil.which("cc") else ""


def python_headers() -> bool:
    """Whether the headers of this Python are installed."""
    import sysconfig

    return Path(sysconfig.get_paths()["include"], "Python.h").exists()


def why_not_compiled() -> str:
    """Why no compiled module is here, and how to get them."""
    if c_compiler() and python_headers():
        return f"no compiled module is installed; build them with: {REBUILD}"
    return (
        "no C compiler with Python headers was found; "
        f"get one (apt install gcc python3-dev) or set DMAKIT_BUILD=zig, then: {REBUILD}"
    )


def status() -> dict[str, object]:
    """What ``dmakit doctor`` shows: the request, the form that runs, and why."""
    choice = requested()
    built = [name for name in COMPILED_MODULES if extension_of(name) is not None]
    missing = [name for name in COMPILED_MODULES if name not in built]
    digests = recorded_digests()
    stale = [n for n in built if in_checkout() and digests.get(n) != source_digest(n)]
    if choice == "python":
        running, why = "python", "DMAKIT_CORE=python"
    elif not built:
        running, why = "python", why_not_compiled()
    elif missing:
        running, why = "mixed", f"{len(missing)} of {len(COMPILED_MODULES)} modules are not compiled"
    else:
        running, why = "compiled", f"all {len(built)} hot modules are compiled"
    return {"requested": choice, "running": running, "why": why, "built": built, "missing": missing, "stale": stale}
