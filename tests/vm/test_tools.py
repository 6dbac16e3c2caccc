"""The builder without a VM: parts appear whole or not at all, steps end their children, addresses are fixed."""

from __future__ import annotations

import multiprocessing
import os
import re
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tools.vm import cpio, guest, kernels, machine, parts, run, store
from tools.vm.__main__ import build, machine_of, parser
from tools.vm.store import Part, VmError, Workshop, digest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dmakit" / "vm"


def writing(text: str) -> Callable[[Workshop], None]:
    def build(shop: Workshop) -> None:
        (shop.out / "file").write_text(text)

    return build


def test_a_part_is_built_once_and_carries_its_digest(cache: Path) -> None:
    first = Part("thing", digest("a"), writing("first"))
    again = Part("thing", digest("a"), writing("second"))
    other = Part("thing", digest("b"), writing("other"))
    assert (first.built, first.ensure(), first.built) == (False, cache / f"thing-{digest('a')}", True)
    assert (again.ensure() / "file").read_text() == "first"
    assert (other.ensure() / "file").read_text() == "other"
    assert sorted(path.name for path in cache.glob("*-*") if path.is_dir()) == sorted(
        [first.path.name, other.path.name]
    )


@pytest.mark.parametrize("resumable", [False, True])
def test_a_part_that_fails_is_not_there(cache: Path, resumable: bool) -> None:
    found: list[list[str]] = []

    def build(shop: Workshop) -> None:
        found.append(sorted(path.name for path in shop.work.iterdir()))
        (shop.work / "half").write_text("")
        (shop.out / "rubbish").write_text("")
        if len(found) < 2:
            raise VmError("no luck")

    part = Part("thing", digest("a"), build, resumable)
    with pytest.raises(VmError, match="^no luck$"):
        part.ensure()
    assert not part.built
    assert [path.name for path in part.ensure().iterdir()] == ["rubbish"]
    assert found == [["out"], ["half", "out"] if resumable else ["out"]]
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [part.path.name]


def build_slowly(counter: Path) -> None:
    """In another process: build the part, note that it was built."""

    def build(shop: Workshop) -> None:
        with counter.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)

    Part("thing", "x", build).ensure()


def test_one_builds_while_the_others_wait(cache: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    builders = [context.Process(target=build_slowly, args=(tmp_path / "count",)) for _ in range(4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(30)
    assert [builder.exitcode for builder in builders] == [0] * 4
    assert (tmp_path / "count").read_text() == "built\n"


@given(st.lists(st.binary(max_size=8), max_size=4), st.lists(st.binary(max_size=8), max_size=4))
def test_digests_keep_pieces_apart(one: list[bytes], other: list[bytes]) -> None:
    assert (digest(*one) == digest(*other)) == (one == other)


def shop_in(folder: Path) -> Workshop:
    (folder / "out").mkdir()
    return Workshop("thing", folder, folder / "out")


@pytest.mark.skipif(os.geteuid() != 0, reason="a step has a mount name space of its own: needs root")
def test_a_failing_step_names_the_log_and_shows_its_end(tmp_path: Path) -> None:
    with pytest.raises(VmError) as error:
        shop_in(tmp_path).step("trying", ["sh", "-c", "echo first; echo last words >&2; exit 7"])
    assert str(error.value).startswith(f"thing: trying failed with status 7; the end of {tmp_path}/log:\n")
    assert str(error.value).endswith("first\nlast words")


@pytest.mark.skipif(os.geteuid() != 0, reason="a step has a mount name space of its own: needs root")
def test_an_interrupted_step_leaves_no_process_and_no_mount(tmp_path: Path) -> None:
    mounts = Path("/proc/self/mounts").read_text()
    code = (
        "import signal, sys; from pathlib import Path; from tools.vm.store import Workshop\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & ignores it\n"
        "folder = Path(sys.argv[1]); step = Workshop('thing', folder, folder).step\n"
        "script = f'mount -t tmpfs none {folder}/out; sleep 987 & echo $!; echo up; wait'\n"
        "step('waiting', ['sh', '-c', script])"
    )
    (tmp_path / "out").mkdir()
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=parts.ROOT, stderr=subprocess.DEVNULL)
    log = tmp_path / "log"
    end = time.monotonic() + 20
    while not log.exists() or not log.read_text().endswith("\nup\n"):
        assert time.monotonic() < end
        time.sleep(0.02)
    sleeper = int(re.findall(r"^(\d+)$", log.read_text(), re.MULTILINE)[0])
    child.send_signal(2)
    child.wait(20)
    while alive(sleeper):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert Path("/proc/self/mounts").read_text() == mounts


def alive(pid: int) -> bool:
    """Whether a process still runs (one that nobody has reaped yet does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def entries(raw: bytes) -> dict[str, tuple[int, bytes]]:
    """An independent reader of the newc format, after the kernel's initramfs text (buffer-format)."""
    found, at = {}, 0
    while True:
        assert at % 4 == 0
        assert raw[at : at + 6] == b"070701"
        fields = [int(raw[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = raw[at + 110 : at + 109 + fields[11]].decode()
        start = (at + 110 + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert start + fields[6] <= len(raw)
            return found
        found[name] = (fields[1], raw[start : start + fields[6]])
        at = (start + fields[6] + 3) // 4 * 4


@given(st.dictionaries(st.text("abc/é", min_size=1, max_size=9), st.binary(max_size=9), max_size=5))
def test_an_archive_holds_what_was_put_in(files: dict[str, bytes]) -> None:
    wanted = {name: (stat.S_IFREG | 0o644, content) for name, content in files.items()}
    assert entries(cpio.archive(wanted)) == wanted


def test_the_job_says_what_to_run() -> None:
    raw = guest.initramfs(machine.Machine(iommu="amd"), ["echo", "two words", "$HOME"], {"A": "b c"}, terminal=False)
    files = entries(raw)
    assert set(files) == {"init", "sysroot", "job", "job/share", "job/guest", "job/command"}
    run = subprocess.run(["sh"], input=files["job/command"][1], capture_output=True, check=True)
    assert run.stdout == b"two words $HOME\n"
    assert b"export DMAKIT_VM_IOMMU=amd\n" in files["job/command"][1]
    assert b"export A='b c'\n" in files["job/command"][1]


@pytest.mark.parametrize("iommu", list(machine.VARIANTS))
def test_no_two_devices_share_an_address(iommu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Part, "ensure", lambda part: tmp_path)
    (tmp_path / "x.ext4").write_text("")
    full = machine.Machine(iommu=iommu, nvme=8, cmb=True, edu=True, hotplug=True)
    shares = {"ro-checkout": tmp_path, "job": tmp_path, "out": tmp_path}
    argv = machine.command(full, tmp_path / "vmlinuz", tmp_path / "initrd", shares, tmp_path)
    found = [match for word in argv for match in re.findall(r"addr=([0-9a-f]+)", word)]
    assert Counter(found).most_common(1)[0][1] == 1
    drives = [word for word in argv if word.startswith("nvme,")]
    assert [re.findall(r"addr=([0-9a-f]+)", word)[0] for word in drives] == list("456789ab")
    assert ["cmb_size_mb" in word for word in drives] == [n == 1 for n in range(8)]
    assert "edu,addr=10" in argv and "pcie-root-port,id=hotport,chassis=1,slot=1,addr=11" in argv
    assert "pcie_ports=native" in argv[-1].split()
    assert (tmp_path / "nvme7.raw").stat().st_size == 1 << 30


def test_a_command_that_does_not_end_is_killed_at_its_time(tmp_path: Path) -> None:
    started = time.monotonic()
    result = run._watch(["sh", "-c", "echo up; sleep 1000"], tmp_path, 0.5, None, False)
    assert (result.output, result.status, result.timed_out) == ("up\n", None, True)
    assert time.monotonic() - started < 10


def test_a_command_dies_with_its_caller(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from tools.vm import run\n"
        "script = 'echo $$ >pid.new; mv pid.new pid; exec sleep 1000'; os.chdir(sys.argv[1])\n"
        "run._watch(['sh', '-c', script], Path(sys.argv[1]), 1000, None, False)"
    )
    environment = {**os.environ, "PYTHONPATH": str(parts.ROOT)}
    caller = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    end = time.monotonic() + 20
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < end
        time.sleep(0.001)
    caller.kill()
    caller.wait()
    while alive(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_status_is_the_one_that_the_guest_wrote(tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    result = run._watch(["sh", "-c", f"echo 42 >{tmp_path}/share/status; exit 1"], tmp_path, 10, None, False)
    assert (result.status, result.verdict()) == (42, "")


def test_options_make_the_machine() -> None:
    words = "run --kernel debian --iommu amd --nvme 2 --cmb --edu --hotplug --nvme-mib 64"
    words += " --qemu=-device --qemu=e1000 -- ls -l"
    args = parser().parse_args(words.split())
    assert args.command == ["ls", "-l"]
    expected = machine.Machine("debian", "amd", 2, 64, "", True, True, True, extra=("-device", "e1000"))
    assert machine_of(args) == expected


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(VmError, match="^nonsense is no part of the VM; parts: qemu, toolchain, "):
        build(["debian"], "nonsense")


def test_the_kernel_is_compiled_beside_the_rest(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    child = SimpleNamespace(wait=lambda: order.append("waited") or 0, poll=lambda: 0)
    monkeypatch.setattr(Part, "ensure", lambda part: order.append(part.name))
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: order.append(command[-1]) or child)
    build(["iommufd", "debian"], None)
    expected = [
        "toolchain",
        "kernel-iommufd",
        "qemu",
        "toolchain",
        "packages",
        "image",
        "core",
        "kernel-debian",
        "waited",
    ]
    assert order == expected
    child.wait = lambda: 1
    with pytest.raises(VmError, match="^kernel-iommufd was not built: see above$"):
        build(["iommufd"], None)


def test_the_kernels_configuration_asks_for_each_thing_once() -> None:
    asked = [line.split("=")[0] for line in kernels.CONFIG.read_text().splitlines() if line.startswith("CONFIG_")]
    assert [name for name, count in Counter(asked).items() if count > 1] == []


def test_a_configuration_that_lost_a_line_is_refused(tmp_path: Path) -> None:
    lines = [line for line in kernels.CONFIG.read_text().splitlines() if line.startswith("CONFIG_")]
    config = tmp_path / "config"
    config.write_text("\n".join(line for line in lines if not line.endswith("=n")))
    kernels._check_config(config)
    config.write_text("\n".join([*(line for line in lines if line != "CONFIG_IOMMUFD=y"), "CONFIG_CPU_MITIGATIONS=y"]))
    with pytest.raises(VmError) as error:
        kernels._check_config(config)
    told = str(error.value)
    assert "does not honour CONFIG_IOMMUFD=y" in told
    assert "CONFIG_CPU_MITIGATIONS=n" in told


def test_removing_refuses_a_folder_with_a_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.Path, "read_text", lambda self: f"none {tmp_path}/proc proc rw 0 0\n")
    with pytest.raises(VmError, match=f"^{tmp_path}/proc is mounted inside {tmp_path}: unmount it first$"):
        store.remove(tmp_path)
    assert tmp_path.exists()
