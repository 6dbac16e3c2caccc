"""Build hook: compiles the hot modules with Cython when this machine can, and says so when it cannot.

``DMAKIT_BUILD`` = ``auto`` (default: compile if a C compiler and the Python headers are here), ``python``
(never), ``compiled`` (fail rather than fall back) or ``zig`` (use the ``ziglang`` package as the compiler).
The decision is made before the build starts: an extension that fails half-way would fail the install.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import runpy
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "src" / "dmakit"
CORE = runpy.run_path(str(PACKAGE / "_core.py"))
MODULES: tuple[str, ...] = CORE["COMPILED_MODULES"]
QUICKLY = ["-w", "-fno-gcse", "-fno-schedule-insns2"]  # looking for warnings and two passes: a fifth of gcc's time
CFLAGS = ["-DNDEBUG", "-g0", "-fno-strict-aliasing", *QUICKLY]
EFFORT = {  # of the C compiler; for the others -O2
    "-O3": """
        bench.native dma.iova_state iommu.bitmap iommu.caches iommu.domain iommu.formats.base
        iommu.formats.vtdss iommu.formats.x86_64 iommu.gather iommu.granularity iommu.iotlb iommu.lane
        iommu.pagetable iommu.psc iommu.space iommu.translation iommu.tree iommu.walker memory.physical
        nvme.lists nvme.prp nvme.sgl swiotlb.bounce trace.scanner
    """,
    "-O1": """
        bench.pairs block.request clock dma.device failpoint iommu.devtlb iommu.port lab.engine lab.flight
        lab.payload lab.sharing lab.strategies nvme.fetch nvme.iod nvme.pool nvme.ring trace.operation
        trace.operations trace.rows trace.search
    """,
    "-Og": """
        _seal dma.exact iommu.dirty iommu.faults iommu.invalidation iommu.unit iova.exact lab.descriptors
        p2p.state platform.linux.domain platform.linux.shadow trace.branch trace.midlife trace.tally
        trace.timeline
    """,
}
SPARED = ("-fno-tree-dominator-opts", "-fno-tree-pta")  # gcc's names for two passes that -O1 does without
SHARED = "dmakit._cyutility"
TRANSLATED = Path("build/cython")
HOW = "how"  # among the digests that a build records: that of the way it was done
ZIG = "ziglang"
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "initializedcheck": False,
    "cdivision": True,
    "embedsignature": True,
    "auto_pickle": False,  # nobody pickles a page table, and its methods take an eighth of the time to compile
    "freethreading_compatible": True,
}


def compiler() -> str:
    """The C compiler command, or '' when a C file that includes Python.h cannot be compiled here."""
    if os.environ.get("DMAKIT_BUILD") == "zig":
        command = f"{sys.executable} -m ziglang cc -mcpu=baseline"  # its default is the processor of this machine
    else:
        command = CORE["c_compiler"]()
    return command if command and compiles(command) else ""


def compiles(command: str, *options: str) -> bool:
    """Whether a C file that includes Python.h can be compiled here, with these options."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.c"
        probe.write_text("#include <Python.h>\nint main(void) { return 0; }\n")
        include = f"-I{sysconfig.get_paths()['include']}"
        run = subprocess.run(
            [*command.split(), include, *options, "-c", str(probe), "-o", str(probe.with_suffix(".o"))],
            capture_output=True,
            check=False,
        )
    return run.returncode == 0


def wanted() -> bool:
    """Whether to compile: what DMAKIT_BUILD asks, checked against what the machine can."""
    choice = os.environ.get("DMAKIT_BUILD", "auto")
    if choice == "python":
        return False
    command = compiler()
    if command:
        os.environ["CC"] = command
        return True
    if choice in ("compiled", "zig"):
        raise SystemExit(f"DMAKIT_BUILD={choice}: no working C compiler with the Python headers was found")
    print("dmakit: no C compiler with Python headers here: installing the interpreted core", file=sys.stderr)
    return False


def extensions() -> list[Extension]:
    """The hot modules as they stand in the tree, and the utility code that they share; C only when build_ext runs."""
    if unknown := {f"dmakit.{name}" for names in EFFORT.values() for name in names.split()}.difference(MODULES):
        raise SystemExit(f"EFFORT names what is not compiled: {', '.join(sorted(unknown))}")
    sources = {name: Path("src", *name.split(".")).with_suffix(".py") for name in MODULES}
    largest_first = sorted(MODULES, key=lambda name: sources[name].stat().st_size, reverse=True)
    spared = SPARED if compiles(os.environ["CC"], *SPARED) else ()
    listed = [
        Extension(name, [str(sources[name])], extra_compile_args=[*CFLAGS, *effort(name, spared)])
        for name in largest_first
    ]
    return [*listed, Extension(SHARED, [shared_c()], extra_compile_args=[*CFLAGS, "-O2"])]


def effort(module: str, spared: Sequence[str]) -> list[str]:
    """How hard the C compiler tries; ``spared``: options that save it work, as far as it knows them.

    Loops over arrays (the fills of page tables and lists, the scans) take 1.4 times as long from ``-O2`` as from
    ``-O3``. Modules that pass the work on (to other modules, to ioctls, to Python objects) run as fast from ``-O1``,
    which compiles in half the time (and without two passes over the tree in a fifth less of that), and ``-Og``, quicker
    still, is for those that nobody calls once a request.
    """
    name = module.removeprefix("dmakit.")
    level = next((level for level, names in EFFORT.items() if name in names.split()), "-O2")
    return [level, *spared] if level == "-O1" else [level]


def shared_c() -> str:
    """Where Cython's shared utility code is written (another version of Cython writes another one)."""
    import Cython

    return f"build/cython-{Cython.__version__}/_cyutility.c"


def cache_folder() -> Path:
    """Where translated modules are kept between builds of the same source."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmakit" / "cython"


def to_c(listed: list[Extension]) -> None:
    """Translate by Cython, in parallel where the machine can (a bare chroot has no semaphores).

    Each extension's source is then its C. The shared utility code is written meanwhile.
    """
    from Cython.Build import cythonize

    def translate(workers: int) -> list[Extension]:
        return cythonize(
            [extension for extension in listed if extension.name != SHARED],
            build_dir=str(TRANSLATED),
            compiler_directives=DIRECTIVES,
            quiet=True,
            include_path=["src"],
            shared_utility_qualified_name=SHARED,
            cache=str(cache_folder()),
            nthreads=workers,
            annotate=bool(os.environ.get("DMAKIT_ANNOTATE")),
        )

    # A translation makes millions of objects and drops few before its end: looking for these takes a fifth of its time.
    gc.set_threshold(100_000)
    with generate(Path(shared_c())):
        try:
            translated = translate(os.cpu_count() or 1)
        except (FileNotFoundError, PermissionError, NotImplementedError):
            translated = translate(0)
    sources = {extension.name: extension.sources for extension in translated}
    for extension in listed:
        extension.sources = sources.get(extension.name, extension.sources)


def c_of(name: str) -> Path:
    """Where the C of an extension is kept."""
    return Path(shared_c()) if name == SHARED else TRANSLATED.joinpath("src", *name.split(".")).with_suffix(".c")


def record(stamp: Path, digests: dict[str, str]) -> None:
    """Note what is built and how, whole or not at all."""
    stamp.parent.mkdir(parents=True, exist_ok=True)
    part = stamp.with_suffix(".part")
    part.write_text(json.dumps(digests, indent=1) + "\n")
    part.replace(stamp)


@contextmanager
def generate(shared: Path) -> Iterator[None]:
    """Write the shared utility code meanwhile, whole or not at all; it is there when the block ends."""
    if shared.exists():
        yield
        return
    shared.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=shared.parent) as folder:
        part = Path(folder) / shared.name
        command = [sys.executable, "-m", "cython", f"--generate-shared={part}"]
        with subprocess.Popen(command) as making:
            yield
        if making.returncode != 0:
            raise SystemExit(f"{' '.join(command)} ended with {making.returncode}")
        part.replace(shared)


def sweep(package: Path, keep: Collection[str]) -> None:
    """Remove what earlier builds for this Python left in ``package``, but for the modules in ``keep``."""
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    for path in package.rglob(f"*{suffix}"):
        if ".".join(path.relative_to(package.parent).parts).removesuffix(suffix) not in keep:
            path.unlink()


class BuildCore(build_ext):
    """build_ext that builds in place for editable installs, only what has changed, and records source digests."""

    def run(self) -> None:
        if getattr(self, "editable_mode", False):
            tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            self.inplace, self.build_lib, self.build_temp = True, f"build/lib.{tag}", f"build/temp.{tag}"
        if not self.extensions:
            if self.inplace:
                forget()
            return
        stamp = CORE["RECORD"] if self.inplace else Path(self.build_temp, "built.json")
        now = {extension.name: CORE["source_digest"](extension.name) for extension in self.extensions}
        sweep(PACKAGE if self.inplace else Path(self.build_lib, PACKAGE.name), now)
        how = self.how()
        done = self.done(stamp, now, how)
        self.extensions = [extension for extension in self.extensions if extension.name not in done]
        if not self.extensions:
            return
        record(stamp, {HOW: how, **{name: now[name] for name in done}})  # what is to be replaced is believed no more
        for name in now.keys() - done - {SHARED}:
            c_of(name).unlink(missing_ok=True)  # whatever its time says; a translation of the same text is cached
        to_c(self.extensions)
        self.force, self.parallel = True, self.parallel or os.cpu_count()
        super().run()
        record(stamp, {HOW: how, **now})

    def how(self) -> str:
        """Digest of what the result depends on besides sources: this file, translator, compiler, options, Python."""
        import Cython

        version = subprocess.run([*os.environ["CC"].split(), "--version"], capture_output=True, text=True, check=False)
        names = ("CC", "CFLAGS", "CPPFLAGS", "LDFLAGS", "LDSHARED", "AR", "ARCHFLAGS", "DMAKIT_ANNOTATE")
        settings = [self.debug, self.define, self.undef, *(os.environ.get(name) for name in names)]
        asked = [Cython.__version__, sysconfig.get_config_var("EXT_SUFFIX"), version.stdout, settings]
        return hashlib.sha256(f"{Path(__file__).read_text()}{asked}".encode()).hexdigest()

    def done(self, stamp: Path, now: dict[str, str], how: str) -> set[str]:
        """The modules that need no work: built in this way, from this source, and still there."""
        before = CORE["recorded_digests"](stamp)
        if self.force or before.get(HOW) != how:
            return set()
        same = {name for name in now if before.get(name) == now[name] and Path(self.get_ext_fullpath(name)).exists()}
        return {name for name in same if c_of(name).exists()}


class Interpreted(build_py):
    """build_py, which also an editable install without a compiler runs."""

    def run(self) -> None:
        if self.editable_mode and not self.distribution.ext_modules:
            forget()
        super().run()


def forget() -> None:
    """Remove what an earlier build left in the tree: the interpreted core must not be shadowed by it."""
    CORE["RECORD"].unlink(missing_ok=True)
    sweep(PACKAGE, ())


def lacking() -> list[str]:
    """What pip or uv must add to this build's environment before it can begin: ``ziglang`` when it is the compiler."""
    zig = os.environ.get("DMAKIT_BUILD") == "zig" and find_spec(ZIG) is None
    return [ZIG] if zig and "setuptools.build_meta" in sys.modules else []


def refuse(attributes: object) -> NoReturn:
    """In place of a distribution, where what was asked for has not come: a build without isolation."""
    raise SystemExit(f"DMAKIT_BUILD=zig: this environment has no {ZIG}; install it there, or build with isolation")


if missing := lacking():
    setup(setup_requires=missing, distclass=refuse)  # asked for its requirements, the build backend reads no further
else:
    setup(ext_modules=extensions() if wanted() else [], cmdclass={"build_ext": BuildCore, "build_py": Interpreted})
