"""Row 16: what the NVMe driver itself costs an I/O, against a controller that is always ready.

* **16**: 4 KiB reads of registered memory, 32 a batch: one ``BatchQueue.submit`` (32 entries written, one doorbell) and
  one ``complete`` (32 completions checked and taken, one doorbell), from Python. The controller (``native._Ready``)
  answers in between; its own few ns are in the figure. The queue is a real one: the controller was brought up by the
  driver, on the software machine; doorbells are plain stores, as on hardware.
"""

from __future__ import annotations

from array import array
from typing import Any

from dmakit.bench.native import _Ready
from dmakit.bench.row import Bench, Row
from dmakit.nvme.batch import BatchQueue, pointers
from dmakit.nvme.controller import Controller
from dmakit.nvme.software import SoftHost
from dmakit.nvme.spec import Reg
from dmakit.nvme.transport import ModelTransport

_BATCH = 32
_ENTRIES = 64


class _Mapped(ModelTransport):
    """The model behind doorbells that are memory; it looks at them when it is waited for."""

    def __init__(self, controller: Any, device: Any) -> None:
        super().__init__(controller, device)
        self.bar: memoryview[int] | None = memoryview(array("I", bytes(2 * Reg.DOORBELLS)))
        self._seen: dict[int, int] = {}

    def wait(self, timeout_ns: int) -> bool:
        assert self.bar is not None
        for at in range(Reg.DOORBELLS >> 2, (Reg.DOORBELLS >> 2) + 4):  # the admin pair's and the first I/O pair's
            if self._seen.get(at, 0) != self.bar[at]:
                self._seen[at] = self.bar[at]
                self.controller.write32(4 * at, self.bar[at])
        return super().wait(timeout_ns)


def _driven(bench: Bench) -> tuple[BatchQueue, Any, dict[str, Any]]:
    """A batch queue, the controller that answers it, the arrays."""

    def make() -> tuple[BatchQueue, Any, dict[str, Any]]:
        host = SoftHost()
        host.transport = _Mapped(host.model, host.device)
        controller = Controller(host, queues=2, entries=_ENTRIES, strategy="premap", record=False)
        queue = controller.batch(1)
        pair, bar = queue.pair, host.transport.bar
        assert bar is not None
        sq, cq = (pair.sq.words, pair.sq.pages[0]), (pair.cq.words, pair.cq.pages[0])
        ready = _Ready(sq, cq, pair.entries, pair.qid, bar, pair.core.sq_doorbell >> 2)
        buffer = controller.buffer(_BATCH * 4096)
        low, high = pointers(array("Q", [buffer.address(4096 * at) for at in range(_BATCH)]), 4096)
        arrays = {"low": low, "high": high, "lbas": array("Q", range(0, 8 * _BATCH, 8)),
                  "tags": array("Q", range(_BATCH)),
                  "counts": array("Q", [8]) * _BATCH, "done": array("Q", bytes(8 * _BATCH)),
                  "statuses": array("Q", bytes(8 * _BATCH)), "op": "read", "keep": controller}  # fmt: skip
        return queue, ready, arrays

    return bench.once("nvme batch", make)


def batch_read(bench: Bench) -> float:
    """16: ns an I/O."""
    queue, ready, arrays = _driven(bench)
    code = "submit(op, lbas, counts, low, high, tags); answer(); complete(done, statuses)"
    calls = {"submit": queue.submit, "answer": ready.answer, "complete": queue.complete}
    took = bench.statement(code, 5000, **arrays, **calls) / _BATCH
    if queue.in_flight or any(arrays["statuses"]) or list(arrays["done"]) != list(arrays["tags"]):
        raise RuntimeError("the batch was not completed as it was submitted")
    return took


ROWS = [Row("16", "premapped 4 KiB reads, batch of 32, submit and complete", "ns/I/O", 40, "lower", "E", batch_read)]
