"""The command line on a real kernel: who is not let in."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from dmakit import vfio
from tests.vm.guest.support import KERNEL, NVME, driver_of, group_of, modprobe

BACKENDS = ("type1", "iommufd") if KERNEL == "iommufd" else ("type1",)
pytestmark = pytest.mark.on(iommu=("vtd-lazy", "amd"))
BDF = NVME[0]
PLATFORM = ("--platform", f"vfio:{BDF}")
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
WORKLOAD = "bs=16k,iodepth=2,frag=1,n=20"


def dmakit(*words: str, status: int = 0, before: tuple[str, ...] = ()) -> tuple[str, str]:
    """What a command prints on both streams; its status must be ``status``."""
    done = subprocess.run([*before, "dmakit", *words], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout, done.stderr


def row(text: str) -> list[str]:
    """The words of the drive's line in a list."""
    (found,) = [line.split() for line in text.splitlines() if line.startswith(BDF)]
    return found


@pytest.fixture(scope="module")
def bound() -> Iterator[None]:
    """The drive is VFIO's, for root alone."""
    modprobe("vfio-pci")
    vfio.bind(BDF)
    yield
    vfio.unbind(BDF)


@pytest.mark.usefixtures("bound")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "words",
    [["nvme", "identify"], ["nvme", "verify", "--yes"], ["compare", WORKLOAD, "--yes"], ["explain", WORKLOAD, "--yes"]],
    ids=lambda words: " ".join(words[:2]).split(" bs")[0],
)
def test_an_ordinary_user_is_told_what_to_do(backend: str, words: list[str]) -> None:
    path = f"/dev/vfio/{group_of(BDF).name}" if backend == "type1" else "/dev/iommu"
    out, err = dmakit(*words, *PLATFORM, "--backend", backend, status=2, before=NOBODY)
    assert (out, err) == ("", f"dmakit: open({path}): EACCES: no permission: run as root, or give yourself the file\n")


@pytest.mark.usefixtures("bound")
def test_an_ordinary_user_may_look_and_not_bind() -> None:
    assert row(dmakit("vfio", "list", before=NOBODY)[0]) == row(dmakit("vfio", "list")[0])
    out, err = dmakit("vfio", "bind", NVME[1], status=2, before=NOBODY)
    assert out == "" and err.endswith(": EACCES: no permission: run as root\n") and err.count("\n") == 1, err
    assert driver_of(NVME[1]) is None
