"""The shell script that records on a machine where dmakit cannot be installed: ``dmakit record --script``.

It sets the events of ``probes.py`` (fprobe, else kprobe) in the top-level trace, refuses to start when a tracer is in
use, says on stderr what the kernel refuses, and puts everything back on exit, also when it is interrupted. Where dmakit
can be installed, ``dmakit record`` is better: an instance of its own, exact accounting of lost events, a marked file.
"""

from __future__ import annotations

from string import Template

from dmakit.trace.probes import ALLOCATOR, BOOT_LINE, MAPPING, STATIC

_SCRIPT = Template(
    r"""#!/bin/sh
# Records what Linux does for DMA mapping, for: dmakit replay NAME.trace.txt, dmakit compare, dmakit explain.
# Written by: dmakit record --script ($version). Needs root and tracefs, Linux 6.12 or later.
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
old_buffer=$$(sed 's/.*expanded: \([0-9]*\).*/\1/' $$T/buffer_size_kb)  # until its first use it is "7 (expanded: 1408)"
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
