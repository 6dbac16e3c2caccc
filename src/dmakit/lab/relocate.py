"""A recorded workload on memory of ours: for machines whose physical addresses we cannot choose.

What a mapping costs depends on where pages are neighbours and where segments begin inside a page. So the recorded pages
are *moved*: runs of neighbouring pages stay runs, what was apart stays apart, and offsets inside a page stay.
"""

from __future__ import annotations

from dataclasses import replace

from dmakit.lab.request_table import Layout, Segments
from dmakit.lab.schedule import SUBMIT
from dmakit.lab.workload import Workload
from dmakit.memory.pages import PageAllocator
from dmakit.units import PAGE


def _frames(workload: Workload) -> list[int]:
    """The numbers of all pages that requests use, ascending."""
    pieces = {piece for layout in workload.requests.layouts for piece in (*layout.segments, *layout.bvecs)}
    return sorted({frame for phys, size in pieces for frame in range(phys // PAGE, -(-(phys + size) // PAGE))})


def memory_needed(workload: Workload) -> int:
    """Bytes that ``moved`` takes at most: the pages, and one between two runs."""
    return 2 * len(_frames(workload)) * PAGE


def moved(workload: Workload, pages: PageAllocator) -> Workload:
    """The workload on pages taken from ``pages``, from its first one on; ExhaustedError when they do not suffice."""
    place: dict[int, int] = {}
    at, before = pages.start, -1
    for frame in _frames(workload):
        if before >= 0 and frame != before + 1:
            at += PAGE
        pages.take(at)
        place[frame] = at
        at, before = at + PAGE, frame

    def there(pieces: Segments) -> Segments:
        return tuple((place[phys // PAGE] + phys % PAGE, size) for phys, size in pieces)

    layouts = [Layout.of(there(layout.segments), there(layout.bvecs)) for layout in workload.requests.layouts]
    return replace(workload, requests=workload.requests.replaced(layouts))


def depth_of(workload: Workload) -> int:
    """The most requests that are in flight."""
    most = now = 0
    for kind, _ in workload.schedule:
        now += 1 if kind == SUBMIT else -1
        most = max(most, now)
    return most
