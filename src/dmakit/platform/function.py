"""``PciFunction``: one PCI function in our hands, whatever drives it: registers, memory it may reach, interrupts.

``config`` is its configuration space, ``bar(n)`` its registers, ``dma`` its mappings (a ``dma.Device``),
``interrupts(…)`` its vectors. Nothing is reachable for it until it is mapped, and it masters the bus only when told
(``set_bus_master``). What is common is here; ``linux.device.Device`` takes a real function through VFIO,
``soft.device.Device`` one of the software machine, and a driver cannot tell them apart.

Whoever runs the machine may want the function back, or report that it failed: ``wanted_back``, ``failed`` and ``check``
tell, ``notices.descriptors()`` are for event loops. Nothing is taken away until the function is closed.

Closing keeps an order: bus mastering off, interrupts off, registers let go, function given back (which resets it), and
only then the memory that it could reach.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Self

from dmakit.errors import DmakitError, MisuseError, UnsupportedError
from dmakit.memory.buffers import Buffer
from dmakit.platform.interrupts import KINDS, Interrupts, IrqSource
from dmakit.platform.notices import Notices
from dmakit.platform.registers import ConfigRegisters, Registers

if TYPE_CHECKING:
    from types import TracebackType

    from dmakit.platform.eventfds import Eventfds
    from dmakit.platform.pci import PciDevice


class PciFunction(ABC):
    """An open function, a context manager; ``irqs`` adds to eventfds.

    Whoever makes one sets ``config`` and ``dma``; ``regions`` are those that were asked for.
    """

    config: ConfigRegisters
    dma: Any

    def __init__(self, machine: Any, info: PciDevice, eventfds: Eventfds, irqs: IrqSource, owns_machine: bool) -> None:
        self.machine, self.info, self.eventfds, self.irqs = machine, info, eventfds, irqs
        self.owns_machine = owns_machine
        self.bdf = info.bdf
        self.regions: dict[int, Any] = {}
        self.closed = self.given_back = False
        self.notices = Notices(eventfds, self.bdf)
        self._interrupts: Interrupts | None = None

    def __str__(self) -> str:
        return self.bdf

    def _held(self) -> None:
        """MisuseError when it was given back: its slot, and the number of its file, may be somebody else's by now."""
        if self.given_back:
            raise MisuseError(f"{self} is closed")

    # Registers ------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def region_count(self) -> int:
        """How many regions there are: BARs 0 to 5, ROM, configuration space, …"""

    @abstractmethod
    def _region(self, index: int) -> Registers:
        """A region that was not asked for before."""

    def region(self, index: int) -> Registers:
        """Region ``index`` (0 to 5 = BARs, 6 = ROM, 7 = configuration), mapped where that can be."""
        self._held()
        if index not in self.regions:
            if not 0 <= index < self.region_count:
                raise MisuseError(f"region {index}: {self} has regions 0 to {self.region_count - 1}")
            self.regions[index] = self._region(index)
        found: Registers = self.regions[index]
        return found

    def bar(self, index: int) -> Registers:
        """BAR ``index``; UnsupportedError when the device has none there."""
        found = self.region(index)
        if index > 5 or found.size == 0:
            raise UnsupportedError(f"{self} has no BAR {index}")
        return found

    def set_bus_master(self, on: bool) -> None:
        """Let the device read and write what is mapped for it, or stop it."""
        self.config.set_bus_master(on)

    @abstractmethod
    def reset(self) -> None:
        """Reset the function: it stops, and forgets what its registers held; UnsupportedError when it cannot be.

        Configuration space and interrupts stay as their owner set them.
        """

    # Interrupts -----------------------------------------------------------------------------------------------

    def interrupt_counts(self) -> dict[str, int]:
        """How many vectors of each kind the device has."""
        self._held()
        return {kind: self.irqs.count(kind) for kind in KINDS}

    def interrupts(self, count: int = 1, kind: str = "") -> Interrupts:
        """Switch on ``count`` vectors of ``kind`` (default: the best that has so many: msix, msi, intx)."""
        self._held()
        if self._interrupts is not None:
            self._interrupts.close()
        if not kind:
            counts = self.interrupt_counts()
            kind = next((name for name in ("msix", "msi", "intx") if counts[name] >= count), "msix")
        self._interrupts = Interrupts(self.eventfds, self.irqs, kind, count, self.notices)
        return self._interrupts

    # What the host says ---------------------------------------------------------------------------------------

    @property
    def wanted_back(self) -> bool:
        """Whether the host waits for this device to be closed: it is being unbound, removed or unplugged."""
        return "req" in self.notices.listen()

    @property
    def failed(self) -> bool:
        """Whether the host has reported a fatal error of the device (AER): nothing that it says counts any more."""
        return "err" in self.notices.listen()

    def check(self) -> None:
        """HostError when the device is ``wanted_back`` (ENODEV) or has ``failed`` (EIO): time to leave its block."""
        if (error := self.notices.error()) is not None:
            raise error

    # Memory ---------------------------------------------------------------------------------------------------

    def buffer(self, size: int | str, **options: Any) -> Buffer:
        """Memory of the machine (``Machine.buffer``); map it with ``dma``."""
        made: Buffer = self.machine.buffer(size, **options)
        return made

    # Beginning and end ----------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """A defined state for a function just taken: reset, deaf to the bus, answering at its BARs."""
        with contextlib.suppress(UnsupportedError):
            self.reset()
        self.set_bus_master(False)
        self.config.set_memory(True)

    def leftovers(self) -> None:
        """MisuseError naming what is still mapped, when something is."""
        if self.dma is not None:
            self.dma.release()

    def close(self) -> None:
        """Give the device back; a second call does nothing. Its mappings go with it."""
        if self.closed:
            return
        self.closed = True
        with contextlib.suppress(DmakitError):
            self.set_bus_master(False)
        if self._interrupts is not None:
            self._interrupts.close()
        self._let_go()
        self.machine.give_back(self)
        self.given_back = True
        self.notices.close()
        if self.owns_machine:
            self.machine.close()

    @abstractmethod
    def _let_go(self) -> None:
        """Its registers are not used any more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.leftovers()
        finally:
            self.close()
