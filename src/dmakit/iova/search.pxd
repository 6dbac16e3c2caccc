from dmakit.consts cimport *
from dmakit.iova.bits cimport ceil_log2, largest_fit, mix
from dmakit.iova.tree cimport IovaTree

cimport cython



cdef class IovaSearch:
    cdef readonly IovaTree tree
    cdef readonly unsigned long long start_pfn
    cdef readonly unsigned long long dma_32bit_pfn
    cdef readonly unsigned long long max32_alloc_size
    cdef readonly int above
    cdef unsigned long long _place(self, unsigned long long size, unsigned long long limit) noexcept nogil
    cdef void _inserted(self, int node) noexcept nogil
    cdef void _removing(self, int node) noexcept nogil
    cdef unsigned long long _alloc(self, unsigned long long size, unsigned long long limit) noexcept nogil
    cdef void _remove(self, int node) noexcept nogil
    cdef unsigned long long _cover(self, unsigned long long lo, unsigned long long hi) noexcept nogil


@cython.final
cdef class LinuxSearch(IovaSearch):
    cdef readonly int cached_node
    cdef readonly int cached32_node
    cdef unsigned long long _walk(
        self, int start, unsigned long long limit, unsigned long long low, unsigned long long size, int order
    ) noexcept nogil
    cdef int _find_limit(self, unsigned long long limit) noexcept nogil


@cython.final
cdef class AugmentedSearch(IovaSearch):
    pass
