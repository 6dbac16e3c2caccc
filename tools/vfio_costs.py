"""What a link costs on a real IOMMU: a system call each time, or nothing when memory is premapped.

Run as root where a PCI device is bound to vfio-pci (in the test VM: ``./dmakit vm run --edu -- python3
/mnt/checkout/tools/vfio_costs.py 0000:00:10.0``). Prints, for each kernel interface of the host, the median and the
quartiles of so many rounds, in µs, and the ratio to what a premapped buffer costs: finding the address.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from dmakit import vfio
from dmakit.dma.direction import Direction
from dmakit.errors import DmakitError

BOTH = Direction.BIDIRECTIONAL
PAGE = 4096
ROUNDS, CALLS = 15, 40


def measured(work: Callable[[], object], calls: int) -> tuple[float, float, float]:
    """(first quartile, median, third quartile) of µs a call."""
    work()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        times.append((time.perf_counter() - start) / calls * 1e6)
    low, middle, high = statistics.quantiles(times, n=4)
    return low, middle, high


def works(machine: vfio.Machine, device: vfio.Device) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    dma: Any = device.dma
    small = [machine.buffer(PAGE).ranges[0][0] for _ in range(32)]
    large = machine.buffer("2M", order=9).ranges[0][0]
    window = dma.try_alloc(0, PAGE)
    table = {phys: number * PAGE for number, phys in enumerate(small)}

    def link() -> None:
        window.link(small[0], 0, PAGE, BOTH)
        window.unlink(0, PAGE, BOTH)

    def request() -> None:
        state = dma.try_alloc(0, 32 * PAGE)
        for i, phys in enumerate(small):
            state.link(phys, i * PAGE, PAGE, BOTH)
        state.sync()
        state.destroy(32 * PAGE, BOTH)

    return {
        "premapped, 4 KiB: find the address": lambda: table[small[7]],
        "link + unlink, 4 KiB, in a window": link,
        "map_phys + unmap_phys, 4 KiB": lambda: dma.unmap_phys(dma.map_phys(small[0], PAGE, BOTH), PAGE, BOTH),
        "map_phys + unmap_phys, 2 MiB": lambda: dma.unmap_phys(dma.map_phys(large, 2 << 20, BOTH), 2 << 20, BOTH),
        "window of 32 links of 4 KiB, destroy": request,
    }


def main(bdf: str) -> None:
    """Measure every interface."""
    for backend, staging in (("type1", False), ("iommufd", False), ("iommufd", True)):
        try:
            with vfio.Machine(backend=backend, ram="32M", staging=staging) as machine, machine.open(bdf) as device:
                base = 0.0
                print(f"{backend}{' with staging' if staging else ''}")
                for name, work in works(machine, device).items():
                    low, middle, high = measured(work, CALLS)
                    base = base or middle
                    print(f"  {name:<38} {middle:9.2f} µs ({low:.2f} to {high:.2f})  {middle / base:8.0f}", flush=True)
                device.dma.states.copy().pop().free()
        except DmakitError as error:
            print(f"{backend}: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
