"""What a VT-d unit says about itself: its capability and extended capability registers, decoded.

``Capability.from_registers`` reads the two words that Linux prints at boot ("DMAR: dmar0: … cap … ecap …") or that
debugfs shows, and ``options`` turns them into the options of an ``IommuUnit``, so that a machine can be built like a
recorded one. Bit positions: VT-d specification 11.4.2 and 11.4.3; ``drivers/iommu/intel/iommu.h``.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmakit.errors import MisuseError

_MAX_DOMAINS = 65536


@dataclass(frozen=True, slots=True)
class Capability:
    """Decoded registers. ``levels``: second-stage table heights; ``page_sizes``: second-stage leaf sizes (bytes)."""

    domains: int
    caching_mode: bool
    levels: tuple[int, ...]
    address_bits: int
    page_sizes: tuple[int, ...]
    page_selective: bool
    max_mask: int
    fault_records: int
    drains: bool
    coherent_walker: bool
    queued: bool
    device_tlb: bool
    passthrough: bool
    snoop_control: bool
    second_stage: bool
    first_stage: bool
    dirty_tracking: bool

    @classmethod
    def from_registers(cls, cap: int, ecap: int) -> Capability:
        """Decode CAP and ECAP; MisuseError for a word of more than 64 bits."""
        for name, word in (("cap", cap), ("ecap", ecap)):
            if not 0 <= word < 1 << 64:
                raise MisuseError(f"{name}={word:#x}: a capability register has 64 bits")
        return cls(
            domains=1 << (4 + 2 * (cap & 7)),
            caching_mode=bool(cap >> 7 & 1),
            levels=tuple(level for bit, level in ((1, 3), (2, 4), (3, 5)) if cap >> 8 >> bit & 1),
            address_bits=(cap >> 16 & 63) + 1,
            page_sizes=(4096, *(size for bit, size in ((0, 1 << 21), (1, 1 << 30)) if cap >> 34 >> bit & 1)),
            page_selective=bool(cap >> 39 & 1),
            max_mask=cap >> 48 & 63,
            fault_records=(cap >> 40 & 255) + 1,
            drains=cap >> 54 & 3 == 3,
            coherent_walker=bool(ecap & 1),
            queued=bool(ecap >> 1 & 1),
            device_tlb=bool(ecap >> 2 & 1),
            passthrough=bool(ecap >> 6 & 1),
            snoop_control=bool(ecap >> 7 & 1),
            second_stage=bool(ecap >> 46 & 1) or not ecap >> 43 & 1,
            first_stage=bool(ecap >> 47 & 1),
            dirty_tracking=bool(ecap >> 45 & 1),
        )

    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of ``IommuUnit`` for a unit like this one."""
        return {
            "caching_mode": self.caching_mode,
            "coherent_walker": self.coherent_walker,
            "max_mask": self.max_mask,
            "domains": min(self.domains, _MAX_DOMAINS),
            "fault_entries": self.fault_records,
        }
