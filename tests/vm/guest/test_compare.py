"""``dmakit compare --platform vfio:BDF``: the same requests through every strategy on a real IOMMU, byte by byte."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dmakit import vfio
from dmakit.lab.hardware import STRATEGIES
from tests.vm.guest.support import BACKENDS, FULL, LONG, NVME, SHORT, modprobe

COUNT, SIZE = (256, 64 << 10) if FULL else (12, 32 << 10)
WORKLOADS = {
    "scattered pages": f"bs={SIZE},iodepth=4,frag=1,rw=randrw,n={COUNT}",
    "inside a page": f"bs=4k+{SIZE - 4096},iodepth=3,offset=512,rw=rw,n={COUNT}",
}


@pytest.fixture(autouse=True)
def ours() -> Iterator[None]:
    modprobe("vfio-pci")
    vfio.bind(NVME[0])
    yield
    vfio.unbind(NVME[0])


def dmakit(verb: str, *words: str, status: int = 0) -> str:
    command = ["dmakit", verb, *words, "--platform", f"vfio:{NVME[0]}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def check(told: dict[str, Any], table: str, backend: str, requests: int) -> None:
    """Every strategy ran, on this interface, over all bytes and none of them wrong, and the table says the same."""
    assert (told["platform"], told["backend"]) == (f"vfio:{NVME[0]}", backend)
    assert told["controller"].startswith("QEMU NVMe")
    ran = {row["name"]: row for row in told["strategies"]}
    assert list(ran) == list(STRATEGIES)
    sizes = {row["bytes"] for row in ran.values()}
    assert len(sizes) == 1 and sizes.pop() > 0
    for name, row in ran.items():
        found = row["requests"], row["bytes_wrong"], row["failed"], row["unavailable"]
        assert found == (requests, 0, 0, None), f"{name}: {found}"
        assert row["measured_ns"]["map"] > 0 and row["measured_ns"]["unmap"] > 0
        assert row["ledger"]["inv_page"] is None  # only the host's IOMMU driver could count it
        assert re.search(rf"^{name} +[\d.<]+ ", table, re.MULTILINE), table
    total = sum(row["bytes"] for row in ran.values())
    assert f"\nbytes wrong: 0 of {total:,}\n" in table
    assert told["choice"].startswith("use ")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workload", ["scattered pages", pytest.param("inside a page", marks=LONG)])
def test_every_strategy_moves_every_byte(backend: str, workload: str, tmp_path: Path) -> None:
    out = tmp_path / "compare.json"
    table = dmakit("compare", WORKLOADS[workload], "--yes", "--backend", backend, "--json", str(out))
    told = json.loads(out.read_text())
    check(told, table, backend, COUNT)
    ledgers = {row["name"]: row["ledger"] for row in told["strategies"]}
    assert ledgers["premap"]["domain_unmaps"] == 0 and ledgers["premap"]["domain_maps"] <= 1  # a page for lists
    assert ledgers["two-step"]["domain_unmaps"] <= ledgers["page"]["domain_unmaps"]
    if workload == "scattered pages":
        assert ledgers["page"]["domain_unmaps"] == COUNT * SIZE // 4096
        assert ledgers["two-step"]["domain_unmaps"] == COUNT  # a window a request


@SHORT
@pytest.mark.parametrize("backend", BACKENDS)
def test_explain_says_which_way_the_driver_chose_and_what_it_measured(backend: str, tmp_path: Path) -> None:
    out = tmp_path / "explain.json"
    words = (f"bs=16k,iodepth=1,frag=1,n={COUNT}", "--yes", "--backend", backend)
    text = dmakit("explain", *words, "--json", str(out))
    told = json.loads(out.read_text())
    paths = {(line["path"], line["reason"]): line["count"] for line in told["lines"]}
    assert sum(paths.values()) == COUNT
    assert paths.keys() <= {("two-step", "RENT_BELOW_PRICE"), ("registered", "RENT_ABOVE_PRICE")}
    assert "us measured here: a window " in text and told["auto"]["costs"]["window"]


@LONG
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_recorded_linux_runs_on_this_host(backend: str, tmp_path: Path) -> None:
    """The bundled trace of a Linux 7.2, its pages moved to pages of ours."""
    out = tmp_path / "compare.json"
    table = dmakit("compare", "--yes", "--backend", backend, "--json", str(out))
    told = json.loads(out.read_text())
    first = told["strategies"][0]
    assert first["requests"] > 100 > first["left_out"] > 0
    check(told, table, backend, first["requests"])


@LONG
def test_nothing_is_overwritten_without_a_word() -> None:
    before = Path("/sys/bus/pci/devices", NVME[0], "config").read_bytes()
    text = f"vfio:{NVME[0]}: writes on the controller's namespace 1, from block 0 on: add --yes"
    assert dmakit("compare", WORKLOADS["scattered pages"], status=2) == f"dmakit: --platform {text}\n"
    assert Path("/sys/bus/pci/devices", NVME[0], "config").read_bytes() == before
