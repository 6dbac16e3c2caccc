"""Rows of the feature table where a device meets a peer's memory, or an untrusted device its bounce slots."""

from __future__ import annotations

from typing import Any

import pytest

from dmakit.dma.direction import Attrs, Direction
from dmakit.errors import UnsupportedError
from dmakit.p2p.state import P2pState
from dmakit.p2p.topology import HostBridge, PciTopology
from dmakit.platform.soft import Machine

TO, FROM = Direction.TO_DEVICE, Direction.FROM_DEVICE
PAGE = 4096
SKYLAKE, Q35 = (0x8086, 0x2030), (0x8086, 0x29C0)


def pair(*, acs: bool, root_id: tuple[int, int], **options: Any) -> tuple[Machine, Any, int]:
    """A machine, a device with a peer below the same switch, and the start of the peer's memory."""
    machine = Machine(ram="256M", mode="strict", checker=True, **options)
    bar = machine.add_bar("1M", "peer")
    left, right = HostBridge("pci0000:00", root_id).root_port("00:01.0").switch("01:00.0", 2, acs_redirect=acs)
    topology = PciTopology(machine.memory)
    topology.provide(left.endpoint("peer"), bar.start, bar.size, bus_offset=0x40000000)
    state = P2pState(topology, right.endpoint("client"), machine.ledger)
    return machine, machine.device("client", p2p=state), bar.start


def test_a21_a_bus_address_takes_no_entry_and_no_iova() -> None:
    machine, device, bar = pair(acs=False, root_id=Q35)
    before = machine.ledger.snapshot()
    sg = device.map_sg([(bar + 0x3000, PAGE), (bar + 0x8000, 0x600)], FROM)
    assert sg.segments == [(bar + 0x40003000, PAGE), (bar + 0x40008000, 0x600)]
    after = machine.ledger.snapshot()
    untouched = ("pte_set_1", "tables_allocated", "iova_tree", "iova_magazine", "inv_page", "bounce_maps")
    assert [after[row] - before[row] for row in untouched] == [0] * len(untouched)
    assert after["p2p_lookups"] - before["p2p_lookups"] == 1
    device.unmap_sg(sg)
    assert machine.ledger.snapshot()["inv_page"] == before["inv_page"]
    device.release()


@pytest.mark.parametrize("coherent", [True, False])
def test_a22_over_the_host_bridge_it_is_mapped_without_cache_care_or_bounce(coherent: bool) -> None:
    """With ACS redirect on, through the IOMMU; VT-d entries carry no MMIO bit: what shows is what is left out."""
    machine, device, bar = pair(acs=True, root_id=SKYLAKE, coherent=coherent)
    before = machine.ledger.snapshot()
    sg = device.map_sg([(bar + 0x3000, PAGE)], FROM)
    ((addr, length),) = sg.segments
    assert (device.iova_to_phys(addr), length) == (bar + 0x3000, PAGE)
    after = machine.ledger.snapshot()
    cared = ("cache_clean_bytes", "cache_inv_bytes", "bounce_maps")
    assert after["pte_set_1"] - before["pte_set_1"] == 1
    device.dma_write(addr, b"to the peer")
    assert machine.memory.read(bar + 0x3000, 11) == b"to the peer"
    device.unmap_sg(sg)
    state = device.try_alloc(0, PAGE)
    state.link(bar, 0, PAGE, FROM, Attrs.MMIO)
    state.sync()
    state.destroy(PAGE, FROM, Attrs.MMIO)
    assert [machine.ledger.snapshot()[row] - before[row] for row in cared] == [0, 0, 0]
    device.release()


def test_a23_unsupported_is_refused_and_nothing_is_mapped() -> None:
    machine, device, bar = pair(acs=True, root_id=Q35)
    ram = machine.pages.alloc()
    live, ledger = machine.live(), machine.ledger.snapshot()
    with pytest.raises(UnsupportedError, match=r"a peer's memory that this device cannot reach") as caught:
        device.map_sg([(ram, PAGE), (bar, PAGE)], FROM)
    assert caught.value.errno_name == "EREMOTEIO"
    assert machine.live() == live
    assert machine.ledger.snapshot()["pte_set_1"] == ledger["pte_set_1"]
    device.release()


@pytest.mark.parametrize(("offset", "size"), [(0x200, 0x3400), (0x400, 0x300), (0, 0x300), (0xF00, 0x200)])
def test_a13_a14_an_untrusted_device_sees_the_buffer_and_zeros(offset: int, size: int) -> None:
    """Every byte of every granule that the device reaches: the buffer's own, or 0; never a neighbour's."""
    machine = Machine(ram="256M", mode="lazy", checker=True)
    device = machine.device("thunderbolt", trusted=False, min_align_mask=PAGE - 1)
    pool = machine.swiotlb
    assert pool is not None
    machine.memory.fill(pool.pools[0].start, 0x20000, 0xAA)  # what earlier users left in the slots
    block = machine.pages.alloc(3)
    machine.memory.fill(block, 8 * PAGE, 0xEE)  # the neighbours
    text = bytes(i % 200 for i in range(size))
    machine.memory.write(block + offset, text)
    state = device.try_alloc(block + offset, size)
    before = machine.ledger.snapshot()["bounced_bytes"]
    state.link(block + offset, 0, size, TO)
    state.sync()
    reach = (offset + size + PAGE - 1) // PAGE * PAGE
    seen = device.port.read(state.addr - offset, reach)
    assert seen == bytes(offset) + text + bytes(reach - offset - size)
    head = min(size, -offset % PAGE)
    tail = (offset + size) % PAGE if size > head else 0
    assert machine.ledger.snapshot()["bounced_bytes"] - before == head + tail
    state.destroy(size, TO)
    device.release()
    assert pool.used == 0
