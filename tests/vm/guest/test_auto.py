"""The strategy that chooses, on a real kernel and IOMMU: it measures, registers, says why, and every byte is right."""

from __future__ import annotations

from typing import Any

import pytest

from dmakit import nvme
from dmakit.nvme.costs import ROUNDS, Costs, Line
from dmakit.nvme.exercise import Verifier
from dmakit.reasons import Reason
from tests.vm.guest.support import BACKENDS, IOMMU, NVME

BDF = NVME[0]

pytestmark = [
    pytest.mark.on(iommu=("vtd-lazy", "vtd-strict", "vtd-sm", "amd", "virtio")),
    pytest.mark.usefixtures("drive_on_vfio"),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_measures_chooses_and_moves_every_byte(backend: str) -> None:
    with nvme.Controller.open(BDF, backend=backend, ram="64M", record=True) as controller:
        mapper: Any = controller.driver.mapper
        machine: Any = controller.host.machine  # type: ignore[attr-defined]
        assert controller.driver.strategy == "auto"
        before = machine.live()["mappings"]
        costs = mapper.measured()
        assert costs is not None and 1 <= costs.rounds <= ROUNDS and costs.window.of(1, 1) > 0
        assert machine.live()["mappings"] <= before + 1  # a page for PRP lists stays with the driver
        verdict = costs.verdict((1, 16), (1, 16))
        print(f"{backend}, {IOMMU}: {costs}; 64 KiB: {verdict}")
        disk = controller.namespaces[1]
        with controller.buffer(1 << 16) as buffer:
            for at in range(6):
                buffer.view[:] = bytes([at + 1]) * (1 << 16)
                disk.write(128 * at, buffer)
            for at in range(6):
                disk.read_into(128 * at, buffer)
                assert bytes(buffer.view) == bytes([at + 1]) * (1 << 16)
        taken = [reason for _, reason in controller.driver.paths.requests.values()]
        below, above = Reason.RENT_BELOW_PRICE, Reason.RENT_ABOVE_PRICE
        uses = verdict.uses
        dear = [Reason.WINDOW_CHEAPER] * 12  # what it measured: an emulated, loaded processor may say anything
        assert taken == (dear if uses is None else ([below] * (uses - 1) + [above] * 12)[:12]), str(costs)
        report = Verifier(controller, 1, total=2 << 20, first=2048, depth=8, seed=3).run()
    assert report.good and report.auto is not None, report
    assert sum(report.auto["requests"].values()) >= report.commands


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_costs_given_it_registers_and_makes_room(backend: str) -> None:
    """Buffers by turns through windows, registration, eviction by hand, windows again: the device finds them all."""
    costs = Costs(Line(10, 0, 0), Line(0, 0, 0), Line(15, 0, 0))
    with nvme.Controller.open(BDF, backend=backend, ram="64M", record=True) as controller:
        mapper: Any = controller.driver.mapper
        mapper.source = lambda requests: costs
        disk = controller.namespaces[1]
        buffers = [controller.buffer(1 << 15) for _ in range(4)]
        for turn in range(4):
            for at, buffer in enumerate(buffers):
                buffer.view[:] = bytes([16 * turn + at]) * (1 << 15)
                disk.write(64 * at, buffer)
            if turn == 1:
                assert mapper._make_room(1, 1) and mapper.evictions == 1
            for at, buffer in enumerate(buffers):
                buffer.view[:] = bytes(1 << 15)
                disk.read_into(64 * at, buffer)
                assert bytes(buffer.view) == bytes([16 * turn + at]) * (1 << 15)
        assert mapper.taken == {Reason.RENT_BELOW_PRICE: 5, Reason.RENT_ABOVE_PRICE: 27}
