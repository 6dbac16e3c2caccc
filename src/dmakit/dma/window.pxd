from dmakit.consts cimport *
from dmakit.dma.core cimport MapCore, WARN_ALLOC_SIZE, WARN_LINK_BOUNCED, WARN_LINK_START, WARN_UNLINK_SIZE

cdef unsigned long long USE_SWIOTLB
cdef unsigned long long SIZE_BITS
cdef unsigned long long _ALL_ONES
cdef int _NO_IOMMU
cdef int _IDENTITY_DOMAIN
cdef int _IOVA_EXHAUSTED
cdef int _NONE
cdef int _PARTIAL_DESTROY
cdef int _ZERO_MIDDLE
cdef int _UNWIND_FROM_ZERO
cdef int _SLOTS_FREED_BEFORE_UNMAP
cdef int _UNLINK_CUTS_LEAF

cdef class IovaWindow:
    cdef readonly MapCore core
    cdef readonly unsigned long long addr
    cdef readonly unsigned long long size_word
    cdef unsigned long long filled

    cdef unsigned long long _try_alloc(self, MapCore core, unsigned long long phys, unsigned long long size, int cpu) except? 0
    cdef unsigned long long _open_window(self, unsigned long long phys, unsigned long long size, int cpu) except? 0 nogil
    cdef int _link(
        self, unsigned long long phys, unsigned long long offset, unsigned long long size, int direction, int attrs,
        int cpu) except? -1 nogil
    cdef int _link_in_place(
        self, unsigned long long iova, unsigned long long phys, unsigned long long size, int direction, int attrs,
        int cpu) except? -1 nogil
    cdef int _link_bounced(
        self, unsigned long long phys, unsigned long long offset, unsigned long long size, int direction, int attrs,
        int cpu) except? -1 nogil
    cdef int _bounce_and_link(
        self, unsigned long long iova, unsigned long long phys, unsigned long long size, unsigned long long pad,
        int direction, int attrs, int cpu) except? -1 nogil
    cdef int _sync(self, unsigned long long offset, unsigned long long size, int cpu) except? -1 nogil
    cdef int _unlink(
        self, unsigned long long offset, unsigned long long size, int direction, int attrs, int cpu) except? -1 nogil
    cdef int _remove(
        self, unsigned long long offset, unsigned long long size, int direction, int attrs, bint free_iova, int cpu) except? -1 nogil
    cdef int _destroy(self, unsigned long long mapped_len, int direction, int attrs, int cpu) except? -1 nogil
    cdef int _free(self, int cpu) except? -1 nogil
    cdef Py_ssize_t _link_pieces(
        self, const unsigned long long* phys, const unsigned long long* sizes, Py_ssize_t first, Py_ssize_t end,
        unsigned long long offset, int direction, int attrs, int cpu) except? -1 nogil
    cdef bint _plain(self, int direction, int attrs) noexcept nogil
    cdef unsigned long long _table_of(self, unsigned long long iova) noexcept nogil
    cdef Py_ssize_t _fill_pieces(
        self, unsigned long long* table, const unsigned long long* phys, const unsigned long long* sizes,
        Py_ssize_t first, Py_ssize_t end, unsigned long long offset, int direction, int attrs) noexcept nogil
    cdef bint _room(
        self, unsigned long long* table, Py_ssize_t at, unsigned long long phys, unsigned long long size,
        unsigned long long present, unsigned long long refused) noexcept nogil
