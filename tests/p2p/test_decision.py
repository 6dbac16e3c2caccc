"""The decision table of peer-to-peer DMA, and the memo over it."""

from __future__ import annotations

import itertools

import pytest

from dmakit import consts
from dmakit.errors import MisuseError
from dmakit.ledger import Ledger
from dmakit.memory.physical import PhysicalMemory
from dmakit.p2p.decision import FORWARDING_BRIDGES, MapType, calculate, map_type
from dmakit.p2p.state import P2pState
from dmakit.p2p.topology import HostBridge, Kind, PciDevice, PciTopology, Platform, Provider

BAR, BAR_SIZE = 0xE0000000, 1 << 20
XEON = Platform("intel", 6)
SKYLAKE, SANDY, Q35 = (0x8086, 0x2030), (0x8086, 0x3C00), (0x8086, 0x29C0)


def machine(platform: Platform = XEON) -> PciTopology:
    memory = PhysicalMemory(4 << 30)
    memory.add_region(0, 1 << 30)
    memory.add_region(BAR, 4 * BAR_SIZE, "bar", name="bars")
    return PciTopology(memory, platform)


def switch_pair(*, acs: bool, root_id: tuple[int, int] | None) -> tuple[PciDevice, PciDevice]:
    """Two endpoints below one switch below one root port."""
    port = HostBridge("pci0000:00", root_id).root_port("00:01.0")
    left, right = port.switch("01:00.0", 2, acs_redirect=acs)
    return left.endpoint("03:00.0"), right.endpoint("04:00.0")


def test_a21_one_switch_without_redirect_gives_the_bus_address() -> None:
    topology = machine()
    owner, client = switch_pair(acs=False, root_id=None)
    topology.provide(owner, BAR, BAR_SIZE, bus_offset=0x1000)
    state = P2pState(topology, client, Ledger())
    assert state.map_type(BAR + 0x3000) is MapType.BUS_ADDR
    assert state.bus_address(BAR + 0x3000) == BAR + 0x4000
    for port in client.path_up():
        port.acs_redirect = port.kind is Kind.SWITCH_DOWNSTREAM
    owner.forget()
    state.reset()
    client.host.root_id = SKYLAKE
    assert state.map_type(BAR + 0x3000) is MapType.THRU_HOST_BRIDGE


def test_a20_one_look_up_for_a_run_of_pages() -> None:
    """The look-up counter is the number of provider changes, whatever lies between the pages."""
    topology = machine()
    owner, client = switch_pair(acs=False, root_id=None)
    for n in range(2):
        topology.provide(owner, BAR + n * BAR_SIZE, BAR_SIZE)
    ledger = Ledger()
    state = P2pState(topology, client, ledger)
    first = [BAR + page for page in range(0, 64 << 12, 1 << 12)]
    second = [BAR + BAR_SIZE + page for page in range(0, 16 << 12, 1 << 12)]
    for phys in [*first, 0x5000, *first, *second, 0x6000, *second, *first]:
        expected = MapType.NONE if phys < 1 << 30 else MapType.BUS_ADDR
        assert state.map_type(phys) is expected
    assert state.lookups == 3
    assert ledger.counts[consts.L_P2P_LOOKUPS] == 3
    assert owner.map_types == {client: MapType.BUS_ADDR}


def test_a22_over_the_host_bridge_when_it_forwards() -> None:
    """The decision half: allowed bridges answer THRU_HOST_BRIDGE (mapped with MMIO protection by dma/)."""
    owner, client = switch_pair(acs=True, root_id=SKYLAKE)
    assert calculate(XEON, owner, client) == (MapType.THRU_HOST_BRIDGE, 4)


def test_a23_unsupported_where_nothing_forwards() -> None:
    """The decision half: refused, remembered as refused, and nothing but the memo changed."""
    topology = machine()
    owner, client = switch_pair(acs=True, root_id=Q35)
    provider = topology.provide(owner, BAR, BAR_SIZE)
    state = P2pState(topology, client, Ledger())
    assert state.map_type(BAR) is MapType.NOT_SUPPORTED
    assert map_type(topology, provider, client) is MapType.NOT_SUPPORTED
    assert map_type(topology, provider, None) is MapType.NOT_SUPPORTED  # not a PCI device
    stray = Provider(client, BAR + BAR_SIZE, BAR_SIZE)  # its owner never offered memory
    assert map_type(topology, stray, owner) is MapType.NOT_SUPPORTED


def test_the_common_bridge_counts_for_acs_too() -> None:
    port = HostBridge("pci0000:00").root_port("00:01.0", acs_redirect=True)
    left, right = port.switch("01:00.0", 2)
    a, b = left.endpoint("a"), right.endpoint("b")
    assert calculate(XEON, a, b) == (MapType.BUS_ADDR, 4)  # turned round in the switch, below the root port
    upstream = left.upstream
    assert upstream is not None
    upstream.acs_redirect = True
    assert calculate(XEON, a, b) == (MapType.NOT_SUPPORTED, 4)


def test_an_endpoint_reaches_itself_and_a_redirecting_function_does_not() -> None:
    a, b = switch_pair(acs=False, root_id=None)
    assert calculate(XEON, a, a) == (MapType.BUS_ADDR, 0)
    b.acs_redirect = True
    assert calculate(XEON, a, b)[0] is MapType.NOT_SUPPORTED


@pytest.mark.parametrize("root_id", [*FORWARDING_BRIDGES, Q35, (0x1AE0, 0x1234), (0x1022, 0x1480), None])
@pytest.mark.parametrize("same", [True, False])
def test_host_bridges_by_their_ids(root_id: tuple[int, int] | None, same: bool) -> None:
    """Root ports of one bridge, or of two bridges of the same id, against the rule spelled out."""
    if root_id is not None and root_id[1] < 0:
        root_id = (root_id[0], 0x0056)
    one = HostBridge("pci0000:00", root_id)
    two = one if same else HostBridge("pci0000:80", root_id)
    a, b = one.root_port("p0").endpoint("a"), two.root_port("p1").endpoint("b")
    if root_id is None:
        allowed = False
    elif root_id[0] == 0x1AE0:
        allowed = True
    elif root_id in ((0x8086, 0x3C00), (0x8086, 0x3C01), (0x8086, 0x2F00), (0x8086, 0x2F01)):
        allowed = same
    else:
        allowed = root_id in FORWARDING_BRIDGES
    expected = MapType.THRU_HOST_BRIDGE if allowed else MapType.NOT_SUPPORTED
    assert calculate(XEON, a, b) == (expected, 4)


def test_two_bridges_must_both_be_listed_for_traffic_between_them() -> None:
    ids = (SKYLAKE, SANDY, Q35)
    for left, right in itertools.permutations(ids, 2):
        a = HostBridge("l", left).root_port("p").endpoint("a")
        b = HostBridge("r", right).root_port("p").endpoint("b")
        assert calculate(XEON, a, b)[0] is MapType.NOT_SUPPORTED
    a = HostBridge("l", SKYLAKE).endpoint("a")
    b = HostBridge("r", (0x8086, 0x09A2)).endpoint("b")
    assert calculate(XEON, a, b) == (MapType.THRU_HOST_BRIDGE, 2)
    a.host.root_is_first = False
    assert calculate(XEON, a, b)[0] is MapType.NOT_SUPPORTED


@pytest.mark.parametrize(
    ("vendor", "family", "forwards"), [("amd", 0x17, True), ("amd", 0x16, False), ("intel", 25, False)]
)
def test_amd_forwards_since_zen_whatever_the_bridge(vendor: str, family: int, forwards: bool) -> None:
    a, b = (HostBridge(name).root_port("p").endpoint(name) for name in ("a", "b"))
    expected = MapType.THRU_HOST_BRIDGE if forwards else MapType.NOT_SUPPORTED
    assert calculate(Platform(vendor, family), a, b)[0] is expected


def test_impossible_topologies_and_providers_are_refused() -> None:
    topology = machine()
    host = HostBridge("pci0000:00")
    port = host.root_port("00:01.0")
    end = port.endpoint("01:00.0")
    with pytest.raises(MisuseError, match=r"^x: a endpoint cannot be below a endpoint$"):
        end.endpoint("x")
    with pytest.raises(MisuseError, match=r"^y: a switch upstream port cannot be below a endpoint$"):
        end.switch("y", 2)
    with pytest.raises(MisuseError, match=r"^ports=0: a switch has at least one downstream port$"):
        port.switch("z", 0)
    with pytest.raises(MisuseError, match=r"^00:01.0 is a root port: only an endpoint provides memory$"):
        topology.provide(port, BAR, 4096)
    with pytest.raises(MisuseError, match=r"^\[0x1000, 0x2000\) is ram: peer memory is part of a BAR$"):
        topology.provide(end, 0x1000, 4096)
    topology.provide(end, BAR, 8192)
    with pytest.raises(MisuseError, match=r"^\[0xe0001000, 0xe0002000\) overlaps the peer memory at 0xe0000000$"):
        topology.provide(end, BAR + 4096, 4096)
    assert topology.provider_at(BAR + 8191) is topology.providers[0]
    assert topology.provider_at(BAR + 8192) is None
