"""Coherent memory of a device, page by page, as the descriptor pools want it.

``DeviceSource`` sits between ``pool.DescriptorPool`` and ``dma.Device``: each page is one coherent allocation; its
words are the machine's own memory, so a PRP entry written there is what the device's next read returns.
"""

from __future__ import annotations

from typing import Any

from dmakit.consts import PAGE_SIZE


class DevicePage:
    """One page: ``addr`` for the device, ``words`` (512 of 64 bits) for the CPU."""

    def __init__(self, device: Any) -> None:
        self.memory = device.alloc_coherent(PAGE_SIZE)
        self.addr: int = self.memory.addr
        ((phys, _),) = self.memory.buffer.ranges
        self.words: memoryview[int] = memoryview(device.memory.words)[phys >> 3 : (phys + PAGE_SIZE) >> 3]

    def free(self) -> None:
        """Unmap the page and give it back."""
        self.words = memoryview(b"").cast("Q")
        self.memory.free()


class DeviceSource:
    """Pages of coherent memory of ``device`` (a ``dma.Device``)."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def page(self) -> DevicePage:
        """A new page; ExhaustedError when there is no memory or no IOVA for it."""
        return DevicePage(self.device)
