"""Rules of the mapping calls: each, when broken, turns a test red."""

from __future__ import annotations

from tests.mutations.harness import Mutation

TWO_STEP = ("tests/dma/test_two_step_features.py",)
STREAMING = ("tests/dma/test_streaming.py",)
SCATTER = ("tests/dma/test_scatter.py",)
SWEEP = ("tests/dma/test_fail_nth.py",)
STATE = "src/dmakit/dma/window.py"

MUTATIONS = (
    Mutation(
        "tail-is-not-bounced",
        STATE,
        "tail: cython.ulonglong = (phys + size) & self.core.granule_mask",
        "tail: cython.ulonglong = 0",
        TWO_STEP,
        always=True,
    ),
    Mutation(
        "head-takes-a-whole-granule",
        STATE,
        "done = min(size, self.core.granule_mask + 1 - pad)",
        "done = min(size, self.core.granule_mask + 1)",
        TWO_STEP,
        always=True,
    ),
    Mutation(
        "pads-are-not-cleared",
        "src/dmakit/dma/core.py",
        "if align_mask != 0 and not self.trusted:",
        "if align_mask == 0 and not self.trusted:",
        TWO_STEP,
    ),
    Mutation(
        "start-rule-is-not-checked", STATE, "if pad != 0 and offset != 0:", "if pad != 0 and offset < 0:", TWO_STEP
    ),
    Mutation(
        "unlink-waits-for-the-queue",
        STATE,
        "queued: cython.bint = free_iova and self.core.flush_queue is not None",
        "queued: cython.bint = self.core.flush_queue is not None",
        TWO_STEP,
    ),
    Mutation(
        "destroy-frees-what-was-mapped",
        STATE,
        "if not self.core.defects & _PARTIAL_DESTROY:",
        "if self.core.defects & _PARTIAL_DESTROY:",
        TWO_STEP,
    ),
    Mutation(
        "failed-bounce-keeps-its-slot",
        STATE,
        "        if error != 0:\n            self.core._bounce_out(tlb, size, direction, attrs)",
        "        if error > 0:\n            self.core._bounce_out(tlb, size, direction, attrs)",
        TWO_STEP,
    ),
    Mutation(
        "failed-map-keeps-its-iova",
        "src/dmakit/dma/streaming.py",
        "        if error != 0:\n            self._free_iova(iova, length, False, cpu)",
        "        if error > 0:\n            self._free_iova(iova, length, False, cpu)",
        SWEEP,
    ),
    Mutation(
        "slot-freed-before-the-flush",
        "src/dmakit/dma/streaming.py",
        "        self._iommu_unmap(addr, size, cpu)\n        if phys != 0 and self._is_slot(phys):",
        "        if phys == 0 and self._is_slot(phys):",
        STREAMING,
    ),
    Mutation(
        "sg-ignores-the-boundary",
        "src/dmakit/dma/scatter.py",
        "if pad != 0 and pad < padded - 1:",
        "if pad != 0 and pad < 0:",
        SCATTER,
    ),
    Mutation(
        "sg-merges-over-max-segment",
        "src/dmakit/dma/scatter.py",
        "fits = (max_segment - open_length) & _UINT_MASK >= size",
        "fits = True",
        SCATTER,
    ),
    Mutation(
        "32-bit-first-for-ever",
        "src/dmakit/dma/core.py",
        "            self.prefer_32bit = False\n",
        "            self.prefer_32bit = True\n",
        TWO_STEP,
    ),
)
