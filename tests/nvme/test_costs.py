"""What mappings cost: measured with a clock that only system calls move, so that every figure is known beforehand."""

from __future__ import annotations

from typing import Any

import pytest
from tests.nvme.auto_world import BDF, PAGE, World, world
from tests.support.platforms import PLATFORMS
from tests.support.sweep import sweep
from tests.support.vfio.devices import FakeEdu
from tests.support.vfio.host import FakeHost

from dmakit.errors import ExhaustedError, HostError, UnsupportedError
from dmakit.nvme.costs import BUDGET_NS, CALLS_A_ROUND, LEAST, ROUNDS, Costs, Line, measure
from dmakit.nvme.mapping import RequestMapper
from dmakit.platform.linux.uapi import LAYOUTS
from dmakit.reasons import Reason

MAPS = {"VFIO_IOMMU_MAP_DMA": ("vfio_iommu_type1_dma_map", "size"), "IOMMU_IOAS_COPY": ("iommu_ioas_copy", "length")}
UNMAPS = ("VFIO_IOMMU_UNMAP_DMA", "IOMMU_IOAS_UNMAP")


class PricedHost(FakeHost):
    """Time passes in its system calls only: ``piece`` and ``page`` ns a mapping, ``unmap`` ns an unmap.

    ``disturb``: ns more in every so many-th mapping."""

    def __init__(
        self, piece: int = 2000, page: int = 100, unmap: int = 1000, disturb: tuple[int, int] = (0, 1)
    ) -> None:
        super().__init__([FakeEdu(BDF, 5)])
        self.now = 0
        self.piece, self.page, self.unmap, self.disturb = piece, page, unmap, disturb
        self.mapped = 0
        self.refused = ""

    def _ask(self, call: str, what: str = "") -> None:
        try:
            super()._ask(call, what)
        except HostError:
            self.refused = call
            raise

    def ioctl(self, fd: int, name: str, data: bytearray | int = 0) -> int:
        if name in MAPS:
            layout, field = MAPS[name]
            self.mapped += 1
            self.now += self.piece + self.page * getattr(LAYOUTS[layout].unpack(data), field) // PAGE
            self.now += self.disturb[0] if self.mapped % self.disturb[1] == 0 else 0
        elif name in UNMAPS:
            self.now += self.unmap
        return super().ioctl(fd, name, data)


def priced(host: PricedHost) -> Any:
    """A source of costs on that host's time."""
    return lambda requests: measure(requests, clock=lambda: host.now)


@pytest.mark.parametrize("backend", ["type1", "iommufd"])
def test_the_lines_are_what_the_kernel_takes(backend: str) -> None:
    host = PricedHost()
    with world(backend, priced(host), host=host) as w:
        w.use(w.memory())  # not offered: nothing is measured for it
        assert w.mapper.costs is None
        before = len(host.calls)
        costs = w.mapper.measured()
        assert costs is not None
        assert (costs.window, costs.price) == (Line(1000, 2000, 100), Line(1000, 2000, 100))
        assert costs.use == Line(0, 0, 0)
        assert costs.rounds == ROUNDS and 0 < costs.took_ns < BUDGET_NS
        spent = [name for name in host.calls[before:] if name in MAPS or name in UNMAPS]
        assert len(spent) == ROUNDS * CALLS_A_ROUND + 2  # and the memory that is registered meanwhile
        assert w.machine.live()["mappings"] == 0 and w.live() == 0
        assert w.mapper.measured() is costs
        text = "a window 1.00 + 2.00 a piece + 0.100 a page; a use of registered memory 0.00 + 0.00 a piece"
        assert text in str(costs)
        memory = w.memory(4)
        w.mapper.offer(memory)
        assert str(costs.verdict((4, 4), (4, 4))) == (
            "window: 9.4 us a request, registered: 0.0 us, registration: 9.4 us once: premapped from use 2 on"
        )
        assert [w.use(memory) for _ in range(3)] == [Reason.RENT_BELOW_PRICE] + [Reason.RENT_ABOVE_PRICE] * 2


@pytest.mark.parametrize("backend", ["type1", "iommufd"])
def test_what_disturbs_is_left_out(backend: str) -> None:
    host = PricedHost(disturb=(700_000, 29))
    with world(backend, priced(host), host=host) as w:
        costs = w.mapper.measured()
        assert costs is not None and costs.rounds == ROUNDS
        assert (costs.window, costs.price) == (Line(1000, 2000, 100), Line(1000, 2000, 100))


@pytest.mark.parametrize(("piece", "rounds"), [(20_000, ROUNDS), (60_000, 4), (100_000, LEAST), (1_000_000, LEAST)])
def test_measuring_ends_in_time(piece: int, rounds: int) -> None:
    host = PricedHost(piece, 0, 0)
    with world("type1", priced(host), host=host) as w:
        costs = w.mapper.measured()
        assert costs is not None and costs.rounds == rounds
        assert costs.took_ns <= BUDGET_NS or rounds == LEAST
        assert costs.window == Line(0, piece, 0)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_our_own_code_is_measured_on_every_platform(platform: str) -> None:
    with world(platform, measure) as w:
        costs = w.mapper.measured()
        assert costs is not None
        for line in (costs.window, costs.use, costs.price):
            assert min(line.fixed, line.piece, line.page) >= 0 and line.of(1, 1) > 0
        assert w.mapper.report()["costs"] == costs.report() and costs.report()["rounds"] == costs.rounds
        assert w.mapper.lines()[0] == "auto: no requests; 0 registrations ended to make room"
        memory = w.memory(8)
        w.mapper.offer(memory)
        uses = costs.verdict((8, 8), (8, 8)).uses
        taken = [w.use(memory) for _ in range(20)]
        assert taken == (
            [Reason.WINDOW_CHEAPER] * 20
            if uses is None
            else ([Reason.RENT_BELOW_PRICE] * (uses - 1) + [Reason.RENT_ABOVE_PRICE] * 20)[:20]
        )


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_measurement_that_fails_leaves_nothing_mapped(platform: str) -> None:
    worlds: list[World] = []

    def make() -> World:
        worlds.append(World(platform, measure, host=PricedHost()))
        return worlds[-1]

    def operation(w: World) -> Costs:
        return measure(w.requests, clock=lambda: 0)

    def check(w: World, failed: bool) -> None:
        live = w.machine.live()
        left = live["iova_ranges"], live.get("mappings", 0)
        assert left == (0, 0) or (isinstance(w.host, PricedHost) and w.host.refused in UNMAPS)
        assert w.machine.pages.allocated_pages == pages

    probe = make()
    pages = probe.machine.pages.allocated_pages
    assert sweep(make, lambda w: w.machine.fail, operation, check) > 10
    for w in worlds:
        if w.host is not None:
            w.machine.close()
            assert w.host.left() == {"files": 0, "pinned": 0}


def test_lines_never_fall() -> None:
    assert Line.through(100, 90, 80) == Line(100, 0, 0)
    assert Line.through(0, 310, 70) == Line(0, 0, 10)
    assert Line(1, 2, 3).of(4, 5) == 24 and str(Line(1234, 500, 20)) == "1.23 + 0.50 a piece + 0.020 a page"


def test_no_costs_where_nothing_can_be_registered() -> None:
    def check(requests: RequestMapper) -> Costs:
        with pytest.raises(UnsupportedError, match=r"^registered memory is not synced on each use"):
            measure(requests)
        raise ExhaustedError("seen")

    with world("soft", check, coherent=False) as w:
        assert w.mapper.measured() is None and str(w.mapper.unmeasured) == "seen"
    with world("soft", measure, coherent=False) as w:
        memory = w.memory()
        w.mapper.offer(memory)
        assert w.use(memory) == Reason.NOT_REGISTRABLE
