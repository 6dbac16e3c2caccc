"""Devices of the fake host: a general one, and the software machine's models, ``edu`` and NVMe, behind VFIO.

A device reaches memory through the address space that it is attached to and only while it masters the bus; what is
blocked raises FaultError in the model and is noted in ``faults``, as hardware would log it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from dmakit.errors import FaultError
from dmakit.nvme.function import NvmeFunction
from dmakit.nvme.model import ControllerModel
from dmakit.nvme.namespace import Namespace
from dmakit.platform.soft.config import Config
from dmakit.platform.soft.edu import Edu
from tests.support.vfio.pages import PAGE, Space

COMMAND = 4


class FakeRegion:
    """A region: registers (``read``/``write`` by offset and width) or, with ``mapped``, plain memory to map."""

    def __init__(
        self,
        size: int,
        read: Callable[[int, int], int] | None = None,
        write: Callable[[int, int, int], None] | None = None,
        *,
        mapped: bool = False,
        areas: Iterable[tuple[int, int]] = (),
    ) -> None:
        self.size, self.areas = size, list(areas)
        self.fd = -1
        self.va = 0
        self.bytes: bytearray | mmap.mmap = bytearray(size)
        if mapped:
            self.fd = os.memfd_create("bar")
            os.ftruncate(self.fd, max(size, PAGE))
            self.bytes = mmap.mmap(self.fd, max(size, PAGE))
            self.va = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))
        self.read = read or (lambda offset, width: int.from_bytes(self.bytes[offset : offset + width], "little"))
        self.write = write or self._store

    def _store(self, offset: int, value: int, width: int) -> None:
        self.bytes[offset : offset + width] = value.to_bytes(width, "little")


class FakeDevice:
    """A PCI function. ``regions``: by VFIO index; ``vectors``: interrupt index to count.

    ``express``: a PCI Express function, which has an error interrupt (index 3); all have the request (4)."""

    def __init__(
        self, bdf: str, group: int, *, ids: tuple[int, int] = (0x1234, 0x5678), class_code: int = 0xFF0000,
        driver: str = "vfio-pci", vectors: dict[int, int] | None = None, resets: bool = True,
        express: bool = False,
    ) -> None:  # fmt: skip
        self.bdf, self.group, self.ids, self.class_code, self.driver = bdf, group, ids, class_code, driver
        self.resets = resets
        self.vectors = ({0: 1, 1: 4} if vectors is None else vectors) | {4: 1} | ({3: 1} if express else {})
        self.regions: dict[int, FakeRegion] = {7: FakeRegion(4096)}
        self.eventfds: dict[int, dict[int, int]] = {}
        self.level = self.masked = self.opened = False
        self.space: Space | None = None
        self.faults: list[str] = []
        self.resets_seen = 0
        self.resource = "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
        self._configure()

    def _configure(self) -> None:
        config = self.regions[7].bytes
        config[0:8] = struct.pack("=HHHH", *self.ids, 0, 0x10)
        config[8:12] = struct.pack("=I", self.class_code << 8)
        config[0x34] = 0x40
        config[0x40:0x44] = bytes((1, 0x50, 0, 0))
        config[0x50:0x54] = bytes((5, 0, 0, 0))
        config[0x100:0x104] = struct.pack("=I", 0x1 | 1 << 16 | 0x140 << 20)
        config[0x140:0x144] = struct.pack("=I", 0xD | 1 << 16)

    # what the host does

    def enable(self) -> None:
        self.regions[7].bytes[COMMAND] &= ~4 & 0xFF

    def disable(self) -> None:
        for index in list(self.eventfds):
            self.deafen(index)
        self.enable()
        self.reset()

    def deafen(self, index: int) -> None:
        """Nobody listens to interrupts of this kind any more."""
        for fd in self.eventfds.pop(index, {}).values():
            os.close(fd)

    def notify(self, index: int) -> bool:
        """The kernel's own interrupts: 3 = an error, 4 = the request to give the device back. False: nobody listens."""
        fd = self.eventfds.get(index, {}).get(0, -1)
        if fd >= 0:
            os.eventfd_write(fd, 1)
        return fd >= 0

    def reset(self) -> None:
        self.resets_seen += 1
        self.level = False

    # what the device does

    @property
    def master(self) -> bool:
        return bool(self.regions[7].bytes[COMMAND] & 4)

    def _reach(self) -> Space:
        if not self.master or self.space is None:
            raise FaultError(f"{self.bdf}: no bus master, or not attached")
        return self.space

    def dma_read(self, iova: int, size: int) -> bytes:
        try:
            return self._reach().read(iova, size)
        except FaultError as error:
            self.faults.append(str(error))
            raise

    def dma_write(self, iova: int, data: bytes) -> None:
        try:
            self._reach().write(iova, data)
        except FaultError as error:
            self.faults.append(str(error))
            raise

    def trigger(self, vector: int = 0) -> bool:
        """An MSI or MSI-X message, which is a write to memory: only a bus master sends it. False: use the line."""
        for index in (2, 1):
            fd = self.eventfds.get(index, {}).get(vector, -1)
            if fd >= 0:
                if self.master:
                    os.eventfd_write(fd, 1)
                return True
        return False

    def set_level(self, on: bool) -> None:
        """The INTx line."""
        self.level = on
        self.relevel()

    def relevel(self) -> None:
        fd = self.eventfds.get(0, {}).get(0, -1)
        if self.level and not self.masked and not self._cut_off() and fd >= 0:
            self.masked = True
            os.eventfd_write(fd, 1)

    def _cut_off(self) -> bool:
        """INTx Disable, which VFIO makes a mask."""
        return False

    # accesses of the host by pread and pwrite

    def read(self, index: int, offset: int, width: int) -> int:
        return self.regions[index].read(offset, width)

    def write(self, index: int, offset: int, value: int, width: int) -> None:
        self.regions[index].write(offset, value, width)


class Slot:
    """The model's side of ``soft.Function``, on a device of the fake host."""

    def __init__(self, device: FakeDevice) -> None:
        self.read, self.write = device.dma_read, device.dma_write
        self.message, self.set_line = device.trigger, device.set_level


class FakeEdu(FakeDevice):
    """The software machine's ``edu`` on the fake host, with its configuration space."""

    def __init__(self, bdf: str = "0000:00:05.0", group: int = 5, **options: Any) -> None:
        self.model = Edu()
        self.model.function = Slot(self)  # type: ignore[assignment]
        self.model.reset()
        who = self.model.identity
        self.space_config = Config(who, {0: 0xC0000000})
        super().__init__(bdf, group, ids=(who.vendor, who.device), class_code=who.class_code, **options)
        self.regions[0] = FakeRegion(who.bars[0].size, partial(self.model.read, 0), partial(self.model.write, 0))

    def _configure(self) -> None:
        config = self.space_config
        self.regions[7] = FakeRegion(config.size, config.read, self._write_config)
        self.regions[7].bytes = config.bytes

    def _write_config(self, offset: int, value: int, width: int) -> None:
        self.space_config.write(offset, value, width)
        self.relevel()

    def _cut_off(self) -> bool:
        return self.space_config.line_disabled

    def reset(self) -> None:
        super().reset()
        self.model.reset()


class FakeNvme(FakeDevice):
    """The NVMe controller model behind VFIO: BAR 0 is its registers, interrupts are MSI-X vectors."""

    def __init__(
        self, bdf: str = "0000:00:04.0", group: int = 4, *, namespaces: Iterable[Namespace] | None = None,
        auto: bool = True, queues: int = 8,
        build: Callable[..., ControllerModel] = ControllerModel, **options: Any,
    ) -> None:  # fmt: skip
        self.model = NvmeFunction(namespaces, queues=queues, auto=auto, build=build, **options)
        self.model.plugged(Slot(self))  # type: ignore[arg-type]
        self.controller = self.model.controller
        super().__init__(bdf, group, ids=(0x1B36, 0x0010), class_code=0x010802, vectors={0: 1, 1: 32, 2: queues + 1},
                         express=True)  # fmt: skip
        self.regions[0] = FakeRegion(
            self.model.identity.bars[0].size, partial(self.model.read, 0), partial(self.model.write, 0)
        )

    def reset(self) -> None:
        super().reset()
        self.model.reset()
