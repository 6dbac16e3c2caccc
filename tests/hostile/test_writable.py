"""What Python may write into objects of compiled classes: a short declared list, nothing of it trusted as a bound.

A C attribute is written without a look at the value. So attributes are ``readonly`` (to Python; our own typed code
writes them), except where a module that is not compiled must write them, and then compiled code checks the value where
it counts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dmakit import _core

PACKAGE = Path(_core.__file__).parent
COMPILED = pytest.mark.skipif(
    bool(_core.status()["missing"]) and not os.environ.get("CI"), reason="no compiled core here: ./dmakit build"
)

OBJECT = "an object: C code only asks whether it is None, what is called is called by Python"
NUMBER = "a number that C code hands on or compares: no place or count is taken from it"
WRITABLE = {
    "MapCore.checker": OBJECT,
    "MapCore.events": OBJECT,
    "IommuUnit.events": OBJECT,
    "Domain.events": OBJECT,
    "Swiotlb.events": OBJECT,
    "Request.context": "an object: the caller's own, never looked at",
    "Request.tag": "a number that only interpreted code reads",
    "Iod.status": NUMBER,
    "Iod.flags": "bits that are compared",
    "Iod.psdt": NUMBER,
    "Iod.low": "an address: unmapping it is checked as unmap_phys checks it",
    "Iod.high": "a length: as low",
    "Iod.mptr": "an address: as low",
    "Iod.total": "a length: as low",
    "Iod.state": "an object: called by Python",
    "Iod.chain": "list blocks: looked up in the pools, with bounds, before they are read or given back",
    "Iod.entries": "a count: unmap checks it against the list block",
    "Iod.meta_state": "an object: called by Python",
    "Iod.meta_map_type": NUMBER,
    "Iod.meta_total": "a length: as low",
    "Iod.meta_block": "an object: only interpreted code reads it, with bounds",
    "Iod.meta_entries": "a count that only interpreted code uses, with bounds; compiled code adds it to the ledger",
    "Iod.path": "an index: path_name checks it",
    "Iod.reason": NUMBER,
    "Iod.error": "an object: never looked at",
    "Timeline.limit": "a place in the trace: times are compared with it",
    "Timeline.free_returns_recorded": "whether an operation waits for more of its events",
    "Counts.reordered": NUMBER,
}


def writable() -> set[str]:
    """``Class.attribute`` of every C attribute that Python may write."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.pxd"):
        owner = ""
        for line in path.read_text().splitlines():
            if start := re.match(r"cdef class (\w+)", line):
                owner = start[1]
            elif public := re.match(r"\s+cdef public .*?(\w+(?:, *\w+)*)\s*$", line):
                found |= {f"{owner}.{name.strip()}" for name in public[1].split(",")}
    return found


def test_what_python_may_write_is_declared() -> None:
    assert writable() == set(WRITABLE)
    for module in _core.COMPILED_MODULES:
        assert "visibility=" not in _core.source_of(module).read_text(), module


HOSTILE = """
from dmakit.dma.scatter import SgMapping
from dmakit.iommu.gather import Gather
from tests.hostile.world import World

NUMBERS = (1 << 40, 1 << 62, (1 << 31) - 1, 4096, -1, -(1 << 31))

def wrote(thing, name, value):
    try:
        setattr(thing, name, value)
    except (AttributeError, OverflowError, TypeError):
        return False
    return True

def used(call):
    try:
        call()
    except Exception as error:
        assert type(error).__name__ in ("MisuseError", "OverflowError", "TypeError", "AttributeError"), repr(error)

for number in NUMBERS:
    sg = SgMapping(1)
    for name in ("entries", "capacity", "count", "live", "each"):
        assert not wrote(sg, name, number), name
    sg.inputs, sg.segments
    gather = Gather()
    for name in ("start", "end", "freelist", "pgsize", "mapped", "queued"):
        assert not wrote(gather, name, number), name
    used(lambda: World().part("Domain").flush(gather))
    for name in ITEMS:
        world = World()
        mapper, iod = world.part("RequestMapper"), world.part("Iod")
        wrote(iod, name, number)
        for look in ("path_name", "bookkeeping_bytes"):
            used(lambda: getattr(iod, look))
        used(lambda: mapper.unmap(iod))
    world = World()
    device = world.part("Device")
    for name in ("mask", "boundary", "max_segment", "min_align_mask", "why", "error"):
        assert not wrote(device, name, number), name
print("lives")
"""


@COMPILED
def test_hostile_numbers_are_refused_or_harmless() -> None:
    items = sorted(name.partition(".")[2] for name in WRITABLE if name.startswith("Iod."))
    script = f"ITEMS = {items!r}\n{HOSTILE}"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "DMAKIT_CORE": "compiled", "PYTHONPATH": f"{PACKAGE.parent}:{PACKAGE.parent.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "lives\n"), run.stderr
