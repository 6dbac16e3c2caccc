"""Directions and attributes of a mapping, as users write them.

``Direction`` says who moves the bytes: TO_DEVICE = the device reads memory, FROM_DEVICE = it writes memory.
``Attrs`` are the kernel's ``DMA_ATTR_*`` bits. Hot code works on the integers of ``consts`` (the values are equal);
these enums are what public methods accept and print.

Model: ``include/linux/dma-direction.h``, ``include/linux/dma-mapping.h``.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from dmakit import consts
from dmakit.errors import MisuseError


class Direction(IntEnum):
    """enum dma_data_direction."""

    BIDIRECTIONAL = consts.DMA_BIDIRECTIONAL
    TO_DEVICE = consts.DMA_TO_DEVICE
    FROM_DEVICE = consts.DMA_FROM_DEVICE
    NONE = consts.DMA_NONE


class Attrs(IntFlag):
    """DMA_ATTR_*: how a mapping may be treated."""

    NONE = 0
    WEAK_ORDERING = consts.ATTR_WEAK_ORDERING
    WRITE_COMBINE = consts.ATTR_WRITE_COMBINE
    NO_KERNEL_MAPPING = consts.ATTR_NO_KERNEL_MAPPING
    SKIP_CPU_SYNC = consts.ATTR_SKIP_CPU_SYNC
    FORCE_CONTIGUOUS = consts.ATTR_FORCE_CONTIGUOUS
    ALLOC_SINGLE_PAGES = consts.ATTR_ALLOC_SINGLE_PAGES
    NO_WARN = consts.ATTR_NO_WARN
    PRIVILEGED = consts.ATTR_PRIVILEGED
    MMIO = consts.ATTR_MMIO
    DEBUGGING_IGNORE_CACHELINES = consts.ATTR_DEBUGGING_IGNORE_CACHELINES
    REQUIRE_COHERENT = consts.ATTR_REQUIRE_COHERENT
    CC_SHARED = consts.ATTR_CC_SHARED


_ALL_ATTRS = int(~Attrs(0))


def checked_direction(direction: int) -> int:
    """``direction`` as an integer 0…3; MisuseError otherwise."""
    if not isinstance(direction, int) or not 0 <= direction <= 3:
        raise MisuseError(f"direction={direction!r}: must be one of the four Direction values (0 to 3)")
    return int(direction)


def checked_attrs(attrs: int) -> int:
    """``attrs`` as an integer of known DMA_ATTR bits; MisuseError otherwise."""
    if not isinstance(attrs, int) or attrs < 0 or attrs & ~_ALL_ATTRS:
        raise MisuseError(f"attrs={attrs!r}: must be a combination of Attrs (known bits {_ALL_ATTRS:#x})")
    return int(attrs)
