"""A PCI topology: host bridges, root ports, switches and endpoints, and the peer memory that endpoints provide.

What the peer-to-peer decision looks at (``dmakit.p2p.decision``), no more:

* the way up from a device: ``upstream`` is the bridge above it (``pci_upstream_bridge``), None right below the host
  bridge. A switch is one upstream port with downstream ports below it; a transaction between two devices below one
  switch can be turned round there, unless
* ACS *redirect* (request redirect, completion redirect or egress control) at a port on the way sends it up;
* the host bridge: the vendor and device ids of the first function on its bus (``root_id``), which stand for the
  chipset, and whether that function is a root port; together with the CPU (``Platform``) they decide whether
  transactions between its ports are forwarded at all.

A *provider* is a part of an endpoint's BAR that other devices may use as memory (``pci_p2pdma_add_resource``).
``bus_offset`` is what must be added to its CPU physical address to get the address on the PCI bus (0 on PCs).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from dmakit.errors import MisuseError
from dmakit.memory.physical import PhysicalMemory


class Kind(Enum):
    """What a PCI function is. The value says which kinds it may have above it (None = the host bridge)."""

    ROOT_PORT = "root port"
    SWITCH_UPSTREAM = "switch upstream port"
    SWITCH_DOWNSTREAM = "switch downstream port"
    ENDPOINT = "endpoint"


_BELOW: dict[Kind | None, frozenset[Kind]] = {
    None: frozenset({Kind.ROOT_PORT, Kind.ENDPOINT}),
    Kind.ROOT_PORT: frozenset({Kind.SWITCH_UPSTREAM, Kind.ENDPOINT}),
    Kind.SWITCH_UPSTREAM: frozenset({Kind.SWITCH_DOWNSTREAM}),
    Kind.SWITCH_DOWNSTREAM: frozenset({Kind.SWITCH_UPSTREAM, Kind.ENDPOINT}),
    Kind.ENDPOINT: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Platform:
    """The CPU: AMD's since Zen (family 0x17) forward peer-to-peer between their root ports."""

    cpu_vendor: str = "intel"
    cpu_family: int = 6


@dataclass(eq=False, slots=True)
class HostBridge:
    """A root bus. ``root_id``: (vendor, device) of its first function, None when there is no such function.

    ``root_is_first``: that function is 00.0 or a root port, else the kernel does not take it for the chipset.
    """

    name: str
    root_id: tuple[int, int] | None = None
    root_is_first: bool = True

    def root_port(self, name: str, *, acs_redirect: bool = False) -> PciDevice:
        """Add a root port."""
        return _add(name, Kind.ROOT_PORT, self, None, acs_redirect)

    def endpoint(self, name: str, *, acs_redirect: bool = False) -> PciDevice:
        """Add an endpoint that is integrated into the root complex."""
        return _add(name, Kind.ENDPOINT, self, None, acs_redirect)


@dataclass(eq=False, slots=True)
class PciDevice:
    """One function: a port or an endpoint. ``acs_redirect`` may be changed; then ``forget`` the decisions."""

    name: str
    kind: Kind
    host: HostBridge
    upstream: PciDevice | None = None
    acs_redirect: bool = False
    # Decisions made with this device as provider, by client: the kernel's pdev->p2pdma->map_types.
    map_types: dict[PciDevice, int] = field(default_factory=dict, repr=False)
    provides: bool = False

    def switch(self, name: str, ports: int, *, acs_redirect: bool = False) -> list[PciDevice]:
        """Add a switch below this port: its downstream ports, each with this ACS setting."""
        if ports < 1:
            raise MisuseError(f"ports={ports}: a switch has at least one downstream port")
        up = _add(name, Kind.SWITCH_UPSTREAM, self.host, self, False)
        return [_add(f"{name}.{n}", Kind.SWITCH_DOWNSTREAM, self.host, up, acs_redirect) for n in range(ports)]

    def endpoint(self, name: str, *, acs_redirect: bool = False) -> PciDevice:
        """Add an endpoint below this port."""
        return _add(name, Kind.ENDPOINT, self.host, self, acs_redirect)

    def path_up(self) -> Iterator[PciDevice]:
        """This device and every bridge above it, up to the one below the host bridge."""
        at: PciDevice | None = self
        while at is not None:
            yield at
            at = at.upstream

    def forget(self) -> None:
        """Drop the cached decisions of this provider."""
        self.map_types.clear()


def _add(name: str, kind: Kind, host: HostBridge, above: PciDevice | None, acs_redirect: bool) -> PciDevice:
    where = None if above is None else above.kind
    if kind not in _BELOW[where]:
        place = "a host bridge" if where is None else f"a {where.value}"
        raise MisuseError(f"{name}: a {kind.value} cannot be below {place}")
    return PciDevice(name, kind, host, above, acs_redirect)


@dataclass(frozen=True, eq=False, slots=True)
class Provider:
    """Peer memory: [start, start + size) of physical addresses, a part of a BAR of ``owner``."""

    owner: PciDevice
    start: int
    size: int
    bus_offset: int = 0

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.start + self.size

    def bus_address(self, phys: int) -> int:
        """The address of ``phys`` on the PCI bus (``pci_p2pdma_bus_addr_map``)."""
        return phys + self.bus_offset


class PciTopology:
    """The providers of one machine by address, and the platform that the decision depends on."""

    def __init__(self, memory: PhysicalMemory, platform: Platform | None = None) -> None:
        self.memory = memory
        self.platform = platform or Platform()
        self.providers: list[Provider] = []
        self.low, self.high = (1 << 64) - 1, 0  # no provider lies outside [low, high)

    def provide(self, owner: PciDevice, start: int, size: int, *, bus_offset: int = 0) -> Provider:
        """Let other devices use [start, start + size), which must lie inside one BAR; ranges do not overlap."""
        if owner.kind is not Kind.ENDPOINT:
            raise MisuseError(f"{owner.name} is a {owner.kind.value}: only an endpoint provides memory")
        region = self.memory.region_at(start, size)
        if region.kind != "bar" or size <= 0:
            raise MisuseError(f"[{start:#x}, {start + size:#x}) is {region.kind}: peer memory is part of a BAR")
        for other in self.providers:
            if start < other.end and other.start < start + size:
                raise MisuseError(f"[{start:#x}, {start + size:#x}) overlaps the peer memory at {other.start:#x}")
        provider = Provider(owner, start, size, bus_offset)
        bisect.insort(self.providers, provider, key=lambda one: one.start)
        self.low, self.high = min(self.low, start), max(self.high, provider.end)
        owner.provides = True
        return provider

    def provider_at(self, phys: int) -> Provider | None:
        """The provider whose memory ``phys`` is, or None (RAM, or a BAR that is not provided)."""
        at = bisect.bisect_right(self.providers, phys, key=lambda one: one.start) - 1
        return self.providers[at] if at >= 0 and phys < self.providers[at].end else None
