cdef class Gather:
    cdef public unsigned long long start
    cdef public unsigned long long end
    cdef public unsigned long long pgsize
    cdef public unsigned long long freelist
    cdef public unsigned long long mapped
    cdef public bint queued
    cdef void _init(self) noexcept nogil
    cdef void _add_range(self, unsigned long long iova, unsigned long long size) noexcept nogil
    cdef bint _is_empty(self) noexcept nogil

cdef unsigned long long ALL_ONES
