cdef class Gather:
    cdef readonly unsigned long long start
    cdef readonly unsigned long long end
    cdef readonly unsigned long long pgsize
    cdef readonly unsigned long long freelist
    cdef readonly unsigned long long mapped
    cdef readonly bint queued
    cdef void _init(self) noexcept nogil
    cdef void _add_range(self, unsigned long long iova, unsigned long long size) noexcept nogil
    cdef bint _is_empty(self) noexcept nogil

cdef unsigned long long ALL_ONES
