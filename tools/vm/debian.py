"""Debian systems in folders: unpacked by mmdebstrap, entered by chroot, nothing installed on the host.

Everything comes from Debian 13 (trixie) and its backports. Commands inside a root run in a mount name space of
their own with /proc and the asked-for folders bound below /work, so nothing stays mounted.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from tools.vm.store import VmError, Workshop

SUITE = "trixie"
BACKPORTS = "trixie-backports"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
UNWANTED = ("man", "doc", "locale", "info", "i18n")


def mirror() -> str:
    """The archive to ask."""
    return os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")


def check_host() -> None:
    """VmError with the remedy when this machine cannot build roots."""
    if os.geteuid():
        raise VmError("building the VM needs root (mmdebstrap and chroot); a built VM is booted by anybody")
    for tool, package in (("mmdebstrap", "mmdebstrap"), ("unshare", "util-linux"), ("dpkg", "dpkg")):
        if shutil.which(tool) is None:
            raise VmError(f"{tool} is not installed; supply it: apt-get install {package}")
    if not Path(KEYRING).exists():
        raise VmError(f"{KEYRING} is not there; supply it: apt-get install debian-archive-keyring")


def unpack(shop: Workshop, root: Path, packages: list[str], backports: bool = False, lists: bool = False) -> None:
    """Unpack a minimal system with ``packages`` into ``root``; from ``backports`` first; keep apt's ``lists``."""
    check_host()
    sources = "".join(f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n" for suite in (SUITE, BACKPORTS))
    options = ['--aptopt=APT::Install-Recommends "false"']
    options += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in UNWANTED]
    options += [f'--aptopt=APT::Default-Release "{BACKPORTS}"'] if backports else []
    options += ["--skip=cleanup/apt/lists"] if lists else []
    command = ["mmdebstrap", "--quiet", "--mode=root", "--variant=apt", "--format=directory", *options]
    shop.step(
        "unpacking Debian packages", [*command, f"--include={','.join(packages)}", SUITE, str(root), "-"], sources
    )


def inside(root: Path, script: str, **binds: Path) -> list[str]:
    """The command that runs a shell script in ``root``; each bind is seen there as /work/NAME."""
    mounts = [f"mount -t proc proc {root}/proc"]
    for name, folder in binds.items():
        mounts += [f"mkdir -p {root}/work/{name}", f"mount --bind {folder} {root}/work/{name}"]
    entered = f"exec chroot {root} /bin/sh -euc {shlex.quote(script)}"
    return ["sh", "-ec", "; ".join([*mounts, entered])]
