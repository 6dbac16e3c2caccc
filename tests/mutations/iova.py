"""Rules of the IOVA allocator: each, when broken, turns a test red."""

from __future__ import annotations

from tests.mutations.harness import Mutation

GOLDEN = ("tests/iova/test_golden.py",)
DEPOT = ("tests/iova/test_domain.py", "-k", "depot")
FLUSH = ("tests/iova/test_flush_queue.py",)
DOMAIN = ("tests/iova/test_domain.py",)

STRESS = ("tests/trace/test_replay.py", "-k", "stress")

MUTATIONS = (
    Mutation(
        "magazine-size-on-a-trace",
        "src/dmakit/consts.py",
        "IOVA_MAG_SIZE = 127",
        "IOVA_MAG_SIZE = 128",
        STRESS,
        always=True,
    ),
    Mutation(
        "depot-rule-on-a-trace",
        "src/dmakit/iova/rcache.py",
        "if self.depot_size[order] > online:",
        "if self.depot_size[order] > 32:",
        STRESS,
        always=True,
    ),
    Mutation(
        "depot-forgets-its-chain-on-a-trace",
        "src/dmakit/iova/rcache.py",
        "self.pool.link[magazine] = self.depot[order]\n",
        "self.pool.link[magazine] = 0\n",
        STRESS,
    ),
    Mutation(
        "magazine-size", "src/dmakit/consts.py", "IOVA_MAG_SIZE = 127", "IOVA_MAG_SIZE = 128", GOLDEN, always=True
    ),
    Mutation(
        "depot-rule",
        "src/dmakit/iova/rcache.py",
        "if self.depot_size[order] > online:",
        "if self.depot_size[order] > 32:",
        DEPOT,
        always=True,
    ),
    Mutation(
        "depot-keeps-one-less",
        "src/dmakit/iova/rcache.py",
        "if self.depot_size[order] > online:",
        "if self.depot_size[order] >= online:",
        DEPOT,
    ),
    Mutation(
        "magazine-first-in-first-out",
        "src/dmakit/iova/magazine.py",
        "at: cython.Py_ssize_t = self._look(magazine, highest)",
        "at: cython.Py_ssize_t = header + 1 if self._size(magazine) and self.words[header + 1] <= highest else 0",
        GOLDEN,
    ),
    Mutation(
        "watermark-never-reset",
        "src/dmakit/iova/search.py",
        "if lo < self.dma_32bit_pfn:\n            self.max32_alloc_size = self.dma_32bit_pfn",
        "if lo < self.dma_32bit_pfn:\n            pass",
        GOLDEN,
    ),
    Mutation(
        "no-retry-pass",
        "src/dmakit/iova/search.py",
        "if pfn == 0 and retry_pfn < limit:",
        "if pfn == 0 and retry_pfn > limit:",
        GOLDEN,
    ),
    Mutation(
        "cached-node-stays",
        "src/dmakit/iova/search.py",
        "if lo >= self.tree.lo[self.cached_node]:\n            self.cached_node = above",
        "if lo == self.tree.lo[self.cached_node]:\n            self.cached_node = above",
        GOLDEN,
    ),
    Mutation(
        "small-sizes-not-rounded",
        "src/dmakit/iova/allocator.py",
        "one << order if order < IOVA_RANGE_CACHE_MAX_SIZE else size",
        "size",
        GOLDEN,
    ),
    Mutation(
        "free-before-the-flush",
        "src/dmakit/iova/flush_queue.py",
        "if self.counter[at] >= self.finish_cnt:",
        "if self.counter[at] > self.finish_cnt:",
        FLUSH,
        always=True,
    ),
    Mutation(
        "table-left-with-its-entry",
        "src/dmakit/iova/flush_queue.py",
        "if self.tables[at] != 0:",
        "if self.tables[at] == 1:",
        FLUSH,
    ),
    Mutation(
        "drains-only-one-cpu",
        "src/dmakit/iova/allocator.py",
        "if self._online[other]:\n                self._drain_cpu(other, cpu)",
        "if other == cpu:\n                self._drain_cpu(other, cpu)",
        DOMAIN,
    ),
)
