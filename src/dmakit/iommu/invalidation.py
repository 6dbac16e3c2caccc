"""The invalidation queue: 128-bit descriptors in a ring that software fills and the unit drains.

Software words a request, collects up to QI_BATCH of them (``qi_batch`` in Linux), takes the queue's lock, appends a
*wait* descriptor, moves the tail and waits for the wait's status. The unit takes descriptors from the head in order.
Here the unit works at once, so that the wait is over when the submission returns; the words in between are the real
ones, and the unit acts on nothing else: what is worded wrongly invalidates wrongly.

Descriptor words (VT-d specification 6.5.2; Linux: ``drivers/iommu/intel/iommu.h``, ``cache.c``, ``dmar.c``):

===================  =====================================================================  =========================
IOTLB (2)            type 3:0, granularity 5:4, drain writes 6 and reads 7, did 31:16       mask 5:0, IH 6, addr 63:12
device TLB (3)       type 3:0, queue depth 20:16, source id 47:32                           size 0, addr 63:12
interrupt entry (4)  type 3:0, one entry 4, index mask 31:27, index 47:32                   0
wait (5)             type 3:0, status write 5, status data 63:32                            status address 63:2
PASID IOTLB (6)      type 3:0, granularity 5:4, did 31:16, PASID 51:32                      mask 5:0, IH 6, addr 63:12
===================  =====================================================================  =========================

A device-TLB range of 2^mask pages is written into the address itself: size bit set, the bits from 12 up to the lowest
zero are ones (mask 1: bit 12 is zero; mask 2: bit 12 one, bit 13 zero; …).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import cython

from dmakit.errors import MisuseError

if not cython.compiled:
    from dmakit.consts import (
        L_INV_WAIT,
        L_LOCK_QI,
        QI_DEVTLB,
        QI_DOMAIN,
        QI_DONE,
        QI_DRAIN,
        QI_IEC,
        QI_IOTLB,
        QI_LENGTH,
        QI_PAGE,
        QI_PIOTLB,
        QI_STATUS_WRITE,
        QI_WAIT,
        WHOLE_MASK,
    )
    from dmakit.ledger import Ledger

_TYPES = {QI_IOTLB: "iotlb", QI_DEVTLB: "devtlb", QI_IEC: "iec", QI_WAIT: "wait", QI_PIOTLB: "p_iotlb"}
_SCOPES = {1: "global", QI_DOMAIN: "domain", QI_PAGE: "page"}


def _iotlb_low(did: cython.int, granularity: cython.int) -> cython.ulonglong:
    """First word of an IOTLB request."""
    low: cython.ulonglong = did
    return low << 16 | QI_DRAIN | (granularity << 4) | QI_IOTLB


def _piotlb_low(did: cython.int, granularity: cython.int) -> cython.ulonglong:
    """First word of a PASID-based IOTLB request for the requests without PASID (PASID 0)."""
    low: cython.ulonglong = did
    return low << 16 | (granularity << 4) | QI_PIOTLB


def _range_high(iova: cython.ulonglong, mask: cython.int, ih: cython.bint) -> cython.ulonglong:
    """Second word of a page-selective request: 2^mask pages, aligned."""
    return (iova >> (12 + mask) << (12 + mask)) | (64 if ih else 0) | mask


def _devtlb_low(source: cython.int, queue_depth: cython.int) -> cython.ulonglong:
    """First word of a device-TLB request."""
    low: cython.ulonglong = source
    return low << 32 | ((queue_depth & 31) << 16) | QI_DEVTLB


def _devtlb_high(iova: cython.ulonglong, mask: cython.int) -> cython.ulonglong:
    """Second word of a device-TLB request: 2^mask pages, aligned; WHOLE_MASK for everything."""
    one: cython.ulonglong = 1
    if mask == 0:
        return iova >> 12 << 12
    if mask < WHOLE_MASK:
        iova = iova >> (12 + mask) << (12 + mask)
    else:
        iova = 0
    return iova | (((one << (11 + mask)) - 1) >> 12 << 12) | 1


def _devtlb_mask(high: cython.ulonglong) -> cython.int:
    """The address mask that a device-TLB request's second word encodes."""
    mask: cython.int = 1
    if (high & 1) == 0:
        return 0
    while mask < WHOLE_MASK and (high >> (11 + mask)) & 1:
        mask += 1
    return mask


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A decoded descriptor. ``iova`` and ``mask`` (2^mask pages) for ranges; fields a type lacks are 0."""

    kind: str
    scope: str = ""
    did: int = 0
    iova: int = 0
    mask: int = 0
    ih: bool = False
    drain_reads: bool = False
    drain_writes: bool = False
    source: int = 0
    queue_depth: int = 0


def _devtlb_range(high: int) -> tuple[int, int]:
    """(first address, mask) of a device-TLB request's second word."""
    mask = int(_devtlb_mask(high))
    return (high >> (12 + mask) << (12 + mask) if mask < WHOLE_MASK else 0), mask


def decode(low: int, high: int) -> Descriptor:
    """The request that two descriptor words stand for; MisuseError for a type or granularity that does not exist."""
    kind = _TYPES.get(low & 15)
    if kind is None:
        raise MisuseError(f"descriptor {low:#x} {high:#x}: type {low & 15} is not an invalidation request")
    if kind == "devtlb":
        iova, mask = _devtlb_range(high)
        return Descriptor(kind, "page", iova=iova, mask=mask, source=(low >> 32) & 0xFFFF, queue_depth=(low >> 16) & 31)
    if kind in ("iec", "wait"):
        return Descriptor(kind, "" if kind == "wait" else ("page" if low & 16 else "global"))
    scope = _SCOPES.get((low >> 4) & 3)
    if scope is None:
        raise MisuseError(f"descriptor {low:#x} {high:#x}: granularity 0 is reserved")
    return Descriptor(
        kind,
        scope,
        did=(low >> 16) & 0xFFFF if scope != "global" else 0,
        iova=(high >> 12 << 12) if scope == "page" else 0,
        mask=high & 63 if scope == "page" else 0,
        ih=scope == "page" and bool(high & 64),
        drain_reads=kind == "iotlb" and bool(low & 128),
        drain_writes=kind == "iotlb" and bool(low & 64),
    )


def encode(request: Descriptor) -> tuple[int, int]:
    """The two words of an IOTLB, PASID IOTLB or device-TLB request, exactly as the unit submits them."""
    if not isinstance(request, Descriptor):
        raise TypeError(f"request={request!r}: must be a Descriptor")
    if request.kind == "devtlb":
        return int(_devtlb_low(request.source, request.queue_depth)), int(_devtlb_high(request.iova, request.mask))
    if request.kind not in ("iotlb", "p_iotlb"):
        raise MisuseError(f"kind={request.kind!r}: only iotlb, p_iotlb and devtlb requests are worded here")
    granularity = {name: code for code, name in _SCOPES.items()}[request.scope]
    word = _iotlb_low if request.kind == "iotlb" else _piotlb_low
    high = int(_range_high(request.iova, request.mask, request.ih)) if request.scope == "page" else 0
    return int(word(request.did, granularity)), high


@cython.final
@cython.cclass
class InvalidationQueue:
    """The ring: the unit takes at ``head``, software places at ``tail``; ``pending`` are placed, not submitted."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.ring = memoryview(array("Q", bytes(16 * QI_LENGTH)))
        self.head = 0
        self.tail = 0
        self.pending = 0

    def _push(self, low: cython.ulonglong, high: cython.ulonglong) -> cython.int:
        """Place one descriptor; the number of descriptors that now wait for ``_submit``."""
        self.ring[2 * self.tail] = low
        self.ring[2 * self.tail + 1] = high
        self.tail = (self.tail + 1) % QI_LENGTH
        self.pending += 1
        return self.pending

    def _submit(self, cpu: cython.int) -> cython.void:
        """Take the queue's lock, append the wait and move the tail: the unit may drain."""
        self.ledger._lock(L_LOCK_QI, cpu)
        self.ledger.counts[L_INV_WAIT] += 1
        status: cython.ulonglong = QI_DONE
        self._push(status << 32 | QI_STATUS_WRITE | QI_WAIT, 0)
        self.pending = 0

    def _next(self) -> cython.Py_ssize_t:
        """Index (in words) of the next descriptor for the unit, or -1 when it has caught up with the tail."""
        if self.head == self.tail:
            return -1
        at: cython.Py_ssize_t = 2 * self.head
        self.head = (self.head + 1) % QI_LENGTH
        return at
