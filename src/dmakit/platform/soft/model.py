"""What a device of the software machine is made of: who it is, and a ``Model`` of what it does.

A model answers at its registers and acts through its ``function`` (the slot it is plugged into): ``function.read`` and
``function.write`` are its accesses to memory, ``function.message`` and ``function.set_line`` its interrupts. It acts in
the access that asks for it: there is no time between a doorbell and the answer unless the model makes some.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dmakit.errors import MisuseError

if TYPE_CHECKING:
    from dmakit.platform.soft.function import Function

MSIX_ENTRY = 16
_SMALLEST_BAR = 4096  # a page: two functions never share one


@dataclass(frozen=True)
class Bar:
    """``size`` bytes (a power of two, a page or more) of registers or, with ``memory``, of the device's own memory.

    Registers are a 32-bit BAR whose accesses go to the model. Memory is a 64-bit prefetchable one: it can be mapped,
    has a physical address, and peers reach it.
    """

    size: int
    memory: bool = False

    def __post_init__(self) -> None:
        if self.size < _SMALLEST_BAR or self.size & (self.size - 1):
            raise MisuseError(f"BAR of {self.size} bytes: must be a power of two, {_SMALLEST_BAR} or more")


@dataclass(frozen=True)
class Identity:
    """What configuration space says of a function: ids, ``class_code`` (24 bits), BARs by number, its interrupts.

    ``line``: it has an INTx pin; ``msi``: vectors, a power of two up to 32; ``msix``: vectors, up to 2048, with their
    table in BAR ``msix_bar``, which then is not the model's; ``express``: a PCI Express function (with FLR).
    """

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem: tuple[int, int] = (0, 0)
    bars: Mapping[int, Bar] = field(default_factory=dict)
    line: bool = True
    msi: int = 0
    msix: int = 0
    msix_bar: int = 4
    express: bool = False

    def __post_init__(self) -> None:
        for name, value, bits in (
            ("vendor", self.vendor, 16), ("device", self.device, 16), ("class_code", self.class_code, 24),
            ("revision", self.revision, 8), *(("subsystem", part, 16) for part in self.subsystem),
        ):  # fmt: skip
            if not 0 <= value < 1 << bits:
                raise MisuseError(f"{name}={value:#x}: must fit into {bits} bits")
        if self.msi and (self.msi > 32 or self.msi & (self.msi - 1)) or not 0 <= self.msix <= 2048:
            raise MisuseError(f"msi={self.msi}, msix={self.msix}: a power of two up to 32, and up to 2048")
        slots = [at for index, bar in self.all_bars().items() for at in range(index, index + 1 + bar.memory)]
        if len(set(slots)) != len(slots) or any(not 0 <= slot <= 5 for slot in slots):
            raise MisuseError(f"BARs {slots}: must be different, 0 to 5 (memory takes two)")

    @property
    def msix_table(self) -> int:
        """Bytes of the MSI-X table, in pages: the pending bits come after it."""
        return -(-self.msix * MSIX_ENTRY // _SMALLEST_BAR) * _SMALLEST_BAR

    def all_bars(self) -> dict[int, Bar]:
        """The model's BARs and the one of the MSI-X table."""
        bars = dict(self.bars)
        if self.msix:
            if self.msix_bar in bars:
                raise MisuseError(f"msix_bar={self.msix_bar}: is a BAR of the model")
            bars[self.msix_bar] = Bar(1 << (self.msix_table + _SMALLEST_BAR - 1).bit_length())
        return bars


class Model:
    """A device's inside: an ``identity``, and what it answers at its BARs. ``function`` is where it is plugged."""

    identity: Identity
    function: Function

    def plugged(self, function: Function) -> None:
        """Put into a slot: ``function.memory(n)`` and the machine are there now."""
        self.function = function

    def read(self, bar: int, offset: int, width: int) -> int:
        """A read of ``width`` (1, 2, 4, 8) bytes at an aligned offset of a register BAR; all ones where nothing is."""
        del bar, offset
        return (1 << 8 * width) - 1

    def write(self, bar: int, offset: int, value: int, width: int) -> None:
        """A write there; what a device does not know it ignores."""

    def reset(self) -> None:
        """Be as after power-on. Called at first when it is plugged; the line is low already."""
