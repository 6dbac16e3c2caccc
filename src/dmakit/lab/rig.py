"""The rig: one machine with one NVMe-like device on it, built the same way for every strategy.

The device is a master of its own: for each request it reads the PRP list or SGL that the driver wrote, through
its own port, and then reads or writes the data at the addresses it found there. So a wrong address, a missing
mapping, a stale translation or a bad descriptor shows in the bytes.

Buffers never move between strategies: a workload is placed before the first mapping, page tables come from a part
of memory of their own, and descriptors and registered windows from memory that no recorded trace names.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Protocol, cast

from dmakit.block.bio import Bio, split
from dmakit.block.device import MappingDevice
from dmakit.block.limits import NVME_MAX_SEGS, QueueLimits
from dmakit.block.request import Op
from dmakit.dma.device import Device
from dmakit.errors import DmakitError
from dmakit.lab.options import Options
from dmakit.lab.request_table import Layout, Segments
from dmakit.lab.schedule import SplitSchedule
from dmakit.lab.workload import Workload
from dmakit.nvme.coherent import DeviceSource
from dmakit.nvme.mapping import RequestMapper
from dmakit.nvme.pool import LARGE_BYTES, SMALL_BYTES, DescriptorPool
from dmakit.p2p.state import P2pState
from dmakit.p2p.topology import HostBridge, PciTopology, Provider
from dmakit.platform.soft import Machine
from dmakit.units import MIB, PAGE


class Source(Protocol):
    """Where a workload comes from: knows the memory it needs and can be placed on a machine."""

    name: str
    cpus: int
    machine_options: dict[str, Any]

    def place(self, machine: Machine) -> Workload:
        """The requests, at physical addresses of this machine."""

    def replay_score(self) -> tuple[int, int] | None:
        """(IOVAs equal to the kernel's, allocations), when the source was recorded with them."""

    def missing(self) -> list[str]:
        """What is not knowable from this source, and what to record."""


class Rig:
    """Machine, device and mapper for one run of one strategy."""

    def __init__(self, source: Source, options: Options, *, identity: bool = False) -> None:
        mode = "passthrough" if identity and options.iommu != "none" else options.mode
        self.options = options
        self.machine = Machine(
            cpus=source.cpus,
            iommu=options.iommu,
            mode=mode,
            policy=options.policy,
            seed=options.seed,
            coherent=options.coherent,
            checker=options.checker,
            defects=options.defects,
            **source.machine_options,
        )
        self.workload = source.place(self.machine)
        self.limits = QueueLimits(
            max_bytes=1 << 30, max_segments=NVME_MAX_SEGS, virt_boundary_mask=0 if options.sgl else 4095
        )
        if not options.sgl:
            self._split()
        self.peer: P2pState | None = None
        self.provider: Provider | None = None
        if options.p2p != "none":
            self._move_to_peer()
        self.device = self._make_device()
        self.ledger = self.machine.ledger
        self.mapper = self._make_mapper()

    def _make_device(self) -> Device:
        """An NVMe-like device as the options describe it."""
        device = self.machine.device(
            "nvme0",
            mask=(1 << self.options.mask_bits) - 1,
            trusted=not self.options.untrusted,
            min_align_mask=4095,
            max_segment=(1 << 32) - 1,
            p2p=self.peer,
        )
        if self.options.p2p == "bus" and self.provider is not None:
            bar = self.provider
            device.port.add_peer(bar.bus_address(bar.start), bar.size, bar.start)
        return device

    def _make_mapper(self) -> RequestMapper:
        """The driver's mapping code, with its descriptor pools in the device's coherent memory."""
        pages, fail = DeviceSource(self.device), self.machine.fail
        small = DescriptorPool(pages, SMALL_BYTES, ledger=self.ledger, fail=fail)
        large = DescriptorPool(pages, LARGE_BYTES, ledger=self.ledger, fail=fail)
        device = cast(MappingDevice, self.device)
        return RequestMapper(device, small, large, ledger=self.ledger, sgl_supported=self.options.sgl, peer=self.peer)

    def _move_to_peer(self) -> None:
        """Put every buffer into the memory of a peer device, at the same distances, below one switch or not."""
        layouts = self.workload.requests.layouts
        low = min(phys for layout in layouts for phys, _ in layout.segments) & ~(2 * MIB - 1)
        high = max(phys + size for layout in layouts for phys, size in layout.segments)
        bar = self.machine.add_bar(max(PAGE, 1 << (high - low - 1).bit_length()), "peer memory")
        topology = PciTopology(self.machine.memory)
        bridge = HostBridge("host", (0x8086, 0x2030))
        if self.options.p2p == "bus":
            client, owner = bridge.root_port("port").switch("switch", 2)
            client, owner = client.endpoint("nvme0"), owner.endpoint("peer")
        else:
            client, owner = bridge.root_port("port0").endpoint("nvme0"), bridge.root_port("port1").endpoint("peer")
        self.provider = topology.provide(owner, bar.start, bar.size)
        self.peer = P2pState(topology, client, self.machine.ledger)
        shift = bar.start - low

        def moved(segments: Segments) -> Segments:
            return tuple((phys + shift, size) for phys, size in segments)

        self.workload.requests = self.workload.requests.replaced(
            [Layout.of(moved(layout.segments), moved(layout.bvecs)) for layout in layouts]
        )

    def _split(self) -> None:
        """PRPs cannot describe a gap inside a controller page: the block layer cuts such requests there."""
        whole, parts = self.workload.requests, []
        for layout in whole.layouts:
            bio = Bio(Op.READ)
            for phys, size in layout.segments:
                bio.add(phys, size)
            parts.append([Layout.of(tuple(part.data.bvecs)) for part in split(bio, self.limits)])
        self.workload.requests, first = whole.cut(parts)
        self.workload.schedule = SplitSchedule(self.workload.schedule, whole, first)

    def close(self) -> None:
        """Stop the timers; best effort after a failed run."""
        with suppress(DmakitError):
            self.machine.close()
