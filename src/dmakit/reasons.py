"""Reasons and paths: every request takes exactly one declared path, and the code that decides says why.

A *path* is a way through a consumer's mapping code (``nvme``: ``map_phys``, ``two-step``, ``per-segment``, …),
declared once by that consumer together with the set of paths that it calls fast. A *reason* is recorded at
the branch that decided, on fast and slow paths alike. ``compare`` and ``explain`` only report what was
recorded; they never guess. Each reason carries its rule in words, what would put the request on the fast
path, and the kernel source that it follows.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain, pairwise


class Reason(IntEnum):
    """Why a request took its path. Values are stable: hot code stores them in arrays."""

    NONE = 0
    SINGLE_SEGMENT = 1
    SINGLE_SEGMENT_TOO_LONG_FOR_PRP = 2
    COALESCED = 3
    GAP_IN_MERGE_BOUNDARY = 4
    NO_IOMMU = 5
    IDENTITY_DOMAIN = 6
    P2P_BUS = 7
    P2P_HOST_BRIDGE = 8
    P2P_NOT_SUPPORTED = 9
    UNTRUSTED_BOUNCE = 10
    MASK_BOUNCE = 11
    FORCED_BOUNCE = 12
    KMALLOC_BOUNCE = 13
    NON_COHERENT = 14
    IOVA_EXHAUSTED = 15
    OVER_RCACHE_LIMIT = 16
    TABLE_MEMORY_EXHAUSTED = 17
    SLOTS_EXHAUSTED = 18
    STRATEGY = 19
    PREMAPPED = 20
    SG_MERGED = 21
    SG_NOT_MERGED = 22
    MAX_SEGMENT = 23
    SEGMENT_BOUNDARY = 24
    NOT_IN_TRACE = 25
    NO_VIRT_BOUNDARY = 26
    NO_DATA = 27
    DESCRIPTORS_EXHAUSTED = 28
    MALFORMED_SEGMENTS = 29
    NOT_OFFERED = 30
    COSTS_UNKNOWN = 31
    WINDOW_CHEAPER = 32
    RENT_BELOW_PRICE = 33
    RENT_ABOVE_PRICE = 34
    REGISTRATION_REFUSED = 35
    NOT_REGISTRABLE = 36


@dataclass(frozen=True, slots=True)
class Rule:
    """What a reason means: the rule, what would make the request fast, the source it follows."""

    text: str
    remedy: str
    source: str = ""


RULES: dict[Reason, Rule] = {
    Reason.NONE: Rule("no branch recorded a reason", "report it: every branch must record one"),
    Reason.SINGLE_SEGMENT: Rule(
        "one physically contiguous segment that two PRPs or one SGL descriptor can describe: one dma_map_phys, "
        "no IOVA window",
        "it is the fast path",
        "drivers/nvme/host/pci.c nvme_pci_setup_data_simple",
    ),
    Reason.SINGLE_SEGMENT_TOO_LONG_FOR_PRP: Rule(
        "one segment, but it reaches over more than two controller pages and the controller has no SGLs: "
        "the general iterator builds a PRP list",
        "a controller with SGL support, or requests of at most 8 KiB",
        "drivers/nvme/host/pci.c nvme_pci_setup_data_simple",
    ),
    Reason.COALESCED: Rule(
        "all gaps between segments fall on the merge boundary: one IOVA window, every segment linked, one sync, "
        "one device-visible range",
        "it is the fast path for several segments",
        "block/blk-mq-dma.c blk_rq_dma_map_iter_start",
    ),
    Reason.GAP_IN_MERGE_BOUNDARY: Rule(
        "a segment starts or ends inside an IOMMU granule, so the pieces cannot be made contiguous: "
        "each segment is mapped by itself",
        "buffers whose interior segments start and end on the granule (4 KiB)",
        "block/blk-mq-dma.c blk_rq_dma_map_iter_start (gap mask & merge boundary)",
    ),
    Reason.NO_IOMMU: Rule(
        "the device has no IOMMU: addresses are physical and nothing can be coalesced",
        "an IOMMU in translating mode, or physically contiguous buffers (huge pages)",
        "drivers/iommu/dma-iommu.c dma_iova_try_alloc",
    ),
    Reason.IDENTITY_DOMAIN: Rule(
        "the device's domain is identity (passthrough): addresses are physical and nothing can be coalesced",
        "a translating domain (iommu.passthrough=0), or physically contiguous buffers (huge pages)",
        "drivers/iommu/dma-iommu.c dma_iova_try_alloc",
    ),
    Reason.P2P_BUS: Rule(
        "peer-to-peer below one switch: the bus address is used and the IOMMU is not involved",
        "it is the fast path for peer memory",
        "drivers/pci/p2pdma.c pci_p2pdma_state",
    ),
    Reason.P2P_HOST_BRIDGE: Rule(
        "peer-to-peer through a host bridge: mapped like memory, with MMIO protection and no cache maintenance",
        "put both devices below one switch with ACS redirect off",
        "drivers/pci/p2pdma.c calc_map_type_and_dist",
    ),
    Reason.P2P_NOT_SUPPORTED: Rule(
        "peer-to-peer is not possible between these devices: the request fails",
        "put both devices below one switch, or behind a host bridge that is known to forward",
        "drivers/pci/p2pdma.c host_bridge_whitelist",
    ),
    Reason.UNTRUSTED_BOUNCE: Rule(
        "the device is untrusted and the buffer is not granule-aligned: head and tail go through bounce slots",
        "granule-aligned buffers, or a port that is not marked external-facing",
        "drivers/iommu/dma-iommu.c iommu_dma_iova_link_swiotlb",
    ),
    Reason.MASK_BOUNCE: Rule(
        "the buffer lies above what the device can address and there is no IOMMU: copied through a bounce slot",
        "a wider DMA mask, an IOMMU, or memory from a low zone",
        "kernel/dma/direct.h dma_direct_map_phys",
    ),
    Reason.FORCED_BOUNCE: Rule(
        "swiotlb=force: every mapping is copied", "boot without swiotlb=force", "kernel/dma/swiotlb.c"
    ),
    Reason.KMALLOC_BOUNCE: Rule(
        "a non-coherent device reads into a small buffer that shares cache lines: copied through a bounce slot",
        "buffers aligned and sized to the DMA alignment",
        "include/linux/dma-map-ops.h dma_kmalloc_needs_bounce",
    ),
    Reason.NON_COHERENT: Rule(
        "the device does not snoop CPU caches: every mapping cleans or invalidates the cache",
        "a coherent device; nothing in the mapping API can avoid it",
        "drivers/iommu/dma-iommu.c",
    ),
    Reason.IOVA_EXHAUSTED: Rule(
        "no free IOVA range of this size below the device's limit: each segment is mapped by itself",
        "a wider DMA mask, or fewer bytes mapped at once",
        "drivers/iommu/iova.c alloc_iova_fast",
    ),
    Reason.OVER_RCACHE_LIMIT: Rule(
        "the window is larger than 32 granules, so every allocation searches the red-black tree under its lock",
        "requests of at most 128 KiB that start on a page (dma_opt_mapping_size)",
        "drivers/iommu/iova.c iova_rcache_range",
    ),
    Reason.TABLE_MEMORY_EXHAUSTED: Rule(
        "no memory for an IOMMU page table", "more memory; the request is retried", "drivers/iommu/generic_pt"
    ),
    Reason.SLOTS_EXHAUSTED: Rule(
        "no contiguous run of bounce slots is free",
        "a larger pool (swiotlb=), smaller requests",
        "kernel/dma/swiotlb.c",
    ),
    Reason.STRATEGY: Rule("the strategy under test always takes this path", "compare with another strategy"),
    Reason.PREMAPPED: Rule(
        "the buffer was mapped when it was registered: the request only computes offsets", "it is the fast path"
    ),
    Reason.SG_MERGED: Rule(
        "dma_map_sg merged neighbours that meet on granule boundaries into fewer output segments",
        "it is the fast path of map_sg",
        "drivers/iommu/dma-iommu.c __finalise_sg",
    ),
    Reason.SG_NOT_MERGED: Rule(
        "dma_map_sg could not merge: a piece ends inside a granule, or there is no IOMMU",
        "granule-aligned pieces behind an IOMMU",
        "drivers/iommu/dma-iommu.c __finalise_sg",
    ),
    Reason.MAX_SEGMENT: Rule(
        "an output segment reached the device's max_segment_size",
        "a larger dma_set_max_seg_size",
        "drivers/iommu/dma-iommu.c __finalise_sg",
    ),
    Reason.SEGMENT_BOUNDARY: Rule(
        "an output segment met the device's segment boundary",
        "a wider dma_set_seg_boundary",
        "drivers/iommu/dma-iommu.c iommu_dma_map_sg",
    ),
    Reason.NO_VIRT_BOUNDARY: Rule(
        "the queue has no virtual boundary as wide as the IOMMU granule, and Linux 6.17 and 6.18 ask the queue, not "
        "the request: each segment is mapped by itself",
        "Linux 6.19 or later, where the request's own gaps decide",
        "block/blk-mq-dma.c blk_can_dma_map_iova (6.17)",
    ),
    Reason.NO_DATA: Rule("the command carries no data: nothing is mapped", "it is the fast path"),
    Reason.DESCRIPTORS_EXHAUSTED: Rule(
        "no memory for a PRP or SGL list, or for the vectors that unmapping needs: the request is undone and retried",
        "more memory",
        "drivers/nvme/host/pci.c nvme_pci_setup_data_prp, nvme_pci_setup_data_sgl",
    ),
    Reason.MALFORMED_SEGMENTS: Rule(
        "segments do not meet on controller pages, which PRPs cannot describe: the request fails",
        "a controller with SGL support, or buffers whose interior segments are page-aligned",
        "drivers/nvme/host/pci.c nvme_pci_setup_data_prp",
    ),
    Reason.NOT_OFFERED: Rule(
        "auto: nobody said how long this memory lives, so it is not kept mapped: one window for this request",
        "memory of Controller.buffer, or offered to the mapper",
    ),
    Reason.COSTS_UNKNOWN: Rule(
        "auto: what mappings cost here could not be measured: one window for this request",
        "free memory, mappings or IOVAs when the first request comes",
    ),
    Reason.WINDOW_CHEAPER: Rule(
        "auto: measured here, a window for this request costs no more than computing addresses of registered memory",
        "it is the cheapest path",
    ),
    Reason.RENT_BELOW_PRICE: Rule(
        "auto: the buffer's windows have not cost as much yet as registering it would: one more window",
        "more uses of the same buffer",
    ),
    Reason.RENT_ABOVE_PRICE: Rule(
        "auto: the buffer's windows would have cost more than registering it, so it is registered and requests only "
        "compute addresses",
        "it is the cheapest path",
    ),
    Reason.REGISTRATION_REFUSED: Rule(
        "auto: registering the buffer was worth it and was refused (mappings, locked memory or IOVAs ran out): "
        "windows until it is tried again",
        "higher limits (dma_entry_limit, RLIMIT_MEMLOCK, the device's mask), or fewer and smaller buffers",
    ),
    Reason.NOT_REGISTRABLE: Rule(
        "auto: registered memory is not synced on each use, and this device does not snoop or its memory is bounced",
        "a coherent, trusted device that reaches all memory",
    ),
    Reason.NOT_IN_TRACE: Rule("not knowable from this trace", "record the missing events (dmakit record --help)"),
}


_HOLE = 0xFFFF


class PathLog:
    """Which path each request took, and why. ``paths`` and ``fast`` are the consumer's declaration.

    ``requests`` holds one (path, reason) pair a request, in order; ``counts`` sums them. One request may take
    only one path: a second ``take`` for the same request is a bug of the consumer and raises.
    """

    def __init__(self, paths: tuple[str, ...], fast: frozenset[str]) -> None:
        unknown = fast - set(paths)
        if unknown:
            raise ValueError(f"fast paths {sorted(unknown)} are not among the declared paths {paths}")
        self.paths = paths
        self.fast = fast
        self._taken = array("H")  # of the requests numbered 0, 1, 2 …, as long as they come in order
        self._holes = 0  # numbers among them that took no path: _HOLE
        self._others: dict[int, int] = {}

    @property
    def requests(self) -> Mapping[int, tuple[int, Reason]]:
        """(index of the path, reason) by request, in the order they were taken."""
        return _Taken(self._taken, self._holes, self._others)

    def take(self, request: int, path: str, reason: Reason) -> None:
        """Record the path of ``request`` (any unique number) and the reason of the deciding branch."""
        taken = self.paths.index(path) << 8 | reason
        if request == len(self._taken) and not self._others:
            self._taken.append(taken)
        elif request in self.requests:
            raise ValueError(f"request {request} already took path {self.paths[self.requests[request][0]]!r}")
        else:
            self._others[request] = taken

    def take_all(self, requests: Sequence[int], taken: Sequence[int]) -> None:
        """``take`` for many, in order: their numbers, and path and reason coded as ``path index << 8 | reason``.

        Numbers between them that took no path (their requests failed) cost as much, unless they are many.
        """
        first, count = len(self._taken), len(requests)
        if not self._others and memoryview(array("Q", range(first, first + count))) == requests:
            self._taken.extend(taken)
            return
        few = not self._others and count and requests[-1] - first < 2 * count
        if few and all(a < b for a, b in pairwise([first - 1, *requests])):
            dense = array("H", [_HOLE]) * (requests[-1] + 1 - first)
            for request, code in zip(requests, taken, strict=True):
                dense[request - first] = code
            self._taken.extend(dense)
            self._holes += len(dense) - count
            return
        for request, code in zip(requests, taken, strict=True):
            self.take(request, self.paths[code >> 8], Reason(code & 255))

    def _summed(self) -> list[tuple[int, Reason, int]]:
        """(path, reason, requests), sorted."""
        sums = Counter(self._taken) + Counter(self._others.values())
        sums.pop(_HOLE, None)
        return [(taken >> 8, Reason(taken & 255), count) for taken, count in sorted(sums.items())]

    def counts(self) -> dict[str, dict[Reason, int]]:
        """{path: {reason: count}} over all requests, in the order of declaration."""
        table: dict[str, dict[Reason, int]] = {}
        for path, reason, count in self._summed():
            table.setdefault(self.paths[path], {})[reason] = count
        return table

    def slow(self) -> int:
        """How many requests left the fast paths."""
        return sum(count for path, _, count in self._summed() if self.paths[path] not in self.fast)


class _Taken(Mapping[int, tuple[int, Reason]]):
    """A view of a path log: two bytes a request, as long as requests are numbered as they come."""

    def __init__(self, taken: array[int], holes: int, others: dict[int, int]) -> None:
        self._taken, self._holes, self._others = taken, holes, others

    def __getitem__(self, request: int) -> tuple[int, Reason]:
        code = self._taken[request] if 0 <= request < len(self._taken) else _HOLE
        if code == _HOLE:
            code = self._others[request]
        return code >> 8, Reason(code & 255)

    def __iter__(self) -> Iterator[int]:
        dense: Iterable[int] = range(len(self._taken))
        if self._holes:
            dense = (request for request, code in enumerate(self._taken) if code != _HOLE)
        return chain(dense, self._others)

    def __len__(self) -> int:
        return len(self._taken) - self._holes + len(self._others)
