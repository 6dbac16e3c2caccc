"""The binary interface of iommufd and VFIO: structures, ioctl numbers, flags.

``LAYOUTS`` is the table: each structure as its C fields in order, each with a ``struct`` code; native alignment does
the rest, as the C compiler did. All ioctls of the three families are plain ``_IO(';', nr)``: the number tells neither
direction nor size, and one number means different things on different files (0x3b71 maps DMA on a type1 container
and resets a bus on a device), so a number is always used together with the kind of file.

The first word of nearly every structure is its size (``size`` for iommufd, ``argsz`` for VFIO): ``pack`` fills it in.
Sizes and offsets are tested against a dump that a C compiler made (``tests/data/uapi_layout.txt``, Linux 7.2).

Source: ``include/uapi/linux/iommufd.h``, ``include/uapi/linux/vfio.h`` (facts only; x86-64 and other LP64 machines).
"""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

_BASE = ord(";") << 8

_TEXT = """
iommu_destroy              size:I id:I
iommu_ioas_alloc           size:I flags:I out_ioas_id:I
iommu_iova_range           start:Q last:Q
iommu_ioas_iova_ranges     size:I ioas_id:I num_iovas:I __reserved:I allowed_iovas:Q out_iova_alignment:Q
iommu_ioas_map             size:I flags:I ioas_id:I __reserved:I user_va:Q length:Q iova:Q
iommu_ioas_map_file        size:I flags:I ioas_id:I fd:i start:Q length:Q iova:Q
iommu_ioas_copy            size:I flags:I dst_ioas_id:I src_ioas_id:I length:Q dst_iova:Q src_iova:Q
iommu_ioas_unmap           size:I ioas_id:I iova:Q length:Q
iommu_option               size:I option_id:I op:H __reserved:H object_id:I val64:Q
iommu_hwpt_alloc           size:I flags:I dev_id:I pt_id:I out_hwpt_id:I __reserved:I data_type:I data_len:I \
data_uptr:Q fault_id:I __reserved2:I
iommu_hw_info              size:I flags:I dev_id:I data_len:I data_uptr:Q out_data_type:I out_max_pasid_log2:B \
__reserved:3s out_capabilities:Q
iommu_hwpt_set_dirty_tracking  size:I flags:I hwpt_id:I __reserved:I
iommu_hwpt_get_dirty_bitmap    size:I hwpt_id:I flags:I __reserved:I iova:Q length:Q page_size:Q data:Q
vfio_info_cap_header       id:H version:H next:I
vfio_group_status          argsz:I flags:I
vfio_device_info           argsz:I flags:I num_regions:I num_irqs:I cap_offset:I pad:I
vfio_region_info           argsz:I flags:I index:I cap_offset:I size:Q offset:Q
vfio_region_sparse_mmap_area   offset:Q size:Q
vfio_irq_info              argsz:I flags:I index:I count:I
vfio_irq_set               argsz:I flags:I index:I start:I count:I
vfio_device_bind_iommufd   argsz:I flags:I iommufd:i out_devid:I token_uuid_ptr:Q
vfio_device_attach_iommufd_pt  argsz:I flags:I pt_id:I pasid:I
vfio_device_detach_iommufd_pt  argsz:I flags:I pasid:I
vfio_device_feature        argsz:I flags:I
vfio_device_feature_dma_buf    region_index:I open_flags:I flags:I nr_ranges:I
vfio_region_dma_range      offset:Q length:Q
vfio_iommu_type1_info      argsz:I flags:I iova_pgsizes:Q cap_offset:I pad:I
vfio_iova_range            start:Q end:Q
vfio_iommu_type1_info_dma_avail    header:8s avail:I
vfio_iommu_type1_dma_map   argsz:I flags:I vaddr:Q iova:Q size:Q
vfio_iommu_type1_dma_unmap argsz:I flags:I iova:Q size:Q
vfio_bitmap                pgsize:Q size:Q data:Q
vfio_iommu_type1_dirty_bitmap      argsz:I flags:I
vfio_iommu_type1_dirty_bitmap_get  iova:Q size:Q bitmap:24s
"""


class Layout:
    """One structure: ``size`` bytes, ``offsets`` and ``sizes`` by field; the size field is filled in by ``pack``."""

    def __init__(self, name: str, fields: str) -> None:
        self.name = name
        pairs = [field.split(":") for field in fields.split()]
        self.fields = tuple(name for name, _ in pairs)
        self.codes: dict[str, str] = {pair[0]: pair[1] for pair in pairs}
        self._struct = struct.Struct("@" + "".join(code for _, code in pairs))
        self.size = self._struct.size
        self.offsets: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        format_so_far = "@"
        for field, code in pairs:
            format_so_far += code
            self.sizes[field] = struct.calcsize(code)
            self.offsets[field] = struct.calcsize(format_so_far) - self.sizes[field]

    def pack(self, tail: bytes = b"", **values: Any) -> bytearray:
        """The structure and what follows it, fields not named are 0; ``size``/``argsz`` count the tail too."""
        total = self.size + len(tail)
        if self.fields[0] in ("size", "argsz"):
            values.setdefault(self.fields[0], total)
        unknown = set(values) - set(self.fields)
        if unknown:
            raise TypeError(f"{self.name} has no field {sorted(unknown)[0]!r}")
        items = [values.get(field, b"" if self.codes[field].endswith("s") else 0) for field in self.fields]
        return bytearray(self._struct.pack(*items)) + tail

    def row(self, *values: int) -> bytearray:
        """The structure from all its values after the size, in order: ``pack`` for calls made millions of times."""
        return bytearray(self._struct.pack(self.size, *values))

    def unpack(self, data: bytes | bytearray | memoryview, offset: int = 0) -> SimpleNamespace:
        """The fields of the structure at ``offset``."""
        return SimpleNamespace(**dict(zip(self.fields, self._struct.unpack_from(data, offset), strict=True)))


LAYOUTS = {
    name: Layout(name, fields)
    for name, fields in (line.split(None, 1) for line in _TEXT.strip().splitlines() if line.strip())
}

IOCTLS = {
    # iommufd (/dev/iommu)
    "IOMMU_DESTROY": _BASE | 0x80,
    "IOMMU_IOAS_ALLOC": _BASE | 0x81,
    "IOMMU_IOAS_COPY": _BASE | 0x83,
    "IOMMU_IOAS_IOVA_RANGES": _BASE | 0x84,
    "IOMMU_IOAS_MAP": _BASE | 0x85,
    "IOMMU_IOAS_UNMAP": _BASE | 0x86,
    "IOMMU_OPTION": _BASE | 0x87,
    "IOMMU_HWPT_ALLOC": _BASE | 0x89,
    "IOMMU_GET_HW_INFO": _BASE | 0x8A,
    "IOMMU_HWPT_SET_DIRTY_TRACKING": _BASE | 0x8B,
    "IOMMU_HWPT_GET_DIRTY_BITMAP": _BASE | 0x8C,
    "IOMMU_IOAS_MAP_FILE": _BASE | 0x8F,
    # VFIO container and group
    "VFIO_GET_API_VERSION": _BASE | 100,
    "VFIO_CHECK_EXTENSION": _BASE | 101,
    "VFIO_SET_IOMMU": _BASE | 102,
    "VFIO_GROUP_GET_STATUS": _BASE | 103,
    "VFIO_GROUP_SET_CONTAINER": _BASE | 104,
    "VFIO_GROUP_UNSET_CONTAINER": _BASE | 105,
    "VFIO_GROUP_GET_DEVICE_FD": _BASE | 106,
    "VFIO_IOMMU_GET_INFO": _BASE | 112,
    "VFIO_IOMMU_MAP_DMA": _BASE | 113,
    "VFIO_IOMMU_UNMAP_DMA": _BASE | 114,
    "VFIO_IOMMU_DIRTY_PAGES": _BASE | 117,
    # VFIO device
    "VFIO_DEVICE_GET_INFO": _BASE | 107,
    "VFIO_DEVICE_GET_REGION_INFO": _BASE | 108,
    "VFIO_DEVICE_GET_IRQ_INFO": _BASE | 109,
    "VFIO_DEVICE_SET_IRQS": _BASE | 110,
    "VFIO_DEVICE_RESET": _BASE | 111,
    "VFIO_DEVICE_FEATURE": _BASE | 117,
    "VFIO_DEVICE_BIND_IOMMUFD": _BASE | 118,
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT": _BASE | 119,
    "VFIO_DEVICE_DETACH_IOMMUFD_PT": _BASE | 120,
}

# IOMMU_IOAS_MAP and its kin
MAP_FIXED_IOVA, MAP_WRITEABLE, MAP_READABLE = 1, 2, 4
HWPT_ALLOC_DIRTY_TRACKING = 2
HW_CAP_DIRTY_TRACKING = 1
DIRTY_TRACKING_ENABLE = 1
GET_DIRTY_NO_CLEAR = 1
OPTION_RLIMIT_MODE, OPTION_HUGE_PAGES = 0, 1
OPTION_SET, OPTION_GET = 0, 1

# type1
TYPE1_IOMMU, TYPE1V2_IOMMU, UNMAP_ALL = 1, 3, 9
GROUP_VIABLE, GROUP_CONTAINER_SET = 1, 2
DMA_MAP_READ, DMA_MAP_WRITE = 1, 2
DMA_UNMAP_ALL = 2
INFO_CAPS = 2
CAP_IOVA_RANGE, CAP_MIGRATION, CAP_DMA_AVAIL = 1, 2, 3
DIRTY_START, DIRTY_STOP, DIRTY_GET_BITMAP = 1, 2, 4

# device
DEVICE_RESET, DEVICE_PCI, DEVICE_CAPS = 1, 2, 128
REGION_READ, REGION_WRITE, REGION_MMAP, REGION_CAPS = 1, 2, 4, 8
REGION_CAP_SPARSE_MMAP = 1
ROM_REGION, CONFIG_REGION = 6, 7
IRQ_INTX, IRQ_MSI, IRQ_MSIX, IRQ_ERR, IRQ_REQ = range(5)
IRQ_EVENTFD, IRQ_MASKABLE, IRQ_AUTOMASKED, IRQ_NORESIZE = 1, 2, 4, 8
SET_DATA_NONE, SET_DATA_BOOL, SET_DATA_EVENTFD = 1, 2, 4
SET_MASK, SET_UNMASK, SET_TRIGGER = 8, 16, 32
FEATURE_GET, FEATURE_SET, FEATURE_PROBE = 1 << 16, 1 << 17, 1 << 18
FEATURE_DMA_BUF = 11


def capabilities(data: bytes | bytearray, first: int) -> dict[int, int]:
    """Capability id to offset, from the chain that begins at ``first`` of an info structure (0 = no chain)."""
    header = LAYOUTS["vfio_info_cap_header"]
    found: dict[int, int] = {}
    at = first
    while at and at + header.size <= len(data) and at not in found.values():
        cap = header.unpack(data, at)
        found[cap.id] = at
        at = cap.next
    return found
