"""After a difference: bring our stack to the kernel's answer, so that the next step starts from the same state.

Three things can be apart: page-table entries behind a slot's range, the allocator (an IOVA freed with another size, or
not at all), and bytes. Adopting undoes what ours did from the first difference on and does what the kernel did:

* tables: unmap the leaves of the range, then map the kernel's runs again, one map a run (so a run that was one large
  leaf is one again);
* frees: a free of up to 32 pages went on top of a magazine, so taking it back is an allocation of that size; a larger
  one removed its tree node, so taking it back reserves the range. Then the kernel's frees are done in its order;
* an IOVA that the allocator answered differently: ours is given back to the tree, the kernel's is made the one that the
  allocator must hand out next, and the step runs again.

What was adopted is counted by the caller; nothing adopted counts as matched.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

from dmakit.consts import PROT_READ, PROT_WRITE
from dmakit.errors import ExhaustedError, MisuseError
from dmakit.trace.recorded_machine import ALL_ONES
from dmakit.trace.step_bench import Bench, Slot
from dmakit.trace.step_commands import Answer, Commands
from dmakit.trace.step_events import Event
from dmakit.trace.step_file import Step

CACHED_PAGES = 32  # the largest IOVA that magazines hold
Hints = tuple[int, int, int]
PROT_OF_DIRECTION = {0: PROT_READ | PROT_WRITE, 1: PROT_READ, 2: PROT_WRITE, 3: 0}


def frees(events: list[Event]) -> list[tuple[int, int]]:
    """(pfn, pages) of every free in a list of events."""
    return [(event[1], event[2]) for event in events if event[0] == "ff_in"]


def adopt_frees(iovad: Any, cpu: int, ours: list[Event], kernel: list[Event], hints: Hints) -> None:
    """Make the frees of ``kernel`` true instead of those of ``ours``; ``hints`` of the search from before them."""
    if frees(ours) == frees(kernel):
        return
    for pfn, pages in reversed(frees(ours)):
        take_back(iovad, cpu, pfn, pages)
    iovad.search._set_hints(hints)
    for pfn, pages in frees(kernel):
        if not is_allocated(iovad, pfn):  # from before the recording
            iovad.reserve(pfn, pfn + pages - 1)
        put(iovad, cpu, pfn, pages)


def put(iovad: Any, cpu: int, pfn: int, pages: int) -> None:
    """Free as the kernel does, without asking whether a node is there (after a partial destroy none may be)."""
    iovad.free_batch(array("Q", [pfn]), array("Q", [pages]), cpu=cpu)


def is_allocated(iovad: Any, pfn: int) -> bool:
    """Does a node of our tree hold ``pfn``?"""
    return any(lo <= pfn <= hi for lo, hi in iovad.nodes())


def take_back(iovad: Any, cpu: int, pfn: int, pages: int) -> None:
    """Undo ``free_fast(cpu, pfn, pages)``: the range is allocated again, wherever the free has put it."""
    if pages > CACHED_PAGES:
        iovad.reserve(pfn, pfn + pages - 1)
        return
    rounded = 1 << (pages - 1).bit_length()
    if not pull(iovad, cpu, pfn, rounded):
        iovad.reserve(pfn, pfn + rounded - 1)


def adopt_tables(bench: Bench, slot: Slot, runs: list[list[int]]) -> None:
    """Make the translations of the slot's range those of ``runs`` ([offset, phys, length])."""
    domain = bench.devices[slot.device].domain
    prot_at: dict[int, int] = {}
    for leaf in domain.table.leaves(slot.base, slot.span):
        prot_at[leaf.iova] = leaf.entry & (PROT_READ | PROT_WRITE)
        domain.unmap(leaf.iova, leaf.size)
    prot = next(iter(prot_at.values()), PROT_OF_DIRECTION[slot.direction])
    for offset, phys, size in runs:
        prot = prot_at.get(slot.base + offset, prot)
        domain.map(slot.base + offset, phys, size, prot)
    bench.take_events()


def adopt_bytes(bench: Bench, phys: int, runs: list[list[int]]) -> None:
    """Write the kernel's bytes ([offset, length, byte] runs) to memory."""
    for offset, length, byte in runs:
        bench.machine.memory.fill(phys + offset, length, byte)


def adopt_window(commands: Commands, slot: Slot, step: Step, kernel: list[Event]) -> Answer | None:
    """Give the slot the IOVA that the kernel's step got (none when the kernel's allocation failed).

    Returns the answer of the step that ran again with it.
    """
    again = None
    bench = commands.bench
    device = bench.devices[slot.device]
    _give_up_window(slot, step, device, commands.from_tree)
    answered = [(event[3], event[1]) for event in kernel if event[0] == "af_out" and event[3]]
    if len(answered) == 1:
        pfn, pages = answered[0]
        held = make_next(device.iovad, step.cpu, pfn, pages)
        again = commands.run(step)
        for lo in held:
            device.iovad.free(lo)
    bench.take_events()
    return again


def _give_up_window(slot: Slot, step: Step, device: Any, from_tree: bool) -> None:
    """Undo our side of a ``try``, ``map`` or ``sg`` step that succeeded."""
    if step.op == "try" and slot.state:
        pages = (slot.state.addr & 4095) + slot.state.size + 4095 >> 12
        give_back(device, step.cpu, slot.state.addr, pages, slot.state.free, from_tree)
    elif step.op == "map" and slot.addr != ALL_ONES:
        pages = (slot.addr & 4095) + slot.size + 4095 >> 12
        undo = partial(device.unmap_phys, slot.addr, slot.size, slot.direction, slot.attrs, cpu=step.cpu)
        give_back(device, step.cpu, slot.addr, pages, undo, from_tree, mapped=True)
    elif step.op == "sg" and slot.mapping is not None:
        undo = partial(device.unmap_sg, slot.mapping, cpu=step.cpu)
        pages = slot.span >> 12
        give_back(device, step.cpu, slot.base, pages, undo, from_tree, mapped=True)
        slot.mapping = None


def give_back(
    device: Any, cpu: int, addr: int, pages: int, undo: Callable[[], Any], from_tree: bool, *, mapped: bool = False
) -> None:
    """Undo what took the IOVA at ``addr``: it goes back to where it came from, a magazine or the tree.

    ``undo`` is the API's way; something ``mapped`` on a lazy device is taken down under the API instead, because the
    flush queue would keep the IOVA: as if it had never been mapped.
    """
    if mapped and device.flush_queue is not None:
        device.domain.unmap(addr & ~4095, pages << 12)
        put(device.iovad, cpu, addr >> 12, pages)
    else:
        undo()
    if from_tree and pages <= CACHED_PAGES:
        take_back(device.iovad, cpu, addr >> 12, pages)
        device.iovad.free(addr >> 12)


def make_next(iovad: Any, cpu: int, pfn: int, pages: int) -> list[int]:
    """Make ``pfn`` what the next allocation of ``pages`` gets; returns ranges (by first pfn) to free afterwards.

    A cacheable size goes on top of the magazine. A larger one comes from the tree, which answers from the top down:
    with every gap above reserved for the moment, the wanted range is the highest that fits.
    """
    if pages <= CACHED_PAGES:
        rounded = 1 << (pages - 1).bit_length()
        if not pull(iovad, cpu, pfn, rounded):
            iovad.reserve(pfn, pfn + rounded - 1)
        put(iovad, cpu, pfn, rounded)
        return []
    held = []
    above = pfn + pages
    for lo, hi in [
        *sorted(node for node in iovad.nodes() if node[0] >= above),
        (iovad.highest_pfn + 1, iovad.highest_pfn + 1),
    ]:
        if lo > above:
            iovad.reserve(above, lo - 1)
            held.append(above)
        above = hi + 1
    return held


def pull(iovad: Any, cpu: int, pfn: int, rounded: int) -> bool:
    """Take ``pfn`` out of the magazine or depot that holds it, this CPU's first; false when none does.

    Ranges are taken from a CPU's magazines until it comes, or one that was in none; the others go back in their order.
    """
    cached = {lo for lo, size in iovad.cached_pfns() if size == rounded}
    if pfn not in cached:
        return False
    found = 0
    for on in (cpu, *(other for other in range(iovad.cpus) if other != cpu)):
        popped: list[int] = []
        while (found := _next(iovad, on, rounded)) in cached and found != pfn:
            popped.append(found)
        if found and found not in cached:
            iovad.free(found)
        for other in reversed(popped):
            put(iovad, on, other, rounded)
        if found == pfn:
            break
    return True  # a range in no magazine of a CPU on line is in a depot, where the first CPU looks


def _next(iovad: Any, cpu: int, size: int) -> int:
    """The next allocation; 0 where nothing is left, or for a CPU off line."""
    try:
        return int(iovad.alloc_fast(size, iovad.highest_pfn, False, cpu=cpu))
    except (ExhaustedError, MisuseError):
        return 0
