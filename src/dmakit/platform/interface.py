"""What every machine offers, wherever it runs: ``soft.Machine`` and ``linux.machine.Machine``.

A *platform* makes memory (``buffer``) and devices (``device``) and keeps the accounts. Above it the code is the same;
what only one platform can do is its own: BARs are made on the software machine (``add_bar``) and found on a host,
where a caller's memory is taken in (``register``). A PCI function is opened (``open``) on both, with all that
``platform.function.PciFunction`` has; the software machine needs one plugged in before (``plug``).

What a platform cannot observe is None in ``snapshot``, never 0; ``ledger`` itself counts what this process did.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from dmakit.clock import VirtualClock
from dmakit.dma.device import Device
from dmakit.failpoint import FailPoint
from dmakit.ledger import Ledger
from dmakit.memory.buffers import Buffer
from dmakit.memory.pages import PageAllocator
from dmakit.memory.physical import PhysicalMemory
from dmakit.platform.function import PciFunction
from dmakit.swiotlb.bounce import Swiotlb


class Platform(Protocol):
    """A machine; leaving its ``with`` closes it."""

    ledger: Ledger
    clock: VirtualClock
    fail: FailPoint
    memory: PhysicalMemory
    pages: PageAllocator
    devices: list[Device]
    swiotlb: Swiotlb | None
    cpus: int
    policy: str
    mode: str

    def buffer(self, size: int | str, *, offset: int = 0, order: int | None = None, node: int = 0) -> Buffer:
        """Memory for data, ``offset`` bytes into its first page, in blocks of ``1 << order`` pages (None: single)."""

    def device(self, name: str, **options: Any) -> Device:
        """The mappings of the device ``name``; options are those of ``dma.device.Device``."""

    def open(self, bdf: str, *, owns_machine: bool = False, **options: Any) -> PciFunction:
        """Take the PCI function at ``bdf``; ``options`` are those of ``dma.device.Device``.

        ``owns_machine``: closing it closes the machine."""

    def record_events(self, events: list[Any] | None) -> None:
        """Append what happens to ``events`` from now on; None: no more."""

    def snapshot(self) -> Mapping[str, int | None]:
        """The ledger's rows; None for those that cannot be observed here."""

    def settle(self) -> None:
        """Let everything that waits (flush queues) happen now."""

    def live(self) -> Mapping[str, int | None]:
        """What is in use; all zero when everything was given back."""

    def close(self) -> None:
        """Give everything back to whom it came from."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...
