from dmakit.consts cimport *
from dmakit.failpoint cimport FailPoint
from dmakit.iommu.gather cimport Gather
from dmakit.iommu.space cimport Domain
from dmakit.iova.domain cimport IovaDomain
from dmakit.iova.flush_queue cimport FlushQueue
from dmakit.ledger cimport Ledger
from dmakit.memory.physical cimport PhysicalMemory
from dmakit.p2p.state cimport P2pState
from dmakit.swiotlb.bounce cimport Swiotlb
from dmakit.swiotlb.pool cimport SwiotlbPool

cdef unsigned long long MASK_32BIT
cdef unsigned long long LARGE_LEAF
cdef int _NOT_MEMORY
cdef int _SLOTS_EXHAUSTED
cdef int _FAILED_MAP_REPORTED_AS_SUCCESS
cdef int WARN_UNLINK_HOLE
cdef int WARN_UNLINK_SIZE
cdef int WARN_ALLOC_SIZE
cdef int WARN_LINK_START
cdef int WARN_LINK_BOUNCED
cdef int WARN_MAP_ALIGN
cdef int WARN_UNMAP_SIZE
cdef int WARN_UNMAP_NOTHING

cdef class MapCore:
    cdef readonly str name
    cdef readonly PhysicalMemory memory
    cdef readonly Domain domain
    cdef readonly IovaDomain iovad
    cdef readonly FlushQueue flush_queue
    cdef readonly Swiotlb swiotlb
    cdef readonly P2pState p2p
    cdef readonly object cache
    cdef readonly Ledger ledger
    cdef readonly FailPoint fail
    cdef readonly Gather gather
    cdef public object checker
    cdef public object events
    cdef readonly bint translating
    cdef readonly bint identity
    cdef readonly bint coherent
    cdef readonly bint trusted
    cdef readonly bint kmalloc_bounce
    cdef readonly bint force_bounce
    cdef readonly bint pci
    cdef readonly bint unchecked
    cdef readonly bint prefer_32bit
    cdef readonly bint skip_sync
    cdef readonly unsigned long long mask
    cdef readonly unsigned long long coherent_mask
    cdef readonly unsigned long long bus_dma_limit
    cdef readonly unsigned long long granule_mask
    cdef readonly unsigned long long cut_from
    cdef readonly unsigned long long min_align_mask
    cdef readonly unsigned long long max_segment
    cdef readonly unsigned long long boundary
    cdef readonly int granule_shift
    cdef readonly int defects
    cdef readonly int why
    cdef readonly int error
    cdef unsigned long long[::1] scratch
    cdef readonly Py_ssize_t scratch_used

    cdef unsigned long long _aligned(self, unsigned long long size) noexcept nogil
    cdef int _prot(self, int direction, int attrs) noexcept nogil
    cdef bint _needs_cache_care(self, int attrs) noexcept nogil
    cdef bint _kmalloc_unsafe(self, unsigned long long size, int direction) noexcept nogil
    cdef bint _may_bounce(self, unsigned long long size, int direction) noexcept nogil
    cdef unsigned long long _fail(self, int error, int why) noexcept nogil
    cdef unsigned long long _alloc_iova(self, unsigned long long size, unsigned long long limit, int cpu) except? 0 nogil
    cdef int _free_iova(self, unsigned long long iova, unsigned long long size, bint queued, int cpu) except -1 nogil
    cdef int _map_entries(
        self, unsigned long long iova, unsigned long long phys, unsigned long long size, int prot, int cpu) except? -1 nogil
    cdef int _for_device(self, unsigned long long phys, unsigned long long size, int direction) except -1 nogil
    cdef int _for_cpu(self, unsigned long long phys, unsigned long long size, int direction) except -1 nogil
    cdef unsigned long long _bounce_in(
        self, unsigned long long phys, unsigned long long size, unsigned long long align_mask, int direction, int attrs,
        int cpu) except? 0 nogil
    cdef int _bounce_out(self, unsigned long long tlb, unsigned long long size, int direction, int attrs) except -1 nogil
    cdef unsigned long long _origin(self, unsigned long long tlb) except? 0 with gil
    cdef int _bounce_sync(self, unsigned long long tlb, unsigned long long size, bint to_device) except -1 nogil
    cdef bint _is_slot(self, unsigned long long phys) noexcept nogil
    cdef unsigned long long _remember(self, unsigned long long addr, unsigned long long size) except? 0 nogil
    cdef int _widen_scratch(self) except -1 with gil
    cdef int _release_remembered(self, int direction, int attrs) except -1 nogil
    cdef bint _cuts_leaf(self, unsigned long long start, unsigned long long end) except? -1 nogil
    cdef void _warn(self, int which) noexcept with gil
    cdef void _note_wider(self, unsigned long long limit) noexcept with gil
    cdef void _note_bounce(self, unsigned long long iova, unsigned long long phys, unsigned long long size) noexcept with gil
    cdef int _clean_lines(self, unsigned long long phys, unsigned long long size) except -1 with gil
    cdef int _drop_lines(self, unsigned long long phys, unsigned long long size) except -1 with gil
    cdef int _state_closed(self, object state) except -1
