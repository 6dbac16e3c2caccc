"""The bench on which a step file runs: the recorded machine with the recorder's devices, buffers and slots."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmakit.trace.recorded_machine import ALL_ONES, BOUNCE_START, RecordedMachine, Setup, first_domain_id
from dmakit.trace.step_events import parse
from dmakit.trace.step_file import Step, StepFile


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


class Bench(RecordedMachine):
    """The machine, its devices by the recorder's number, buffers and slots of a step file."""

    def __init__(self, file: StepFile, boot: Path | None, defects: tuple[str, ...]) -> None:
        recorded = file.events()
        attached = [step for step in file.steps if step.op == "dev"]
        setup = Setup(
            boot=boot,
            untrusted=frozenset(device_name(step) for step in attached if step.record.get("untrusted")),
            strict=_strict(attached, recorded),
            caching_mode=any(event[2] == "cache_tag_flush_range_np" for event in recorded),
            cpus=1 + max((step.cpu for step in file.steps), default=0),
            bounce_start=_bounce_start(recorded),
            highest_phys=max(
                (step.record["phys"] + step.record["len"] for step in file.steps if step.op == "buf"), default=0
            ),
            first_domain_id=first_domain_id(boot, (e for _, _, name, text in recorded if (e := parse(name, text)))),
            defects=defects,
        )
        super().__init__(setup)
        self.file = file
        self.devices: dict[int, Any] = {}
        self.buffers: dict[int, int] = {}
        self.slots: dict[int, Slot] = {}

    def slot(self, word: str) -> Slot:
        """The slot of a command's word."""
        return self.slots.setdefault(int(word, 0), Slot())

    def look(self, slot: Slot) -> list[list[int]]:
        """Runs [offset from base, phys, length] of translations in the slot's range, as iommu_iova_to_phys answers."""
        runs: list[list[int]] = []
        domain = self.devices[slot.device].domain
        for offset, size, phys in _pieces(domain, slot):
            if runs and runs[-1][0] + runs[-1][2] == offset and runs[-1][1] + runs[-1][2] == phys:
                runs[-1][2] += size
            else:
                runs.append([offset, phys, size])
        for run in runs:
            run[1] = domain.iova_to_phys(slot.base + run[0])
        return runs

    def leaves(self, slot: Slot) -> list[dict[str, Any]]:
        """Leaf entries that begin in the slot's range; runs of 4 KiB leaves folded, as the recorder folds them."""
        rows: list[list[int]] = []
        for iova, _, size, _, entry in self.devices[slot.device].domain.table.leaves(slot.base, slot.span):
            offset = iova - slot.base
            if offset < 0:
                continue
            last = rows[-1] if rows else None
            if (
                last
                and last[2] == size == 4096
                and (last[3] ^ entry) & 0xFFF == 0
                and last[0] + last[1] * size == offset
            ):
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
    for leaf in domain.table.leaves(slot.base, slot.span):
        start, stop = max(leaf.iova, slot.base), min(leaf.iova + leaf.size, end)
        pieces.append((start - slot.base, stop - start, leaf.phys + start - leaf.iova))
    return pieces


def _strict(attached: list[Step], recorded: list[list[Any]]) -> bool:
    """Was every domain strict? Without ``dev`` steps (a cut file): did no flush-queue timer fire?"""
    if attached:
        return all(step.record.get("domain_type") == 3 for step in attached)
    return not any(event[2] == "fqto_in" for event in recorded)


def _bounce_start(recorded: list[list[Any]]) -> int:
    """Where the recorded bounce pool begins: its first slot is the first one handed out (a 64 MiB pool below 2 GiB)."""
    for _, _, name, text in recorded:
        if name == "tblmap_out" and (event := parse(name, text)) is not None and event[3] != ALL_ONES:
            return int(event[3]) & ~4095
    return BOUNCE_START


def device_name(step: Step) -> str:
    """The PCI name of a ``dev`` step."""
    return f"0000:{step.words[2]}"
