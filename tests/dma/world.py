"""A machine, a device and a ledger to look at, for the tests of dma/."""

from __future__ import annotations

from typing import Any

from dmakit.dma.device import Device
from dmakit.ledger import difference
from dmakit.platform.soft import Machine

PAGE = 4096


def world(machine: dict[str, Any] | None = None, **device: Any) -> tuple[Machine, Device]:
    """A small strict machine and one device on it."""
    options: dict[str, Any] = {"mode": "strict", "ram": "64M", "swiotlb": "1M", **(machine or {})}
    made = Machine(**options)
    return made, made.device("dev0", **device)


class Counted:
    """``with Counted(machine) as spent:`` then ``spent["pte_set_1"]`` is what the block cost."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def __enter__(self) -> dict[str, int]:
        self.before = self.machine.ledger.snapshot()
        self.spent: dict[str, int] = {}
        return self.spent

    def __exit__(self, *_: object) -> None:
        self.spent.update(difference(self.machine.ledger.snapshot(), self.before))


def pte_writes(spent: dict[str, int]) -> int:
    """Leaf entries written at level 1."""
    return spent["pte_set_1"]


def invalidations(spent: dict[str, int]) -> int:
    """Requests of every kind."""
    return spent["inv_page"] + spent["inv_domain"] + spent["inv_global"]


def pattern(size: int, salt: int = 0) -> bytes:
    """Bytes that differ from page to page."""
    return bytes((i * 7 + (i >> 8) * 13 + salt) & 0xFF for i in range(size))
