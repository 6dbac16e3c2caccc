"""The peer-to-peer decision: how a client device reaches a provider's memory, or that it does not.

Models ``calc_map_type_and_dist``, ``host_bridge_whitelist`` and ``pci_p2pdma_state`` of ``drivers/pci/p2pdma.c``.

Map types (``enum pci_p2pdma_map_type``): NONE for ordinary memory; BUS_ADDR when both devices share an upstream bridge
and no port on the way redirects: the client uses the bus address, the IOMMU is not involved; THRU_HOST_BRIDGE when
the way leads over the host bridge(s) and those are known to forward: the physical address goes through the IOMMU with
MMIO protection; NOT_SUPPORTED otherwise.

A decision is made once for a (provider's owner, client) pair and kept with the owner; ``dmakit.p2p.state`` is the memo
that a request carries over that.
"""

from __future__ import annotations

from enum import IntEnum

from dmakit.p2p.topology import HostBridge, PciDevice, PciTopology, Platform, Provider


class MapType(IntEnum):
    """How a client reaches memory; the numbers are the kernel's and those of ``consts.P2P_MAP_*``."""

    UNKNOWN = 0
    NONE = 1
    NOT_SUPPORTED = 2
    BUS_ADDR = 3
    THRU_HOST_BRIDGE = 4


ANY_ID = -1
_INTEL, _GOOGLE = 0x8086, 0x1AE0
_SAME_ONLY = ((_INTEL, 0x3C00), (_INTEL, 0x3C01), (_INTEL, 0x2F00), (_INTEL, 0x2F01))
_ANYWHERE = (
    *((_INTEL, device) for device in (0x2030, 0x2031, 0x2032, 0x2033, 0x2020)),  # Skylake-E root ports
    (_INTEL, 0x09A2),  # Sapphire Rapids
    *((_INTEL, device) for device in (0x0B25, 0x11FB, 0x1212)),  # DSA
    *((_INTEL, device) for device in (0x0CFE, 0x1216, 0xB02D, 0xFD2D)),  # IAX, IAA
    *((_INTEL, device) for device in (0x4940, 0x4942, 0x4944, 0x4946, 0x4948)),  # QAT
    (_GOOGLE, ANY_ID),
)
# (vendor, device) of a host bridge's first function: whether it forwards only between its own ports.
FORWARDING_BRIDGES: dict[tuple[int, int], bool] = {**dict.fromkeys(_SAME_ONLY, True), **dict.fromkeys(_ANYWHERE, False)}


def _bridge_forwards(host: HostBridge, same: bool) -> bool:
    """Whether a host bridge is listed for traffic inside it (``same``) or to another one."""
    if host.root_id is None or not host.root_is_first:
        return False
    vendor, device = host.root_id
    same_only = FORWARDING_BRIDGES.get((vendor, device), FORWARDING_BRIDGES.get((vendor, ANY_ID)))
    return same_only is not None and (same or not same_only)


def _host_bridges_forward(platform: Platform, provider: PciDevice, client: PciDevice) -> bool:
    if platform.cpu_vendor == "amd" and platform.cpu_family >= 0x17:
        return True
    if provider.host is client.host:
        return _bridge_forwards(provider.host, True)
    return _bridge_forwards(provider.host, False) and _bridge_forwards(client.host, False)


def calculate(platform: Platform, provider: PciDevice, client: PciDevice) -> tuple[MapType, int]:
    """(map type, distance in hops) from the topology alone: no cache is asked or filled.

    Every port from the provider up to the common bridge, that bridge included, and every port from the client up to
    it counts for ACS. Distance: hops up from both sides to the common bridge, or to the tops without one.
    """
    ours, theirs = list(provider.path_up()), list(client.path_up())
    common = next((device for device in ours if device in theirs), None)
    forwarded = _host_bridges_forward(platform, provider, client)
    beyond = MapType.THRU_HOST_BRIDGE if forwarded else MapType.NOT_SUPPORTED
    if common is None:
        return beyond, len(ours) + len(theirs)
    up, down = ours[: ours.index(common) + 1], theirs[: theirs.index(common)]
    distance = len(up) - 1 + len(down)
    if any(device.acs_redirect for device in (*up, *down)):
        return beyond, distance
    return MapType.BUS_ADDR, distance


def map_type(topology: PciTopology, provider: Provider, client: PciDevice | None) -> MapType:
    """How ``client`` (None = not a PCI device) reaches a provider's memory; decided once a pair, then remembered."""
    owner = provider.owner
    if client is None or not owner.provides:
        return MapType.NOT_SUPPORTED
    known = owner.map_types.get(client)
    if known is None:
        known = owner.map_types[client] = calculate(topology.platform, owner, client)[0]
    return MapType(known)
