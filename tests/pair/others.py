"""Operations of a program: bounce slots, peer-to-peer decisions, trace text, failures and time."""

from __future__ import annotations

from typing import Any

from dmakit.trace.scanner import Scanner
from tests.pair.held import BAR_BYTES, PAGE, Held

TAIL = "[00{cpu}] d.h2.  {b}.{a:06d}: "
LINES = (
    "kworker/u8:0-{a} " + TAIL + "af_in: (alloc_iova_fast+0x4/0x3e0) iovad={b:#x} size={c} limit=0xfffff flush=0",
    "x y-z-{a} (  {b}) "
    + TAIL
    + "af_out: (a+0xf1/0x120 <- alloc_iova_fast) iovad={b:#x} size={c} limit={a:#x} pfn={d:#x}",
    "<idle>-0 " + TAIL + "map: IOMMU: iova={a:#018x} - {b:#018x} paddr={c:#x} size={d}",
    "p_{a}-{b} "
    + TAIL
    + "dma_map_sg: dev{a} dir=NONE dma_addrs={{{a:#x},{b:#x}}} sizes={{{c:#x}}} phys_addrs={{}} attrs=",
    "p-1 " + TAIL + "block_rq_complete: 254,0 RA () {a} + {b} none,0,0 [-{c}]",
    "sh-{a} " + TAIL + "tracing_mark_write: PHASE {b} - [{c}] {d}",
    "t-{a} "
    + TAIL
    + "cache_tag_flush_range: dmar0 dmar0[0] type iotlb did {a} [{b:#x}-{c:#x}] addr {d:#x} mask {a:#x}",
    "t-{a} " + TAIL + "qi_submit: iotlb_inv dmar0: {a:#x} {b:#x} {c:#x} {d:#x}",
    "t-{a} " + TAIL + 'sync_out: (a+0x1/0x2 <- dma_iova_sync) dev="x {a}" addr={a:#x} off={b} size={c} ret=-{d}',
    "t-{a} " + TAIL + "sched_switch: prev={a} next={b}",
    "t-{a} [{b}] {c}: free_in: (free_iova+0x1/0x2) iovad={d:#x} pfn={a:#x}",
    "CPU:{a} [LOST {b} EVENTS]",
    "# comment {a}",
    "",
)


class Others(Held):
    """The machine's bounce pool is shared with the device's own bounces."""

    def set_up(self, config: int) -> None:
        super().set_up(config)
        self.bounces: list[tuple[int, int, int]] = []
        self.scanner = Scanner()

    # Bounce slots ----------------------------------------------------------------------------------------------------

    def bounce(self, a: int, b: int, c: int, d: int) -> Any:
        phys, size = self.piece(a, b)
        masks = {"alloc_align_mask": (0, 0, 4095, 8191)[c % 4], "min_align_mask": (0, 4095, 2047, c)[d % 4]}
        limit = (1 << 64) - 1 if a % 7 else c << 12
        boundary = (1 << 32) - 1 if b % 5 else 2047 + (b % 3 << 11)
        tlb = self.machine.swiotlb.map(phys, size, **masks, boundary=boundary, limit=limit, cpu=self.cpu(d))
        self.bounces.append((tlb, size, phys))
        return tlb, self.machine.swiotlb.used, self.machine.swiotlb.high_water

    def unbounce(self, a: int, b: int, c: int, d: int) -> Any:
        tlb, size, _ = self.pick(self.bounces, a) or (b, c, 0)
        return self.machine.swiotlb.unmap(
            tlb, size, d % 3 if d % 7 else d, (d % 5 == 4) * 0x20
        ), self.machine.swiotlb.used

    def sync_bounce(self, a: int, b: int, c: int, d: int) -> Any:
        pool = self.machine.swiotlb
        tlb, size, _ = self.bounces[a % len(self.bounces)] if self.bounces else (b, c, 0)
        if d % 4 == 0:
            return pool.sync_for_cpu(tlb + b % 64, max(1, size // 2), c % 3)
        if d % 4 == 1:
            return pool.sync_for_device(tlb, size, c % 4)
        if d % 4 == 2:
            return pool.zero_pads(tlb, size, 1 << b % 14)
        return pool.contains(tlb), pool.pools[0].allocations(), pool.slots

    # Peers -----------------------------------------------------------------------------------------------------------

    def decide(self, a: int, b: int, c: int, d: int) -> Any:
        memo = self.peers[d % len(self.peers)]
        if c % 7 == 0:
            memo.reset()
        phys = self.bar + a % (2 * BAR_BYTES) if b % 4 else self.piece(a, PAGE)[0]
        return int(memo.map_type(phys)), memo.bus_offset, memo.bus_address(phys), memo.lookups, memo.start, memo.end

    # Traces ----------------------------------------------------------------------------------------------------------

    def scan_text(self, a: int, b: int, c: int, d: int) -> Any:
        scanner = self.scanner
        values = {"a": a, "b": b, "c": c, "d": d, "cpu": a % 9}
        lines = [LINES[(a + i * (1 + b)) % len(LINES)].format(**values) for i in range(1 + c % 9)]
        text = "\n".join(lines).encode()
        if d % 3 == 0:  # a byte less, or another
            at = b % max(1, len(text))
            text = text[:at] + bytes([c & 127]) * (a % 2) + text[at + 1 :]
        scanned = scanner.scan(text + b"\n" * (d % 2), 1 + b % 1000)
        kinds, rows = (part.tolist() for part in scanner.rowwise())
        blocks = [(kind, scanner.block(kind)[0].tolist()) for kind in scanner.present()]
        counts = scanner.records, scanner.others, scanner.notes, scanner.malformed
        return scanned, counts, kinds, rows, blocks, scanner.elements().tolist(), scanner.bad(), len(scanner.names)

    # Failures and time -----------------------------------------------------------------------------------------------

    def fail_at(self, a: int, b: int, c: int, d: int) -> Any:
        return self.machine.fail.disarm() if d % 3 == 0 else self.machine.fail.arm(a % 12)

    def advance(self, a: int, b: int, c: int, d: int) -> Any:
        return self.machine.clock.advance(a % 20_000_000)

    def others_end(self) -> dict[str, Any]:
        """What is left to see of them."""
        pool = self.machine.swiotlb
        slots = None if pool is None else (pool.used, pool.high_water, [one.allocations() for one in pool.pools])
        return {"bounce slots": slots, "names": self.scanner.names, "peers": [memo.lookups for memo in self.peers]}
