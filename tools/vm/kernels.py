"""Two kernels, both from trixie's backports: Debian's own (VFIO type1 only) and one with iommufd built from its source.

A kernel part holds ``vmlinuz`` and ``modules.cpio``, an initramfs with busybox, the modules that a guest may want
(uncompressed: a guest without KVM is slow at unpacking) and ``early``, the list of those that mount the root.
The series is the one that dmakit models; when the archive no longer has it, the newest one is taken.
"""

from __future__ import annotations

import lzma
import os
import shutil
from pathlib import Path

from tools.vm import cpio, debian
from tools.vm.parts import toolchain
from tools.vm.store import Part, VmError, Workshop, digest

SERIES = "7.2"
CONFIG = Path(__file__).with_name("kernel.config")
EARLY = "virtio_pci virtio_iommu virtio_blk ext4 9pnet_virtio 9p"
LATER = "nvme vfio-pci vfio_iommu_type1 udmabuf null_blk loop ublk_drv nbd tun"
# The newest package whose name matches the first pattern, else the second.
NEWEST = 'newest() { apt-cache search --names-only "$1" | cut -d\' \' -f1 | grep -Ex "$1" | sort -V | tail -n 1; }; '


def _download(shop: Workshop, pattern: str, rest: str = '"$name"') -> Path:
    """Fetch the newest package of the series (``%s`` in the pattern), and ``rest`` of it; unpacked below the result."""
    debs, tree = shop.work / "debs", shop.work / "tree"
    debs.mkdir(exist_ok=True)
    series, newest = (pattern % text for text in (SERIES.replace(".", "[.]"), "[0-9]+[.][0-9]+"))
    script = (
        f"{NEWEST} cd /work/debs; exec 9>/var/lib/apt/in-use; flock 9; apt-get -qq update;"
        f" name=$(newest '^{series}$'); [ \"$name\" ] || name=$(newest '^{newest}$'); apt-get -qq download {rest}"
    )
    shop.step("downloading", debian.inside(toolchain().ensure(), script, debs=debs))
    for deb in sorted(debs.glob("*.deb")):
        shop.step(f"unpacking {deb.name.split('_')[0]}", ["dpkg", "-x", str(deb), str(tree)])
        deb.unlink()
    return tree


def _initramfs(shop: Workshop, modules: Path) -> None:
    """``modules.cpio`` from a folder ``…/lib/modules/VERSION``; only the wanted modules and what they need."""
    version, kept = modules.name, shop.work / "initramfs"
    shutil.rmtree(kept, ignore_errors=True)
    target = kept / "lib/modules" / version
    target.mkdir(parents=True)
    # A name that is built in or unknown makes modprobe fail after it has listed the others.
    choose = (
        "depmod -b /work/from {0}; cd /work/to; for list in early later; do"
        " modprobe -d /work/from -S {0} -aqD $(cat $list.in) >$list || true; done"
    )
    (shop.work / "early.in").write_text(EARLY)
    (shop.work / "later.in").write_text(f"{EARLY} {LATER}")
    root = toolchain().ensure()
    from_ = modules.parents[2]
    shop.step("choosing modules", debian.inside(root, choose.format(version), **{"from": from_, "to": shop.work}))
    early = _listed(shop.work / "early")
    for path in {*early, *_listed(shop.work / "later")}:
        source = from_ / path
        copy = kept / path.removesuffix(".xz")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(lzma.decompress(source.read_bytes()) if path.endswith(".xz") else source.read_bytes())
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        if (modules / name).exists():
            shutil.copy(modules / name, target / name)
    shop.step("indexing modules", debian.inside(root, f"depmod -b /work/to {version}", to=kept))
    (kept / "early").write_text("".join(f"/{path.removesuffix('.xz')}\n" for path in early))
    (kept / "bin").mkdir()
    shutil.copy(root / "bin/busybox", kept / "bin/busybox")
    (kept / "dev").mkdir()
    (shop.out / "modules.cpio").write_bytes(cpio.archive(cpio.tree(kept)))
    (shop.out / "version").write_text(f"{version}\n")


def _listed(listing: Path) -> list[str]:
    """Paths (lib/modules/…) of modprobe's insmod lines, in order, once each."""
    lines = [line.split()[1] for line in listing.read_text().splitlines() if line.startswith("insmod ")]
    return list(dict.fromkeys(line.split("/work/from/")[1] for line in lines))


def _debian(shop: Workshop) -> None:
    three = '"$name" $(echo "$name" | sed s/binary/modules/) $(echo "$name" | sed s/binary/base/)'
    tree = _download(shop, "linux-binary-%s[.][0-9]+[+]deb[0-9]+-amd64", three)
    images = [*tree.glob("boot/vmlinuz-*"), *tree.glob("usr/lib/modules/*/vmlinuz")]
    folders = sorted(tree.glob("usr/lib/modules/*"))
    if not images or len(folders) != 1:
        raise VmError(f"Debian's kernel is laid out in a way this does not know: {images}, {folders}")
    shutil.copy(images[0], shop.out / "vmlinuz")
    _initramfs(shop, folders[0])


def _iommufd(shop: Workshop) -> None:
    source, build = shop.work / "source", shop.work / "build"
    if not source.exists():
        archive = next(_download(shop, "linux-source-%s").glob("usr/src/linux-source-*.tar.xz"))
        part = shop.work / "unpacked"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        shop.step("unpacking the source", ["tar", "-xf", str(archive), "-C", str(part), "--strip-components=1"])
        part.rename(source)
    build.mkdir(exist_ok=True)
    shutil.copy(CONFIG, shop.work / "kernel.config")
    jobs = os.cpu_count() or 1
    make = "export KBUILD_BUILD_USER=dmakit KBUILD_BUILD_HOST=vm; make -C /work/source O=/work/build"
    root, binds = toolchain().ensure(), {"source": source, "build": build, "all": shop.work}
    configure = f"{make} -s allnoconfig KCONFIG_ALLCONFIG=/work/all/kernel.config"
    if not (build / ".config").exists():
        shop.step("configuring", debian.inside(root, configure, **binds))
    _check_config(build / ".config")
    shop.step("compiling", debian.inside(root, f"{make} -j{jobs} bzImage modules", **binds))
    install = f"{make} -s INSTALL_MOD_PATH=/work/all/installed modules_install"
    shop.step("installing modules", debian.inside(root, install, **binds))
    shutil.copy(build / "arch/x86/boot/bzImage", shop.out / "vmlinuz")
    shutil.copy(build / ".config", shop.out / "config")
    folder = next((shop.work / "installed/lib/modules").iterdir())
    (folder / "build").unlink(missing_ok=True)
    _initramfs(shop, folder)


def _check_config(path: Path) -> None:
    """VmError when the kernel's configuration dropped a line of ours."""
    got = set(path.read_text().splitlines())
    asked = [line for line in CONFIG.read_text().splitlines() if line.startswith("CONFIG_")]
    lost = [line for line in asked if line not in got and not line.endswith("=n")]
    lost += [line for line in asked if line.endswith("=n") and any(g.startswith(f"{line[:-2]}=") for g in got)]
    if lost:
        raise VmError(f"{CONFIG.name}: this kernel does not honour {', '.join(lost)}")


def kernel(name: str) -> Part:
    """The part of a kernel: ``debian`` or ``iommufd``."""
    recipe = ("1", SERIES, EARLY, LATER)
    if name == "debian":
        return Part("kernel-debian", digest(*recipe), _debian)
    return Part("kernel-iommufd", digest(*recipe, CONFIG), _iommufd, resumable=True)
