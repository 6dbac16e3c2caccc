"""Where a device's own accesses lead: through every way of mapping, and nowhere else. edu makes them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dmakit.dma.direction import Direction
from dmakit.errors import UnsupportedError
from tests.pci.world import PAGE, PLATFORMS, bring_up, is_real

everywhere = pytest.mark.parametrize("platform", PLATFORMS)
BOTH = Direction.BIDIRECTIONAL


def steps(platform: str) -> int:
    """An access takes QEMU's edu a tenth of a second; in the guest's full matrix it may."""
    if not is_real(platform):
        return 200
    from tests.vm.guest.support import FULL

    return 200 if FULL else 20


@everywhere
def test_random_windows_lead_where_the_truth_says(platform: str) -> None:
    rng = random.Random(7)
    with bring_up(platform) as (machine, device, port):
        pages = [machine.buffer(PAGE) for _ in range(48)]
        for number, page in enumerate(pages):
            page.write(0, bytes([number]) * PAGE)
        live: list[tuple[Any, list[int]]] = []
        for _ in range(steps(platform)):
            if len(live) == 6 or (live and rng.random() < 0.3):
                state, numbers = live.pop(rng.randrange(len(live)))
                state.destroy(len(numbers) * PAGE, BOTH)
            else:
                numbers = rng.sample(range(48), rng.randint(1, 9))
                state = device.dma.try_alloc(0, len(numbers) * PAGE)
                for at in rng.sample(range(len(numbers)), len(numbers)):
                    state.link(pages[numbers[at]].ranges[0][0], at * PAGE, PAGE, BOTH)
                state.sync()
                live.append((state, numbers))
            if live:
                state, numbers = rng.choice(live)
                at = rng.randrange(len(numbers))
                assert port.read(state.addr + at * PAGE, 16) == bytes([numbers[at]]) * 16
        for state, numbers in live:
            state.destroy(len(numbers) * PAGE, BOTH)


@everywhere
def test_every_way_of_mapping_moves_the_bytes(platform: str) -> None:
    with bring_up(platform) as (machine, device, port):
        dma = device.dma
        buffer = machine.buffer(6 * PAGE, offset=512)
        data = random.Random(1).randbytes(6 * PAGE)
        phys, size = buffer.slices(0, 3000)[0]
        addr = dma.map_phys(phys, size, BOTH)
        port.write(addr, data[:size])
        assert buffer.read(0, size) == data[:size]
        dma.unmap_phys(addr, size, BOTH)
        whole = machine.buffer(5 * PAGE)
        sg = dma.map_sg([part for i in (4, 0, 2) for part in whole.slices(i * PAGE, PAGE)], BOTH)
        at = 0
        for seg, length in sg.segments:
            port.write(seg, data[at : at + length])
            at += length
        assert b"".join(whole.read(i * PAGE, PAGE) for i in (4, 0, 2)) == data[: 3 * PAGE]
        dma.unmap_sg(sg)
        with dma.alloc_coherent(2 * PAGE) as shared:
            shared.write(100, b"coherent")
            assert port.read(shared.addr + 100, 8) == b"coherent"


@everywhere
def test_what_is_not_mapped_is_not_reached(platform: str) -> None:
    with bring_up(platform) as (machine, device, port):
        secret = machine.buffer(PAGE)
        secret.write(0, b"secret" * 600)
        addr = device.dma.map_phys(*secret.ranges[0], BOTH)
        assert port.read(addr, 6) == b"secret"
        device.dma.unmap_phys(addr, PAGE, BOTH)
        assert port.read(addr, 6) == bytes(6), "edu's only sign: zeros"
        port.write(addr, b"damage")
        assert secret.read(0, 6) == b"secret"


@pytest.mark.parametrize("platform", PLATFORMS[1:])
def test_a_part_of_a_piece_is_refused_and_the_whole_goes(platform: str) -> None:
    """A host's domain unmaps only what was mapped as one; the software machine's any granule."""
    with bring_up(platform) as (machine, device, port):
        assert device.dma.domain.capabilities.unmap_unit == "mapping"
        phys = machine.buffer(4 * PAGE, order=2).ranges[0][0]
        state = device.dma.try_alloc(phys, 4 * PAGE)
        state.link(phys, 0, 4 * PAGE, BOTH)
        with pytest.raises(UnsupportedError, match="unmaps only what was mapped as one"):
            state.unlink(PAGE, PAGE, BOTH)
        machine.memory.write(phys + 3 * PAGE, b"still here")
        assert port.read(state.addr + 3 * PAGE, 10) == b"still here"
        state.destroy(4 * PAGE, BOTH)
