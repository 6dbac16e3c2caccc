"""Memory for I/O that a controller and Python share without a copy: ``DmaBuffer``.

``view`` is the memory itself, bytes as a flat ``memoryview``; NumPy takes it as it is (``numpy.frombuffer(buffer.view,
dtype)``, or ``array``). With the ``premap`` strategy a buffer is registered with the IOMMU when it is made and until it
is freed, with ``auto`` when that is worth it or its ``address`` is asked for; with the others each request maps what it
uses. A buffer may be freed only when nothing is in flight on it, which ``Controller`` sees to: it counts (``busy``).
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from dmakit.errors import MisuseError
from dmakit.nvme.premap import Offer


class HostMemory(Protocol):
    """Memory of a platform: (phys, length) ``ranges`` in order, until ``release``."""

    size: int
    ranges: list[tuple[int, int]]

    def slices(self, offset: int = 0, n: int | None = None) -> list[tuple[int, int]]:
        """The (phys, length) pieces of ``n`` bytes from ``offset``."""

    def release(self) -> None:
        """Give it back."""


class DmaBuffer:
    """``size`` bytes; ``offer``: how a strategy that keeps memory mapped knows them."""

    def __init__(
        self,
        memory: HostMemory,
        view: memoryview,
        offer: Offer | None,
        release: Callable[[DmaBuffer], None],
    ) -> None:
        self.memory = memory
        self.view = view
        self.size = memory.size
        self.offer = offer
        self.busy = 0
        self._release = release
        self._live = True

    def __len__(self) -> int:
        return self.size

    def pieces(self, offset: int = 0, n: int | None = None) -> list[tuple[int, int]]:
        """(phys, length) of ``n`` bytes from ``offset``."""
        if not self._live:
            raise MisuseError("buffer: freed already")
        return self.memory.slices(offset, n)

    def address(self, offset: int = 0) -> int:
        """The device address of a byte, good until the buffer is freed; MisuseError when it cannot be registered."""
        if self.offer is None:
            raise MisuseError("buffer: the strategy registers nothing (premap and auto do): it has no device address")
        ((phys, _),) = self.pieces(offset, 1)
        return self.offer.address(phys)

    def array(self, dtype: Any = "u1") -> Any:
        """The memory as a NumPy array, without a copy."""
        import numpy

        return numpy.frombuffer(self.view, dtype=dtype)

    def free(self) -> None:
        """Unmap and give the memory back; MisuseError while I/O on it is in flight, or the second time."""
        if not self._live:
            raise MisuseError("buffer: freed already")
        if self.busy:
            raise MisuseError(f"buffer: {self.busy} operations on it are in flight")
        self._live = False
        self._release(self)

    def __enter__(self) -> DmaBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live and not self.busy:
            self.free()
