"""The choice between windows and registered memory: when, why, what it costs at most, and what happens at limits."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.nvme.auto_world import BDF, PAGE, World, costs, world
from tests.nvme.platforms import world as controllers
from tests.support.platforms import PLATFORMS
from tests.support.vfio.devices import FakeEdu
from tests.support.vfio.host import FakeHost

from dmakit.block.request import Op, Request
from dmakit.dma.direction import Direction
from dmakit.errors import ExhaustedError, UnsupportedError
from dmakit.nvme.costs import Costs, Line
from dmakit.reasons import Reason

everywhere = pytest.mark.parametrize("platform", PLATFORMS)
BELOW, ABOVE = Reason.RENT_BELOW_PRICE, Reason.RENT_ABOVE_PRICE


def host(**options: Any) -> FakeHost:
    return FakeHost([FakeEdu(BDF, 5)], **options)


@everywhere
@pytest.mark.parametrize(("pieces", "price", "windows"), [(1, 35, 3), (4, 35, 3), (4, 40, 4), (4, 9, 0), (1, 1000, 8)])
def test_a_buffer_is_registered_when_its_windows_would_cost_more(
    platform: str, pieces: int, price: int, windows: int
) -> None:
    with world(platform, costs(12, 2, price)) as w:
        memory = w.memory(pieces)
        w.mapper.offer(memory)
        assert [w.use(memory) for _ in range(8)] == [BELOW] * windows + [ABOVE] * (8 - windows)
        assert w.maps() == pieces * (windows + (windows < 8))
        assert w.mapper.taken == {k: n for k, n in ((BELOW, windows), (ABOVE, 8 - windows)) if n}


@everywhere
def test_the_verdict_names_the_use_from_which_on(platform: str) -> None:
    made = Costs(Line(1000, 500, 20), Line(300, 5, 0), Line(2000, 700, 30))
    with world(platform, lambda requests: made) as w:
        memory = w.memory(3, 2)
        w.mapper.offer(memory)
        verdict = made.verdict((3, 6), (3, 6))
        assert (verdict.window, verdict.use, verdict.price) == (2620, 315, 4280)
        assert str(verdict) == (
            "window: 2.6 us a request, registered: 0.3 us, registration: 4.3 us once: premapped from use 2 on"
        )
        assert [w.use(memory) for _ in range(4)].index(ABOVE) + 1 == verdict.uses
    assert made.verdict((0, 0), (1, 1)).uses == int(2730 // 700) + 1
    assert str(Costs(Line(5, 0, 0), Line(5, 0, 0), Line(1, 0, 0)).verdict((1, 1), (1, 1))).endswith("never premapped")


@everywhere
def test_part_of_a_buffer_counts_for_the_whole(platform: str) -> None:
    with world(platform) as w:
        ((phys, _),) = memory = w.memory(1, 8)
        w.mapper.offer(memory)
        parts = [[(phys + at * PAGE, PAGE)] for at in range(6)]
        assert [w.use(part) for part in parts] == [BELOW] * 3 + [ABOVE] * 3
        assert w.use([(phys + 7 * PAGE, 2 * PAGE)]) == Reason.NOT_OFFERED  # reaches beyond it


@everywhere
def test_what_is_not_worth_it_or_not_possible_stays_with_windows(platform: str) -> None:
    with world(platform, costs(5, 5, 1)) as w:
        memory = w.memory(2)
        assert w.use(memory) == Reason.NOT_OFFERED
        w.mapper.offer(memory)
        assert {w.use(memory) for _ in range(5)} == {Reason.WINDOW_CHEAPER}

    def refused(requests: object) -> Costs:
        raise ExhaustedError("no memory")

    with world(platform, refused) as w:
        memory = w.memory()
        w.mapper.offer(memory)
        assert {w.use(memory) for _ in range(5)} == {Reason.COSTS_UNKNOWN}
        assert w.mapper.lines()[-1] == "auto: costs not measured: no memory"
        assert w.mapper.report()["unmeasured"] == "no memory"


def test_memory_that_would_have_to_be_synced_is_never_registered() -> None:
    with world("soft", coherent=False) as w:
        memory = w.memory()
        w.mapper.offer(memory)
        assert [w.use(memory) for _ in range(4)] == [BELOW] * 3 + [Reason.NOT_REGISTRABLE]
        assert {w.use(memory) for _ in range(9)} == {Reason.NOT_REGISTRABLE}
    with world("soft", device={"trusted": False}) as w:
        phys = w.machine.pages.alloc(1)
        w.mapper.offer([(phys + 512, PAGE)])  # its ends are bounced
        assert [w.use([(phys + 512, PAGE)]) for _ in range(5)] == [BELOW] * 3 + [Reason.NOT_REGISTRABLE] * 2


@everywhere
def test_the_reason_of_a_slow_path_is_kept(platform: str) -> None:
    with world(platform, costs(1, 0, 10)) as w:
        ((phys, _),) = w.memory(1, 4)
        gaps = [(phys, 512), (phys + 2 * PAGE + 512, 512)]
        w.mapper.offer(gaps)
        assert [w.use(gaps) for _ in range(11)] == [Reason.GAP_IN_MERGE_BOUNDARY] * 10 + [ABOVE]


@everywhere
def test_the_device_reaches_the_memory_either_way(platform: str) -> None:
    with controllers(platform) as c, c.open(strategy="auto", record=True) as controller:
        mapper: Any = controller.driver.mapper
        mapper.source = costs(10, 0, 45)
        disk = controller.namespaces[1]
        with controller.buffer(1 << 16) as buffer:
            for at in range(8):
                buffer.view[:] = bytes([at + 1]) * (1 << 16)
                disk.write(128 * at, buffer)
            buffer.view[:] = bytes(1 << 16)
            for at in range(8):
                disk.read_into(128 * at, buffer)
                assert bytes(buffer.view) == bytes([at + 1]) * (1 << 16) == c.space.read(128 * at, 128)
        taken = [(controller.driver.paths.paths[path], why) for path, why in controller.driver.paths.requests.values()]
        assert [why for _, why in taken] == [BELOW] * 4 + [ABOVE] * 12
        assert {path for path, why in taken if why == ABOVE} == {"registered"}
        assert disk.read(0, 8) == b"\1" * 4096  # memory of its own, used once: a window
        assert mapper.taken[BELOW] == 5


@everywhere
def test_an_address_that_was_given_out_stays(platform: str) -> None:
    with world(platform) as w:
        memory = w.memory(2)
        offer = w.mapper.offer(memory)
        addr = offer.address(memory[1][0] + 5)
        assert w.device.iova_to_phys(addr) == memory[1][0] + 5
        assert w.use(memory) == Reason.PREMAPPED
        assert not w.mapper._make_room(1 << 30, 1 << 30)
        assert offer.address(memory[1][0] + 5) == addr


# What it costs at most ----------------------------------------------------------------------------------------

USES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=1), max_size=40)
MIXED = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True), max_size=40)


def played(uses: list[list[int]], window: int, use: int, price: int) -> tuple[float, float, int]:
    """(what auto paid in the model, the best choice of buffers to register in advance, registrations)."""
    paid = registrations = 0
    with world("soft", costs(window, use, price)) as w:
        memory = [w.memory() for _ in range(3)]
        offers = [w.mapper.offer(pieces) for pieces in memory]
        for which in uses:
            before = sum(offer.registration is not None for offer in offers)
            reason = w.use([piece for at in which for piece in memory[at]])
            registrations += sum(offer.registration is not None for offer in offers) - before
            paid += use if reason == ABOVE else window
    best = min(
        price * len(chosen) + sum(use if set(which) <= set(chosen) else window for which in uses)
        for n in range(4)
        for chosen in combinations(range(3), n)
    )
    return paid + registrations * price, best, registrations


@settings(max_examples=60)
@given(USES, st.integers(1, 50), st.integers(0, 50), st.integers(1, 300))
def test_it_never_costs_more_than_twice_the_best_choice(uses: Any, window: int, use: int, price: int) -> None:
    total, best, _ = played(uses, window, use, price)
    assert total <= 2 * best


@settings(max_examples=60)
@given(MIXED, st.integers(1, 50), st.integers(0, 50), st.integers(1, 300))
def test_requests_on_several_buffers_add_a_window_a_registration(uses: Any, window: int, use: int, price: int) -> None:
    total, best, registrations = played(uses, window, use, price)
    assert total <= 2 * best + registrations * window


def test_the_bound_is_met() -> None:
    total, best, _ = played([[0]] * 11, 10, 0, 100)
    assert (total, best) == (200, 100)


@pytest.mark.parametrize("backend", ["type1", "iommufd"])
@settings(max_examples=25)
@given(uses=st.lists(st.integers(0, 5), max_size=80), price=st.integers(1, 60), room=st.integers(4, 8))
def test_at_limits_it_stays_below_twice_two_step(backend: str, uses: list[int], price: int, room: int) -> None:
    """Room for some registrations only: mappings on type1, IOVAs on both; nothing fails, and thrashing is bounded."""
    limit = {"entry_limit": room} if backend == "type1" else {"ranges": [(0, (room + 1) * PAGE - 1)]}
    with world(backend, costs(10, 0, price), host=host(**limit)) as w:
        memory = [w.memory(2) for _ in range(6)]
        for pieces in memory:
            w.mapper.offer(pieces)
        total = 0
        for at in uses:
            before = sum(offer.registration is not None for offer in dict.fromkeys(w.mapper._owners))
            gone = w.mapper.evictions
            reason = w.use(memory[at])
            after = sum(offer.registration is not None for offer in dict.fromkeys(w.mapper._owners))
            total += price * (after - before + w.mapper.evictions - gone) + (0 if reason == ABOVE else 10)
        assert total <= 20 * len(uses)
        assert 2 * sum(offer.registration is not None for offer in dict.fromkeys(w.mapper._owners)) <= room


# Limits -------------------------------------------------------------------------------------------------------


def registered(w: World) -> list[int]:
    """Which offers are registered, in the order they were made."""
    return [at for at, offer in enumerate(dict.fromkeys(w.mapper._owners)) if offer.registration is not None]


LIMITS = {
    "mappings": ("type1", {"entry_limit": 6}),
    "memlock": ("type1", {"memlock": 6 * PAGE}),
    "aperture-type1": ("type1", {"ranges": [(0, 7 * PAGE - 1)]}),
    "aperture-iommufd": ("iommufd", {"ranges": [(0, 7 * PAGE - 1)]}),
}


@pytest.mark.parametrize("kind", LIMITS)
def test_the_least_recently_used_make_room(kind: str) -> None:
    backend, limit = LIMITS[kind]
    with world(backend, costs(10, 0, 5), host=host(**limit)) as w:
        memory = sorted(w.memory(2) for _ in range(5))
        for pieces in memory:
            w.mapper.offer(pieces)
        assert [w.use(memory[at]) for at in (0, 1, 2, 0)] == [ABOVE] * 4 and registered(w) == [0, 1, 2]
        assert w.use(memory[3]) == ABOVE and registered(w) == [0, 2, 3] and w.mapper.evictions == 1
        held = w.map(memory[2])
        assert w.use(memory[4]) == ABOVE and registered(w) == [2, 3, 4]  # 0 was used before 3; 2 is in flight
        assert w.use(memory[0]) == ABOVE and registered(w) == [0, 2, 4]
        w.mapper.unmap(held)


@pytest.mark.parametrize("kind", LIMITS)
def test_a_window_that_finds_no_room_gets_it_from_registrations(kind: str) -> None:
    backend, limit = LIMITS[kind]
    with world(backend, costs(10, 0, 5), host=host(**limit)) as w:
        memory = [w.memory(2) for _ in range(3)]
        for pieces in memory:
            w.mapper.offer(pieces)
            w.use(pieces)
        assert registered(w) == [0, 1, 2]
        stranger = w.memory(2)
        assert w.use(stranger) == Reason.NOT_OFFERED and w.mapper.evictions == 1


@pytest.mark.parametrize("kind", LIMITS)
def test_what_cannot_be_registered_is_tried_again_only_after_its_price(kind: str) -> None:
    backend, limit = LIMITS[kind]
    with world(backend, costs(10, 0, 25), host=host(**limit)) as w:
        large = w.memory(4, 2) if kind != "mappings" else w.memory(8)
        w.mapper.offer(large)
        window = [large[0]]
        uses = [w.use(window) for _ in range(9)]
        refused = Reason.REGISTRATION_REFUSED
        assert uses == [BELOW, BELOW] + [refused] * 7
        assert w.host is not None and w.machine.live()["mappings"] == 0
        before = w.maps()
        w.use(window)
        w.use(window)
        assert w.maps() == before + 2  # windows, no attempt


@everywhere
@pytest.mark.parametrize("before", [0, 1], ids=["window", "registration"])
def test_a_failure_anywhere_leaves_nothing_and_the_next_request_works(platform: str, before: int) -> None:
    nth = 0
    while True:
        with world(platform, costs(10, 0, 15)) as w:
            memory = w.memory(4)
            w.mapper.offer(memory)
            for _ in range(before):
                w.use(memory)
            w.machine.fail.arm(nth)
            iod = w.map(memory)
            fired = w.machine.fail.fired
            w.machine.fail.disarm()
            w.mapper.unmap(iod)
            assert [w.use(memory) for _ in range(3)][-1] == ABOVE
        if not fired:
            assert nth >= (1 if platform == "soft" else 4)
            return
        nth += 1


def test_withdrawn_memory_is_not_mapped_any_more() -> None:
    with world("iommufd", costs(10, 0, 5)) as w:
        memory = w.memory(2)
        offer = w.mapper.offer(memory)
        assert w.use(memory) == ABOVE and w.machine.live()["mappings"] == 2
        w.mapper.withdraw(offer)
        assert w.machine.live()["mappings"] == 0 and w.use(memory) == Reason.NOT_OFFERED


def test_two_step_takes_what_is_not_data(monkeypatch: pytest.MonkeyPatch) -> None:
    with world("soft") as w:
        iod = w.mapper.map(Request(Op.FLUSH))
        assert (iod.path_name, iod.reason) == ("no-data", Reason.NO_DATA)
        w.mapper.unmap(iod)
        memory = w.memory()
        request = Request(Op.WRITE, memory, integrity=[(memory[0][0] + PAGE, 512)])
        iod = w.mapper.map(request)
        assert iod.status == 0 and iod.path_name == "map_phys"
        w.mapper.unmap(iod)


def test_what_stays_mapped_cannot_be_had_without_a_device_that_snoops() -> None:
    with world("soft", coherent=False) as w:
        offer = w.mapper.offer(w.memory())
        with pytest.raises(UnsupportedError, match=r"^registered memory is not synced on each use: it needs a device"):
            offer.address(offer.pieces[0][0])
        addr = w.device.map_phys(*offer.pieces[0], Direction.FROM_DEVICE)
        w.device.unmap_phys(addr, PAGE, Direction.FROM_DEVICE)
