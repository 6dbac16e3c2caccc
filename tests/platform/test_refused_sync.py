"""A domain that refuses to make a mapping known (none of ours does; a host's might): the caller hears of it."""

from __future__ import annotations

from array import array

import pytest

from dmakit import _core
from dmakit.block.dma_iter import BlkDmaIter
from dmakit.block.request import Op, Request
from dmakit.block.status import BlkStatus
from dmakit.consts import ENOMEM
from dmakit.dma.batch import link_many, sync_many
from dmakit.dma.direction import Direction
from dmakit.errors import ExhaustedError
from dmakit.platform.soft import Machine

PAGE, TO = 4096, Direction.TO_DEVICE


@pytest.mark.skipif(_core.status()["running"] == "compiled", reason="compiled domains cannot be made to refuse")
def test_a_sync_that_the_domain_refuses_is_told_and_leaves_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(ram="64M", swiotlb=0, mode="strict")
    device = machine.device("nvme0")
    pages, sizes = array("Q", [machine.pages.alloc() for _ in range(2)]), array("Q", [PAGE] * 2)
    kept = device.try_alloc(0, 2 * PAGE)
    link_many(kept, pages, sizes, TO)
    live = machine.live()
    monkeypatch.setattr(type(device.domain), "_sync_map", lambda *_: -ENOMEM)
    blocks = BlkDmaIter()
    for call in (
        lambda: kept.sync(),
        lambda: kept.sync(0, PAGE),
        lambda: sync_many(kept, array("Q", [0, PAGE]), sizes),
        lambda: device.map_window(pages, sizes, TO),
        lambda: device.map_windows(pages, sizes, array("Q", [0, 2]), array("Q", [0, 0]), TO),
    ):
        with pytest.raises(ExhaustedError, match=r": no memory for an IOMMU table page$"):
            call()
        assert machine.live() == live
    assert not blocks.start(Request(Op.WRITE, list(zip(pages, sizes, strict=True))), device)
    assert (blocks.status, machine.live()) == (BlkStatus.RESOURCE, live)
    kept.undo()
