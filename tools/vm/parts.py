"""The parts that are not kernels: QEMU, the tool chain, the guest's Python packages, its root image, our own core."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

from tools.vm import debian
from tools.vm.store import Part, VmError, Workshop, cache_folder, digest
from tools.wheels import uv

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "3.13"  # trixie's
# What compiles kernels and the core, and makes images.
TOOLS = [
    *("gcc", "libc6-dev", "make", "flex", "bison", "bc", "libelf-dev", "libssl-dev", "python3-dev", "ccache"),
    *("xz-utils", "cpio", "kmod", "busybox-static", "e2fsprogs"),
]
# What the guest has.
GUEST = [
    *("python3", "fio", "nvme-cli", "pciutils", "trace-cmd", "strace"),
    *("kmod", "mount", "util-linux", "procps", "busybox-static", "xz-utils"),
]
EXPORT = ["export", "--frozen", "--group", "dev", "--no-emit-project", "--no-hashes", "--no-annotate"]
NOT_IN_THE_GUEST = ["--no-emit-package", "mypy", "--no-emit-package", "ruff"]


def _qemu(shop: Workshop) -> None:
    debian.unpack(shop, shop.out, ["qemu-system-x86"], backports=True)


def _toolchain(shop: Workshop) -> None:
    debian.unpack(shop, shop.out, TOOLS, lists=True)
    (shop.out / "dev/shm").mkdir(mode=0o1777, exist_ok=True)  # Python's semaphores
    (shop.out / "work").mkdir()


@cache
def requirements() -> str:
    """The exact packages of uv.lock that the guest gets, for its Python."""
    run = subprocess.run([*uv(), *EXPORT, *NOT_IN_THE_GUEST], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise VmError(f"uv export failed: {run.stderr.strip()}")
    return "".join(f"{line}\n" for line in run.stdout.splitlines() if not line.startswith("#"))


def _packages(shop: Workshop) -> None:
    wanted = shop.work / "requirements.txt"
    wanted.write_text(requirements())
    target = ["--target", str(shop.out), "--python-version", PYTHON, "--python-platform", "x86_64-manylinux_2_40"]
    shop.step(
        "fetching Python packages",
        [*uv(), "pip", "install", "-q", *target, "--only-binary", ":all:", "-r", str(wanted)],
    )
    for name in ("bin", ".lock"):
        remove_any(shop.out / name)


def remove_any(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _image(shop: Workshop) -> None:
    root = shop.work / "root"
    debian.unpack(shop, root, GUEST)
    shutil.copytree(packages().ensure(), root / f"usr/local/lib/python{PYTHON}/dist-packages", dirs_exist_ok=True)
    for folder in ("mnt/checkout", "mnt/out", "opt/dmakit", "lib/modules"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "usr/local/bin/dmakit").write_text('#!/bin/sh\nexec python3 -m dmakit "$@"\n')
    (root / "usr/local/bin/dmakit").chmod(0o755)
    (root / "etc/hostname").write_text("guest\n")
    # Compiled once here, not at every boot.
    quietly = "python3 -m compileall -q -j 2 /usr/lib/python3 /usr/lib/python3.13 /usr/local/lib/python3.13 || true"
    shop.step("compiling Python files", debian.inside(root, quietly))
    remove_any(root / "var/lib/apt/lists")
    make_ext4(shop, root, shop.out / "guest.ext4", spare=256)


def make_ext4(shop: Workshop, folder: Path, image: Path, spare: int) -> None:
    """An ext4 image with the folder's content and ``spare`` MiB more, sparse, without loop devices."""
    size = sum(file.lstat().st_size + 512 for file in folder.rglob("*")) * 11 // 10 + (spare << 20)
    script = f"mke2fs -q -t ext4 -O ^has_journal -d /work/from /work/to/{image.name} {size >> 10}k"
    shop.step("writing the image", debian.inside(toolchain().ensure(), script, **{"from": folder, "to": image.parent}))


def sources() -> list[Path]:
    """The files that the wheel is made from."""
    kept = [ROOT / name for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE")]
    every = (path for path in (ROOT / "src" / "dmakit").rglob("*") if path.is_file())
    unbuilt = (p for p in every if p.suffix not in (".so", ".pyc", ".c") and not p.name.startswith("_built."))
    return kept + sorted(unbuilt)


def _core(shop: Workshop) -> None:
    source, kept = shop.work / "source", cache_folder() / "compiled"
    translated = cache_folder().parent / "cython"  # what the host's build has translated need not be done again
    for path in sources():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    kept.mkdir(exist_ok=True)
    translated.mkdir(exist_ok=True)
    (shop.work / "image").mkdir()
    script = (
        "export PYTHONPATH=/work/packages XDG_CACHE_HOME=/work/kept CCACHE_DIR=/work/kept/ccache DMAKIT_BUILD=compiled"
        " CC='ccache gcc' PYTHONDONTWRITEBYTECODE=1; cd /work/source; python3 setup.py -q bdist_wheel -d /work/image;"
        " cd /work/image; python3 -m zipfile -e *.whl .; rm *.whl; python3 -m compileall -q -j 2 ."
    )
    binds = {
        "source": source,
        "kept": kept,
        "kept/dmakit/cython": translated,
        "image": shop.work / "image",
        "packages": packages().ensure(),
    }
    shop.step("compiling dmakit for the guest's Python", debian.inside(toolchain().ensure(), script, **binds))
    make_ext4(shop, shop.work / "image", shop.out / "core.ext4", spare=8)


def qemu() -> Part:
    """QEMU from backports, run from its folder through its own loader."""
    return Part("qemu", digest("1", debian.SUITE, "qemu-system-x86"), _qemu)


def toolchain() -> Part:
    """The root in which kernels, images and the core are made."""
    return Part("toolchain", digest("1", debian.SUITE, *sorted(TOOLS)), _toolchain)


def packages() -> Part:
    """numpy, pytest and the others, as uv.lock has them, for the guest's Python."""
    return Part("packages", digest("1", requirements()), _packages)


def image() -> Part:
    """The guest's root file system."""
    return Part("image", digest("1", packages().recipe, *sorted(GUEST)), _image)


def core() -> Part:
    """This checkout, compiled."""
    pieces = [piece for path in sources() for piece in (str(path.relative_to(ROOT)), path)]
    return Part("core", digest("1", toolchain().recipe, packages().recipe, *pieces), _core)
