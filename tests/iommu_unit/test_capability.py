"""Capability registers against what kernels printed about the same machines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dmakit.errors import MisuseError
from dmakit.iommu.capability import Capability
from dmakit.iommu.unit import IommuUnit
from dmakit.ledger import Ledger
from dmakit.memory.physical import PhysicalMemory

# QEMU's unit as Linux 7.2.12 printed it, and its variants by the option that makes them.
PLAIN = Capability.from_registers(0x80D2008C222F0606, 0xF00F4A)


def test_the_recorded_unit() -> None:
    assert (
        Capability(
            domains=65536,
            caching_mode=False,
            levels=(3, 4),
            address_bits=48,
            page_sizes=(4096, 2 << 20, 1 << 30),
            page_selective=True,
            max_mask=18,
            fault_records=1,
            drains=True,
            coherent_walker=False,
            queued=True,
            device_tlb=False,
            passthrough=True,
            snoop_control=False,
            second_stage=True,
            first_stage=False,
            dirty_tracking=False,
        )
        == PLAIN
    )


@pytest.mark.parametrize(
    "cap,ecap,change",
    [
        (0x80D2008C222F0686, 0xF00F4A, {"caching_mode": True}),
        (0x80D2008C22260206, 0xF00F4A, {"levels": (3,), "address_bits": 39}),
        (0x80D2008C222F0606, 0xF00FCA, {"snoop_control": True}),
        (0x80D2008C222F0006, 0xF00F4A, {"levels": ()}),
        (0x80D2008C222F0606, 0x480080F00F4A, {}),
    ],
    ids=["caching-mode", "aw-bits=39", "snoop-control", "dma-translation=off", "scalable-mode"],
)
def test_variants_differ_in_what_their_option_says(cap: int, ecap: int, change: dict[str, object]) -> None:
    assert Capability.from_registers(cap, ecap) == replace(PLAIN, **change)  # type: ignore[arg-type]


def test_a_unit_is_built_from_its_registers() -> None:
    unit = IommuUnit(PhysicalMemory(1 << 20), ledger=Ledger(1), **PLAIN.options())  # type: ignore[arg-type]
    assert (unit.max_mask, unit.caching_mode, unit.coherent_walker) == (18, False, False)
    assert (unit.walker.domains, unit.fault_log.capacity) == (65536, 1)
    with pytest.raises(MisuseError, match=r"^ecap=-0x1: a capability register has 64 bits$"):
        Capability.from_registers(0, -1)
