"""Rules that a recorded kernel shows: each, when broken, makes a step differ from the kernel's."""

from __future__ import annotations

from tests.mutations.harness import Mutation

SAME = "tests/steps/test_replay.py::test_with_the_defects_of_7_2_every_step_is_the_kernels"
DOMAIN = "src/dmakit/iommu/domain.py"

MUTATIONS = (
    Mutation(
        "IH-is-always-set",
        DOMAIN,
        "gather.freelist == 0, cause, cpu)",
        "True, cause, cpu)",
        (f"{SAME}[unlink-strict]",),
        always=True,
    ),
    Mutation(
        "replaced-table-waits-for-the-next-flush",
        DOMAIN,
        "if self.scratch.freelist != 0:",
        "if self.scratch.freelist == 1:",
        (f"{SAME}[unlink-strict]",),
    ),
    Mutation(
        "timer-frees-without-a-flush",
        "src/dmakit/iova/flush_queue.py",
        "        self._flush_iotlb(cause)\n        for ring",
        "        self.finish_cnt += 1\n        for ring",
        (f"{SAME}[unlink-lazy]",),
    ),
    Mutation(
        "sg-merges-over-a-piece-that-ends-inside-a-granule",
        "src/dmakit/dma/scatter.py",
        "if size + offset < self.span[i]:",
        "if self.span[i] == 0:",
        (f"{SAME}[sg-module]",),
    ),
)
