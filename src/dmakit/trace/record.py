"""``dmakit record``: the shell script that records, on a target kernel, a trace that dmakit can replay.

The dynamic events hook kernel functions by ``$argN`` only, so they work with and without BTF. Each is tried as an
fprobe event (``f:``, Linux 6.5 and later with CONFIG_FPROBE_EVENTS) and, when that is refused, an entry is tried as
a kprobe event; a return is not, because a kretprobe does not see the arguments of the call on every kernel. What a
kernel refuses is said on stderr, and ``events.NEEDS`` says what is lost by it. Offsets into kernel structures are
those of Linux 6.12 to 7.2: ``struct iova`` pfn_lo +32, ``struct dma_iova_state`` addr +0 and __size +8, ``struct
iova_magazine`` size +0 and pfns +8, and the first word of ``struct device`` points at its name.

Recording changes nothing on the target but tracefs. The script takes the top-level trace (the boot-time probes write
there), refuses to start when a tracer is in use, and puts everything back on exit, also when it is interrupted.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Template

_DEV = "dev=+0(+0({arg})):string"  # struct device: kobj.name is the first word
_STATE = "addr=+0({arg}):x64"  # struct dma_iova_state: addr +0, __size +8


@dataclass(frozen=True, slots=True)
class Probe:
    """One dynamic event: group, name, function, arguments; ``event`` of ``events.EVENTS`` has the same name."""

    group: str
    name: str
    function: str
    arguments: str

    @property
    def on_return(self) -> bool:
        """Whether it sits on the function's return."""
        return self.name.endswith("_out")

    def fprobe(self) -> str:
        """The definition as an fprobe event."""
        where = f"{self.function}%return" if self.on_return else self.function
        return f"f:{self.group}/{self.name} {where} {self.arguments}"

    def kprobe(self) -> str:
        """The definition as a kprobe event, empty for a return."""
        return "" if self.on_return else f"p:{self.group}/{self.name} {self.function} {self.arguments}"


def _probes(group: str, text: str) -> tuple[Probe, ...]:
    """Lines ``name function arguments``; ``@dev(N)``, ``@state(N)``: argument N's device name, its state's address."""
    found = []
    for line in text.strip().splitlines():
        name, function, arguments = line.split(None, 2)
        for number in range(1, 6):
            arguments = arguments.replace(f"@dev({number})", _DEV.format(arg=f"$arg{number}"))
            arguments = arguments.replace(f"@state({number})", _STATE.format(arg=f"$arg{number}"))
        found.append(Probe(group, name, function, arguments))
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
STATIC = ("iommu", "dma", "swiotlb", "block/block_rq_issue", "block/block_rq_complete")

BOOT_LINE = (
    "kprobe_event=p:kp/init,init_iova_domain,iovad=$arg1,granule=$arg2,start=$arg3;"
    "p:kp/res,reserve_iova,iovad=$arg1,lo=$arg2,hi=$arg3;"
    "p:kp/af,alloc_iova_fast,iovad=$arg1,size=$arg2,limit=$arg3;r:kp/afr,alloc_iova_fast,pfn=$retval;"
    "p:kp/ff,free_iova_fast,iovad=$arg1,pfn=$arg2,size=$arg3 "
    "trace_event=kp:*,iommu:* trace_buf_size=8M trace_clock=mono"
)

_SCRIPT = Template(
    r"""#!/bin/sh
# Records what Linux does for DMA mapping, for: dmakit replay NAME.trace.txt, dmakit compare, dmakit explain.
# Written by: dmakit record --print ($version). Needs root and tracefs; Linux 6.12 or later (fprobe events for answers).
#
#   sh record.sh NAME -- COMMAND ...     record while COMMAND runs
#   sh record.sh NAME SECONDS            record for some seconds
#
# Leaves NAME.trace.txt (NAME.trace.txt.xz where xz is installed) and, when the kernel was booted with the line below,
# NAME.boot.txt: the set-up of every domain, without which the first answers can only be adopted. Kernel command line:
#
#   $boot
#
# Mark phases of the workload by:  echo "PHASE x" > $$T/trace_marker ... echo "PHASE x-end" > $$T/trace_marker
# CLOCK=counter (default) numbers the events: one exact order over all CPUs. CLOCK=mono gives seconds.
# DEVICE=0000:00:04.0 limits the dma:* events to one device. BUFFER_KB sets the ring buffer of each CPU.
set -eu
usage() { echo "usage: $$0 NAME -- COMMAND [ARGUMENT ...] | $$0 NAME SECONDS" >&2; exit 2; }
[ $$# -ge 2 ] || usage
NAME=$$1; shift
if [ "$$1" = -- ]; then
    shift; [ $$# -ge 1 ] || usage
else
    case $$1 in ''|*[!0-9]*) usage;; esac
    set -- sleep "$$1"
fi
CLOCK=$${CLOCK:-counter}; DEVICE=$${DEVICE:-}; BUFFER_KB=$${BUFFER_KB:-60000}

T=$${TRACEFS:-/sys/kernel/tracing}
[ "$$(id -u)" = 0 ] || [ -w $$T/trace ] || { echo "record: needs root" >&2; exit 2; }
[ -e $$T/trace ] || mount -t tracefs nodev $$T 2>/dev/null || true
[ -e $$T/trace ] || T=/sys/kernel/debug/tracing
[ -e $$T/trace ] || { echo "record: no tracefs at /sys/kernel/tracing" >&2; exit 2; }
[ "$$(cat $$T/current_tracer)" = nop ] || { echo "record: tracer $$(cat $$T/current_tracer) is in use" >&2; exit 2; }
for f in "$$NAME.trace.txt" "$$NAME.trace.txt.xz"; do
    if [ -e "$$f" ]; then echo "record: $$f exists" >&2; exit 2; fi
done

old_clock=$$(sed 's/.*\[\(.*\)\].*/\1/' $$T/trace_clock)
old_buffer=$$(sed 's/ .*//' $$T/buffer_size_kb)
old_on=$$(cat $$T/tracing_on)
dynamic=$$T/dynamic_events; [ -e $$dynamic ] || dynamic=$$T/kprobe_events
made=
cleanup() {
    trap - EXIT INT TERM HUP
    set +e
    echo 0 > $$T/tracing_on
    for e in $statics; do echo 0 > $$T/events/$$e/enable; done 2>/dev/null
    [ -n "$$DEVICE" ] && echo 0 > $$T/events/dma/filter 2>/dev/null
    for e in $$made; do echo 0 > $$T/events/$$e/enable; echo "-:$$e" >> $$dynamic; done 2>/dev/null
    echo "$$old_buffer" > $$T/buffer_size_kb
    echo "$$old_clock" > $$T/trace_clock
    echo "$$old_on" > $$T/tracing_on
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

# What the probes on the kernel command line saw, before it is overwritten.
if grep -q '^p:kp/init ' $$T/kprobe_events 2>/dev/null; then
    grep -q ' init: ' $$T/trace && cat $$T/trace > "$$NAME.boot.txt"
else
    echo "record: no boot-time probes: the set-up of the domains will not be known (see the head of this script)" >&2
fi
echo 0 > $$T/tracing_on
[ -e $$T/events/kp/enable ] && echo 0 > $$T/events/kp/enable
echo > $$T/trace
echo "$$BUFFER_KB" > $$T/buffer_size_kb
echo "$$CLOCK" > $$T/trace_clock

probe() { # group/name, fprobe definition, kprobe definition (may be empty)
    if echo "$$2" >> $$dynamic 2>/dev/null || { [ -n "$$3" ] && echo "$$3" >> $$dynamic 2>/dev/null; }; then
        made="$$made $$1"; echo 1 > "$$T/events/$$1/enable"
    else
        echo "record: this kernel refused $$1: $$2" >&2
    fi
}
$probes
for e in $statics; do
    if [ -e "$$T/events/$$e/enable" ]; then echo 1 > "$$T/events/$$e/enable"; else echo "record: no events $$e" >&2; fi
done
if [ -n "$$DEVICE" ]; then echo "device == \"$$DEVICE\"" > $$T/events/dma/filter; fi

echo 1 > $$T/tracing_on
status=0
"$$@" || status=$$?
echo 0 > $$T/tracing_on
lost=$$(cat $$T/per_cpu/cpu*/stats | awk '/^(overrun|dropped events):/ { n += $$NF } END { print n + 0 }')
[ "$$lost" = 0 ] || echo "record: $$lost events lost: use a larger BUFFER_KB (now $$BUFFER_KB) or a shorter run" >&2
if command -v xz >/dev/null 2>&1; then
    xz -1 < $$T/trace > "$$NAME.trace.txt.xz"; echo "$$NAME.trace.txt.xz"
else
    cat $$T/trace > "$$NAME.trace.txt"; echo "$$NAME.trace.txt"
fi
exit $$status
"""
)


def script(version: str = "") -> str:
    """The self-contained POSIX shell script."""
    lines = [
        f"probe {probe.group}/{probe.name} '{probe.fprobe()}' '{probe.kprobe()}'" for probe in (*ALLOCATOR, *MAPPING)
    ]
    return _SCRIPT.substitute(
        version=f"dmakit {version}".strip(), boot=BOOT_LINE, statics=" ".join(STATIC), probes="\n".join(lines)
    )
