"""The contract checker: every rule has a breach here, caught in both modes, and every defect of Linux is named.

``BREACHES`` holds one scenario a rule: what machine and device it needs and what to do wrong. Mode ``raise`` must
stop it with a MisuseError of that rule; mode ``collect`` must report the rule and let the call run on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dmakit.dma.checker import ContractChecker
from dmakit.dma.contract_rules import RULES
from dmakit.dma.defects import DEFECTS
from dmakit.dma.direction import Attrs, Direction
from dmakit.errors import DmakitError, MisuseError
from dmakit.p2p.state import P2pState
from dmakit.p2p.topology import HostBridge, PciTopology
from dmakit.platform.soft import Machine

BIDI, TO, FROM = Direction.BIDIRECTIONAL, Direction.TO_DEVICE, Direction.FROM_DEVICE
PAGE, MIB2 = 4096, 2 << 20


@dataclass
class World:
    """A machine with one device under the checker, and a scattered buffer of 16 pages."""

    machine: Machine
    device: Any
    checker: ContractChecker
    pages: list[int] = field(default_factory=list)

    def window(self, count: int = 8, linked: int = 0, direction: int = TO, attrs: int = 0) -> Any:
        """A window of ``count`` pages, the first ``linked`` of them linked and synced."""
        state = self.device.try_alloc(0, count * PAGE)
        for n in range(linked):
            state.link(self.pages[n], n * PAGE, PAGE, direction, attrs)
        if linked:
            state.sync(0, linked * PAGE)
        return state

    def block(self) -> int:
        """2 MiB of contiguous, aligned memory."""
        return self.machine.pages.alloc(9)


def build(mode: str, machine: dict[str, Any] | None = None, device: dict[str, Any] | None = None) -> World:
    checker = ContractChecker(mode)
    made = Machine(ram="1G", **{"checker": checker, **(machine or {})})
    world = World(made, made.device("dev", **(device or {})), checker)
    pages = [made.pages.alloc() for _ in range(32)]
    world.pages = pages[::2]
    return world


@dataclass
class Breach:
    """What breaks a rule; ``silent``: only the checker notices, so mode ``collect`` lets everything run."""

    act: Callable[[World], object]
    machine: dict[str, Any] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)


STRICT: dict[str, Any] = {"mode": "strict"}
DIRECT: dict[str, Any] = {"iommu": "none"}
UNTRUSTED: dict[str, Any] = {"trusted": False, "min_align_mask": 4095}


def map_one(w: World, direction: int = TO) -> int:
    return int(w.device.map_phys(w.pages[0], 0x800, direction))


def unmapped_twice(w: World) -> None:
    addr = map_one(w)
    w.device.unmap_phys(addr, 0x800, TO)
    w.device.unmap_phys(addr, 0x800, TO)


def sg_changed(w: World) -> None:
    sg = w.device.map_sg([(page, PAGE) for page in w.pages[:3]], TO)
    sg.phys[2] = w.pages[0]
    w.device.unmap_sg(sg)


def same_cache_line(w: World) -> None:
    w.device.map_phys(w.pages[0], 0x100, FROM)
    w.device.map_phys(w.pages[0] + 0x20, 0x100, FROM)


def destroyed_twice(w: World) -> None:
    state = w.window()
    state.destroy(0, TO)
    state.destroy(0, TO)


def head_then_more(w: World) -> None:
    state = w.device.try_alloc(w.pages[0], 8 * PAGE)
    state.link(w.pages[0], 0, 0x600, TO)
    state.link(w.pages[1], PAGE, PAGE, TO)


def linked_leaf(w: World) -> Any:
    state = w.device.try_alloc(0, MIB2)
    state.link(w.block(), 0, MIB2, TO)
    state.sync(0, MIB2)
    return state


def used_unsynced(w: World) -> None:
    state = w.window(linked=1)
    state.link(w.pages[1], PAGE, PAGE, TO)
    w.device.dma_read(state.addr, 2 * PAGE)


def empty_middle(w: World) -> None:
    """Defect 2: 0x300 bytes at the start of a page are a tail alone; the middle of no bytes is linked all the same."""
    w.device.try_alloc(w.pages[0], PAGE).link(w.pages[0], 0, 0x300, FROM)


def tail_without_slot(w: World) -> None:
    """Defect 3: the tail finds no slot; the unwind takes [0, mapped) instead of what this link mapped."""
    state = w.window(linked=2)
    taken = []
    with suppress(DmakitError):
        while w.machine.swiotlb is not None:
            taken.append(w.machine.swiotlb.map(w.pages[5], 2048))
    block = w.block()
    state.link(block, 2 * PAGE, PAGE + 0x200, TO)


def succeeded_in_name_only(w: World) -> None:
    """Defect 4 as its caller sees it: a link that failed is reported as a success."""
    state = w.window()
    w.checker.before_link(state, w.pages[0], 0, PAGE, TO, 0)
    w.checker.after_link(state, w.pages[0], 0, PAGE, TO, 0)


def bridged_sg(w: World, *, one_switch: bool) -> None:
    """Defects 5a and 5b: a scatterlist whose second entry is a peer's memory."""
    bar = w.machine.add_bar("1M", "peer")
    topology = PciTopology(w.machine.memory)
    bridge = HostBridge("pci0000:00", (0x8086, 0x2030))
    left, right = bridge.root_port("00:01.0").switch("01:00.0", 2)
    owner = left.endpoint("peer") if one_switch else bridge.root_port("00:02.0").endpoint("peer")
    topology.provide(owner, bar.start, bar.size)
    ledger = w.machine.ledger
    name = "bus" if one_switch else "bridge"
    device = w.machine.device(name, p2p=P2pState(topology, right.endpoint("client"), ledger))
    device.map_sg([(w.pages[0], 0x600), (bar.start, PAGE)], TO)


def partly_destroyed(w: World) -> None:
    w.window(8, linked=4).destroy(4 * PAGE, TO)


def slots_first(w: World) -> None:
    state = w.device.try_alloc(w.pages[0] + 0x200, 0x300)
    state.link(w.pages[0] + 0x200, 0, 0x300, FROM)
    state.sync()
    state.destroy(0x300, FROM)


BREACHES: dict[str, Breach] = {
    "error-cookie": Breach(lambda w: w.device.unmap_phys(0, PAGE, TO)),
    "not-mapped": Breach(lambda w: w.device.unmap_phys(0x123000, PAGE, TO)),
    "double-unmap": Breach(unmapped_twice),
    "unmap-size": Breach(lambda w: w.device.unmap_phys(map_one(w), 0x400, TO)),
    "unmap-kind": Breach(lambda w: w.device.unmap_phys(w.window(linked=1).addr, PAGE, TO)),
    "sg-entries": Breach(sg_changed),
    "unmap-direction": Breach(lambda w: w.device.unmap_phys(map_one(w), 0x800, FROM)),
    "unmap-attrs": Breach(lambda w: w.device.unmap_phys(map_one(w), 0x800, TO, Attrs.MMIO)),
    "not-ram": Breach(lambda w: w.device.map_phys(w.machine.add_bar("64K").start, PAGE, TO)),
    "mmio-of-ram": Breach(lambda w: w.device.map_phys(w.pages[0], PAGE, TO, Attrs.MMIO)),
    "sync-outside": Breach(lambda w: w.device.sync_single_for_cpu(map_one(w, FROM), 0x801, FROM)),
    "sync-direction": Breach(lambda w: w.device.sync_single_for_cpu(map_one(w, FROM), 0x800, TO)),
    "sg-segment-length": Breach(lambda w: w.device.map_sg([(w.block(), 8192)], TO), device={"max_segment": 4096}),
    "sg-segment-boundary": Breach(
        lambda w: w.device.map_sg([(w.block() + 0xF000, 8192)], TO), DIRECT, {"boundary": 0xFFFF}
    ),
    "leak": Breach(lambda w: (map_one(w), w.device.release())),
    "cacheline-overlap": Breach(same_cache_line, {"coherent": False}),
    "stale-state": Breach(destroyed_twice),
    "outside-window": Breach(lambda w: w.window(1).link(w.pages[0], PAGE, PAGE, TO)),
    "unaligned-interior": Breach(lambda w: w.window(linked=1).link(w.pages[1] + 0x200, PAGE, 0x200, TO)),
    "alignment": Breach(lambda w: w.window().link(w.pages[1], 0x200, PAGE, TO)),
    "overlapping-link": Breach(lambda w: w.window(linked=2).link(w.pages[2], PAGE, PAGE, TO)),
    "unlink-not-linked": Breach(lambda w: w.window(linked=2).unlink(PAGE, 2 * PAGE, TO)),
    "unlink-inside-granule": Breach(lambda w: w.window(linked=2).unlink(PAGE, 0x800, TO)),
    "unlink-cuts-leaf": Breach(lambda w: linked_leaf(w).unlink(PAGE, PAGE, TO)),
    "unlink-direction": Breach(lambda w: w.window(linked=2).unlink(PAGE, PAGE, FROM)),
    "unlink-attrs": Breach(lambda w: w.window(linked=2).unlink(PAGE, PAGE, TO, Attrs.MMIO)),
    "destroy-length": Breach(lambda w: w.window(linked=3).destroy(2 * PAGE, TO), STRICT),
    "free-while-linked": Breach(lambda w: w.window(linked=1).free()),
    "use-before-sync": Breach(used_unsynced),
    "device-access": Breach(lambda w: w.device.dma_read(w.pages[0], 8), DIRECT),
    "device-access-direction": Breach(lambda w: w.device.dma_write(map_one(w), b"x"), DIRECT),
    "legal-link-refused": Breach(empty_middle, {"defects": "bounce-links-empty-middle"}, UNTRUSTED),
    "failed-link-damage": Breach(
        tail_without_slot, {"defects": "bounce-unwind-from-zero", "swiotlb": "256K"}, UNTRUSTED
    ),
    "link-not-mapped": Breach(succeeded_in_name_only),
    "unlink-left-mapped": Breach(
        lambda w: linked_leaf(w).unlink(PAGE, PAGE, TO), {"defects": "unlink-cuts-large-leaf"}
    ),
    "unlink-lost-neighbour": Breach(
        lambda w: linked_leaf(w).unlink(0, PAGE, TO), {"defects": "unlink-cuts-large-leaf"}
    ),
    "window-freed-partly": Breach(partly_destroyed, {"defects": "partial-destroy-frees-wrong-size", **STRICT}),
    "slot-freed-while-mapped": Breach(slots_first, {"defects": "unlink-frees-slots-before-unmap"}, UNTRUSTED),
    "sg-output": Breach(lambda w: bridged_sg(w, one_switch=True), {"defects": "sg-bus-entry-length-of-head"}),
}

# Rules that mode "raise" cannot reach because it stops at the one before: the caller's cut of a leaf comes first.
AFTER_ANOTHER = {"unlink-left-mapped": "unlink-cuts-leaf", "unlink-lost-neighbour": "unlink-cuts-leaf"}
# Rules that the calls keep themselves, with the same name, before the checker is asked.
KEPT_BY_THE_CALL = {"stale-state", "outside-window"}


def test_every_rule_has_a_breach() -> None:
    assert list(BREACHES) == list(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_mode_raise_stops_the_breach_and_names_the_rule(rule: str) -> None:
    breach = BREACHES[rule]
    world = build("raise", breach.machine, breach.device)
    with pytest.raises(MisuseError) as caught:
        breach.act(world)
    assert caught.value.rule == AFTER_ANOTHER.get(rule, rule)
    if rule not in KEPT_BY_THE_CALL and rule not in AFTER_ANOTHER:
        assert str(caught.value).endswith(f"[{rule}: {RULES[rule].text}]")


@pytest.mark.parametrize("rule", sorted(set(RULES) - KEPT_BY_THE_CALL))
def test_mode_collect_reports_the_breach_and_goes_on(rule: str) -> None:
    breach = BREACHES[rule]
    world = build("collect", breach.machine, breach.device)
    with suppress(DmakitError):  # the stack's own refusal
        breach.act(world)
    assert rule in world.checker.rules_broken()
    assert world.checker.reports[0].device in ("dev", "bus", "bridge")


def test_a_stopped_breach_has_changed_nothing() -> None:
    """Rules that are checked before the call: the mapping is still there and still whole."""
    world = build("raise")
    state = world.window(linked=4)
    before = world.machine.live(), [world.device.iova_to_phys(state.addr + n * PAGE) for n in range(8)]
    for wrong in (
        lambda: state.link(world.pages[5], PAGE, PAGE, TO),
        lambda: state.unlink(PAGE, 0x800, TO),
        lambda: state.unlink(PAGE, PAGE, FROM),
        lambda: state.destroy(3 * PAGE, TO),
        lambda: state.free(),
    ):
        with pytest.raises(MisuseError):
            wrong()
    assert before == (world.machine.live(), [world.device.iova_to_phys(state.addr + n * PAGE) for n in range(8)])
    state.destroy(4 * PAGE, TO)
    world.device.release()


def test_a_refused_unmap_of_a_list_leaves_it_mapped_for_the_checker_too() -> None:
    w = build("raise")
    sg = w.device.map_sg([(w.pages[0], PAGE)], BIDI)
    with pytest.raises(MisuseError, match=r"^cpu=999: must be 0 to 0, a CPU of the machine$"):
        w.device.unmap_sg(sg, cpu=999)
    w.device.unmap_sg(sg)
    w.device.release()


def test_a17_the_alignment_contract_is_kept_by_errors_and_named_by_the_checker() -> None:
    """A bad start is -EIO from link itself, a bad interior end only the checker sees; the entries stay as they were."""
    plain = build("collect", {"checker": None})
    state = plain.window(linked=1)
    entries = plain.machine.ledger.snapshot()["pte_set_1"]
    with pytest.raises(MisuseError, match=r"phys starts 0x200 into a granule of 0x1000 at an offset above 0") as caught:
        state.link(plain.pages[1] + 0x200, PAGE, PAGE, TO)
    assert caught.value.errno_name == "EIO"
    assert plain.machine.ledger.snapshot()["pte_set_1"] == entries
    assert plain.device.iova_to_phys(state.addr) == plain.pages[0]
    assert plain.device.iova_to_phys(state.addr + PAGE) == 0

    world = build("raise")
    state = world.device.try_alloc(0, 4 * PAGE)
    state.link(world.pages[0], 0, 0x600, TO)
    before = world.machine.ledger.snapshot()
    with pytest.raises(MisuseError, match=r"follows \[0x0, 0x600\), which ends inside a granule") as caught:
        state.link(world.pages[1], PAGE, PAGE, TO)
    assert caught.value.rule == "unaligned-interior"
    assert world.machine.ledger.snapshot() == before
    state.destroy(0x600, TO)


@pytest.mark.parametrize("machine", [{}, STRICT, DIRECT, {"iommu": "x86"}, {"coherent": False}], ids=str)
@pytest.mark.parametrize("device", [{}, UNTRUSTED], ids=str)
def test_correct_use_breaks_no_rule(machine: dict[str, Any], device: dict[str, Any]) -> None:
    world = build("raise", machine, device)
    dev, pages = world.device, world.pages
    with dev:
        for direction in (BIDI, TO, FROM):
            addr = dev.map_phys(pages[0] + 0x100, 0x700, direction)
            dev.sync_single_for_cpu(addr, 0x700, direction)
            dev.sync_single_for_device(addr + 0x10, 0x20, direction)
            dev.unmap_phys(addr, 0x700, direction)
            sg = dev.map_sg([(page, PAGE) for page in pages[1:6]], direction)
            dev.sync_sg_for_cpu(sg)
            dev.unmap_sg(sg)
        with dev.alloc_coherent(3 * PAGE) as memory:
            dev.dma_write(memory.addr + 5, b"shared")
        with dev.try_alloc(pages[0] + 0x400, 4 * PAGE) as state:
            if state:
                state.link(pages[0] + 0x400, 0, PAGE - 0x400, FROM)
                state.link(pages[1], PAGE - 0x400, PAGE, FROM)
                state.link(pages[2], 2 * PAGE - 0x400, 0x123, FROM)
                state.sync()
                dev.dma_write(state.addr, bytes(range(200)))
                state.unlink(PAGE - 0x400, PAGE, FROM)
                state.link(pages[3], PAGE - 0x400, PAGE, FROM)
                state.sync()
    assert world.checker.reports == []


def test_p2p_bridge_entry_without_an_address_is_named() -> None:
    world = build("collect", {**DIRECT, "defects": "direct-sg-host-bridge-without-address"})
    bridged_sg(world, one_switch=False)
    assert world.checker.rules_broken() == ["sg-output"]


DEFECT_FINDINGS: dict[str, tuple[str, Callable[[World], object]]] = {
    "1": ("window-freed-partly", partly_destroyed),
    "2": ("legal-link-refused", empty_middle),
    "3": ("failed-link-damage", tail_without_slot),
    "4": ("link-not-mapped", succeeded_in_name_only),
    "5a": ("sg-output", lambda w: bridged_sg(w, one_switch=False)),
    "5b": ("sg-output", lambda w: bridged_sg(w, one_switch=True)),
    "6": ("overlapping-link", lambda w: [w.window().link(page, 0, PAGE, TO) for page in w.pages[:2]]),
    "7": ("unaligned-interior", head_then_more),
    "8": ("slot-freed-while-mapped", slots_first),
    "9": ("unlink-cuts-leaf", lambda w: linked_leaf(w).unlink(PAGE, PAGE, TO)),
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_each_known_defect_is_caught_when_it_is_switched_on(defect: Any) -> None:
    """4 is one of formats that are not here, 6 and 7 are callers' own: their scenario is what they do."""
    rule, act = DEFECT_FINDINGS[defect.number]
    machine: dict[str, Any] = {"defects": defect.name, "mode": "strict", "swiotlb": "256K"}
    if defect.number == "5a":
        machine["iommu"] = "none"
    device = UNTRUSTED if defect.number in ("2", "3", "8") else {}
    world = build("collect", machine, device)
    if defect.number == "6":
        state = world.window()
        for page in world.pages[:2]:
            with suppress(DmakitError):
                state.link(page, 0, PAGE, TO)
    else:
        with suppress(DmakitError):
            act(world)
    assert rule in world.checker.rules_broken()


@pytest.mark.parametrize("number", ["1", "2", "3", "5a", "5b", "8"])
def test_without_the_defect_the_same_calls_break_no_rule(number: str) -> None:
    _, act = DEFECT_FINDINGS[number]
    machine: dict[str, Any] = {"mode": "strict", "swiotlb": "256K"}
    if number == "5a":
        machine["iommu"] = "none"
    world = build("collect", machine, UNTRUSTED if number in ("2", "3", "8") else {})
    with suppress(DmakitError):
        act(world)
    assert world.checker.reports == []


def test_the_modes_are_two() -> None:
    with pytest.raises(MisuseError, match=r"^mode='warn': must be 'raise' or 'collect'$"):
        ContractChecker("warn")


def test_events_reach_the_machines_list_through_the_checkers_watch() -> None:
    world = build("raise", {}, UNTRUSTED)
    events: list[Any] = []
    world.machine.record_events(events)
    slots_first(world)
    names = [event[0] for event in events]
    assert names.count("tblmap") == names.count("tblunmap") == 1
    assert names.index("unmap") < names.index("tblunmap")


def test_the_documentation_lists_every_rule_in_its_words() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "contract_checker.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    expected = [
        f"| `{name}` | {rule.text} |{f' {rule.debug} |' if rule.debug else ' |'}" for name, rule in RULES.items()
    ]
    assert rows == expected


def test_a_device_may_cross_from_one_mapping_into_the_next_but_not_beyond() -> None:
    machine = Machine(ram="256M", mode="strict", checker=True)
    device = machine.device("nvme0")
    pages = [machine.pages.alloc() for _ in range(3)]
    addrs = sorted(device.map_phys(phys, 4096, Direction.FROM_DEVICE) for phys in pages)
    assert addrs[2] - addrs[0] == 2 * 4096  # top down, side by side
    device.dma_write(addrs[0], bytes(3 * 4096))
    books = machine.checker
    with pytest.raises(MisuseError, match="device-access:"):
        books.accessed(device, addrs[0] - 1, 4096, True)
    with pytest.raises(MisuseError, match="device-access:"):
        books.accessed(device, addrs[2], 4097, True)
    for addr in addrs:
        device.unmap_phys(addr, 4096, Direction.FROM_DEVICE)
