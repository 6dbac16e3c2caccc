"""What a boot promises: output and status of the command, a time limit that holds, word of a guest that died."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from tools.vm import run
from tools.vm.machine import Machine
from tools.vm.parts import ROOT

from tests.vm.plugin import require_built

pytestmark = pytest.mark.vm
BARE = Machine(iommu="none", nvme=0, processors=1, memory=1024)


@pytest.fixture(autouse=True)
def built() -> None:
    require_built()


def test_output_files_and_status_come_back(tmp_path: Path) -> None:
    script = "echo out; echo err >&2; echo file >/mnt/out/file; pwd; exit 3"
    seen: list[bytes] = []
    result = run.boot(BARE, ["sh", "-c", script], out=tmp_path, sink=seen.append, timeout=120)
    assert (result.status, result.verdict()) == (3, "")
    assert result.output == "out\nerr\n/mnt/checkout\n" == b"".join(seen).decode()
    assert (tmp_path / "file").read_text() == "file\n"


def test_the_checkout_cannot_be_written(tmp_path: Path) -> None:
    result = run.boot(BARE, ["touch", "/mnt/checkout/README.md"], timeout=120)
    assert result.status == 1
    assert result.output.endswith("Read-only file system\n")


def test_a_guest_that_hangs_is_killed_in_time() -> None:
    started = time.monotonic()
    result = run.boot(BARE, ["sleep", "1000"], timeout=15)
    assert result.timed_out
    assert result.status is None
    assert result.verdict().startswith("the guest did not finish within 1")
    assert time.monotonic() - started < 60


def test_a_guest_that_dies_is_no_success() -> None:
    result = run.boot(BARE, ["busybox", "poweroff", "-f"], timeout=120)
    assert result.status is None
    assert result.verdict() == "the guest died before the command ended"


def test_nothing_stays_behind_when_the_caller_is_terminated(tmp_path: Path) -> None:
    caller = subprocess.Popen(
        sleeping(tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: bool(guests_of(tmp_path)))
    caller.terminate()
    _, text = caller.communicate(timeout=60)
    assert (caller.returncode, text) == (130, "dmakit vm: interrupted\n")
    assert not guests_of(tmp_path)


def test_a_guest_dies_with_a_killed_caller(tmp_path: Path) -> None:
    caller = subprocess.Popen(sleeping(tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: bool(guests_of(tmp_path)))
    caller.kill()
    caller.wait()
    wait_for(lambda: not guests_of(tmp_path))


def sleeping(share: Path) -> list[str]:
    """The command of a boot that goes on for long."""
    command = [sys.executable, "-m", "tools.vm", "run", "--iommu", "none", "--out", str(share)]
    return [*command, "--", "sleep", "1000"]


def guests_of(share: Path) -> list[int]:
    """Process ids of the QEMUs that share this folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes()
        except OSError:
            continue
        if b"qemu-system" in words and f"path={share}," in words.decode(errors="replace"):
            found.append(int(file.parent.name))
    return found


def wait_for(condition: object, seconds: float = 60.0) -> None:
    """Until the condition holds."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
