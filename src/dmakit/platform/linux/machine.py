"""This host as a machine: its memory, its IOMMU through VFIO, its devices.

The same surface as the software machine (``platform.soft.Machine``): ``buffer``, ``device``, ``ledger``, ``fail``,
``live``, ``close``. What differs is said, not hidden: mappings belong to the host's kernel, so the domain unmaps only
what was mapped as one and knows no lazy mode; ledger rows that only the host's IOMMU driver could count are None.

Each device gets an I/O address space of its own; on type1, devices of one group share theirs, because the hardware
does. ``share=True`` puts all devices into one. IOVA ranges that the host allows are read after every attach: what is
not allowed (the MSI window, regions that firmware uses) is reserved in the allocator, and the highest allowed IOVA
limits it. A device that does not allow what is in use already is refused.

    with Machine(ram="64M") as machine, machine.open("0000:01:00.0") as device:
        buffer = machine.buffer(64 << 10)
        addr = device.dma.map_phys(*buffer.ranges[0], Direction.FROM_DEVICE)
"""

from __future__ import annotations

import contextlib
import errno
import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dmakit.clock import VirtualClock
from dmakit.consts import PAGE_SHIFT
from dmakit.dma.device import Device as DmaDevice
from dmakit.errors import DmakitError, HostError, InputError, MisuseError, UnsupportedError
from dmakit.iommu.gather import Gather
from dmakit.iova.domain import IovaDomain
from dmakit.ledger import ROWS, Ledger
from dmakit.memory.buffers import Buffer, allocate
from dmakit.memory.pages import PageAllocator
from dmakit.platform.linux import iommufd, type1
from dmakit.platform.linux.device import Device, RealPort, ready
from dmakit.platform.linux.domain import UNOBSERVED, HostDomain
from dmakit.platform.linux.iommufd import Ioas, Iommufd, Staging
from dmakit.platform.linux.kernel import Kernel
from dmakit.platform.linux.limits import PinLedger
from dmakit.platform.linux.pci import bus_windows
from dmakit.platform.linux.space import HUGE_PAGE, RAM_START, SourceSpace
from dmakit.platform.linux.type1 import Type1Container
from dmakit.platform.linux.uapi import LAYOUTS
from dmakit.platform.linux.user import UserBuffer
from dmakit.platform.pci import PciDevice
from dmakit.swiotlb.bounce import Swiotlb
from dmakit.units import parse_size

if TYPE_CHECKING:
    from types import TracebackType

BACKENDS = ("auto", "iommufd", "type1")
OBSERVED = frozenset(row.name for row in ROWS) - UNOBSERVED


@dataclass(eq=False)
class AddressSpace:
    """A host I/O address space and who uses it: ``group`` is its type1 group (−1: shared by all).

    ``reserved``: the ranges (first, last pfn) that the allocator was kept out of; no range in use overlaps one.
    """

    domain: HostDomain
    iovad: IovaDomain
    group: int = -1
    users: list[Device] = field(default_factory=list)
    reserved: set[tuple[int, int]] = field(default_factory=set)

    def in_use(self) -> list[tuple[int, int]]:
        """Ranges (first, last pfn) that the allocator gave out and did not get back, ascending."""
        cached = {pfn for pfn, _ in self.iovad.cached_pfns()}
        return [
            (low, high)
            for low, high in self.iovad.nodes()
            if low not in cached and not any(low <= last and first <= high for first, last in self.reserved)
        ]


def _size(name: str, value: int | str) -> int:
    size = parse_size(value) if isinstance(value, str) else value
    if not isinstance(size, int) or size < 0 or size % HUGE_PAGE:
        raise InputError(f"{name}={value!r}: must be a multiple of {HUGE_PAGE} bytes")
    return size


class Machine:
    """This host. All arguments are keywords; sizes are bytes or text such as ``"64M"``.

    ``backend`` (``iommufd``, ``type1``, or ``auto``: iommufd where host and device have it), ``ram`` (for buffers;
    committed when used), ``huge`` (``auto``, ``hugetlb``, ``thp``, ``none``), ``cpus`` and ``policy`` of the IOVA
    allocator, ``seed`` and ``fragmentation`` of page allocation, ``swiotlb`` (bounce memory for untrusted devices,
    0 = none), ``share`` (one address space for all devices), ``staging`` (iommufd: keep memory pinned, map copies),
    ``checker``, ``defects``, ``bar_window`` and ``user_window`` (address space for BARs and for registered memory),
    ``mode`` (``strict``: a host domain has no lazy mode), ``kernel`` (another boundary to the host, for tests).
    """

    iommu = "vfio"
    cache = None
    low_pages = None
    coherent = True

    def __init__(
        self,
        *,
        backend: str = "auto",
        ram: int | str = "256M",
        huge: str = "auto",
        cpus: int = 1,
        policy: str = "linux",
        seed: int = 0,
        fragmentation: float = 0.0,
        swiotlb: int | str = 0,
        share: bool = False,
        staging: bool = True,
        checker: Any = False,
        defects: Iterable[str] | str = (),
        bar_window: int | str = "4G",
        user_window: int | str = "16G",
        mode: str = "strict",
        kernel: Kernel | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise InputError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
        if mode != "strict":
            raise UnsupportedError(f"mode={mode!r}: VFIO flushes before an unmap returns; use mode='strict'")
        self.kernel = Kernel() if kernel is None else kernel
        self.fail = self.kernel.fail
        self.backend, self.mode, self.share, self.use_staging = backend, mode, share, staging
        self.cpus, self.policy, self.defects = cpus, policy, defects
        self.ledger, self.clock = Ledger(cpus), VirtualClock()
        self.spaces: list[AddressSpace] = []
        self.vfio_devices: list[Device] = []
        self.devices: list[DmaDevice] = []
        self.users: list[UserBuffer] = []
        self.events: list[Any] | None = None
        self.iommufd: Iommufd | None = None
        self.staging: Staging | None = None
        self.closed = False
        self.pins = PinLedger(self.kernel)
        size, bounce = _size("ram", ram), _size("swiotlb", swiotlb)
        if bounce > size // 2:
            raise InputError(f"swiotlb={swiotlb!r}: must be at most half of ram={ram!r}")
        windows = {"bar_window": _size("bar_window", bar_window), "user_window": _size("user_window", user_window)}
        self.space = SourceSpace(self.kernel, size, huge=huge, **windows)
        self.memory = self.space.memory
        try:
            self._lay_out(size, bounce, seed, fragmentation)
        except DmakitError:
            self.space.close()
            raise
        self.checker = (
            importlib.import_module("dmakit.dma.checker").ContractChecker() if checker is True else checker or None
        )

    def _lay_out(self, size: int, bounce: int, seed: int, fragmentation: float) -> None:
        areas = 1 << (self.cpus - 1).bit_length()
        self.swiotlb = (
            Swiotlb(self.memory, RAM_START, bounce, areas=areas, ledger=self.ledger, fail=self.fail) if bounce else None
        )
        start, rest = RAM_START + bounce, size - bounce
        self.pages = PageAllocator(self.memory, start, rest, seed=seed, fragmentation=fragmentation, fail=self.fail)
        self.node_pages = [self.pages]

    # Memory ---------------------------------------------------------------------------------------------------

    def buffer(self, size: int | str, *, offset: int = 0, order: int | None = None, node: int = 0) -> Buffer:
        """Memory for data, ``offset`` bytes into its first page, in blocks of ``1 << order`` pages (None: single)."""
        length = parse_size(size) if isinstance(size, str) else size
        return allocate(self.node_pages[node], length, offset=offset, order=order)

    def register(self, memory: Any) -> UserBuffer:
        """A caller's buffer (NumPy array, mmap, memoryview) as memory that can be mapped, until ``release``."""
        made = UserBuffer(self, memory)
        self.users.append(made)
        return made

    # Devices --------------------------------------------------------------------------------------------------

    def device(self, name: str, **options: Any) -> DmaDevice:
        """The mappings of the device at BDF ``name``, which is opened: as ``soft.Machine.device``."""
        dma: DmaDevice = self.open(name, **options).dma
        return dma

    def open(self, bdf: str, *, owns_machine: bool = False, **options: Any) -> Device:
        """Take the device at ``bdf`` into this machine; ``options`` are those of ``dma.device.Device``."""
        info = ready(self.kernel, bdf)
        if any(other.bdf == info.bdf for other in self.vfio_devices):
            raise MisuseError(f"{info.bdf} is open already")
        with contextlib.ExitStack() as undo:
            fd, space = self._attach(info, undo)
            device = Device(self, info, fd, space, owns_machine)
            space.users.append(device)
            undo.callback(space.users.remove, device)
            device.prepare()
            undo.callback(device.notices.close)
            device.notices.arm(device.irqs)
            self._reserve(space, info.bdf)
            device.dma = self._dma_device(device, options)
            undo.pop_all()
        self.vfio_devices.append(device)
        self.devices.append(device.dma)
        if self.events is not None:
            self._record_device(device.dma, self.events)
        return device

    def _dma_device(self, device: Device, options: dict[str, Any]) -> DmaDevice:
        shared: dict[str, Any] = {
            "memory": self.memory,
            "ledger": self.ledger,
            "clock": self.clock,
            "fail": self.fail,
            "swiotlb": self.swiotlb,
            "pages": self.pages,
            "defects": self.defects,
            "checker": self.checker,
            "debug": self.checker is not None,
            "port": RealPort(device.bdf),
            "domain": device.space.domain,
            "iovad": device.space.iovad,
            "gather": Gather(),
        }
        return DmaDevice(device.bdf, **{**shared, **options})

    # Attaching ------------------------------------------------------------------------------------------------

    def _choice(self, info: PciDevice) -> str:
        """Which kernel interface: what was asked for, or the newer one where host and device have it."""
        has = {
            "iommufd": self.kernel.exists(iommufd.IOMMU_FILE) and bool(info.cdev),
            "type1": self.kernel.exists(type1.CONTAINER),
        }
        if self.backend != "auto":
            if not has[self.backend]:
                raise HostError(
                    f"backend={self.backend!r}: this kernel does not offer it for {info.bdf}"
                    + (" (needs CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV); use backend='type1'"
                       if self.backend == "iommufd" else f" ({type1.CONTAINER} is missing: modprobe vfio)"),
                    19,
                )  # fmt: skip
            return self.backend
        for name in ("iommufd", "type1"):
            if has[name]:
                return name
        raise HostError("this kernel has neither iommufd nor VFIO type1: modprobe vfio-pci (CONFIG_VFIO)", 19)

    def _attach(self, info: PciDevice, undo: contextlib.ExitStack) -> tuple[int, AddressSpace]:
        """The device's file, attached to an address space; ``undo`` takes everything back."""
        if self._choice(info) == "type1":
            return self._attach_type1(info, undo)
        return self._attach_iommufd(info, undo)

    def _attach_type1(self, info: PciDevice, undo: contextlib.ExitStack) -> tuple[int, AddressSpace]:
        assert info.group is not None
        group = -1 if self.share else info.group
        space = next((old for old in self.spaces if old.group == group), None)
        if space is None:
            space = self._new_space(Type1Container(self.kernel, self.pins), group)
        undo.callback(self._leave, space)
        container = space.domain.backend
        container.add_group(info.group)
        fd = container.open_device(info.group, info.bdf)
        undo.callback(self.kernel.close, fd)
        space.domain.refresh()
        return fd, space

    def _attach_iommufd(self, info: PciDevice, undo: contextlib.ExitStack) -> tuple[int, AddressSpace]:
        if self.iommufd is None:
            self.iommufd = Iommufd(self.kernel)
        space = self.spaces[0] if self.share and self.spaces else None
        if space is None:
            space = self._new_space(Ioas(self.iommufd, self.pins, lambda: self.staging), -1 if self.share else -2)
        undo.callback(self._leave, space)
        fd = self.kernel.open(info.cdev)
        undo.callback(self.kernel.close, fd)
        data = LAYOUTS["vfio_device_bind_iommufd"].pack(iommufd=self.iommufd.fd)
        self.kernel.ioctl(fd, "VFIO_DEVICE_BIND_IOMMUFD", data)
        number = LAYOUTS["vfio_device_bind_iommufd"].unpack(data).out_devid
        target = space.domain.backend.attach_target(number)
        data = LAYOUTS["vfio_device_attach_iommufd_pt"].pack(pt_id=target)
        self.kernel.ioctl(fd, "VFIO_DEVICE_ATTACH_IOMMUFD_PT", data)
        space.domain.refresh()
        if self.use_staging and self.staging is None:
            with contextlib.suppress(HostError):
                self.staging = Staging(self.iommufd, number, self.pins, int(space.domain.aperture_end))
        return fd, space

    def _new_space(self, backend: Any, group: int) -> AddressSpace:
        try:
            domain = HostDomain(backend, self.space, self.ledger, OBSERVED)
            iovad = IovaDomain(
                granule=domain.granule,
                cpus=self.cpus,
                policy=self.policy,
                ledger=self.ledger,
                fail=self.fail,
                clock=self.clock,
            )
        except DmakitError:
            backend.close()
            raise
        space = AddressSpace(domain, iovad, group)
        self.spaces.append(space)
        return space

    def _reserve(self, space: AddressSpace, bdf: str) -> None:
        """Keep the allocator out of what the host does not allow, and of where other devices answer.

        The caches are emptied first: what lies in a magazine would be given out again from under a reservation. What is
        in use stays; so a device that does not allow it is refused, as the kernel does where something is mapped.
        """
        gaps = [(start, start + size - 1) for start, size in space.domain.reserved] + bus_windows(self.kernel)
        spans = {(max(first >> PAGE_SHIFT, 1), last >> PAGE_SHIFT) for first, last in gaps}
        fresh = sorted((first, last) for first, last in spans - space.reserved if first <= last)
        if fresh:
            space.iovad.flush_rcaches()
        top = int(space.domain.aperture_end) >> PAGE_SHIFT
        for low, high in space.in_use():
            if high > top or any(low <= last and first <= high for first, last in fresh):
                raise MisuseError(
                    f"{bdf}: [{low << PAGE_SHIFT:#x}, {high + 1 << PAGE_SHIFT:#x}) is in use in this address space, and"
                    " this device does not allow it: free it first, or open the device in an address space of its own",
                    errno.EADDRINUSE,
                )
        for first, last in fresh:
            space.iovad.reserve(first, last)
            space.reserved.add((first, last))

    def _leave(self, space: AddressSpace) -> None:
        """Undo an attach: drop a space that nobody uses, and read again what the host allows in one that stays."""
        self._drop_if_unused(space)
        if space in self.spaces:
            with contextlib.suppress(HostError):  # the narrower ranges are safe, too
                space.domain.refresh()

    def _drop_if_unused(self, space: AddressSpace) -> None:
        if not space.users and space in self.spaces:
            self.spaces.remove(space)
            space.iovad.close()
            space.domain.detach()

    def give_back(self, device: Device) -> None:
        """Close a device's file, and its address space when it was the last there (called by ``Device.close``)."""
        self.kernel.close(device.fd)
        if device in self.vfio_devices:
            self.vfio_devices.remove(device)
            self.devices.remove(device.dma)
        if device in device.space.users:
            device.space.users.remove(device)
        self._drop_if_unused(device.space)
        for space in self.spaces:
            with contextlib.suppress(HostError):  # a device less can only widen the ranges: what was known stays true
                space.domain.refresh()

    # Observation ----------------------------------------------------------------------------------------------

    def record_events(self, events: list[Any] | None) -> None:
        """Append every component's events (kernel trace names) to ``events``; None stops."""
        self.events = events
        if self.swiotlb is not None:
            self.swiotlb.events = events
        for device in self.devices:
            self._record_device(device, events)

    def _record_device(self, device: DmaDevice, events: list[Any] | None) -> None:
        parts: list[Any] = [device, device.domain, device.iovad]
        for part in parts:
            part.events = events

    def snapshot(self) -> dict[str, int | None]:
        """The ledger; None for rows that only the host's IOMMU driver could count."""
        return self.ledger.observed(OBSERVED)

    def settle(self) -> None:
        """Nothing waits: a host domain has no flush queue."""

    def live(self) -> dict[str, int | None]:
        """What is in use: IOVA ranges (cached ones not), bounce slots, mappings that the kernel holds, pinned bytes."""
        return {
            "iova_ranges": sum(len(space.in_use()) for space in self.spaces),
            "bounce_slots": self.swiotlb.used if self.swiotlb is not None else 0,
            "table_pages": None,
            "queued": 0,
            "mappings": sum(space.domain.mappings for space in self.spaces),
            "pinned_bytes": self.pins.pinned,
        }

    # End ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give back devices, mappings, memory, in this order; a second call does nothing."""
        if self.closed:
            return
        self.closed = True
        for device in reversed(self.vfio_devices[:]):
            device.close()
        for user in self.users[:]:
            with contextlib.suppress(DmakitError):
                user.release()
        if self.staging is not None:
            self.staging.close()
        if self.iommufd is not None:
            self.iommufd.close()
        self.space.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
