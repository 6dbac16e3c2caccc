"""One of each: a small machine and whatever stands beside it, made when it is first asked for.

``part(name)`` is the object of a class, ready for its methods; a few have something inside (mapped pages, a live
window) so that an operation has something to break. ``state()`` is everything that a refused call must leave as it was,
the ledger and empty page tables excepted: a call that fails half-way counts what it did, and leaves the tables that it
linked for the next one, as Linux does.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

from dmakit.block.dma_iter import BlkDmaIter
from dmakit.block.limits import QueueLimits
from dmakit.block.request import Op, Payload, Request
from dmakit.dma.device import Device
from dmakit.iommu.bitmap import Bitmap
from dmakit.iommu.devtlb import DeviceTlb
from dmakit.iommu.dirty import LeafBitScan
from dmakit.iommu.gather import Gather
from dmakit.iommu.lane import BatchLane
from dmakit.iommu.space import Domain
from dmakit.iommu.tables import TablePages
from dmakit.iova.domain import IovaDomain
from dmakit.iova.flush_queue import CallbackTarget, FlushQueue
from dmakit.iova.shared import SharedDomain
from dmakit.iova.tree import IovaTree
from dmakit.ledger import Ledger
from dmakit.nvme.fetch import DescriptorReader
from dmakit.nvme.lists import ListWriter
from dmakit.nvme.mapping import RequestMapper
from dmakit.nvme.pool import LARGE_BYTES, SMALL_BYTES, DescriptorPool, PlainSource
from dmakit.nvme.prp import PrpWalker, PrpWriter
from dmakit.nvme.ring import Ring
from dmakit.nvme.rows import RowMapper
from dmakit.nvme.sgl import SglWalker, SglWriter
from dmakit.p2p.state import P2pState
from dmakit.p2p.topology import HostBridge, PciTopology, Platform
from dmakit.platform import soft
from dmakit.platform.linux.domain import HostDomain
from dmakit.platform.linux.shadow import ShadowMap
from dmakit.trace.pattern import Pattern
from dmakit.trace.rows import Rows
from dmakit.trace.scanner import Scanner

PAGE = 4096
BAR_WINDOW = 64 << 20  # the machine's address space stays small, so that a cap on the child's memory means something


class World:
    """Objects by name, made once; the same names and the same order give the same objects in both cores."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}

    def part(self, name: str) -> Any:
        """The object called ``name`` (a class of the surface, or one of the helpers below)."""
        if name not in self.parts:
            self.parts[name] = PARTS[name](self)
        return self.parts[name]

    def state(self) -> str:
        """A digest of what must not change when a call is refused."""
        texts = [f"{name}={SEEN[name](part)}" for name, part in sorted(self.parts.items()) if name in SEEN]
        return hashlib.md5("|".join(texts).encode()).hexdigest()


def _machine(world: World) -> soft.Machine:
    soft.BAR_WINDOW = BAR_WINDOW
    return soft.Machine(ram="64M", swiotlb="1M", cpus=2, mode="lazy")


def _device(world: World) -> Device:
    device = world.part("machine").device("dev0")
    world.parts["mapped"] = device.map_phys(world.part("phys"), 2 * PAGE, 0)
    return device


def _state(world: World) -> Any:
    state = world.part("Device").try_alloc(world.part("phys"), 4 * PAGE)
    state.link(world.part("phys"), 0, 2 * PAGE, 0)
    return state


def _domain(world: World) -> Any:
    domain = world.part("Device").domain
    domain.map(1 << 30, world.part("phys"), 4 * PAGE, 3)
    return domain


def _iovad(world: World) -> IovaDomain:
    domain = IovaDomain(cpus=2)
    pfns = [domain.alloc_fast(size, 0xFFFFF) for size in (1, 1, 2, 4, 40)]
    domain.free_fast(pfns[1], 1)
    world.parts["pfn"] = pfns[0]
    return domain


def _bitmap(world: World) -> Bitmap:
    bitmap = Bitmap(1000)
    bitmap.set(3, 100)
    return bitmap


def _queue(world: World) -> FlushQueue:
    domain = world.part("IovaDomain")
    queue = FlushQueue(domain, CallbackTarget(), cpus=2)
    queue.queue(domain.alloc_fast(4, 0xFFFFF), 4)
    return queue


def _tree(world: World) -> IovaTree:
    domain = IovaDomain(policy="augmented")
    for size in (3, 5, 7):
        domain.alloc(size, 0xFFFF)
    return domain.search.tree


def _pool(world: World, size: int) -> DescriptorPool:
    pool = DescriptorPool(PlainSource(size << 32), size, ledger=Ledger(), fail=world.part("FailPoint"))
    pool.alloc()
    return pool


def _iod(world: World) -> Any:
    return world.part("RequestMapper").map(world.part("Request"))


def _request(world: World) -> Request:
    phys = world.part("phys")
    return Request(Op.READ, [(phys, PAGE), (phys + PAGE, PAGE)], limits=QueueLimits())


def _walk(world: World) -> BlkDmaIter:
    walk = BlkDmaIter()
    walk.start(world.part("Request"), world.part("Device"))
    return walk


def _p2p(world: World) -> P2pState:
    topology = PciTopology(world.part("memory"), Platform())
    return P2pState(topology, HostBridge("pci0").endpoint("nic"), Ledger())


def _scan(world: World) -> LeafBitScan:
    domain = world.part("PageTableDomain")
    return LeafBitScan(domain.table, 1 << 30, 4 * PAGE, words(0), Gather())


def _sgl(world: World) -> SglWriter:
    writer = SglWriter(world.part("small"), world.part("large"))
    writer.begin(4)
    return writer


def _prp(world: World) -> PrpWriter:
    writer = PrpWriter(world.part("small"), world.part("large"))
    writer.begin(8 * PAGE)
    return writer


def _sgl_walker(world: World) -> SglWalker:
    walker = SglWalker()
    walker.begin(world.part("phys"), PAGE, PAGE, to_host=True)
    return walker


def _prp_walker(world: World) -> PrpWalker:
    walker = PrpWalker()
    walker.begin(world.part("phys"), world.part("phys") + PAGE, 4 * PAGE)
    return walker


def _swiotlb(world: World) -> Any:
    pool = world.part("machine").swiotlb
    world.parts["tlb"] = pool.map(world.part("phys"), 3000)
    return pool


def _lane(world: World) -> BatchLane:
    unit = world.part("IommuUnit")
    return BatchLane(unit.iotlb, unit.psc, world.part("memory"), unit.walker.contexts, Ledger())


def _devtlb(world: World) -> DeviceTlb:
    tlb = DeviceTlb(0x300)
    world.part("IommuUnit").attach_devtlb(tlb, world.part("Device").domain.did)
    return tlb


class Host:
    """A host kernel that grants everything, and the memory behind it: one piece each."""

    page_sizes = PAGE
    dirty = True

    def __init__(self) -> None:
        self.maps = 0

    def map(self, iova: int, piece: Host.Piece, prot: int) -> None:
        self.maps += 1

    def unmap(self, iova: int, size: int) -> int:
        self.maps -= 1
        return size

    def ranges(self) -> list[tuple[int, int]]:
        return [(PAGE, (1 << 40) - 1)]

    def set_dirty(self, on: bool) -> None:
        self.dirty = True

    def read_dirty(self, parts: object, iova: int, size: int, bitmap: object, page_size: int, flags: int) -> int:
        return 0

    def close(self) -> None:
        self.maps = 0

    class Piece(NamedTuple):
        """A part of memory."""

        size: int

    def resolve(self, phys: int, size: int) -> list[Host.Piece]:
        """All of the memory is there."""
        return [Host.Piece(size)]


def _host_domain(world: World) -> HostDomain:
    domain = HostDomain(Host(), Host(), Ledger(2), frozenset())
    domain.refresh()
    domain.map(1 << 30, world.part("phys"), PAGE, 3)
    domain.set_dirty_tracking(True)
    return domain


def ring_memory(page: int) -> tuple[Any, Any]:
    """The words of a queue's ring, and where its page begins."""
    return memoryview(words(*([0] * 1024))), memoryview(words(page))


def _ring(world: World) -> Ring:
    bar = memoryview(array("I", bytes(64)))
    options: dict[str, Any] = {"sq_doorbell": 24, "cq_doorbell": 28, "bar": bar, "write32": print}
    ring = Ring(1, 8, ring_memory(512), ring_memory(0), **options)
    ring.push(bytes(64), 5)
    return ring


PARTS: dict[str, Callable[[World], Any]] = {
    "machine": _machine,
    "memory": lambda w: w.part("machine").memory,
    "phys": lambda w: w.part("machine").buffer(64 * PAGE, order=6).ranges[0][0],
    "mapped": lambda w: w.part("Device") and w.parts["mapped"],
    "tlb": lambda w: w.part("Swiotlb") and w.parts["tlb"],
    "pfn": lambda w: w.part("IovaDomain") and w.parts["pfn"],
    "small": lambda w: _pool(w, SMALL_BYTES),
    "large": lambda w: _pool(w, LARGE_BYTES),
    "bar": lambda w: w.part("machine").add_bar(1 << 20).start,
    "page": lambda w: w.part("PageAllocator").alloc(),
    "topology": lambda w: PciTopology(w.part("memory"), Platform()),
    "Device": _device,
    "Windows": lambda w: w.part("Device"),
    "MapCore": lambda w: w.part("Device"),
    "Streaming": lambda w: w.part("Device"),
    "Scatter": lambda w: w.part("Device"),
    "IovaState": _state,
    "IovaWindow": _state,
    "SgMapping": lambda w: w.part("Device").map_sg([(w.part("phys"), PAGE), (w.part("phys") + PAGE, 100)], 0),
    "Empty": lambda w: __import__("dmakit.bench.native", fromlist=["Empty"]).Empty(),
    "Words": lambda w: None,
    "SegmentIter": lambda w: None,
    "BlkDmaIter": _walk,
    "Request": _request,
    "Payload": lambda w: Payload([(w.part("phys"), PAGE)], QueueLimits()),
    "FailPoint": lambda w: w.part("machine").fail,
    "VirtualClock": lambda w: w.part("machine").clock,
    "Turn": lambda w: w.part("machine").ledger.turn,
    "Bitmap": _bitmap,
    "SetCache": lambda w: w.part("IommuUnit").iotlb,
    "Iotlb": lambda w: w.part("IommuUnit").iotlb,
    "PagingStructureCache": lambda w: w.part("IommuUnit").psc,
    "DeviceTlb": _devtlb,
    "LeafBitScan": _scan,
    "PageTableDomain": _domain,
    "FaultLog": lambda w: w.part("IommuUnit").fault_log,
    "PtFormat": lambda w: w.part("PageTableDomain").table.fmt,
    "VtdSecondStage": lambda w: w.part("PtFormat"),
    "X86_64": lambda w: w.part("PtFormat"),
    "Gather": lambda w: Gather(),
    "InvalidationQueue": lambda w: w.part("IommuUnit").queue,
    "BatchLane": _lane,
    "PageTable": lambda w: w.part("PageTableDomain").table,
    "TableTree": lambda w: w.part("PageTable"),
    "Port": lambda w: w.part("Device").port,
    "DmaPort": lambda w: w.part("Device").port,
    "TablePages": lambda w: TablePages(w.part("PageAllocator"), ledger=Ledger()),
    "Translator": lambda w: w.part("IommuUnit"),
    "IommuUnit": lambda w: w.part("machine").unit,
    "Walker": lambda w: w.part("IommuUnit").walker,
    "IovaAllocator": lambda w: w.part("IovaDomain"),
    "IovaDomain": _iovad,
    "FlushTarget": lambda w: CallbackTarget(),
    "CallbackTarget": lambda w: CallbackTarget(),
    "FlushQueue": _queue,
    "MagazinePool": lambda w: w.part("IovaDomain").rcaches.pool,
    "IovaRcaches": lambda w: w.part("IovaDomain").rcaches,
    "IovaSearch": lambda w: w.part("IovaDomain").search,
    "LinuxSearch": lambda w: w.part("IovaDomain").search,
    "AugmentedSearch": lambda w: IovaDomain(policy="augmented").search,
    "SharedDomain": lambda w: SharedDomain(w.part("IovaDomain")),
    "IovaTree": _tree,
    "Ledger": lambda w: Ledger(2),
    "Domain": lambda w: Domain(Ledger(2), w.part("PageTableDomain").capabilities),
    "HostDomain": _host_domain,
    "ShadowMap": lambda w: ShadowMap(),
    "Ring": _ring,
    "PageAllocator": lambda w: w.part("machine").pages,
    "PhysicalMemory": lambda w: w.part("memory"),
    "Iod": _iod,
    "RequestMapper": lambda w: RequestMapper(
        w.part("Device"), w.part("small"), w.part("large"), ledger=Ledger(), sgl_supported=True
    ),
    "Block": lambda w: w.part("DescriptorPool").alloc(),
    "DescriptorPool": lambda w: _pool(w, SMALL_BYTES),
    "PlainPage": lambda w: PlainSource().page(),
    "PlainSource": lambda w: PlainSource(),
    "DescriptorReader": lambda w: DescriptorReader(w.part("Device").port),
    "RowMapper": lambda w: RowMapper(w.part("RequestMapper")),
    "ListWriter": lambda w: ListWriter(w.part("small"), w.part("large")),
    "PrpWriter": _prp,
    "PrpWalker": _prp_walker,
    "SglWriter": _sgl,
    "SglWalker": _sgl_walker,
    "P2pState": _p2p,
    "Swiotlb": _swiotlb,
    "SwiotlbPool": lambda w: w.part("Swiotlb").pools[0],
    "Rows": lambda w: Rows(Pattern()),
    "Scanner": lambda w: Scanner(),
}


def _words(view: Any) -> str:
    return hashlib.md5(bytes(view)).hexdigest()


def _in_use(domain: IovaDomain, waiting: Any = ()) -> Any:
    """The ranges that are not free, cached or ``waiting`` to be freed.

    A failed search may give cached ones back to the tree, and what a failing call undoes waits for a flush.
    """
    gone = {pfn for pfn, _ in (*domain.cached_pfns(), *waiting)}
    return [node for node in domain.nodes() if node[0] not in gone]


def _device_seen(device: Device) -> Any:
    domain = device.domain
    leaves = [tuple(leaf) for leaf in domain.table.leaves()]
    told = (device.mask, device.coherent_mask, device.max_segment, device.boundary, device.min_align_mask)
    live = [(state.addr, state.size_word) for state in sorted(device.states, key=lambda state: state.serial)]
    return told, live, len(device.allocations), leaves, _in_use(device.iovad, device.flush_queue.waiting())


SEEN: dict[str, Callable[[Any], Any]] = {
    "Device": _device_seen,
    "machine": lambda m: (m.swiotlb.used, m.pages.allocated_pages, len(m.memory.regions)),
    "HostDomain": lambda d: (d.held(), d.ranges, d.aperture_end, d.backend.maps),
    "Ring": lambda r: (r.live(), r.tail, r.head, r.free_count, r.submitted, r.completed, r.lie),
    "Bitmap": lambda b: (b.bits, _words(b.words)),
    "IovaDomain": lambda d: (_in_use(d), d.online_cpus),
    "FlushQueue": lambda q: (q.waiting(), q.start_cnt, q.finish_cnt),
    "SgMapping": lambda s: (s.live, s.segments, s.inputs),
    "IovaTree": lambda t: t.nodes(),
    "small": lambda p: (p.used, p.idle_count, len(p.pages)),
    "large": lambda p: (p.used, p.idle_count, len(p.pages)),
    "DescriptorPool": lambda p: (p.used, p.idle_count, len(p.pages)),
    "IommuUnit": lambda u: (_words(u.walker.contexts), len(u.devtlbs)),
    "PrpWriter": lambda p: (p.left, p.chain),
    "SglWriter": lambda s: (s.low, s.high, s.entries, s.room, s.chain),
    "Swiotlb": lambda s: (s.used, [pool.allocations() for pool in s.pools], s.low, s.high),
    "FailPoint": lambda f: f.countdown,
    "VirtualClock": lambda c: (c.now, c.pending()),
    "Turn": lambda t: t.taken,
    "Gather": lambda g: (g.start, g.end, g.freelist),
    "Port": lambda p: len(p.peers),
}


def words(*values: int) -> array[int]:
    """An array of 64-bit words."""
    return array("Q", values)
