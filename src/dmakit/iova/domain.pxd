from dmakit.consts cimport *
from dmakit.iova.allocator cimport IovaAllocator
from dmakit.iova.exact cimport exact

cimport cython



@cython.final
cdef class IovaDomain(IovaAllocator):
    cdef int _cpu(self, object cpu) except -1
    cdef unsigned long long _pfn(self, str name, object value, long long low) except? 0
    cdef unsigned long long _allocated(self, object pfn) except 0
    cdef Py_ssize_t _alloc_words(
        self, int cpu, object sizes, unsigned long long limit_pfn, bint flush, object pfns
    ) except? -1
    cdef bint _free_words(self, int cpu, object pfns, object sizes) except -1
    cdef bint _all_sizes(self, unsigned long long* sizes, Py_ssize_t n) noexcept nogil
