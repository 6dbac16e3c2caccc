"""The software machine: RAM, an IOMMU, bounce memory, caches and devices, put together as a PC is.

Physical addresses: RAM from 0 to at most 2 GiB, then the PCI hole, the rest of RAM from 4 GiB, and above it a window
for device BARs. The bounce pool lies at the top of low RAM. Page tables come from a part of RAM of their own, so
that the addresses of buffers do not depend on how they are mapped: two strategies see the same buffers.

PCI functions are plugged into slots (``plug``) and opened like real ones (``open``). Their register BARs lie in the PCI
hole, their memory BARs in the window above RAM.

Every device has its own domain, IOVA space and, in lazy mode, flush queue. Reserved in each IOVA space: the windows
of the host bridge (an IOVA there would reach a BAR, not memory) and the MSI window. As in Linux, an untrusted
device is strict whatever the mode, and so is everybody behind an IOMMU in caching mode.

Time is virtual: ``clock.advance`` fires flush-queue and depot timers; nothing else does. Everything that can run out
asks ``fail``; everything that costs is counted in ``ledger``.

    with Machine(mode="strict") as machine, machine.device("nvme0") as device:
        buffer = machine.buffer(64 << 10)
        ...

Models what firmware and ``drivers/iommu/dma-iommu.c`` (iommu_dma_init_domain, iova_reserve_pci_windows) set up.
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dmakit.clock import VirtualClock
from dmakit.consts import PAGE_SHIFT, PAGE_SIZE
from dmakit.dma.device import Device
from dmakit.errors import DmakitError, ExhaustedError, HostError, InputError, MisuseError
from dmakit.failpoint import FailPoint
from dmakit.iommu.domain import PageTableDomain
from dmakit.iommu.formats.vtdss import VtdSecondStage
from dmakit.iommu.formats.x86_64 import X86_64
from dmakit.iommu.gather import Gather
from dmakit.iommu.port import DirectPort, DmaPort
from dmakit.iommu.tables import TablePages
from dmakit.iommu.unit import IommuUnit
from dmakit.iova.domain import IovaDomain
from dmakit.iova.flush_queue import FlushQueue
from dmakit.ledger import Ledger
from dmakit.memory.buffers import Buffer, allocate
from dmakit.memory.cache import CpuCache
from dmakit.memory.pages import PageAllocator
from dmakit.memory.physical import PhysicalMemory, Region
from dmakit.swiotlb.bounce import Swiotlb
from dmakit.units import GIB, MIB, parse_size

if TYPE_CHECKING:
    from types import TracebackType

    from dmakit.platform.soft.device import Device as OpenDevice
    from dmakit.platform.soft.function import Function
    from dmakit.platform.soft.model import Model

LOW_RAM_END = 2 * GIB
HIGH_RAM_START = 4 * GIB
FIRST_USABLE = MIB
BAR_WINDOW = 64 * GIB
MSI_WINDOW = (0xFEE00, 0xFEEFF)
REGISTER_WINDOW = (0xC0000000, 0xFEC00000)
FIRST_SLOT, SLOTS = 4, 32
BRIDGE_WINDOWS = ((0xA0, 0xBF), (0x80000, 0xAFFFF), (0xC0000, 0xFEBFF))

IOMMUS = ("vtd", "x86", "none")
MODES = ("lazy", "strict", "passthrough")


def _bytes(name: str, value: int | str) -> int:
    size = parse_size(value) if isinstance(value, str) else value
    if not isinstance(size, int) or size < 0 or size % PAGE_SIZE:
        raise InputError(f"{name}={value!r}: must be a multiple of {PAGE_SIZE} bytes")
    return size


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise InputError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
    return value


class Machine:
    """A computer to map memory on. All arguments are keywords; sizes are bytes or text such as ``"4G"``.

    ``ram``, ``cpus``, ``nodes`` (NUMA nodes that share the RAM evenly), ``iommu`` (``vtd`` second stage, ``x86`` first
    stage, ``none``), ``mode`` (``lazy``, ``strict``, ``passthrough``), ``policy`` of the IOVA allocator, ``seed`` and
    ``fragmentation`` of page allocation, ``caching_mode``, ``coherent_walker``, ``levels`` of the page tables,
    ``swiotlb`` (size, (start, size), or 0 for none), ``force_bounce`` (swiotlb=force), ``coherent`` (False: devices do
    not snoop and the CPU has a write-back cache), ``checker`` (contract checker on), ``defects`` (names or kernel
    versions), ``pool`` ((start, size) to allocate buffers from), ``reserved`` (pfn ranges, inclusive, in every IOVA
    space), ``unit_options`` (of ``IommuUnit``).
    """

    def __init__(
        self,
        *,
        ram: int | str = "4G",
        cpus: int = 1,
        nodes: int = 1,
        iommu: str = "vtd",
        mode: str = "lazy",
        policy: str = "linux",
        seed: int = 0,
        fragmentation: float = 0.0,
        caching_mode: bool = False,
        coherent_walker: bool = True,
        levels: int = 4,
        swiotlb: int | str | tuple[int, int] = "64M",
        force_bounce: bool = False,
        coherent: bool = True,
        checker: Any = False,
        defects: Iterable[str] | str = (),
        pool: tuple[int, int] | None = None,
        reserved: Sequence[tuple[int, int]] = (*BRIDGE_WINDOWS, MSI_WINDOW),
        unit_options: dict[str, Any] | None = None,
    ) -> None:
        self.iommu, self.mode = _choice("iommu", iommu, IOMMUS), _choice("mode", mode, MODES)
        self.cpus, self.policy, self.coherent = cpus, policy, coherent
        self.force_bounce, self.defects, self.reserved = force_bounce, defects, tuple(reserved)
        self.levels, self.coherent_walker, self.caching_mode = levels, coherent_walker, caching_mode
        self.ledger, self.clock, self.fail = Ledger(cpus), VirtualClock(), FailPoint()
        self.devices: list[Device] = []
        self.functions: dict[str, Function] = {}
        self.opened: list[OpenDevice] = []
        self._next_window = REGISTER_WINDOW[0]
        self.events: list[Any] | None = None
        self.node_pages: list[PageAllocator] = []
        self._lay_out(_bytes("ram", ram), nodes, seed, fragmentation, swiotlb, pool)
        self.cache = None if coherent else CpuCache(self.memory)
        self.unit = None if self.iommu == "none" else self._make_unit(unit_options or {})
        self.tables = None if self.iommu == "none" else TablePages(self.table_pages, ledger=self.ledger)
        self.checker = self._make_checker(checker)

    def _make_unit(self, options: dict[str, Any]) -> IommuUnit:
        return IommuUnit(
            self.memory,
            ledger=self.ledger,
            caching_mode=self.caching_mode,
            coherent_walker=self.coherent_walker,
            **options,
        )

    # Memory ------------------------------------------------------------------------------------------------

    def _lay_out(
        self,
        ram: int,
        nodes: int,
        seed: int,
        fragmentation: float,
        swiotlb: int | str | tuple[int, int],
        pool: tuple[int, int] | None,
    ) -> None:
        if ram < 16 * MIB:
            raise InputError(f"ram={ram}: a machine needs at least {16 * MIB} bytes")
        low_end = min(ram, LOW_RAM_END)
        high_end = HIGH_RAM_START + ram - low_end if ram > low_end else 0
        self.bar_base = self._next_bar = -(-max(high_end, HIGH_RAM_START) // GIB) * GIB
        self.memory = PhysicalMemory(self.bar_base + BAR_WINDOW)
        main = (HIGH_RAM_START, high_end) if high_end else (FIRST_USABLE, low_end)
        self.memory.add_region(0, low_end, "ram", 0, "low RAM")
        self.swiotlb, low_end = self._make_swiotlb(swiotlb, low_end)
        if not high_end:
            main = (FIRST_USABLE, low_end)
        tables = min((main[1] - main[0]) // 8, 512 * MIB) // PAGE_SIZE * PAGE_SIZE
        self.table_pages = PageAllocator(self.memory, main[1] - tables, tables, fail=self.fail)
        main = (main[0], main[1] - tables)
        self._make_nodes(main, high_end, nodes, seed, fragmentation)
        self.low_pages: PageAllocator | None = None
        if high_end:
            self.low_pages = PageAllocator(self.memory, FIRST_USABLE, low_end - FIRST_USABLE, seed=seed, fail=self.fail)
        self.pages = self.node_pages[0]
        if pool is not None:
            self.pages = PageAllocator(
                self.memory, pool[0], pool[1], seed=seed, fragmentation=fragmentation, fail=self.fail
            )

    def _make_nodes(self, main: tuple[int, int], high_end: int, nodes: int, seed: int, fragmentation: float) -> None:
        share = (main[1] - main[0]) // max(nodes, 1) // (2 * MIB) * (2 * MIB)
        if nodes < 1 or share == 0:
            raise InputError(f"nodes={nodes}: must be at least 1, with 2 MiB of RAM each")
        for node in range(nodes):
            start = main[0] + node * share
            end = main[1] if node == nodes - 1 else start + share
            if high_end:
                last = high_end if node == nodes - 1 else end
                self.memory.add_region(start, last - start, "ram", node, f"node {node}")
            self.node_pages.append(
                PageAllocator(
                    self.memory,
                    start,
                    end - start,
                    node=node,
                    seed=seed + node,
                    fragmentation=fragmentation,
                    fail=self.fail,
                )
            )

    def _make_swiotlb(self, wanted: int | str | tuple[int, int], low_end: int) -> tuple[Swiotlb | None, int]:
        """The bounce pool, and where low RAM for everybody else ends."""
        if isinstance(wanted, tuple):
            start, size = wanted
        else:
            size = _bytes("swiotlb", wanted)
            start = low_end - size
        if size == 0:
            return None, low_end
        if start < FIRST_USABLE or start + size > low_end or (not isinstance(wanted, tuple) and size > low_end // 2):
            raise InputError(f"swiotlb={wanted!r}: does not fit into {low_end} bytes of low RAM")
        areas = 1 << (self.cpus - 1).bit_length()
        pool = Swiotlb(self.memory, start, size, areas=areas, ledger=self.ledger, fail=self.fail)
        return pool, start

    def add_bar(self, size: int | str, name: str = "", *, node: int = 0) -> Region:
        """Device memory of ``size`` bytes (rounded up to a power of two) in the window above RAM."""
        length = 1 << max(PAGE_SHIFT, (_bytes("bar", size) - 1).bit_length())
        start = -(-self._next_bar // length) * length
        if start + length > self.memory.span:
            raise ExhaustedError(f"no room for a BAR of {length} bytes below {self.memory.span:#x}")
        self._next_bar = start + length
        return self.memory.add_region(start, length, "bar", node, name)

    def buffer(self, size: int | str, *, offset: int = 0, order: int | None = None, node: int = 0) -> Buffer:
        """Memory for data, ``offset`` bytes into its first page, in blocks of ``1 << order`` pages (None: single)."""
        length = parse_size(size) if isinstance(size, str) else size
        pages = self.pages if node == 0 else self.node_pages[node]
        return allocate(pages, length, offset=offset, order=order, cpu=self.cache)

    # Devices -----------------------------------------------------------------------------------------------

    def device(self, name: str, *, source: int | None = None, **options: Any) -> Device:
        """A device behind this machine's IOMMU; options are those of ``dma.device.Device`` (mask, trusted, …)."""
        if any(device.name == name for device in self.devices):
            raise MisuseError(f"device {name!r} exists already")
        requester = (len(self.devices) + 4) << 3 if source is None else source
        shared: dict[str, Any] = {
            "memory": self.memory,
            "ledger": self.ledger,
            "clock": self.clock,
            "fail": self.fail,
            "swiotlb": self.swiotlb,
            "cache": self.cache,
            "pages": self.pages,
            "low_pages": self.low_pages,
            "coherent": self.coherent,
            "force_bounce": self.force_bounce,
            "defects": self.defects,
            "checker": self.checker,
            "debug": self.checker is not None,
        }
        merged = {**shared, **options}
        if self.unit is None or (self.mode == "passthrough" and merged.get("trusted", True)):
            merged.setdefault("identity", self.unit is not None)
            merged["port"] = DirectPort(
                self.memory, source=requester, name=name, coherent=merged["coherent"], cache=self.cache
            )
        else:
            merged.update(self._translation(name, requester, merged))
        try:
            device = Device(name, **merged)
        except DmakitError:
            if merged.get("domain") is not None:
                merged["domain"].detach()
            raise
        self.devices.append(device)
        if self.events is not None:
            self._record_device(device, self.events)
        return device

    def _retire(self, device: Device) -> None:
        """A device's domain goes, whatever is mapped in it."""
        if device.flush_queue is not None:
            device.flush_queue.close()
        if device.iovad is not None:
            device.iovad.close()
        if device.domain is not None:
            device.domain.detach()
        self.devices.remove(device)

    # PCI functions -----------------------------------------------------------------------------------------

    def take_window(self, size: int) -> int:
        """Addresses below 4 GiB for ``size`` bytes (a power of two) of registers."""
        start = -(-self._next_window // size) * size
        if start + size > REGISTER_WINDOW[1]:
            raise ExhaustedError(f"no room for a BAR of {size} bytes below {REGISTER_WINDOW[1]:#x}")
        self._next_window = start + size
        return start

    def plug(self, model: Model, bdf: str = "") -> Function:
        """Put a device into the slot ``bdf``, or the next free one; it can be opened then."""
        from dmakit.platform.pci import checked_bdf
        from dmakit.platform.soft.function import Function

        free = (f"0000:00:{slot:02x}.0" for slot in range(FIRST_SLOT, SLOTS))
        full = checked_bdf(bdf) if bdf else next((slot for slot in free if slot not in self.functions), "")
        if not full:
            raise ExhaustedError("no free slot on bus 0: name one of another bus")
        if full in self.functions:
            raise MisuseError(f"{full}: the slot is taken")
        self.functions[full] = Function(self, full, model)
        return self.functions[full]

    def open(self, bdf: str, *, owns_machine: bool = False, **options: Any) -> OpenDevice:
        """Take the function at ``bdf``, as ``vfio.Machine.open``; ``options`` are those of ``dma.device.Device``."""
        from dmakit.platform.pci import checked_bdf, requester_id
        from dmakit.platform.soft.device import Device as OpenDevice

        full = checked_bdf(bdf)
        function = self.functions.get(full)
        if function is None or not function.present:
            raise HostError(f"{full}: this machine has no such PCI function; plug one in: Machine.plug", errno.ENODEV)
        if function.port is not None:
            raise MisuseError(f"{full} is open already")
        device = OpenDevice(self, function, owns_machine)
        try:
            device.notices.arm(function)
            device.dma = self.device(full, source=requester_id(full), **options)
        except BaseException:
            function.leave()
            device.notices.close()
            raise
        function.port = device.dma.port
        device.prepare()
        self.opened.append(device)
        return device

    def give_back(self, device: OpenDevice) -> None:
        """What ``Device.close`` calls: the function is deaf and reset, then its mappings go."""
        device.function.leave()
        self.opened.remove(device)
        self._retire(device.dma)

    # Translation -------------------------------------------------------------------------------------------

    def _translation(self, name: str, requester: int, options: dict[str, Any]) -> dict[str, Any]:
        """Domain, IOVA space, port and flush queue of one device."""
        assert self.unit is not None and self.tables is not None
        fmt = VtdSecondStage() if self.iommu == "vtd" else X86_64()
        domain = PageTableDomain(self.unit, fmt, self.tables, levels=self.levels)
        try:
            iovad = IovaDomain(
                granule=domain.granule,
                cpus=self.cpus,
                policy=self.policy,
                ledger=self.ledger,
                fail=self.fail,
                clock=self.clock,
            )
            for lo, hi in self._reservations():
                iovad.reserve(lo, hi)
        except DmakitError:
            domain.detach()
            raise
        port = DmaPort(
            self.memory,
            self.unit,
            domain.did,
            source=requester,
            name=name,
            coherent=options["coherent"],
            cache=self.cache,
        )
        queue = self._flush_queue(iovad, domain) if options.get("trusted", True) else None
        return {"domain": domain, "iovad": iovad, "flush_queue": queue, "gather": Gather(), "port": port}

    def _flush_queue(self, iovad: IovaDomain, domain: PageTableDomain) -> FlushQueue | None:
        """The queue of a lazy domain; None when the domain must be strict, also for want of memory for the queue."""
        if self.mode != "lazy" or self.caching_mode:
            return None
        try:
            return FlushQueue(iovad, domain, cpus=self.cpus, clock=self.clock, ledger=self.ledger, fail=self.fail)
        except ExhaustedError:
            return None

    def _reservations(self) -> tuple[tuple[int, int], ...]:
        """What every IOVA space leaves out: pfn ranges, inclusive."""
        return (*self.reserved, (self.bar_base >> PAGE_SHIFT, (self.memory.span - 1) >> PAGE_SHIFT))

    def _make_checker(self, wanted: Any) -> Any:
        if wanted is True:
            return importlib.import_module("dmakit.dma.checker").ContractChecker()
        return wanted or None

    # Observation -------------------------------------------------------------------------------------------

    def record_events(self, events: list[Any] | None) -> None:
        """Append every component's events (kernel trace names) to ``events``; None stops."""
        self.events = events
        parts: list[Any] = [self.unit, self.swiotlb]
        for part in parts:
            if part is not None:
                part.events = events
        for device in self.devices:
            self._record_device(device, events)

    def _record_device(self, device: Device, events: list[Any] | None) -> None:
        parts: list[Any] = [device, device.domain, device.iovad, device.flush_queue]
        for part in parts:
            if part is not None:
                part.events = events

    def snapshot(self) -> dict[str, int]:
        """The ledger's rows: the software machine observes all of them."""
        return self.ledger.snapshot()

    def settle(self) -> None:
        """Let every flush queue flush now, as if its timer had fired."""
        for device in self.devices:
            if device.flush_queue is not None:
                device.flush_queue.flush()

    def live(self) -> dict[str, int]:
        """What is in use: IOVA ranges (cached ones not), bounce slots, table pages, entries waiting in flush queues."""
        ranges = waiting = 0
        reserved = set(self._reservations())
        for device in self.devices:
            if device.iovad is not None:
                cached = {pfn for pfn, _ in device.iovad.cached_pfns()}
                ranges += sum(1 for node in device.iovad.nodes() if node[0] not in cached and node not in reserved)
            if device.flush_queue is not None:
                waiting += len(device.flush_queue.waiting())
        return {
            "iova_ranges": ranges,
            "bounce_slots": self.swiotlb.used if self.swiotlb is not None else 0,
            "table_pages": self.tables.in_use if self.tables is not None else 0,
            "queued": waiting,
        }

    def close(self) -> None:
        """Give open functions back, stop every timer and flush what waits."""
        for function in reversed(self.opened[:]):
            function.close()
        for device in self.devices:
            if device.flush_queue is not None:
                device.flush_queue.close()
            if device.iovad is not None:
                device.iovad.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
