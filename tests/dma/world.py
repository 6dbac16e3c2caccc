"""A machine, a device and a ledger to look at, on the platform of the test, for the tests of dma/."""

from __future__ import annotations

from typing import Any

from dmakit.dma.device import Device
from dmakit.ledger import difference
from tests.support.gates import UNOBSERVED, gate
from tests.support.platforms import IN_GUEST, Platform

PAGE = 4096

here: Platform = Platform("soft")
unobserved: set[str] = set()  # rows that the test asked for in vain


def world(machine: dict[str, Any] | None = None, **device: Any) -> tuple[Any, Device]:
    """A small strict machine and one device on it; it ends with the test, or with the next world."""
    return here.world(machine or {}, device)


def platform_here() -> Platform:
    """The platform of the test."""
    return here


def examples(count: int) -> int:
    """How many examples Hypothesis tries: a world of the test VM takes its time."""
    return max(3, count // 20) if IN_GUEST else count


def another(**device: Any) -> Device:
    """A second device of the machine."""
    return here.another(**device)


class Spent(dict[str, Any]):
    """What a block cost, by row; a row that this platform cannot observe compares with anything."""

    def __getitem__(self, row: str) -> Any:
        if super().__getitem__(row) is UNOBSERVED:
            unobserved.add(row)
        return super().__getitem__(row)


class Counted:
    """``with Counted(machine) as spent:`` then ``spent["pte_set_1"]`` is what the block cost."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine

    def __enter__(self) -> dict[str, Any]:
        self.before = self.machine.ledger.snapshot()
        self.spent = Spent()
        return self.spent

    def __exit__(self, *_: object) -> None:
        self.spent.update(difference(self.machine.ledger.snapshot(), self.before))
        self.spent.update({row: UNOBSERVED for row, count in self.machine.snapshot().items() if count is None})


def pte_writes(spent: dict[str, Any]) -> Any:
    """Leaf entries written at level 1."""
    return spent["pte_set_1"]


def invalidations(spent: dict[str, Any]) -> Any:
    """Requests of every kind."""
    return spent["inv_page"] + spent["inv_domain"] + spent["inv_global"]


def leaves(device: Device, iova: int, size: int) -> list[Any]:
    """What the device's tables hold in [iova, iova + size): leaves, or a host domain's (iova, phys, size)."""
    domain: Any = device.domain
    if domain.table is not None:
        return list(domain.table.leaves(iova, size))
    return [entry for entry in domain.held() if iova < entry[0] + entry[2] and entry[0] < iova + size]


def held(machine: Any) -> dict[str, Any]:
    """What is in use, without what may stay for the next mapping: table pages, and memory that staging keeps pinned."""
    return {name: count for name, count in machine.live().items() if name not in ("table_pages", "pinned_bytes")}


def table_pages(machine: Any) -> int:
    """Pages that the machine's tables have taken; 0 where they are the host's."""
    return machine.table_pages.allocated_pages if hasattr(machine, "table_pages") else 0


def pattern(size: int, salt: int = 0) -> bytes:
    """Bytes that differ from page to page."""
    return bytes((i * 7 + (i >> 8) * 13 + salt) & 0xFF for i in range(size))


def needs_made_up_bars(machine: Any) -> None:
    """Gated where a BAR is a device's and cannot be made up (peers: tests/linux and the test VM have real ones)."""
    if not hasattr(machine, "add_bar"):
        gate("add_bar: a BAR comes with its device")


def needs_unmap_by_the_page(device: Device) -> None:
    """Gated where the domain unmaps only what was mapped as one."""
    domain: Any = device.domain
    if (unit := domain.capabilities.unmap_unit) != "granule":
        gate(f"unmap_unit={unit!r}: a part of a piece cannot be unlinked")


def needs_tables(device: Device) -> None:
    """Gated where the tables belong to the host's kernel."""
    if device.domain.table is None:
        gate("table: the page tables are the host's kernel's")
