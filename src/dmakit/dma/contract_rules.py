"""The rules of the DMA mapping contract: the name that an error or a report carries, and the rule in words.

One table for the checker, its tests (each rule has a test that breaks it) and the documentation. Three kinds:

* ``caller``: the driver broke the rule (``kernel/dma/debug.c`` knows those of the classic calls; for the two-step calls
  Linux has no checker: ``Documentation/core-api/dma-api.rst``, part Ie, states them in words);
* ``device``: the device used an address in a way that its mappings do not allow;
* ``stack``: the mapping code itself did not do what it promises (the known defects of ``dma.defects`` do this).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ContractRule:
    """``kind``: who broke it (caller, device, stack); ``text``: the rule; ``debug``: its class in dma-debug or 0."""

    kind: str
    text: str
    debug: int = 0


_CALLER = {
    # classic calls
    "error-cookie": ("an address that a failed map returned is not an address: it is not unmapped or synced", 1),
    "not-mapped": ("only what is mapped is unmapped or synced", 2),
    "double-unmap": ("a mapping is undone once", 2),
    "unmap-size": ("unmap passes the size that was mapped", 3),
    "unmap-kind": ("a mapping is undone by the counterpart of the call that made it", 4),
    "sg-entries": ("a scatterlist is not changed between its map and its unmap", 6),
    "unmap-direction": ("unmap passes the direction that was mapped", 7),
    "unmap-attrs": ("map and unmap agree on MMIO", 0),
    "not-ram": ("memory that is mapped without MMIO is RAM", 11),
    "mmio-of-ram": ("MMIO is for device memory, not for RAM", 21),
    "sync-outside": ("a sync stays inside one mapping", 13),
    "sync-direction": ("a sync passes the direction that was mapped (any, for a bidirectional mapping)", 14),
    "sg-segment-length": ("no entry of a scatterlist is longer than the device's max_segment", 17),
    "sg-segment-boundary": ("no output segment crosses the device's boundary", 18),
    "leak": ("everything is unmapped before the device is released", 19),
    "cacheline-overlap": ("no two mappings that a non-coherent device writes share a cache line", 20),
    # two-step calls
    "stale-state": ("a state is used between its try_alloc and its destroy or free, not before or after", 0),
    "outside-window": ("a piece lies inside the window that was allocated", 0),
    "unaligned-interior": ("only the first piece starts, and only the last piece ends, inside a granule", 0),
    "alignment": ("a piece's offset and its physical address agree inside a granule", 0),
    "overlapping-link": ("a range is linked once", 0),
    "unlink-not-linked": ("only what is linked is unlinked", 0),
    "unlink-inside-granule": ("an unlink begins and ends where a piece does, or on a granule", 0),
    "unlink-cuts-leaf": ("an unlink does not cut a large leaf: what was linked as one is unlinked as one", 0),
    "unlink-direction": ("unlink and destroy pass the direction that was linked", 0),
    "unlink-attrs": ("link and unlink agree on MMIO", 0),
    "destroy-length": ("destroy's mapped_len is exactly what is linked from offset 0 on, without a hole", 0),
    "free-while-linked": ("free is for a window in which nothing is linked", 0),
}
_DEVICE = {
    "use-before-sync": ("a device uses linked memory after the sync that follows the last link", 0),
    "device-access": ("a device touches only what is mapped for it", 0),
    "device-access-direction": ("a device reads and writes only in the direction of the mapping", 0),
}
_STACK = {
    "legal-link-refused": ("a link that keeps every rule is not refused with EINVAL", 0),
    "failed-link-damage": ("a failed link leaves earlier pieces linked and nothing of its own", 0),
    "link-not-mapped": ("a link that succeeded is translated from its first to its last byte", 0),
    "unlink-left-mapped": ("what unlink or destroy removed is no longer translated", 0),
    "unlink-lost-neighbour": ("unlink leaves the other pieces of the window linked", 0),
    "window-freed-partly": ("destroy and free give the whole window back", 0),
    "slot-freed-while-mapped": ("a bounce slot is released after the device lost access to it", 0),
    "sg-output": ("the output segments of a scatterlist are valid addresses and cover its entries", 0),
}

RULES: dict[str, ContractRule] = {
    name: ContractRule(kind, text, debug)
    for kind, table in (("caller", _CALLER), ("device", _DEVICE), ("stack", _STACK))
    for name, (text, debug) in table.items()
}
