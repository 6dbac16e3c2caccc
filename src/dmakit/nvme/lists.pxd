from dmakit.consts cimport *
from dmakit.nvme.pool cimport DescriptorPool

cdef class ListWriter:
    cdef readonly DescriptorPool small
    cdef readonly DescriptorPool large
    cdef readonly unsigned long long chain
    cdef Py_ssize_t tail
    cdef unsigned long long addr
    cdef unsigned long long* words
    cdef bint lacks_large
    cdef int failed
    cdef void _restart(self) noexcept nogil
    cdef int _first(self, bint large) except? -1 nogil
    cdef int _further(self) except? -1 nogil
    cdef void _at(self, Py_ssize_t block, bint large) noexcept nogil
    cdef object _lacking(self)
    cdef int _drop(self, unsigned long long chain) noexcept nogil
    cdef int _build(self, const unsigned long long[::1] addrs, const unsigned long long[::1] lengths, Py_ssize_t first,
                    Py_ssize_t end) except? -1 nogil
    cdef unsigned long long _word(self, bint high) noexcept nogil
    cdef Py_ssize_t _build_run(
        self, const unsigned long long[::1] addrs, const unsigned long long[::1] lengths,
        const unsigned long long[::1] bounds, unsigned long long[::1] pointers, unsigned long long[::1] chains,
        Py_ssize_t count) except? -1
    cdef Py_ssize_t _drop_run(self, unsigned long long[::1] chains, Py_ssize_t count) noexcept
