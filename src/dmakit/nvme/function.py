"""The controller model as a PCI function of the software machine: what a driver finds behind VFIO, without VFIO.

``machine.plug(NvmeFunction(), "0000:00:04.0")``, then ``Controller.open("0000:00:04.0", machine=machine)``: the driver
goes through configuration space, BAR 0, MSI-X eventfds, bus mastering and function reset, as it does with a real
controller (``nvme.vfio``). ``Controller.open("soft")`` is the other way in: the model without a bus, in virtual time.

BAR 0 are the properties and doorbells, BAR 2 the controller memory buffer where there is one, BAR 4 the MSI-X table.
The controller works when a doorbell rings (``auto``), or when somebody calls ``controller.run()``. It has no INTx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from dmakit.nvme.busmaster import CMB_BAR, MemoryBuffer
from dmakit.nvme.model import ControllerModel
from dmakit.nvme.namespace import Namespace
from dmakit.nvme.spec import Reg
from dmakit.platform.soft.function import Function
from dmakit.platform.soft.model import Bar, Identity, Model

BLOCKS = 8192
REGISTERS = 0
_SMALLEST_BAR = 0x4000


class NvmeFunction(Model):
    """A controller with ``queues`` I/O queue pairs and as many vectors and one; ``buffer``: bytes of memory in BAR 2.

    ``namespaces``: one of 4 MiB unless given; ``build``: makes the model, which gets ``options``. ``controller`` is the
    model, once the function is plugged in.
    """

    controller: ControllerModel

    def __init__(
        self,
        namespaces: Iterable[Namespace] | None = None,
        *,
        queues: int = 8,
        buffer: int = 0,
        auto: bool = True,
        build: Callable[..., ControllerModel] = ControllerModel,
        **options: Any,
    ) -> None:
        self.namespaces = [Namespace(1, BLOCKS)] if namespaces is None else list(namespaces)
        self.queues, self.auto, self.build, self.options = queues, auto, build, options
        size = max(_SMALLEST_BAR, 1 << (Reg.DOORBELLS + 8 * (queues + 1) - 1).bit_length())
        bars = {REGISTERS: Bar(size)} | ({CMB_BAR: Bar(buffer, memory=True)} if buffer else {})
        self.identity = Identity(
            0x1B36, 0x0010, 0x010802, 2, (0x1AF4, 0x1100), bars, line=False, msix=queues + 1, express=True
        )

    def plugged(self, function: Function) -> None:
        """The controller is made: its port is the function."""
        super().plugged(function)
        buffer = None
        if CMB_BAR in self.identity.bars:
            region = function.memory(CMB_BAR)
            buffer = MemoryBuffer(function.machine.memory, region.start, region.size)
        self.controller = self.build(function, self.namespaces, queues=self.queues, buffer=buffer, **self.options)
        self.controller.on_interrupt = self._interrupt

    def _interrupt(self, vector: int) -> None:
        self.function.message(vector)

    def reset(self) -> None:
        """A controller level reset that clears every property, as a function level reset is."""
        self.controller.reset()
        self.controller.write32(Reg.AQA, 0)
        for register in (Reg.ASQ, Reg.ACQ, Reg.CMBMSC):
            self.controller.write64(register, 0)

    def read(self, bar: int, offset: int, width: int) -> int:
        """A property; 8 and 16 bits are cut out of one."""
        if width == 8:
            return self.controller.read64(offset)
        return self.controller.read32(offset & ~3) >> 8 * (offset & 3)

    def write(self, bar: int, offset: int, value: int, width: int) -> None:
        """A property or a doorbell; writes of 8 and 16 bits are not taken."""
        if width == 4:
            self.controller.write32(offset, value)
        elif width == 8:
            self.controller.write64(offset, value)
        if self.auto and offset >= Reg.DOORBELLS:
            self.controller.run()
