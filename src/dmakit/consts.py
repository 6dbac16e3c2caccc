"""Integers that hot code shares: page geometry, errnos, directions, attributes, ledger rows.

One table for both ways to run: interpreted code imports these names from here; compiled code takes them from
``consts.pxd`` as C enum constants. ``python tools/gen_consts.py`` writes the .pxd from this file and a test
holds the two equal. Only integers that fit in 31 bits belong here (a C enum constant is an int).

Directions and attribute bits: ``include/linux/dma-direction.h``, ``include/linux/dma-mapping.h``.
"""

from __future__ import annotations

# Page geometry -----------------------------------------------------------------------------------------
PAGE_SHIFT = 12
PAGE_SIZE = 4096
PAGE_MASK_LOW = 4095  # the offset bits inside a page
PAGE_MAX_ORDER = 18  # the largest block of the page allocator: 1 GiB

# IOVA allocator (include/linux/iova.h, drivers/iommu/iova.c, drivers/iommu/dma-iommu.c) ------------------------
IOVA_NIL = 0  # tree node index: no node
IOVA_ANCHOR = 1  # tree node index: the anchor at the top of the address space
IOVA_MAG_SIZE = 127  # pfns in a magazine
IOVA_MAG_STRIDE = 128  # words of storage a magazine (1024 bytes, as in the kernel)
IOVA_RANGE_CACHE_MAX_SIZE = 6  # orders 0 to 5 have magazines: up to 32 granules
IOVA_DEFAULT_FQ_SIZE = 256  # entries of a per-CPU flush queue
IOVA_SINGLE_FQ_SIZE = 32768  # entries of the one queue of a device with shadow_on_flush

# errnos (positive; hot code returns them negated) --------------------------------------------------------
EPERM = 1
ENOENT = 2
EIO = 5
ENXIO = 6
EAGAIN = 11
ENOMEM = 12
EFAULT = 14
EEXIST = 17
EINVAL = 22
ERANGE = 34
EOVERFLOW = 75
EOPNOTSUPP = 95
EADDRINUSE = 98
EREMOTEIO = 121

# enum dma_data_direction -----------------------------------------------------------------------------------
DMA_BIDIRECTIONAL = 0
DMA_TO_DEVICE = 1
DMA_FROM_DEVICE = 2
DMA_NONE = 3

# DMA attributes (bit values) -------------------------------------------------------------------------------
ATTR_WEAK_ORDERING = 1 << 1
ATTR_WRITE_COMBINE = 1 << 2
ATTR_NO_KERNEL_MAPPING = 1 << 4
ATTR_SKIP_CPU_SYNC = 1 << 5
ATTR_FORCE_CONTIGUOUS = 1 << 6
ATTR_ALLOC_SINGLE_PAGES = 1 << 7
ATTR_NO_WARN = 1 << 8
ATTR_PRIVILEGED = 1 << 9
ATTR_MMIO = 1 << 10
ATTR_DEBUGGING_IGNORE_CACHELINES = 1 << 11
ATTR_REQUIRE_COHERENT = 1 << 12
ATTR_CC_SHARED = 1 << 13

# IOMMU protection bits (include/linux/iommu.h) -------------------------------------------------------------
PROT_READ = 1
PROT_WRITE = 2
PROT_CACHE = 4
PROT_NOEXEC = 8
PROT_MMIO = 16
PROT_PRIV = 32

# swiotlb geometry (include/linux/swiotlb.h) ------------------------------------------------------------------
IO_TLB_SHIFT = 11
IO_TLB_SIZE = 2048  # a slot
IO_TLB_SEGSIZE = 128  # slots in a segment: the largest mapping

# enum pci_p2pdma_map_type (include/linux/pci-p2pdma.h) ------------------------------------------------------
P2P_MAP_UNKNOWN = 0
P2P_MAP_NONE = 1
P2P_MAP_NOT_SUPPORTED = 2
P2P_MAP_BUS_ADDR = 3
P2P_MAP_THRU_HOST_BRIDGE = 4

# Causes of an invalidation -----------------------------------------------------------------------------------
CAUSE_UNMAP = 0  # an unmap that flushes at once (strict mode, unlink)
CAUSE_FQ_FULL = 1  # a full flush queue
CAUSE_FQ_TIMER = 2  # the flush queue's timer
CAUSE_SYNC_MAP = 3  # map-side sync (caching mode)
CAUSE_TABLE = 4  # a table was replaced or freed by a map
CAUSE_OTHER = 5  # attach, detach, explicit calls
N_CAUSES = 6

# Ledger rows: the index of each counter (dmakit.ledger describes them) ---------------------------------------
L_IOVA_MAGAZINE = 0
L_IOVA_DEPOT = 1
L_IOVA_TREE = 2
L_IOVA_FAILED = 3
L_IOVA_FREE_MAGAZINE = 4
L_IOVA_FREE_TREE = 5
L_TREE_NODES = 6
L_RCACHE_FLUSHES = 7
L_LOCK_RBTREE = 8
L_LOCK_DEPOT = 9
L_LOCK_FQ = 10
L_LOCK_QI = 11
L_PTE_SET_1 = 12
L_PTE_SET_2 = 13
L_PTE_SET_3 = 14
L_PTE_SET_4 = 15
L_PTE_SET_5 = 16
L_PTE_CLEAR_1 = 17
L_PTE_CLEAR_2 = 18
L_PTE_CLEAR_3 = 19
L_PTE_CLEAR_4 = 20
L_PTE_CLEAR_5 = 21
L_TABLES_ALLOCATED = 22
L_TABLES_FREED = 23
L_TABLE_FLUSH_BYTES = 24
L_INV_PAGE = 25
L_INV_DOMAIN = 26
L_INV_GLOBAL = 27
L_INV_DEVTLB = 28
L_INV_WAIT = 29
L_INV_CAUSE_UNMAP = 30
L_INV_CAUSE_FQ_FULL = 31
L_INV_CAUSE_FQ_TIMER = 32
L_INV_CAUSE_SYNC_MAP = 33
L_INV_CAUSE_TABLE = 34
L_INV_CAUSE_OTHER = 35
L_FQ_ENTRIES = 36
L_FQ_FLUSHES_FULL = 37
L_FQ_FLUSHES_TIMER = 38
L_SYNC_MAP = 39
L_WALK_READS = 40
L_IOTLB_HITS = 41
L_IOTLB_MISSES = 42
L_PSC_HITS = 43
L_DEVTLB_HITS = 44
L_FAULTS = 45
L_BOUNCE_MAPS = 46
L_BOUNCE_SLOTS = 47
L_BOUNCED_BYTES = 48
L_BOUNCE_PAD_BYTES = 49
L_CACHE_CLEAN_BYTES = 50
L_CACHE_INV_BYTES = 51
L_MAP_CALLS = 52
L_UNMAP_CALLS = 53
L_SG_CALLS = 54
L_TRY_ALLOC_CALLS = 55
L_LINK_CALLS = 56
L_SYNC_CALLS = 57
L_UNLINK_CALLS = 58
L_DESTROY_CALLS = 59
L_DESCRIPTORS = 60
L_DESCRIPTOR_PAGES = 61
L_BOOKKEEPING_BYTES = 62
L_P2P_LOOKUPS = 63
L_PASSES = 64
L_BOUNCE_AREA_LOCKS = 65
L_BOUNCE_POOLS = 66
L_BOUNCE_TRANSIENT = 67
L_DOMAIN_MAPS = 68
L_DOMAIN_UNMAPS = 69
N_LEDGER = 70

# I/O page tables: geometry that every supported format shares (4 KiB tables of 512 eight-byte entries) ---------
PT_INDEX_BITS = 9
PT_ENTRIES = 512
PT_MAX_LEVELS = 5

# read_and_clear_dirty flags --------------------------------------------------------------------------------------
DIRTY_NO_CLEAR = 1

# The trace scanner -----------------------------------------------------------------------------------------------
SCAN_HEAD = 6  # words before the values of a row: record number, line, stamp, cpu, pid, context
SCAN_LOST = 255  # the kind of a "CPU:1 [LOST 123 EVENTS]" marker; its value 0 is the number of events
SCAN_STEP = 5  # integers a step: how, optional, slot, anchor start, anchor length
SCAN_TABLE = 512  # slots of the event-name table (a power of two, at most half full)
LINE_OTHER = 0  # well formed, an event that is not read
LINE_NOTE = 1  # blank, a comment, a remark of the recorder
LINE_MALFORMED = 2
LINE_RECORD = 3
HOW_NUMBER = 0
HOW_HEX = 1
HOW_WORD = 2
HOW_TEXT = 3
HOW_LIST = 4
SALT_ENTRY = 1  # distinguishes a function's name at its entry …
SALT_RETURN = 2  # … from its name at its return
# Translation words: what the page walker answers and the IOTLB keeps ----------------------------------------
# Output address in bits 51:12; the rest below. Level bits of 0 mean "no translation": bits 3:0 hold the FAULT_ reason.
TR_READ = 1
TR_WRITE = 2
TR_BOTH = TR_READ | TR_WRITE
TR_DIRTY = 4  # a write needs no further table update
TR_LEVEL_SHIFT = 4  # bits 6:4: level of the leaf (1 = 4 KiB, 2 = 2 MiB, 3 = 1 GiB)
TR_LEVEL_MASK = 0x70
TR_LEVEL_1 = 1 << TR_LEVEL_SHIFT
TR_ABSENT = 0x80  # the walk met an entry that is not present
TR_UNDECIDED = 8  # no reason of a fault either: the batch's lane leaves the access to the rule
LANE_BLOCK = 64  # accesses that the batch's lane asks the CPU's caches for at once

# Fault reasons (VT-d specification, legacy-mode numbers) ----------------------------------------------------
FAULT_NO_CONTEXT = 0x2
FAULT_WIDTH = 0x4
FAULT_WRITE = 0x5
FAULT_READ = 0x6
FAULT_TABLE = 0x7
FAULT_RESERVED = 0xC

# What an IOMMU unit knows of a domain: words of its context, CTX_WORDS a domain -----------------------------
CTX_ROOT = 0
CTX_LEVELS = 1  # 0 = no domain has this id
CTX_WIDTH = 2  # bits of an input address
CTX_PRESENT = 3
CTX_READ = 4
CTX_WRITE = 5
CTX_LEAF = 6
CTX_ADDRESS = 7
CTX_ACCESSED = 8  # 0 = the walker leaves the bit alone
CTX_DIRTY = 9
CTX_FLAGS = 10
CTX_ACCESSED_BIT = 11  # the format's bits, whether the walker sets them or not
CTX_DIRTY_BIT = 12
CTX_WORDS = 16
CTX_FIRST_STAGE = 1  # CTX_FLAGS: first-stage table, its requests are PASID-based
CTX_NP_CACHE = 2  # CTX_FLAGS: not-present entries are cached

# Invalidation descriptor types and granularities (VT-d specification, 6.5.2) --------------------------------
QI_IOTLB = 2
QI_DEVTLB = 3
QI_IEC = 4
QI_WAIT = 5
QI_PIOTLB = 6
QI_GLOBAL = 1
QI_DOMAIN = 2
QI_PAGE = 3
QI_DRAIN = 0xC0  # drain writes (6) and reads (7): the kernel sets what the capability register offers, both here
QI_STATUS_WRITE = 0x20  # a wait descriptor writes its status
QI_DONE = 2  # the status that Linux asks for
QI_LENGTH = 256  # descriptors of the ring: one 4 KiB page
QI_BATCH = 16  # descriptors that software collects before it rings the doorbell
WHOLE_MASK = 52  # address mask of the whole space, as cache_tag_flush_range prints it

# NVMe: a data pointer (command dword 0, PSDT), flags of a mapped request, its path (``nvme.iod.PATHS``), SGL or not --
PSDT_PRP = 0
PSDT_SGL_METABUF = 1
PSDT_SGL_METASEG = 2
IOD_SINGLE_SEGMENT = 1  # data: one dma_map_phys, address in the command
IOD_SINGLE_META_SEGMENT = 2  # metadata: likewise, address in MPTR
IOD_DATA_MAPPED = 4
IOD_META_MAPPED = 8
PATH_NO_DATA = 0
PATH_MAP_PHYS = 1
PATH_TWO_STEP = 2
PATH_BUS = 3
PATH_PER_SEGMENT = 4
PATH_FAILED = 5
PATH_EACH = 6  # from here on of the other strategies
PATH_SG = 7
PATH_REGISTERED = 8
SGL_UNSUPPORTED = 0
SGL_SUPPORTED = 1
SGL_FORCED = 2
