"""A device, a mapper and memory on the software machine, on type1 and on iommufd, for the tests of ``nvme.auto``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.support.vfio.devices import FakeEdu
from tests.support.vfio.host import FakeHost

from dmakit.block.request import Op, Request
from dmakit.nvme.auto import AutoMapper
from dmakit.nvme.costs import Costs, Line
from dmakit.nvme.iod import Iod
from dmakit.nvme.mapping import RequestMapper
from dmakit.nvme.pool import LARGE_BYTES, SMALL_BYTES, DescriptorPool, PlainSource
from dmakit.platform.linux.machine import Machine as LinuxMachine
from dmakit.platform.soft import Machine as SoftMachine
from dmakit.reasons import Reason

PAGE = 4096
BDF = "0000:00:05.0"
Memory = list[tuple[int, int]]
Source = Callable[[RequestMapper], Costs]


def costs(window: float, use: float, price: float) -> Source:
    """Injected: the same for every request and every buffer."""
    made = Costs(Line(window, 0, 0), Line(use, 0, 0), Line(price, 0, 0))
    return lambda requests: made


class World:
    """``mapper`` chooses; ``requests`` is its two-step; ``host`` is None on the software machine."""

    def __init__(
        self,
        platform: str,
        source: Source,
        *,
        host: FakeHost | None = None,
        device: dict[str, Any] | None = None,
        **machine: Any,
    ) -> None:
        self.host = None if platform == "soft" else host or FakeHost([FakeEdu(BDF, 5)])
        self.machine: Any = (
            SoftMachine(**{"ram": "32M", "swiotlb": "1M", "mode": "strict", **machine})
            if self.host is None
            else LinuxMachine(ram="16M", kernel=self.host, backend=platform)
        )
        self.device = self.machine.device(BDF, min_align_mask=PAGE - 1, **(device or {}))
        ledger, fail = self.machine.ledger, self.machine.fail
        pools = [
            DescriptorPool(PlainSource(n << 40), size, ledger=ledger, fail=fail)
            for n, size in ((1, SMALL_BYTES), (2, LARGE_BYTES))
        ]
        self.requests = RequestMapper(self.device, *pools, ledger=ledger, sgl_supported=True)
        self.mapper = AutoMapper(self.requests, source)

    def memory(self, pieces: int = 1, pages: int = 1) -> Memory:
        """Pieces of so many pages each that are not neighbours."""
        order = (2 * pieces * pages - 1).bit_length()
        phys = self.machine.pages.alloc(order)
        return [(phys + 2 * at * pages * PAGE, pages * PAGE) for at in range(pieces)]

    def maps(self) -> int:
        """Mapping calls so far."""
        return int(self.machine.ledger.snapshot()["domain_maps"])

    def live(self) -> int:
        """IOVA ranges in use."""
        return int(self.machine.live()["iova_ranges"])

    def map(self, memory: Sequence[tuple[int, int]], op: Op = Op.READ) -> Iod:
        """One request."""
        return self.mapper.map(Request(op, memory))

    def use(self, memory: Sequence[tuple[int, int]]) -> Reason:
        """One request, mapped, reached by the device, unmapped; its reason."""
        iod = self.map(memory)
        assert iod.status == 0 and iod.error is None, iod.error
        self.mapper.unmap(iod)
        return Reason(iod.reason)


@contextmanager
def world(platform: str, source: Source | None = None, **options: Any) -> Iterator[World]:
    """A world; afterwards no mapping, no IOVA, no pin is left."""
    made = World(platform, source or costs(10, 0, 35), **options)
    yield made
    for offer in list(dict.fromkeys(made.mapper._owners)):
        assert offer.busy == 0
        made.mapper.withdraw(offer)
    made.device.checker = None
    assert made.live() == 0
    if made.host is not None:
        assert made.machine.live()["mappings"] == 0
        made.machine.close()
        assert made.host.left() == {"files": 0, "pinned": 0}
