"""A real kernel's maps and unmaps, fed to our domain: it must send the same invalidations, in the same order.

The traces record every ``iommu_map``, ``iommu_unmap`` and ``iotlb_sync_map`` of one NVMe domain behind an incoherent
VT-d unit, and every request that followed. Only the calls are fed in; what the page table freed (IH), which range a
gather covers and how it is rounded must come out of our code.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmakit.consts import PROT_READ, PROT_WRITE
from dmakit.iommu.domain import PageTableDomain
from dmakit.iommu.gather import Gather
from tests.iommu.world import World, record

TRACES = Path(__file__).resolve().parents[1] / "data" / "kernel-traces"
Event = tuple[object, ...]
_LINE = re.compile(r".*\]\s+\S+\s+[\d.]+: (\w+): (.*)")
_FIELDS = {  # what a line's numbers are; the order is that of our events
    "map": r"iova=(\w+) - \w+ paddr=(\w+) size=(\w+)",
    "unmap": r"iova=(\w+) - \w+ size=(\w+) unmapped_size=(\w+)",
    "syncmap_in": r"iova=(\w+) size=(\w+)",
    "tlbsync_in": r"start=(\w+) end=(\w+) pgsize=\w+ queued=(\w+)",
    "cache_tag_flush_range": r"\[(\w+)-(\w+)\] addr (\w+) mask (\w+)",
    "cache_tag_flush_range_np": r"\[(\w+)-(\w+)\] addr (\w+) mask (\w+)",
    "qi_submit": r"iotlb_inv dmar0: (\w+) (\w+)",
}
_OURS = {"cache_tag_flush_range": "flush_range", "cache_tag_flush_range_np": "flush_range_np", "qi_submit": "qi"}


def kernel_events(name: str) -> Iterator[Event]:
    """The trace's events as our tuples (other invalidations, of interrupt entries and waits, are left out)."""
    with lzma.open(TRACES / f"{name}.trace.txt.xz", "rt") as lines:
        for line in lines:
            match = _LINE.match(line)
            if match and (fields := _FIELDS.get(match[1])) and (found := re.search(fields, match[2])):
                yield (_OURS.get(match[1], match[1]), *(int(number, 0) for number in found.groups()))


def feed(domain: PageTableDomain, kernel: list[Event]) -> None:
    """Make the kernel's calls; a queued unmap is one that no ``tlbsync_in`` follows."""
    freelists: list[int] = []
    for event, following in zip(kernel, [*kernel[1:], ("",)], strict=True):
        kind, *numbers = event
        if kind == "map":
            domain.map(*numbers, PROT_READ | PROT_WRITE)  # type: ignore[call-arg]
        elif kind == "syncmap_in":
            domain.sync_map(*numbers)  # type: ignore[arg-type]
        elif kind == "unmap" and following[0] == "tlbsync_in":
            domain.unmap(numbers[0], numbers[1])  # type: ignore[arg-type]
        elif kind == "unmap":
            gather = Gather(queued=True)
            domain.unmap_gather(numbers[0], numbers[1], gather)  # type: ignore[arg-type]
            freelists.append(gather.freelist)
        elif kind == "flush_range" and numbers[0] == 0:
            domain.flush_all()
            while freelists:
                domain.tables.free_list(freelists.pop())


@pytest.mark.parametrize("name", ["inval-strict-smp1", "inval-lazy-smp1", "inval-cm-smp1"])
def test_the_same_calls_send_the_kernels_invalidations(name: str) -> None:
    kernel = list(kernel_events(name))
    assert len(kernel) > 3000
    domain = World().domain(caching_mode="cm" in name, coherent_walker=False, first_domain_id=4)
    ours = record(domain)
    feed(domain, kernel)
    assert ours == kernel
