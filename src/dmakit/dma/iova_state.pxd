from dmakit.dma.core cimport MapCore

cdef unsigned long long USE_SWIOTLB
cdef unsigned long long _SIZE_BITS
cdef int _NO_IOMMU
cdef int _IDENTITY_DOMAIN
cdef int _IOVA_EXHAUSTED
cdef int _NONE
cdef int _PARTIAL_DESTROY
cdef int _ZERO_MIDDLE
cdef int _UNWIND_FROM_ZERO
cdef int _SLOTS_FREED_BEFORE_UNMAP
cdef int _UNLINK_CUTS_LEAF

cdef class IovaState:
    cdef readonly MapCore core
    cdef readonly unsigned long long addr
    cdef readonly unsigned long long size_word
    cdef readonly int cpu
    cdef readonly list pieces
    cdef public object device

    cdef unsigned long long _try_alloc(self, MapCore core, unsigned long long phys, unsigned long long size, int cpu) except? 0
    cdef int _link(
        self, unsigned long long phys, unsigned long long offset, unsigned long long size, int direction, int attrs,
        int cpu) except? -1
    cdef int _link_in_place(
        self, unsigned long long iova, unsigned long long phys, unsigned long long size, int direction, int attrs,
        int cpu) except? -1
    cdef int _link_bounced(
        self, unsigned long long phys, unsigned long long offset, unsigned long long size, int direction, int attrs,
        int cpu) except? -1
    cdef int _bounce_and_link(
        self, unsigned long long iova, unsigned long long phys, unsigned long long size, unsigned long long pad,
        int direction, int attrs, int cpu) except? -1
    cdef int _sync(self, unsigned long long offset, unsigned long long size, int cpu) except? -1
    cdef int _unlink(
        self, unsigned long long offset, unsigned long long size, int direction, int attrs, int cpu) except? -1
    cdef int _remove(
        self, unsigned long long offset, unsigned long long size, int direction, int attrs, bint free_iova, int cpu) except? -1
    cdef int _destroy(self, unsigned long long mapped_len, int direction, int attrs, int cpu) except? -1
    cdef int _free(self, int cpu) except? -1
