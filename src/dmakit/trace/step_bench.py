"""The bench on which a step file runs: a software machine set up like the recorded one.

What is *input* is taken from the recording: which devices exist and in which order they were attached (their domain
ids), reserved IOVA ranges (from the boot file), whether a device is trusted and its domain strict, physical addresses
of buffers and of the bounce pool, when a timer fired. What is *answer* comes from our stack.

``next_flush`` is the one place where time passes on purpose: the recording says after which call a flush queue's timer
had fired, not how long that took, so the virtual clock jumps to the timer that is due next.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmakit.errors import InputError
from dmakit.platform.soft import Machine
from dmakit.trace.step_events import COMPARED, Event, parse
from dmakit.trace.step_file import Step, StepFile, read_text

RAM = 6 << 30
POOL = (0x1_4000_0000, 0x2000_0000)  # tables: a part of RAM that no recording used for buffers
BOUNCE_SIZE = 64 << 20
FLUSH_WITHIN_NS = 10_000_000  # IOVA_FQ_TIMEOUT
ALL_ONES = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class BootDomain:
    """One domain as the boot trace shows it: its IOVA domain's name, devices, reserved pfn ranges (inclusive)."""

    iovad: int
    devices: tuple[str, ...]
    reserved: tuple[tuple[int, int], ...]


def read_boot(path: Path) -> list[BootDomain]:
    """The domains of a boot trace, in the order in which they were attached."""
    devices: dict[int, list[str]] = {}
    reserved: dict[int, list[tuple[int, int]]] = {}
    waiting: list[str] = []
    for line in read_text(path).splitlines():
        if match := re.search(r"attach_device_to_domain: .*device=(\S+)", line):
            waiting.append(match[1])
        elif match := re.search(r"\binit: .*iovad=(0x[0-9a-f]+)", line):
            devices[int(match[1], 16)], waiting = waiting, []
        elif match := re.search(r"\bres: .*iovad=(0x[0-9a-f]+) lo=(0x[0-9a-f]+) hi=(0x[0-9a-f]+)", line):
            iovad, lo, hi = (int(group, 16) for group in match.groups())
            reserved.setdefault(iovad, []).append((lo, hi))
    return [BootDomain(iovad, tuple(names), tuple(reserved.get(iovad, ()))) for iovad, names in devices.items()]


@dataclass(slots=True)
class Slot:
    """What the module's slot holds: one mapping of ``device``, and the page range [base, base + span) looked at."""

    device: int = -1
    state: Any = None
    mapping: Any = None
    segments: list[tuple[int, int]] = field(default_factory=list)
    addr: int = 0
    size: int = 0
    direction: int = 0
    attrs: int = 0
    base: int = 0
    span: int = 0

    def cover(self, addr: int, size: int) -> None:
        """Look at the pages of [addr, addr + size) from now on (at most 8 MiB, as the module does)."""
        self.base = addr & ~4095
        self.span = min(size & ALL_ONES, 8 << 20) + (addr & 4095) + 4095 & ~4095

    def translation(self, runs: list[list[int]], offset: int) -> int | None:
        """The physical address at ``offset`` from the base in ``runs`` of a look, or None."""
        return next((phys + offset - at for at, phys, size in runs if at <= offset < at + size), None)


class Bench:
    """The machine, its devices by number, buffers and slots of a step file."""

    def __init__(self, file: StepFile, boot: Path | None, defects: tuple[str, ...]) -> None:
        recorded = file.events()
        self.file = file
        self.boot = read_boot(boot) if boot else []
        strict = [step.record.get("domain_type") == 3 for step in file.steps if step.op == "dev"]
        self.machine = Machine(
            ram=RAM,
            cpus=1 + max((step.cpu for step in file.steps), default=0),
            iommu="vtd",
            mode="strict" if all(strict) else "lazy",
            caching_mode=any(event[2] == "cache_tag_flush_range_np" for event in recorded),
            swiotlb=(_bounce_start(recorded), BOUNCE_SIZE),
            pool=POOL,
            defects=defects,
        )
        self.events: list[Event] = []
        self.machine.record_events(self.events)
        self.devices: dict[int, Any] = {}
        self.attached: dict[str, Any] = {}
        self.buffers: dict[int, int] = {}
        self.slots: dict[int, Slot] = {}
        self._iovads: dict[int, Any] = {}
        self._attach_in_boot_order()

    def _attach_in_boot_order(self) -> None:
        """Give every domain of the boot file its place, so that domain ids count as the kernel's did."""
        untrusted = {f"0000:{s.words[2]}" for s in self.file.steps if s.op == "dev" and s.record.get("untrusted")}
        for domain in self.boot:
            name = domain.devices[0]
            device = self.machine.device(name, trusted=name not in untrusted)
            for lo, hi in domain.reserved:
                device.iovad.reserve(lo, hi)
            self._iovads[domain.iovad] = device
            self.attached.update(dict.fromkeys(domain.devices, device))

    def device(self, step: Step) -> Any:
        """The device that a ``dev`` step names (attached now when no boot file knew it)."""
        name = f"0000:{step.words[2]}"
        if name not in self.attached:
            self.attached[name] = self.machine.device(name, trusted=not step.record.get("untrusted"))
        return self.attached[name]

    def owner_of_timer(self, timer: int) -> Any:
        """The device whose flush queue has this timer (it lies inside the kernel's IOVA domain); None if unknown."""
        below = [iovad for iovad in self._iovads if 0 <= timer - iovad < 4096]
        return self._iovads[max(below)] if below else next(iter(self.devices.values()), None)

    def slot(self, word: str) -> Slot:
        """The slot of a command's word."""
        return self.slots.setdefault(int(word, 0), Slot())

    def take_events(self) -> list[Event]:
        """The machine's events since the last call, and forget them."""
        taken = list(self.events)
        self.events.clear()
        return taken

    def tick(self) -> None:
        """Let a moment pass, so that timers armed by different calls are due one after the other."""
        self.machine.clock.advance(1)

    def next_flush(self) -> list[Event]:
        """Jump to the flush-queue timer that is due next; its events, nothing when none is armed."""
        clock = self.machine.clock
        limit = clock.now + FLUSH_WITHIN_NS
        while (due := clock.next_due()) is not None and due <= limit:
            clock.advance(due - clock.now)
            if any(event[0] == "fqto_in" for event in self.events):
                break
        return self.take_events()

    def look(self, slot: Slot) -> list[list[int]]:
        """Runs [offset from base, phys, length] of translations in the slot's range, as iommu_iova_to_phys answers."""
        runs: list[list[int]] = []
        domain = self.devices[slot.device].domain
        for offset, size, phys in _pieces(domain, slot):
            if runs and runs[-1][0] + runs[-1][2] == offset and runs[-1][1] + runs[-1][2] == phys:
                runs[-1][2] += size
            else:
                runs.append([offset, phys, size])
        for offset, phys, _ in runs:
            if (found := domain.iova_to_phys(slot.base + offset)) != phys:
                raise InputError(f"iova {slot.base + offset:#x}: the leaf says {phys:#x}, iova_to_phys {found:#x}")
        return runs

    def leaves(self, slot: Slot) -> list[dict[str, Any]]:
        """Leaf entries that begin in the slot's range, runs of the same kind folded, as the recorder folds them."""
        rows: list[list[int]] = []
        for iova, size, entry in self.devices[slot.device].domain.leaves(slot.base, slot.span):
            offset = iova - slot.base
            if offset < 0:
                continue
            last = rows[-1] if rows else None
            if last and last[2] == size and last[3] & 0xFFF == entry & 0xFFF and last[0] + last[1] * size == offset:
                last[1] += 1
            else:
                rows.append([offset, 1, size, entry])
        return [
            {"off": offset, "count": count, "level": int(entry >> 7 & 1), "first_entry": f"{entry:x}"}
            for offset, count, _, entry in rows
        ]


def _pieces(domain: Any, slot: Slot) -> list[tuple[int, int, int]]:
    """(offset, size, phys) of each leaf's part inside the slot's range."""
    end = slot.base + slot.span
    pieces = []
    for iova, size, entry in domain.leaves(slot.base, slot.span):
        start, stop = max(iova, slot.base), min(iova + size, end)
        phys = (entry & 0x000F_FFFF_FFFF_F000 & ~(size - 1)) + start - iova
        pieces.append((start - slot.base, stop - start, phys))
    return pieces


def _bounce_start(recorded: list[list[Any]]) -> int:
    """Where the recorded bounce pool begins: its first slot is the first one handed out (a 64 MiB pool below 2 GiB)."""
    for _, _, name, text in recorded:
        if name == "tblmap_out" and (event := parse(name, text)) is not None and event[3] != ALL_ONES:
            return int(event[3]) & ~4095
    return 0x7BFD_D000


def compared(events: list[Event]) -> list[Event]:
    """Those of the machine's events that a comparison looks at."""
    return [tuple(event) for event in events if event[0] in COMPARED]
