"""A recording that begins in mid-life: what it cannot tell is adopted and counted, never called matched.

A file that was cut at its beginning names devices, buffers and slots that it never set up, and its first answers depend
on allocations that it does not show. ``UnknownState`` gives such steps what the record itself tells:

* a device number gets the device whose IOVA domain the step's events name (the boot file knows it), else a new one;
* a buffer's address is the recorded ``phys``;
* a slot whose ``try`` is missing gets a window at the recorded address, with the recorded translations behind it;
* a device whose first recorded allocation is not what a fresh IOVA space answers was in use before: from then on its
  allocations that differ are adopted.

A file that begins at step 1 has no unknown slots: using one is an error of the file.
"""

from __future__ import annotations

import re
from typing import Any

from dmakit.errors import InputError
from dmakit.trace.step_adopt import adopt_tables, frees, is_allocated, make_next
from dmakit.trace.step_bench import Bench, Slot
from dmakit.trace.step_events import Event
from dmakit.trace.step_file import Step, StepFile

ALLOCATING = frozenset({"try", "map", "sg"})
USING = frozenset({"link", "sync", "unlink", "destroy", "free", "unmap", "unsg", "look", "leaf"})
SIZE_BITS = (1 << 63) - 1


class UnknownState:
    """What a file does not tell about its beginning; ``adopted`` counts how often something had to be adopted."""

    def __init__(self, file: StepFile, bench: Bench) -> None:
        self.file = file
        self.bench = bench
        self.late = file.steps[0].n > 1
        self.adopted = 0
        self._used_before: dict[str, bool] = {}
        self._numbers = {int(step.words[2], 0) for step in file.steps if step.op in ALLOCATING}

    def prepare(self, step: Step) -> None:
        """Give the step the device that it names; InputError when a file from step 1 on never took it."""
        number = self._device_number(step)
        if number is not None and number not in self.bench.devices:
            self._check_late(step, f"device {number}")
            self.bench.devices[number] = self.bench.device(self._device_name(number))
        if self.late and step.op in ALLOCATING:
            self._remember(step)

    def _remember(self, step: Step) -> None:
        """Inputs that were set before the file began: the range a slot reports, the limits of scatterlists."""
        slot = self.bench.slot(step.words[1])
        if not slot.span and step.record.get("ret", 1) <= 0 and "base" in step.record:
            slot.base, slot.span = step.record["base"], step.record["span"]
        if "max_seg" in step.record:
            device = self.bench.devices[int(step.words[2], 0)]
            device.set_max_segment(step.record["max_seg"])
            device.set_boundary(step.record["boundary"])

    def adopts_slot(self, step: Step) -> bool:
        """True when the step uses a slot from before the recording: it is adopted instead of run."""
        if step.op not in USING or step.skipped:
            return False
        slot = self.bench.slot(step.words[1])
        if slot.device >= 0:
            return False
        self._check_late(step, f"slot {step.words[1]}")
        self.adopted += 1
        if step.record.get("size") and len(self._numbers) == len(self.bench.devices) == 1:
            self._adopt_window(step, slot)
        return True

    def _adopt_window(self, step: Step, slot: Slot) -> None:
        """A live window at the recorded address, of the only device that the file uses."""
        ((slot.device, device),) = self.bench.devices.items()
        addr, size = step.record["addr"], step.record["size"] & SIZE_BITS
        held = make_next(device.iovad, step.cpu, addr >> 12, (addr & 4095) + size + 4095 >> 12)
        slot.state = device.try_alloc(addr & 4095, size, cpu=step.cpu)
        for lo in held:
            device.iovad.free(lo)
        slot.base, slot.span = step.record.get("base", 0), step.record.get("span", 0)
        adopt_tables(self.bench, slot, step.record.get("tr", []))

    def adopts_allocation(self, device: Any, ours: list[Event], kernel: list[Event]) -> bool:
        """Is this difference of allocations one of unknown state? Decided by the device's first allocation."""
        answers = [[event for event in events if event[0] == "af_out"] for events in (ours, kernel)]
        differs = answers[0] != answers[1]
        return self._used_before.setdefault(device.name, self.late or differs) and differs

    def adopts_flush(self, device: Any, ours: list[Event], kernel: list[Event]) -> bool:
        """Did a timer free ranges that were queued before the recording began? Asked before they are adopted."""
        known = frees(ours)
        strangers = [pfn for pfn, pages in frees(kernel) if (pfn, pages) not in known]
        if not self._used_before.get(device.name, self.late) or not strangers:
            return False
        unknown = not any(is_allocated(device.iovad, pfn) for pfn in strangers)
        self.adopted += unknown
        return unknown

    def adopts_table(self, ours: list[Event], kernel: list[Event]) -> bool:
        """Did a large leaf of a late file replace a table that an earlier, unrecorded link had left empty?"""
        flush = [event[0] for event in kernel[:3]] == ["tlbsync_in", "flush_range", "qi"]
        left_over = self.late and flush and kernel[3:] == ours
        self.adopted += left_over
        return left_over

    def saw_allocation(self, device: Any) -> None:
        """The device's allocation was the kernel's: if it was the first, its IOVA space was fresh."""
        self._used_before.setdefault(device.name, self.late)

    def _check_late(self, step: Step, what: str) -> None:
        if not self.late:
            raise InputError(
                f"{self.file.path}:{step.line}: {step.record['cmd']!r} uses {what}, which was never set up"
            )

    def _device_number(self, step: Step) -> int | None:
        if step.op in ALLOCATING:
            return int(step.words[2], 0)
        return int(step.words[1], 0) if step.op in ("mask", "seg", "minalign") else None

    def _device_name(self, number: int) -> str:
        """The device whose IOVA domain the number's first recorded allocation names, else a name of our own."""
        for step in self.file.steps:
            if step.op in ALLOCATING and int(step.words[2], 0) == number:
                for _, _, name, text in step.record.get("events", ()):
                    match = re.search(r"iovad=(0x[0-9a-f]+)", text) if name == "af_out" else None
                    if match and (device := self.bench.device_of_iovad(int(match[1], 16))) is not None:
                        return str(device.name)
        return f"device {number}"
