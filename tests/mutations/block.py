"""Rules of request mapping and of PRP and SGL lists: each, when broken, turns a test red."""

from __future__ import annotations

from tests.mutations.harness import Mutation

ITERATOR = ("tests/block/test_dma_iter.py",)
REQUESTS = ("tests/block/test_requests.py",)
MAPPING = ("tests/nvme/test_mapping.py",)
PRP = ("tests/nvme/test_prp.py",)
SGL = ("tests/nvme/test_sgl.py",)

MUTATIONS = (
    Mutation(
        "gap-mask-rule",
        "src/dmakit/block/request.py",
        "merge_boundary >> (self.gap_bit - 1) == 0",
        "merge_boundary >> self.gap_bit == 0 or self.count > 2",
        ITERATOR,
        always=True,
    ),
    Mutation(
        "gap-looks-at-starts-only",
        "src/dmakit/block/segments.py",
        "return (following & PAGE_MASK_LOW) | ((phys & PAGE_MASK_LOW) + length)",
        "return following & PAGE_MASK_LOW",
        ITERATOR,
    ),
    Mutation(
        "gap-keeps-the-highest-bit",
        "src/dmakit/block/request.py",
        "self.gap_bit = lowest_bit(gaps)",
        "self.gap_bit = int(gaps).bit_length()",
        REQUESTS,
    ),
    Mutation(
        "older-rule-without-virt-boundary",
        "src/dmakit/block/request.py",
        "return (self.virt_boundary + 1) & merge_boundary == 0",
        "return self.virt_boundary & merge_boundary == 0",
        ITERATOR,
    ),
    Mutation(
        "segment-crosses-its-boundary",
        "src/dmakit/block/segments.py",
        "return (phys | boundary) == ((following + more - 1) | boundary)",
        "return (phys | boundary) == (following | boundary)",
        REQUESTS,
    ),
    Mutation(
        "simple-path-takes-three-pages",
        "src/dmakit/nvme/mapping.py",
        "offset + length <= 2 * PAGE_SIZE",
        "offset + length <= 3 * PAGE_SIZE",
        MAPPING,
    ),
    Mutation(
        "gap-does-not-force-sgl",
        "src/dmakit/nvme/mapping.py",
        "(payload.gap_bit != 0 and payload.gap_bit <= 12)",
        "(payload.gap_bit != 0 and payload.gap_bit <= 8)",
        MAPPING,
    ),
    Mutation(
        "chain-loses-the-moved-entry",
        "src/dmakit/nvme/prp.py",
        "moved: cython.ulonglong = self.words[511]",
        "moved: cython.ulonglong = self.words[510]",
        PRP,
    ),
    Mutation(
        "small-block-takes-one-more",
        "src/dmakit/nvme/prp.py",
        "self._first((self.left + PAGE_MASK_LOW) >> 12 > _PER_SMALL)",
        "self._first(self.left >> 12 > _PER_SMALL)",
        PRP,
    ),
    Mutation(
        "sgl-segment-not-last", "src/dmakit/nvme/sgl.py", "_LAST_SEGMENT = 3 << 60", "_LAST_SEGMENT = 2 << 60", SGL
    ),
)
