"""Bad arguments: the same MisuseError interpreted and compiled; integers of any kind are accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dmakit.errors import MisuseError
from tests.dma.world import PAGE, world

pytestmark = pytest.mark.portable

BAD: list[tuple[str, Callable[[Any, Any], object]]] = [
    ("map_phys: ['x', +1): must be a non-empty range of 64-bit addresses", lambda d, s: d.map_phys("x", 1, 1)),
    ("map_phys: [1.5, +1): must be a non-empty range of 64-bit addresses", lambda d, s: d.map_phys(1.5, 1, 1)),
    ("direction='a': must be one of the four Direction values (0 to 3)", lambda d, s: d.map_phys(PAGE, 1, "a")),
    ("attrs=None: must be a combination of Attrs (known bits 0x3ff6)", lambda d, s: d.map_phys(PAGE, 1, 1, None)),
    ("cpu='q': must be 0 to 0, a CPU of the machine", lambda d, s: d.map_phys(PAGE, 1, 1, cpu="q")),
    ("cpu=5: must be 0 to 0, a CPU of the machine", lambda d, s: d.map_phys(PAGE, 1, 1, cpu=5)),
    ("cpu=-1: must be 0 to 0, a CPU of the machine", lambda d, s: d.try_alloc(0, 1, cpu=-1)),
    ("try_alloc: phys='x': must be a 64-bit address", lambda d, s: d.try_alloc("x", 1)),
    (
        "try_alloc: size=None: must be 1 to 2**63 - 1 bytes (bit 63 is the state's own)",
        lambda d, s: d.try_alloc(0, None),
    ),
    ("link: phys='x': must be an address below 2**64 - size", lambda d, s: s.link("x", 0, 1, 1)),
    ("link: offset='0', size=1: must be integers, offset >= 0 and size > 0", lambda d, s: s.link(PAGE, "0", 1, 1)),
    ("cpu=1: must be 0 to 0, a CPU of the machine", lambda d, s: s.link(PAGE, 0, 1, 1, cpu=1)),
    ("sync: offset='x', size=None: must be integers, offset >= 0 and size > 0", lambda d, s: s.sync("x")),
    ("unlink: offset=0, size=None: must be integers, offset >= 0 and size > 0", lambda d, s: s.unlink(0, None, 1)),
    ("destroy: mapped_len='1': must be 0 to 0x2000, the size of the window", lambda d, s: s.destroy("1", 1)),
    ("mask='x': must be 2**n - 1 with n from 1 to 64", lambda d, s: d.set_mask("x")),
    ("max_segment='x': must be 1 to 2**32 - 1 bytes", lambda d, s: d.set_max_segment("x")),
    ("map_sg: [1, +'a'): must be a non-empty range of 64-bit addresses", lambda d, s: d.map_sg([(1, "a")], 1)),
    ("dma_read: ['x', +1): must be a non-empty range of 64-bit addresses", lambda d, s: d.dma_read("x", 1)),
    ("iova_to_phys: [-1, +1): must be a non-empty range of 64-bit addresses", lambda d, s: d.iova_to_phys(-1)),
]


@pytest.mark.parametrize("message, call", BAD, ids=[message for message, _ in BAD])
def test_bad_arguments_get_a_clear_error(message: str, call: Callable[[Any, Any], object]) -> None:
    machine, device = world()
    state = device.try_alloc(0, 2 * PAGE)
    before = machine.ledger.snapshot()
    with pytest.raises(MisuseError) as caught:
        call(device, state)
    assert str(caught.value) == message
    assert machine.ledger.snapshot() == before


def test_integers_of_any_kind_are_taken() -> None:
    machine, device = world()
    phys = np.uint64(machine.buffer(PAGE).ranges[0][0])
    addr = device.map_phys(phys, np.int32(PAGE), np.uint8(1))
    device.unmap_phys(np.uint64(addr), np.int64(PAGE), 1)
    with device.try_alloc(np.uint64(0), np.uint32(PAGE)) as state:
        state.link(phys, np.uint8(0), np.uint16(PAGE), 1)
        state.sync()
        assert device.iova_to_phys(np.uint64(state.addr)) == phys
