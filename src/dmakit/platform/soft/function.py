"""A PCI function in a slot of the software machine: what is between a driver and a ``Model`` of a device.

To the driver it is configuration space, BARs and eventfds (``interrupts.IrqSource``); to the model, memory and
interrupts. Between them it holds what the bus holds, whoever misbehaves:

* While memory decoding is off, or the function is pulled out (``present``), its BARs read all ones and take nothing.
* While bus mastering is off, or nobody has opened the function, no access to memory leaves it and no message: the model
  gets a FaultError (counted in ``blocked``), and the message is lost. The line works.
* Every access to memory goes through the device's translated port. A FaultError is the model's: one that it does not
  catch ends what it was doing, and the driver sees of it what it would see of a real device (a read: all ones).
* The line masks itself when it fires, and fires again when it is unmasked and still high, as VFIO has it.
* The MSI-X table is the host's: it reads all ones and takes nothing.

Source: PCI Local Bus 3.0 (command register), ``drivers/vfio/pci/vfio_pci_intrs.c``, ``vfio_pci_rdwr.c``.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from dmakit.errors import FaultError, MisuseError
from dmakit.platform.interrupts import KINDS
from dmakit.platform.soft.config import Config

if TYPE_CHECKING:
    from dmakit.memory.physical import Region
    from dmakit.platform.soft.machine import Machine
    from dmakit.platform.soft.model import Model

NOTICES = ("err", "req")


class Function:
    """The function at ``bdf`` of ``machine``, with ``model`` in it; made by ``Machine.plug``.

    ``present``: False pulls it out, as a hand does, without a word. ``port``: its way to memory while it is open.
    """

    def __init__(self, machine: Machine, bdf: str, model: Model) -> None:
        self.machine, self.bdf, self.model = machine, bdf, model
        self.identity = model.identity
        self.bars = self.identity.all_bars()
        self.present = True
        self.port: Any = None
        self.blocked = 0
        self._memories: dict[int, Region] = {}
        self._places = {index: self._place(index) for index in self.bars}
        self._eventfds: dict[str, list[int]] = {}
        self._line = self._masked = False
        self.config = Config(self.identity, self._places)
        model.plugged(self)
        self.reset()

    def __str__(self) -> str:
        return self.bdf

    def _place(self, index: int) -> int:
        bar = self.bars[index]
        if not bar.memory:
            return self.machine.take_window(bar.size)
        self._memories[index] = self.machine.add_bar(bar.size, f"{self.bdf} BAR {index}")
        return self._memories[index].start

    # The model's side ---------------------------------------------------------------------------------------

    def memory(self, bar: int) -> Region:
        """Where a memory BAR lies; MisuseError when the function has none there."""
        if bar not in self._memories:
            raise MisuseError(f"{self}: BAR {bar} is not memory")
        return self._memories[bar]

    def _mastering(self, what: str, iova: int, size: int) -> Any:
        if self.port is None or not self.present or not self.config.masters:
            self.blocked += 1
            raise FaultError(
                f"{self}: {what} of {size} bytes at {iova:#x}: bus mastering is off", iova=iova, write=what == "write"
            )
        return self.port

    def read(self, iova: int, size: int) -> bytes:
        """The device reads memory; FaultError when it may not."""
        data: bytes = self._mastering("read", iova, size).read(iova, size)
        return data

    def write(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        """The device writes memory; FaultError when it may not."""
        self._mastering("write", iova, len(data)).write(iova, data)

    def message(self, vector: int = 0) -> bool:
        """An MSI or MSI-X message. False when neither is on: the line is what is left."""
        kind = "msix" if "msix" in self._eventfds else "msi"
        if kind not in self._eventfds:
            return False
        if self.present and self.config.masters:
            self._add(kind, vector)
        return True

    def set_line(self, high: bool) -> None:
        """The INTx line."""
        self._line = high
        self._relevel()

    def _add(self, kind: str, vector: int) -> bool:
        """One more on a vector; False when nobody listens there."""
        fds = self._eventfds.get(kind, [])
        heard = 0 <= vector < len(fds)
        if heard:
            os.eventfd_write(fds[vector], 1)
        return heard

    def _relevel(self) -> None:
        self.config.show_line(self._line)
        if self._line and self.present and not self._masked and not self.config.line_disabled:
            self._masked = self._add("intx", 0)

    # The driver's side --------------------------------------------------------------------------------------

    def load(self, bar: int, offset: int, width: int) -> int:
        """A read of a BAR, aligned and inside it."""
        ones = (1 << 8 * width) - 1
        if not self.present or not self.config.decodes:
            return ones
        if bar in self._memories:
            return int.from_bytes(self.machine.memory.read(self._memories[bar].start + offset, width), "little")
        with contextlib.suppress(FaultError):
            return self.model.read(bar, offset, width) & ones if bar in self.identity.bars else ones
        return ones

    def store(self, bar: int, offset: int, value: int, width: int) -> None:
        """A write of a BAR, aligned and inside it."""
        if not self.present or not self.config.decodes:
            return
        if bar in self._memories:
            self.machine.memory.write(self._memories[bar].start + offset, value.to_bytes(width, "little"))
        elif bar in self.identity.bars:
            with contextlib.suppress(FaultError):
                self.model.write(bar, offset, value, width)

    def load_config(self, offset: int, width: int) -> int:
        """A read of configuration space."""
        return self.config.read(offset, width) if self.present else (1 << 8 * width) - 1

    def store_config(self, offset: int, value: int, width: int) -> None:
        """A write of configuration space."""
        if self.present:
            if self.config.write(offset, value, width):
                self.reset()
            self._relevel()

    def reset(self) -> None:
        """What an FLR does: the model is as after power-on, the line low. Configuration and interrupts stay."""
        with contextlib.suppress(FaultError):
            self._power_on()

    def _power_on(self) -> None:
        self.set_line(False)
        self.model.reset()

    def leave(self) -> None:
        """Nobody has it open any more: deaf, dumb, reset."""
        self.port = None
        self._eventfds = {}
        self.reset()
        self.config = Config(self.identity, self._places)
        self._masked = False

    # Interrupts ---------------------------------------------------------------------------------------------

    def count(self, kind: str) -> int:
        """``IrqSource``: what the identity says; a failure is told of a PCI Express function only."""
        there = {"intx": self.identity.line, "msi": self.identity.msi, "msix": self.identity.msix, "req": True}
        return int(there.get(kind, self.identity.express))

    def listen(self, kind: str, eventfds: list[int]) -> None:
        """``IrqSource``: one of the three kinds of interrupts at a time."""
        for other in KINDS if kind in KINDS else ():
            self.silence(other)
        self._eventfds[kind] = list(eventfds)
        self.config.show_enabled(kind, True)
        self._masked = False
        self._relevel()

    def silence(self, kind: str) -> None:
        """``IrqSource``: nobody listens."""
        self._eventfds.pop(kind, None)
        self.config.show_enabled(kind, False)

    def unmask(self, kind: str, vector: int) -> None:
        """``IrqSource``: the line fires again if it is high; vectors do not mask themselves."""
        del vector
        if kind == "intx":
            self._masked = False
            self._relevel()

    def notify(self, kind: str) -> bool:
        """Tell the owner that the machine wants the function back (``req``) or that it failed (``err``).

        False when nobody listens.
        """
        if kind not in NOTICES:
            raise MisuseError(f"kind={kind!r}: must be one of {', '.join(NOTICES)}")
        return self._add(kind, 0)
