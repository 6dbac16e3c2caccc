"""A request's memo over the peer-to-peer decision: one look-up for a run of pages of the same provider.

Models ``struct pci_p2pdma_map_state`` and ``pci_p2pdma_state`` of ``drivers/pci/p2pdma.c``. While addresses stay in the
memory of the provider that was asked about last, the answer costs two compares; ordinary memory between them leaves
the memo alone. It is made anew (or ``reset``) for each request. ``lookups`` and the ledger count the questions that
the memo did not answer: the number of provider changes.
"""

from __future__ import annotations

import cython

from dmakit.errors import MisuseError
from dmakit.p2p.decision import MapType, map_type
from dmakit.p2p.topology import PciDevice, PciTopology

if not cython.compiled:
    from dmakit.consts import L_P2P_LOOKUPS, P2P_MAP_NONE
    from dmakit.ledger import Ledger


@cython.final
@cython.cclass
class P2pState:
    """A request's memo of the last provider (``struct pci_p2pdma_map_state``) for one client device."""

    def __init__(self, topology: PciTopology, client: PciDevice | None, ledger: Ledger) -> None:
        self.topology = topology
        self.client = client
        self.ledger = ledger
        self.lookups = 0
        self.map, self.bus_offset = P2P_MAP_NONE, 0
        self.start = self.end = 0

    def reset(self) -> None:
        """Forget the last provider: a new request begins."""
        self._reset()

    def _reset(self) -> cython.void:
        """``reset``: the empty range makes the next page ask again."""
        self.start = self.end = 0

    def _map_type(self, phys: cython.ulonglong) -> cython.int:
        """P2P_MAP_* for the page at ``phys``; afterwards ``bus_offset`` belongs to its provider."""
        if self.start <= phys < self.end:
            return self.map
        with cython.gil:
            return self._look_up(phys)

    def _look_up(self, phys: cython.ulonglong) -> cython.int:
        """Ask for the provider of ``phys``; ordinary memory leaves the memo alone."""
        if not self.topology.low <= phys < self.topology.high:
            return P2P_MAP_NONE
        provider = self.topology.provider_at(phys)
        if provider is None:
            return P2P_MAP_NONE
        self.lookups += 1
        self.ledger.counts[L_P2P_LOOKUPS] += 1
        self.start, self.end = provider.start, provider.end
        self.bus_offset = provider.bus_offset
        self.map = int(map_type(self.topology, provider, self.client))
        return self.map

    def map_type(self, phys: int) -> MapType:
        """The map type for the page at ``phys`` (NONE for ordinary memory)."""
        if phys < 0 or phys >> 64:
            raise MisuseError(f"phys={phys:#x}: must be a 64-bit address")
        return MapType(self._map_type(phys))

    def bus_address(self, phys: int) -> int:
        """The bus address of ``phys``, which must be memory of the provider asked about last."""
        return phys + self.bus_offset
