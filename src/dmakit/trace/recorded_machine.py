"""A software machine set up like a recorded one.

What is *input* is taken from the recording: which devices exist and in which order they were attached (their domain
ids), reserved IOVA ranges (from the boot file), whether a device is trusted and its domain strict, physical addresses
of buffers and of the bounce pool, when a timer fired. What is *answer* comes from our stack.

Time: the recording says after which call, and on which CPU, a flush queue's timer had fired, not how long that took.
``flush`` runs that timer then and there, if ours is armed too; recorded pauses (``wait``) advance the virtual clock,
so a timer of ours that the kernel's did not have goes off there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmakit.platform.soft import BRIDGE_WINDOWS, HIGH_RAM_START, LOW_RAM_END, MSI_WINDOW, Machine
from dmakit.trace.columns import load
from dmakit.trace.step_events import COMPARED, Event
from dmakit.units import GIB, MIB

POOL_SIZE = 512 * MIB  # coherent memory: RAM above everything that the recording names; tables lie above it
BOUNCE_START = 0x7BFD_D000  # where a 64 MiB pool lay in every recording with RAM above 2 GiB
BOUNCE_SIZE = 64 * MIB
ALL_ONES = (1 << 64) - 1
FIRST_DOMAIN_ID = 2  # what a VT-d unit gives the first domain after boot


@dataclass(frozen=True, slots=True)
class Setup:
    """What a recording tells about its machine. Physical addresses lie below ``highest_phys``."""

    boot: Path | None
    untrusted: frozenset[str] = frozenset()
    strict: bool = False
    caching_mode: bool = False
    cpus: int = 1
    bounce_start: int = BOUNCE_START
    highest_phys: int = 0
    first_domain_id: int = FIRST_DOMAIN_ID
    attached: tuple[str, ...] = ()
    defects: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BootDomain:
    """One domain as the boot trace shows it: its IOVA domain's name, devices, reserved pfn ranges (inclusive)."""

    iovad: int
    devices: tuple[str, ...]
    reserved: tuple[tuple[int, int], ...]


def read_boot(path: Path) -> list[BootDomain]:
    """The domains of a boot trace, in the order in which they were attached; InputError when it cannot be read."""
    trace = load(path)
    attached, started, reserved = (trace.table(name) for name in ("attach_device_to_domain", "init_in", "res_in"))
    rows = [(int(seq), trace.word(int(device)), 0) for seq, device in zip(attached.seq, attached["dev"], strict=True)]
    rows += [(int(seq), "", int(iovad)) for seq, iovad in zip(started.seq, started["iovad"], strict=True)]
    ranges: dict[int, list[tuple[int, int]]] = {}
    for iovad, lo, hi in zip(*(reserved[column].tolist() for column in ("iovad", "lo", "hi")), strict=True):
        ranges.setdefault(iovad, []).append((lo, hi))
    domains: list[BootDomain] = []
    waiting: list[str] = []
    for _, device, iovad in sorted(rows):
        if device:
            waiting.append(device)
        elif waiting:
            domains.append(BootDomain(iovad, tuple(waiting), tuple(ranges.get(iovad, ()))))
            waiting = []
    return domains


class RecordedMachine:
    """The machine and its devices by name, its events collected in ``events``."""

    def __init__(self, setup: Setup) -> None:
        pool = (max(setup.highest_phys, HIGH_RAM_START) + GIB - 1) & ~(GIB - 1)
        self.setup = setup
        self.machine = Machine(
            ram=LOW_RAM_END + pool + GIB - HIGH_RAM_START,
            cpus=setup.cpus,
            iommu="vtd",
            mode="strict" if setup.strict else "lazy",
            caching_mode=setup.caching_mode,
            swiotlb=(setup.bounce_start, BOUNCE_SIZE),
            pool=(pool, POOL_SIZE),
            defects=setup.defects,
            reserved=() if setup.boot else (*BRIDGE_WINDOWS, MSI_WINDOW),
            unit_options={"first_domain_id": setup.first_domain_id},
        )
        self.events: list[Event] = []
        self.machine.record_events(self.events)
        self.attached: dict[str, Any] = {}
        self._iovads: dict[int, Any] = {}
        for domain in (
            read_boot(setup.boot) if setup.boot else ()
        ):  # in boot order: domain ids count as the kernel's did
            device = self.device(domain.devices[0])
            for lo, hi in domain.reserved:
                device.iovad.reserve(lo, hi)
            self._iovads[domain.iovad] = device
            self.attached.update(dict.fromkeys(domain.devices, device))
        for name in setup.attached:  # in this order their domains were made, and numbered
            self.device(name)

    def device(self, name: str) -> Any:
        """The device ``name``, attached now when the boot file did not have it."""
        if name not in self.attached:
            trusted = name not in self.setup.untrusted
            self.attached[name] = self.machine.device(name, trusted=trusted, unchecked=True)
        return self.attached[name]

    def device_of_iovad(self, iovad: int) -> Any:
        """The device of the kernel's IOVA domain ``iovad`` (its address in the trace); None when no boot file tells."""
        return self._iovads.get(iovad)

    def owner_of_timer(self, timer: int) -> Any:
        """The device whose flush queue has this timer (it lies inside the kernel's IOVA domain); any armed one
        when no boot file told which domain that is."""
        below = [iovad for iovad in self._iovads if 0 <= timer - iovad < 4096]
        if below:
            return self._iovads[max(below)]
        armed = [device for device in self.attached.values() if device.flush_queue and device.flush_queue.timer_on]
        return armed[0] if armed else None

    def take_events(self) -> list[Event]:
        """The machine's events since the last call, and forget them."""
        taken = list(self.events)
        self.events.clear()
        return taken

    def hints(self) -> dict[str, tuple[int, int, int]]:
        """Where the next search of each device's IOVA space starts."""
        return {name: device.iovad.search.hints() for name, device in self.attached.items()}

    def flush(self, timer: int, cpu: int) -> list[Event]:
        """Let the flush-queue timer run that the recording saw on ``cpu``; its events, nothing when it is not armed."""
        owner = self.owner_of_timer(timer)
        if owner is not None and owner.flush_queue is not None and owner.flush_queue.timer_on:
            owner.flush_queue.timeout(cpu=cpu)
        return self.take_events()


def boot_beside(path: Path) -> Path | None:
    """``NAME.boot.txt`` beside ``NAME.anything``, when it is there."""
    candidate = path.with_name(path.name.split(".")[0] + ".boot.txt")
    return candidate if candidate.exists() else None


def first_domain_id(boot: Path | None, events: Iterable[Event]) -> int:
    """The first device's domain id: counted from boot, or, when no boot file tells what was attached before it, the
    lowest id in the recorded IOTLB invalidations of one domain."""
    words = [] if boot else [int(event[1]) for event in events if event[0] == "qi"]
    return min((w >> 16 & 0xFFFF for w in words if w & 0xF == 2 and w >> 4 & 3 > 1), default=FIRST_DOMAIN_ID)


def compared(events: Iterable[Event]) -> list[Event]:
    """Those of the machine's events that a comparison looks at."""
    return [tuple(event) for event in events if event[0] in COMPARED]
