"""Directions and attributes of a mapping, as users write them.

``Direction`` says who moves the bytes: TO_DEVICE = the device reads memory, FROM_DEVICE = it writes memory.
``Attrs`` are the kernel's ``DMA_ATTR_*`` bits. Hot code works on the integers of ``consts`` (the values are equal);
these enums are what public methods accept and print.

Model: ``include/linux/dma-direction.h``, ``include/linux/dma-mapping.h``.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from functools import reduce
from operator import index, or_

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


_ALL_ATTRS = int(reduce(or_, Attrs))


def integer(value: object) -> int | None:
    """``value`` as an int when it is an integer of any kind, else None."""
    try:
        return index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def checked_direction(direction: object) -> int:
    """``direction`` as an integer 0…3; MisuseError otherwise."""
    number = integer(direction)
    if number is None or not 0 <= number <= 3:
        raise MisuseError(f"direction={direction!r}: must be one of the four Direction values (0 to 3)")
    return number


def checked_attrs(attrs: object) -> int:
    """``attrs`` as an integer of known DMA_ATTR bits; MisuseError otherwise."""
    number = integer(attrs)
    if number is None or number < 0 or number & ~_ALL_ATTRS:
        raise MisuseError(f"attrs={attrs!r}: must be a combination of Attrs (known bits {_ALL_ATTRS:#x})")
    return number


def checked_mask(name: str, mask: object) -> int:
    """``mask`` as an integer 2**n − 1 with n from 1 to 64; MisuseError, with its name, otherwise."""
    number = integer(mask)
    if number is None or number <= 0 or number >> 64 or number & (number + 1):
        raise MisuseError(f"{name}={mask!r}: must be 2**n - 1 with n from 1 to 64")
    return number


def checked_range(call: str, start: object, size: object) -> tuple[int, int]:
    """[start, start+size) as two integers; MisuseError unless it is a non-empty range of 64-bit addresses."""
    first, length = integer(start), integer(size)
    if first is None or length is None or first < 0 or length <= 0 or length >> 64 or first + length > 1 << 64:
        raise MisuseError(f"{call}: [{start!r}, +{size!r}): must be a non-empty range of 64-bit addresses")
    return first, length


def checked_cpu(cpu: object, cpus: int) -> int:
    """``cpu`` as an integer below ``cpus``; MisuseError otherwise."""
    number = integer(cpu)
    if number is None or not 0 <= number < cpus:
        raise MisuseError(f"cpu={cpu!r}: must be 0 to {cpus - 1}, a CPU of the machine")
    return number
