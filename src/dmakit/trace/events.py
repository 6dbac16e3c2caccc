"""The events that dmakit understands in a kernel trace: names, fields, and which verb needs which.

One ``Event`` row declares one kind of line: the names under which kernels and recorders print it, and its fields in
the order of printing. The scanner turns the declarations into integers (``scanner.Pattern``); nothing else in the
package knows how a line looks.

A field is found by its *anchor*, the text right before its value, and read as one of

* ``n``  a number: ``0x…`` hexadecimal, otherwise decimal, ``-`` allowed (stored as two's complement);
* ``h``  a hexadecimal number printed without ``0x`` (``dma_addr=fffff000``);
* ``s``  a word, ended by a blank, a quote, a bracket or the end of the line; stored as a name id;
* ``t``  the rest of the line, stored as a name id;
* ``l``  a list ``{0x1,0x2}``, stored as start and count in the trace's pool of list elements.

Optional fields read as ``ABSENT`` where a kernel does not print them. Sources of the shapes: the kernel's
``include/trace/events/{dma,iommu,block,swiotlb}.h`` and ``drivers/iommu/intel/trace.h``; dynamic events are declared by
``record.py``. ``dma_map_page``/``dma_map_resource`` (6.12 to 6.17) are read as ``dma_map_phys`` (6.18 and later).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ABSENT = (1 << 64) - 1  # the value of an optional field that a line does not have


@dataclass(frozen=True, slots=True)
class Field:
    """One column of an event: its name, the text before the value, how to read it."""

    column: str
    anchor: str
    how: str = "n"
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """One kind of line. ``symbol``: the kernel function of a dynamic event, by which it is known under any name."""

    name: str
    fields: tuple[Field, ...]
    aliases: tuple[str, ...] = ()
    symbol: str = ""

    @property
    def is_return(self) -> bool:
        """Whether the dynamic event sits on the function's return."""
        return self.name.endswith("_out")


def _keys(text: str) -> tuple[Field, ...]:
    """Fields of ``key=value`` lines: ``size addr:h dev:s flush? gather=queued`` (column=key, ``?`` optional)."""
    fields = []
    for token in text.split():
        word, _, how = token.rstrip("?").partition(":")
        column, _, key = word.partition("=")
        fields.append(Field(column, f" {key or column}=", how or "n", token.endswith("?")))
    return tuple(fields)


def _event(name: str, keys: str, *aliases: str, symbol: str = "") -> Event:
    return Event(name, _keys(keys), aliases, symbol)


_ALLOCATOR = (
    _event("af_in", "iovad size limit flush?", "af", symbol="alloc_iova_fast"),
    _event("af_out", "iovad? size? limit? pfn", "afr", symbol="alloc_iova_fast"),
    _event("ai_out", "iovad size limit aligned? ret lo?", symbol="alloc_iova"),
    _event("ff_in", "iovad pfn size", "ff", symbol="free_iova_fast"),
    _event("ff_out", "iovad pfn size", symbol="free_iova_fast"),
    _event("fi_in", "iovad pfn", symbol="free_iova"),
    _event("xfi_in", "iovad lo", symbol="__free_iova"),
    _event("res_in", "iovad lo hi", "res", symbol="reserve_iova"),
    _event("init_in", "iovad granule start", "init", symbol="init_iova_domain"),
    _event("rc_in", "iovad", "rc", symbol="iova_domain_init_rcaches"),
    _event("put_in", "iovad", symbol="put_iova_domain"),
    _event("depot_in", "work", symbol="iova_depot_work_func"),
    _event("magfree_in", "iovad mag n pfns:l?", symbol="iova_magazine_free_pfns"),
    _event("cpufree_in", "cpu iovad", symbol="free_cpu_cached_iovas"),
    _event("fqto_in", "timer", symbol="fq_flush_timeout"),
)
_DMA_IOMMU = (
    _event("alloc_out", "domain size limit dev:s ret", symbol="iommu_dma_alloc_iova"),
    _event("free_in", "domain iova size", symbol="iommu_dma_free_iova"),
    _event("try_out", "dev:s phys size ok addr ssize", symbol="dma_iova_try_alloc"),
    _event("link_out", "dev:s addr phys off size dir ret", symbol="dma_iova_link"),
    _event("sync_out", "dev:s addr off size ret", symbol="dma_iova_sync"),
    _event("unlink_in", "dev:s addr off size dir", symbol="dma_iova_unlink"),
    _event("destroy_in", "dev:s addr ssize mapped dir", symbol="dma_iova_destroy"),
    _event("dfree_in", "dev:s addr ssize", symbol="dma_iova_free"),
    _event("mp_out", "dev:s phys size dir attrs? ret", symbol="iommu_dma_map_phys"),
    _event("ump_in", "dev:s addr size dir", symbol="iommu_dma_unmap_phys"),
    _event("msg_out", "dev:s nents ret", symbol="iommu_dma_map_sg"),
    _event("umsg_in", "dev:s nents", symbol="iommu_dma_unmap_sg"),
    _event("al_out", "dev:s size handle ret", symbol="iommu_dma_alloc"),
    _event("fr_in", "dev:s size handle", symbol="iommu_dma_free"),
    _event("swtlb_out", "dev:s phys size ret", symbol="swiotlb_tbl_map_single"),
    _event("mapsg_in", "dev:s nents dir attrs sgl sg:l", symbol="iommu_dma_map_sg"),
    _event("mapsg_out", "dev:s nents ret sgl sg:l"),
    _event("blink_in", "dev:s addr phys len dir attrs", symbol="iommu_dma_iova_bounce_and_link"),
    _event("mapswio_in", "dev:s phys size dir attrs", symbol="iommu_dma_map_swiotlb"),
    _event("tblmap_out", "dev:s phys size alignmask dir attrs ret"),
    _event("tblunmap_in", "dev:s tlb size dir attrs", symbol="__swiotlb_tbl_unmap_single"),
    _event("linkin", "dev:s addr ssize phys off size dir", symbol="dma_iova_link"),
    _event("bounce_in", "dev:s tlb size dir", symbol="swiotlb_bounce"),
)
_INVALIDATION = (
    _event("all_in", "domain", symbol="intel_flush_iotlb_all"),
    _event("all_out", "domain", symbol="intel_flush_iotlb_all"),
    _event("tlbsync_in", "domain start end pgsize queued", symbol="intel_iommu_tlb_sync"),
    _event("syncmap_in", "domain iova size", symbol="intel_iommu_iotlb_sync_map"),
    _event("cflush_in", "domain start end ih", symbol="cache_tag_flush_range"),
    _event("cflushnp_in", "domain start end", symbol="cache_tag_flush_range_np"),
    _event("qi_in", "iommu count opt", symbol="qi_submit_sync"),
    _event("fqto_out", "timer", symbol="fq_flush_timeout"),
    _event("fqring_in", "cookie fq", symbol="fq_ring_free_locked"),
    _event("unmapfast_in", "domain iova size", symbol="iommu_unmap_fast"),
    _event("unmap_in", "domain iova size", symbol="iommu_unmap"),
    _event("fqinit_in", "domain", symbol="iommu_dma_init_fq"),
)
_RANGE_FLUSH = (
    Field("iommu", "", "s"),
    Field("type", " type ", "s"),
    Field("did", " did "),
    Field("start", " ["),
    Field("end", "-"),
    Field("addr", " addr "),
    Field("mask", " mask "),
)
_SG_KEYS = "nents? ents? dma_addrs:l sizes:l phys_addrs:l attrs:s?"
_STATIC = (
    Event("map", (Field("iova", " iova="), Field("end", " - "), *_keys("paddr size"))),
    Event("unmap", (Field("iova", " iova="), Field("end", " - "), *_keys("size unmapped=unmapped_size"))),
    Event("dma_map_phys", (Field("dev", "", "s"), *_keys("dir:s dma_addr:h size phys_addr:h attrs:s?")),
          ("dma_map_page", "dma_map_resource")),
    Event("dma_unmap_phys", (Field("dev", "", "s"), *_keys("dir:s dma_addr:h size attrs:s?")),
          ("dma_unmap_page", "dma_unmap_resource")),
    Event("dma_alloc", (Field("dev", "", "s"), *_keys("dir:s? dma_addr:h size")), ("dma_alloc_pages",)),
    Event("dma_free", (Field("dev", "", "s"), *_keys("dir:s? dma_addr:h size")), ("dma_free_pages",)),
    Event("dma_map_sg", (Field("dev", "", "s"), *_keys("dir:s " + _SG_KEYS))),
    Event("dma_map_sg_err", (Field("dev", "", "s"), *_keys("dir:s phys_addrs=dma_addrs:l err"))),
    Event("dma_unmap_sg", (Field("dev", "", "s"), *_keys("dir:s phys_addrs:l"))),
    Event("dma_sync_single_for_cpu", (Field("dev", "", "s"), *_keys("dir:s dma_addr:h size"))),
    Event("dma_sync_single_for_device", (Field("dev", "", "s"), *_keys("dir:s dma_addr:h size"))),
    Event("swiotlb_bounced", (Field("dev", "dev_name: ", "s"), *_keys("dma_mask:h dev_addr:h size"),
                              Field("force", " ", "s", True))),
    Event("block_rq_issue", (Field("dev", "", "s"), Field("rwbs", " ", "s"), Field("bytes", " "),
                             Field("sector", ") "), Field("sectors", " + "))),
    Event("block_rq_complete", (Field("dev", "", "s"), Field("rwbs", " ", "s"), Field("sector", ") "),
                                Field("sectors", " + "), Field("error", " ["))),
    Event("qi_submit", (Field("type", "", "s"), Field("iommu", " ", "s"), Field("qw0", ": "), Field("qw1", " "),
                        Field("qw2", " "), Field("qw3", " "))),
    Event("cache_tag_flush_range", _RANGE_FLUSH),
    Event("cache_tag_flush_range_np", _RANGE_FLUSH),
    Event("attach_device_to_domain", _keys("dev=device:s")),
    Event("add_device_to_group", _keys("group=groupID dev=device:s")),
    Event("mark", (Field("text", "", "t"),), ("tracing_mark_write", "print", "bprint")),
)  # fmt: skip

EVENTS: tuple[Event, ...] = _ALLOCATOR + _DMA_IOMMU + _INVALIDATION + _STATIC
KIND: dict[str, int] = {event.name: index for index, event in enumerate(EVENTS)}
ALLOCATOR_KINDS = tuple(event.name for event in _ALLOCATOR)


@dataclass(frozen=True, slots=True)
class Need:
    """What a verb does with some events: any one of ``events`` will do; without them ``lost`` does not work."""

    events: tuple[str, ...]
    lost: str


NEEDS: dict[str, tuple[Need, ...]] = {
    "replay": (
        Need(("af_in",), "the interval of each allocation (every allocation is taken to start where the trace starts)"),
        Need(("af_out",), "the allocator replay: no allocation has a recorded answer"),
        Need(("ff_in",), "frees: no range is ever given back, so only allocations before the first free can match"),
        Need(("init_in", "res_in"), "the domain's set-up: its state at the start is unknown and is adopted"),
        Need(("ai_out",), "telling magazine hits from tree searches (only the address is compared)"),
    ),
    "compare": (
        Need(("block_rq_issue",), "grouping mappings into block requests (each mapping counts as a request)"),
        Need(("dma_map_phys", "mp_out", "try_out", "dma_map_sg"), "the workload: no request with segments"),
        Need(("link_out",), "the segments of two-step requests"),
        Need(("destroy_in", "dma_unmap_phys", "ump_in", "dma_unmap_sg"), "lifetimes: requests end in the order begun"),
        Need(("af_out",), "the comparison of IOVAs with the kernel's"),
        Need(("mark",), "phases: the whole trace is one phase"),
    ),
    "explain": (
        Need(("dma_map_phys", "mp_out", "try_out", "dma_map_sg"), "the workload: no request with segments"),
        Need(("try_out",), "whether a two-step window was tried and refused"),
        Need(("link_out",), "the segments of two-step requests"),
        Need(("mark",), "phases: the whole trace is one phase"),
    ),
}  # fmt: skip


def missing_events(present: Iterable[str], verb: str) -> list[Need]:
    """The needs of ``verb`` that a trace with the kinds ``present`` (names of EVENTS) cannot meet."""
    have = set(present)
    return [need for need in NEEDS.get(verb, ()) if not have.intersection(need.events)]
