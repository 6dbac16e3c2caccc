"""What an ordinary call of each entry point looks like: a value for every parameter name.

``usual(world, entry, parameter)`` answers for (class, parameter) first, then for the parameter's name. A parameter that
is in neither is a KeyError: the test says that a new entry point has no recipe yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dmakit.block.limits import QueueLimits
from dmakit.block.request import Request
from dmakit.iommu.devtlb import DeviceTlb
from dmakit.iommu.formats.vtdss import VtdSecondStage
from dmakit.iommu.gather import Gather
from dmakit.iommu.invalidation import Descriptor
from dmakit.iova.domain import IovaDomain
from dmakit.iova.flush_queue import CallbackTarget
from dmakit.ledger import Ledger
from dmakit.nvme.pool import PlainSource
from dmakit.trace.pattern import Pattern
from tests.hostile.surface import Entry
from tests.hostile.world import PAGE, Host, World, ring_memory, words

Make = Callable[[World], Any]


def part(name: str) -> Make:
    """The world's object of that name."""
    return lambda world: world.part(name)


def just(value: Any) -> Make:
    """The same value always."""
    return lambda world: value


def _pages(world: World) -> Any:
    phys = world.part("phys")
    return words(phys, phys + 2 * PAGE, phys + 4 * PAGE)


def _pairs(world: World) -> list[tuple[int, int]]:
    phys = world.part("phys")
    return [(phys, PAGE), (phys + PAGE, PAGE)]


_ZERO = ("cpu", "attrs", "offset", "flags", "row", "order", "source", "level", "sector", "gap_bit", "node", "seed")
_ONE = ("size", "count", "amount", "nth", "cause", "lo", "page", "key", "value", "kind", "map_type", "areas", "cpus")
_FALSE = ("write", "ih", "integrity", "admin", "coalesced", "metadata", "transient", "single", "caching_mode", "queued")
_TRUE = (
    "on",
    "online",
    "flush_rcache",
    "to_host",
    "coherent",
    "coherent_walker",
    "sgl_supported",
    "known",
    "augmented",
)
_NONE = ("peer", "cache", "devtlb", "clock", "fail", "grower", "limits", "on_flush", "on_free_tables", "words_or_none")
_PAGES = ("phys", "addr", "following", "source_phys", "prp1", "low")
_MEMORY = {name: part("phys") for name in _PAGES}

BY_NAME: dict[str, Make] = {
    **{name: just(0) for name in _ZERO},
    **{name: just(1) for name in _ONE},
    **{name: just(False) for name in _FALSE},
    **{name: just(True) for name in _TRUE},
    **{name: just(None) for name in _NONE},
    **_MEMORY,
    "accessed": just(False),
    "augmented": just(True),
    "bit_bucket": just(False),
    "dword": just(False),
    "longer": just(False),
    "lost": just(False),
    "force_snoop": just(False),
    "presumed": just(False),
    "meta_sgl_supported": just(False),
    "user_command": just(False),
    "addrs": _pages,
    "alloc_align_mask": just(0),
    "begin": just(1),
    "bitmap": lambda w: words(0),
    "bits": just(64),
    "block": lambda w: w.part("DescriptorPool").alloc(),
    "boundary": just(0xFFFFFFFF),
    "bounds": lambda w: words(0, 1, 3),
    "bus": just(1 << 40),
    "bvecs": _pairs,
    "byte": just(7),
    "capacity": just(4),
    "chain": lambda w: w.part("PrpWriter").build([(1 << 30, 40 * PAGE)])[2],
    "chains": lambda w: words(*([0] * 8)),
    "client": just(None),
    "coherent_mask": just(None),
    "contexts": lambda w: w.part("Walker").contexts,
    "data": just(b"12345678"),
    "device": part("Device"),
    "did": lambda w: w.part("Device").domain.did,
    "direction": just(0),
    "dma_32bit_pfn": just(1 << 20),
    "domain": lambda w: IovaDomain(),
    "domains": just(8),
    "end": just(4095),
    "entries": just(4),
    "fault_entries": just(4),
    "first": just(4096),
    "first_domain_id": just(2),
    "first_line": just(1),
    "fmt": lambda w: VtdSecondStage(),
    "form": just(0),
    "forms": lambda w: words(0, 1),
    "fragmentation": just(0.5),
    "freelist_head": just(0),
    "gather": lambda w: Gather(),
    "granule": just(4096),
    "head": just(0),
    "hi": just(2),
    "high": just(PAGE),
    "hints": lambda w: w.part("IovaSearch").hints(),
    "iod": part("Iod"),
    "iotlb": part("Iotlb"),
    "iotlb_entries": just(8),
    "iotlb_ways": just(2),
    "iova": just(1 << 30),
    "iovad": part("IovaDomain"),
    "iovas": lambda w: words(1 << 31, (1 << 31) + PAGE, (1 << 31) + 4 * PAGE),
    "large": part("large"),
    "ledger": lambda w: Ledger(2),
    "length": just(PAGE),
    "lengths": lambda w: words(PAGE, PAGE, PAGE),
    "levels": just(4),
    "limit": just(1 << 20),
    "limit_pfn": just(0xFFFFF),
    "line": just(1),
    "magazine": just(0),
    "mapped_len": just(2 * PAGE),
    "mask": just((1 << 40) - 1),
    "max_mask": just(18),
    "max_size": just(1 << 20),
    "memory": part("memory"),
    "min_align_mask": just(0),
    "more": just(PAGE),
    "name": just("x"),
    "op": just(0),
    "options": just({}),
    "out": lambda w: words(*([0] * 66)),
    "output_bits": just(48),
    "page_size": just(PAGE),
    "page_sizes": just(PAGE | 1 << 21),
    "pages": lambda w: words(1, 2, 3),
    "pattern": lambda w: Pattern(),
    "payload": just(b"12345678"),
    "pfn": part("pfn"),
    "pfns": lambda w: words(0, 0, 0),
    "pid": just(1),
    "policy": just("lru"),
    "pool": part("SwiotlbPool"),
    "prot": just(3),
    "prp2": just(0),
    "directions": lambda w: words(1, 2),
    "rows": lambda w: words(*([0] * 32)),
    "mapper": part("RequestMapper"),
    "port": lambda w: w.part("Device").port,
    "pointers": lambda w: words(*([0] * 8)),
    "psc": part("PagingStructureCache"),
    "psc_entries": just(8),
    "queue_depth": just(32),
    "ranges": _pairs,
    "request": part("Request"),
    "reserved": just(()),
    "root": lambda w: w.part("machine").table_pages.alloc(),
    "rule": just("gap"),
    "segments": _pairs,
    "sg": part("SgMapping"),
    "sgl_threshold": just(4096),
    "shift": just(2),
    "sizes": lambda w: words(PAGE, PAGE, PAGE),
    "small": part("small"),
    "slots": just(64),
    "span": just(1 << 24),
    "start": just(0),
    "start_pfn": just(1),
    "state": part("IovaState"),
    "states": lambda w: words(0, 0, 0, 0),
    "step": just(PAGE),
    "table": part("PageTable"),
    "tables": lambda w: w.part("machine").tables,
    "target": lambda w: CallbackTarget(),
    "text": just(b"a line\n"),
    "tlb": part("tlb"),
    "topology": part("topology"),
    "total": just(4 * PAGE),
    "trace": just(None),
    "unit": part("IommuUnit"),
    "ways": just(2),
    "width_limit": just(4),
    "words": lambda w: words(0),
    "second": just(5),
    "reason": just(1),
    "error": just(-12),
    "mapped": just(0),
    "after": lambda w: Ledger().snapshot(),
    "before": lambda w: Ledger().snapshot(),
    "values": lambda w: words(1, 2),
    "least": just(1),
    "addresses": _pages,
    "capabilities": lambda w: w.part("PageTableDomain").capabilities,
    "aperture_end": just((1 << 40) - 1),
    "names": just(frozenset({"domain_maps"})),
    "backing": just(None),
    "region": lambda w: w.part("memory").regions[-1],
    "qid": just(1),
    "sq": lambda w: ring_memory(512),
    "cq": lambda w: ring_memory(0),
    "sq_doorbell": just(24),
    "cq_doorbell": just(28),
    "bar": just(None),
    "write32": just(print),
    "slot": lambda w: w.part("Ring").live()[0],
    "now": just(0),
    "deadline": just(1000),
    "delay_ns": just(1000),
    "delta_ns": just(1000),
    "function": just(print),
    "handle": lambda w: w.part("machine").clock.call_later(1000, print),
    "entry": just(bytes(64)),
    "tag": just(9),
    "opcode": just(2),
    "nsid": just(1),
    "lbas": lambda w: words(0, 8),
    "counts": lambda w: words(8, 8),
    "tags": lambda w: words(1, 2),
    "statuses": lambda w: words(0, 0),
    "results": lambda w: words(0, 0),
    "sgl": just(False),
    "backend": lambda w: Host(),
    "observes": just(frozenset()),
}

BY_ENTRY: dict[tuple[str, str], Make] = {
    ("Bitmap", "other"): lambda w: type(w.part("Bitmap"))(1000),
    ("Request", "other"): part("Request"),
    ("MagazinePool", "other"): lambda w: IovaDomain().rcaches.pool,
    ("IovaRcaches", "other"): lambda w: IovaDomain().rcaches,
    ("IovaSearch", "other"): lambda w: IovaDomain().search,
    ("LinuxSearch", "other"): lambda w: IovaDomain().search,
    ("", "one"): lambda w: words(1, 2),
    ("", "other"): lambda w: words(1, 2),
    ("IovaTree", "other"): lambda w: IovaDomain(policy="augmented").search.tree,
    ("PhysicalMemory", "kind"): just("ram"),
    ("PhysicalMemory", "start"): just(1 << 32),
    ("PhysicalMemory", "target"): part("phys"),
    ("PhysicalMemory", "source"): lambda w: w.part("phys") + PAGE,
    ("IovaDomain", "sizes"): lambda w: words(1, 2, 3),
    ("SharedDomain", "sizes"): lambda w: words(1, 2, 3),
    ("PageTableDomain", "phys"): part("phys"),
    ("FlushQueue", "pages"): just(1),
    ("TablePages", "pages"): part("PageAllocator"),
    ("IovaAllocator", "policy"): just("linux"),
    ("Swiotlb", "start"): lambda w: w.part("phys"),
    ("SwiotlbPool", "start"): lambda w: w.part("phys"),
    ("Swiotlb", "limit"): just((1 << 64) - 1),
    ("PlainSource", "start"): just(1 << 32),
    ("PlainSource", "limit"): just(4),
    ("PageAllocator", "start"): part("phys"),
    ("Rows", "kind"): just(0),
    ("P2pState", "client"): just(None),
    ("Iod", "request"): part("Request"),
    ("Payload", "limits"): lambda w: QueueLimits(),
    ("RowMapper", "cpus"): lambda w: words(0, 0),
    ("BlkDmaIter", "device"): part("Device"),
    ("DescriptorPool", "size"): just(256),
    ("DescriptorPool", "number"): lambda w: w.part("DescriptorPool").alloc().number,
    ("SglWalker", "payload"): just(b""),
    ("Device", "name"): just("x"),
    ("DescriptorPool", "source"): lambda w: PlainSource(),
    ("Device", "value"): just(None),
    ("IovaState", "value"): just(None),
    ("Turn", "value"): just(None),
    ("DescriptorPool", "fail"): part("FailPoint"),
    ("IovaRcaches", "fail"): part("FailPoint"),
    ("MagazinePool", "fail"): part("FailPoint"),
    ("PageTableDomain", "iova"): just(1 << 31),
    ("Port", "iova"): part("mapped"),
    ("Translator", "iova"): part("mapped"),
    ("IommuUnit", "devtlb"): part("DeviceTlb"),
    ("Swiotlb", "granule"): just(4096),
    ("LeafBitScan", "size"): just(PAGE),
    ("HostDomain", "source"): lambda w: Host(),
    ("Ring", "entries"): just(8),
    ("Ring", "low"): lambda w: words(0, 0),
    ("Ring", "high"): lambda w: words(0, 0),
    ("Ring", "slots"): lambda w: words(0, 0),
}
PAGED = (
    "Device",
    "IovaState",
    "PageTableDomain",
    "PageTable",
    "IovaWindow",
    "Windows",
    "PageAllocator",
    "Swiotlb",
    "SwiotlbPool",
)
MANY: dict[tuple[str, str], Make] = {
    ("map_many", "phys"): _pages,
    ("map_window", "phys"): _pages,
    ("map_windows", "phys"): _pages,
    ("map_windows", "states"): lambda w: words(0, 0, 0, 0),
    ("map_many", "out"): lambda w: words(0, 0, 0),
    ("translate_many", "out"): lambda w: words(0, 0, 0),
    ("iova_to_phys_many", "out"): lambda w: words(0, 0, 0),
    ("unmap_phys", "addr"): part("mapped"),
    ("unmap_phys", "size"): just(2 * PAGE),
    ("unmap_page", "addr"): part("mapped"),
    ("unmap_page", "size"): just(2 * PAGE),
    ("sync_single_for_cpu", "addr"): part("mapped"),
    ("sync_single_for_device", "addr"): part("mapped"),
    ("link", "offset"): just(2 * PAGE),
    ("unlink", "size"): just(2 * PAGE),
    ("set_root", "levels"): just(4),
    ("walk", "root"): just(0),
    ("walk", "words"): lambda w: words(*([0] * 1024)),
    ("begin", "entries"): just(4),
    ("alloc", "size"): just(3),
    ("free_fast", "size"): just(1),
    ("merge_back", "other"): lambda w: Request(0, [(w.part("phys") + 2 * PAGE, PAGE)], sector=16),
    ("link_many", "sizes"): lambda w: words(PAGE, PAGE),
    ("link_many", "phys"): lambda w: words(w.part("phys"), w.part("phys") + PAGE),
    ("link_many", "offset"): just(2 * PAGE),
    ("sync_many", "offsets"): lambda w: words(0, PAGE),
    ("sync_many", "sizes"): lambda w: words(PAGE, PAGE),
    ("unlink_many", "offsets"): lambda w: words(0, PAGE),
    ("unlink_many", "sizes"): lambda w: words(PAGE, PAGE),
    ("map_resource", "phys"): part("bar"),
    ("dma_read", "addr"): part("mapped"),
    ("dma_write", "addr"): part("mapped"),
    ("unmap", "tlb"): part("tlb"),
    ("sync_for_cpu", "size"): just(3000),
    ("sync_for_device", "size"): just(3000),
    ("zero_pads", "size"): just(3000),
    ("describe", "reason"): just(5),
    ("fault_error", "reason"): just(5),
    ("decode", "low"): just(0x22),
    ("decode", "high"): just(0),
    ("encode", "request"): lambda w: Descriptor("iotlb", "domain", 2),
    ("attach_devtlb", "devtlb"): lambda w: DeviceTlb(0x400),
    ("inv_pages", "addr"): just(1 << 30),
    ("inv_pages", "mask"): just(3),
    ("take", "phys"): lambda w: w.part("PageAllocator").start,
    ("free", "phys"): part("page"),
    ("add_region", "size"): just(PAGE),
    ("list_words", "payload"): just(bytes(24)),
    ("set_context", "did"): just(7),
}


def usual(world: World, entry: Entry, name: str) -> Any:
    """An ordinary value for one parameter; KeyError when there is no recipe."""
    for table, key in ((MANY, (entry.name, name)), (BY_ENTRY, (entry.owner, name))):
        if key in table:
            return table[key](world)
    if entry.owner == "Swiotlb" and name == "size" and entry.name == "unmap":
        return 3000
    if name == "size" and entry.owner in PAGED:
        return PAGE
    return BY_NAME[name](world)
