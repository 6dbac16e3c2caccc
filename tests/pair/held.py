"""A program's machine and what it has live: what the operations of every room share."""

from __future__ import annotations

from array import array
from typing import Any

from dmakit.iommu.bitmap import Bitmap
from dmakit.iommu.unit import IommuUnit
from dmakit.iova.domain import IovaDomain
from dmakit.p2p.state import P2pState
from dmakit.p2p.topology import HostBridge, PciTopology, Platform
from dmakit.platform.soft import Machine

PAGE = 4096
PAGES = 64
BAR_BYTES = 1 << 20
CONFIGS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"mode": "strict"}, {}),
    ({"mode": "lazy", "policy": "augmented", "cpus": 2}, {}),
    ({"mode": "lazy", "iommu": "x86", "cpus": 4}, {}),
    ({"mode": "strict", "caching_mode": True, "coherent_walker": False}, {}),
    ({"mode": "lazy", "checker": True}, {"trusted": False, "min_align_mask": 4095}),
    ({"mode": "strict", "coherent": False, "cpus": 2}, {}),
    ({"iommu": "none"}, {"mask": (1 << 24) - 1}),
    ({"mode": "passthrough", "force_bounce": True, "cpus": 3}, {}),
    ({"mode": "lazy"}, {"coherent": False}),
    ({"mode": "lazy", "cpus": 3, "fragmentation": 0.7}, {"p2p": "near"}),
    ({"mode": "strict", "cpus": 2, "levels": 5}, {"p2p": "far", "max_segment": 1 << 16}),
)
PLATFORMS = (Platform("intel", 6), Platform("amd", 0x17))


class Held:
    """One program's machine, device, memory, and lists of what is live (each operation's own are in its class)."""

    def __init__(self, config: int) -> None:
        machine, device = CONFIGS[config % len(CONFIGS)]
        self.machine = Machine(**{"ram": "64M", "swiotlb": "1M", **machine})
        self.cpus: int = self.machine.cpus
        self.events: list[Any] = []
        self.bar: int = self.machine.add_bar(BAR_BYTES).start
        self.peers = self._peers()
        peer = {"p2p": self.peers[device["p2p"] == "far"]} if "p2p" in device else {}
        self.device = self.machine.device("dev0", **{**device, **peer})
        self.machine.record_events(self.events)
        self.base: int = self.machine.buffer(PAGES * PAGE, order=6 if config % len(CONFIGS) != 9 else None).ranges[0][0]
        self.machine.memory.write(self.base, bytes(range(256)) * (PAGES * PAGE // 256))
        self.iovad = IovaDomain(cpus=2, policy="augmented" if config & 1 else "linux")
        self.singles: list[tuple[int, int, int]] = []
        self.ranges: list[tuple[int, int]] = []
        self.bitmap = Bitmap(256)
        self.set_up(config)

    def set_up(self, config: int) -> None:
        """What the operations of a room need of their own; each class calls the next one's."""

    def _peers(self) -> list[P2pState]:
        """Memos of a client below the provider's switch and of one below another port, on two platforms."""
        found = []
        for platform in PLATFORMS:
            host = HostBridge("pci0")
            ports = host.root_port("rp0").switch("sw", 2)
            drive, near = ports[0].endpoint("drive"), ports[1].endpoint("near")
            topology = PciTopology(self.machine.memory, platform)
            topology.provide(drive, self.bar, BAR_BYTES // 2, bus_offset=-(1 << 20))
            far = host.root_port("rp1").endpoint("far")
            found += [P2pState(topology, client, self.machine.ledger) for client in (near, far, None)]
        return [found[0], found[4], found[1], found[2]]

    @property
    def unit(self) -> IommuUnit:
        """The IOMMU; a program for a machine without one is told so as by any other wrong call."""
        if self.machine.unit is None:
            raise ValueError("no IOMMU")
        return self.machine.unit

    def cpu(self, number: int) -> int:
        """A CPU: mostly one that is there, for the drawn edges themselves."""
        return number if number < 0 or number > 1 << 30 else number // 3 % self.cpus

    def piece(self, at: int, size: int) -> tuple[int, int]:
        """Memory: mostly inside the buffer, sometimes a device's, sometimes far from any."""
        if at < 0 or at >= 1 << 32 or size < 0 or size >= 1 << 32:
            return at, size
        start = self.bar if at % 13 == 12 else self.base
        return start + at % (PAGES * PAGE // 2), size % (8 * PAGE + 1)

    def pieces(self, at: int, count: int, step: int) -> tuple[array[int], array[int]]:
        """Whole pages of the buffer, as two arrays."""
        many = count % 9
        places = [self.base + (at + i * (1 + step % 3)) % PAGES * PAGE for i in range(many)]
        if at % 17 == 16 and places:
            places[many // 2] = self.bar + at % 64 * PAGE
        return array("Q", places), array("Q", [PAGE] * many)

    @staticmethod
    def pick(items: list[Any], at: int) -> Any:
        """One of what is live (and out of the list), or None."""
        return items.pop(at % len(items)) if items else None
