"""Operations of a program: requests mapped for NVMe, lists built by hand and by the batch, and lists read back."""

from __future__ import annotations

import hashlib
from array import array
from typing import Any

from dmakit.block.limits import QueueLimits
from dmakit.block.request import Op, Request
from dmakit.ledger import Ledger
from dmakit.nvme.coherent import DeviceSource
from dmakit.nvme.fetch import DescriptorReader
from dmakit.nvme.mapping import RequestMapper
from dmakit.nvme.pool import LARGE_BYTES, SMALL_BYTES, DescriptorPool, PlainSource
from dmakit.nvme.prp import PrpWalker, PrpWriter
from dmakit.nvme.sgl import SglWalker, SglWriter
from tests.pair.held import PAGE, PAGES, Held

SEGMENTS = 40  # reads of a list after which a walk is given up: a loop


class Descriptors(Held):
    """The mapper's lists lie in the machine's coherent memory, those built by hand in plain memory."""

    def set_up(self, config: int) -> None:
        super().set_up(config)
        self.mapper: RequestMapper | None = None
        self.iods: list[Any] = []
        fail, self.lists_ledger = self.machine.fail, Ledger(2)
        pools = [
            DescriptorPool(PlainSource(size << 24, 3), size, ledger=self.lists_ledger, fail=fail)
            for size in (SMALL_BYTES, LARGE_BYTES)
        ]
        self.prp, self.sgl = PrpWriter(*pools), SglWriter(*pools)
        self.chains: list[tuple[Any, array[int]]] = []
        options = {"dword": config % 2 == 1, "bit_bucket": config % 3 == 1, "longer": config % 4 == 1}
        self.reader = DescriptorReader(self.device.port, **options)
        self.prp_walker, self.sgl_walker = PrpWalker(), SglWalker(dword=config % 2 == 1, bit_bucket=config % 3 == 1)

    def nvme_map(self, a: int, b: int, c: int, d: int) -> Any:
        if self.mapper is None:
            source, options = DeviceSource(self.device), {"ledger": self.machine.ledger, "fail": self.machine.fail}
            small, large = (DescriptorPool(source, size, **options) for size in (SMALL_BYTES, LARGE_BYTES))
            self.mapper = RequestMapper(
                self.device, small, large, ledger=self.machine.ledger, sgl_supported=bool(a & 1), sgl_threshold=2 * PAGE
            )
        step = PAGE if d % 3 else 3 * PAGE // 2
        bvecs = [
            (self.base + (b + i * step) % (PAGES * PAGE - PAGE) // 4 * 4, 512 * (1 + c % 8)) for i in range(d % 12)
        ]
        request = Request(Op.READ if a & 2 else Op.WRITE, bvecs, limits=QueueLimits(), cpu=self.cpu(b))
        iod = self.mapper.map(request)
        self.iods.append(iod)
        lists = [hashlib.md5(bytes(block.words)).hexdigest() for block in self.mapper.prp.blocks(iod.chain)]
        return int(iod.status), iod.psdt, iod.low, iod.high, iod.path_name, int(iod.reason), iod.entries, lists

    def nvme_unmap(self, a: int, b: int, c: int, d: int) -> Any:
        iod = self.pick(self.iods, a)
        return None if iod is None or self.mapper is None else self.mapper.unmap(iod, cpu=self.cpu(b))

    # Lists -------------------------------------------------------------------------------------------------------

    def _ranges(self, a: int, b: int, count: int) -> list[tuple[int, int]]:
        """Ranges that mostly meet on pages, as a mapped request's do; now and then one that does not."""
        first = a % PAGE // 4 * 4 if a % 3 == 0 else 0
        sizes = [PAGE * (1 + (a + i * b) % 5) for i in range(count)]
        found = [((1 << 30) + (a + i * 17 * b) % 5000 * 8 * PAGE, size) for i, size in enumerate(sizes)]
        if found and first:
            found[0] = found[0][0] + first, found[0][1] - first
        if found and b % 23 == 22:
            found[-1] = found[-1][0] + 512, a
        return found

    def _writer(self, number: int) -> Any:
        return self.prp if number % 2 else self.sgl

    def _words(self, writer: Any, chain: int) -> list[str]:
        return [hashlib.md5(bytes(block.words)).hexdigest() for block in writer.blocks(chain)] if chain else []

    def build_list(self, a: int, b: int, c: int, d: int) -> Any:
        writer = self._writer(d)
        low, high, chain = writer.build(self._ranges(a, b, c % 300 if d % 5 == 0 else c % 40))
        self.chains.append((writer, array("Q", [chain])))
        return low, high, chain, self._words(writer, chain)

    def build_lists(self, a: int, b: int, c: int, d: int) -> Any:
        writer = self._writer(d)
        ranges = self._ranges(a, b, c % 60)
        addrs, lengths = array("Q", [addr for addr, _ in ranges]), array("Q", [size for _, size in ranges])
        bounds = array("Q", sorted({0, a % (len(ranges) + 1), b % (len(ranges) + 1), len(ranges)}))
        if d % 13 == 12:
            bounds[-1] = a & 0xFFFF
        pointers, chains = array("Q", bytes(16 * len(bounds))), array("Q", bytes(8 * len(bounds)))
        writer.build_batch(addrs, lengths, bounds, pointers, chains)
        self.chains.append((writer, chains))
        return pointers.tolist(), chains.tolist(), [self._words(writer, chain) for chain in chains]

    def feed_list(self, a: int, b: int, c: int, d: int) -> Any:
        """One request range by range; its list is given back at once."""
        writer, ranges = self._writer(d), self._ranges(a, b, c % 20)
        total = sum(size for _, size in ranges)
        if writer is self.prp:
            self.prp.begin(total if d % 7 else a)
        else:
            self.sgl.begin(len(ranges) if d % 7 else a, bool(a & 1))
        try:
            for addr, size in ranges:
                writer.feed(addr, size)
            return self._words(writer, writer.chain), writer.entries
        finally:
            writer.drop(writer.chain)

    def drop_lists(self, a: int, b: int, c: int, d: int) -> Any:
        held = self.pick(self.chains, a)
        if held is None:
            return self._writer(d).drop(b)
        writer, chains = held
        if d % 3 == 0 and len(chains):
            return writer.drop(chains[0])
        return writer.drop_batch(chains), chains.tolist()

    # Reading lists back ------------------------------------------------------------------------------------------

    def _memory(self, addr: int, size: int) -> bytes:
        """What a controller reads at a list's address: a block of our pools, else words made of the address."""
        for pool in (self.prp.small, self.prp.large):
            for block in pool.blocks:
                if block.addr <= addr and addr + size <= block.addr + pool.size:
                    return bytes(block.words)[addr - block.addr : addr - block.addr + size]
        return b"".join(
            (addr * 0x9E3779B1 + i * 0x1003 << 12 & (1 << 46) - 1).to_bytes(8, "little") for i in range(512)
        )[:size].ljust(size, b"\0")

    def walk_prp(self, a: int, b: int, c: int, d: int) -> Any:
        walker, blocks = self.prp_walker, self.prp.large.blocks
        second = blocks[b % len(blocks)].addr + d % 3 * 8 if blocks and d % 2 else b // 4 * 4
        walker.begin(a & 0xFFFFFFFFFFFF if d % 5 else a, second, c * PAGE if c < 4000 else c & 0xFFFFFF)
        reads = []
        while walker.list_entries and len(reads) < SEGMENTS:
            reads.append((walker.list_addr, walker.list_entries))
            walker.list_words(self._memory(walker.list_addr, 8 * walker.list_entries))
        return walker.status, reads, walker.left, walker.ranges[:50], walker.count

    def walk_sgl(self, a: int, b: int, c: int, d: int) -> Any:
        walker, blocks = self.sgl_walker, self.sgl.small.blocks + self.sgl.large.blocks
        low = blocks[b % len(blocks)].addr if blocks and d % 2 else b
        kind = (0, 2, 3, 3, 1, a & 15)[a % 6]
        high = kind << 60 | 16 * (c % 40) | (a % 29 == 28) << 56
        walker.begin(low, high if d % 7 else a, c * PAGE & 0xFFFFFFFF, to_host=bool(d & 1), metadata=bool(a & 4))
        reads = []
        while walker.segment_bytes and len(reads) < SEGMENTS:
            reads.append((walker.segment_addr, walker.segment_bytes))
            walker.segment(self._memory(walker.segment_addr, walker.segment_bytes))
        return walker.status, reads, walker.left, walker.ranges[:50]

    # What a controller makes of data pointers -----------------------------------------------------------------------

    def _pointer(self, a: int, b: int, c: int) -> tuple[int, int, int, int]:
        """(form, two words, bytes): of a mapped request, mostly; now and then other bytes, or of nothing."""
        if a % 9 == 8 or not self.iods:
            return a % 4, (b & 0xFFFFFFFF) << a % 5, c << 12, c & 0xFFFFF
        iod = self.iods[a % len(self.iods)]
        return iod.psdt, iod.low, iod.high, iod.total if b % 9 else c & 0xFFFFF

    def read_pointer(self, a: int, b: int, c: int, d: int) -> Any:
        reader = self.reader
        form, low, high, size = self._pointer(a, b, c)
        status = reader.read(form, low, high, size if d % 11 else a, to_host=bool(d & 1), metadata=d % 7 == 6)
        return status, reader.ranges[:50], str(reader.fault)

    def read_pointers(self, a: int, b: int, c: int, d: int) -> Any:
        rows = [self._pointer(a + i, b * i, c) for i in range(d % 20)]
        forms, sizes = array("Q", [row[0] for row in rows]), array("Q", [row[3] for row in rows])
        pointers = array("Q", [word for row in rows for word in row[1:3]])
        bounds, statuses = array("Q", bytes(8 * (len(rows) + 1))), array("Q", bytes(8 * len(rows)))
        columns = self.reader.read_batch(forms, pointers, sizes, bounds, statuses, to_host=bool(c & 1))
        answers = [column.tolist() for column in (*columns, memoryview(bounds), memoryview(statuses))]
        return answers, str(self.reader.fault)

    def descriptors_end(self) -> dict[str, Any]:
        """What is left to see of the lists."""
        pools = [(pool.used, pool.idle_count, len(pool.pages)) for pool in (self.prp.small, self.prp.large)]
        return {"pools": pools, "lists ledger": self.lists_ledger.snapshot()}
