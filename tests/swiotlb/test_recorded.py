"""The pool against recorded kernels: every bounce address of four recordings, in order.

``tests/data/swiotlb/NAME.txt.xz`` holds, in the order of a recording of Linux 7.2: ``m CPU PHYS SIZE TLB`` for each
return of swiotlb_tbl_map_single and ``u TLB SIZE DIRECTION`` for each unmap (SIZE decimal, addresses hexadecimal, all
ones = failed). All have a 64 MiB pool of 32768 slots and one area a CPU.
"""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from dmakit.errors import ExhaustedError
from dmakit.ledger import Ledger
from dmakit.memory.physical import PhysicalMemory
from dmakit.swiotlb.bounce import Swiotlb

DATA = Path(__file__).resolve().parents[1] / "data" / "swiotlb"
FAILED = (1 << 64) - 1

# name: pool start, areas, granule - 1 (dma-iommu) or 0 (direct mapping), the driver's min_align_mask, maps, failures
RECORDINGS = {
    "passthrough-forced-smp2": (0x79600000, 2, 0, 4095, 4618, 0),
    "untrusted-nvme-smp1": (0x7BFDD000, 1, 4095, 4095, 636, 0),
    "untrusted-module": (0x7BFDD000, 1, 4095, 0, 24, 0),
    "untrusted-module-minalign": (0x7BFDD000, 1, 4095, 4095, 28, 1),
}


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_recorded_bounce_address_is_reproduced(name: str) -> None:
    start, areas, granule_mask, min_align, maps, failures = RECORDINGS[name]
    memory = PhysicalMemory(8 << 30)
    memory.add_region(0, 8 << 30)
    pool = Swiotlb(memory, start, 64 << 20, areas=areas, ledger=Ledger())
    seen = failed = 0
    recording = lzma.decompress((DATA / f"{name}.txt.xz").read_bytes()).decode()
    for number, line in enumerate(recording.splitlines(), 1):
        kind, *fields = line.split()
        if kind == "u":
            pool.unmap(int(fields[0], 16), int(fields[1]), int(fields[2]))
            continue
        cpu, phys, size, expected = int(fields[0]), int(fields[1], 16), int(fields[2]), int(fields[3], 16)
        try:
            got = pool.map(phys, size, alloc_align_mask=granule_mask, min_align_mask=min_align, cpu=cpu)
        except ExhaustedError:
            got = FAILED
        assert got == expected, f"line {number}: {line.strip()} got {got:x}"
        seen += 1
        failed += got == FAILED
    assert (seen, failed) == (maps, failures)
