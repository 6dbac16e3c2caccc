"""The events that a recording switches on: dynamic events on kernel functions, and the kernel's own.

The dynamic events hook kernel functions by ``$argN`` only, so they work with and without BTF. Each is tried as an
fprobe event (``f:``, Linux 6.5 and later with CONFIG_FPROBE_EVENTS) and, when that is refused, as a kprobe event
(CONFIG_KPROBE_EVENTS). A return event that reads arguments is refused by kernels before 6.9, where a kretprobe does not
keep them: refused, never read wrongly. ``events.missing_events`` says what is lost by a refusal.

Offsets into kernel structures are those of Linux 6.12 to 7.2: ``struct iova`` pfn_lo +32, ``struct dma_iova_state``
addr +0 and __size +8, ``struct iova_magazine`` size +0 and pfns +8, ``struct iommu_iotlb_gather`` start +0, end +8,
pgsize +16 and queued +40; the first word of ``struct device`` points at its name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_DEV = "dev=+0(+0({arg})):string"  # struct device: kobj.name is the first word
_STATE = "addr=+0({arg}):x64"  # struct dma_iova_state: addr +0, __size +8
_RETURNS_AT_ONCE = 256  # calls of one function that a kretprobe can have under way; more are misses, and counted


@dataclass(frozen=True, slots=True)
class Probe:
    """One dynamic event: name, function, arguments; ``event`` of ``events.EVENTS`` has the same name."""

    group: str
    name: str
    function: str
    arguments: str

    @property
    def on_return(self) -> bool:
        """Whether it sits on the function's return."""
        return self.name.endswith("_out")

    @property
    def names_device(self) -> bool:
        """Whether it has a field ``dev``, by which it can be filtered."""
        return self.arguments.startswith("dev=") or " dev=" in self.arguments

    def fprobe(self, group: str = "") -> str:
        """The definition as an fprobe event."""
        where = f"{self.function}%return" if self.on_return else self.function
        return f"f:{group or self.group}/{self.name} {where} {self.arguments}"

    def kprobe(self, group: str = "") -> str:
        """The definition as a kprobe event."""
        kind = f"r{_RETURNS_AT_ONCE}" if self.on_return else "p"
        return f"{kind}:{group or self.group}/{self.name} {self.function} {self.arguments}"


def _probes(group: str, text: str) -> tuple[Probe, ...]:
    """Lines ``name function arguments``; ``@dev(N)``, ``@state(N)``: argument N's device name, its state's address."""
    found = []
    for line in text.strip().splitlines():
        name, function, arguments = line.split(None, 2)
        for number in range(1, 6):
            arguments = arguments.replace(f"@dev({number})", _DEV.format(arg=f"$arg{number}"))
            arguments = arguments.replace(f"@state({number})", _STATE.format(arg=f"$arg{number}"))
        found.append(Probe(group, name, function, " ".join(arguments.split())))
    return tuple(found)


ALLOCATOR = _probes(
    "iova",
    """
af_in alloc_iova_fast iovad=$arg1:x64 size=$arg2:u64 limit=$arg3:x64 flush=$arg4:u8
af_out alloc_iova_fast iovad=$arg1:x64 size=$arg2:u64 limit=$arg3:x64 pfn=$retval:x64
ai_out alloc_iova iovad=$arg1:x64 size=$arg2:u64 limit=$arg3:x64 aligned=$arg4:u8 ret=$retval:x64 lo=+32($retval):x64
ff_in free_iova_fast iovad=$arg1:x64 pfn=$arg2:x64 size=$arg3:u64
ff_out free_iova_fast iovad=$arg1:x64 pfn=$arg2:x64 size=$arg3:u64
fi_in free_iova iovad=$arg1:x64 pfn=$arg2:x64
res_in reserve_iova iovad=$arg1:x64 lo=$arg2:x64 hi=$arg3:x64
init_in init_iova_domain iovad=$arg1:x64 granule=$arg2:x64 start=$arg3:x64
put_in put_iova_domain iovad=$arg1:x64
depot_in iova_depot_work_func work=$arg1:x64
magfree_in iova_magazine_free_pfns iovad=$arg2:x64 mag=$arg1:x64 n=+0($arg1):u64 pfns=+8($arg1):x64[32]
cpufree_in free_cpu_cached_iovas cpu=$arg1:u32 iovad=$arg2:x64
fqto_in fq_flush_timeout timer=$arg1:x64
""",
)
MAPPING = _probes(
    "dio",
    """
alloc_out iommu_dma_alloc_iova domain=$arg1:x64 size=$arg2:u64 limit=$arg3:x64 @dev(4) ret=$retval:x64
try_out dma_iova_try_alloc @dev(1) phys=$arg3:x64 size=$arg4:u64 ok=$retval:u8 @state(2) ssize=+8($arg2):x64
link_out dma_iova_link @dev(1) @state(2) phys=$arg3:x64 off=$arg4:u64 size=$arg5:u64 dir=$arg6:u32 ret=$retval:s32
sync_out dma_iova_sync @dev(1) @state(2) off=$arg3:u64 size=$arg4:u64 ret=$retval:s32
unlink_in dma_iova_unlink @dev(1) @state(2) off=$arg3:u64 size=$arg4:u64 dir=$arg5:u32
destroy_in dma_iova_destroy @dev(1) @state(2) ssize=+8($arg2):x64 mapped=$arg3:u64 dir=$arg4:u32
dfree_in dma_iova_free @dev(1) @state(2) ssize=+8($arg2):x64
mp_out iommu_dma_map_phys @dev(1) phys=$arg2:x64 size=$arg3:u64 dir=$arg4:u32 attrs=$arg5:x64 ret=$retval:x64
ump_in iommu_dma_unmap_phys @dev(1) addr=$arg2:x64 size=$arg3:u64 dir=$arg4:u32
msg_out iommu_dma_map_sg @dev(1) nents=$arg3:u32 ret=$retval:s32
umsg_in iommu_dma_unmap_sg @dev(1) nents=$arg3:u32
al_out iommu_dma_alloc @dev(1) size=$arg2:u64 handle=+0($arg3):x64 ret=$retval:x64
fr_in iommu_dma_free @dev(1) size=$arg2:u64 handle=$arg4:x64
swtlb_out swiotlb_tbl_map_single @dev(1) phys=$arg2:x64 size=$arg3:u64 ret=$retval:x64
""",
)
#: What ``replay --calls`` looks at beside the calls: why an invalidation was sent (Intel VT-d).
INVALIDATION = _probes(
    "inv",
    """
all_in intel_flush_iotlb_all domain=$arg1:x64
all_out intel_flush_iotlb_all domain=$arg1:x64
tlbsync_in intel_iommu_tlb_sync domain=$arg1:x64 start=+0($arg2):x64 end=+8($arg2):x64 \
 pgsize=+16($arg2):x64 queued=+40($arg2):u8
syncmap_in intel_iommu_iotlb_sync_map domain=$arg1:x64 iova=$arg2:x64 size=$arg3:u64
fqto_out fq_flush_timeout timer=$arg1:x64
fqring_in fq_ring_free_locked cookie=$arg1:x64 fq=$arg2:x64
mapsg_in iommu_dma_map_sg @dev(1) nents=$arg3:u32 dir=$arg4:u32 attrs=$arg5:x64 sgl=$arg2:x64 sg=+0($arg2):x64[48]
mapsg_out iommu_dma_map_sg @dev(1) nents=$arg3:u32 ret=$retval:s32 sgl=$arg2:x64 sg=+0($arg2):x64[48]
blink_in iommu_dma_iova_bounce_and_link @dev(1) addr=$arg2:x64 phys=$arg3:x64 len=$arg4:u64 dir=$arg5:u32 \
 attrs=$arg6:x64
tblmap_out swiotlb_tbl_map_single @dev(1) phys=$arg2:x64 size=$arg3:u64 alignmask=$arg4:x64 dir=$arg5:u32 \
 attrs=$arg6:x64 ret=$retval:x64
tblunmap_in __swiotlb_tbl_unmap_single @dev(1) tlb=$arg2:x64 size=$arg3:u64 dir=$arg4:u32 attrs=$arg5:x64
""",
)
STATIC = ("iommu", "dma", "swiotlb", "block/block_rq_issue", "block/block_rq_complete")
STATIC_CALLS = ("intel_iommu",)

BOOT_LINE = (
    "kprobe_event=p:kp/init,init_iova_domain,iovad=$arg1,granule=$arg2,start=$arg3;"
    "p:kp/res,reserve_iova,iovad=$arg1,lo=$arg2,hi=$arg3;"
    "p:kp/af,alloc_iova_fast,iovad=$arg1,size=$arg2,limit=$arg3;r:kp/afr,alloc_iova_fast,pfn=$retval;"
    "p:kp/ff,free_iova_fast,iovad=$arg1,pfn=$arg2,size=$arg3 "
    "trace_event=kp:*,iommu:* trace_buf_size=8M trace_clock=mono"
)
BOOT_EVENTS = tuple(re.findall(r"kp/(\w+),", BOOT_LINE))
