"""From an internal's −errno to the exception a user reads: which value, which rule, what would help.

Kept apart from the calls so that the hot modules stay about mapping. Every function returns an exception (the caller
raises it), chosen by whose fault it was: MisuseError, ExhaustedError or UnsupportedError.
"""

from __future__ import annotations

from typing import Any

from dmakit import consts
from dmakit.dma.direction import Attrs, Direction
from dmakit.errors import DmakitError, ExhaustedError, MisuseError, UnsupportedError
from dmakit.reasons import Reason


def link_error(core: Any, error: int, phys: int, offset: int, size: int, direction: int, attrs: int) -> DmakitError:
    """The exception for a failed ``link`` or ``sync``."""
    errno = -error
    failure = told(core, errno, linking=True)
    if failure is not None:
        return failure
    what = f"link of {size:#x} bytes at phys {phys:#x}, offset {offset:#x}"
    granule = core.granule_mask + 1
    if errno == consts.EIO:
        text = f"phys starts {phys & core.granule_mask:#x} into a granule of {granule:#x} at an offset above 0"
        return MisuseError(f"{what}: {text}; only the first piece may", errno, rule="unaligned-interior")
    if errno == consts.EADDRINUSE:
        return MisuseError(f"{what}: overlaps a linked piece", errno, rule="overlapping-link")
    if errno == consts.ENXIO:
        hint = "the offset must be congruent to phys within a granule"
        if core.trusted is False and phys & core.granule_mask and not core.min_align_mask & core.granule_mask:
            hint = "the bounce slot loses the offset in the granule unless the device sets min_align_mask"
        return MisuseError(
            f"{what}: not expressible in whole granules of {granule:#x}: {hint}", errno, rule="alignment"
        )
    if errno == consts.EOPNOTSUPP:
        why = "the state already bounced" if core.coherent else "the device does not snoop CPU caches"
        return UnsupportedError(f"{what}: {Attrs.REQUIRE_COHERENT!r} but {why}", errno)
    if errno == consts.EPERM:
        return UnsupportedError(f"{what}: must be bounced, which {Attrs(attrs)!r} forbids", errno)
    if errno == consts.EFAULT:
        return MisuseError(f"{what}: must be bounced, but there is no memory to copy", errno)
    if errno == consts.ENOMEM:
        lack = "bounce slot" if core.why == Reason.SLOTS_EXHAUSTED else "memory for an IOMMU table page"
        return ExhaustedError(f"{what}: no {lack}", errno)
    if errno == consts.EINVAL and direction == Direction.NONE:
        return MisuseError(f"{what}: {Direction.NONE!r} gives the device neither read nor write access", errno)
    return MisuseError(f"{what}: the IOMMU cannot map this range (−{errno})", errno)


def cut_error(core: Any, what: str, errno: int) -> DmakitError:
    """The exception for an unlink (``what``: call and range) that would cut what goes only as a whole."""
    if core.domain.capabilities.unmap_unit == "mapping":
        text = "cuts a piece, and this domain unmaps only what was mapped as one: unlink whole pieces"
        return UnsupportedError(f"{what} {text}", errno)
    text = "cuts a large leaf: unlink what was linked as one piece"
    return MisuseError(f"{what} {text}", errno, rule="unlink-cuts-leaf")


def told(core: Any, errno: int, *, linking: bool = False) -> DmakitError | None:
    """What the host said when the last mapping failed with ``errno``, where a domain has somebody to ask."""
    failure = None if core.domain is None else core.domain.failure
    if core.why == Reason.SLOTS_EXHAUSTED or (core.why == Reason.IOVA_EXHAUSTED and not linking):
        return None  # it did not come so far
    return failure if isinstance(failure, DmakitError) and failure.errno == errno else None


def _cause(core: Any, attrs: int) -> tuple[type[DmakitError], str, int]:
    """Whose fault the last failed mapping was, in words, and the errno to report."""
    errno = -core.error
    if errno == consts.EFAULT:
        return MisuseError, "must be bounced, but there is no memory to copy", errno
    if core.why == Reason.IOVA_EXHAUSTED:
        return ExhaustedError, f"no free IOVA range at or below {core.mask:#x}", consts.ENOMEM
    if core.why == Reason.SLOTS_EXHAUSTED:
        if core.swiotlb is None:
            return UnsupportedError, "must be bounced, but there is no swiotlb pool", consts.ENOMEM
        return ExhaustedError, "no run of free bounce slots (at most 256 KiB at once)", consts.ENOMEM
    if core.why == Reason.TABLE_MEMORY_EXHAUSTED:
        return ExhaustedError, "no memory for an IOMMU table page", consts.ENOMEM
    if errno == consts.EPERM:
        return UnsupportedError, f"must be bounced, which {Attrs(attrs)!r} forbids", errno
    if errno == consts.EOPNOTSUPP:
        return UnsupportedError, f"{Attrs.REQUIRE_COHERENT!r} but the device does not snoop CPU caches", errno
    if errno == consts.EIO:
        text = f"the device reaches only up to {core.mask:#x} and nothing can be bounced: it needs a wider mask"
        return UnsupportedError, text, consts.ENOMEM
    if core.translating and core.min_align_mask > core.granule_mask:
        return MisuseError, f"min_align_mask={core.min_align_mask:#x} exceeds the granule", errno
    return MisuseError, f"the IOMMU cannot map this range (errno {errno})", errno


def map_error(core: Any, phys: int, size: int, attrs: int) -> DmakitError:
    """The exception for a failed ``map_phys`` (the kernel's DMA_MAPPING_ERROR, which reads as −ENOMEM)."""
    failure = told(core, -core.error)
    if failure is not None:
        return failure
    kind, text, errno = _cause(core, attrs)
    return kind(f"map of {size:#x} bytes at phys {phys:#x}: {text}", errno)


def window_error(core: Any, size: int) -> DmakitError:
    """The exception for a window that cannot be had, where a falsy state is no answer."""
    errno = -core.error
    what = f"window of {size:#x} bytes"
    if core.why == Reason.IOVA_EXHAUSTED:
        return ExhaustedError(f"{what}: no free IOVA range at or below {core.mask:#x}", consts.ENOMEM)
    return UnsupportedError(f"{what}: the device has no IOMMU that translates for it", errno)


def sg_error(core: Any, count: int, sg: Any) -> DmakitError:
    """The exception for a failed ``map_sg``."""
    errno = -count
    what = f"map_sg of {sg.entries} entries"
    if errno == consts.EREMOTEIO:
        return UnsupportedError(f"{what}: a peer's memory that this device cannot reach", errno)
    if sg.entries == 0 or sg.direction == Direction.NONE:
        return MisuseError(f"{what}, {Direction(sg.direction)!r}: needs at least one entry and a direction", errno)
    failure = told(core, -core.error)
    if failure is not None:
        return failure
    kind, text, _ = _cause(core, sg.attrs)
    return kind(f"{what}: {text}", errno)
