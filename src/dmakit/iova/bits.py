"""Arithmetic of naturally aligned ranges.

Every IOVA range of ``size`` granules starts at a multiple of ``size`` rounded up to a power of two (the
kernel's ``size_aligned``), so a 33-granule range is aligned to 64 but occupies 33.

``largest_fit`` turns this rule into one number for each gap. Let ``2**m`` be the largest naturally aligned block
inside the gap. Sizes up to ``2**m`` fit. Beyond that only sizes aligned to ``2**(m+1)`` may still fit: from the
first such multiple to the end of the gap there are fewer than ``2**(m+1)`` granules (else m were not the largest),
and more than ``2**m`` of them or it is no gain; a yet larger alignment leaves no more room than that. So a size
fits the gap exactly when it is at most ``largest_fit``: a tree that keeps the maximum of this number for each
subtree finds the highest fitting gap without a wrong turn.
"""

from __future__ import annotations

import cython


def ceil_log2(value: cython.ulonglong) -> cython.int:
    """The smallest n with ``value <= 2**n``, for 1 <= value <= 2**63 (the kernel's ``order_base_2``)."""
    if cython.compiled:
        if value <= 1:
            return 0
        return 64 - leading_zeros(value - 1)  # noqa: F821 (bits.pxd names the compiler's own)
    return (value - 1).bit_length()


def floor_log2(value: cython.ulonglong) -> cython.int:
    """The largest n with ``2**n <= value``, for value >= 1."""
    if cython.compiled:
        return 63 - leading_zeros(value)  # noqa: F821
    return value.bit_length() - 1


def align_up(value: cython.ulonglong, order: cython.int) -> cython.ulonglong:
    """``value`` rounded up to a multiple of ``2**order``; the caller rules out an overflow."""
    one: cython.ulonglong = 1
    mask: cython.ulonglong = (one << order) - 1
    return (value + mask) & ~mask


def largest_fit(start: cython.ulonglong, end: cython.ulonglong) -> cython.ulonglong:
    """The largest size for which a naturally aligned range fits into [start, end); every smaller size fits too.

    The addresses are pfns below 2**62; 0 when the gap is empty.
    """
    if end <= start:
        return 0
    one: cython.ulonglong = 1
    order: cython.int = floor_log2(end - start)
    if align_up(start, order) + (one << order) > end:
        order -= 1
    block: cython.ulonglong = one << order
    wider: cython.ulonglong = align_up(start, order + 1)
    if wider + block < end:
        return end - wider
    return block


def mix(value: cython.ulonglong, word: cython.ulonglong) -> cython.ulonglong:
    """Stir ``word`` into a fingerprint (64 bits, the same compiled and interpreted)."""
    if cython.compiled:
        return (value ^ word) * 0x5BD1E995 + (value >> 29)
    else:  # noqa: RET505 (the mask must not be compiled)
        return ((value ^ word) * 0x5BD1E995 + (value >> 29)) & 0xFFFF_FFFF_FFFF_FFFF
