"""Requests on peer memory, through the real topology and decision table."""

from __future__ import annotations

import pytest

from dmakit.block.request import Op, Request
from dmakit.block.status import BlkStatus
from dmakit.errors import UnsupportedError
from dmakit.nvme.driver import NvmeDriver
from dmakit.nvme.model import ControllerModel
from dmakit.nvme.namespace import Namespace
from dmakit.nvme.transport import ModelTransport
from dmakit.p2p.state import P2pState
from dmakit.p2p.topology import HostBridge, PciTopology
from dmakit.platform.soft import Machine
from dmakit.reasons import Reason

UNKNOWN_BRIDGE = (0x1234, 0x5678)
GOOGLE_BRIDGE = (0x1AE0, 0x0001)


class PeerRig:
    """One NVMe controller and another device's BAR, below one switch or below two root ports."""

    def __init__(self, *, same_switch: bool, root: tuple[int, int] = UNKNOWN_BRIDGE) -> None:
        self.machine = Machine(ram="64M", swiotlb="1M", mode="strict")
        self.bar = self.machine.add_bar("1M", "peer")
        bridge = HostBridge("pci0000:00", root_id=root)
        below = bridge.root_port("00:01.0")
        if same_switch:
            switch = below.switch("02:00.0", ports=2)
            client, owner = (port.endpoint(name) for port, name in zip(switch, ("03:00.0", "04:00.0"), strict=True))
        else:
            client, owner = below.endpoint("01:00.0"), bridge.root_port("00:02.0").endpoint("05:00.0")
        self.topology = PciTopology(self.machine.memory)
        self.provider = self.topology.provide(owner, self.bar.start, self.bar.size)
        self.device = self.machine.device("nvme0")
        self.controller = ControllerModel(self.device.port, [Namespace(1, 4096)])
        peer = P2pState(self.topology, client, self.machine.ledger)
        self.driver = NvmeDriver(ModelTransport(self.controller, self.device), peer=peer)
        self.driver.start()


@pytest.mark.parametrize("length", [4096, 65536])
def test_a23_a_peer_behind_an_unknown_bridge_is_refused_and_nothing_is_mapped(length: int) -> None:
    rig = PeerRig(same_switch=False)
    before = rig.machine.ledger.snapshot()
    request = Request(Op.READ, [(rig.bar.start, length)])
    iod = rig.driver.mapper.map(request)
    assert (iod.status, iod.reason, iod.path_name) == (BlkStatus.INVAL, Reason.P2P_NOT_SUPPORTED, "failed")
    with pytest.raises(
        UnsupportedError, match=r"^request: peer memory that this device cannot reach \(BLK_STS_INVAL\)$"
    ):
        rig.driver.submit(request)
    after = rig.machine.ledger.snapshot()
    assert {row for row in after if after[row] != before[row]} <= {"p2p_lookups", "passes"}


def test_through_an_allowed_bridge_the_bytes_arrive_by_an_mmio_mapping() -> None:
    rig = PeerRig(same_switch=False, root=GOOGLE_BRIDGE)
    rig.controller.io.namespaces[1].write(0, b"\x5a" * 131072)
    (done,) = rig.driver.execute([Request(Op.READ, [(rig.bar.start, 8192), (rig.bar.start + 65536, 4096)])])
    assert done.status == 0 and rig.machine.memory.read(rig.bar.start, 8192) == b"\x5a" * 8192
    assert (done.iod.reason, done.iod.path_name) == (Reason.P2P_HOST_BRIDGE, "two-step")
    rig.driver.stop()
    rig.device.release()


def test_below_one_switch_the_command_carries_bus_addresses() -> None:
    rig = PeerRig(same_switch=True)
    before = rig.machine.ledger.snapshot()
    iod = rig.driver.mapper.map(Request(Op.READ, [(rig.bar.start + 4096, 4096)]))
    assert (iod.path_name, iod.reason, iod.low) == ("bus", Reason.P2P_BUS, rig.bar.start + 4096)
    after = rig.machine.ledger.snapshot()
    assert after["map_calls"] == before["map_calls"] and after["pte_set_1"] == before["pte_set_1"]
    rig.driver.mapper.unmap(iod)
