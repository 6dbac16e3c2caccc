"""A long trace as a kernel would have recorded it: tasks on several CPUs allocate and free, some of it at once.

    python -m tests.support.long_trace 100000000 | dmakit replay -

The model is dmakit's own allocator with its set-up in the trace, so a replay has to match every answer. Calls of two
CPUs that overlap enter, take effect and return in orders drawn apart from each other. What the recorder's probes
show is printed in the kernel's format: entries and returns, tree searches and frees into the tree, the depot's work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from random import Random

from dmakit.consts import L_IOVA_TREE
from dmakit.iova.domain import IovaDomain

IOVAD = "iovad=0xff1ac38384bb9800"
LIMIT = 0xFFFFF
SIZES = (1, 1, 1, 1, 2, 4, 8, 16, 32, 64)
LIVE = (400, 2_000)  # ranges that a CPU holds, about: by turns few and many, so that magazines go to the depot and back
TURN = 40_000  # events
BLOCK = 4096  # lines handed out at a time


class _Call:
    """One call on its way: entered, then in effect, then returned."""

    def __init__(self, recorder: Recorder, cpu: int) -> None:
        random, live = recorder.random, recorder.live[cpu]
        self.recorder, self.cpu = recorder, cpu
        self.frees = random.random() * 2 * LIVE[recorder.count // TURN % 2] < len(live)
        self.pfn, self.size = 0, random.choice(SIZES)
        if self.frees:
            at = random.randrange(len(live))
            live[at], live[-1] = live[-1], live[at]
            self.pfn, self.size = live.pop()
        call = f"pfn={self.pfn:#x} size={self.size}" if self.frees else f"size={self.size} limit={LIMIT:#x} flush=1"
        name = "ff_in: (free_iova_fast" if self.frees else "af_in: (alloc_iova_fast"
        recorder.put(cpu, f"{name}+0x4/0x3e0) {IOVAD} {call}")

    def act(self) -> None:
        recorder, domain, cpu = self.recorder, self.recorder.domain, self.cpu
        if self.frees:
            if self.size > 32:
                recorder.put(cpu, f"fi_in: (free_iova+0x4/0x80) {IOVAD} pfn={self.pfn:#x}")
            domain.free_fast(self.pfn, self.size, cpu=cpu)
            return
        before = domain.ledger.counts[L_IOVA_TREE]
        self.pfn = domain.alloc_fast(self.size, LIMIT, True, cpu=cpu)
        if domain.ledger.counts[L_IOVA_TREE] != before:
            where = "ai_out: (alloc_iova_fast+0x1c1/0x3e0 <- alloc_iova)"
            found = f"ret=0xff1ac38384b8aa00 lo={self.pfn:#x}"
            recorder.put(cpu, f"{where} {IOVAD} size={self.size} limit={LIMIT:#x} aligned=1 {found}")
        recorder.live[cpu].append((self.pfn, self.size))

    def leave(self) -> None:
        if self.frees:
            where, rest = (
                "ff_out: (iommu_dma_free_iova+0x2e/0x90 <- free_iova_fast)",
                f"pfn={self.pfn:#x} size={self.size}",
            )
        else:
            where = "af_out: (iommu_dma_alloc_iova+0xf1/0x120 <- alloc_iova_fast)"
            rest = f"size={self.size} limit={LIMIT:#x} pfn={self.pfn:#x}"
        self.recorder.put(self.cpu, f"{where} {IOVAD} {rest}")


class Recorder:
    """The machine, and the lines that it has printed since they were last taken."""

    def __init__(self, cpus: int, seed: int) -> None:
        self.random = Random(seed)
        self.domain = IovaDomain(granule=4096, start_pfn=1, cpus=cpus)
        self.live: list[list[tuple[int, int]]] = [[] for _ in range(cpus)]
        self.tasks = [f"             fio-{200 + cpu}     [{cpu:03}] d..2. " for cpu in range(cpus)]
        self.worker = "     kworker/0:1-11      [000] ...1. "
        self.lines: list[str] = []
        self.count = 0
        self.put(0, f"init_in: (init_iova_domain+0x4/0x120) {IOVAD} granule=4096 start=0x1")

    def put(self, cpu: int, text: str) -> None:
        self.count += 1
        self.lines.append(f"{self.tasks[cpu]}{self.count:12}: {text}\n")

    def step(self) -> None:
        """One call, or two at once, and what the depot's work makes of it."""
        cpus = self.random.sample(range(len(self.tasks)), 2 if self.random.random() < 0.15 else 1)
        calls = [_Call(self, cpu) for cpu in cpus]
        for stage in (_Call.act, _Call.leave):
            self.random.shuffle(calls)
            for call in calls:
                stage(call)
        if self.random.random() < 0.001:
            self._depot_work()

    def _depot_work(self) -> None:
        before = set(self.domain.cached_pfns())
        over = [order for order, held in enumerate(self.domain.depot_sizes()) if held > len(self.tasks)]
        if not over:
            return
        self.domain.depot_work(over[0])
        pfns = ",".join(hex(pfn) for pfn, _ in sorted(before - set(self.domain.cached_pfns())))
        for text in (
            "depot_in: (iova_depot_work_func+0x4/0xa0) work=0xff1ac38384ac0820",
            f"magfree_in: (iova_magazine_free_pfns+0x4/0x60) {IOVAD} mag=0xff1ac38384ad0000 n=127 pfns={{{pfns}}}",
        ):
            self.count += 1
            self.lines.append(f"{self.worker}{self.count:12}: {text}\n")


def long_trace(events: int, *, cpus: int = 4, seed: int = 1) -> Iterator[bytes]:
    """Blocks of the text of a trace of ``events`` events, its header first."""
    yield f"# tracer: nop\n#\n# entries-in-buffer/entries-written: {events}/{events}   #P:{cpus}\n#\n".encode()
    recorder = Recorder(cpus, seed)
    while recorder.count < events:
        while len(recorder.lines) < BLOCK and recorder.count < events:
            recorder.step()
        excess = max(recorder.count - events, 0)
        yield "".join(recorder.lines[: len(recorder.lines) - excess]).encode()
        recorder.lines.clear()


def main() -> None:
    """Print a trace of as many events as the first argument says."""
    for block in long_trace(int(sys.argv[1])):
        view = memoryview(block)
        while view:
            view = view[os.write(1, view) :]


if __name__ == "__main__":
    main()
