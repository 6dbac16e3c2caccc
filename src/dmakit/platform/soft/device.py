"""A software function in our hands: ``PciFunction`` as ``vfio.Device`` is one, registers to interrupts.

``Device.open(model)`` makes a machine, plugs the model in and takes it; ``Machine.open(bdf)`` takes what is plugged in.
What differs from a real device: a register is a call of the model, so what it does is done when the access returns.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from dmakit.platform.eventfds import Eventfds
from dmakit.platform.function import PciFunction
from dmakit.platform.pci import PciDevice
from dmakit.platform.registers import CODES, ConfigRegisters, Registers

if TYPE_CHECKING:
    from dmakit.platform.soft.function import Function
    from dmakit.platform.soft.machine import Machine
    from dmakit.platform.soft.model import Model

CONFIG_REGION, REGIONS = 7, 9  # as vfio-pci numbers them


class Region(Registers):
    """A BAR; ``size`` 0 where the function has none."""

    def __init__(self, function: Function, index: int, owner: Any) -> None:
        bar = function.bars.get(index)
        super().__init__(index, bar.size if bar is not None else 0, owner)
        self.function = function
        if bar is not None and bar.memory:
            self.memory = function.memory(index)

    @property
    def areas(self) -> list[tuple[int, int]]:
        """The parts (offset, size) that can be mapped: all of memory, none of registers."""
        return [] if self.memory is None else [(0, self.size)]

    def words(self, width: int = 4) -> memoryview:
        """Memory as an array of ``width``-byte registers; UnsupportedError where an access is a call of the model."""
        if self.memory is None or width not in CODES:
            return super().words(width)
        view = self.function.machine.memory.view[self.memory.start : self.memory.start + self.size]
        return view.cast("B").cast(CODES[width])

    def _load(self, offset: int, width: int) -> int:
        return self.function.load(self.index, offset, width)

    def _store(self, offset: int, value: int, width: int) -> None:
        self.function.store(self.index, offset, value, width)


class ConfigSpace(ConfigRegisters):
    """Configuration space."""

    def __init__(self, function: Function, owner: Any) -> None:
        super().__init__(CONFIG_REGION, function.config.size, owner)
        self.function = function

    def _load(self, offset: int, width: int) -> int:
        return self.function.load_config(offset, width)

    def _store(self, offset: int, value: int, width: int) -> None:
        self.function.store_config(offset, value, width)


class Device(PciFunction):
    """A function that we opened; made by ``open`` (or ``Machine.open``), a context manager."""

    regions: dict[int, Registers]

    def __init__(self, machine: Machine, function: Function, owns_machine: bool) -> None:
        who = function.identity
        info = PciDevice(function.bdf, who.vendor, who.device, who.class_code, "soft", None, "")
        super().__init__(machine, info, Eventfds(machine.fail), function, owns_machine)
        self.function = function
        self.config = ConfigSpace(function, self)
        self.dma = None

    @staticmethod
    def open(
        model: Model, *, machine: Machine | None = None, bdf: str = "", ram: int | str = "64M", **options: Any
    ) -> Device:
        """Plug ``model`` in (at ``bdf``, or the next free slot) and take it; on a machine of its own unless given one.

        ``options``: those of ``dma.device.Device`` (mask, trusted, max_segment …). A machine of its own has ``ram``, no
        bounce memory, and is strict, as VFIO is.
        """
        from dmakit.platform.soft.machine import Machine

        own = machine is None
        home = Machine(ram=ram, swiotlb=0, mode="strict") if machine is None else machine
        with contextlib.ExitStack() as undo:
            if own:
                undo.callback(home.close)
            function = home.plug(model, bdf)
            undo.callback(home.functions.pop, function.bdf)
            made = home.open(function.bdf, owns_machine=own, **options)
            undo.pop_all()
        return made

    def __repr__(self) -> str:
        return f"<soft device {self.bdf}, {self.info.vendor:04x}:{self.info.device:04x}>"

    @property
    def region_count(self) -> int:
        """As vfio-pci has."""
        return REGIONS

    def _region(self, index: int) -> Registers:
        return self.config if index == CONFIG_REGION else Region(self.function, index, self)

    def reset(self) -> None:
        """Reset the function, as an FLR does; a software function always can be."""
        self._held()
        self.function.reset()

    def _let_go(self) -> None:
        self.regions = {}
