"""Bugs that the hostile and the paired runs found: memory that is not there, sums that wrap, malformed lists."""

from __future__ import annotations

from typing import Any

import pytest

from dmakit.errors import MisuseError
from tests.dma.world import PAGE, world

pytestmark = pytest.mark.portable

NOWHERE = 1 << 50


@pytest.mark.parametrize(
    "machine, device",
    [({}, {"trusted": False, "min_align_mask": 4095}), ({"mode": "passthrough", "force_bounce": True}, {})],
    ids=["untrusted", "forced"],
)
def test_a_bounce_of_what_is_no_memory_is_refused(machine: dict[str, Any], device: dict[str, Any]) -> None:
    made, mapper = world(machine, **device)
    with pytest.raises(MisuseError) as caught:
        mapper.map_phys(NOWHERE + 8, 100, 0)
    assert str(caught.value) == (
        "map of 0x64 bytes at phys 0x4000000000008: must be bounced, but there is no memory to copy"
    )
    with pytest.raises(MisuseError, match="must be bounced, but there is no memory to copy"):
        mapper.map_sg([(NOWHERE + 8, 100)], 0)
    assert made.live()["bounce_slots"] == made.live()["iova_ranges"] == 0


@pytest.mark.parametrize(
    "segments, message",
    [
        ([(1,)], "map_sg: must be a sequence of pairs of numbers"),
        (5, "map_sg: must be a sequence of pairs of numbers"),
        ([(1 << 40, 1 << 63)] * 2, "map_sg: 0x10000000000000000 bytes in all: must be below 2**62"),
    ],
)
def test_a_list_that_is_none_is_refused(segments: Any, message: str) -> None:
    made, mapper = world()
    before = made.ledger.snapshot()
    with pytest.raises(MisuseError) as caught:
        mapper.map_sg(segments, 0)
    assert (str(caught.value), made.ledger.snapshot()) == (message, before)


def test_a_mask_is_set_whole_or_not_at_all() -> None:
    _, mapper = world()
    with pytest.raises(MisuseError):
        mapper.set_mask((1 << 32) - 1, 5)
    assert mapper.mask == (1 << 64) - 1


def test_a_read_of_more_than_there_is_runs_out() -> None:
    _, mapper = world()
    with pytest.raises(Exception, match="read: no memory for|may not read|blocked"):
        mapper.dma_read(PAGE, 1 << 62)
