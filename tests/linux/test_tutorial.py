"""The tutorial's code on the fake host, and the fake host's answers against a real kernel's.

``tests/data/vfio_conversation.txt`` was recorded on Linux 7.2 (VT-d, QEMU) by ``tests.support.vfio.conversation``; the
same conversation is a test in the VM.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.linux.worlds import EDU, NVME, host
from tests.support.vfio.conversation import talk
from tests.support.vfio.devices import FakeEdu, FakeNvme
from tests.support.vfio.host import FakeHost

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "vfio.md"
RECORDED = ROOT / "tests" / "data" / "vfio_conversation.txt"


def blocks() -> list[str]:
    """The guide's Python code."""
    return re.findall(r"```py\n(.*?)```", GUIDE.read_text(), re.DOTALL)


@pytest.mark.parametrize("iommufd", (False, True))
def test_the_tutorial(iommufd: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeHost([FakeEdu("0000:00:10.0", 5), FakeNvme(NVME, 4)], iommufd=iommufd)
    monkeypatch.setattr("dmakit.platform.linux.machine.Kernel", lambda: fake)
    names: dict[str, object] = {}
    for code in blocks():
        exec(code, names)  # noqa: S102
    assert capsys.readouterr().out.splitlines() == ["1234:11e8", "edu 1.0", "b'hello, real IOMMU'"]
    assert len([line for line in blocks()[0].splitlines() if line.strip()]) <= 30
    assert fake.left() == {"files": 0, "pinned": 0}


def test_the_tutorial_on_the_software_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """With the one line changed that the guide shows."""
    ((there, here),) = re.findall(r"```diff\n-(.*)\n\+(.*)\n```", GUIDE.read_text())
    assert blocks()[0].count(there) == 1
    exec(blocks()[0].replace(there, here), {})  # noqa: S102
    assert capsys.readouterr().out.splitlines() == ["1234:11e8", "edu 1.0", "b'hello, real IOMMU'"]


@pytest.mark.parametrize("backend", ("type1", "iommufd"))
def test_the_fake_host_answers_as_a_kernel_does(backend: str) -> None:
    recorded = [line.split(None, 1)[1] for line in RECORDED.read_text().splitlines() if line.startswith(backend)]
    fake = host()
    said = [f"{asked:28} {answer}" for asked, answer in talk(fake, backend, EDU)]
    assert said == recorded
    assert fake.left() == {"files": 0, "pinned": 0}
